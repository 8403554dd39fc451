"""The etcd coordinator against real etcd processes: members killed, stopped and restarted, history compacted."""

import asyncio
import random

import pytest
from etcd_process import EtcdCluster
from grpclib.client import Channel

from tallymark_protocol import limits
from tallymark_protocol.errors import (
    ErrorCode,
    InvalidRequestError,
    NotFoundError,
    UnavailableError,
)
from tallymark_runtime.coordinator import (
    CompactedError,
    Delete,
    EventKind,
    Get,
    Put,
    Snapshot,
    absent,
    follow,
    unchanged,
)
from tallymark_runtime.coordinator import etcd as etcd_module
from tallymark_runtime.coordinator.etcd import EtcdCoordinator
from tallymark_runtime.framing import split_address
from tallymark_runtime.generated import etcdserverpb

PATIENCE_S = 30.0  # what only a defect reaches


def connect(etcd, *, prefix=b"test/", seed=1, timeout_s=PATIENCE_S):
    return EtcdCoordinator(etcd.addresses, rng=random.Random(seed), prefix=prefix, timeout_s=timeout_s)


@pytest.fixture
def etcd(tmp_path):
    """One member, for this test alone."""
    with EtcdCluster(tmp_path) as cluster:
        yield cluster


@pytest.fixture
def three(tmp_path):
    """Three members, for this test alone."""
    with EtcdCluster(tmp_path, members=3) as cluster:
        yield cluster


@pytest.fixture
async def coordinator(request):
    """Connected to whichever cluster the test has."""
    cluster = request.getfixturevalue("three" if "three" in request.fixturenames else "etcd")
    coordinator = connect(cluster)
    yield coordinator
    await coordinator.close()


async def next_of(iterator):
    async with asyncio.timeout(PATIENCE_S):
        return await anext(iterator)


async def put_surely(coordinator, key, value):
    """Put a key that only this caller writes, once, over whatever happens; for tests that break things."""
    async with asyncio.timeout(PATIENCE_S):
        while True:
            try:
                if (await coordinator.txn([absent(key)], [Put(key, value)])).succeeded:
                    return
                assert (await coordinator.get(key)).value == value, "an earlier attempt has taken effect"
                return
            except UnavailableError:
                await asyncio.sleep(0)


async def compact(etcd, revision):
    """Have a member forget the history up to a revision."""
    channel = Channel(*split_address(etcd.addresses[0]))
    request = etcdserverpb.CompactionRequest(revision=revision, physical=True)
    await etcdserverpb.KvStub(channel).compact(request)
    channel.close()


# ---------------------------------------------------------------- what the contract's tests leave out


async def test_an_empty_etcd_begins_where_the_embedded_coordinator_does(coordinator, etcd):
    """Revision 1, and 2 is the first change."""
    assert (await coordinator.range(b"")).revision == 1
    assert await coordinator.put(b"a", b"") == 2


async def test_clusters_that_share_an_etcd_see_nothing_of_each_other(etcd):
    """Not in reads, not in watches, not in deletions of everything."""
    one, two = connect(etcd, prefix=b"one/"), connect(etcd, prefix=b"two/")
    watch = two.watch(b"", 2)
    await one.put(b"k", b"1")
    await two.put(b"k", b"2")
    assert [item.value for item in (await one.range(b"")).items] == [b"1"]
    assert [(event.item.key, event.item.value) for event in await next_of(watch)] == [(b"k", b"2")]
    await one.txn([], [Delete(b"", is_prefix=True)])
    assert (await one.range(b"")).items == []
    assert (await two.get(b"k")).value == b"2"
    await watch.aclose()
    await one.close()
    await two.close()


