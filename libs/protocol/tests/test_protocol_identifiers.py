"""Canonical event ids, unique texts, and the partition of an account."""

import uuid

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tallymark_protocol import limits
from tallymark_protocol.errors import InvalidRequestError, RemoteProtocolError
from tallymark_protocol.identifiers import (
    check_account_id,
    decode_event_id,
    encode_event_id,
    encode_text,
    mix64,
    partition_of,
)
from tallymark_protocol.kernels import intrinsics

seeded = settings(derandomize=True, deadline=None, database=None)
LONGEST = limits.EVENT_ID_BYTES_MAX - 1
UUID = uuid.UUID("00112233-4455-6677-8899-aabbccddeeff")


@pytest.mark.parametrize(
    ("event_id", "encoded"),
    [
        ("job-8812", b"\x01job-8812"),
        ("é", b"\x01\xc3\xa9"),
        (b"\x00", b"\x02\x00"),
        (UUID, bytes.fromhex("0300112233445566778899aabbccddeeff")),
        (0, b"\x04\x00"),
        (1, b"\x04\x01"),
        (-1, b"\x04\xff"),
        (127, b"\x04\x7f"),
        (128, b"\x04\x80\x00"),
        (-128, b"\x04\x80"),
        (-129, b"\x04\x7f\xff"),
        (256, b"\x04\x00\x01"),
        (2**64, b"\x04" + bytes(8) + b"\x01"),
        (np.int64(128), b"\x04\x80\x00"),
        ("x" * LONGEST, b"\x01" + b"x" * LONGEST),
        (2 ** (LONGEST * 8 - 1) - 1, b"\x04" + b"\xff" * (LONGEST - 1) + b"\x7f"),
        (-(2 ** (LONGEST * 8 - 1)), b"\x04" + bytes(LONGEST - 1) + b"\x80"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_event_ids_have_these_bytes(event_id, encoded):
    """The format is fixed: other clients must make the very same bytes."""
    assert encode_event_id(event_id) == encoded
    assert decode_event_id(encoded) == event_id


event_ids = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=60),
    st.binary(min_size=1, max_size=LONGEST),
    st.uuids(),
    st.integers(-(2**200), 2**200),
)


@seeded
@given(event_ids, event_ids)
def test_event_ids_are_one_to_one(a, b):
    """What is encoded decodes to the same, of the same type; different ids have different bytes."""
    for event_id in (a, b):
        again = decode_event_id(encode_event_id(event_id))
        assert again == event_id
        assert type(again) is type(event_id)
    assert (encode_event_id(a) == encode_event_id(b)) == (type(a) is type(b) and a == b)


@seeded
@given(st.binary(max_size=20))
def test_decoding_refuses_or_is_the_inverse(data):
    """No bytes decode to an id that would be encoded otherwise."""
    try:
        event_id = decode_event_id(data)
    except RemoteProtocolError:
        return
    assert encode_event_id(event_id) == data


@pytest.mark.parametrize(
    ("event_id", "message"),
    [
        ("", "empty"),
        (b"", "empty"),
        (True, "bool"),
        (None, "NoneType"),
        (1.0, "float"),
        (("a",), "tuple"),
        (bytearray(b"a"), "bytearray"),
        ("x" * (LONGEST + 1), "256 bytes"),
        ("é" * 128, "256 bytes"),
        (b"x" * (LONGEST + 1), "256 bytes"),
        (2 ** (LONGEST * 8 - 1), "256 bytes"),
        (-(2 ** (LONGEST * 8 - 1)) - 1, "256 bytes"),
        (1 << 100_000, "12501 bytes"),
        ("job \ud83d", "surrogate at position 4"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_bad_event_ids_are_refused(event_id, message):
    """Empty, of a type without a canonical form, too long, or not text."""
    with pytest.raises(InvalidRequestError, match=message):
        encode_event_id(event_id)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x01",
        b"\x02",
        b"\x00x",
        b"\x05x",
        b"\x01\xff",
        b"\x01\xed\xa0\x80",
        b"\x03" + bytes(15),
        b"\x03" + bytes(17),
        b"\x04",
        b"\x04\x00\x00",
        b"\x04\xff\xff",
        b"\x02" + bytes(limits.EVENT_ID_BYTES_MAX),
    ],
)
def test_bytes_that_are_no_event_id_are_refused(data):
    """Unknown tags, bad UTF-8, wrong lengths, and numbers with bytes to spare."""
    with pytest.raises(RemoteProtocolError):
        decode_event_id(data)


def test_unique_texts():
    """A text may be empty; it has its own bound and the same care about UTF-8."""
    assert encode_text("") == b"\x01"
    assert encode_text("é") == b"\x01\xc3\xa9"
    longest = "x" * (limits.VALUE_TEXT_BYTES_MAX - 1)
    assert len(encode_text(longest)) == limits.VALUE_TEXT_BYTES_MAX
    for bad, message in ((longest + "x", "1024 bytes"), ("\udcff", "surrogate"), (b"x", "bytes"), (5, "int")):
        with pytest.raises(InvalidRequestError, match=message):
            encode_text(bad)


@pytest.mark.parametrize("account_id", [0, 1, 42, 2**32, 2**63, 2**64 - 1])
def test_an_account_has_the_partition_that_the_kernels_compute(account_id):
    """Clients and leaders must never disagree about where an account lives."""
    assert mix64(account_id) == int(intrinsics.mix64(np.uint64(account_id)))
    for count in (1, 4, 12):
        assert partition_of(account_id, count) == int(intrinsics.mix64(np.uint64(account_id))) % count


def test_partitions_by_hand():
    """These never change: a cluster's data lies by them."""
    assert mix64(0) == 0
    assert mix64(1) == 0x5692161D100B05E5
    assert [partition_of(account, 12) for account in range(6)] == [
        mix64(account) % 12 for account in range(6)
    ]
    counts = [0] * 12
    for account in range(12_000):
        counts[partition_of(account, 12)] += 1
    assert min(counts) > 900
    assert max(counts) < 1_100


@pytest.mark.parametrize(
    "account_id",
    [-1, -5, 2**64, 1 << 100_000, 1.0, "1", None, True],
    ids=lambda value: type(value).__name__,
)
def test_an_account_id_is_an_unsigned_64_bit_number(account_id):
    """Anything else is refused before it could end up in some partition."""
    with pytest.raises(InvalidRequestError, match="account_id must be a whole number"):
        partition_of(account_id, 4)


def test_a_numpy_account_id_becomes_an_int():
    """So that it is encoded like one."""
    number = check_account_id(np.uint64(2**64 - 1))
    assert number == 2**64 - 1
    assert type(number) is int
