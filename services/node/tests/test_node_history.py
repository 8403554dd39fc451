"""Reading a repository's history: every file of every commit once, whatever it is called."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tallymark_node.history import Change, read
from tallymark_protocol.errors import InvalidRequestError

WHO = {
    "GIT_AUTHOR_NAME": "Ada Lovelace",
    "GIT_AUTHOR_EMAIL": "Ada@Example.com",
    "GIT_COMMITTER_NAME": "x",
    "GIT_COMMITTER_EMAIL": "x@example.com",
    "GIT_CONFIG_GLOBAL": "/dev/null",
    "GIT_CONFIG_SYSTEM": "/dev/null",
}


class Repository:
    """A repository whose clock is set by hand."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir()
        self.git("init", "-q", "-b", "main")

    def git(self, *arguments: str, time_s: int = 0, **environment: str) -> str:
        found = subprocess.run(
            ["git", "-C", str(self.path), *arguments],
            env=os.environ
            | WHO
            | {"GIT_AUTHOR_DATE": f"@{time_s} +0200", "GIT_COMMITTER_DATE": f"@{time_s} +0200"}
            | environment,
            check=True,
            capture_output=True,
            text=True,
        )
        return found.stdout.strip()

    def commit(self, files: dict[str, bytes | None], time_s: int, **environment: str) -> str:
        for name, content in files.items():
            path = self.path / name
            if content is None:
                path.unlink()
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        self.git("add", "-A")
        self.git("commit", "-q", "--allow-empty", "-m", "a\n\x1fb", time_s=time_s, **environment)
        return self.git("rev-parse", "HEAD")


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    return Repository(tmp_path / "repository")


def test_every_file_of_every_commit_once(repository: Repository) -> None:
    """Newest first; lines added and deleted; binary files count no lines; empty commits and merges nothing."""
    first = repository.commit({"a.py": b"1\n2\n3\n", "docs/b": b"x\n", "c.bin": bytes(5)}, 1_000_000_000)
    second = repository.commit({"a.py": b"1\n4\n", "docs/b": None}, 1_000_000_100, GIT_AUTHOR_NAME="Bob")
    repository.commit({}, 1_000_000_200)
    repository.git("checkout", "-q", "-b", "side", first)
    third = repository.commit({"side": b"x"}, 1_000_000_300)
    repository.git("checkout", "-q", "main")
    repository.git("merge", "-q", "--no-ff", "-m", "merge", "side", time_s=1_000_000_400)
    changes = list(read(repository.path))
    assert sorted((c.time_s, c.path, c.added, c.deleted, c.author, c.commit) for c in changes) == [
        (1_000_000_000, "a.py", 3, 0, "Ada Lovelace", first),
        (1_000_000_000, "c.bin", 0, 0, "Ada Lovelace", first),
        (1_000_000_000, "docs/b", 1, 0, "Ada Lovelace", first),
        (1_000_000_100, "a.py", 1, 2, "Bob", second),
        (1_000_000_100, "docs/b", 0, 1, "Bob", second),
        (1_000_000_300, "side", 1, 0, "Ada Lovelace", third),
    ]
    assert len({change.event_id for change in changes}) == 6


def test_strange_names_are_kept_apart(repository: Repository) -> None:
    """Tabs, line ends, quotes, other scripts, bytes that are no text."""
    names = ["a\tb", "a b", "ä/ö.TXT", '"quoted"', "-", "tab\t\tend", "0\t0\tx", ".hidden", "x.", "in\nside"]
    repository.commit(dict.fromkeys(names, b"x\n"), 5)
    assert {change.path for change in read(repository.path)} == set(names)
    latin = os.fsdecode(b"caf\xe9")
    repository.commit({latin: b"x"}, 6)
    assert len(list(read(repository.path))) == len(names) + 1


def test_large_histories_come_in_blocks(repository: Repository, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever a block ends."""
    for i in range(30):
        repository.commit({f"f{i % 7}/{i}.txt": b"x\n" * i}, i)
    whole = list(read(repository.path))
    assert len(whole) == 30
    popen = subprocess.Popen

    class Slow:
        def __init__(self, stream: object) -> None:
            self.stream = stream

        def read(self, size: int) -> bytes:
            return self.stream.read(min(size, 17))  # type: ignore[attr-defined, no-any-return]

    class Process(popen):  # type: ignore[misc, valid-type]
        def __init__(self, *arguments: object, **options: object) -> None:
            super().__init__(*arguments, **options)
            self.pipe = self.stdout
            self.stdout = Slow(self.pipe)

        def __exit__(self, *error: object) -> None:
            self.stdout = self.pipe
            super().__exit__(*error)

    monkeypatch.setattr(subprocess, "Popen", Process)
    assert list(read(repository.path)) == whole


def test_what_an_event_is_made_of() -> None:
    """Accounts by address, whatever its case; areas and kinds of paths."""

    def change(path: str, email: str = "a@b.c", author: str = "A") -> Change:
        return Change("c0ffee", author, email, 5, 1, 2, path)

    assert change("x").account_id == change("y", "A@B.C", "Other").account_id
    assert change("x", "", "A").account_id != change("x", "", "B").account_id
    assert 0 <= change("x").account_id < 2**64
    assert change("src/a/b.PY").area == "src"
    assert change("b.py").area == "(root)"
    assert [change(p).kind for p in ("a/b.PY", "Makefile", ".env", "a.tar.gz", "x." + "y" * 40)] == [
        "py", "(none)", "(none)", "gz", "y" * 32
    ]  # fmt: skip
    assert change("x").event_id != change("y").event_id


def test_a_history_that_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    """No repository, no commit, no such folder: with git's own words."""
    (tmp_path / "plain").mkdir()
    empty = Repository(tmp_path / "empty")
    for path in (tmp_path / "plain", empty.path, tmp_path / "gone"):
        with pytest.raises(InvalidRequestError, match="git cannot read a history"):
            list(read(path))


def test_a_machine_without_git_is_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rather than with a missing file."""
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InvalidRequestError, match="git is not installed"):
        list(read(tmp_path))


def test_a_reader_may_stop_early(repository: Repository) -> None:
    """Nothing is left running."""
    repository.commit({"a": b"x", "b": b"y"}, 5)
    changes = read(repository.path)
    assert next(changes).path == "a"
    changes.close()  # type: ignore[attr-defined]
