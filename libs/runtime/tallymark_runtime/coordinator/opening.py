"""Opening the coordinator that a setting names.

`embedded` is in the data directory of the store itself, which opens it; `tcp://host:port` is the process that
embeds it; `etcd://host:port,host:port,...` is an etcd cluster, by any of its members.
"""

from __future__ import annotations

import random
from typing import Final

from tallymark_protocol.errors import InvalidRequestError
from tallymark_runtime.coordinator.port import Coordinator
from tallymark_runtime.coordinator.remote import RemoteCoordinator
from tallymark_runtime.framing import split_address

EMBEDDED: Final = "embedded"
DEFAULT_PREFIX: Final = "tallymark/"

_TCP: Final = "tcp://"
_ETCD: Final = "etcd://"
_FORMS: Final = '"embedded", "tcp://host:port" or "etcd://host:port,host:port,..."'
_MEMBERS_MAX: Final = 16


def is_etcd(url: str) -> bool:
    """Whether a setting names an etcd cluster."""
    return url.startswith(_ETCD)


def addresses_of(url: str) -> list[str]:
    """The addresses in a setting, each "host:port"; none for "embedded".

    Raises:
        InvalidRequestError: it is none of the forms above.
    """
    if url == EMBEDDED:
        return []
    scheme = next((scheme for scheme in (_TCP, _ETCD) if url.startswith(scheme)), None)
    if scheme is None:
        raise InvalidRequestError(f"coordinator must be {_FORMS}, not {url!r}")
    addresses = [address.strip() for address in url.removeprefix(scheme).rstrip("/").split(",")]
    if len(addresses) > (_MEMBERS_MAX if scheme == _ETCD else 1) or len(set(addresses)) < len(addresses):
        raise InvalidRequestError(f"coordinator names too many addresses, or one twice: {url!r}")
    for address in addresses:
        try:
            split_address(address)
        except ValueError as error:
            raise InvalidRequestError(f"coordinator must be {_FORMS}: {error}") from None
    return addresses


def open_remote(
    url: str, rng: random.Random, *, prefix: str = DEFAULT_PREFIX, timeout_s: float = 5.0
) -> Coordinator:
    """Open a coordinator of another process; nothing is sent yet. `close` it.

    Args:
        url: "tcp://..." or "etcd://...".
        rng: for the jitter of reconnecting, and the member of etcd to begin with.
        prefix: what all keys begin with in etcd; of no meaning for "tcp://".
        timeout_s: for every operation.

    Raises:
        InvalidRequestError: the URL is none of these.
    """
    addresses = addresses_of(url)
    if not addresses:
        raise InvalidRequestError(
            'this role needs coordinator = "tcp://host:port", the address of the store that embeds the coordinator, '
            f'or "etcd://host:port,..."; it is {url!r}'
        )
    if not is_etcd(url):
        return RemoteCoordinator(addresses[0], rng=rng, timeout_s=timeout_s)
    # Late: gRPC takes long to import, and a node on its own needs none.
    from tallymark_runtime.coordinator.etcd import EtcdCoordinator

    return EtcdCoordinator(addresses, rng=rng, prefix=prefix.encode(), timeout_s=timeout_s)
