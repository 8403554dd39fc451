"""How etcd is asked: how often, whom, and what becomes of errors; against members that are played."""

import asyncio
import contextlib
import random

import pytest
from grpclib.const import Status
from grpclib.exceptions import GRPCError
from grpclib.server import Server

from tallymark_protocol.errors import (
    ErrorCode,
    InvalidRequestError,
    NotFoundError,
    RemoteProtocolError,
    ServerError,
    UnavailableError,
)
from tallymark_runtime.coordinator import (
    CompactedError,
    Delete,
    EventKind,
    Get,
    Put,
    RemoteCoordinator,
    absent,
    open_remote,
)
from tallymark_runtime.coordinator.etcd import EtcdCoordinator
from tallymark_runtime.coordinator.etcd_translation import after_prefix
from tallymark_runtime.generated import etcdserverpb as etcd
from tallymark_runtime.generated import mvccpb

PATIENCE_S = 10.0  # what only a defect reaches
NO_LEADER = GRPCError(Status.UNAVAILABLE, "etcdserver: no leader")


def header(revision=5, term=2):
    return etcd.ResponseHeader(cluster_id=1, member_id=1, revision=revision, raft_term=term)


class Member(etcd.KvBase, etcd.LeaseBase, etcd.WatchBase):
    """A member that does as it is told, and counts what it is asked.

    Each of its `answer_...` is a response, an exception, or None for never answering; or a list of these, of which the last one
    stays.
    """

    def __init__(self):
        self.asked = {"range": 0, "pulse": 0, "txn": 0, "grant": 0, "revoke": 0, "keepalive": 0, "watch": 0}
        self.answers = {
            "range": etcd.RangeResponse(header=header()),
            "pulse": etcd.RangeResponse(header=header()),
            "txn": etcd.TxnResponse(
                header=header(6), succeeded=True, responses=[etcd.ResponseOp(response_put=etcd.PutResponse())]
            ),
            "grant": etcd.LeaseGrantResponse(header=header(), id=7, ttl=2),
            "revoke": etcd.LeaseRevokeResponse(header=header()),
            "keepalive": etcd.LeaseKeepAliveResponse(header=header(), id=7, ttl=2),
        }
        self.watched = []  # what each watch was asked for
        self.watches = []  # for each watch that comes: responses, events to wait for, an exception; else it stays open

    async def _answer(self, what):
        self.asked[what] += 1
        answer = self.answers[what]
        if isinstance(answer, list):
            answer = answer.pop(0) if len(answer) > 1 else answer[0]
        if answer is None:
            await asyncio.Event().wait()
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def range(self, message):
        return await self._answer("pulse" if message.serializable else "range")

    async def txn(self, message):
        return await self._answer("txn")

    async def lease_grant(self, message):
        return await self._answer("grant")

    async def lease_revoke(self, message):
        return await self._answer("revoke")

    async def lease_keep_alive(self, messages):
        async for _ in messages:
            yield await self._answer("keepalive")

    async def watch(self, messages):
        self.asked["watch"] += 1
        request = (await anext(messages)).create_request
        self.watched.append((request.key, request.range_end, request.start_revision, request.fragment))
        for response in self.watches.pop(0):
            if isinstance(response, Exception):
                raise response
            if isinstance(response, asyncio.Event):
                await response.wait()
            else:
                yield response
        await asyncio.Event().wait()

    def __mapping__(self):
        return {
            **etcd.KvBase.__mapping__(self),
            **etcd.LeaseBase.__mapping__(self),
            **etcd.WatchBase.__mapping__(self),
        }


