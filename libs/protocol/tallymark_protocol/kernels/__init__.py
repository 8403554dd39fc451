"""Numba kernels that more than one service needs, and where compiled kernels are kept.

numba keeps what it compiled beside the sources and takes it up again while the file of that one kernel is unchanged.
A kernel is compiled together with all that it calls, though, often from other files: after an update it could run
with yesterday's helpers, and count wrongly. So compiled kernels are kept in a folder named by a digest of every
file that takes part, and this module, which all of them import first, sets that folder.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import shutil
from pathlib import Path
from typing import Any

import numba

_config: Any = numba.config

_PACKAGES = ("tallymark_protocol", "tallymark_ingest", "tallymark_store")
_MARKS = (b"numba", b"kernel")  # a file without either defines no kernel
_KEPT = 3  # folders of other digests, so that switching between versions doesn't compile each time
_PREFIX = "kernels-"


def _sources() -> list[Path]:
    found: list[Path] = []
    for name in _PACKAGES:
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.submodule_search_locations:
            for location in spec.submodule_search_locations:
                found += sorted(Path(location).rglob("*.py"))
    return found


def _digest() -> str:
    state = hashlib.blake2b(digest_size=10)
    state.update(numba.__version__.encode())
    for path in _sources():
        content = path.read_bytes()
        if any(mark in content for mark in _MARKS):
            state.update(path.name.encode() + b"\0" + len(content).to_bytes(8, "little") + content)
    return state.hexdigest()


def _prune(parent: Path, current: str) -> None:
    others = [path for path in parent.glob(_PREFIX + "*") if path.name != current]
    others.sort(key=lambda path: path.stat().st_mtime, reverse=True)
    for path in others[_KEPT:]:
        shutil.rmtree(path, ignore_errors=True)


def _choose_folder() -> None:
    if _config.CACHE_DIR:  # NUMBA_CACHE_DIR: the user's choice stands above ours, but keeps digests apart
        parents = [Path(_config.CACHE_DIR)]
    else:
        parents = [Path(__file__).parent / "__pycache__", Path.home() / ".cache" / "tallymark"]
    name = _PREFIX + _digest()
    for parent in parents:
        with contextlib.suppress(OSError):
            (parent / name).mkdir(parents=True, exist_ok=True)
            probe = parent / name / ".writable"
            probe.touch()
            _config.CACHE_DIR = str(parent / name)
            _prune(parent, name)
            return


_choose_folder()
