WEBHOOK_CALLS = ()


class WebhooksConfig:
    def __init__(self, **k):
        pass


class Webhooks:
    def __init__(self, *a):
        pass

    async def start(self):
        pass

    async def close(self):
        pass

    def problem(self):
        return ""
