"""The coordinator port's contract, over every implementation, and what is particular to each."""

import asyncio
import random
from contextlib import asynccontextmanager

import msgspec
import pytest

from tallymark_protocol import limits
from tallymark_protocol.errors import (
    ErrorCode,
    InvalidRequestError,
    NotFoundError,
    RemoteProtocolError,
    ServerError,
    TallymarkError,
    UnavailableError,
)
from tallymark_protocol.messages import CoordinatorCall, Welcome
from tallymark_runtime.clock import ManualClock
from tallymark_runtime.coordinator import (
    CompactedError,
    Compare,
    CoordinatorService,
    Delete,
    EventKind,
    FileCoordinator,
    Get,
    MemoryCoordinator,
    Put,
    RemoteCoordinator,
    Snapshot,
    Target,
    absent,
    follow,
    local,
    serve_coordinator,
    unchanged,
)
from tallymark_runtime.coordinator.etcd import EtcdCoordinator
from tallymark_runtime.coordinator.local import DamagedStateError
from tallymark_runtime.coordinator.state import CoordinatorState, Leases
from tallymark_runtime.transport import FrameServer, HandlerBase


class Host(HandlerBase):
    """A node that hosts a coordinator."""

    def __init__(self, coordinator):
        self.service = serve_coordinator(coordinator)

    async def on_call(self, connection, call):
        assert isinstance(call, CoordinatorCall)
        return await self.service.on_call(call)


class Subject:
    """A coordinator under test with the means to let its time pass."""

    def __init__(self, coordinator, core, clock):
        self.coordinator = coordinator
        self.core = core
        self.clock = clock

    async def pass_time(self, seconds):
        """Move the clock and let expired leases end."""
        self.clock.advance(int(seconds * 1e9))
        await self.core.expire()


@asynccontextmanager
async def make(kind, folder, etcd=None):
    if kind == "etcd":
        coordinator = EtcdCoordinator(
            etcd.addresses, rng=random.Random(1), prefix=f"{folder}/".encode(), timeout_s=20.0
        )
        try:
            yield Subject(coordinator, None, None)
        finally:
            await coordinator.close()
        return
    clock = ManualClock()
    core = MemoryCoordinator(clock) if kind in ("memory", "remote") else FileCoordinator(folder, clock)
    if kind != "remote":
        try:
            yield Subject(core, core, clock)
        finally:
            await core.close()
        return
    server = FrameServer(Host(core), lambda: Welcome(1, "host", "dev", 0))
    remote = RemoteCoordinator(await server.start(), rng=random.Random(1))
    try:
        yield Subject(remote, core, clock)
    finally:
        await remote.close()
        await core.close()
        await server.close()


@pytest.fixture(params=["memory", "file", "remote", "etcd"])
async def coordinator(request, tmp_path):
    etcd = request.getfixturevalue("shared_etcd") if request.param == "etcd" else None
    async with make(request.param, tmp_path / "coordinator", etcd) as made:
        yield made.coordinator


@pytest.fixture(params=["memory", "file", "remote"])
async def subject(request, tmp_path):
    """For what takes a clock to be moved, or a history to be short; etcd's own tests have the same over again."""
    async with make(request.param, tmp_path / "coordinator") as made:
        yield made


async def next_of(iterator):
    """The next item, within a bound that only a defect reaches."""
    async with asyncio.timeout(10):
        return await anext(iterator)


# ---------------------------------------------------------------- contract


async def test_put_and_get_count_revisions_and_versions(coordinator):
    """A key knows when it was created and changed, and how often."""
    assert await coordinator.get(b"a") is None
    first = await coordinator.put(b"a", b"1")
    second = await coordinator.put(b"a", b"2")
    item = await coordinator.get(b"a")
    assert second == first + 1
    assert (item.value, item.create_revision, item.mod_revision, item.version) == (b"2", first, second, 2)


async def test_revisions_begin_as_in_etcd(subject):
    """An empty coordinator is at revision 1, the first change is 2."""
    coordinator = subject.coordinator
    assert (await coordinator.range(b"")).revision == 1
    assert await coordinator.put(b"a", b"") == 2


