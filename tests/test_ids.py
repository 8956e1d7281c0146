"""Ids rise, whatever the clock does."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Iterator
from itertools import cycle

import pytest

from persistence.ids import IdFactory, new_id, now_ms, random_version


def milliseconds(id: str) -> int:
    return uuid.UUID(id).int >> 80


def test_ids_are_uuids_of_version_7() -> None:
    for id in (new_id() for _ in range(1_000)):
        parsed = uuid.UUID(id)
        assert str(parsed) == id
        assert parsed.version == 7
        assert parsed.variant == uuid.RFC_4122
        assert abs(milliseconds(id) - now_ms()) < 1_000


def test_ids_rise_while_the_clock_stands() -> None:
    ids = IdFactory(lambda: 1_700_000_000_000)
    made = [ids() for _ in range(20_000)]  # more than the counter's 4,096
    assert made == sorted(set(made))
    assert milliseconds(made[0]) == 1_700_000_000_000
    assert milliseconds(made[-1]) <= 1_700_000_000_006


def test_ids_rise_while_the_clock_steps_back() -> None:
    times: Iterator[int] = cycle([5_000, 4_000, 5_001, 0, 4_999])
    ids = IdFactory(lambda: next(times))
    made = [ids() for _ in range(5_000)]
    assert made == sorted(set(made))


def test_ids_follow_the_clock_again_once_it_has_caught_up() -> None:
    times = iter([5_000, 1, 6_000])
    ids = IdFactory(lambda: next(times))
    assert [milliseconds(ids()) for _ in range(3)] == [5_000, 5_000, 6_000]


def test_ids_rise_in_each_thread_and_never_repeat() -> None:
    ids = IdFactory(lambda: 1_000)
    made: list[list[str]] = [[] for _ in range(8)]

    def work(mine: list[str]) -> None:
        mine.extend(ids() for _ in range(2_000))

    threads = [threading.Thread(target=work, args=(mine,)) for mine in made]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(mine == sorted(mine) for mine in made)
    assert len({id for mine in made for id in mine}) == 16_000


@pytest.mark.parametrize("now", [1_700_000_000_000.7, 0.0, -1, -(1 << 63), (1 << 48) - 1, 1 << 60, 1e30])
def test_odd_clocks_break_nothing(now: float) -> None:
    ids = IdFactory(lambda: now)  # type: ignore[arg-type, return-value]
    made = [ids() for _ in range(6_000)]
    assert made == sorted(set(made))
    assert {uuid.UUID(id).version for id in made} == {7}


def test_versions_fit_in_62_bits_and_are_never_absent() -> None:
    versions = {random_version() for _ in range(10_000)}
    assert len(versions) == 10_000
    assert all(0 < version < 1 << 62 for version in versions)
    assert max(versions) > 1 << 60
