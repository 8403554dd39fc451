"""Unaligned little-endian loads and stores on byte arrays, cache prefetch, and 128-bit helpers.

Wire data is not aligned, and numba's array views would either copy it or demand alignment. These
intrinsics compile to a single `mov` each. They check no bounds: callers validate lengths first, and a
kernel that reads bytes from a peer does so only after `validate_*` has accepted them.

Positions are int64, arrays are one-dimensional C-contiguous uint8 (prefetch takes any array).
"""

from typing import Any

import numba as nb
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils as _untyped_cgutils
from numba.extending import intrinsic

cgutils: Any = _untyped_cgutils

_BYTE_POINTER = ir.IntType(8).as_pointer()


def _address(context: Any, builder: Any, array_type: Any, array: Any, position: Any) -> Any:
    data = context.make_array(array_type)(context, builder, array).data
    base = builder.bitcast(data, _BYTE_POINTER)
    return builder.gep(base, [position])


def _make_load(result: Any, bits: int) -> Any:
    def load(typingctx: Any, array: Any, position: Any) -> Any:  # noqa: ARG001
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            address = _address(context, builder, signature.args[0], args[0], args[1])
            pointer = builder.bitcast(address, ir.IntType(bits).as_pointer())
            return builder.load(pointer, align=1)

        return result(array, types.int64), codegen

    return intrinsic(load)


def _make_store(value_type: Any, bits: int) -> Any:
    def store(typingctx: Any, array: Any, position: Any, value: Any) -> Any:  # noqa: ARG001
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            address = _address(context, builder, signature.args[0], args[0], args[1])
            pointer = builder.bitcast(address, ir.IntType(bits).as_pointer())
            builder.store(args[2], pointer, align=1)
            return context.get_dummy_value()

        return types.void(array, types.int64, value_type), codegen

    return intrinsic(store)


load_u8 = _make_load(types.uint8, 8)
load_u16 = _make_load(types.uint16, 16)
load_u32 = _make_load(types.uint32, 32)
load_u64 = _make_load(types.uint64, 64)
load_i64 = _make_load(types.int64, 64)
store_u8 = _make_store(types.uint8, 8)
store_u16 = _make_store(types.uint16, 16)
store_u32 = _make_store(types.uint32, 32)
store_u64 = _make_store(types.uint64, 64)
store_i64 = _make_store(types.int64, 64)


@intrinsic
def prefetch(typingctx: Any, array: Any, index: Any) -> Any:  # noqa: ARG001
    """Ask for the cache line of `array[index]` (for reading and writing); a hint, never an error."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        array_type = signature.args[0]
        value = context.make_array(array_type)(context, builder, args[0])
        pointer = cgutils.get_item_pointer(context, builder, array_type, value, [args[1]], wraparound=False)
        i32 = ir.IntType(32)
        function_type = ir.FunctionType(ir.VoidType(), [_BYTE_POINTER, i32, i32, i32])
        function = cgutils.get_or_insert_function(builder.module, function_type, "llvm.prefetch.p0")
        builder.call(function, [builder.bitcast(pointer, _BYTE_POINTER), i32(1), i32(3), i32(1)])
        return context.get_dummy_value()

    return types.void(array, types.int64), codegen


@intrinsic
def fold_multiply(typingctx: Any, a: Any, b: Any) -> Any:  # noqa: ARG001
    """The two halves of the 128-bit product of two uint64, xored: a quick mixer for hash tables in memory."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:  # noqa: ARG001
        wide = ir.IntType(128)
        product = builder.mul(builder.zext(args[0], wide), builder.zext(args[1], wide))
        high = builder.trunc(builder.lshr(product, ir.Constant(wide, 64)), ir.IntType(64))
        return builder.xor(high, builder.trunc(product, ir.IntType(64)))

    return types.uint64(types.uint64, types.uint64), codegen


@nb.njit(nogil=True, cache=True, inline="always")
def mix64(value: Any) -> Any:
    """splitmix64's finaliser (Steele, Lea, Flood: Fast splittable pseudorandom number generators, 2014)."""
    z = np.uint64(value)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


@nb.njit(nogil=True, cache=True)
def hash_bytes(data: Any, start: Any, end: Any, seed: Any) -> Any:
    """A 64-bit hash of `data[start:end]`. Checkpoints hold it (payload fingerprints): it must not change."""
    state = np.uint64(seed) ^ np.uint64(end - start)
    position = start
    while position + 8 <= end:
        state = mix64(state ^ load_u64(data, position)) + np.uint64(0x9E3779B97F4A7C15)
        position += 8
    tail = np.uint64(0)
    shift = np.uint64(0)
    while position < end:
        tail |= np.uint64(load_u8(data, position)) << shift
        shift += np.uint64(8)
        position += 1
    return mix64(state ^ tail)


@nb.njit(nogil=True, cache=True, inline="always")
def equal_bytes(a: Any, a_start: Any, b: Any, b_start: Any, length: Any) -> Any:
    """Whether `a[a_start:a_start+length]` equals `b[b_start:b_start+length]`."""
    i = 0
    while i + 8 <= length:
        if load_u64(a, a_start + i) != load_u64(b, b_start + i):
            return False
        i += 8
    while i < length:
        if load_u8(a, a_start + i) != load_u8(b, b_start + i):
            return False
        i += 1
    return True


@nb.njit(nogil=True, cache=True)
def copy_bytes(target: Any, target_start: Any, source: Any, source_start: Any, length: Any) -> None:
    """Copy `length` bytes; the ranges must not overlap."""
    i = 0
    while i + 8 <= length:
        store_u64(target, target_start + i, load_u64(source, source_start + i))
        i += 8
    while i < length:
        store_u8(target, target_start + i, load_u8(source, source_start + i))
        i += 1
