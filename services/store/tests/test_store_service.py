"""A store on a disk and a coordinator in memory: the order of commits, answers and metrics, and how it ends."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator
from typing import Any

import google_crc32c
import msgspec
import pytest

from tallymark_protocol.codec import decode, encode
from tallymark_protocol.errors import ErrorCode, Reason, TallymarkError, UnavailableError, to_wire
from tallymark_protocol.frames import Frame
from tallymark_protocol.identifiers import encode_event_id
from tallymark_protocol.messages import (
    Appended,
    AppendHeader,
    FrameType,
    PartitionStatus,
    RealtimeResult,
    StoreDigest,
    StoreRealtime,
    StoreStatus,
)
from tallymark_protocol.model import AggType, MetricSchema
from tallymark_protocol.schema import MetricRecord, encode_record, make_record
from tallymark_runtime.catalog import metric_key, node_key
from tallymark_runtime.clock import ManualClock, RealClock
from tallymark_runtime.coordinator import MemoryCoordinator
from tallymark_runtime.disk import MemoryDisk
from tallymark_store import checkpoint
from tallymark_store.service import StoreConfig, StoreService, serve
from tallymark_store.wal import LogBusyError, LogFullError, WalConfig

from .payload_builder import event
from .store_driver import BASE, payload_of

CONFIG = StoreConfig(node_id="s", partition_count=2, wal=WalConfig(segment_bytes=64 * 1024))
SUM = MetricSchema(code="sum", agg_type=AggType.SUM)


class Connection:
    """Where a store's answers go."""

    def __init__(self) -> None:
        self.answers: dict[int, Appended | TallymarkError | Any] = {}
        self._came = asyncio.Event()

    def respond(self, request_id: int, kind: int, body: bytes) -> None:
        assert kind == FrameType.APPENDED
        assert request_id not in self.answers, "answered once"
        self.answers[request_id] = decode(Appended, body)
        self._came.set()

    def respond_error(self, request_id: int, error: Any) -> None:
        assert request_id not in self.answers, "answered once"
        self.answers[request_id] = to_wire(error) if isinstance(error, BaseException) else error
        self._came.set()

    async def wait_answer(self, request_id: int) -> Any:
        async with asyncio.timeout(20):
            while request_id not in self.answers:
                self._came.clear()
                await self._came.wait()
        return self.answers[request_id]


class Life:
    """A running store and what a test does with it."""

    def __init__(self, world: World, service: StoreService) -> None:
        self.world = world
        self.service = service
        assert service.driver is not None
        self.store = service.driver
        self.connection = Connection()
        self._next = 0

    def send(
        self, events: list[dict[str, Any]], chunk: tuple[int, int], *, partition: int = 0, **header: Any
    ) -> int:
        """Hand a payload of one chunk over; returns the number of the request."""
        producer, sequence = chunk
        now = self.world.clock.now_ns()
        data = payload_of(events, [(producer, sequence, now, len(events), producer * 1_000 + sequence)])
        head = encode(AppendHeader(partition, google_crc32c.value(data), **header))
        return self.send_body(len(head).to_bytes(2, "little") + head + data)

    def send_body(self, body: bytes) -> int:
        self._next += 1
        frame = Frame(int(FrameType.APPEND), 0, self._next, 0, body)
        self.service.on_frames(self.connection, [frame])  # type: ignore[arg-type]
        return self._next

    async def append(self, events: list[dict[str, Any]], chunk: tuple[int, int], **header: Any) -> Any:
        return await self.connection.wait_answer(self.send(events, chunk, **header))

    async def count(self, account: int, code: str = "sum") -> int:
        call = StoreRealtime(partition=0, metric_code=code, account_id=account)
        answer = await self.service.on_call(self.connection, call)  # type: ignore[arg-type]
        assert isinstance(answer, RealtimeResult)
        return answer.stats.count

    async def digests(self, partition: int = 0) -> tuple[str, str]:
        found = []
        for recount in (False, True):
            call = StoreDigest(partition=partition, recount=recount)
            answer = await self.service.on_call(self.connection, call)  # type: ignore[arg-type]
            assert isinstance(answer, PartitionStatus)
            found.append(answer.digest)
        return found[0], found[1]