async def test_deleting_and_creating_again_gives_a_new_key(coordinator):
    """The create revision tells two keys of one name apart; epochs and uids rely on it."""
    await coordinator.put(b"a", b"1")
    before = await coordinator.get(b"a")
    assert await coordinator.delete(b"a") is True
    assert await coordinator.get(b"a") is None
    await coordinator.put(b"a", b"1")
    after = await coordinator.get(b"a")
    assert after.create_revision > before.create_revision
    assert after.version == 1


async def test_deleting_nothing_changes_no_revision(coordinator):
    """A deletion of an absent key is no change."""
    revision = await coordinator.put(b"a", b"")
    assert await coordinator.delete(b"b") is False
    assert (await coordinator.range(b"")).revision == revision


async def test_range_is_sorted_and_keeps_to_its_prefix(coordinator):
    """A prefix ends where it ends, also at the highest byte."""
    for key in (b"b/2", b"b/1", b"b", b"b\xff", b"b\xff\xff", b"c", b"a"):
        await coordinator.put(key, b"v" + key)
    items = (await coordinator.range(b"b")).items
    assert [item.key for item in items] == [b"b", b"b/1", b"b/2", b"b\xff", b"b\xff\xff"]
    assert [item.key for item in (await coordinator.range(b"b\xff")).items] == [b"b\xff", b"b\xff\xff"]
    assert len((await coordinator.range(b"")).items) == 7
    assert (await coordinator.range(b"zz")).items == []


async def test_txn_takes_one_branch_whole(coordinator):
    """All comparisons hold and the first list is executed, or one doesn't and the second is."""
    result = await coordinator.txn([absent(b"k")], [Put(b"k", b"1"), Put(b"l", b"2")], [Get(b"k")])
    assert result.succeeded
    again = await coordinator.txn([absent(b"k")], [Put(b"k", b"x")], [Get(b"k"), Get(b"", is_prefix=True)])
    assert not again.succeeded
    assert again.revision == result.revision
    assert again.results[0][0].value == b"1"
    assert [item.key for item in again.results[1]] == [b"k", b"l"]
    one = await coordinator.get(b"k")
    two = await coordinator.get(b"l")
    assert one.mod_revision == two.mod_revision == result.revision


@pytest.mark.parametrize(
    ("compare", "holds"),
    [
        (Compare(b"k", Target.VERSION, "=", 2), True),
        (Compare(b"k", Target.VERSION, "!=", 2), False),
        (Compare(b"k", Target.VERSION, "<", 2), False),
        (Compare(b"k", Target.VERSION, ">", 1), True),
        (Compare(b"k", Target.CREATE_REVISION, "=", 2), True),
        (Compare(b"k", Target.MOD_REVISION, "=", 3), True),
        (Compare(b"k", Target.MOD_REVISION, ">", 3), False),
        (Compare(b"k", Target.VALUE, "=", b"two"), True),
        (Compare(b"k", Target.VALUE, "<", b"two!"), True),
        (Compare(b"k", Target.VALUE, "!=", b"two"), False),
        (Compare(b"absent", Target.VERSION, "=", 0), True),
        (Compare(b"absent", Target.VERSION, "<", 1), True),
        (Compare(b"absent", Target.CREATE_REVISION, ">", 0), False),
        (Compare(b"absent", Target.VALUE, "=", b""), False),
        (Compare(b"absent", Target.VALUE, "!=", b"x"), False),
        (Compare(b"absent", Target.VALUE, "<", b"x"), False),
    ],
)
async def test_every_comparison(coordinator, compare, holds):
    """Targets and relations as in etcd."""
    created = await coordinator.put(b"k", b"one")
    if compare.key == b"k" and compare.target in (
        Target.CREATE_REVISION,
        Target.MOD_REVISION,
    ):  # written for revisions that begin at 2
        compare = msgspec.structs.replace(compare, operand=compare.operand + created - 2)
    await coordinator.put(b"k", b"two")
    assert (await coordinator.txn([compare], [])).succeeded is holds


async def test_compare_and_swap_lets_one_of_many_win(coordinator):
    """Of many that saw the same key, one changes it."""
    await coordinator.put(b"k", b"0")
    item = await coordinator.get(b"k")
    results = await asyncio.gather(
        *(coordinator.txn([unchanged(item)], [Put(b"k", b"%d" % i)], [Get(b"k")]) for i in range(20))
    )
    winners = [i for i, result in enumerate(results) if result.succeeded]
    assert len(winners) == 1
    assert (await coordinator.get(b"k")).value == b"%d" % winners[0]