@contextlib.asynccontextmanager
async def playing(count=1, *, timeout_s=PATIENCE_S, first=0):
    """Members, and a coordinator that begins with the first of them."""
    members = [Member() for _ in range(count)]
    servers = [Server([member]) for member in members]
    addresses = []
    for server in servers:
        await server.start("127.0.0.1", 0)
        addresses.append(f"127.0.0.1:{server._server.sockets[0].getsockname()[1]}")

    class First(random.Random):
        def randrange(self, *_):
            return first

    coordinator = EtcdCoordinator(addresses, rng=First(1), prefix=b"p/", timeout_s=timeout_s)
    try:
        yield coordinator, members
    finally:
        await coordinator.close()
        for server in servers:
            server.close()
            await server.wait_closed()


async def next_of(iterator):
    async with asyncio.timeout(PATIENCE_S):
        return await anext(iterator)


# ---------------------------------------------------------------- how often, and whom


async def test_a_read_is_repeated_at_the_next_member():
    """After an error that may pass, and after silence."""
    async with playing(3) as (coordinator, members):
        members[0].answers["range"] = GRPCError(Status.UNAVAILABLE, "etcdserver: request timed out")
        members[1].answers["range"] = None
        assert await coordinator.get(b"k") is None
        assert [member.asked["range"] for member in members] == [1, 1, 1]
        assert await coordinator.get(b"k") is None
        assert [member.asked["range"] for member in members] == [1, 1, 2], (
            "it stays with the one that answers"
        )


async def test_an_answer_that_takes_long_gets_more_time():
    """Where no member answers in time, the next round may take twice as long."""
    async with playing(2) as (coordinator, members):

        async def answer_late(message):
            await asyncio.sleep(0.6)
            return etcd.RangeResponse(header=header(9))

        members[0].range = members[1].range = answer_late
        answer = await coordinator._endpoints.repeat(
            lambda channel: etcd.KvStub(channel).range(etcd.RangeRequest(key=b"k")), attempt_s=0.2
        )
        assert answer.header.revision == 9


async def test_a_transaction_that_only_reads_is_repeated():
    """It changes nothing, however often it is executed."""
    async with playing(2) as (coordinator, members):
        members[0].answers["txn"] = GRPCError(Status.UNAVAILABLE, "")
        members[1].answers["txn"] = etcd.TxnResponse(header=header(9), succeeded=False)
        assert (await coordinator.txn([absent(b"k")], [Get(b"k")])).revision == 9
        assert [member.asked["txn"] for member in members] == [1, 1]


@pytest.mark.parametrize(
    "answer",
    [
        GRPCError(Status.UNAVAILABLE, "etcdserver: request timed out"),
        GRPCError(Status.UNAVAILABLE, "etcdserver: leader changed"),
        GRPCError(Status.UNKNOWN, "raft proposal dropped"),
        GRPCError(Status.DEADLINE_EXCEEDED, ""),
        GRPCError(Status.CANCELLED, ""),
        None,
    ],
)
async def test_a_change_is_sent_once(answer):
    """Where no clear answer comes, it may have taken effect: no other member is asked."""
    async with playing(2, timeout_s=0.5) as (coordinator, members):
        members[0].answers["txn"] = answer
        with pytest.raises(UnavailableError) as caught:
            await coordinator.put(b"k", b"")
        assert caught.value.retriable
        assert [member.asked["txn"] for member in members] == [1, 0]
        members[0].answers["revoke"] = answer
        await coordinator.lease_revoke(7)
        assert [member.asked["revoke"] for member in members] == [0, 1], "the next call goes elsewhere"


async def test_a_change_that_was_certainly_refused_goes_to_the_next_member():
    """A member without a leader says so before it does anything."""
    async with playing(2) as (coordinator, members):
        members[0].answers["txn"] = NO_LEADER
        assert await coordinator.put(b"k", b"") == 6
        assert [member.asked["txn"] for member in members] == [1, 1]


async def test_a_change_is_not_sent_to_a_member_that_does_not_answer():
    """It has to show first that it reaches a quorum; once a second, not for every change."""
    async with playing(2) as (coordinator, members):
        members[0].answers["range"] = None
        for _ in range(5):
            await coordinator.put(b"k", b"")
        assert [member.asked["txn"] for member in members] == [0, 5]
        assert members[1].asked["range"] < 5


