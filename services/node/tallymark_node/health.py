"""Asks a role whether it is ready: `python -m tallymark_node.health`, the health check of a container.

It asks the role's own telemetry endpoint (`/readyz`), so what it says is what the role knows about itself. It runs
every few seconds on every node, so it imports next to nothing. Exit status 0: ready; 1: it answers that it is not,
and the reason is printed; 3: nobody answers; 2: there is no address to ask.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Mapping

TIMEOUT_SECONDS = 4.0
ANSWER_BYTES_MAX = 64 * 1024

READY = 0
NOT_READY = 1
NO_ADDRESS = 2
NO_ANSWER = 3

# A server that listens on every address is asked on loopback.
_EVERYWHERE = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104


def check(address: str, timeout_seconds: float = TIMEOUT_SECONDS) -> tuple[int, str]:
    """Ask the telemetry endpoint at "host:port" whether its role is ready; return the exit status and a sentence."""
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdecimal() or int(port) > 65_535:
        return NO_ADDRESS, f"{address!r} is no address: write HOST:PORT"
    host = host.removeprefix("[").removesuffix("]")
    try:
        status, body = _get(_EVERYWHERE.get(host, host), int(port), timeout_seconds)
    except (OSError, ValueError) as error:
        return NO_ANSWER, f"no answer from {address}: {error}"
    if status == 200:
        return READY, body or "ready"
    return NOT_READY, body or f"status {status}"


def _get(host: str, port: int, timeout_seconds: float) -> tuple[int, str]:
    """The status and the body of GET /readyz.

    Raises:
        OSError: no connection, or silence.
        ValueError: the answer is not HTTP's.
    """
    with socket.create_connection((host, port), timeout_seconds) as connection:
        connection.sendall(b"GET /readyz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        answer = bytearray()
        while len(answer) < ANSWER_BYTES_MAX:
            part = connection.recv(4096)
            if not part:
                break
            answer += part
    head, _, body = bytes(answer).partition(b"\r\n\r\n")
    words = head.split(b"\r\n", 1)[0].split()
    if len(words) < 2 or not words[0].startswith(b"HTTP/1.") or not words[1].isdigit():
        raise ValueError("it does not speak HTTP")
    return int(words[1]), body.decode("utf-8", "replace").strip()


def main(arguments: list[str], environment: Mapping[str, str]) -> int:
    """Ask the address that is given, or else the one that TALLYMARK_TELEMETRY tells the role to listen on."""
    address = arguments[0] if arguments else environment.get("TALLYMARK_TELEMETRY", "")
    if not address:
        status, sentence = NO_ADDRESS, "no address to ask: name one, or set TALLYMARK_TELEMETRY"
    else:
        status, sentence = check(address)
    print(sentence, file=sys.stdout if status == READY else sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], os.environ))