async def test_txn_deletes_a_prefix(coordinator):
    """A prefix deletion gives what it deleted, in one revision."""
    await coordinator.put(b"p/1", b"a")
    await coordinator.put(b"p/2", b"b")
    await coordinator.put(b"q", b"c")
    result = await coordinator.txn([], [Delete(b"p/", is_prefix=True)])
    assert [item.value for item in result.results[0]] == [b"a", b"b"]
    assert [item.key for item in (await coordinator.range(b"")).items] == [b"q"]


@pytest.mark.parametrize(
    ("success", "message"),
    [
        ([Put(b"k", b"1"), Put(b"k", b"2")], "more than once"),
        ([Put(b"k", b"1"), Delete(b"k")], "more than once"),
        ([Delete(b"", is_prefix=True), Put(b"k", b"1")], "more than once"),
        ([Put(b"", b"1")], "a key has 1 to"),
        ([Put(b"x" * (limits.COORDINATOR_KEY_BYTES_MAX + 1), b"1")], "a key has 1 to"),
        ([Put(b"k", bytes(limits.COORDINATOR_VALUE_BYTES_MAX + 1))], "at most"),
        ([Put(b"%d" % i, b"") for i in range(limits.COORDINATOR_OPERATIONS_MAX + 1)], "at most"),
    ],
)
async def test_bad_transactions_change_nothing(coordinator, success, message):
    """A transaction outside the limits is refused whole."""
    with pytest.raises(InvalidRequestError, match=message):
        await coordinator.txn([], success)
    assert await coordinator.range(b"") == await coordinator.range(b"nothing")


async def test_comparisons_of_the_wrong_type_are_refused(coordinator):
    """A number is no value, and there are four relations."""
    with pytest.raises(InvalidRequestError, match="compared with bytes"):
        await coordinator.txn([Compare(b"k", Target.VALUE, "=", 1)], [])
    with pytest.raises(InvalidRequestError, match="relation"):
        await coordinator.txn([Compare(b"k", Target.VERSION, "~", 1)], [])


async def test_watch_gives_changes_from_a_revision_on(coordinator):
    """History first, then what happens, each change once and in order."""
    await coordinator.put(b"w/a", b"1")
    start = (await coordinator.range(b"w/")).revision + 1
    await coordinator.put(b"w/b", b"2")
    await coordinator.put(b"x", b"elsewhere")
    watch = coordinator.watch(b"w/", start)
    events = await next_of(watch)
    assert [(e.kind, e.item.key, e.item.value) for e in events] == [(EventKind.PUT, b"w/b", b"2")]
    revision = (await coordinator.txn([], [Delete(b"w/a"), Put(b"w/c", b"3")])).revision
    events = await next_of(watch)
    assert [(e.kind, e.item.key, e.item.mod_revision) for e in events] == [
        (EventKind.DELETE, b"w/a", revision),
        (EventKind.PUT, b"w/c", revision),
    ]
    await watch.aclose()


async def test_watch_wakes_a_waiting_reader(coordinator):
    """A reader that waits is told of a change at once."""
    revision = (await coordinator.range(b"")).revision
    watch = coordinator.watch(b"k", revision + 1)
    waiting = asyncio.create_task(next_of(watch))
    await coordinator.put(b"k", b"1")
    assert (await waiting)[0].item.value == b"1"
    await watch.aclose()


async def test_watch_from_a_compacted_revision_says_so(subject, monkeypatch):
    """Events that are not kept any more are an error, never a gap."""
    coordinator = subject.coordinator
    monkeypatch.setattr(limits, "COORDINATOR_HISTORY_EVENTS_MAX", 4)
    for i in range(10):
        await coordinator.put(b"k%d" % i, b"")
    watch = coordinator.watch(b"k", 2)
    with pytest.raises(CompactedError) as caught:
        await next_of(watch)
    assert caught.value.details["compact_revision"] == 7
    watch = coordinator.watch(b"k", 8)
    assert [e.item.key for e in await next_of(watch)] == [b"k6", b"k7", b"k8", b"k9"]
    await watch.aclose()


