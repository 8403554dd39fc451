"""Alerts instances that do as they are told, over one list of records by partition.

`AlertLog` is what all instances see; `FakeAlerts` is one address. A test raises alerts with `log.add(...)`; fetches
without a match are held until then, or until `instance.release()`. `instance.script` holds what becomes of the next
fetches instead: an error, None (the connection is lost), or a function of the call.
"""

from fake_gateway import FakeGateway

from tallymark_protocol import messages as m
from tallymark_protocol.codec import decode_call, encode
from tallymark_protocol.errors import WireError
from tallymark_protocol.messages import FrameType

PERIOD_END = 30 * 86_400 * 10**9


def wide(number):
    """A 128-bit number of a message."""
    return number.to_bytes(16, "little", signed=True)


class AlertLog:
    """The alert records of a cluster, and the instances that serve them."""

    def __init__(self, partition_count=4):
        self.partitions = [[] for _ in range(partition_count)]
        self.instances = []

    def add(self, *accounts, partition=0, metric="m"):
        """Raise an alert for each account, at once, and answer who waits."""
        for account in accounts:
            records = self.partitions[partition]
            position = len(records)
            record = m.AlertRecord(
                f"{partition}-{position}", account, metric, "free", 100, 0, PERIOD_END, wide(100), wide(1), wide(1),
                10**18, position, partition, position,
            )  # fmt: skip
            records.append(record)
        for instance in self.instances:
            instance.answer_held()

    def ends(self):
        """How many records each partition has."""
        return {partition: len(records) for partition, records in enumerate(self.partitions)}

    def batch(self, call):
        """Answer a fetch as of now."""
        if call.since is None:
            return m.AlertsBatch([], self.ends())
        found, reached = [], {}
        for partition, records in enumerate(self.partitions):
            reached[partition] = max(call.since.get(partition, 0), 0)
            for record in records[reached[partition] :]:
                if len(found) == call.limit:
                    break
                reached[partition] = record.position + 1
                if call.account_ids and record.account_id not in call.account_ids:
                    continue
                if call.metric_codes and record.metric_code not in call.metric_codes:
                    continue
                found.append(record)
        return m.AlertsBatch(found, reached)


class FakeAlerts(FakeGateway):
    """One alerts instance: `async with FakeAlerts(log) as instance`."""

    def __init__(self, log):
        super().__init__()
        self.log = log
        self.waiting = []  # (peer, request id, call)
        self.fetches = []
        log.instances.append(self)

    def call(self, peer, frame):
        """Answer a CALL."""
        call = decode_call(frame.body)
        if not isinstance(call, m.AlertsFetch):
            super().call(peer, frame)
            return
        self.fetches.append(call)
        if self.script:
            answer = self.script.popleft()
            if callable(answer):
                answer = answer(call)
            if answer is None:
                peer.transport.abort()
                return
            kind = FrameType.ERROR if isinstance(answer, WireError) else FrameType.RESULT
            peer.answer(kind, encode(answer), frame.request_id)
            return
        batch = self.log.batch(call)
        if batch.alerts or not call.wait_ms:
            peer.answer(FrameType.RESULT, encode(batch), frame.request_id)
        else:
            self.waiting.append((peer, frame.request_id, call))

    def answer_held(self):
        """Answer the held fetches that something matches by now."""
        held, self.waiting = self.waiting, []
        for peer, request_id, call in held:
            batch = self.log.batch(call)
            if batch.alerts:
                peer.answer(FrameType.RESULT, encode(batch), request_id)
            else:
                self.waiting.append((peer, request_id, call))

    def release(self):
        """Answer all held fetches, as when their wait is over."""
        held, self.waiting = self.waiting, []
        for peer, request_id, call in held:
            peer.answer(FrameType.RESULT, encode(self.log.batch(call)), request_id)

    async def stop(self):
        """Lose all connections, and what is held."""
        await super().stop()
        self.waiting.clear()
