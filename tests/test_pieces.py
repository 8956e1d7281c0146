"""Cutting states and putting them together again."""

from __future__ import annotations

import copy
import math
from datetime import UTC, date, datetime
from decimal import Decimal
from typing import Any
from uuid import UUID

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from persistence import InvalidValueError, codec, pieces
from persistence.pieces import Cut, assemble, count, cut, runs, spans_of, subtract, union


def stored(cut: Cut) -> Any:
    """Put a cut state together from what would be stored of it."""
    numbers = range(1, len(cut.texts) + 1)
    values = {}
    for number, text in zip(numbers, cut.texts, strict=True):
        body = msgspec.json.decode(text)
        values[number] = codec.decode(msgspec.json.encode(body["v"]), body.get("t", False))
    return assemble(msgspec.json.decode(cut.skeleton(numbers)), values)


def same(a: Any, b: Any) -> bool:
    """Tell whether two values are equal, type by type, with their keys in the same order."""
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return len(a) == len(b) and all(map(same, a.items(), b.items()))
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, float):
        return repr(a) == repr(b)
    return bool(a == b)


def thread(messages: int) -> dict[str, Any]:
    return {
        "version": 2,
        "messages": [{"role": "user", "content": f"{i} " * 300} for i in range(messages)],
        "step": messages,
    }


_leaves = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
    | st.binary(max_size=20)
    | st.decimals(allow_nan=False)
    | st.dates()
    | st.uuids()
    | st.datetimes()
    | st.builds(str.__mul__, st.text('ab\u00e9😀\0"', min_size=1, max_size=9), st.integers(0, 2000))
    | st.builds(bytes.__mul__, st.binary(min_size=1, max_size=9), st.integers(0, 2000))
)
_keys = st.text(st.characters(exclude_categories=["Cs"]), max_size=5)
_hashable = _keys | st.integers() | st.tuples(st.integers(), _keys)
_repeated = st.integers(0, 25)
states = st.recursive(
    _leaves,
    lambda inner: (
        st.lists(inner, max_size=12)
        | st.dictionaries(st.text("ab$\u00e9", max_size=4), inner, max_size=8)
        | st.dictionaries(_hashable, inner, max_size=4)
        | st.tuples(inner, inner)
        | st.sets(_hashable, max_size=4)
        | st.builds(lambda value, times: [copy.deepcopy(value) for _ in range(times)], inner, _repeated)
    ),
    max_leaves=25,
)


@settings(max_examples=300, deadline=None)
@given(states)
def test_any_state_comes_back_exactly(state: Any) -> None:
    text, tagged = codec.encode(state)
    found = cut(state)
    assert same(stored(found), state)
    assert tagged or found.size == len(text)


@pytest.mark.parametrize(
    "state",
    [
        None,
        0,
        "",
        [],
        {},
        {"$bytes": "aGk="},
        [{"$bytes": "aGk="}] * 200,
        {"": {"": {"": ["x"] * 300}}},
        {"when": datetime(2026, 1, 2, 3, tzinfo=UTC), "rows": [(i, date(2026, 1, 1)) for i in range(300)]},
        {i: [Decimal(i)] * 40 for i in range(60)},
        {"k" * 20_000: "v" * 20_000},
        "é😀" * 50_000,
        b"\0\xff" * 50_000,
        Decimal("1" * 30_000),
        [math.inf, -math.inf, -0.0, 2**70] * 200,
        {(1, "a"): {"b": {UUID(int=i) for i in range(200)}}},
        {"messages": [{"content": [{"type": "image", "data": b"x" * 30_000}]} for _ in range(5)]},
    ],
    ids=repr,
)
def test_awkward_states_come_back_exactly(state: Any) -> None:
    assert same(stored(cut(state)), state)


def test_equal_parts_are_one_piece_but_not_one_object() -> None:
    message = {"role": "user", "content": "x" * 500}
    found = cut([dict(message), dict(message)])
    assert len(set(found.digests)) == 1
    numbers = [1, 1]
    values = {1: msgspec.json.decode(found.texts[0])["v"]}
    state = assemble(msgspec.json.decode(found.skeleton(numbers)), values)
    state[0]["content"] = "changed"
    assert state[1] == message


def test_a_state_that_grows_keeps_its_pieces() -> None:
    before, after = cut(thread(99)), cut(thread(100))
    assert len(set(after.digests) - set(before.digests)) == 1
    assert after.digests[: len(before.digests)] == before.digests


def test_the_skeleton_does_not_grow_with_the_list() -> None:
    sizes = [
        len(found.skeleton(range(1, len(found.texts) + 1))) for found in map(cut, map(thread, (10, 1000)))
    ]
    assert sizes[1] - sizes[0] < 10