async def test_the_largest_transaction(coordinator, etcd):
    """As many operations as allowed, with as many conditions, in one revision and one item of a watch."""
    count = limits.COORDINATOR_OPERATIONS_MAX
    keys = [b"k%03d" % i for i in range(count)]
    watch = coordinator.watch(b"k", 2)
    made = await coordinator.txn([absent(key) for key in keys], [Put(key, key * 100) for key in keys])
    assert made.succeeded
    events = await next_of(watch)
    assert [event.item.key for event in events] == keys
    assert {event.item.mod_revision for event in events} == {made.revision}
    items = (await coordinator.range(b"k")).items
    gone = await coordinator.txn([unchanged(item) for item in items], [Delete(key) for key in keys])
    assert [found[0].value for found in gone.results] == [key * 100 for key in keys]
    events = await next_of(watch)
    assert [(event.kind, event.item.key) for event in events] == [(EventKind.DELETE, key) for key in keys]
    await watch.aclose()


async def test_many_keys_are_listed_at_one_revision(coordinator, etcd, monkeypatch):
    """In pages, and what changes between them is not seen; where that revision is forgotten, all begins again."""
    monkeypatch.setattr(etcd_module, "_PAGE_KEYS", 3)
    for i in range(10):
        await coordinator.put(b"k%d" % i, b"old")
    before = await coordinator.range(b"k")
    assert [item.key for item in before.items] == [b"k%d" % i for i in range(10)]
    read = coordinator._range
    other = connect(etcd, seed=2)
    pages = []

    async def change_after_first(request):
        answer = await read(request)
        pages.append(request)
        if len(pages) == 1:
            await other.txn([], [Put(b"k9", b"new"), Delete(b"k8"), Put(b"k", b"new")])
        return answer

    monkeypatch.setattr(coordinator, "_range", change_after_first)
    assert await coordinator.range(b"k") == before
    assert len(pages) == 4

    async def compact_after_first(request):
        answer = await read(request)
        pages.append(request)
        if len(pages) == 1:
            await compact(etcd, await other.put(b"k10", b"newer"))
        return answer

    pages.clear()
    monkeypatch.setattr(coordinator, "_range", compact_after_first)
    after = await coordinator.range(b"k")
    assert [item.key for item in after.items] == [
        b"k", b"k0", b"k1", b"k10", b"k2", b"k3", b"k4", b"k5", b"k6", b"k7", b"k9",
    ]  # fmt: skip
    assert after.revision == before.revision + 2
    await other.close()


async def test_what_is_too_large_is_refused_whole(coordinator, etcd):
    """The largest value goes in; many of them in one transaction exceed what etcd takes, and change nothing."""
    value = bytes(limits.COORDINATOR_VALUE_BYTES_MAX)
    await coordinator.put(b"large", value)
    assert (await coordinator.get(b"large")).value == value
    with pytest.raises(InvalidRequestError) as caught:
        await coordinator.txn([], [Put(b"l%d" % i, value) for i in range(3)])
    assert caught.value.code == ErrorCode.TOO_LARGE
    assert [item.key for item in (await coordinator.range(b"")).items] == [b"large"]


async def test_a_branch_that_changes_a_key_twice_is_refused_before_it_is_sent(coordinator, etcd):
    """Also in deletions, of which etcd takes two; a read of the same key is none."""
    await coordinator.put(b"p/k", b"1")
    for operations in (
        [Delete(b"p/k"), Delete(b"p/k")],
        [Delete(b"p/", is_prefix=True), Delete(b"p/k")],
        [Delete(b"p/", is_prefix=True), Delete(b"p", is_prefix=True)],
        [Delete(b"p/", is_prefix=True), Delete(b"p/", is_prefix=True)],
    ):
        with pytest.raises(InvalidRequestError, match="more than once"):
            await coordinator.txn([], operations)
        with pytest.raises(InvalidRequestError, match="more than once"):
            await coordinator.txn([absent(b"p/k")], [], operations)
    result = await coordinator.txn([], [Get(b"p/k"), Put(b"p/k", b"2"), Get(b"p/k")])
    assert [[item.value for item in found] for found in result.results] == [[b"1"], [], [b"2"]]


# ---------------------------------------------------------------- leases


