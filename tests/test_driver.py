"""Every driver keeps the contract, and the suite that says so finds every kind of mistake."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias
from uuid import uuid4

import broken_driver
import pytest
from engines import ENGINES, Place
from servers import Server

import persistence.drivers
from persistence.driver import ABSENT
from persistence.drivers.memory import MemoryDriver
from persistence.testing import (
    Action,
    BrokenDriver,
    DriverConformance,
    MakeDriver,
    SharedDriverConformance,
    check_history,
)

SHARED = [name for name, engine in ENGINES.items() if engine.shared]
UNSHARED = [name for name, engine in ENGINES.items() if not engine.shared]


@pytest.fixture
def place(tmp_path: Path, server: Callable[[str], Server]) -> Place:
    return Place(tmp_path, f"test-{uuid4().hex}", server)


class TestDriver(DriverConformance):
    @pytest.fixture(params=UNSHARED)
    def make_driver(self, request: pytest.FixtureRequest, place: Place) -> MakeDriver:
        return ENGINES[request.param].make(place)


class TestSharedDriver(SharedDriverConformance):
    @pytest.fixture(params=SHARED)
    def make_driver(self, request: pytest.FixtureRequest, place: Place) -> MakeDriver:
        return ENGINES[request.param].make(place)


def test_every_driver_file_is_held_to_the_contract() -> None:
    (folder,) = persistence.drivers.__path__
    files = {file.stem for file in Path(folder).glob("[!_]*.py")}
    assert files == {engine.module for engine in ENGINES.values()}


# The suite itself.


@pytest.mark.parametrize("seed", range(10))
def test_read_then_write_never_passes(seed: int) -> None:
    class Suite(DriverConformance):
        seconds = 10.0

    suite = Suite()
    suite.seed = seed
    driver = BrokenDriver()
    with pytest.raises(AssertionError, match=r"two Writes replaced one version|created more often"):
        suite.test_racing_writes_fit_one_order(lambda: driver)


def test_a_run_of_pytest_on_the_broken_driver_fails_without_plugins(tmp_path: Path) -> None:
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    (tmp_path / "test_mine.py").write_text(
        "import pytest\n"
        "from persistence.testing import BrokenDriver, DriverConformance\n"
        "class TestMine(DriverConformance):\n"
        "    @pytest.fixture\n"
        "    def make_driver(self):\n"
        "        driver = BrokenDriver()\n"
        "        return lambda: driver\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:asyncio", "--tb=no"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert run.returncode == pytest.ExitCode.TESTS_FAILED, run.stdout + run.stderr
    assert "test_racing_writes_fit_one_order" in run.stdout


def test_the_suite_leaves_the_current_event_loop_to_others() -> None:
    class Suite(DriverConformance):
        examples = 1

    driver = MemoryDriver()
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    try:
        Suite().test_get_answers_in_the_order_asked(lambda: driver)
        Suite().test_random_calls_answer_as_the_memory_driver_does(lambda: driver)
        assert asyncio.get_event_loop() is loop
    finally:
        asyncio.set_event_loop(None)
        loop.close()


suite = DriverConformance
FOUND_BY: dict[type[MemoryDriver], Callable[[DriverConformance, MakeDriver], None]] = {
    broken_driver.HalfWriteDriver: suite.test_a_write_is_applied_whole_or_refused_whole,
    broken_driver.AllOrNoneDriver: suite.test_many_writes_and_many_ops_in_one_commit,
    broken_driver.NoCheckDriver: suite.test_random_calls_answer_as_the_memory_driver_does,
    broken_driver.SkewedDriver: suite.test_racing_writes_fit_one_order,
    broken_driver.DoubleVersionDriver: suite.test_versions_are_compared_in_all_62_bits,
    broken_driver.LostTailDriver: suite.test_racing_appends_get_each_number_once,
    broken_driver.LateCheckDriver: suite.test_racing_writes_fit_one_order,
    broken_driver.ChecksAloneDriver: suite.test_versions_are_compared_in_all_62_bits,
    broken_driver.DeletesApartDriver: suite.test_a_write_is_applied_whole_or_refused_whole,
    broken_driver.SmallPacketDriver: suite.test_many_writes_and_many_ops_in_one_commit,
    broken_driver.KeptAbsenceDriver: suite.test_driver_objects_see_each_others_writes_at_once,
    broken_driver.KeptPageDriver: suite.test_driver_objects_see_each_others_writes_at_once,
    broken_driver.KeptNamesDriver: suite.test_driver_objects_see_each_others_writes_at_once,
    broken_driver.SkippedNameDriver: suite.test_names_are_taken_as_they_are,
    broken_driver.TimidDriver: suite.test_racing_writes_fit_one_order,
    broken_driver.TornReadDriver: suite.test_a_write_is_seen_whole_or_not_at_all,
    broken_driver.StaleReadDriver: suite.test_driver_objects_see_each_others_writes_at_once,
    broken_driver.InexactMoreDriver: suite.test_scan_returns_exactly_the_range,
    broken_driver.CaseBlindDriver: suite.test_names_are_taken_as_they_are,
    broken_driver.InclusiveEndDriver: suite.test_purge_removes_the_range_and_nothing_else,
    broken_driver.ForgetfulListDriver: suite.test_partitions_lists_those_that_hold_entries,
}


@pytest.mark.parametrize("broken", FOUND_BY, ids=lambda broken: broken.__name__)
def test_a_mistake_is_found(broken: type[MemoryDriver]) -> None:
    driver = broken()
    make_driver = driver.another if isinstance(driver, broken_driver.KeepingDriver) else lambda: driver
    with pytest.raises(AssertionError):
        FOUND_BY[broken](DriverConformance(), make_driver)


# Histories. Each action is (reads, writes, version, outcome, begin, end).

Row: TypeAlias = tuple[dict[str, int], dict[str, int], int, bool | None, int, int]
HISTORIES: dict[str, tuple[str | None, list[Row], dict[str, int]]] = {
    "nothing wrong": (
        None,
        [
            ({"a": 0}, {"a": 1}, 1, True, 1, 2),
            ({"a": 1}, {}, 0, True, 3, 4),
            ({"a": 1}, {"a": 2}, 2, True, 3, 5),
        ],
        {"a": 2},
    ),
    "one of two rivals is refused": (
        None,
        [({"a": 0}, {"a": 1}, 1, True, 1, 9), ({"a": 0}, {"a": 2}, 2, False, 2, 8)],
        {"a": 1},
    ),
    "lost update": (
        "replaced one version",
        [
            ({"a": 0}, {"a": 1}, 1, True, 1, 2),
            ({"a": 1}, {"a": 2}, 2, True, 3, 6),
            ({"a": 1}, {"a": 3}, 3, True, 4, 7),
        ],
        {"a": 3},
    ),
    "two creators": (
        "more often than it was absent",
        [({"a": 0}, {"a": 1}, 1, True, 1, 9), ({"a": 0}, {"a": 2}, 2, True, 2, 8)],
        {"a": 2},
    ),
    "two creators and a delete": (
        None,
        [
            ({"a": 0}, {"a": 1}, 1, True, 1, 2),
            ({"a": 1}, {"a": 0}, 2, True, 3, 4),
            ({"a": 0}, {"a": 3}, 3, True, 5, 6),
        ],
        {"a": 3},
    ),
    "write skew": (
        "no order",
        [
            ({"a": 0, "b": 0}, {"a": 1, "b": 1}, 1, True, 1, 2),
            ({"a": 1, "b": 1}, {"a": 2}, 2, True, 3, 6),
            ({"a": 1, "b": 1}, {"b": 3}, 3, True, 4, 7),
        ],
        {"a": 2, "b": 3},
    ),
    "half a Write seen": (
        "no order",
        [
            ({"a": 0, "b": 0}, {"a": 1, "b": 1}, 1, True, 1, 2),
            ({"a": 1, "b": 1}, {"a": 2, "b": 2}, 2, True, 3, 6),
            ({"a": 2, "b": 1}, {}, 0, True, 4, 5),
        ],
        {"a": 2, "b": 2},
    ),
    "an acknowledged Write not seen": (
        "no order",
        [({"a": 0}, {"a": 1}, 1, True, 1, 2), ({"a": 0}, {}, 0, True, 3, 4)],
        {"a": 1},
    ),
    "a Write seen, then not seen, before it is acknowledged": (
        None,
        [
            ({"a": 0}, {"a": 1}, 1, True, 1, 9),
            ({"a": 1}, {}, 0, True, 2, 3),
            ({"a": 0}, {}, 0, True, 4, 5),
        ],
        {"a": 1},
    ),
    "the last Write lost": ("no order|is lost", [({"a": 0}, {"a": 1}, 1, True, 1, 2)], {"a": 0}),
    "a lost key that is deleted elsewhere": (
        "is lost",
        [
            ({"a": 0}, {"a": 1}, 1, True, 1, 2),
            ({"a": 1}, {"a": 0}, 2, True, 3, 4),
            ({"a": 0}, {"a": 3}, 3, True, 5, 6),
        ],
        {"a": 0},
    ),
    "a refused Write seen": (
        "no applied Write",
        [({"a": 0}, {"a": 1}, 1, False, 1, 2), ({"a": 1}, {}, 0, True, 3, 4)],
        {"a": 0},
    ),
    "refused for nothing": (
        "refused though",
        [({"a": 0}, {"a": 1}, 1, True, 1, 2), ({"a": 1}, {"a": 2}, 2, False, 3, 4)],
        {"a": 1},
    ),
    "an unknown Write that is there": (
        None,
        [
            ({"a": 0}, {"a": 1}, 1, None, 1, 2),
            ({"a": 0}, {}, 0, True, 3, 4),
            ({"a": 1}, {"a": 2}, 2, True, 5, 6),
        ],
        {"a": 2},
    ),
    "an unknown Write that is not there": (
        None,
        [({"a": 0}, {"a": 1}, 1, True, 1, 2), ({"a": 1}, {"a": 2}, 2, None, 3, 4)],
        {"a": 1},
    ),
    "an unknown Write that is there and replaces what another did": (
        "replaced one version",
        [
            ({"a": 0}, {"a": 1}, 1, True, 1, 2),
            ({"a": 1}, {"a": 2}, 2, None, 3, 4),
            ({"a": 1}, {"a": 3}, 3, True, 3, 5),
            ({"a": 2}, {}, 0, True, 6, 7),
        ],
        {"a": 3},
    ),
}


@pytest.mark.parametrize("name", HISTORIES)
def test_a_history_is_judged(name: str) -> None:
    complaint, rows, left = HISTORIES[name]
    history = [Action("p", *row) for row in rows]
    final = [Action("p", left, {}, ABSENT, True, 100, 101)]
    if complaint is None:
        check_history(history, final)
    else:
        with pytest.raises(AssertionError, match=complaint):
            check_history(history, final)