def test_a_growing_text_keeps_its_slices() -> None:
    before, after = cut({"log": "x" * 100_000}), cut({"log": "x" * 101_000})
    assert len(set(after.digests) - set(before.digests)) <= 1


def test_the_number_of_pieces_is_bounded_for_large_states() -> None:
    assert len(cut([["x" * 100] * 10] * 6000).texts) < 2000


def test_no_piece_is_larger_than_a_value_may_be() -> None:
    found = cut({"a": ["\0" * 120_000] * 60, "b": "\0" * 1_000_000})
    assert max(map(len, found.texts)) < 1 << 20
    assert same(stored(found), {"a": ["\0" * 120_000] * 60, "b": "\0" * 1_000_000})


@pytest.mark.parametrize("bad", [object(), {"a": [1, {"b": {1, 2}, "c": object()}]}, "\ud800", {"\ud800": 1}])
def test_what_cannot_be_stored_is_refused(bad: Any) -> None:
    with pytest.raises(InvalidValueError):
        cut(bad)
    with pytest.raises(InvalidValueError):
        cut({"long": ["x" * 1000] * 20, "bad": bad})


def test_the_place_of_what_cannot_be_stored_is_named() -> None:
    with pytest.raises(InvalidValueError, match=r"messages\[7\]\.x"):
        cut({"messages": [{"content": "y" * 400, "x": object() if i == 7 else 1} for i in range(20)]})


def test_a_state_that_holds_itself_is_refused() -> None:
    state: list[Any] = ["x" * 300]
    state.append(state)
    with pytest.raises(InvalidValueError, match="deep"):
        cut(state)


def test_a_deep_state_comes_back() -> None:
    state: Any = "bottom"
    for _ in range(490):
        state = [state]
    assert stored(cut(state)) == state


def test_a_state_above_the_limit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    small, large = pieces._GRAINS
    monkeypatch.setattr(
        pieces, "_GRAINS", (small._replace(state=1000), large._replace(state=5000, group=999))
    )
    cut(["x" * 500] * 9)
    with pytest.raises(InvalidValueError, match="limit"):
        cut(["x" * 500] * 10)


def test_subclasses_come_back_as_their_base() -> None:
    class Text(str):
        __slots__ = ()

    class Members(dict[str, Any]):
        pass

    state = Members({Text("key"): Text("v" * 20_000), "list": [Members(a=1)] * 200})
    found = stored(cut(state))
    assert found == {"key": "v" * 20_000, "list": [{"a": 1}] * 200}
    assert type(found) is dict
    assert all(type(key) is str for key in found)
    assert type(found["key"]) is str


# ---- runs of numbers

_numbers = st.sets(st.integers(0, 60))


@given(_numbers, _numbers)
def test_runs_behave_like_sets(a: set[int], b: set[int]) -> None:
    def numbers(spans: list[tuple[int, int]]) -> set[int]:
        return {n for first, last in spans for n in range(first, last + 1)}

    assert numbers(runs(a)) == a
    assert count(runs(a)) == len(a)
    assert numbers(union([*runs(a), *runs(b)])) == a | b
    assert numbers(subtract(runs(a), runs(b))) == a - b
    assert all(x[1] + 1 < y[0] for x, y in zip(runs(a), runs(a)[1:], strict=False))


def test_all_numbers_of_a_skeleton_are_found() -> None:
    skeleton = ["d", {"k": "a", "n": ["l", [3, 9], {"i": [1]}, 12]}, 1, {"k": "b", "n": ["x", 10, 11]}]
    assert spans_of(skeleton) == [(1, 1), (3, 12)]
    assert spans_of(["v", [1, 2]]) == []


def test_what_is_remembered_of_an_item_does_not_cost_it_its_types() -> None:
    state = {"items": [{"n": n, "t": (n, b"bytes"), "text": "x" * 100} for n in range(400)]}
    first = cut(state)
    again = cut(state, first.memo)
    assert again.texts == first.texts


@pytest.mark.parametrize("part", [[5, 1], [None, 3], [1.5, 2.5], [1, 10**12], [1]])
def test_a_run_that_no_state_has_is_refused(part: list[Any]) -> None:
    with pytest.raises((ValueError, TypeError)):
        spans_of(["l", part])


def test_what_looks_tagged_stays_itself_in_a_piece() -> None:
    plain = {"messages": [{"$bytes": "aGk="}] * 3000}
    assert len(cut(plain).texts) > 0
    assert stored(cut(plain)) == plain
    mixed = {"plain": plain, "tagged": [b"hi"] * 3000}
    assert stored(cut(mixed)) == mixed