async def test_no_leader_anywhere_is_an_error_in_time():
    """It doesn't go round for ever."""
    async with playing(2, timeout_s=0.3) as (coordinator, members):
        for member in members:
            member.answers["txn"] = NO_LEADER
        with pytest.raises(UnavailableError):
            await coordinator.put(b"k", b"")


async def test_cancelling_a_caller_cancels_its_call():
    """At once, without an error of another kind, and the coordinator stays usable."""
    async with playing() as (coordinator, members):
        members[0].answers["range"] = [None, etcd.RangeResponse(header=header())]
        task = asyncio.create_task(coordinator.get(b"k"))
        while not members[0].asked["range"]:  # noqa: ASYNC110
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await coordinator.get(b"k") is None


async def test_a_callers_own_deadline_counts_as_silence():
    """One shorter than an attempt, as around renewals, must not keep every call at a member that is silent."""
    async with playing(2) as (coordinator, members):
        members[0].answers["keepalive"] = None
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.3):
                await coordinator.lease_keepalive(7)
        assert await coordinator.lease_keepalive(7) == 2.0
        assert [member.asked["keepalive"] for member in members] == [1, 1]


async def test_after_closing_everything_is_refused_for_good():
    """Calls under way as well as later ones."""
    async with playing() as (coordinator, members):
        members[0].answers["range"] = None
        under_way = asyncio.create_task(coordinator.get(b"k"))
        while not members[0].asked["range"]:  # noqa: ASYNC110
            await asyncio.sleep(0)
        await coordinator.close()
        for operation in (
            under_way,
            coordinator.get(b"k"),
            coordinator.put(b"k", b""),
            anext(coordinator.watch(b"")),
        ):
            with pytest.raises(UnavailableError) as caught:
                await operation
            assert caught.value.code == ErrorCode.CLOSED
            assert not caught.value.retriable
        await coordinator.close()


# ---------------------------------------------------------------- leases


async def test_a_renewal_counts_only_if_the_leader_stayed():
    """A deposed leader may renew what its successor lets run out: the term before and after must be one."""
    async with playing(2) as (coordinator, members):
        members[0].answers["keepalive"] = etcd.LeaseKeepAliveResponse(header=header(term=2), id=7, ttl=2)
        members[0].answers["range"] = etcd.RangeResponse(header=header(term=3))
        members[1].answers["keepalive"] = etcd.LeaseKeepAliveResponse(header=header(term=3), id=7, ttl=2)
        members[1].answers["range"] = etcd.RangeResponse(header=header(term=3))
        assert await coordinator.lease_keepalive(7) == 2.0
        assert [member.asked["keepalive"] for member in members] == [1, 1]


async def test_a_renewal_that_no_quorum_confirms_is_none():
    """The member's word alone is not enough."""
    async with playing(timeout_s=0.3) as (coordinator, members):
        members[0].answers["range"] = None
        with pytest.raises(UnavailableError):
            await coordinator.lease_keepalive(7)


async def test_a_renewal_moves_on_quickly():
    """Two attempts fit into a lease of two seconds."""
    async with playing(2, timeout_s=1.5) as (coordinator, members):
        members[0].answers["keepalive"] = None
        assert await coordinator.lease_keepalive(7) == 2.0
        assert [member.asked["keepalive"] for member in members] == [1, 1]


async def test_a_lease_that_is_gone_is_not_found():
    """etcd says so by a ttl of zero."""
    async with playing() as (coordinator, members):
        members[0].answers["keepalive"] = etcd.LeaseKeepAliveResponse(header=header(), id=7, ttl=0)
        with pytest.raises(NotFoundError):
            await coordinator.lease_keepalive(7)


# ---------------------------------------------------------------- watches


def created(revision):
    return etcd.WatchResponse(header=header(revision), created=True)


