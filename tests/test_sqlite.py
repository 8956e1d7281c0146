"""What is SQLite's own: the file, its locks, its faults. What all drivers promise is in test_driver.py."""

# ruff: noqa: ASYNC240 - a test may touch its own files while nothing else runs

from __future__ import annotations

import asyncio
import multiprocessing
import os
import random
import signal
import sqlite3
import stat
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, closing, contextmanager
from itertools import count
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Barrier
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from persistence import create_persistence
from persistence.driver import ABSENT, Delete, Entry, Key, Put, Write
from persistence.drivers import sqlite as module
from persistence.drivers.sqlite import SQLiteDriver, from_url, sqlite_driver
from persistence.errors import ConfigurationError, CorruptRecordError, PersistenceError, UnavailableError

# A forked child would inherit the locks and threads of this process; a spawned one starts slowly.
processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["persistence.drivers.sqlite"])


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "data.db"


@asynccontextmanager
async def opened(path: Path, **options: Any) -> AsyncIterator[SQLiteDriver]:
    driver = sqlite_driver(path, **options)
    await driver.open()
    try:
        yield driver
    finally:
        await driver.close()


@contextmanager
def plain(path: Path) -> Iterator[sqlite3.Connection]:
    with closing(sqlite3.connect(path, isolation_level=None, timeout=0)) as db:
        yield db


def write(version: int, partition: str = "p", **values: bytes) -> Write:
    return Write(partition, tuple(Put(key, value) for key, value in values.items()), version)


async def value_of(driver: SQLiteDriver, key: str, partition: str = "p") -> bytes | None:
    (entry,) = await driver.get([Key(partition, key)])
    return None if entry is None else entry.value


def run_together(target: Callable[..., None], argument_lists: list[tuple[Any, ...]]) -> None:
    """Run `target` in a process for each list of arguments, and require that all end well."""
    children = [processes.Process(target=target, args=arguments) for arguments in argument_lists]
    for child in children:
        child.start()
    for child in children:
        child.join(60)
        child.kill()
    assert [child.exitcode for child in children] == [0] * len(children)


# ── The file ──


async def test_the_file_and_those_beside_it_are_for_their_owner_alone(path: Path) -> None:
    mask = os.umask(0)
    try:
        async with opened(path) as driver:
            await driver.commit([write(1, k=b"v")])
            modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in path.parent.iterdir()}
    finally:
        os.umask(mask)
    assert modes == {"data.db": 0o600, "data.db-wal": 0o600, "data.db-shm": 0o600}
    assert [file.name for file in path.parent.iterdir()] == ["data.db"]


async def test_a_missing_folder_is_named_and_not_made(tmp_path: Path) -> None:
    driver = sqlite_driver(tmp_path / "missing" / "data.db")
    with pytest.raises(ConfigurationError, match=r"there is no folder .*missing"):
        await driver.open()
    assert list(tmp_path.iterdir()) == []


async def test_create_false_makes_neither_file_nor_table(path: Path) -> None:
    with pytest.raises(ConfigurationError, match="there is no file"):
        await sqlite_driver(path, create=False).open()
    assert not path.exists()

    path.touch()
    with pytest.raises(ConfigurationError, match="no table 'persistence'"):
        await sqlite_driver(path, create=False).open()
    assert path.read_bytes() == b""

    async with opened(path), opened(path, create=False) as driver:
        assert await driver.commit([write(1, k=b"v")]) == [True]


async def test_a_folder_in_place_of_the_file_is_a_configuration_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="is a folder"):
        await sqlite_driver(tmp_path).open()


@pytest.mark.parametrize("name", ["a b?c#d%20e.db", "ü–π.db", "file:x.db", "-x"])
async def test_any_file_name_will_do(tmp_path: Path, name: str) -> None:
    async with opened(tmp_path / name) as driver:
        await driver.commit([write(1, k=b"v")])
    assert [file.name for file in tmp_path.iterdir()] == [name]


async def test_a_relative_path_counts_from_where_it_was_first_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    async with opened(Path("data.db")) as driver:
        await driver.commit([write(1, k=b"v")])
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    await driver.open()
    assert await value_of(driver, "k") == b"v"
    await driver.close()


