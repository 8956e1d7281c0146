"""What goes in comes out, type by type, or is refused with the name of its place."""

from __future__ import annotations

import enum
import math
import uuid
from collections import OrderedDict, UserList, defaultdict, deque, namedtuple
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta, timezone, tzinfo
from decimal import Decimal
from typing import Any
from zoneinfo import ZoneInfo

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from persistence import codec
from persistence.errors import InvalidValueError


def back(value: Any) -> Any:
    return codec.decode(*codec.encode(value))


def same(one: Any, two: Any) -> bool:
    """Compare exactly: types, order of keys, signs of zeros, NaN, fold and time zone."""
    if type(one) is not type(two):
        return False
    if isinstance(one, dict):
        return len(one) == len(two) and all(
            same(a, c) and same(b, d) for (a, b), (c, d) in zip(one.items(), two.items(), strict=True)
        )
    if isinstance(one, list | tuple):
        return len(one) == len(two) and all(map(same, one, two))
    if isinstance(one, set):
        return len(one) == len(two) and all(any(same(a, b) for b in two) for a in one)
    if isinstance(one, float):
        if math.isnan(one):
            return math.isnan(two)
        return one == two and math.copysign(1, one) == math.copysign(1, two)
    if isinstance(one, Decimal):
        return bool(one.as_tuple() == two.as_tuple())
    if isinstance(one, datetime):
        return (one.isoformat(), one.fold) == (two.isoformat(), two.fold) and one.tzinfo == two.tzinfo
    return bool(one == two)


# ---- round trips

texts = st.text(st.characters(exclude_categories=["Cs"]))
zones = st.sampled_from(
    [
        None,
        UTC,
        timezone(timedelta(hours=5, minutes=30)),
        timezone(-timedelta(hours=3, seconds=7, microseconds=1)),
        *map(ZoneInfo, ["Europe/Berlin", "America/New_York", "Asia/Kathmandu", "UTC"]),
    ]
)


@st.composite
def datetimes(draw: st.DrawFn) -> datetime:
    moment = draw(st.datetimes()).replace(tzinfo=draw(zones), fold=draw(st.sampled_from([0, 1])))
    assert isinstance(moment, datetime)
    return moment


numbers = st.one_of(
    st.booleans(),
    st.integers(),
    st.integers(-(1 << 64) - 2, (1 << 64) + 2),
    st.floats(),
    st.decimals(),
    st.sampled_from(
        [0, 0.0, -0.0, 1, 1.0, True, False, Decimal("sNaN"), Decimal("-0.00"), Decimal("-sNaN7")]
    ),
)
hashable = st.recursive(
    st.one_of(
        st.none(),
        numbers.filter(lambda n: not (isinstance(n, Decimal) and n.is_snan())),
        texts,
        st.binary(),
        st.uuids(),
        st.dates(),
        datetimes(),
    ),
    lambda inner: st.lists(inner, max_size=3).map(tuple),
    max_leaves=4,
)
tag_names = st.sampled_from(
    [
        *("$bytes", "$tuple", "$set", "$datetime", "$date", "$uuid", "$decimal", "$float", "$int", "$map"),
        *("$", "$ref", "__proto__", "constructor", "", "f", "t", "v"),
    ]
)
leaves = st.one_of(st.none(), numbers, texts, st.binary(), st.uuids(), st.dates(), datetimes())
values = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=5),
        st.lists(inner, max_size=5).map(tuple),
        st.sets(hashable, max_size=4),
        st.dictionaries(texts | tag_names, inner, max_size=5),
        st.dictionaries(tag_names, inner, min_size=1, max_size=1),
        st.dictionaries(hashable, inner, max_size=4),
    ),
    max_leaves=25,
)