def put(key, revision):
    return mvccpb.Event(
        type=mvccpb.EventEventType.PUT,
        kv=mvccpb.KeyValue(key=key, create_revision=revision, mod_revision=revision, version=1),
    )


async def test_a_watch_asks_for_whole_revisions_and_no_history_it_does_not_need():
    """From the revision given where that is still to come, and unfragmented."""
    async with playing() as (coordinator, members):
        members[0].watches = [[created(5), etcd.WatchResponse(header=header(6), events=[put(b"p/k", 6)])]]
        watch = coordinator.watch(b"k", 6)
        assert [event.item.key for event in await next_of(watch)] == [b"k"]
        assert members[0].watched == [(b"p/k", b"p/l", 6, False)]
        await watch.aclose()


async def test_a_watch_that_needs_history_begins_one_revision_earlier_and_drops_what_is_too_much():
    """So that etcd refuses where the first revision is the one compacted."""
    async with playing() as (coordinator, members):
        events = [put(b"p/k", 3), put(b"p/k", 4), put(b"p/l", 4)]
        members[0].watches = [[created(5)], [created(5), etcd.WatchResponse(header=header(5), events=events)]]
        watch = coordinator.watch(b"", 4)
        assert [event.item.key for event in await next_of(watch)] == [b"k", b"l"]
        assert [asked[2] for asked in members[0].watched] == [4, 3]
        await watch.aclose()


@pytest.mark.parametrize(
    "end",
    [
        etcd.WatchResponse(header=header(7), canceled=True, cancel_reason="etcdserver: no leader"),
        GRPCError(Status.UNAVAILABLE, "etcdserver: no leader"),
        GRPCError(Status.CANCELLED, ""),
    ],
)
async def test_a_watch_that_ends_goes_on_at_the_next_member(end):
    """From the revision after the last one given."""
    async with playing(2) as (coordinator, members):
        seen = asyncio.Event()
        first = etcd.WatchResponse(header=header(7), events=[put(b"p/a", 6), put(b"p/a", 7)])
        members[1].answers["range"] = etcd.RangeResponse(header=header(7))
        members[0].watches = [[created(5), first, seen, end]]
        second = etcd.WatchResponse(header=header(8), events=[put(b"p/b", 8)])
        members[1].watches = [[created(7), second]]
        watch = coordinator.watch(b"", 6)
        assert [event.item.key for event in await next_of(watch)] == [b"a", b"a"]
        seen.set()
        assert [event.item.key for event in await next_of(watch)] == [b"b"]
        assert members[1].watched == [(b"p/", b"p0", 8, False)]
        await watch.aclose()


async def test_a_watch_notices_that_etcd_was_put_back():
    """From a revision still to come, it would miss everything until then: it ends as after a compaction."""
    async with playing(2) as (coordinator, members):
        seen = asyncio.Event()
        first = etcd.WatchResponse(header=header(7), events=[put(b"p/a", 7)])
        members[0].watches = [[created(5), first, seen, NO_LEADER]]
        members[1].answers["range"] = etcd.RangeResponse(header=header(6))
        watch = coordinator.watch(b"", 6)
        await next_of(watch)
        seen.set()
        with pytest.raises(CompactedError, match="lost some of its history"):
            await next_of(watch)


async def test_a_watch_that_nobody_serves_is_unavailable():
    """Once the time is up in which one member after another refused."""
    async with playing(2, timeout_s=0.2) as (coordinator, members):
        for member in members:
            member.watches = [[GRPCError(Status.UNAVAILABLE, "etcdserver: no leader")] for _ in range(1_000)]
        with pytest.raises(UnavailableError, match="no leader"):
            await next_of(coordinator.watch(b"", 6))


async def test_compaction_under_a_watch_is_an_error():
    """With the revision, for whoever lists again."""
    async with playing() as (coordinator, members):
        members[0].watches = [
            [created(5), etcd.WatchResponse(header=header(9), canceled=True, compact_revision=8)]
        ]
        with pytest.raises(CompactedError) as caught:
            await next_of(coordinator.watch(b"", 6))
        assert caught.value.details == {"compact_revision": 8}


