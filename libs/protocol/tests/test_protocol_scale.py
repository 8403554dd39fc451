"""Decimals to whole numbers and back, without losing any."""

import decimal
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tallymark_protocol.errors import InvalidRequestError
from tallymark_protocol.scale import scale, unscale

seeded = settings(derandomize=True, deadline=None, database=None)


@pytest.mark.parametrize(
    ("x", "expected"),
    [
        (0, 0),
        (1, 1_000_000),
        (-1, -1_000_000),
        (10_000, 10_000_000_000),
        (45.0, 45_000_000),
        (45.1, 45_100_000),
        (0.1, 100_000),
        (-0.000001, -1),
        (1e-6, 1),
        (-0.0, 0),
        (1e12, 10**18),
        ("45.10", 45_100_000),
        ("+.5", 500_000),
        ("5.", 5_000_000),
        ("-0", 0),
        ("1e3", 1_000_000_000),
        ("1.0000000", 1_000_000),
        ("1." + "0" * 900, 1_000_000),
        ("0e9999", 0),
        (Decimal("9223372036854.775807"), 2**63 - 1),
        (Decimal("-9223372036854.775808"), -(2**63)),
        (Decimal("0E-100000"), 0),
        (9_223_372_036_854, 9_223_372_036_854_000_000),
        (np.float64(45.1), 45_100_000),
        (np.int32(7), 7_000_000),
    ],
)
def test_scale_is_exact(x, expected):
    """Every type a caller may have, at both ends of the range; a float means what it prints as."""
    scaled = scale(x)
    assert scaled == expected
    assert type(scaled) is int


@pytest.mark.parametrize(
    "x",
    [
        0.1234567,
        0.1 + 0.2,
        1e-7,
        5e-324,
        "0.0000001",
        "1.00000000000000000000000000000000001",
        Decimal("1e-1000000"),
        Decimal("123.4567891"),
    ],
)
def test_scale_refuses_to_lose_decimals(x):
    """A seventh decimal is refused, never rounded."""
    with pytest.raises(InvalidRequestError, match="more than 6 decimals"):
        scale(x)


@pytest.mark.parametrize(
    "x",
    [
        Decimal("9223372036854.775808"),
        Decimal("-9223372036854.775809"),
        9_223_372_036_855,
        1e13,
        1.7e308,
        "1e9999",
        Decimal("1e1000000"),
        1 << 20_000,
        -(1 << 64),
    ],
    ids=lambda value: type(value).__name__,
)
def test_scale_refuses_to_overflow(x):
    """One millionth beyond 64 bits is too much, and huge exponents cost nothing to refuse."""
    with pytest.raises(InvalidRequestError, match="out of range"):
        scale(x)


@pytest.mark.parametrize(
    "x",
    [
        float("nan"),
        float("inf"),
        -float("inf"),
        Decimal("NaN"),
        Decimal("sNaN"),
        Decimal("-Infinity"),
        "nan",
        "Infinity",
        "",
        " 1",
        "1_000",
        "1,5",
        "٣",
        ".",
        "1e",
        "9" * 2_000,
        True,
        None,
        1j,
        Fraction(1, 2),
        b"1",
    ],
    ids=repr,
)
def test_scale_refuses_what_is_no_number(x):
    """Not finite, not a decimal number's text, or of another type."""
    with pytest.raises(InvalidRequestError):
        scale(x)


@seeded
@given(st.integers(-(2**63), 2**63 - 1))
def test_what_unscale_gives_scale_takes_back(v):
    """Every 64-bit value survives the way there and back, as a Decimal and as text."""
    assert scale(unscale(v)) == v
    assert scale(str(unscale(v))) == v


@seeded
@given(st.integers(-(2**127), 2**127))
def test_unscale_is_exact_for_sums_of_128_bits(v):
    """Not one digit is lost, whatever the thread's decimal context says."""
    with decimal.localcontext() as context:
        context.prec = 3
        shown = unscale(v)
    assert Fraction(shown) == Fraction(v, 1_000_000)
    assert shown.as_tuple().exponent == -6


@seeded
@given(
    st.decimals(allow_nan=False, allow_infinity=False, places=6, min_value=-9 * 10**12, max_value=9 * 10**12)
)
def test_scale_agrees_with_fractions(x):
    """An independent exact arithmetic finds the same number, under any decimal context."""
    with decimal.localcontext() as context:
        context.prec = 2
        scaled = scale(x)
    assert scaled == Fraction(x) * 1_000_000


def test_unscale_by_hand():
    """Six places, so that columns of amounts line up."""
    assert str(unscale(45_100_000)) == "45.100000"
    assert str(unscale(-1)) == "-0.000001"
    assert unscale(0) == 0
    with pytest.raises(TypeError):
        unscale(1.5)