async def test_a_lease_that_runs_out_takes_its_keys_in_one_revision(coordinator, etcd):
    """As the embedded coordinator does, also in the order of keys; and it is gone for renewals and puts."""
    lease = await coordinator.lease_grant(1)
    for key in (b"n/2", b"n/1"):
        await coordinator.put(key, b"here", lease=lease)
    revision = await coordinator.put(b"n/3", b"stays")
    assert (await coordinator.get(b"n/1")).lease == lease
    watch = coordinator.watch(b"n/", revision + 1)
    events = await next_of(watch)
    assert [(e.kind, e.item.key, e.item.mod_revision) for e in events] == [
        (EventKind.DELETE, b"n/1", revision + 1),
        (EventKind.DELETE, b"n/2", revision + 1),
    ]
    await watch.aclose()
    with pytest.raises(NotFoundError):
        await coordinator.lease_keepalive(lease)
    with pytest.raises(NotFoundError):
        await coordinator.txn([], [Put(b"n/4", b""), Put(b"n/5", b"", lease)])
    assert [item.key for item in (await coordinator.range(b"n/")).items] == [b"n/3"]


async def test_a_lease_has_whole_seconds_and_a_minimum(coordinator, etcd):
    """Rounded up, and renewals tell what it is."""
    for asked, real in ((0.001, 1.0), (1.0, 1.0), (1.5, 2.0), (30.0, 30.0)):
        assert await coordinator.lease_keepalive(await coordinator.lease_grant(asked)) == real


async def test_leases_outlive_a_restart_of_etcd(coordinator, etcd):
    """Their keys are there, and they can be renewed."""
    lease = await coordinator.lease_grant(60)
    await coordinator.put(b"n", b"here", lease=lease)
    etcd.kill()
    etcd.start()
    assert await coordinator.lease_keepalive(lease) == 60
    assert (await coordinator.get(b"n")).lease == lease


# ---------------------------------------------------------------- history


async def test_a_watch_from_a_compacted_revision_says_so(coordinator, etcd):
    """With the revision from which history begins; from there on, everything is given."""
    for i in range(10):
        await coordinator.put(b"k%d" % i, b"")
    await compact(etcd, 7)
    for from_revision in (1, 2, 7):
        with pytest.raises(CompactedError) as caught:
            await next_of(coordinator.watch(b"k", from_revision))
        assert caught.value.details["compact_revision"] == 7
    watch = coordinator.watch(b"k", 8)
    assert [event.item.key for event in await next_of(watch)] == [b"k6", b"k7", b"k8", b"k9"]
    await watch.aclose()


async def test_a_deletion_at_the_very_revision_compacted_is_not_missed(coordinator, etcd):
    """etcd forgets it, and would watch from there all the same."""
    await coordinator.put(b"k", b"")
    await coordinator.delete(b"k")
    deleted_at = (await coordinator.range(b"")).revision
    await coordinator.put(b"other", b"")
    await compact(etcd, deleted_at)
    with pytest.raises(CompactedError):
        await next_of(coordinator.watch(b"k", deleted_at))


async def test_follow_lists_again_after_compaction(coordinator, etcd):
    """A follower that fell behind gets a new snapshot and goes on from there."""
    await coordinator.put(b"f/0", b"")
    following = follow(coordinator, b"f/")
    first = await next_of(following)
    assert isinstance(first, Snapshot)
    assert [item.key for item in first.items] == [b"f/0"]
    for i in range(1, 10):
        last = await coordinator.put(b"f/%d" % i, b"")
    await compact(etcd, last)
    second = await next_of(following)
    assert isinstance(second, Snapshot)
    assert (len(second.items), second.revision) == (10, last)
    await coordinator.put(b"f/x", b"")
    assert [event.item.key for event in await next_of(following)] == [b"f/x"]
    await following.aclose()