async def test_a_watch_from_now_begins_after_what_the_quorum_has():
    """A member that lags behind must not give what happened before."""
    async with playing() as (coordinator, members):
        members[0].answers["range"] = etcd.RangeResponse(header=header(9))
        late = [put(b"p/a", 8), put(b"p/b", 9)]
        members[0].watches = [
            [
                created(7),
                etcd.WatchResponse(header=header(9), events=late),
                etcd.WatchResponse(header=header(10), events=[put(b"p/c", 10)]),
            ]
        ]
        watch = coordinator.watch(b"")
        assert [event.item.key for event in await next_of(watch)] == [b"c"]
        assert members[0].watched[0][2] == 10
        await watch.aclose()


async def test_a_deletion_is_told_as_the_port_has_it():
    """Without value and version, with its revision."""
    async with playing() as (coordinator, members):
        gone = mvccpb.Event(
            type=mvccpb.EventEventType.DELETE, kv=mvccpb.KeyValue(key=b"p/k", mod_revision=6, lease=3)
        )
        members[0].watches = [[created(5), etcd.WatchResponse(header=header(6), events=[gone])]]
        watch = coordinator.watch(b"", 6)
        (event,) = await next_of(watch)
        assert (event.kind, event.item.key, event.item.value) == (EventKind.DELETE, b"k", b"")
        assert (event.item.create_revision, event.item.mod_revision, event.item.version) == (0, 6, 0)
        assert event.item.lease == 0
        await watch.aclose()


# ---------------------------------------------------------------- answers that are errors, or nonsense


@pytest.mark.parametrize(
    ("status", "message", "kind", "code"),
    [
        (Status.NOT_FOUND, "etcdserver: requested lease not found", NotFoundError, ErrorCode.NOT_FOUND),
        (
            Status.INVALID_ARGUMENT,
            "etcdserver: duplicate key given in txn request",
            InvalidRequestError,
            ErrorCode.INVALID_ARGUMENT,
        ),
        (
            Status.INVALID_ARGUMENT,
            "etcdserver: request is too large",
            InvalidRequestError,
            ErrorCode.TOO_LARGE,
        ),
        (
            Status.RESOURCE_EXHAUSTED,
            "grpc: received message larger than max (2 vs. 1)",
            InvalidRequestError,
            ErrorCode.TOO_LARGE,
        ),
        (
            Status.RESOURCE_EXHAUSTED,
            "etcdserver: mvcc: database space exceeded",
            UnavailableError,
            ErrorCode.DISK_FULL,
        ),
        (Status.RESOURCE_EXHAUSTED, "etcdserver: too many requests", UnavailableError, ErrorCode.OVERLOADED),
        (Status.PERMISSION_DENIED, "etcdserver: permission denied", UnavailableError, None),
        (Status.FAILED_PRECONDITION, "etcdserver: not leader", UnavailableError, None),
        (Status.DATA_LOSS, "etcdserver: corrupt cluster", ServerError, ErrorCode.INTERNAL),
        (Status.UNIMPLEMENTED, "", ServerError, ErrorCode.INTERNAL),
    ],
)
async def test_what_etcd_refuses_becomes_an_error_of_the_tree(status, message, kind, code):
    """With what etcd said, and sent once."""
    async with playing(timeout_s=0.3) as (coordinator, members):
        members[0].answers["txn"] = GRPCError(status, message)
        with pytest.raises(kind) as caught:
            await coordinator.put(b"k", b"")
        assert message in caught.value.message
        assert code is None or caught.value.code == code
        assert members[0].asked["txn"] == 1
        if status is Status.PERMISSION_DENIED:
            assert not caught.value.retriable


