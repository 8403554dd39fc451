"""Stores in one process: real nodes, logs and replicas on disks in memory, joined by calls instead of sockets."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
from typing import Any

import google_crc32c
import msgspec

from tallymark_protocol.codec import decode, encode
from tallymark_protocol.errors import to_wire
from tallymark_protocol.frames import Frame
from tallymark_protocol.messages import (
    Appended,
    AppendHeader,
    FrameType,
    PartitionStatus,
    RealtimeResult,
    StatusResult,
    StoreDigest,
    StoreRealtime,
    StoreStatus,
)
from tallymark_protocol.model import AggType, MetricSchema
from tallymark_protocol.schema import encode_record, make_record
from tallymark_runtime.assignments import COPIES, Assignment, assignment_key
from tallymark_runtime.catalog import metric_key
from tallymark_runtime.clock import RealClock
from tallymark_runtime.coordinator import MemoryCoordinator
from tallymark_runtime.disk import BytesLike, MemoryDisk
from tallymark_store.node import StoreConfig, StoreNode
from tallymark_store.replication.effects import Role
from tallymark_store.wal import WalConfig

from .store_driver import payload_of

WAIT_S = 20.0
SUM = MetricSchema(code="sum", agg_type=AggType.SUM)


class Answers:
    """Where a store's answers go."""

    def __init__(self) -> None:
        self.answers: dict[int, Any] = {}

    def respond(self, request_id: int, kind: int, body: bytes) -> None:
        assert kind == FrameType.APPENDED
        assert request_id not in self.answers, "answered once"
        self.answers[request_id] = decode(Appended, body)

    def respond_error(self, request_id: int, error: Any) -> None:
        assert request_id not in self.answers, "answered once"
        self.answers[request_id] = to_wire(error) if isinstance(error, BaseException) else error


class SetClock:
    """A machine's clock that somebody has set."""

    def __init__(self) -> None:
        self.ahead_ns = 0
        self._clock = RealClock()

    def now_ns(self) -> int:
        return self._clock.now_ns() + self.ahead_ns

    def monotonic_ns(self) -> int:
        return self._clock.monotonic_ns()


class Wire:
    """The transport of one node: what it sends arrives in the next turn of the loop, unless it is cut."""

    def __init__(self, cluster: Cluster, node_id: str) -> None:
        self._cluster = cluster
        self._node_id = node_id

    def send(self, node_id: str, parts: Sequence[BytesLike]) -> bool:
        data = b"".join(bytes(part) for part in parts)
        asyncio.get_running_loop().call_soon(self._cluster.deliver, self._node_id, node_id, data)
        return True


