"""How the fold's kernels are compiled.

Without reference counting: numba otherwise counts every array that an inlined function is handed up and down again,
atomically, which made the fold about twice as slow. The price is that kernels allocate nothing; whoever calls them
brings the arrays. What they call is compiled likewise.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba as nb

from tallymark_protocol.kernels import intrinsics

_Function = TypeVar("_Function", bound=Callable[..., Any])

prefetch: Any = intrinsics.prefetch  # its type would be that of the code generator behind it

_OPTIONS: dict[str, Any] = {"nogil": True, "cache": True, "_nrt": False}


def kernel(function: _Function) -> _Function:
    """Compile a kernel."""
    return cast("_Function", nb.njit(**_OPTIONS)(function))


def inlined(function: _Function) -> _Function:
    """Compile a small helper that is copied into the kernels that call it."""
    return cast("_Function", nb.njit(inline="always", **_OPTIONS)(function))
