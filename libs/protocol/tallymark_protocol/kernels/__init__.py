"""Numba kernels that more than one service needs, and where compiled kernels are kept.

numba keeps what it compiled beside the sources and takes it up again while the file of that one kernel is unchanged.
A kernel is compiled together with all that it calls, though, often from other files: after an update it could run
with yesterday's helpers or constants, and count wrongly. So compiled kernels are kept in a folder named by a digest of
every file that takes part: those that compile something, and all that they import of ours, directly or not. This
module, which all of them import first, sets that folder.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import re
import shutil
from pathlib import Path
from typing import Any

import numba

_config: Any = numba.config

_PACKAGES = ("tallymark_protocol", "tallymark_ingest", "tallymark_store")
# A file that compiles something, and what a file imports of ours.
_COMPILES = re.compile(rb"^(?:import|from) numba\b|^from [\w.]*\bcompiling import", re.MULTILINE)
_IMPORTS = re.compile(rb"^from (tallymark_[\w.]+) import (\([^)]*\)|[^\n]*)", re.MULTILINE)
_KEPT = 3  # folders of other digests, so that switching between versions doesn't compile each time
_PREFIX = "kernels-"


def _sources() -> dict[str, bytes]:
    """The files of our packages, by module name."""
    found: dict[str, bytes] = {}
    for name in _PACKAGES:
        spec = importlib.util.find_spec(name)
        if spec is None or not spec.submodule_search_locations:
            continue
        for location in map(Path, spec.submodule_search_locations):
            for path in location.rglob("*.py"):
                parts = path.relative_to(location).with_suffix("").parts
                module = ".".join((name, *parts)).removesuffix(".__init__")
                found[module] = path.read_bytes()
    return found


def _taking_part(sources: dict[str, bytes]) -> list[str]:
    """The modules whose text has a part in what is compiled."""
    found = {module for module, text in sources.items() if _COMPILES.search(text)}
    waiting = sorted(found)
    while waiting:
        for imported, names in _IMPORTS.findall(sources[waiting.pop()]):
            module = imported.decode()
            for name in (module, *(f"{module}.{part}" for part in re.findall(r"\w+", names.decode()))):
                if name in sources and name not in found:
                    found.add(name)
                    waiting.append(name)
    return sorted(found)


def _digest() -> str:
    state = hashlib.blake2b(digest_size=10)
    state.update(numba.__version__.encode())
    sources = _sources()
    for module in _taking_part(sources):
        text = sources[module]
        state.update(module.encode() + b"\0" + len(text).to_bytes(8, "little") + text)
    return state.hexdigest()


def _prune(parent: Path, current: str) -> None:
    others: list[tuple[float, Path]] = []
    for path in parent.glob(_PREFIX + "*"):
        with contextlib.suppress(FileNotFoundError):  # another process prunes, too
            others.append((path.stat().st_mtime, path))
    others.sort(reverse=True)
    for _, path in [entry for entry in others if entry[1].name != current][_KEPT:]:
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