class World:
    """What outlives a store: its disk, the coordinator, time."""

    def __init__(self) -> None:
        self.disk = MemoryDisk()
        self.clock = ManualClock(BASE)
        self.coordinator = MemoryCoordinator(self.clock)
        self.rng = random.Random(1)
        self.reports: list[str] = []

    @contextlib.asynccontextmanager
    async def life(self, **changes: Any) -> AsyncIterator[Life]:
        service = await serve(
            msgspec.structs.replace(CONFIG, **changes),
            self.disk,
            self.coordinator,
            self.clock,
            self.rng,
            report=self.reports.append,
        )
        try:
            yield Life(self, service)
        finally:
            await service.close()

    async def create(self, schema: MetricSchema = SUM) -> int:
        return await self.coordinator.put(metric_key(schema.code), encode_record(make_record(0, schema)))

    async def delete(self, code: str = "sum") -> None:
        assert await self.coordinator.delete(metric_key(code))


@pytest.fixture
async def world() -> AsyncIterator[World]:
    world = World()
    yield world
    await world.coordinator.close()


async def settle(life: Life) -> None:
    """Until the store has heard of everything that the coordinator knows."""
    await life.service.catalog.wait_revision(life.world.coordinator.revision)


def ids(n: int, first: int = 0) -> list[dict[str, Any]]:
    return [event(1, "sum", value=i, id=encode_event_id(first + i)) for i in range(n)]


# ---------------------------------------------------------------- appends


async def test_an_answer_comes_after_the_commit(world: World) -> None:
    """Never in the same turn of the loop; what it says is readable at once."""
    await world.create()
    async with world.life() as life:
        await life.append([event(2, "sum")], (9, 0))
        request = life.send(ids(3), (1, 0))
        assert request not in life.connection.answers
        partition = life.store.partitions[0]
        base = partition.log_end - 3
        answer = await life.connection.wait_answer(request)
        assert answer == Appended(None, base)
        assert partition.high_watermark == base + 3
        assert await life.count(1) == 3


async def test_async_is_answered_at_once_unless_it_rests_on_something(world: World) -> None:
    """A duplicate, a repeat and a reused sequence wait for the commit of the event that they speak of."""
    await world.create()
    async with world.life() as life:
        await life.append([event(2, "sum")], (9, 0))
        first = life.send(ids(1), (1, 0), is_async=True)
        duplicate = life.send(ids(1), (1, 1), is_async=True)
        repeat = life.send(ids(1), (1, 0), is_async=True)
        assert list(life.connection.answers) == [1, first]
        await life.connection.wait_answer(duplicate)
        await life.connection.wait_answer(repeat)
        answers = life.connection.answers
        assert answers[repeat].chunks[0].base_offset == answers[first].base_offset
        assert answers[duplicate].chunks[0].exceptions == [
            (0, int(Reason.DUPLICATE), answers[first].base_offset)
        ]


async def test_the_same_answer_in_another_life(world: World) -> None:
    """With and without a checkpoint; repeats and ids are known before the first append is taken."""
    await world.create()
    events = [*ids(2), event(1, "nothing"), *ids(1)]
    async with world.life() as life:
        answer = await life.append(events, (1, 0))
        assert [x[1] for x in answer.chunks[0].exceptions] == [
            int(Reason.UNKNOWN_METRIC),
            int(Reason.DUPLICATE),
        ]
    for take in (True, False, False):
        async with world.life() as life:
            assert (await life.append(events, (1, 0))).chunks == answer.chunks
            again = await life.append(ids(2), (2, int(take)))
            if again.chunks[0].exceptions:
                assert [x[1] for x in again.chunks[0].exceptions] == [int(Reason.DUPLICATE)] * 2
            if take:
                await life.service.checkpoint()
            assert await life.count(1) == 2
            first, second = await life.digests()
            assert first == second
    assert world.reports == []


