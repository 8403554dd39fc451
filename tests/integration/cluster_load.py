"""What clients do to a cluster while it suffers, and the comparison of everything it says with what they were told.

Four kinds of caller share one `Ledger`: such as ride out every fault inside a long call, such as give up soon and
come back with the same events or `retry()`, and one below the SDK that sends the bytes of a chunk, and the bytes of
older chunks again, through either gateway, and one that reads totals all the time. Everything is resolved in the end: a chunk without an answer is sent again
under its identity until it has one, so that at the end the total of each account is known exactly.
"""

import asyncio
import contextlib
import random
import time

import msgspec
from cluster import PARTITIONS, Cluster
from ledger import ACCOUNTS, WAIT_SECONDS_MAX, Entry, Ledger, Load, Outcome, create_metrics

from tallymark import AsyncClient, BackpressureError, UnavailableError
from tallymark_protocol.chunk import encode_events
from tallymark_protocol.codec import decode_receipt
from tallymark_protocol.errors import Reason
from tallymark_protocol.identifiers import partition_of
from tallymark_protocol.messages import FrameType, Receipt
from tallymark_runtime.peer import PeerClient

PARKED_SECONDS = 0.3  # a call's timeout, so that a fault is the caller's to survive
RIDING_SECONDS = 60.0  # so that the SDK survives it by itself
READ_SECONDS = 1.0
REPEAT_SECONDS = 1.0  # how long the bare caller waits for an answer
PAUSE_SECONDS = 0.02  # between its attempts
SETTLE_SECONDS_MAX = 60.0


class Sealed(msgspec.Struct):
    """A chunk's bytes, and what was said of them, by partition: the first word, which all others must equal."""

    data: bytes
    entries: list[Entry]
    answers: dict[int, object] = {}


class Repeater:
    """Sends chunks as bytes, through gateways in turn, and the same bytes again and again."""

    def __init__(self, cluster: Cluster, ledger: Ledger, seed: int) -> None:
        self._ledger = ledger
        self._rng = random.Random(seed)
        self._producer = ledger.rng.getrandbits(64)
        self._addresses = cluster.addresses
        self._chunks: list[Sealed] = []
        self.refused = 0  # attempts that brought no whole answer
        self.refusal: object = None  # what the last of them brought

    async def run(self, until: asyncio.Event) -> None:
        """Send new chunks and old ones until `until` is set and everything sent has its answer."""
        peers = [PeerClient(address, rng=self._rng) for address in self._addresses]
        try:
            while not until.is_set():
                self._chunks.append(self._seal(self._ledger.batch(8)))
                await self._settle(peers, self._chunks[-1])
                await self._settle(peers, self._rng.choice(self._chunks[-50:]))
            for sealed in self._chunks[-20:]:
                await self._settle(peers, sealed)
        finally:
            for peer in peers:
                await peer.close()

    def _seal(self, entries: list[Entry]) -> Sealed:
        events = [entry.event for entry in entries]
        encoded = encode_events(events, self._producer, len(self._chunks) + 1, time.time_ns())
        assert len(encoded.chunks) == 1
        assert not encoded.bad
        return Sealed(encoded.chunks[0].data, entries)

    async def _settle(self, peers: list[PeerClient], sealed: Sealed) -> None:
        """Send a chunk until every partition has answered."""
        try:
            async with asyncio.timeout(SETTLE_SECONDS_MAX):
                while not await self._ask(self._rng.choice(peers), sealed):
                    self.refused += 1
                    await asyncio.sleep(PAUSE_SECONDS)
        except TimeoutError:
            raise AssertionError(f"a chunk is not answered: {self.refusal}") from None

    async def _ask(self, peer: PeerClient, sealed: Sealed) -> bool:
        try:
            frame = await peer.request(FrameType.INGEST, sealed.data, timeout_s=REPEAT_SECONDS)
        except (UnavailableError, BackpressureError) as error:
            self.refusal = error
            return False
        receipt = decode_receipt(frame.body)
        assert receipt.partition_count == PARTITIONS
        if receipt.failures:
            self.refusal = receipt.failures
        for failure in receipt.failures:
            assert failure.error.retriable, f"no way to go on: {failure}"
        failed = {failure.partition for failure in receipt.failures}
        for partition in sorted(
            {partition_of(e.event.account_id, PARTITIONS) for e in sealed.entries} - failed
        ):
            answer = self._answer(sealed, receipt, partition)
            if partition not in sealed.answers:
                sealed.answers[partition] = answer
                for entry, outcome, place in answer:
                    self._ledger.settle(entry, outcome, place)
            assert answer == sealed.answers[partition], "a repeat was answered otherwise than the first time"
        return not failed

    def _answer(
        self, sealed: Sealed, receipt: Receipt, partition: int
    ) -> list[tuple[Entry, Outcome, tuple[int, int] | None]]:
        """What a receipt says of a chunk's events for one partition, read from the bytes up."""
        outcomes = {outcome.index: outcome for outcome in receipt.outcomes}
        base = next((run.base_offset for run in receipt.runs if run.partition == partition), None)
        answer = []
        passed = 0
        for index, entry in enumerate(sealed.entries):
            if partition_of(entry.event.account_id, PARTITIONS) != partition:
                continue
            outcome = outcomes.get(index)
            if outcome is None:
                assert base is not None, f"partition {partition} is missing in {receipt}"
                answer.append((entry, Outcome.STORED, (partition, base + passed)))
            elif outcome.reason == Reason.DUPLICATE:
                answer.append((entry, Outcome.DUPLICATE, (outcome.partition, outcome.offset)))
            elif outcome.reason == Reason.CONFLICT:
                answer.append((entry, Outcome.CONFLICT, (outcome.partition, outcome.offset)))
            else:
                answer.append((entry, Outcome.REJECTED, None))
            passed += 1
        return answer