async def test_other_tables_of_the_file_stay(path: Path) -> None:
    with plain(path) as db:
        db.execute("CREATE TABLE mine (x)")
        db.execute("INSERT INTO mine VALUES (7)")
    async with opened(path, table="one") as one, opened(path, table="Select") as two:
        await one.commit([write(1, k=b"one")])
        await two.commit([write(2, k=b"two")])
        assert (await value_of(one, "k"), await value_of(two, "k")) == (b"one", b"two")
    with plain(path) as db:
        assert db.execute("SELECT x FROM mine").fetchall() == [(7,)]


async def test_the_data_can_be_read_in_sql(path: Path) -> None:
    async with opened(path, namespace="shop") as driver:
        await driver.commit([write(5, "session/1", k=b'{"a":1}')])
    with plain(path) as db:
        rows = db.execute("SELECT p, k, CAST(v AS TEXT), ver FROM persistence WHERE p <> ''").fetchall()
    assert rows == [("shop/session/1", "k", '{"a":1}', 5)]


@pytest.mark.parametrize(("durability", "level"), [("power", 2), ("process", 1)])
async def test_durability_sets_when_sqlite_syncs(path: Path, durability: str, level: int) -> None:
    async with opened(path, durability=durability) as driver:
        pragma = await driver._writer.run(lambda db: db.execute("PRAGMA synchronous").fetchone())
    assert pragma == (level,)


# ── What cannot be used is refused and left as it is ──


@pytest.mark.parametrize("content", [b"xy", b"no database\n" * 10, b"\0" * 4096, bytes(range(256)) * 64])
async def test_a_file_that_is_no_database_is_left_alone(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    with pytest.raises(CorruptRecordError, match="not a database"):
        await sqlite_driver(path).open()
    assert path.read_bytes() == content


@pytest.mark.parametrize("size", [2, 99, 4096, 5000, 40_000])
async def test_a_truncated_file_is_left_alone(path: Path, size: int) -> None:
    async with opened(path) as driver:
        await driver.commit([write(1, k=b"v" * 100_000)])
    content = path.read_bytes()[:size]
    path.write_bytes(content)
    with pytest.raises((CorruptRecordError, ConfigurationError)):
        await sqlite_driver(path).open()
    assert path.read_bytes() == content


async def test_damage_found_later_is_a_corrupt_record(path: Path) -> None:
    async with opened(path) as driver:
        await driver.commit([write(1, small=b"v", large=b"v" * 100_000)])
    with path.open("r+b") as file:
        file.seek(-50_000, os.SEEK_END)  # among the pages of the large value
        file.write(b"\xff" * 50_000)
    async with opened(path) as driver:
        with pytest.raises(CorruptRecordError, match="malformed"):
            await driver.get([Key("p", "small"), Key("p", "large")])
        assert await value_of(driver, "small") == b"v"


async def test_the_statements_of_ddl_create_what_is_needed(path: Path) -> None:
    with closing(sqlite3.connect(path)) as db:
        db.executescript(sqlite_driver(path, table="agents").ddl())
    async with opened(path, create=False, table="agents") as driver:
        assert await driver.partitions(None, 1) == ([], None)


@pytest.mark.parametrize(
    "change", ["UPDATE persistence SET v = x'32' WHERE p = ''", "DELETE FROM persistence WHERE p = ''"]
)
async def test_another_format_is_refused(path: Path, change: str) -> None:
    async with opened(path):
        pass
    with plain(path) as db:
        db.execute(change)
    with pytest.raises(ConfigurationError, match="format"):
        await sqlite_driver(path).open()


async def test_a_table_of_somebody_else_is_refused(path: Path) -> None:
    with plain(path) as db:
        db.execute("CREATE TABLE persistence (x)")
    content = path.read_bytes()
    with pytest.raises(ConfigurationError, match="no such column"):
        await sqlite_driver(path).open()
    assert path.read_bytes() == content


# ── Options and URLs ──


@pytest.mark.parametrize(
    "options",
    [
        {"namespace": "a/b"},
        {"durability": "maybe"},
        {"table": 'x" (y); --'},
        {"table": ""},
        {"busy_timeout": -1},
        {"busy_timeout": float("nan")},
    ],
    ids=str,
)
def test_bad_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=next(iter(options))):
        sqlite_driver("data.db", **options)


