"""Registering a copy with a coordinator whose answers get lost."""

from __future__ import annotations

from typing import Any

import pytest

from tallymark_protocol.errors import UnavailableError
from tallymark_runtime.assignments import copy_key, founding_key
from tallymark_runtime.coordinator import Put
from tallymark_store import warmup
from tallymark_store.coordination import Coordination

from .cluster_driver import Cluster
from .payload_builder import event


@pytest.fixture(scope="module", autouse=True)
def kernels() -> None:
    """Loaded before anything has a deadline."""
    warmup.warm_up()


async def test_a_registration_whose_answer_was_lost_is_no_lost_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """A store that isn't told that its copy is registered takes part with it, and doesn't miss its files."""
    cluster = Cluster()
    lost: list[Any] = []
    execute, ask = cluster.coordinator.txn, Coordination.registration

    async def txn(compares: Any, success: Any, failure: Any = ()) -> Any:
        result = await execute(compares, success, failure)
        keys = [operation.key for operation in success if isinstance(operation, Put)]
        if result.succeeded and copy_key(0, "c") in keys and not lost:
            lost.append(result)
            raise UnavailableError("the coordinator does not answer")
        return result

    async def registration(self: Coordination, partition: int) -> Any:
        # Silent until the others have founded the partition with all the copies that are registered.
        is_silent = self._identity.node_id == "c" and lost
        if is_silent and await cluster.coordinator.get(founding_key(0)) is None:
            raise UnavailableError("the coordinator does not answer")
        return await ask(self, partition)

    monkeypatch.setattr(cluster.coordinator, "txn", txn)
    monkeypatch.setattr(Coordination, "registration", registration)
    try:
        await cluster.create()
        await cluster.start()
        await cluster.append_anywhere([event(1, "sum")], (1, 0))
        await cluster.check_digests()
        assert lost
        assert sorted(cluster.registered(0)) == ["a", "b", "c"]
        assert not [report for report in cluster.reports if "gone" in report]
    finally:
        await cluster.close()