async def test_follow_lists_again_after_compaction(subject, monkeypatch):
    """A follower that fell behind gets a new snapshot and goes on from there."""
    coordinator = subject.coordinator
    monkeypatch.setattr(limits, "COORDINATOR_HISTORY_EVENTS_MAX", 4)
    await coordinator.put(b"f/0", b"")
    following = follow(coordinator, b"f/")
    first = await next_of(following)
    assert isinstance(first, Snapshot)
    assert [item.key for item in first.items] == [b"f/0"]
    for i in range(1, 10):
        await coordinator.put(b"f/%d" % i, b"")
    second = await next_of(following)
    assert isinstance(second, Snapshot)
    assert len(second.items) == 10
    await coordinator.put(b"f/x", b"")
    assert [e.item.key for e in await next_of(following)] == [b"f/x"]
    await following.aclose()


async def test_a_lease_takes_its_keys_with_it(subject):
    """Keys live as long as their lease is renewed, and go in one revision when it isn't."""
    coordinator = subject.coordinator
    lease = await coordinator.lease_grant(3)
    await coordinator.put(b"n/1", b"here", lease=lease)
    await coordinator.put(b"n/2", b"here", lease=lease)
    await coordinator.put(b"n/3", b"stays")
    await subject.pass_time(2.9)
    assert await coordinator.lease_keepalive(lease) == 3
    await subject.pass_time(2.9)
    assert await coordinator.get(b"n/1") is not None
    start = (await coordinator.range(b"n/")).revision + 1
    watch = coordinator.watch(b"n/", start)
    await subject.pass_time(0.2)
    events = await next_of(watch)
    await watch.aclose()
    assert [(e.kind, e.item.key, e.item.mod_revision) for e in events] == [
        (EventKind.DELETE, b"n/1", start),
        (EventKind.DELETE, b"n/2", start),
    ]
    assert [item.key for item in (await coordinator.range(b"n/")).items] == [b"n/3"]
    with pytest.raises(NotFoundError):
        await coordinator.lease_keepalive(lease)
    with pytest.raises(NotFoundError):
        await coordinator.put(b"n/1", b"late", lease=lease)


async def test_a_lease_that_ran_out_is_not_renewed(subject):
    """Also before anyone noticed that it had run out."""
    lease = await subject.coordinator.lease_grant(1)
    subject.clock.advance(1_000_000_000)
    with pytest.raises(NotFoundError):
        await subject.coordinator.lease_keepalive(lease)


async def test_revoking_a_lease_deletes_its_keys(coordinator):
    """At once, and only once."""
    lease = await coordinator.lease_grant(30)
    await coordinator.put(b"n", b"", lease=lease)
    await coordinator.lease_revoke(lease)
    assert await coordinator.get(b"n") is None
    with pytest.raises(NotFoundError):
        await coordinator.lease_revoke(lease)


async def test_a_put_without_the_lease_unbinds_the_key(coordinator):
    """The last put decides which lease a key goes with."""
    lease = await coordinator.lease_grant(30)
    await coordinator.put(b"n", b"1", lease=lease)
    await coordinator.put(b"n", b"2")
    await coordinator.lease_revoke(lease)
    assert (await coordinator.get(b"n")).value == b"2"


async def test_bad_leases_are_refused(coordinator):
    """A ttl has bounds, and an unknown lease binds nothing."""
    for ttl_s in (0, -1, limits.COORDINATOR_LEASE_SECONDS_MAX + 1):
        with pytest.raises(InvalidRequestError):
            await coordinator.lease_grant(ttl_s)
    with pytest.raises(NotFoundError):
        await coordinator.put(b"k", b"", lease=12345)
    assert await coordinator.get(b"k") is None


async def test_closing_ends_everything(coordinator):
    """Waiting watches end with an error, and further operations are refused."""
    watch = coordinator.watch(b"k", 2)
    waiting = asyncio.create_task(next_of(watch))
    await coordinator.range(b"")
    await coordinator.close()
    with pytest.raises(UnavailableError):
        await waiting
    with pytest.raises(UnavailableError):
        await coordinator.put(b"k", b"")


# ---------------------------------------------------------------- the core