@given(values)
@example({"b": 1, "a": 2, "$bytes": "aGk="})
@example([{"$bytes": "aGk="}, b"hi"])
@example([{"$bytes": "aGk="}])
@example([{"$map": [[1, 2]]}, {1: 2}])
@example({"$int": {"$int": "0x1f"}, 1: 1 << 80})
def test_any_value_of_the_closed_set_comes_back_exactly(value: Any) -> None:
    assert same(back(value), value)


@given(values)
def test_what_holds_no_tags_is_the_json_one_would_write(value: Any) -> None:
    text, tagged = codec.encode(value)
    if not tagged:
        assert msgspec.json.encode(value) == text
        assert same(msgspec.json.decode(text), value)


@pytest.mark.parametrize(
    "value",
    [None, False, 0, 0.0, "", b"", [], {}, (), set(), {"": ""}, {0: None}, {None: 0}, {False: ()}],
    ids=repr,
)
def test_empty_values_are_not_mixed_up(value: Any) -> None:
    assert same(back(value), value)
    assert same(back([value, b""]), [value, b""])


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("bits", [53, 63, 64, 65, 128, 20_000, 100_000])
def test_integers_of_any_length_stay_integers(bits: int, sign: int) -> None:
    for number in (sign << bits, (sign << bits) - 1, (sign << bits) + 1):
        assert same(back(number), number)
        assert same(back({"n": [number]}), {"n": [number]})
        assert same(back({number: b""}), {number: b""})


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_numbers_that_json_lacks_come_back(number: float) -> None:
    assert same(back(number), number)
    assert same(back({"n": [number, b""]}), {"n": [number, b""]})


def test_what_is_wide_is_not_taken_for_deep() -> None:
    wide: list[Any] = [[{}] for _ in range(1000)]
    assert back(wide) == wide


def test_the_order_of_keys_stays() -> None:
    for value in ({"z": 1, "a": 2, "m": 3}, {"z": b"", "a": 2, "m": 3}, {9: 1, "a": 2, 1: 3}):
        assert list(back(value)) == list(value)


def test_an_hour_that_comes_twice_stays_the_same_hour() -> None:
    berlin = ZoneInfo("Europe/Berlin")
    for fold in (0, 1):
        moment = datetime(2024, 10, 27, 2, 30, tzinfo=berlin, fold=fold)
        assert back(moment).utcoffset() == moment.utcoffset()
        assert back(moment).tzinfo is berlin


def test_a_user_s_own_tag_stays_itself_without_and_with_tags_elsewhere() -> None:
    own = {"$bytes": "aGk="}
    text, tagged = codec.encode(own)
    assert (text, tagged) == (b'{"$bytes":"aGk="}', False)
    assert back(own) == own
    assert back([own, {"$nothing": own}, b"hi"]) == [own, {"$nothing": own}, b"hi"]
    assert codec.decode(b'{"$bytes":"aGk="}', True) == b"hi"
    assert codec.decode(b'{"$bytes":"aGk="}', False) == own


# ---- subclasses


class Color(str, enum.Enum):  # noqa: UP042 - a StrEnum shows itself as its value
    """Says "Color.RED" when it is shown, and equals "red"."""

    RED = "red"


class Level(enum.IntEnum):
    HIGH = 3


class Loud(str):
    def __str__(self) -> str:
        return self.upper()


class Odd(int):
    def __int__(self) -> int:
        return 7


class Scalar(float):
    """Like numpy.float64."""

    def __float__(self) -> float:
        return 7.0


class Moment(datetime):
    def isoformat(self, *args: Any, **kwargs: Any) -> str:
        return "once upon a time"


Point = namedtuple("Point", "x y")
SUBCLASSES = [
    (Color.RED, "red"),
    (Level.HIGH, 3),
    (Loud("quiet"), "quiet"),
    (Odd(1), 1),
    (Scalar(1.5), 1.5),
    (Moment(2024, 1, 2), datetime(2024, 1, 2)),
    (Point(1, 2), (1, 2)),
    (OrderedDict(b=1, a=2), {"b": 1, "a": 2}),
    (defaultdict(int, {"a": 1}), {"a": 1}),
]