class Cluster:
    """Three stores, or as many as are named."""

    def __init__(self, names: Sequence[str] = ("a", "b", "c"), **changes: Any) -> None:
        self.clock = RealClock()
        self.coordinator = MemoryCoordinator(self.clock)
        self.disks = {name: MemoryDisk() for name in names}
        self.clocks = {name: SetClock() for name in names}
        self.nodes: dict[str, StoreNode] = {}
        self.reports: list[str] = []
        self.cut: set[tuple[str, str]] = set()  # (from, to)
        self.config = StoreConfig(
            node_id="",
            partition_count=1,
            replication_factor=3,
            wal=WalConfig(segment_bytes=256 * 1024),
            lease_ttl_s=0.5,
        )
        self.config = msgspec.structs.replace(self.config, **changes)
        self._answers = Answers()
        self._next = 0
        self._seed = 0

    # ------------------------------------------------------------ nodes

    async def start(self, *names: str) -> None:
        for name in names or sorted(self.disks):
            self._seed += 1
            node = StoreNode(
                msgspec.structs.replace(self.config, node_id=name),
                disk=self.disks[name],
                coordinator=self.coordinator,
                clock=self.clocks[name],
                rng=random.Random(self._seed),
                transport=Wire(self, name),
                address=f"{name}:1",
                report=self.reports.append,
            )
            self.nodes[name] = node
            await node.start()

    def deliver(self, sender: str, receiver: str, data: bytes) -> None:
        node = self.nodes.get(receiver)
        if node is not None and sender in self.nodes and (sender, receiver) not in self.cut:
            node.on_bundle(sender, data)

    def isolate(self, name: str) -> None:
        for other in self.disks:
            self.cut |= {(name, other), (other, name)}

    def kill(self, name: str) -> None:
        """As kill -9: what was not synced is lost."""
        node = self.nodes.pop(name)
        node.halt()
        threads = node.driver._threads  # type: ignore[union-attr]
        threads.close()
        self.disks[name].crash(random.Random(1), lose_all=True)

    def wipe(self, name: str) -> None:
        self.disks[name] = MemoryDisk()

    async def close(self) -> None:
        for name in sorted(self.nodes):
            await self.nodes.pop(name).close()
        await self.coordinator.close()

    async def assign(self, partition: int, *names: str) -> None:
        value = msgspec.msgpack.encode(Assignment(names))
        await self.coordinator.put(assignment_key(partition), value)

    def registered(self, partition: int) -> list[str]:
        prefix = COPIES + b"%d/" % partition
        return [item.key[len(prefix) :].decode() for item in self.coordinator._state.range(prefix).items]

    async def statuses(self, name: str) -> list[PartitionStatus]:
        answer = await self.nodes[name].call(StoreStatus())
        assert isinstance(answer, StatusResult)
        return answer.partitions

    # ------------------------------------------------------------ waiting

    async def until(self, condition: Callable[[], Any]) -> Any:
        async with asyncio.timeout(WAIT_S):
            while not (found := condition()):  # noqa: ASYNC110 - several stores set no event
                await asyncio.sleep(0.005)
        return found

    def leads(self, name: str, partition: int = 0) -> bool:
        replica = self.nodes[name].store.replicas.get(partition)
        return replica is not None and replica.role is Role.LEADER

    def leader(self, partition: int = 0) -> str:
        """Who leads; "" while nobody does, or two believe to."""
        leading = [
            name
            for name, node in sorted(self.nodes.items())
            if partition in node.store.replicas and node.store.replicas[partition].role is Role.LEADER
        ]
        return leading[0] if len(leading) == 1 else ""

    async def wait_leader(self, partition: int = 0, *, other_than: str = "") -> str:
        found = await self.until(
            lambda: self.leader(partition) if self.leader(partition) != other_than else ""
        )
        assert isinstance(found, str)
        return found

    # ------------------------------------------------------------ use

    async def create(self, schema: MetricSchema = SUM) -> int:
        return await self.coordinator.put(metric_key(schema.code), encode_record(make_record(0, schema)))

    def send(
        self, name: str, events: list[dict[str, Any]], chunk: tuple[int, int], *, partition: int = 0
    ) -> int:
        producer, sequence = chunk
        now = self.clock.now_ns()
        data = payload_of(events, [(producer, sequence, now, len(events), producer * 1_000 + sequence)])
        return self.send_payload(name, data, partition=partition)

    def send_payload(self, name: str, data: bytes, *, partition: int = 0) -> int:
        self._next += 1
        head = encode(AppendHeader(partition, google_crc32c.value(data)))
        body = len(head).to_bytes(2, "little") + head + data
        self.nodes[name].on_append(self._answers, Frame(int(FrameType.APPEND), 0, self._next, 0, body))
        return self._next

    def answer(self, request: int) -> Any:
        return self._answers.answers.get(request)

    async def append(
        self, name: str, events: list[dict[str, Any]], chunk: tuple[int, int], *, partition: int = 0
    ) -> Any:
        request = self.send(name, events, chunk, partition=partition)
        return await self.until(lambda: self.answer(request))

    async def append_anywhere(
        self, events: list[dict[str, Any]], chunk: tuple[int, int], *, partition: int = 0
    ) -> Appended:
        """As a gateway does: the same bytes again, at whoever leads, until they are taken."""
        producer, sequence = chunk
        now = self.clock.now_ns()
        data = payload_of(events, [(producer, sequence, now, len(events), producer * 1_000 + sequence)])
        while True:
            request = self.send_payload(await self.wait_leader(partition), data, partition=partition)
            try:
                answer = await self.until(lambda request=request: self.answer(request))
            except TimeoutError:
                continue
            if isinstance(answer, Appended):
                return answer
            assert answer.retriable, answer
            await asyncio.sleep(0.005)

    async def count(self, name: str, account: int, **fields: Any) -> int:
        call = StoreRealtime(partition=0, metric_code="sum", account_id=account, **fields)
        answer = await self.nodes[name].call(call)
        assert isinstance(answer, RealtimeResult)
        return answer.stats.count

    async def check_digests(self, partition: int = 0) -> PartitionStatus:
        """All copies that hold the partition come to the same state, which is what their logs say."""
        leader = await self.wait_leader(partition)
        end = self.nodes[leader].store.partitions[partition].log_end
        await self.until(
            lambda: all(
                partition not in node.store.replicas or node.store.partitions[partition].high_watermark >= end
                for node in self.nodes.values()
            )
        )
        found = []
        for name in sorted(self.nodes):
            if partition not in self.nodes[name].store.replicas:
                continue
            for recount in (False, True):
                status = await self.nodes[name].call(StoreDigest(partition=partition, recount=recount))
                assert isinstance(status, PartitionStatus)
                found.append(status)
        assert len({(status.applied, status.digest) for status in found}) == 1, found
        return found[0]
