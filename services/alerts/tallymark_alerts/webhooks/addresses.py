"""Which addresses a webhook may reach, and which URLs it may have. Pure.

A webhook's URL comes from outside, and this service sits inside a network: without a check, anybody who may create a
webhook could have requests posted to machines that trust this network, to this machine itself, or to a cloud's metadata
service. So only addresses that are public are connected to: those that are global by the registries of IANA
(`ipaddress.is_global`), not multicast, not reserved, and in IPv6 in the range that is given out for global use. Where an
IPv6 address stands for an IPv4 one (mapped, 6to4, NAT64), that one is judged, too.
"""

from __future__ import annotations

import ipaddress
import re
from typing import Final

import yarl

from tallymark_protocol import limits
from tallymark_protocol.errors import InvalidRequestError

_GLOBAL_V6: Final = ipaddress.IPv6Network("2000::/3")
_NAT64: Final = ipaddress.IPv6Network("64:ff9b::/96")
_REFUSED: Final = (
    ipaddress.IPv4Network("192.0.0.0/24"),  # protocol assignments; a few of them count as global
    ipaddress.IPv4Network("192.88.99.0/24"),  # relays of 6to4, given up
    ipaddress.IPv6Network("2001::/23"),  # protocol assignments, Teredo among them
    ipaddress.IPv6Network("2001:db8::/32"),
    ipaddress.IPv6Network("3fff::/20"),  # documentation; younger than some versions of `ipaddress`
)
_SCHEMES: Final = ("http", "https")


def is_public(address: str) -> bool:
    """Whether an IP address in text may be connected to; what is no IP address may not."""
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return False
    if isinstance(ip, ipaddress.IPv6Address):
        if ip.scope_id is not None:
            return False
        if ip.ipv4_mapped is not None:
            return _is_public(ip.ipv4_mapped)
        if ip in _NAT64:
            return _is_public(ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF))
        if ip.sixtofour is not None and not _is_public(ip.sixtofour):
            return False
        if ip not in _GLOBAL_V6:
            return False
    return _is_public(ip)


def _is_public(ip: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    if any(ip.version == network.version and ip in network for network in _REFUSED):
        return False
    return ip.is_global and not (ip.is_multicast or ip.is_reserved or ip.is_unspecified)


def check_url(url: str, *, allow_private: bool) -> None:
    """Refuse a URL that no webhook can have.

    Hosts' names are looked up at each connection, not here; an address that isn't public is refused here already, so
    that whoever creates the webhook hears of it.

    Raises:
        InvalidRequestError: it is not one, and why.
    """
    if not url:
        raise InvalidRequestError("a webhook needs a URL")
    if len(url.encode("utf-8", "backslashreplace")) > limits.WEBHOOK_URL_BYTES_MAX:
        raise InvalidRequestError(f"a webhook's URL has at most {limits.WEBHOOK_URL_BYTES_MAX} bytes")
    # Not left to the parser: it would quote some of these, and what is requested would not be what was asked for.
    if not all("!" <= character <= "~" for character in url) or "\\" in url:
        raise InvalidRequestError(
            "a webhook's URL has only printable ASCII characters, without spaces and backslashes; "
            "write others in their %-encoding, and a host in its xn-- form"
        )
    try:
        parsed = yarl.URL(url)
        port = parsed.port
        host = parsed.host
    except ValueError as error:
        raise InvalidRequestError(f"a webhook's URL must be one: {error}") from None
    if parsed.scheme not in _SCHEMES:
        raise InvalidRequestError(
            f"a webhook's URL begins with https:// (or http://), not with {parsed.scheme!r}"
        )
    if not host:
        raise InvalidRequestError("a webhook's URL names a host")
    if port == 0:
        raise InvalidRequestError("a webhook's URL can't name port 0")
    if parsed.raw_user is not None or "@" in re.split("[/?#]", url.partition("//")[2], maxsplit=1)[0]:
        raise InvalidRequestError(
            "a webhook's URL can't carry a user or password; messages are signed instead"
        )
    if "#" in url:
        raise InvalidRequestError("a webhook's URL can't have a fragment: it would never be sent")
    if not allow_private and (_is_local_name(host) or (_is_address(host) and not is_public(host))):
        raise InvalidRequestError(
            f"the address {host} is not public; webhooks to such addresses must be allowed by the setting "
            f"webhook_allow_private of the server, as in TALLYMARK_WEBHOOK_ALLOW_PRIVATE=true tallymark dev"
        )


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        # The forms that a resolver would take for an IPv4 address (127.1, 2130706433, 0x7f000001) are none to
        # `ipaddress`, and not public then.
        last = host.rstrip(".").rsplit(".", 1)[-1].lower()
        return last.isdigit() or last.startswith("0x")
    return True


def _is_local_name(host: str) -> bool:
    name = host.rstrip(".").lower()
    return name == "localhost" or name.endswith(".localhost")