@pytest.mark.parametrize(("value", "base"), SUBCLASSES, ids=lambda value: type(value).__name__)
def test_a_subclass_comes_back_as_its_base_type(value: Any, base: Any) -> None:
    assert same(back(value), base)
    assert same(back([value, b""]), [base, b""])
    assert same(back({"k": value}), {"k": base})


@pytest.mark.parametrize("key", [Color.RED, Loud("quiet"), Level.HIGH], ids=repr)
def test_a_key_of_a_subclass_comes_back_as_its_base_type(key: Any) -> None:
    base = key.value if isinstance(key, enum.Enum) else str.__str__(key)
    assert same(back({key: 1}), {base: 1})
    assert same(back({key: b""}), {base: b""})


# ---- what is refused


@dataclass
class Data:
    a: int = 1


class Struct(msgspec.Struct):
    a: int = 1


class Plain(enum.Enum):
    A = "a"


class NumpyLike:
    dtype = "int64"

    def item(self) -> int:
        return 1

    def __eq__(self, other: object) -> bool:
        return True

    __hash__ = object.__hash__


class ArrayLike(list[int]):
    """Compares element by element, as arrays do."""

    def __eq__(self, other: object) -> Any:
        message = "the truth value of an array is ambiguous"
        raise ValueError(message)

    __hash__ = None


REFUSED = [
    Data(),
    Struct(),
    Plain.A,
    NumpyLike(),
    frozenset({1}),
    bytearray(b""),
    bytearray(b"x"),
    memoryview(b""),
    time(1),
    timedelta(1),
    1j,
    range(3),
    deque([1]),
    UserList([1]),
    object(),
    int,
    len,
    msgspec.Raw(b"1"),
    "\ud800",
    "ok\udfff",
]


@pytest.mark.parametrize("value", REFUSED, ids=lambda value: type(value).__name__)
def test_anything_else_is_refused_with_its_place(value: Any) -> None:
    with pytest.raises(InvalidValueError):
        codec.encode(value)
    with pytest.raises(InvalidValueError, match=r"at \.outer\[1\]"):
        codec.encode({"outer": [0, value]})
    with pytest.raises(InvalidValueError, match=r"at \.outer\[1\]\.inner"):
        codec.encode({"bytes": b"", "outer": [0, {"inner": value}]})


@pytest.mark.parametrize("key", ["\ud800", frozenset(), Plain.A, 1j], ids=repr)
def test_a_key_that_cannot_be_stored_is_refused(key: Any) -> None:
    for value in ({key: 1}, {"outer": {key: b""}}, {"outer": {key: 1, 2: 3}}):
        with pytest.raises(InvalidValueError):
            codec.encode(value)


def test_a_list_that_compares_oddly_is_stored_as_the_list_it_is() -> None:
    assert same(back(ArrayLike([1, 2])), [1, 2])


def test_a_value_that_holds_itself_is_refused() -> None:
    ring: list[Any] = []
    ring.append(ring)
    knot: dict[str, Any] = {"bytes": b""}
    knot["self"] = knot
    for value in (ring, knot, {"a": ring}, ({1: ring},)):
        with pytest.raises(InvalidValueError, match="too deeply, or holds itself"):
            codec.encode(value)


WRAPS = {
    "list": (500, lambda inner: [inner]),
    "dict": (500, lambda inner: {"a": inner}),
    "lookalike": (500, lambda inner: {"$map": inner}),
    "tuple": (200, lambda inner: (inner,)),
    "map": (200, lambda inner: {1: inner}),
    "bytes": (200, lambda inner: [b"", inner]),
}


