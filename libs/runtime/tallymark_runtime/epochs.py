"""How the coordinator's revisions become epochs and metrics' uids, also after its history was lost.

Epochs and uids must never be given twice, and only rise. Revisions do so within one history of the coordinator, and
start again lower when it is restored from a backup. So there is a base, and an epoch is the base that its leader
key was created under, plus the key's create revision; a uid likewise. The base lies under

    epoch_base             `EpochBase`; absent as long as the history never was lost

and each key carries the base in its value (`Leader.epoch_base`, the uid of a stored metric), written in a
transaction that requires the base to be the present one. So everybody computes the same number from the key alone,
and a base that is raised while leaders lead changes nothing for them.

The base is raised to the time in microseconds since 1970. Whatever was given before that moment is below it as long
as the coordinator makes less than a million changes a second: so nothing has to be known of what was lost. See
docs/adr/0006-epoch-base.md.
"""

from __future__ import annotations

from typing import Final

import msgspec

from tallymark_protocol.errors import InvalidRequestError, UnavailableError
from tallymark_runtime.catalog import EPOCH_BASE, EpochBase, Leader, decode_value, epoch_of, leader_key
from tallymark_runtime.coordinator import Compare, Coordinator, Get, Put, absent, unchanged

EPOCH_BASE_MAX: Final = 2**62  # epochs are kept in 63 bits
__all__ = [
    "EPOCH_BASE",
    "EPOCH_BASE_MAX",
    "BaseRead",
    "EpochBase",
    "create_leader_key",
    "epoch_of",
    "raise_base",
    "read_base",
]

_ATTEMPTS_MAX: Final = 8  # to change what others keep changing


class BaseRead(msgspec.Struct, frozen=True):
    """The base as it was read, and the condition that it still is so."""

    base: int
    condition: Compare


async def read_base(coordinator: Coordinator) -> BaseRead:
    """Read the base; make what is computed from it conditional on `condition`."""
    item = await coordinator.get(EPOCH_BASE)
    if item is None:
        return BaseRead(0, absent(EPOCH_BASE))
    found = decode_value(EpochBase, item)
    return BaseRead(found.base, unchanged(item))


async def create_leader_key(coordinator: Coordinator, partition: int, leader: Leader, lease: int) -> int:
    """Create a partition's leader key; return its epoch, 0 where somebody else has the key.

    Raises:
        UnavailableError: the coordinator can't be reached, and the key may have been created all the same.
        NotFoundError: the lease has run out.
    """
    key = leader_key(partition)
    for _ in range(_ATTEMPTS_MAX):
        read = await read_base(coordinator)
        value = msgspec.msgpack.encode(msgspec.structs.replace(leader, epoch_base=read.base))
        result = await coordinator.txn([absent(key), read.condition], [Put(key, value, lease)], [Get(key)])
        if result.succeeded:
            return read.base + result.revision
        if result.results[0]:
            return 0
    raise UnavailableError("the epoch base keeps changing")


async def raise_base(coordinator: Coordinator, now_ns: int, *, seen: int = 0) -> tuple[int, int]:
    """Raise the base after the coordinator's history was lost; return the one before and the new one.

    Args:
        coordinator: where it lies.
        now_ns: the time since 1970.
        seen: the highest epoch or uid that any store knows of.

    Raises:
        InvalidRequestError: the clock can't be right: the base would have to fall, or is at its end.
        UnavailableError: others raise it at the same time.
    """
    for _ in range(_ATTEMPTS_MAX):
        read = await read_base(coordinator)
        wanted = now_ns // 1000
        if wanted <= max(read.base, seen):
            raise InvalidRequestError(
                f"the clock is wrong: the epoch base would be {wanted}, and {max(read.base, seen)} was reached already"
            )
        if wanted > EPOCH_BASE_MAX:
            raise InvalidRequestError(f"the clock is wrong: the epoch base would be {wanted}")
        put = Put(EPOCH_BASE, msgspec.msgpack.encode(EpochBase(wanted)))
        if (await coordinator.txn([read.condition], [put])).succeeded:
            return read.base, wanted
    raise UnavailableError("the epoch base is being raised by others at the same time")