@pytest.mark.parametrize("make", [lambda: sqlite_driver(":memory:"), lambda: sqlite_driver("")])
def test_a_database_in_memory_is_the_memory_drivers(make: Callable[[], SQLiteDriver]) -> None:
    with pytest.raises(ConfigurationError, match="memory_driver"):
        make()


@pytest.mark.parametrize(
    ("url", "path", "namespace"),
    [
        ("sqlite:///data.db", "data.db", "default"),
        ("sqlite:///sub/data.db?namespace=shop", "sub/data.db", "shop"),
        ("sqlite:////var/data.db?durability=process&create=no&busy_timeout=0.5", "/var/data.db", "default"),
        ("sqlite:////a%20b%3Fc%23d.db?table=t", "/a b?c#d.db", "default"),
    ],
)
def test_an_url_names_path_and_options(url: str, path: str, namespace: str) -> None:
    assert repr(from_url(url)) == f"sqlite_driver({path!r}, namespace={namespace!r})"


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("sqlite://data.db", "sqlite:///relative/path"),
        ("sqlite:///data#1.db", "%23"),
        ("sqlite://", "memory_driver"),
        ("sqlite:///:memory:", "memory_driver"),
        ("sqlite:///data.db?colour=red", "colour"),
        ("sqlite:///data.db?busy_timeout=long", "busy_timeout"),
    ],
)
def test_a_wrong_url_is_refused(url: str, reason: str) -> None:
    with pytest.raises(ConfigurationError, match=reason):
        from_url(url)


async def test_a_driver_that_is_not_open_says_so(path: Path) -> None:
    driver = sqlite_driver(path)
    for _ in range(2):
        with pytest.raises(ConfigurationError, match="not open"):
            await driver.commit([write(1, k=b"v")])
        await driver.open()
        await driver.close()


# ── Statements ──


async def test_no_statement_reads_more_than_it_returns(path: Path) -> None:
    async with opened(path):
        pass
    rows = {"delete": "(?, ?), (?, ?)", "versions": "(?, ?, ?), (?, ?, ?)"}
    statements = {
        name: text.format(t="persistence", rows=rows.get(name, "")) for name, text in module._SQL.items()
    }
    for name in ("table", "sign", "create", "put"):  # these search nothing
        del statements[name]
    with plain(path) as db:
        for name, statement in statements.items():
            parameters = [1] * statement.count("?")
            plan = [row[3] for row in db.execute(f"EXPLAIN QUERY PLAN {statement}", parameters)]
            seeks = [line for line in plan if line.startswith("SEARCH")]
            given = "LIST SUBQUERY", "CO-ROUTINE op", "SCAN 2 CONSTANT ROWS", "SCAN 2-ROW VALUES", "SCAN op"
            others = [line for line in plan if not line.startswith(("SEARCH", *given))]
            assert (name, bool(seeks), others) == (name, True, [])
            assert any("p=?" in line or "p>?" in line for line in seeks), (name, plan)


async def test_a_page_is_cut_by_size_without_reading_on(path: Path) -> None:
    async with opened(path) as driver:
        for n in range(1, 12):
            await driver.commit([Write("p", (Put(f"{n:02}", b"v" * (1 << 20)),), n)])
        page = await driver.scan("p", "", None, limit=1000)
        assert (len(page.entries), page.more) == (3, True)
        # An unfinished statement would keep its snapshot, and the WAL could never start again.
        busy, _, _ = await driver._writer.run(
            lambda db: db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        )
        assert busy == 0