async def test_much_history_comes_whole_and_in_order(coordinator, etcd):
    """More revisions than etcd sends at once, of several keys each; no item has a part of one."""
    start = await coordinator.put(b"h/start", b"") + 1
    for i in range(150):
        await coordinator.txn([], [Put(b"h/%d/%d" % (i, j), bytes(20_000)) for j in range(5)])
    watch = coordinator.watch(b"h/", start)
    seen = []
    while len(seen) < 750:
        events = await next_of(watch)
        assert len(events) % 5 == 0
        seen += [(event.item.mod_revision, event.item.key) for event in events]
    assert seen == [(start + i, b"h/%d/%d" % (i, j)) for i in range(150) for j in range(5)]
    await watch.aclose()


# ---------------------------------------------------------------- faults


async def test_a_watch_goes_on_over_a_restart_of_etcd(coordinator, etcd):
    """What happened before, and what happens after, comes once."""
    revision = (await coordinator.range(b"")).revision
    watch = coordinator.watch(b"k", revision + 1)
    await coordinator.put(b"k1", b"")
    assert [event.item.key for event in await next_of(watch)] == [b"k1"]
    waiting = asyncio.create_task(next_of(watch))
    await coordinator.put(b"elsewhere", b"")
    etcd.kill()
    etcd.start()
    other = connect(etcd, seed=2)
    await other.put(b"k2", b"")
    assert [event.item.key for event in await waiting] == [b"k2"]
    await put_surely(coordinator, b"k3", b"")
    assert [event.item.key for event in await next_of(watch)] == [b"k3"]
    await watch.aclose()
    await other.close()


async def test_a_killed_member_is_left_for_another(coordinator, three):
    """Reads go on without an error, watches without a gap, and changes are possible again."""
    await coordinator.put(b"k", b"1")
    watch = coordinator.watch(b"k", 2)
    assert len(await next_of(watch)) == 1
    killed = coordinator.endpoint
    three.member(killed).kill()
    assert (await coordinator.get(b"k")).value == b"1"
    assert coordinator.endpoint != killed
    await put_surely(coordinator, b"k2", b"2")
    assert [event.item.key for event in await next_of(watch)] == [b"k2"]
    await watch.aclose()


async def test_a_stopped_member_is_left_for_another(coordinator, three):
    """It takes connections and never answers: each attempt has a deadline, and open watches a pulse."""
    await coordinator.put(b"k", b"1")
    lease = await coordinator.lease_grant(60)
    watch = coordinator.watch(b"k", 2)
    assert len(await next_of(watch)) == 1
    stopped = coordinator.endpoint
    three.member(stopped).pause()
    waiting = asyncio.create_task(next_of(watch))
    try:
        assert await coordinator.lease_keepalive(lease) == 60
        assert coordinator.endpoint != stopped
        assert (await coordinator.get(b"k")).value == b"1"
        await put_surely(coordinator, b"k2", b"2")
        assert [event.item.key for event in await waiting] == [b"k2"]
    finally:
        three.member(stopped).resume()
    await watch.aclose()


async def test_a_watch_alone_notices_a_stopped_member(coordinator, three):
    """Also where nobody asks anything else of this coordinator."""
    other = EtcdCoordinator(
        [address for address in three.addresses if address != coordinator.endpoint],
        rng=random.Random(1),
        prefix=b"test/",
        timeout_s=PATIENCE_S,
    )
    start = await coordinator.put(b"k1", b"")
    watch = coordinator.watch(b"k", start)
    assert len(await next_of(watch)) == 1
    stopped = coordinator.endpoint
    three.member(stopped).pause()
    try:
        await put_surely(other, b"k2", b"")
        assert [event.item.key for event in await next_of(watch)] == [b"k2"]
        assert coordinator.endpoint != stopped
    finally:
        three.member(stopped).resume()
    await watch.aclose()
    await other.close()


async def test_without_a_quorum_nothing_is_answered(three):
    """Not even reads, which could be stale; with one again, everything goes on."""
    coordinator = connect(three, timeout_s=1.0)
    await coordinator.put(b"k", b"1")
    for member in three.members[:2]:
        member.kill()
    for operation in (coordinator.get(b"k"), coordinator.put(b"k", b"2"), coordinator.lease_grant(5)):
        with pytest.raises(UnavailableError):
            await operation
    with pytest.raises(UnavailableError):
        await next_of(coordinator.watch(b"k"))
    for member in three.members[:2]:
        member.start()
    for member in three.members[:2]:
        member.wait_ready()
    await put_surely(coordinator, b"k2", b"")
    assert (await coordinator.get(b"k")).value in (b"1", b"2")
    await coordinator.close()