def test_random_transactions_agree_with_a_naive_model():
    """Against a dictionary: contents, revisions, versions and the whole history."""
    rng = random.Random(7)
    state = CoordinatorState()
    model = {}
    history = []
    revision = 1
    for _ in range(2_000):
        keys = rng.sample([b"a", b"ab", b"b", b"b\xff", b"c"], k=rng.randint(1, 3))
        operations = [Put(key, rng.randbytes(2)) if rng.random() < 0.6 else Delete(key) for key in keys]
        changes = []
        for operation in operations:
            key = operation.key
            if isinstance(operation, Put):
                created, version = model[key][1:] if key in model else (revision + 1, 0)
                model[key] = (operation.value, created, version + 1)
                changes.append((EventKind.PUT, key, operation.value))
            elif model.pop(key, None) is not None:
                changes.append((EventKind.DELETE, key, b""))
        revision += bool(changes)
        history += [(*change, revision) for change in changes]
        state = state.clone()
        assert state.txn([], operations, [], leases=None).revision == revision
        found = {i.key: (i.value, i.create_revision, i.version) for i in state.range(b"").items}
        assert found == model
    since = revision - 100
    assert [(e.kind, e.item.key, e.item.value, e.item.mod_revision) for e in state.events(b"", since)] == [
        change for change in history if change[3] >= since
    ]
    assert [e.item.key for e in state.events(b"b", since)] == [
        key for _, key, _, at in history if at >= since and key.startswith(b"b")
    ]


def test_a_clone_leaves_the_original_alone():
    """What is being written is not seen."""
    state = CoordinatorState()
    state.txn([], [Put(b"a", b"1")], [], leases=None)
    other = state.clone()
    other.txn([], [Put(b"a", b"2"), Put(b"b", b"3")], [], leases=None)
    assert [item.value for item in state.range(b"").items] == [b"1"]
    assert state.revision == 2
    assert len(state.events(b"", 2)) == 1


def test_history_forgets_whole_revisions(monkeypatch):
    """A watcher never gets a part of a revision."""
    monkeypatch.setattr(limits, "COORDINATOR_HISTORY_EVENTS_MAX", 5)
    state = CoordinatorState()
    state.txn([], [Put(b"%d" % i, b"") for i in range(4)], [], leases=None)
    state.txn([], [Put(b"%d" % i, b"") for i in range(3)], [], leases=None)
    assert state.compacted == 2
    assert len(state.events(b"", 3)) == 3
    state.txn([], [Put(b"%d" % i, b"") for i in range(9)], [], leases=None)
    assert state.compacted == 4, "one revision larger than the whole history is not kept at all"
    with pytest.raises(CompactedError):
        state.events(b"", 4)


def test_the_state_is_bounded(monkeypatch):
    """A put that would make it too large is refused, and making room allows it again."""
    monkeypatch.setattr(limits, "COORDINATOR_STATE_BYTES_MAX", 1_000)
    state = CoordinatorState()
    state.txn([], [Put(b"a", bytes(500))], [], leases=None)
    with pytest.raises(TallymarkError, match="would exceed") as caught:
        state.txn([], [Put(b"b", bytes(500))], [], leases=None)
    assert caught.value.code == ErrorCode.TOO_LARGE
    assert state.revision == 2
    state.txn([], [Put(b"a", b"")], [], leases=None)
    state.txn([], [Put(b"b", bytes(500))], [], leases=None)
    state.txn([], [Delete(b"b")], [], leases=None)
    state.txn([], [Put(b"c", bytes(700))], [], leases=None)


def test_lease_ids_of_two_incarnations_differ():
    """A process that was away never renews a lease that isn't its own."""
    assert Leases(1).grant(1, 0) != Leases(2).grant(1, 0)


# ---------------------------------------------------------------- the file


async def test_the_file_survives_a_restart(tmp_path):
    """Keys, revisions and versions are as they were; keys of leases are gone, in a revision of their own."""
    first = FileCoordinator(tmp_path, ManualClock())
    lease = await first.lease_grant(1_000)
    await first.put(b"a", b"1")
    await first.put(b"a", b"2")
    before = await first.get(b"a")
    revision = await first.put(b"n/1", b"", lease=lease)
    await first.close()

    second = FileCoordinator(tmp_path, ManualClock())
    assert await second.get(b"a") == before
    assert await second.get(b"n/1") is None
    assert (await second.range(b"")).revision == revision + 1
    with pytest.raises(NotFoundError):
        await second.lease_keepalive(lease)
    assert await second.lease_grant(1_000) != lease
    with pytest.raises(CompactedError):
        await next_of(second.watch(b"", revision))
    assert await second.put(b"b", b"") == revision + 2
    await second.close()