async def test_more_ops_than_a_statement_takes_are_still_one_transaction(path: Path) -> None:
    keys = [f"{number:03}" for number in range(2 * module._ROWS + 50)]

    def creates(partition: str, version: int) -> Write:
        return Write(partition, tuple(Put(key, b"v", ABSENT) for key in keys), version)

    async def count(partition: str) -> int:
        return len((await driver.scan(partition, "", None, limit=1000)).entries)

    async with opened(path) as driver:
        assert await driver.commit([creates("p", 1), creates("q", 2)]) == [True, True]
        assert await driver.commit([write(3, "r", **{"449": b"there"})]) == [True]
        assert await driver.commit([creates("r", 4), creates("s", 5)]) == [False, True]
        assert [await count(name) for name in "pqrs"] == [450, 450, 1, 450]
        puts = tuple(Put(key, b"w", 1) for key in keys)
        deletes = tuple(Delete(key, 2) for key in keys)
        stale = (*deletes[:-1], Delete(keys[-1], 7))
        writes = [Write("p", puts, 6), Write("q", deletes, 7), Write("s", stale, 8)]
        assert await driver.commit(writes) == [True, True, False]
        assert [await count(name) for name in "pqrs"] == [450, 0, 1, 450]
        assert {entry.version for entry in (await driver.scan("p", "", None, limit=1000)).entries} == {6}


# ── Locks and faults ──