class Reader:
    """Reads running totals without end: what has been acknowledged before a read is in it, and no total goes back."""

    def __init__(self, cluster: Cluster, ledger: Ledger, seed: int) -> None:
        self._addresses = cluster.addresses
        self._ledger = ledger
        self._rng = random.Random(seed)
        self._seen: dict[tuple[int, str], int] = {}
        self.answers = 0

    async def run(self, until: asyncio.Event) -> None:
        """Read until `until` is set."""
        async with AsyncClient(self._addresses) as client:
            while not until.is_set():
                account, metric = self._rng.randrange(ACCOUNTS), self._rng.choice(("used", "peak", "seats"))
                acknowledged = self._ledger.stored[account, metric]
                try:
                    usage = await client.query_realtime(account, metric, timeout=READ_SECONDS)
                except UnavailableError:
                    continue
                self.answers += 1
                count = usage.value.count
                what = f"account {account}, {metric}: {count} events"
                assert count >= acknowledged, f"{what}, but {acknowledged} were acknowledged before"
                assert count >= self._seen.get((account, metric), 0), f"{what}, fewer than before"
                self._seen[account, metric] = count


class World:
    """A cluster with everything that was ever said to it and by it, over any number of faults.

    Attributes:
        sound: whether nothing has gone wrong in it so far, and nothing is under way.
    """

    def __init__(self, cluster: Cluster, seed: int) -> None:
        self.cluster = cluster
        self.folder = cluster.folder
        self.ledger = Ledger(seed)
        self.rng = random.Random(seed)
        self.sound = False
        self.reader = Reader(cluster, self.ledger, seed)
        self.repeater = Repeater(cluster, self.ledger, seed)
        self.riding: Load
        self.parked: Load

    async def start(self) -> None:
        """Start the cluster and create the metrics."""
        await self.cluster.start()
        async with AsyncClient(self.cluster.addresses) as client:
            await create_metrics(client)
        self.sound = True

    @contextlib.asynccontextmanager
    async def load(self):
        """Have clients send, and stop them once everything that they began is resolved. Then compare.

        No call with time enough may have failed.
        """
        self.sound = False
        addresses = self.cluster.addresses
        self.riding = Load(addresses, self.ledger, clients=2, calls=2, timeout=RIDING_SECONDS)
        self.parked = Load(addresses, self.ledger, clients=2, calls=2, timeout=PARKED_SECONDS)
        enough = asyncio.Event()
        async with self.riding.running(), self.parked.running(), asyncio.TaskGroup() as group:
            group.create_task(self.repeater.run(enough))
            group.create_task(self.reader.run(enough))
            self.riding.resume()
            self.parked.resume()
            await self.wait_acknowledged()
            yield self
            await self.wait_acknowledged()
            enough.set()
            await asyncio.gather(self.riding.settle(), self.parked.settle())
        assert not self.riding.failures, "a call that had time enough has failed"
        await self.check()
        self.sound = True

    async def wait_acknowledged(self, more: int = 150) -> None:
        """Wait until `more` entries than now have an outcome."""
        await self.parked.wait_acknowledged(more)

    async def wait_refused(self, more: int = 10) -> None:
        """Wait until callers have seen `more` calls fail than now."""
        target = len(self.parked.failures) + more
        async with asyncio.timeout(WAIT_SECONDS_MAX):
            while len(self.parked.failures) < target:  # noqa: ASYNC110 - the callers tell nobody
                await asyncio.sleep(PAUSE_SECONDS)

    async def check(self) -> None:
        """Compare all that the cluster says with all that it has ever said, and its copies with one another.

        Nothing may be under way.
        """
        async with AsyncClient(self.cluster.addresses) as client:
            await self.ledger.check(client, settled=True)
        await self.cluster.check_replicas()


class Worlds:
    """One world after the other: each serves tests until one of them has found it wanting."""

    def __init__(self, folders, **options: object) -> None:
        self._folders = folders
        self._options = options
        self._count = 0
        self._world: World | None = None

    async def take(self) -> World:
        """The world in use if it is sound, else a new one."""
        if self._world is None or not self._world.sound:
            self.close()
            self._count += 1
            cluster = Cluster(self._folders.mktemp("cluster"), **self._options)
            self._world = World(cluster, self._count)
            await self._world.start()
        return self._world

    def close(self) -> None:
        """Kill the one in use."""
        if self._world is not None:
            self._world.cluster.close()
            self._world = None