@pytest.mark.parametrize(
    "response",
    [
        etcd.RangeResponse(),
        etcd.RangeResponse(header=etcd.ResponseHeader()),
        etcd.RangeResponse(header=header(), kvs=[mvccpb.KeyValue(key=b"other/k", mod_revision=1)]),
        etcd.RangeResponse(header=header(), more=True),
    ],
)
async def test_answers_that_make_no_sense_are_the_peers_fault(response):
    """No header, no revision, keys nobody asked for, pages without end."""
    async with playing() as (coordinator, members):
        members[0].answers["range"] = response
        with pytest.raises(RemoteProtocolError):
            await coordinator.range(b"")


@pytest.mark.parametrize(
    ("operations", "responses"),
    [
        ([Put(b"k", b"")], []),
        ([Get(b"k"), Put(b"k", b"")], [etcd.ResponseOp(response_put=etcd.PutResponse())] * 2),
        ([Delete(b"k")], [etcd.ResponseOp(response_put=etcd.PutResponse())]),
    ],
)
async def test_a_transactions_answer_must_fit_it(operations, responses):
    """One answer for each operation, of its kind."""
    async with playing() as (coordinator, members):
        members[0].answers["txn"] = etcd.TxnResponse(header=header(6), succeeded=True, responses=responses)
        with pytest.raises(RemoteProtocolError):
            await coordinator.txn([], operations)


@pytest.mark.parametrize(
    "greeting", [b"", b"HTTP/1.1 400 Bad Request\r\n\r\n", b"\0\0\0\4\0\0\0\0\0", bytes(range(256)) * 10]
)
async def test_something_else_on_the_port_is_unavailable(greeting):
    """A server that speaks no gRPC, or hangs up, gives errors of the tree and nothing else."""

    async def serve(reader, writer):
        writer.write(greeting)
        await reader.read(100)
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    coordinator = EtcdCoordinator([address], rng=random.Random(1), timeout_s=0.2)
    for operation in (coordinator.get(b"k"), coordinator.put(b"k", b""), anext(coordinator.watch(b"k", 1))):
        with pytest.raises((UnavailableError, RemoteProtocolError), match=address):
            await operation
    await coordinator.close()
    server.close()
    await server.wait_closed()


# ---------------------------------------------------------------- prefixes and URLs


@pytest.mark.parametrize(
    ("prefix", "end"),
    [
        (b"a", b"b"),
        (b"a/", b"a0"),
        (b"a\xff", b"b"),
        (b"a\xff\xff", b"b"),
        (b"\xfe\xff", b"\xff"),
        (b"\xff", b"\0"),
        (b"", b"\0"),
    ],
)
def test_a_prefix_ends_where_it_ends(prefix, end):
    """The first key above it; all keys above it where there is none."""
    assert after_prefix(prefix) == end


async def test_a_setting_names_the_coordinator():
    """By its scheme, with one address or several."""
    rng = random.Random(1)
    remote = open_remote("tcp://localhost:7001", rng)
    assert isinstance(remote, RemoteCoordinator)
    one = open_remote("etcd://[::1]:2379", rng)
    many = open_remote("etcd://a:1,b:2, c:3/", rng, prefix="x/")
    assert isinstance(one, EtcdCoordinator)
    assert one.endpoint == "[::1]:2379"
    assert isinstance(many, EtcdCoordinator)
    for coordinator in (remote, one, many):
        await coordinator.close()


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("embedded", "this role needs"),
        ("", "must be"),
        ("localhost:7001", "must be"),
        ("http://localhost:7001", "must be"),
        ("tcp://localhost", "host:port"),
        ("tcp://a:1,b:2", "too many"),
        ("etcd://", "host:port"),
        ("etcd://a:1,,b:2", "host:port"),
        ("etcd://a:1,a:1", "twice"),
        ("etcd://a:99999", "host:port"),
        ("etcd://" + ",".join(f"h{i}:1" for i in range(17)), "too many"),
    ],
)
def test_a_bad_url_is_named(url, message):
    """With what it should be."""
    with pytest.raises(InvalidRequestError, match=message):
        open_remote(url, random.Random(1))
