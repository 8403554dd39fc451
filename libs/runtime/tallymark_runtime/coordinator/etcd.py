"""The coordinator port over etcd's v3 API.

Owns the translation of the port's operations into etcd's calls, and watches that survive their member. All keys of
a cluster lie under one prefix, so that clusters can share an etcd.

A watch is one gRPC stream on one member. When that ends, for whatever reason, the next one begins on the next
member, at the revision after the last event given out: no event is lost or doubled. etcd sends all changes of a
revision in one message, as long as nobody asks it to fragment, so an item never holds a part of one.

etcd keeps a watch whose first revision is the very one that was compacted, although deletions at it may be gone.
So where a watch needs history, it is made from one revision earlier, which etcd refuses in that case, and what
it has too much is dropped.

Leases have whole seconds in etcd, and a minimum (one and a half election timeouts; two seconds by default): a
shorter or broken ttl is rounded up. A holder that counts by the ttl it asked for gives up early, never late;
`lease_keepalive` returns the real one.

A leader of etcd that was deposed while it was halted may renew a lease that its successor lets run out. So a
renewal counts only once the member that was asked has answered a question to the quorum afterwards, in the same
term of etcd's own log.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import math
import random
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from typing import Final

from grpclib.client import Channel, Stream
from grpclib.const import Cardinality, Status
from grpclib.exceptions import GRPCError, StreamTerminatedError

from tallymark_protocol import limits
from tallymark_protocol.errors import (
    InvalidRequestError,
    NotFoundError,
    RemoteProtocolError,
    TallymarkError,
    UnavailableError,
)
from tallymark_runtime.coordinator.etcd_endpoints import (
    ATTEMPT_S,
    METADATA,
    PROBE,
    Endpoint,
    Endpoints,
    isolated,
)
from tallymark_runtime.coordinator.etcd_translation import (
    FOREIGN_ERRORS,
    Keys,
    check_changes,
    error_of,
    revision_of,
)
from tallymark_runtime.coordinator.port import (
    CompactedError,
    Compare,
    Delete,
    Get,
    KeyValue,
    Operation,
    Put,
    RangeResult,
    TxnResult,
    WatchEvent,
)
from tallymark_runtime.coordinator.state import check_limits
from tallymark_runtime.generated import etcdserverpb as etcd
from tallymark_runtime.generated import mvccpb

PREFIX: Final = b"tallymark/"

_PAGE_KEYS: Final = 500  # in one answer: decoding it keeps everything else waiting
_LISTINGS_MAX: Final = 5  # tries at one list
_KEEPALIVE_ATTEMPT_S: Final = 0.5  # short: a second attempt must fit into a lease of two seconds


class EtcdCoordinator:
    """A coordinator in an etcd cluster.

    Reads, watches, lease grants and renewals go on at the next member until `timeout_s` has passed without an
    answer. A change is sent once, to a member that has just shown that it works: UnavailableError from it leaves
    open whether it took effect. An answer lost at a grant leaves a lease behind, which runs out.

    Args:
        addresses: "host:port" of one or more members.
        rng: picks the member to begin with, and the jitter of attempts.
        prefix: what all keys of the cluster begin with in etcd.
        timeout_s: for every operation; for watches, without any member that serves them.
    """

    def __init__(
        self,
        addresses: Sequence[str],
        *,
        rng: random.Random,
        prefix: bytes = PREFIX,
        timeout_s: float = 5.0,
    ) -> None:
        self._keys = Keys(prefix)
        self._endpoints = Endpoints(addresses, rng=rng, timeout_s=timeout_s)

    @property
    def endpoint(self) -> str:
        """The address of the member that is asked next."""
        return self._endpoints.current.address

    # ------------------------------------------------------------ reading

    async def get(self, key: bytes) -> KeyValue | None:
        """Read one key; see the port."""
        response = await self._range(etcd.RangeRequest(key=self._keys.outer(key)))
        return self._keys.item(response.kvs[0]) if response.kvs else None

    async def range(self, prefix: bytes) -> RangeResult:
        """Read a prefix; see the port. Many keys are read in pages, all at the revision of the first."""
        for _ in range(_LISTINGS_MAX):
            try:
                return await self._list(prefix)
            except CompactedError:
                continue  # while the pages were read: begin again
        raise UnavailableError("etcd's history is compacted faster than it can be read")

    async def _list(self, prefix: bytes) -> RangeResult:
        start, end = self._keys.span(prefix)
        items: list[KeyValue] = []
        revision = 0  # 0: the present one
        while True:
            request = etcd.RangeRequest(key=start, range_end=end, limit=_PAGE_KEYS, revision=revision)
            response = await self._range(request)
            revision = revision or revision_of(response.header)
            items.extend(self._keys.item(kv) for kv in response.kvs)
            if not response.more:
                return RangeResult(items, revision)
            if not response.kvs:
                raise RemoteProtocolError("etcd answered with an empty page, and that there are more")
            start = response.kvs[-1].key + b"\0"

    async def _range(self, request: etcd.RangeRequest) -> etcd.RangeResponse:
        return await self._endpoints.repeat(lambda c: etcd.KvStub(c).range(request, metadata=METADATA))

    async def _revision(self) -> int:
        """The revision that etcd's quorum is at."""
        request = etcd.RangeRequest(key=self._keys.prefix, count_only=True)
        return revision_of((await self._range(request)).header)

    # ------------------------------------------------------------ changes

    async def put(self, key: bytes, value: bytes, *, lease: int = 0) -> int:
        """Set a key; see the port."""
        return (await self.txn([], [Put(key, value, lease)])).revision

    async def delete(self, key: bytes) -> bool:
        """Delete a key; see the port."""
        return bool((await self.txn([], [Delete(key)])).results[0])

    async def txn(
        self, compares: Sequence[Compare], success: Sequence[Operation], failure: Sequence[Operation] = ()
    ) -> TxnResult:
        """Execute a transaction; see the port. One that only reads is repeated like a read."""
        check_limits(compares, success, failure)
        for branch in (success, failure):
            check_changes(branch)
        request = self._keys.txn(compares, success, failure)

        async def ask(channel: Channel) -> etcd.TxnResponse:
            return await etcd.KvStub(channel).txn(request, metadata=METADATA)

        if all(isinstance(operation, Get) for operation in (*success, *failure)):
            response = await self._endpoints.repeat(ask)
        else:
            response = await self._endpoints.once(ask)
        operations = success if response.succeeded else failure
        results = self._keys.results(operations, response.responses)
        return TxnResult(response.succeeded, revision_of(response.header), results)

    # ------------------------------------------------------------ leases

    async def lease_grant(self, ttl_s: float) -> int:
        """Make a lease; see the port. Its ttl is rounded up to whole seconds, and to etcd's minimum."""
        if not 0 < ttl_s <= limits.COORDINATOR_LEASE_SECONDS_MAX:
            raise InvalidRequestError(
                f"a lease's ttl is above 0 and at most {limits.COORDINATOR_LEASE_SECONDS_MAX} s"
            )
        request = etcd.LeaseGrantRequest(ttl=math.ceil(ttl_s))
        response = await self._endpoints.repeat(
            lambda c: etcd.LeaseStub(c).lease_grant(request, metadata=METADATA)
        )
        if response.id <= 0 or response.error:
            raise RemoteProtocolError(f"etcd granted no lease: {response.error or response.id}")
        return response.id

    async def lease_keepalive(self, lease: int) -> float:
        """Renew a lease; see the port. Returns etcd's ttl, which may be longer than the one asked for."""
        response = await self._endpoints.repeat(
            lambda c: _keep_alive(c, lease), attempt_s=min(_KEEPALIVE_ATTEMPT_S, ATTEMPT_S)
        )
        if response.ttl <= 0:
            raise NotFoundError(f"lease {lease} doesn't exist (any more)")
        return float(response.ttl)

    async def lease_revoke(self, lease: int) -> None:
        """End a lease; see the port."""
        request = etcd.LeaseRevokeRequest(id=lease)
        await self._endpoints.once(lambda c: etcd.LeaseStub(c).lease_revoke(request, metadata=METADATA))

    # ------------------------------------------------------------ watching

    async def watch(self, prefix: bytes, from_revision: int = 0) -> AsyncIterator[list[WatchEvent]]:
        """Iterate over changes; see the port."""
        loop = asyncio.get_running_loop()
        following = from_revision if from_revision > 0 else await self._revision() + 1
        failures = 0
        deadline = 0.0  # when to give up; of meaning while there are failures
        for attempt in itertools.count():
            endpoint = self._endpoints.current
            try:
                if attempt > 0:
                    await self._check_history(endpoint, following)
                async with contextlib.aclosing(self._watch_on(endpoint, prefix, following)) as batches:
                    async for events in batches:
                        failures = 0
                        if events:
                            following = events[-1].item.mod_revision + 1
                            yield events
            except UnavailableError as error:
                self._endpoints.check_open()
                if not error.retriable:
                    raise
                failures += 1
                if failures == 1:
                    deadline = loop.time() + self._endpoints.timeout_s
                elif loop.time() >= deadline:
                    raise
            self._endpoints.rotate(endpoint)
            await self._endpoints.back_off(failures)

    async def _check_history(self, endpoint: Endpoint, following: int) -> None:
        """Make sure that etcd is still where it was: one that was restored from a backup counts its revisions anew.

        A watch from a revision that is still to come would pass over all that is done until then.

        Raises:
            CompactedError: it has lost what was given out already.
        """
        answer = await endpoint.call(
            lambda channel: etcd.KvStub(channel).range(PROBE, metadata=METADATA), ATTEMPT_S
        )
        revision = revision_of(answer.header)
        if revision < following - 1:
            raise CompactedError(
                f"etcd is at revision {revision}, before {following - 1}: it has lost some of its history",
                details={"compact_revision": following - 1},
            )

    async def _watch_on(
        self, endpoint: Endpoint, prefix: bytes, following: int
    ) -> AsyncGenerator[list[WatchEvent], None]:
        """Watch on one member: gives an empty list once the watch stands, then changes.

        Raises:
            CompactedError: some of the changes are not kept any more.
            UnavailableError: the member can't be reached, or ended the watch.
        """
        for start in (following, max(following - 1, 1)):
            async with _WatchStream(endpoint, *self._keys.span(prefix), start) as stream:
                if start == following and stream.revision >= following > 1:
                    continue  # it needs history: see the module's docstring
                yield []
                while True:
                    events = [self._keys.event(event) for event in await stream.receive()]
                    wanted = [event for event in events if event.item.mod_revision >= following]
                    if wanted:
                        yield wanted

    async def close(self) -> None:
        """Close the connections; see the port. Leases run on."""
        await self._endpoints.close()