@pytest.mark.parametrize(("limit", "wrap"), WRAPS.values(), ids=WRAPS)
def test_values_are_as_deep_as_any_python_can_read_from_a_deeper_stack(limit: int, wrap: Any) -> None:
    def read(text: bytes, tagged: bool, frames: int) -> Any:
        return read(text, tagged, frames - 1) if frames else codec.decode(text, tagged)

    value: Any = None
    for depth in range(limit):
        value = wrap(value)
        text, tagged = codec.encode(value)
        if depth % 20 == 0 or depth > limit - 5:
            read(text, tagged, 40)
    for _ in range(2_000):  # more than some can walk
        value = wrap(value)
        with pytest.raises(InvalidValueError, match="too deeply"):
            codec.encode(value)


# ---- what cannot be read


@pytest.mark.parametrize(
    "text",
    [
        *(b"", b"{", b"nul", b"[1,]", b"\xff", b'"\xff"', b"NaN", b"{1:2}", b"1 2", b"[" * 100_000),
    ],
)
@pytest.mark.parametrize("tagged", [False, True])
def test_what_is_no_json_is_an_error(text: bytes, tagged: bool) -> None:
    with pytest.raises(ValueError, match=r".+"):
        codec.decode(text, tagged)


WRONG: list[Any] = [None, True, 5, -1, 1.5, "", "x", "é", [], [1], [[]], {}, {"a": 1}, "0" * 5000, 10**400]
FINE: dict[str, list[Any]] = {  # content of these is odd, but says what it means
    "$bytes": ["", "0" * 5000],
    "$tuple": [[], [1], [[]]],
    "$set": [[], [1]],
    "$map": [[]],
    "$decimal": [True, 5, -1, 1.5, "0" * 5000, 10**400],
    "$float": [True, 5, -1, 1.5, "0" * 5000],
    "$int": ["0" * 5000],
}
TAGS = ["$bytes", "$tuple", "$set", "$map", "$datetime", "$date", "$uuid", "$decimal", "$float", "$int", "$x"]


@pytest.mark.parametrize("tag", TAGS)
@pytest.mark.parametrize("content", WRONG, ids=lambda content: repr(content)[:12])
def test_a_malformed_tag_is_an_error(tag: str, content: Any) -> None:
    text = msgspec.json.encode(content) if content != 10**400 else b"1" + b"0" * 400
    text = b'{"%b":%b}' % (tag.encode(), text)
    if content in FINE.get(tag, []):
        codec.decode(text, True)
        return
    with pytest.raises(ValueError, match=r".+"):
        codec.decode(text, True)


@given(st.binary(max_size=60))
def test_noise_is_an_error_or_a_value_never_something_else(noise: bytes) -> None:
    for text in (noise, b'{"$map":[[%b,1]]}' % noise, b'{"$datetime":[%b,0,null]}' % noise):
        try:
            codec.decode(text, True)
        except ValueError:
            continue


def test_a_time_zone_that_this_machine_lacks_leaves_the_instant() -> None:
    text = b'{"$datetime":["2024-07-01T12:00:00+02:00",0,"Mars/Olympus_Mons"]}'
    moment = codec.decode(text, True)
    assert moment == datetime(2024, 7, 1, 10, tzinfo=UTC)


def test_an_unknown_kind_of_time_zone_comes_back_as_its_offset() -> None:
    class Fixed(tzinfo):
        def utcoffset(self, moment: datetime | None) -> timedelta:
            return timedelta(hours=2)

        def dst(self, moment: datetime | None) -> timedelta:
            return timedelta(0)

        def tzname(self, moment: datetime | None) -> str:
            return "here"

    moment = datetime(2024, 1, 1, tzinfo=Fixed())
    assert back(moment) == moment
    assert back(moment).tzinfo == timezone(timedelta(hours=2))


def test_ids_dates_and_ints_are_not_taken_for_each_other() -> None:
    value = [uuid.UUID(int=0), str(uuid.UUID(int=0)), date(2024, 1, 1), "2024-01-01", datetime(2024, 1, 1)]
    assert same(back(value), value)