async def test_short_reads_stay_in_the_loops_thread_until_one_is_slow(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[int] = []
    took = 0.0

    def get(driver: SQLiteDriver, db: sqlite3.Connection, keys: Sequence[Key]) -> list[Entry | None]:
        threads.append(threading.get_ident())
        end = time.monotonic() + took
        while time.monotonic() < end:
            pass
        return [None for _ in keys]

    monkeypatch.setattr(SQLiteDriver, "_get", get)
    monkeypatch.setattr(module, "_PAUSE_SECONDS", 0.2)
    here = threading.get_ident()
    async with opened(path) as driver:

        async def read_here(count: int = 1) -> bool:
            assert await driver.get([Key("p", str(number)) for number in range(count)]) == [None] * count
            return threads.pop() == here

        assert await read_here()
        assert await read_here(module._SHORT_READ)
        assert not await read_here(module._SHORT_READ + 1)
        took = module._SHORT_SECONDS + 0.001
        assert await read_here()
        assert not await read_here()
        took = 0.0
        assert not await read_here()
        await asyncio.sleep(0.25)
        assert await read_here()


async def test_large_values_are_read_in_the_readers_thread(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = {f"k{number:02d}": bytes([number]) * 1_000_000 for number in range(40)}
    async with opened(path) as driver:
        for version, (key, value) in enumerate(values.items(), 1):
            await driver.commit([Write("p", (Put(key, value),), version)])
        read: list[int] = []  # the thread of each entry
        monkeypatch.setattr(module, "Entry", SimpleNamespace(_make=lambda row: note(row)))

        def note(row: tuple[Any, ...]) -> Entry:
            read.append(threading.get_ident())
            return Entry(*row)

        found = await driver.get([Key("p", key) for key in values])
        assert [entry.value for entry in found if entry is not None] == [*values.values()]
        here = read.count(threading.get_ident())
        assert 0 < here < len(values) == len(read) - here
        driver._here_again = 0.0
        assert len((await driver.scan("p", "", None, limit=100)).entries) == 4
        assert driver._here_again > time.monotonic()


async def test_a_short_read_waits_for_no_lock(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with opened(path, busy_timeout=10) as driver:
        await driver.commit([write(1, k=b"1")])
        assert driver._here is not None
        assert driver._here.execute("PRAGMA busy_timeout").fetchone() == (0,)
        driver._here.close()
        monkeypatch.setattr(driver, "_here", Busy())  # as while another process recovers after a crash
        assert await value_of(driver, "k") == b"1"
        page = await driver.scan("p", "", None, limit=10)
        assert [entry.key for entry in page.entries] == ["k"]


class Busy:
    """A connection to a file that somebody holds."""

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...

    def execute(self, *_: Any) -> Any:
        raise sqlite3.OperationalError("database is locked")

    def close(self) -> None: ...


async def test_a_lock_held_too_long_is_unavailable_and_soon_over(path: Path) -> None:
    async with opened(path, busy_timeout=0.05) as driver:
        await driver.commit([write(1, k=b"old")])
        with plain(path) as other:
            other.execute("BEGIN IMMEDIATE")
            with pytest.raises(UnavailableError, match="locked") as caught:
                await driver.commit([write(2, k=b"new")])
            assert isinstance(caught.value.__cause__, sqlite3.OperationalError)
            assert await value_of(driver, "k") == b"old"
            other.execute("ROLLBACK")
        assert await driver.commit([write(3, k=b"new")]) == [True]
        assert await value_of(driver, "k") == b"new"


async def test_opening_waits_for_a_lock_and_then_gives_up(path: Path) -> None:
    async with opened(path):
        pass
    with plain(path) as other:
        other.execute("PRAGMA journal_mode = DELETE")
        other.execute("BEGIN EXCLUSIVE")
        driver = sqlite_driver(path, busy_timeout=0.05)
        with pytest.raises(UnavailableError, match="locked"):
            await driver.open()
        other.execute("ROLLBACK")
    await driver.open()
    await driver.close()


async def test_switching_to_wal_waits_for_a_reader_and_then_gives_up(path: Path) -> None:
    with plain(path) as other:
        other.execute("CREATE TABLE mine (x)")
        other.execute("BEGIN")
        other.execute("SELECT * FROM mine").fetchall()
        with pytest.raises(UnavailableError, match="locked"):
            await sqlite_driver(path, busy_timeout=0.05).open()
        driver = sqlite_driver(path, busy_timeout=30)
        opening = asyncio.create_task(driver.open())
        await asyncio.wait([opening], timeout=0.05)
        assert not opening.done()
        other.execute("COMMIT")
        await opening
        await driver.close()


async def test_an_error_within_a_commit_leaves_nothing_behind(path: Path) -> None:
    async with opened(path) as driver:
        with plain(path) as other:
            other.execute(
                "CREATE TRIGGER refuse BEFORE INSERT ON persistence WHEN new.k = 'poison'"
                " BEGIN SELECT RAISE(ABORT, 'refused by a trigger'); END"
            )
            with pytest.raises(PersistenceError, match="refused by a trigger"):
                await driver.commit([write(1, "p", a=b"1"), write(2, "q", a=b"1", poison=b"2")])
            assert await driver.get([Key("p", "a"), Key("q", "a")]) == [None, None]
            other.execute("BEGIN IMMEDIATE")
            other.execute("ROLLBACK")
        assert await driver.commit([write(3, "p", a=b"1")]) == [True]


async def test_a_full_disk_rolls_the_group_back(path: Path) -> None:
    async with opened(path) as driver:
        await driver.commit([write(1, "p", a=b"old")])
        await driver._writer.run(lambda db: db.execute("PRAGMA max_page_count = 10").fetchone())
        with pytest.raises(UnavailableError, match="full"):
            await driver.commit([write(2, "p", a=b"new"), write(3, "q", a=b"x" * 100_000)])
        assert (await value_of(driver, "a"), await value_of(driver, "a", "q")) == (b"old", None)
        assert await driver.commit([write(4, "p", a=b"small")]) == [True]
        await driver._writer.run(lambda db: db.execute("PRAGMA max_page_count = 1000").fetchone())
        assert await driver.commit([write(5, "q", a=b"x" * 100_000)]) == [True]


async def test_what_is_deleted_or_replaced_is_legible_nowhere_once_the_file_is_closed(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def as_most_builds_do(*args: Any, **options: Any) -> sqlite3.Connection:
        db: sqlite3.Connection = connect(*args, **options)
        db.execute("PRAGMA secure_delete = OFF")  # Debian's SQLite has it on by default
        return db

    connect = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", as_most_builds_do)
    async with opened(path) as driver:
        keys = [f"k{number:03}" for number in range(200)]
        await driver.commit([Write("p", tuple(Put(key, b"SECRET" * 100) for key in keys), 1)])
        await driver.commit([Write("p", tuple(Put(key, b"") for key in keys[:100]), 2)])
        await driver.commit([Write("p", tuple(Delete(key) for key in keys[100:150]), 3)])
        await driver.purge("p", keys[150], None)
    assert path.read_bytes().count(b"SECRET") == 0
    assert [file.name for file in path.parent.iterdir()] == [path.name]


async def test_purge_leaves_the_lock_to_others_between_its_steps(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_PURGE_STEP", 0.0)
    others_have_written = False
    steps, step = 0, SQLiteDriver._purge

    def endless(*arguments: Any) -> bool:
        nonlocal steps
        steps += 1
        return step(*arguments) or not others_have_written

    monkeypatch.setattr(SQLiteDriver, "_purge", endless)
    async with opened(path) as driver, opened(path) as other:
        for n in range(1, 6):
            await driver.commit([Write("p", tuple(Put(f"{n}/{i:04}", b"v") for i in range(1000)), n)])
        purge = asyncio.create_task(driver.purge("p", "1", "5"))
        assert await other.commit([write(6, "q", a=b"other")]) == [True]
        assert await driver.commit([write(7, "q", a=b"same")]) == [True]
        others_have_written = True
        await purge
        assert steps > 1
        page = await driver.scan("p", "", None, limit=2000)
        assert (len(page.entries), page.entries[0].key, page.more) == (1000, "5/0000", False)


async def test_a_cancelled_commit_is_carried_out_whole(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with opened(path) as driver:
        commit = asyncio.create_task(driver.commit([write(1, a=b"1", b=b"2")]))
        await asyncio.sleep(0)
        commit.cancel()
        with pytest.raises(asyncio.CancelledError):
            await commit
        assert await driver.commit([write(2, "q", a=b"1")]) == [True]
        assert (await value_of(driver, "a"), await value_of(driver, "b")) == (b"1", b"2")
    assert caplog.messages == []  # the loop would log an answer that nobody can take


def test_a_call_may_outlive_its_event_loop(path: Path) -> None:
    driver = sqlite_driver(path, busy_timeout=10)

    async def leave_early() -> None:
        await driver.open()
        commit = asyncio.create_task(driver.commit([write(1, a=b"1")]))
        await asyncio.sleep(0)
        commit.cancel()

    async def look() -> bytes | None:
        assert await driver.commit([write(2, "q", a=b"1")]) == [True]  # the writer's thread still works
        value = await value_of(driver, "a")
        await driver.close()
        return value

    asyncio.run(sqlite_driver(path).open())
    with plain(path) as other:
        other.execute("BEGIN IMMEDIATE")
        asyncio.run(leave_early())
        other.execute("ROLLBACK")
    assert asyncio.run(look()) == b"1"


# ── Processes ──

_FILES = 25


def _open_at_once(folder: Path, gate: Barrier, number: int) -> None:
    class AtTheGate(SQLiteDriver):
        def _prepare(self, db: sqlite3.Connection) -> None:
            gate.wait(30)  # now all have the file open, and it is empty
            super()._prepare(db)

    async def open_all() -> None:
        for n in range(_FILES):
            driver = AtTheGate(folder / f"{n}.db")
            await driver.open()
            if await driver.commit([write(number + 1, f"p{number}", k=b"v")]) != [True]:
                raise RuntimeError(number)
            await driver.close()

    asyncio.run(open_all())


async def test_eight_processes_may_open_an_empty_database_at_once(tmp_path: Path) -> None:
    gate = processes.Barrier(8)
    run_together(_open_at_once, [(tmp_path, gate, number) for number in range(8)])
    for n in range(_FILES):
        async with opened(tmp_path / f"{n}.db") as driver:
            assert await driver.partitions(None, 100) == ([f"p{number}" for number in range(8)], None)


def _count_up(path: Path, gate: Barrier, seed: int, times: int) -> None:
    async def count_up() -> None:
        chance = random.Random(seed)
        async with opened(path, busy_timeout=30) as driver:
            gate.wait(30)
            done = 0
            while done < times:
                (entry,) = await driver.get([Key("p", "counter")])
                value, seen = (0, ABSENT) if entry is None else (int(entry.value), entry.version)
                put = Put("counter", b"%d" % (value + 1), expect=seen)
                (applied,) = await driver.commit([Write("p", (put,), chance.getrandbits(61) + 1)])
                done += applied is True

    asyncio.run(count_up())


async def test_two_processes_that_count_lose_no_step(path: Path) -> None:
    gate = processes.Barrier(2)
    run_together(_count_up, [(path, gate, seed, 150) for seed in range(2)])
    async with opened(path) as driver:
        assert await value_of(driver, "counter") == b"300"


def _write_until_killed(path: Path, acknowledge: Connection, first: int) -> None:
    """Acknowledge each number once it is in the trio, in the log, and no longer in the box."""

    async def write_on() -> None:
        async with opened(path) as driver:
            for n in count(first):
                value = b"%d" % n
                box = Put(f"{n}", value, ABSENT), Delete(f"{n - 1}")
                writes = [
                    write(n + 1, "trio", a=value, b=value * 2000, c=value),
                    Write("log", (Put(f"{n:08}", value, ABSENT),), n + 1),
                    Write("box", box, n + 1),
                ]
                # Never refused: what a killed predecessor wrote without telling is counted in `first`.
                if await driver.commit(writes) != [True] * 3:
                    raise RuntimeError(n)
                acknowledge.send(n)

    asyncio.run(write_on())


def test_a_killed_writer_loses_nothing_acknowledged_and_leaves_nothing_half_done(path: Path) -> None:
    chance = random.Random(20)
    first = 0
    for _ in range(60):
        acknowledged, acknowledge = processes.Pipe(duplex=False)
        child = processes.Process(target=_write_until_killed, args=(path, acknowledge, first))
        child.start()
        acknowledge.close()
        last = first - 1
        for _ in range(chance.randrange(12)):
            last = acknowledged.recv()
        time.sleep(chance.uniform(0, 0.003))
        child.kill()
        child.join()
        assert child.exitcode == -signal.SIGKILL
        try:
            while True:
                last = acknowledged.recv()
        except EOFError:
            acknowledged.close()
        first = asyncio.run(_check_after_kill(path, last))
    assert first > 200


async def _check_after_kill(path: Path, acknowledged: int) -> int:
    """Require that all up to `acknowledged` is there, and at most one step more; return the next number."""
    async with opened(path) as driver:
        log = await driver.scan("log", "", None, limit=100_000)
        trio = await driver.scan("trio", "", None, limit=10)
        box = await driver.scan("box", "", None, limit=10)
    last = len(log.entries) - 1
    assert [int(entry.key) for entry in log.entries] == list(range(last + 1))
    assert last in (acknowledged, acknowledged + 1)
    expected = [] if last < 0 else [b"%d" % last, b"%d" % last * 2000, b"%d" % last]
    assert [entry.value for entry in trio.entries] == expected
    assert [entry.key for entry in box.entries] == ([] if last < 0 else [str(last)])
    return last + 1


async def test_whoever_opens_it_many_times_at_once_has_three_connections(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[sqlite3.Connection] = []
    connect = sqlite3.connect

    def counted(*args: Any, **options: Any) -> sqlite3.Connection:
        made.append(connect(*args, **options))
        return made[-1]

    monkeypatch.setattr(sqlite3, "connect", counted)
    driver = sqlite_driver(path)
    await asyncio.gather(*(driver.open() for _ in range(8)))
    await driver.close()
    assert len(made) == 3


async def test_a_file_that_another_process_holds_is_unavailable_and_not_unknown(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("persistence.coalescer.RETRY_SECONDS", 0.2)
    async with create_persistence(sqlite_driver(path, busy_timeout=0.01)) as p:
        assert await p.sessions.add_message("s", {"n": 1}) == 1
        with plain(path) as other:
            other.execute("BEGIN IMMEDIATE")
            with pytest.raises(UnavailableError, match="nothing was written"):
                await p.sessions.add_message("s", {"n": 2})
            other.execute("ROLLBACK")
        assert await p.sessions.add_message("s", {"n": 3}) == 2


@pytest.mark.parametrize("value", ["no JSON", 5, 5.5])
async def test_a_value_that_somebody_wrote_as_text_or_number_is_corrupt(path: Path, value: object) -> None:
    async with opened(path) as driver:
        await driver.commit([write(1, a=b"{}", b=b"{}")])
    with plain(path) as db, db:
        db.execute("UPDATE persistence SET v = ? WHERE k = 'a'", (value,))
    async with opened(path) as driver:
        assert await value_of(driver, "a") == str(value).encode()
        page = await driver.scan("p", "", None, limit=9)
        assert [entry.value for entry in page.entries] == [str(value).encode(), b"{}"]
    async with create_persistence(f"sqlite:///{path}") as p:
        await p.sessions.add_message("s", {})
    with plain(path) as db, db:
        db.execute("UPDATE persistence SET v = ? WHERE p LIKE '%session/s'", (value,))
    async with create_persistence(f"sqlite:///{path}") as p:
        with pytest.raises(CorruptRecordError):
            await p.sessions.get_messages("s")
        assert (await p.repair()).corrupt_count