async def test_revisions_never_repeat_over_many_restarts(tmp_path):
    """Epochs come from create revisions: none is ever given twice."""
    seen = []
    for _ in range(5):
        coordinator = FileCoordinator(tmp_path, ManualClock())
        lease = await coordinator.lease_grant(10)
        await coordinator.put(b"leader", b"", lease=lease)
        seen.append((await coordinator.get(b"leader")).create_revision)
        await coordinator.close()
    assert seen == sorted(set(seen))


async def test_every_damaged_byte_is_noticed(tmp_path):
    """A flipped bit, a missing end, an appended byte: an error that names the file, never another state."""
    coordinator = FileCoordinator(tmp_path, ManualClock())
    await coordinator.put(b"metrics/a", b"schema")
    await coordinator.close()
    path = tmp_path / "coordinator.state"
    whole = path.read_bytes()
    damaged = [whole[:i] + bytes([whole[i] ^ 1]) + whole[i + 1 :] for i in range(len(whole))]
    damaged += [whole[:i] for i in range(len(whole))]
    damaged += [whole + b"\0", b"", bytes(len(whole))]
    for data in damaged:
        path.write_bytes(data)
        with pytest.raises(DamagedStateError, match=r"coordinator\.state"):
            FileCoordinator(tmp_path, ManualClock())
    path.write_bytes(whole)
    again = FileCoordinator(tmp_path, ManualClock())
    assert (await again.get(b"metrics/a")).value == b"schema"
    await again.close()


async def test_a_lost_file_is_noticed(tmp_path):
    """Where there has been a state, none is an error."""
    await FileCoordinator(tmp_path, ManualClock()).close()
    (tmp_path / "coordinator.state").unlink()
    with pytest.raises(DamagedStateError, match="missing"):
        FileCoordinator(tmp_path, ManualClock())


async def test_a_crash_while_writing_leaves_the_state_before(tmp_path):
    """Half a new file beside the old one means nothing."""
    coordinator = FileCoordinator(tmp_path, ManualClock())
    await coordinator.put(b"a", b"1")
    await coordinator.close()
    (tmp_path / "coordinator.state.new").write_bytes(b"TMCOORD1 half a st")
    (tmp_path / "coordinator.created").unlink()  # as if the very first start had been cut short
    again = FileCoordinator(tmp_path, ManualClock())
    assert (await again.get(b"a")).value == b"1"
    await again.close()
    assert (tmp_path / "coordinator.created").exists()


async def test_one_folder_has_one_coordinator(tmp_path):
    """A second one is refused while the first is open."""
    first = FileCoordinator(tmp_path, ManualClock())
    with pytest.raises(UnavailableError, match="another process"):
        FileCoordinator(tmp_path, ManualClock())
    await first.close()
    await FileCoordinator(tmp_path, ManualClock()).close()


async def test_nothing_is_seen_or_answered_before_it_is_on_disk(tmp_path, monkeypatch):
    """Readers see the state before while a write is under way, and many changes share one write."""
    coordinator = FileCoordinator(tmp_path, ManualClock())
    loop = asyncio.get_running_loop()
    writing, go_on = asyncio.Event(), asyncio.Event()
    images = []

    async def persist(image):
        images.append(image)
        writing.set()
        await go_on.wait()

    monkeypatch.setattr(coordinator, "_persist", persist)
    tasks = [loop.create_task(coordinator.put(b"0", b""))]
    await writing.wait()
    tasks += [loop.create_task(coordinator.put(b"%d" % i, b"")) for i in range(1, 6)]
    watching = loop.create_task(anext(coordinator.watch(b"", 2)))
    assert (await coordinator.range(b"")).items == []
    assert not any(task.done() for task in [*tasks, watching])
    go_on.set()
    assert sorted(await asyncio.gather(*tasks)) == [2, 3, 4, 5, 6, 7]
    assert len(images) == 2
    assert [event.item.mod_revision for event in await watching][:1] == [2]
    await coordinator.close()