@pytest.mark.parametrize("error", [LogFullError, LogBusyError])
async def test_a_refused_batch_can_be_sent_again(
    world: World, error: type[TallymarkError], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its ids and sequence are as new as before."""
    await world.create()
    async with world.life() as life:
        await life.append([event(2, "sum")], (9, 0))

        def refuse(*_: Any) -> None:
            raise error("no room")

        with monkeypatch.context() as patched:
            patched.setattr(life.store.wal, "append", refuse)
            answer = await life.append(ids(5), (1, 0))
            assert answer.retriable
        await life.append(ids(2, 100), (3, 0))
        assert (await life.append(ids(5), (1, 0))).chunks is None
        assert await life.count(1) == 7
        first, second = await life.digests()
        assert first == second


@pytest.mark.parametrize(
    "spoil",
    [
        lambda body: b"",
        lambda body: body[:1],
        lambda body: body[:2],
        lambda body: body[:12],
        lambda body: body[: 2 + int.from_bytes(body[:2], "little")],
        lambda body: body[:-1],
        lambda body: body[:-1] + bytes([body[-1] ^ 1]),
        lambda body: b"\xff\xff" + body[2:],
    ],
)
async def test_malformed_bytes_are_refused_and_nothing_else(world: World, spoil: Any) -> None:
    """The next request is served."""
    await world.create()
    async with world.life() as life:
        data = payload_of(ids(2), [(1, 0, BASE, 2, 1)])
        head = encode(AppendHeader(0, google_crc32c.value(data)))
        body = len(head).to_bytes(2, "little") + head + data
        answer = await life.connection.wait_answer(life.send_body(spoil(body)))
        assert answer.code == ErrorCode.MALFORMED
        assert not answer.retriable
        assert (await life.append(ids(2), (1, 0))).chunks is None


async def test_only_partitions_that_are_there_are_served(world: World) -> None:
    """With the code by which gateways look for another leader."""
    async with world.life() as life:
        answer = await life.append(ids(1), (1, 0), partition=2)
        assert answer.code == ErrorCode.NOT_LEADER
        assert answer.retriable


# ---------------------------------------------------------------- metrics


async def test_a_metric_made_a_moment_ago_is_known(world: World) -> None:
    """Nothing is said to be unknown before the coordinator was asked."""
    async with world.life() as life:
        revision = await world.create()
        answer = await life.append([event(1, "sum"), event(1, "other")], (1, 0))
        assert answer.chunks[0].exceptions == [(1, int(Reason.UNKNOWN_METRIC), -1)]
        schemas = life.store.partitions[0].schemas
        assert schemas.record(schemas.slot_of("sum")).uid == revision


async def test_appends_wait_for_the_metrics_that_their_gateway_knew(world: World) -> None:
    """A metric deleted and made again is judged as the new one by whoever has seen that."""
    old = await world.create()
    async with world.life() as life:
        await life.append(ids(1), (1, 0))
        await world.delete()
        new = await world.create(MetricSchema(code="sum"))
        assert (await life.append(ids(1), (1, 1), metrics_revision=new)).chunks is None
        schemas = life.store.partitions[0].schemas
        assert schemas.record(schemas.slot_of("sum")).uid == new
        assert schemas.record(schemas.slot_of_uid(old)).deleted
        answer = await life.append(ids(1), (1, 2), metrics_revision=10**6)
        assert answer.retriable
        assert answer.code == ErrorCode.PARTITION_UNAVAILABLE


async def test_changes_made_while_the_store_was_down_are_in_force(world: World) -> None:
    """Deleted, and made again under the same code: events never fold under the other's uid."""
    await world.create()
    async with world.life() as life:
        await life.append(ids(3), (1, 0))
    await world.delete()
    async with world.life() as life:
        answer = await life.append(ids(1), (1, 1))
        assert answer.chunks[0].exceptions == [(0, int(Reason.UNKNOWN_METRIC), -1)]
    await world.create()
    async with world.life() as life:
        assert (await life.append(ids(2), (1, 2))).chunks is None
        assert await life.count(1) == 2
        first, second = await life.digests()
        assert first == second


@pytest.mark.parametrize("error", [LogFullError, LogBusyError])
async def test_a_change_that_found_no_room_comes_before_the_next_event(
    world: World, error: type[TallymarkError], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In every partition; no event is stored under a metric that is gone."""
    await world.create()
    async with world.life() as life:
        for partition in (0, 1):
            await life.append(ids(1), (partition, 0), partition=partition)

        def refuse(*_: Any) -> None:
            raise error("no room")

        with monkeypatch.context() as patched:
            patched.setattr(life.store.wal, "append", refuse)
            await world.delete()
            await settle(life)
            assert all(partition.schemas_stale for partition in life.store.partitions.values())
            answer = await life.append(ids(1), (5, 0))
            assert answer.retriable
        for partition in (0, 1):
            answer = await life.append(ids(1, 50), (partition, 1), partition=partition)
            assert answer.chunks[0].exceptions == [(0, int(Reason.UNKNOWN_METRIC), -1)]
            first, second = await life.digests(partition)
            assert first == second
        new = await world.create()
        assert (await life.append(ids(1), (7, 0), metrics_revision=new)).chunks is None


async def test_a_metric_that_the_catalog_has_not_heard_of_is_not_taken_for_deleted(world: World) -> None:
    """A refresh goes by what the catalog knows, which is everything up to its revision and no more."""
    async with world.life() as life:
        revision = await world.create()
        await life.append(ids(1), (1, 0))
        life.service.catalog._records.clear()
        life.service.catalog.revision = revision - 1
        life.store.refresh_schemas(life.store.partitions[0])
        schemas = life.store.partitions[0].schemas
        assert schemas.slot_of("sum") >= 0


# ---------------------------------------------------------------- reads and ends


async def test_a_digest_can_be_asked_for_under_load(world: World) -> None:
    """It is of one offset, though commits go on while it is waited for."""
    await world.create()
    async with world.life() as life:
        for i in range(30):
            life.send(ids(20, 20 * i), (1, i))
            first, second = await life.digests()
            assert isinstance(first, str)
            assert isinstance(second, str)
        first, second = await life.digests()
        assert first == second


async def test_a_fold_that_fails_ends_the_process(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """No total is told that lacks a record."""
    await world.create()
    loop = asyncio.get_running_loop()
    seen: list[Any] = []
    async with world.life() as life:
        await life.append(ids(1), (1, 0))

        def fail(*_: Any) -> None:
            raise MemoryError

        with monkeypatch.context() as patched:
            patched.setattr(life.store.partitions[0].fold, "apply", fail)
            patched.setattr(life.store.partitions[0].fold, "apply_run", fail)
            loop.set_exception_handler(lambda _, context: seen.append(context))
            life.send(ids(1, 5), (1, 1))
            async with asyncio.timeout(20):
                await life.service.failed.wait()
            with pytest.raises(UnavailableError):
                await life.count(1)
    loop.set_exception_handler(None)
    assert seen


async def test_a_log_that_fails_ends_the_process(world: World) -> None:
    """Nothing that was not synced is answered, and nobody waits for ever."""
    await world.create()
    async with world.life() as life:
        await life.append(ids(1), (1, 0))
        waiting = asyncio.ensure_future(life.store.wait_committed(life.store.partitions[0], 10**9))
        await asyncio.sleep(0)
        world.disk.fail_next("sync")
        world.disk.fail_next("write")
        request = life.send(ids(1, 5), (1, 1))
        async with asyncio.timeout(20):
            await life.service.failed.wait()
            with pytest.raises(UnavailableError):
                await waiting
        assert request not in life.connection.answers
        answer = await life.append(ids(1), (1, 2))
        assert answer.retriable


async def test_a_record_that_rotted_refuses_the_partition(world: World) -> None:
    """Found by answering a repeat from it; what the same payload would have stored leaves no trace."""
    await world.create()
    async with world.life() as life:
        await life.append([*ids(3), event(1, "nothing")], (1, 0))
        partition = life.store.partitions[0]
        row = partition.index.row(partition.index.find(partition.log_end - 1))
        name = next(name for name in world.disk.at("wal").list() if name.startswith("wal-") or "0" in name)
        world.disk.at("wal").flip_bit(name, row.position + 90)
        answer = await life.append([*ids(3), event(1, "nothing")], (1, 0))
        assert answer.code == ErrorCode.PARTITION_DAMAGED
        assert (await life.append(ids(1), (1, 1))).code == ErrorCode.PARTITION_DAMAGED
        assert (await life.append(ids(1), (1, 1), partition=1)).chunks is None
        status = await life.service.on_call(life.connection, StoreStatus())  # type: ignore[arg-type]
        assert [bool(p.error) for p in status.partitions] == [True, False]  # type: ignore[attr-defined]


async def test_a_damaged_id_file_does_not_end_checkpoints(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is still needed of it is in memory, and is written anew."""
    monkeypatch.setattr(checkpoint, "ID_FILES_MAX", 2)
    await world.create()
    disk = world.disk.at("checkpoints").at("p-0000")
    async with world.life() as life:
        for i in range(2):
            await life.append(ids(10, 10 * i), (1, i))
            await life.count(1)
            await life.service.checkpoint()
        name = next(name for name in disk.list() if name.startswith("ids-"))
        disk.flip_bit(name, 100)
        await life.append(ids(10, 20), (1, 2))
        await life.count(1)
        await life.service.checkpoint()
        assert [x for x in disk.list() if x.startswith("ids-")] != [name]
    async with world.life() as life:
        answer = await life.append(ids(30), (2, 0))
        assert len(answer.chunks[0].exceptions) == 30
        assert await life.count(1) == 30
    assert world.reports == []


async def test_one_leader_at_a_time(world: World) -> None:
    """A second store on the same coordinator doesn't start."""
    async with world.life():
        other = World()
        other.coordinator = world.coordinator
        with pytest.raises(UnavailableError, match="led by another"):
            async with other.life():
                pass


async def test_another_coordinators_history_is_refused(world: World) -> None:
    """Its revisions would be uids of other metrics than those in the log."""
    await world.create()
    for i in range(5):
        async with world.life() as life:
            await life.append(ids(1, i), (1, i))
    fresh = MemoryCoordinator(world.clock)
    kept, world.coordinator = world.coordinator, fresh
    for _ in range(8):  # a supervisor starts it again and again, and every start moves the revision on
        with pytest.raises(UnavailableError, match="belongs to another cluster"):
            async with world.life():
                pass
    await fresh.close()
    world.coordinator = kept
    async with world.life() as life:
        assert await life.count(1) == 5


async def test_records_of_metrics_are_versions_of_one(world: World) -> None:
    """An update reaches the partition's log before the next batch."""
    await world.create()
    async with world.life() as life:
        await life.append(ids(1), (1, 0))
        item = await world.coordinator.get(metric_key("sum"))
        assert item is not None
        changed: MetricRecord = msgspec.structs.replace(
            make_record(0, msgspec.structs.replace(SUM, description="new")), version=2
        )
        revision = await world.coordinator.put(metric_key("sum"), encode_record(changed))
        await life.append(ids(1, 5), (1, 1), metrics_revision=revision)
        schemas = life.store.partitions[0].schemas
        assert schemas.record(schemas.slot_of("sum")).version == 2
        assert schemas.record(schemas.slot_of("sum")).uid == item.create_revision


async def test_constants_that_were_not_asked_for_are_not_said_to_be_ignored(world: World) -> None:
    """Only a setting that somebody gave."""
    async with world.life():
        pass
    async with world.life(partition_count=5, is_partition_count_set=False):
        assert world.reports == []
    async with world.life(partition_count=5):
        assert [report for report in world.reports if "the setting of 5 is ignored" in report]


async def test_a_second_store_of_a_name_is_refused_for_good(world: World) -> None:
    """It is a mistake in its settings, and no server that might come back."""
    world.coordinator = MemoryCoordinator(RealClock())
    await world.coordinator.put(node_key("store", CONFIG.node_id), b"")
    with pytest.raises(UnavailableError, match="another node_id") as caught:
        async with world.life(lease_ttl_s=0.1):
            pass
    assert not caught.value.retriable
