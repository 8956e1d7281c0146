"""Any id becomes a legal part of a key, and never meets another."""

from __future__ import annotations

import enum
import hashlib
from typing import Any

import pytest
from faulty_driver import is_name
from hypothesis import given
from hypothesis import strategies as st

from persistence.errors import InvalidKeyError
from persistence.keys import MAX_ID_BYTES, after, encode_id, newest_first, number_key, prefix_end

LONG = "x" * 200
HOSTILE = [
    *("", " ", "  ", "%", "%%", "%25", "%2F", "/", "//", ".", "..", "../..", "~", "%7E", "a~b"),
    *("a", "A", "a\u0301", "\u00e1", "ａ", "ß", "ss", "SS", "İ", "i\u0307", "ﬀ", "ff"),
    *("0", "00", "null", "None", "true", "1e3", "1000", "9007199254740993", "9007199254740992"),
    *("\0", "\0\0", "\n", "\r\n", "\t", "\x7f", "\x80", "\u2028", "\ufeff", "\ufffd", "😀", "👨‍👩‍👧"),
    *("{", "}", "{t}", "a:b", "a_b", "a-b", "a+b", "a b", "a@b", "a*b", "a?b", "a=b", "a&b", "a#b", "a|b"),
    *("'; DROP TABLE x; --", '"', "\\", "$where", "__proto__", "[a-z]*", "con", "nul", "index/images"),
    *(LONG[:199], LONG, LONG + "x", LONG + "y", LONG * 2, "é" * 33, "é" * 34, "é" * 5000, "~" * 66, "~" * 67),
    *(LONG[:135] + "~" + hashlib.sha256((LONG + "x").encode()).hexdigest(), "%" * 66, "%" * 67),
]


def test_hostile_ids_never_meet() -> None:
    encoded = [encode_id(id) for id in HOSTILE]
    assert len(set(HOSTILE)) == len(HOSTILE)
    assert len(set(encoded)) == len(encoded)


@pytest.mark.parametrize("id", HOSTILE, ids=ascii)
def test_a_hostile_id_is_a_legal_name(id: str) -> None:
    encoded = encode_id(id)
    assert is_name(encoded, 200)
    assert "/" not in encoded
    assert encode_id(id) == encoded


texts = st.text(st.characters(exclude_categories=["Cs"]))


@given(st.sets(texts | st.text("%~/2EF57Ea.", max_size=8), min_size=2, max_size=20))
def test_ids_never_meet(ids: set[str]) -> None:
    encoded = {encode_id(id) for id in ids}
    assert len(encoded) == len(ids)
    assert all(is_name(text, 200) and "/" not in text for text in encoded)


@given(texts.map(lambda text: text * 40))
def test_long_ids_stay_short_names(id: str) -> None:
    assert is_name(encode_id(id), 200)


@given(st.text("abcXYZ019_.:@+-", min_size=1, max_size=200))
def test_common_ids_stand_for_themselves(id: str) -> None:
    assert encode_id(id) == id


@pytest.mark.parametrize("id", [None, 1, b"a", ["a"], True, 1.5, object()], ids=repr)
def test_what_is_no_text_is_no_id(id: Any) -> None:
    with pytest.raises(InvalidKeyError, match="session_id"):
        encode_id(id, "session_id")


def test_what_is_no_unicode_or_too_long_is_no_id() -> None:
    for id in ("\ud800", "a\udfffb"):
        with pytest.raises(InvalidKeyError, match="surrogate"):
            encode_id(id)
    encode_id("x" * MAX_ID_BYTES)
    with pytest.raises(InvalidKeyError, match="limit"):
        encode_id("x" * (MAX_ID_BYTES + 1))


def test_equal_texts_have_one_name_whatever_their_class() -> None:
    class Name(str, enum.Enum):  # noqa: UP042 - a StrEnum shows itself as its value
        A = "a"
        B = "b c"

    assert f"{encode_id(Name.A)}/{encode_id(Name.B)}" == f"{encode_id('a')}/{encode_id('b c')}" == "a/b%20c"


@given(st.integers(0, 10**12 - 1), st.integers(0, 10**12 - 1))
def test_numbers_sort_as_keys(one: int, two: int) -> None:
    assert (number_key("m/", one) < number_key("m/", two)) == (one < two)


INT64 = st.integers(-(1 << 63), (1 << 63) - 1)


@given(INT64, INT64)
def test_later_times_sort_first(one: int, two: int) -> None:
    assert (newest_first(one) < newest_first(two)) == (one > two)
    assert len(newest_first(one)) == 20
    assert newest_first(one).isdigit()


def test_the_ends_of_time_sort_too() -> None:
    times = [-(1 << 63), -(1 << 63) + 1, -1, 0, 1, (1 << 53) + 1, (1 << 63) - 1]
    keys = [newest_first(time) for time in times]
    assert keys == sorted(keys, reverse=True)
    assert {len(key) for key in keys} == {20}


names = st.text(st.sampled_from([chr(code) for code in range(0x21, 0x7F) if chr(code) not in "{}"]))


@given(names, names)
def test_a_range_holds_what_begins_with_its_prefix_and_nothing_else(prefix: str, key: str) -> None:
    prefix += "/"
    for name in (key, prefix + key, prefix[:-1] + key):
        assert (prefix <= name < prefix_end(prefix)) == name.startswith(prefix)


@given(names, names)
def test_nothing_lies_between_a_key_and_what_comes_after_it(key: str, other: str) -> None:
    assert key < after(key)
    for name in (other, key + other):
        assert not key < name < after(key)