async def test_a_full_disk_refuses_changes_and_recovers(tmp_path, monkeypatch):
    """Nothing of the refused change is seen, and the next one works when there is room again."""
    coordinator = FileCoordinator(tmp_path, ManualClock())
    write = local._write_file

    def full(path, data):
        raise OSError(28, "no space left on device")

    monkeypatch.setattr(local, "_write_file", full)
    with pytest.raises(UnavailableError) as caught:
        await coordinator.put(b"a", b"1")
    assert caught.value.code == ErrorCode.DISK_FULL
    assert caught.value.retriable
    assert await coordinator.get(b"a") is None
    monkeypatch.setattr(local, "_write_file", write)
    assert await coordinator.put(b"a", b"1") == 2
    await coordinator.close()


async def test_a_failed_sync_ends_the_coordinator(tmp_path, monkeypatch):
    """Whether the change is on disk is open, so nothing is answered any more; a restart finds out."""
    coordinator = FileCoordinator(tmp_path, ManualClock())

    def fail(folder):
        raise OSError(5, "input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(local, "_sync_folder", fail)
        with pytest.raises(ServerError, match="may or may not"):
            await coordinator.put(b"a", b"1")
    for operation in (coordinator.put(b"b", b""), coordinator.get(b"a"), coordinator.lease_grant(1)):
        with pytest.raises(ServerError):
            await operation
    await coordinator.close()
    again = FileCoordinator(tmp_path, ManualClock())
    assert (await again.get(b"a")).value == b"1"
    await again.close()


async def test_a_cancelled_change_is_made_all_the_same(tmp_path):
    """Once begun, a change is not left half done."""
    coordinator = FileCoordinator(tmp_path, ManualClock())
    task = asyncio.create_task(coordinator.put(b"a", b"1"))
    watch = coordinator.watch(b"a", 2)
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert (await next_of(watch))[0].item.value == b"1"
    await watch.aclose()
    await coordinator.close()


# ---------------------------------------------------------------- remote


async def test_a_watch_goes_on_over_a_lost_connection(tmp_path):
    """A poll that is cut off is asked again from the same revision."""
    core = MemoryCoordinator(ManualClock())
    server = FrameServer(Host(core), lambda: Welcome(1, "host", "dev", 0))
    remote = RemoteCoordinator(await server.start(), rng=random.Random(1))
    watch = remote.watch(b"k", 2)
    await core.put(b"k", b"1")
    assert (await next_of(watch))[0].item.value == b"1"
    waiting = asyncio.create_task(next_of(watch))
    while not any(connection.in_flight for connection in server.connections):  # noqa: ASYNC110
        await asyncio.sleep(0)
    for connection in server.connections:
        connection.abort_transport()
    await core.put(b"k", b"2")
    assert (await waiting)[0].item.value == b"2"
    await watch.aclose()
    await remote.close()
    await core.close()
    await server.close()


async def test_an_unreachable_coordinator_is_unavailable():
    """Within the timeout, with an error that names the address."""
    server = FrameServer(HandlerBase(), lambda: Welcome(1, "host", "dev", 0))
    address = await server.start()
    await server.close()
    remote = RemoteCoordinator(address, rng=random.Random(1), timeout_s=0.2)
    for operation in (remote.get(b"k"), remote.put(b"k", b""), anext(remote.watch(b"k", 1))):
        with pytest.raises(UnavailableError, match=address):
            await operation
    await remote.close()


@pytest.mark.parametrize("operation", ["get", "range", "txn", "poll", "lease_grant", "lease_keepalive"])
async def test_garbage_is_refused_by_the_service(operation):
    """Whatever the bytes, only errors of the tree come out."""
    service = CoordinatorService(MemoryCoordinator(ManualClock()))
    rng = random.Random(3)
    for _ in range(200):
        body = rng.randbytes(rng.randint(0, 20))
        try:
            # A poll that happens to be valid would wait: bounded by what a random float rarely is.
            async with asyncio.timeout(0.01):
                await service.on_call(CoordinatorCall(operation, body))
        except (TallymarkError, TimeoutError):
            pass
    with pytest.raises(RemoteProtocolError):
        await service.on_call(CoordinatorCall(operation, b"\xc1"))
    with pytest.raises(InvalidRequestError, match="no operation"):
        await service.on_call(CoordinatorCall("format_disk", msgspec.msgpack.encode(None)))