async def _keep_alive(channel: Channel, lease: int) -> etcd.LeaseKeepAliveResponse:
    async with channel.request(
        "/etcdserverpb.Lease/LeaseKeepAlive",
        Cardinality.STREAM_STREAM,
        etcd.LeaseKeepAliveRequest,
        etcd.LeaseKeepAliveResponse,
        metadata=METADATA,
    ) as stream:
        await stream.send_message(etcd.LeaseKeepAliveRequest(id=lease), end=True)
        response = await stream.recv_message()
    if response is None:
        raise EOFError("the stream ended without an answer")
    # The header was made before the renewal, by the member asked.
    confirmed = await etcd.KvStub(channel).range(PROBE, metadata=METADATA)
    if response.header is None or confirmed.header is None or response.header.raft_term <= 0:
        raise EOFError("the answer has no header")
    if response.header.raft_term != confirmed.header.raft_term:
        raise GRPCError(Status.UNAVAILABLE, "the leader changed during a renewal")
    return response


class _WatchStream:
    """One watch on one member; use it in `async with`.

    Attributes:
        revision: the member's when it had made the watch, or a later one.
    """

    def __init__(self, endpoint: Endpoint, key: bytes, end: bytes, start_revision: int) -> None:
        self.revision = 0
        self._endpoint = endpoint
        self._request = etcd.WatchRequest(
            create_request=etcd.WatchCreateRequest(key=key, range_end=end, start_revision=start_revision)
        )
        self._channel: Channel
        self._stream: Stream[etcd.WatchRequest, etcd.WatchResponse]

    async def __aenter__(self) -> _WatchStream:
        self._channel = self._endpoint.channel()
        self._stream = self._channel.request(
            "/etcdserverpb.Watch/Watch",
            Cardinality.STREAM_STREAM,
            etcd.WatchRequest,
            etcd.WatchResponse,
            metadata=METADATA,
        )
        await self._stream.__aenter__()
        self._endpoint.hold()
        try:
            async with asyncio.timeout(ATTEMPT_S):
                await isolated(self._stream.send_message(self._request))
                created = await isolated(self._stream.recv_message())
            self._check(created)
            assert created is not None, "checked"
            self.revision = revision_of(created.header)
            if not created.created:
                raise RemoteProtocolError("etcd answered something else than that it made the watch")
        except FOREIGN_ERRORS as error:
            reason = self._reason(error)
            await self._close()
            raise reason from error
        except BaseException:
            await self._close()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._close()

    async def _close(self) -> None:
        self._endpoint.release(self._channel)
        # With an error the stream is reset, without one grpclib would wait for its end.
        reason = asyncio.CancelledError()
        await self._stream.__aexit__(type(reason), reason, None)

    async def receive(self) -> Sequence[mvccpb.Event]:
        """Wait for changes; there may be none in an answer.

        Raises:
            CompactedError: some of those that were asked for are not kept any more.
            UnavailableError: the watch has ended.
        """
        try:
            response = await isolated(self._stream.recv_message())
        except FOREIGN_ERRORS as error:
            raise self._reason(error) from error
        self._check(response)
        assert response is not None, "checked"
        return response.events

    def _reason(self, error: BaseException) -> TallymarkError:
        """The error of our tree for a foreign one."""
        if isinstance(error, StreamTerminatedError):
            # etcd resets a stream right after the status that says why: grpclib has both, and raises the former.
            try:
                self._stream._maybe_raise()
            except GRPCError as status:
                error = status
        return error_of(error, self._endpoint.address)

    def _check(self, response: etcd.WatchResponse | None) -> None:
        if response is None:
            raise UnavailableError(f"etcd at {self._endpoint.address} ended a watch")
        self._endpoint.heard()
        if response.compact_revision > 0:
            raise CompactedError(
                f"etcd's history begins after revision {response.compact_revision}",
                details={"compact_revision": response.compact_revision},
            )
        if response.canceled:
            raise UnavailableError(
                f"etcd at {self._endpoint.address} ended a watch: {response.cancel_reason or 'no reason given'}"
            )
