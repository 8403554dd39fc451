"""Meter what comes out of a queue that delivers at least once, so that each message counts exactly once.

Three rules do it:
  - the event id is the message's id: a message that is delivered again is a duplicate, whoever handles it;
  - messages are acknowledged to the queue only after the receipt: a crash before that delivers them again;
  - what the receipt refuses goes to a dead letter list: sending it again as it is can't help.

Run it against a server (`tallymark dev`): python examples/queue_consumer.py [host:port]
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections import deque
from dataclasses import dataclass, field

from tallymark import AggType, AlreadyExistsError, AsyncClient, Event, IngestError, MetricSchema, PeriodType

EMAILS = MetricSchema(code="emails_sent", agg_type=AggType.SUM, period_type=PeriodType.LIFETIME)
BATCH_MESSAGES = 100


@dataclass(frozen=True)
class Message:
    """What the queue holds: an id that stays the same whenever the message is delivered, and a body."""

    id: str
    customer: int
    metric: str
    recipients: int


@dataclass
class Queue:
    """Stands for SQS, Pub/Sub, RabbitMQ: a message comes back until it is acknowledged."""

    ready: deque[Message] = field(default_factory=deque)
    in_flight: dict[str, Message] = field(default_factory=dict)

    def receive(self, count: int) -> list[Message]:
        """Take up to `count` messages, which stay in flight until they are acknowledged."""
        taken = [self.ready.popleft() for _ in range(min(count, len(self.ready)))]
        self.in_flight.update((message.id, message) for message in taken)
        return taken

    def acknowledge(self, message: Message) -> None:
        """Be done with a message."""
        self.in_flight.pop(message.id, None)

    def redeliver(self) -> None:
        """What happens when the visibility timeout of a consumer that died is over."""
        self.ready.extend(self.in_flight.values())
        self.in_flight.clear()


class Crash(Exception):
    """The consumer's end at the worst moment: counted, but not acknowledged."""


class Consumer:
    """Takes messages in batches, meters them, acknowledges them."""

    def __init__(self, queue: Queue, client: AsyncClient) -> None:
        self.n_stored = 0
        self.n_duplicates = 0
        self.dead_letters: list[tuple[Message, str]] = []
        self._queue = queue
        self._client = client

    async def run(self, *, crash_after_batches: int | None = None) -> None:
        """Work until the queue is empty."""
        batches = 0
        while messages := self._queue.receive(BATCH_MESSAGES):
            await self._flush(messages, acknowledge=batches != crash_after_batches)
            batches += 1

    async def _flush(self, messages: list[Message], *, acknowledge: bool) -> None:
        events = [
            Event(
                account_id=message.customer,
                metric_code=message.metric,
                value=message.recipients,
                id=message.id,
            )
            for message in messages
        ]
        try:
            receipt = await self._client.ingest(events)
        except IngestError as error:
            # Not acknowledged: the queue delivers them again, and the ids see to it that they count once. Where
            # no other consumer would help, `await error.retry()` goes on with exactly what is unresolved.
            print(f"not metered for now: {error}", file=sys.stderr)
            return
        self.n_stored += receipt.n_stored
        self.n_duplicates += receipt.n_duplicates
        refused = [(entry.index, entry.message) for entry in receipt.rejected]
        refused += [(entry.index, "the same id was used for something else") for entry in receipt.conflicts]
        self.dead_letters += [(messages[index], reason) for index, reason in refused]
        if not acknowledge:
            raise Crash
        for message in messages:
            self._queue.acknowledge(message)


async def run(address: str) -> dict[str, int]:
    """Fill a queue, consume it with a consumer that dies and one that goes on; return what was counted."""
    queue = Queue()
    for number in range(1_000):
        queue.ready.append(
            Message(f"m-{number}", customer=number % 4, metric=EMAILS.code, recipients=1 + number % 3)
        )
    queue.ready.append(Message("m-typo", customer=1, metric="emails.sent", recipients=5))

    async with AsyncClient([address]) as client:
        try:
            await client.metrics.create(EMAILS)
        except AlreadyExistsError as error:
            if not error.identical:
                raise
        first = Consumer(queue, client)
        try:
            await first.run(crash_after_batches=3)
        except Crash:
            print(
                f"first consumer:  {first.n_stored} stored, then it died before acknowledging the last batch"
            )
        queue.redeliver()
        second = Consumer(queue, client)
        await second.run()
        print(f"second consumer: {second.n_stored} stored, {second.n_duplicates} known already")
        for message, reason in second.dead_letters:
            print(f"dead letter:     {message.id}: {reason}")
        total = 0
        for customer in range(4):
            usage = await client.query_realtime(customer, EMAILS.code)
            total += usage.value.sum
            print(f"customer {customer}:      {usage.value.sum} emails in {usage.value.count} messages")
    return {
        "first": first.n_stored,
        "second": second.n_stored,
        "known": second.n_duplicates,
        "dead": len(second.dead_letters),
        "left": len(queue.ready) + len(queue.in_flight),
        "emails": total,
    }


def main(address: str) -> dict[str, int]:
    """Run the example against the server at `address`."""
    return asyncio.run(run(address))


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else os.environ.get("TALLYMARK_SERVER", "localhost:7001"))