async def test_watches_lose_and_double_nothing_while_members_come_and_go(three):
    """Writers and a watch over kills, halts and restarts: what was watched is what the history says."""
    writer, reader = connect(three, seed=1), connect(three, seed=2)
    rng = random.Random(3)
    count = 120
    watched = []
    start = (await reader.range(b"")).revision + 1

    async def watch_all():
        watch = reader.watch(b"w/", start)
        while sum(event.item.key.startswith(b"w/last") for event in watched) == 0:
            events = await next_of(watch)
            revisions = [event.item.mod_revision for event in events]
            assert revisions == sorted(revisions)
            assert not watched or watched[-1].item.mod_revision < revisions[0]
            watched.extend(events)
        await watch.aclose()

    async def break_things():
        loop = asyncio.get_running_loop()
        for _ in range(3):
            member = rng.choice(three.members)
            if rng.random() < 0.5:
                member.kill()
                await loop.run_in_executor(None, member.start)
                await loop.run_in_executor(None, member.wait_ready)
            else:
                member.pause()
                await put_surely(writer, b"halted/%d" % rng.getrandbits(40), b"")
                member.resume()

    async def write_all():
        for i in range(count):
            keys = [b"w/%d/%d" % (i, j) for j in range(3)]
            async with asyncio.timeout(PATIENCE_S):
                while True:
                    try:
                        await writer.txn([absent(keys[0])], [Put(key, b"%d" % i) for key in keys])
                        break
                    except UnavailableError:
                        await asyncio.sleep(0)
            await asyncio.sleep(0.01)

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(watch_all())
        breaking = tasks.create_task(break_things())
        await write_all()
        await breaking
        await put_surely(writer, b"w/last", b"")
    items = (await reader.range(b"w/")).items
    assert len(items) == 3 * count + 1
    assert all(item.version == 1 for item in items), "each was put once"
    by_revision = sorted((item.mod_revision, item.key) for item in items)
    assert [(event.item.mod_revision, event.item.key) for event in watched] == by_revision
    await writer.close()
    await reader.close()


async def test_an_unreachable_etcd_is_unavailable(etcd):
    """Within the timeout, with an error that names an address."""
    etcd.kill()
    coordinator = connect(etcd, timeout_s=0.3)
    for operation in (
        coordinator.get(b"k"),
        coordinator.put(b"k", b""),
        coordinator.lease_grant(1),
        coordinator.lease_keepalive(1),
        anext(coordinator.watch(b"k", 1)),
        anext(coordinator.watch(b"k")),
    ):
        with pytest.raises(UnavailableError, match=etcd.addresses[0]):
            await operation
    await coordinator.close()


async def test_a_lost_connection_leaves_the_callers_own_deadline_alone(coordinator, etcd):
    """grpclib ends calls by cancelling their task; a deadline around them would take its own expiry for that."""
    impatient = connect(etcd, seed=2, timeout_s=0.5)
    await impatient.get(b"k")
    watch = coordinator.watch(b"k", 1)
    waiting = asyncio.create_task(next_of(watch))
    task = asyncio.current_task()

    async def never_returns():
        etcd.members[0].pause()
        asyncio.get_running_loop().call_later(0.05, etcd.kill)
        with pytest.raises(UnavailableError):
            await impatient.get(b"k")  # sent, and cut off
        assert task.cancelling() == 0
        await asyncio.Event().wait()

    with pytest.raises(TimeoutError):
        async with asyncio.timeout(2.0):
            await never_returns()
    await impatient.close()
    etcd.start()
    await put_surely(coordinator, b"k", b"")
    assert [event.item.key for event in await waiting] == [b"k"]
    await watch.aclose()
