"""Decimals as whole numbers: six places, exactly, or not at all.

Events carry 64-bit integers, and no float enters a total. `scale` turns a decimal into an event's value and
refuses what wouldn't come back the same; `unscale` turns a total into a decimal. Neither depends on the decimal
context of the thread that calls it.
"""

from __future__ import annotations

import operator
import re
from decimal import Decimal

from tallymark_protocol import limits
from tallymark_protocol.errors import InvalidRequestError
from tallymark_protocol.model import SCALE

DECIMALS = 6
assert SCALE == 10**DECIMALS

# 2^63 / 10^6 has 13 digits before the point; anything with more is too large without working it out.
_INTEGER_DIGITS_MAX = 13
_TEXT = re.compile(r"[+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]{1,4})?")
_TEXT_CHARACTERS_MAX = 1_000


def scale(x: int | float | Decimal | str) -> int:
    """Return `x` times 1,000,000 as a whole number: `scale(45.1) == 45_100_000`.

    A float counts as the shortest decimal that reads back as it, which is what Python prints.

    Raises:
        InvalidRequestError: more than six decimals, beyond 64 bits, not finite, or no number.
    """
    if isinstance(x, bool):
        raise InvalidRequestError(f"{x!r} is no number to scale")
    if isinstance(x, float):
        # Not repr(): that of a subclass (numpy's float64) says more than the digits.
        return _scale_decimal(Decimal(float.__repr__(x)), x)
    if isinstance(x, Decimal):
        return _scale_decimal(x, x)
    if isinstance(x, str):
        if len(x) > _TEXT_CHARACTERS_MAX or not _TEXT.fullmatch(x):
            raise InvalidRequestError(f"{x!r:.100} is no decimal number")
        return _scale_decimal(Decimal(x), x)
    try:
        whole = operator.index(x)
    except TypeError:
        raise InvalidRequestError(
            f"a {type(x).__name__} can't be scaled: pass an int, float, Decimal or str"
        ) from None
    # Decimal's own limits don't apply: a short refusal of any int, however long, without turning it into digits.
    if whole.bit_length() > 64:
        raise _too_large("an int of that size")
    return _checked(whole * SCALE, whole)


def unscale(v: int) -> Decimal:
    """Return `v` divided by 1,000,000, exactly, with six places: `unscale(45_100_000) == Decimal("45.1")`.

    Any whole number will do, so 128-bit sums too.
    """
    whole = operator.index(v)
    # Through the constructor, which keeps every digit; arithmetic would round to the context's precision.
    return Decimal((int(whole < 0), tuple(int(digit) for digit in str(abs(whole))), -DECIMALS))


def _scale_decimal(number: Decimal, shown: object) -> int:
    if not number.is_finite():
        raise InvalidRequestError(f"{shown!s} is no finite number")
    if number.is_zero():
        return 0
    sign, digits, exponent = number.as_tuple()
    assert isinstance(exponent, int), "a finite decimal's exponent is a number"
    if number.adjusted() >= _INTEGER_DIGITS_MAX:
        raise _too_large(shown)
    zeros = exponent + DECIMALS  # to append to the digits; or, below zero, how many to take away
    kept = digits
    if zeros < 0:
        kept = digits[:zeros]  # empty when that is all of them
        if any(digits[zeros:]):
            raise InvalidRequestError(f"{shown!s:.100} has more than {DECIMALS} decimals: round it first")
        zeros = 0
    magnitude = int("".join(map(str, kept)) or "0") * 10**zeros
    return _checked(-magnitude if sign else magnitude, shown)


def _checked(scaled: int, shown: object) -> int:
    if not limits.VALUE_MIN <= scaled <= limits.VALUE_MAX:
        raise _too_large(shown)
    return scaled


def _too_large(shown: object) -> InvalidRequestError:
    return InvalidRequestError(
        f"{shown!s:.100} is out of range: scaled values go from -9223372036854.775808 to 9223372036854.775807"
    )
