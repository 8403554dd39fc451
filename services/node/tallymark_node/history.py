"""A git repository's history as usage: every (commit, file) is one fact about its author.

Owns the reading of `git log`; knows nothing of servers. Author e-mail addresses become account ids by hash, so
that the same history gives the same accounts everywhere.
"""

from __future__ import annotations

import hashlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

import msgspec

from tallymark_protocol.errors import InvalidRequestError

_FIELD = "\x1f"
_RECORD = "\x1e"
_FORMAT = _RECORD + _FIELD.join(("%H", "%an", "%ae", "%at")) + _FIELD


class Change(msgspec.Struct, frozen=True):
    """One file in one commit."""

    commit: str
    author: str
    email: str
    time_s: int  # author time, Unix seconds
    added: int  # lines; 0 for binary files
    deleted: int
    path: str

    @property
    def account_id(self) -> int:
        """The author, as an account."""
        return _hash64(self.email.lower() or self.author)

    @property
    def path_hash(self) -> int:
        """The path, as a number of 64 bits."""
        return _hash64(self.path)

    @property
    def area(self) -> str:
        """The top folder; "(root)" for files that lie in none."""
        return self.path.split("/", 1)[0] if "/" in self.path else "(root)"

    @property
    def kind(self) -> str:
        """The file's ending; "(none)" where it has none."""
        name = self.path.rsplit("/", 1)[-1].lstrip(".")
        return name.rsplit(".", 1)[1].lower()[:32] if "." in name else "(none)"

    @property
    def event_id(self) -> str:
        """Unique per commit and file."""
        return f"{self.commit}:{self.path_hash:016x}"


def _hash64(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=8).digest(), "little")


def _number(text: str) -> int:
    return int(text) if text.isdigit() else 0  # "-" for binary files


def read(path: Path) -> Iterator[Change]:
    """Yield the changes of the repository that holds `path`, newest commit first; merges have none.

    Raises:
        InvalidRequestError: when there is no git, no repository, or no commit.
    """
    command = ["git", "-C", str(path), "log", "--numstat", "--no-renames", "-z", f"--format={_FORMAT}"]
    try:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    except FileNotFoundError:
        raise InvalidRequestError(
            "git is not installed; the demo reads a repository's history with it"
        ) from None
    assert process.stdout is not None
    assert process.stderr is not None
    with process:
        rest = b""
        while block := process.stdout.read(1 << 20):
            *whole, rest = (rest + block).split(_RECORD.encode())
            for record in whole:
                yield from _changes(record)
        yield from _changes(rest)
        error = process.stderr.read().decode("utf-8", "replace").strip()
        if process.wait() != 0:
            raise InvalidRequestError(f"git cannot read a history at {path}: {error.splitlines()[-1:]}")


def _changes(record: bytes) -> Iterator[Change]:
    text = record.decode("utf-8", "replace").strip("\n\0")
    if not text:
        return
    commit, author, email, time_s, files = text.split(_FIELD, 4)
    for line in files.split("\0"):
        parts = line.strip("\n").split("\t", 2)
        if len(parts) == 3:
            yield Change(
                commit=commit,
                author=author,
                email=email,
                time_s=int(time_s),
                added=_number(parts[0]),
                deleted=_number(parts[1]),
                path=parts[2],
            )
