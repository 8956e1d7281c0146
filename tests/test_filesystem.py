"""What is the filesystem driver's own: its log, locks and faults. The promises of all are in test_driver."""

# ruff: noqa: ASYNC240 - a test may touch its own files while nothing else runs

from __future__ import annotations

import asyncio
import base64
import errno
import fcntl
import io
import json
import multiprocessing
import os
import random
import resource
import stat
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from itertools import count
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

from persistence import create_persistence
from persistence.driver import ABSENT, MAX_VALUE_BYTES, Delete, Driver, Entry, Key, Op, Put, Write
from persistence.drivers import _filesystem_log as log_module
from persistence.drivers import filesystem as module
from persistence.drivers.filesystem import FilesystemDriver, filesystem_driver, from_url
from persistence.errors import ConfigurationError, CorruptRecordError, OutcomeUnknownError, UnavailableError

# A forked child would inherit the locks and threads of this process; a spawned one starts slowly.
processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["persistence.drivers.filesystem"])
versions = count(1)


@asynccontextmanager
async def opened(path: Path, **options: Any) -> AsyncIterator[FilesystemDriver]:
    driver = filesystem_driver(path, **options)
    await driver.open()
    try:
        yield driver
    finally:
        await driver.close()


def write(partition: str, *ops: Op) -> Write:
    return Write(partition, ops, next(versions))


async def put(driver: Driver, partition: str, **values: bytes) -> None:
    ops = [Put(key, value) for key, value in values.items()]
    assert await driver.commit([write(partition, *ops)]) == [True]


async def content(driver: Driver, partition: str = "p") -> dict[str, bytes]:
    entries: list[Entry] = []
    while True:
        start = entries[-1].key + "!" if entries else ""
        page = await driver.scan(partition, start, None, limit=1000)
        entries += page.entries
        if not page.more:
            return {entry.key: entry.value for entry in entries}


def held_up(call: Callable[[Any], object]) -> tuple[Callable[[Any], None], asyncio.Event, threading.Event]:
    """Return `call` for another thread, an event for its having begun, and one that lets it go on."""
    loop, begun, go_on = asyncio.get_running_loop(), asyncio.Event(), threading.Event()

    def slow(argument: Any) -> None:
        loop.call_soon_threadsafe(begun.set)
        go_on.wait()
        call(argument)

    return slow, begun, go_on


def logs(path: Path) -> list[Path]:
    return sorted(path.rglob("*.jsonl"))


def open_files(path: Path) -> int:
    links = Path("/proc/self/fd").iterdir()
    return sum(os.path.realpath(link).startswith(f"{path}/") for link in links)


# The log.


async def test_the_file_is_legible(tmp_path: Path) -> None:
    async with opened(tmp_path) as driver:
        first = Write("session/a", (Put("k", b'{"a": [1]}'), Put("raw", b"\x00\xff")), 7)
        assert await driver.commit([first]) == [True]
        assert await driver.commit([Write("session/a", (Put("n", b"1"), Delete("k")), 8)]) == [True]
    (log,) = logs(tmp_path)
    assert log.name.startswith("session_a-")
    header, *lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert (header["format"], header["partition"]) == (1, "session/a")
    assert [{**line, "sum": None} for line in lines] == [
        {"sum": None, "version": 7, "put": {"k": {"a": [1]}}, "put64": {"raw": "AP8="}},
        {"sum": None, "version": 8, "put": {"n": 1}, "delete": ["k"]},
    ]


VALUES = [
    *(b"", b"\n", b"null", b" 1", b"1 ", b'{"a":\n1}', b'{ "a" :\t1 }\r', b'{"a":1}\r\n', b'"\xff"', b"\xff"),
    *(b"01", b"1e999", b"NaN", b'"\\ud800"', b'"\xc3\xa9"', b"1],[2", b'1},"put64":{"k":2', b"\xef\xbb\xbf1"),
    *(b"[" * depth + b"]" * depth for depth in (10, 65, 400, 900, 990, 1000, 5000)),
    *(b'{"a":1,"a":2}', b'"' + b"x" * (MAX_VALUE_BYTES - 2) + b'"', bytes(MAX_VALUE_BYTES)),
]


async def test_every_value_comes_back_byte_for_byte(tmp_path: Path) -> None:
    keys = [f"{number:02}" for number in range(len(VALUES))]
    names = ['"', "\\", "a\\u0041", "'", "~"]
    async with opened(tmp_path) as driver, opened(tmp_path) as other:
        for key, value in zip(keys, VALUES, strict=True):
            assert await driver.commit([write("p", Put(key, value))]) == [True]
        assert await driver.commit([write("q", *(Put(name, name.encode()) for name in names))]) == [True]
        for reader in (driver, other):
            assert await content(reader) == dict(zip(keys, VALUES, strict=True))
            assert await content(reader, "q") == {name: name.encode() for name in names}


async def test_the_log_cut_at_every_byte_shows_a_state_that_was(tmp_path: Path) -> None:
    source, copy = tmp_path / "source", tmp_path / "copy"
    states: dict[int, dict[str, bytes]] = {}
    async with opened(source) as driver:
        for number in range(5):
            await put(driver, "p", same=b"%d" % number, **{f"k{number}": b"\xff" * number})
            (log,) = logs(source)
            states[log.stat().st_size] = await content(driver)
    whole = log.read_bytes()
    cut_log = copy / log.relative_to(source)
    cut_log.parent.mkdir(parents=True)
    for length in range(len(whole) + 1):
        cut_log.unlink(missing_ok=True)
        cut_log.write_bytes(whole[:length])
        expected = next((states[end] for end in sorted(states, reverse=True) if end <= length), {})
        async with opened(copy, durability="process") as reader, opened(copy, durability="process") as writer:
            assert await content(reader) == expected
            assert await reader.partitions(None, 9) == (["p"] if expected else [], None)
            await put(writer, "p", new=b"1")
            assert await content(reader) == await content(writer) == {**expected, "new": b"1"}


async def test_a_tail_of_zeros_is_cut_off(tmp_path: Path) -> None:
    async with opened(tmp_path) as driver:
        await put(driver, "p", a=b"1")
        (log,) = logs(tmp_path)
        for tail in (bytes(100), b'{"sum":"' + bytes(100) + b'1"}}\n'):
            with log.open("ab") as file:
                file.write(tail)
            assert await content(driver) == {"a": b"1"}
            await put(driver, "p", a=b"1")
            assert b"\0" not in log.read_bytes()


async def test_a_reader_waits_for_the_rest_of_a_line(tmp_path: Path) -> None:
    async with opened(tmp_path) as driver, opened(tmp_path) as reader:
        await put(driver, "p", a=b"1")
        (log,) = logs(tmp_path)
        before = log.read_bytes()
        await put(driver, "p", a=b"2", b=b"3")
        line = log.read_bytes()[len(before) :]
        log.write_bytes(before)
        for byte in line[:-1]:
            with log.open("ab") as file:
                file.write(bytes([byte]))
            assert await content(reader) == {"a": b"1"}
        with log.open("ab") as file:
            file.write(line[-1:])
        assert await content(reader) == {"a": b"2", "b": b"3"}


async def test_a_flipped_byte_is_corruption_and_stays(tmp_path: Path) -> None:
    async with opened(tmp_path) as driver:
        for number in range(3):
            await put(driver, "p", **{f"k{number}": b"[1]", f"raw{number}": b"\xff"})
        await put(driver, "q", a=b"1")
    log = next(log for log in logs(tmp_path) if log.name.startswith("p-"))
    whole = log.read_bytes()
    for place in range(whole.rindex(b"\n", 0, -1)):
        damaged = bytearray(whole)
        damaged[place] ^= 0x01
        log.write_bytes(damaged)
        async with opened(tmp_path, durability="process") as driver:
            with pytest.raises(CorruptRecordError, match="is damaged") as caught:
                await driver.get([Key("p", "k0")])
            assert caught.value.partition == "p"
            with pytest.raises(CorruptRecordError):
                await driver.scan("p", "", None, limit=1)
            with pytest.raises(CorruptRecordError):
                await driver.commit([write("p", Put("k0", b"2"))])
            ops = [write("q", Put("a", b"2")), write("p", Put("k0", b"2"))]
            assert await driver.commit(ops) == [True, None]
        assert log.read_bytes() == damaged


async def test_an_acknowledged_last_line_is_not_taken_for_a_torn_one(tmp_path: Path) -> None:
    async with opened(tmp_path) as driver:
        await put(driver, "p", a=b"1")
    (log,) = logs(tmp_path)
    log.write_bytes(log.read_bytes().replace(b'"a":1', b'"a":2'))
    async with opened(tmp_path) as driver:
        with pytest.raises(CorruptRecordError, match="is damaged"):
            await content(driver)


@pytest.mark.parametrize("behind", ["a torn line", "the next block"])
async def test_zeros_with_something_behind_them_are_corruption(
    behind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(tmp_path) as driver:
        await put(driver, "p", a=b"1")
        await put(driver, "p", b=b"2")
    (log,) = logs(tmp_path)
    header, first, second = log.read_bytes().splitlines(keepends=True)
    damaged = header + bytes(len(first) - 1) + b"\n"
    log.write_bytes(damaged + (second[:-1] if behind == "a torn line" else second))
    if behind == "the next block":
        monkeypatch.setattr(log_module, "_READ_BYTES", len(damaged))
    async with opened(tmp_path) as driver:
        with pytest.raises(CorruptRecordError, match="is damaged"):
            await content(driver)
        with pytest.raises(CorruptRecordError, match="is damaged"):
            await driver.commit([write("p", Put("c", b"3"))])
    assert log.read_bytes().startswith(damaged + second[:-1])


async def test_a_damaged_header_stops_a_listing_and_a_file_of_another_kind_does_not(tmp_path: Path) -> None:
    async with opened(tmp_path) as driver:
        await put(driver, "p", a=b"1")
        (log,) = logs(tmp_path)
        log.with_suffix(".txt").write_text("a note\nof mine\n")
        assert await driver.partitions(None, 10) == (["p"], None)
        log.write_bytes(b"x" + log.read_bytes())
        with pytest.raises(CorruptRecordError, match="is damaged at byte 0"):
            await driver.partitions(None, 10)


# Several at once.


async def test_a_partition_that_is_emptied_leaves_no_file(tmp_path: Path) -> None:
    async with opened(tmp_path) as driver, opened(tmp_path) as other:
        for empty in (
            lambda: driver.commit([write("p", Delete("a"), Delete("b"))]),
            lambda: driver.purge("p", "", None),
            lambda: driver.purge("p", "a", "c"),
        ):
            await put(driver, "p", a=b"1", b=b"2")
            assert await content(other) == {"a": b"1", "b": b"2"}
            await empty()
            assert logs(tmp_path) == []
            await put(other, "p", c=b"3")  # at once: nobody holds the lock of the file that is gone
            assert await content(driver) == await content(other) == {"c": b"3"}
            await driver.purge("p", "", None)
            assert await content(driver) == await content(other) == {}
            assert await driver.commit([write("p", Delete("c"))]) == [True]
            assert logs(tmp_path) == []


async def test_a_new_file_with_the_number_of_the_old_one_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_OPEN_FILES", 1)
    async with opened(tmp_path) as driver, opened(tmp_path) as other:
        for number in range(20):
            await put(driver, "p", **{f"k{number}": b"1"})
            assert await content(driver) == {f"k{number}": b"1"}
            await put(driver, "q", a=b"1")  # closes the file of p, so that its inode is free once removed
            await other.purge("p", "", None)
            await put(other, "p", **{f"l{number}": b"1"})
            assert await content(driver) == {f"l{number}": b"1"}
            await other.purge("p", "", None)


async def test_a_range_larger_than_a_step_is_purged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PURGE_KEYS", 10)
    async with opened(tmp_path) as driver:
        await put(driver, "p", **{f"k{number:03}": b"1" for number in range(100)})
        await driver.purge("p", "k010", "k095")
        left = [*range(10), *range(95, 100)]
        assert list(await content(driver)) == [f"k{number:03}" for number in left]


async def test_compaction_shrinks_the_file_and_loses_nothing(tmp_path: Path) -> None:
    # Other objects read and write while files are replaced: every state they see must be whole.
    big = b"\xff" * 8_000
    async with opened(tmp_path) as one, opened(tmp_path) as two, opened(tmp_path) as reader:
        await put(one, "p", kept=b'"kept"')
        inodes = {logs(tmp_path)[0].stat().st_ino}
        writing = 2

        async def keep_writing(driver: FilesystemDriver, name: str) -> None:
            nonlocal writing
            for number in range(100):
                value = b"%d" % number
                await put(driver, "p", **{name: value, f"{name}.big": big, f"{name}.too": value})
            writing -= 1

        async def keep_reading() -> None:
            seen = {"one": -1, "two": -1}
            while writing:
                found = await content(reader)
                assert found["kept"] == b'"kept"'
                for name in seen:
                    assert found.get(name) == found.get(f"{name}.too")
                    assert int(found.get(name, b"-1")) >= seen[name]
                    seen[name] = int(found.get(name, b"-1"))
                inodes.update(log.stat().st_ino for log in logs(tmp_path))
                await asyncio.sleep(0)

        await asyncio.gather(keep_writing(one, "one"), keep_writing(two, "two"), keep_reading())
        last = {"kept": b'"kept"'}
        for name in ("one", "two"):
            last |= {name: b"99", f"{name}.big": big, f"{name}.too": b"99"}
        for driver in (one, two, reader):
            assert await content(driver) == last
    (log,) = logs(tmp_path)
    assert log.stat().st_size < 400_000  # 2 MB were written
    assert len(inodes) > 1
    assert list(tmp_path.rglob("*.new")) == []


async def test_small_entries_are_not_compacted_for_ever(tmp_path: Path) -> None:
    async with opened(tmp_path, durability="process") as driver:
        for start in range(0, 4_000, 500):
            await put(driver, "p", **{f"{number:04}": b"1" for number in range(start, start + 500)})
        (log,) = logs(tmp_path)
        for number in range(4_000):
            await put(driver, "p", **{f"{number:04}": b"2"})
        inode = log.stat().st_ino
        for number in range(50):
            await put(driver, "p", **{f"{number:04}": b"3"})
        assert log.stat().st_ino == inode
        assert len(await content(driver)) == 4_000


async def test_a_compacted_file_is_safe_from_a_power_cut_before_it_takes_its_place_and_so_is_its_name_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[object] = []
    sync, sync_folder, replace = log_module._sync_file, log_module.sync_folder, os.replace

    def note_file(fd: int) -> None:
        sync(fd)
        done.append((os.fstat(fd).st_ino, os.fstat(fd).st_size))

    def note_folder(folder: Path) -> None:
        sync_folder(folder)
        done.append(folder)

    def note_replaced(new: Path, old: Path) -> None:
        done.append((new.stat().st_ino, new.stat().st_size))
        replace(new, old)

    monkeypatch.setattr(log_module, "_sync_file", note_file)
    monkeypatch.setattr(log_module, "sync_folder", note_folder)
    monkeypatch.setattr(os, "replace", note_replaced)
    monkeypatch.setattr(log_module, "_COMPACT_BYTES", 300)
    async with opened(tmp_path) as driver:
        await put(driver, "p", a=b"1", b=b"\xff" * 4_000)
        await put(driver, "p", b=b"2")
        assert await content(driver) == {"a": b"1", "b": b"2"}
        (log,) = logs(tmp_path)
    new = (log.stat().st_ino, log.stat().st_size)
    assert done[-3:] == [new, new, log.parent]


async def test_a_failed_compaction_changes_nothing_and_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EIO, "no rename today")

    async with opened(tmp_path) as driver:
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", refuse)
            for number in range(20):
                await put(driver, "p", a=b"\xff" * 8_000, b=b"%d" % number)
            assert await content(driver) == {"a": b"\xff" * 8_000, "b": b"19"}
        assert list(tmp_path.rglob("*.new")) == []
    assert [record.message.partition("jsonl ")[2] for record in caplog.records] == [
        "was not compacted: [Errno 5] no rename today"
    ]


async def test_what_others_write_after_a_failed_compaction_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EIO, "no rename today")

    monkeypatch.setattr(log_module, "_COMPACT_BYTES", 300)
    monkeypatch.setattr(os, "replace", refuse)
    async with opened(tmp_path) as driver, opened(tmp_path) as other:
        await put(driver, "p", a=b"\xff" * 4_000)
        await put(driver, "p", a=b"1")
        await put(other, "p", b=b"2")
        assert await content(driver) == {"a": b"1", "b": b"2"}


async def test_a_locked_file_makes_a_writer_give_up_and_no_reader_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_LOCK_SECONDS", 0.05)
    async with opened(tmp_path) as driver:
        await put(driver, "p", a=b"1")
        with logs(tmp_path)[0].open() as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            for call in (driver.commit([write("p", Put("a", b"2"))]), driver.purge("p", "", None)):
                with pytest.raises(UnavailableError, match="locked"):
                    await call
            ops = [write(name, Put("a", b"2")) for name in ("o", "p", "q")]
            assert await driver.commit(ops) == [True, None, True]
            assert await content(driver) == {"a": b"1"}
        await put(driver, "p", a=b"3")


async def test_who_waits_for_a_lock_holds_no_other(tmp_path: Path) -> None:
    async with opened(tmp_path) as driver, opened(tmp_path) as other:
        await put(driver, "p", a=b"1")
        with logs(tmp_path)[0].open() as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            task = asyncio.create_task(driver.commit([write(name, Put("a", b"2")) for name in ("o", "p")]))
            while not await content(other, "o"):
                pass
            await put(other, "o", a=b"3")
            assert not task.done()
        assert await task == [True, True]
        assert await content(driver, "o") == {"a": b"3"}


async def test_a_write_is_seen_by_its_own_readers_only_once_it_is_safe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow, syncing, synced = held_up(os.fdatasync)
    async with opened(tmp_path) as driver:
        await put(driver, "p", a=b"1", b=b"1")
        assert await content(driver) == {"a": b"1", "b": b"1"}
        monkeypatch.setattr(os, "fdatasync", slow)
        task = asyncio.create_task(put(driver, "p", a=b"2", b=b"2"))
        await syncing.wait()
        try:
            assert await asyncio.wait_for(content(driver), 10) == {"a": b"1", "b": b"1"}
        finally:
            synced.set()
        await task
        assert await content(driver) == {"a": b"2", "b": b"2"}


async def test_what_another_writes_to_the_successor_of_a_file_is_seen_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow, syncing, synced = held_up(log_module.sync_folder)
    async with opened(tmp_path) as driver, opened(tmp_path) as other:
        await put(driver, "p", a=b"1")
        assert await content(driver) == {"a": b"1"}
        monkeypatch.setattr(log_module, "sync_folder", slow)
        task = asyncio.create_task(driver.commit([write("p", Delete("a"))]))
        await syncing.wait()
        monkeypatch.undo()
        try:
            await put(other, "p", b=b"2")
            found = asyncio.create_task(content(driver))
            await asyncio.sleep(0.05)
        finally:
            synced.set()
        assert await found == {"b": b"2"}
        assert await task == [True]


# Bounds.


async def test_open_files_and_indexes_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_INDEX_BYTES", 1_000_000)  # 400 of these indexes
    names = [f"session/{number}" for number in range(1_000)]
    async with opened(tmp_path, durability="process") as driver:
        for start in range(0, 1_000, 250):
            writes = [write(name, *(Put(key, b"1") for key in "abc")) for name in names[start : start + 250]]
            assert await driver.commit(writes) == [True] * 250
            assert open_files(tmp_path) <= 256
        for start in range(0, 1_000, 250):
            found = await driver.get([Key(name, "b") for name in names[start : start + 250]])
            assert [entry.value for entry in found if entry] == [b"1"] * 250
            assert 100 < open_files(tmp_path) <= 256
            assert driver._index_bytes <= 1_010_000
            assert 100 < len(driver._logs) <= 450
        listed: list[str] = []
        cursor = None
        while True:
            page, cursor = await driver.partitions(cursor, 70)
            listed += page
            if cursor is None:
                break
        assert sorted(listed) == sorted(names)
        assert open_files(tmp_path) <= 256
    assert open_files(tmp_path) == 0


async def test_a_file_that_is_being_written_is_not_closed_to_make_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_OPEN_FILES", 4)
    async with opened(tmp_path) as driver:
        for value in (b"1", b"2"):
            assert await driver.commit([write(f"p{n}", Put("k", value)) for n in range(20)]) == [True] * 20
        assert open_files(tmp_path) <= 20


# Names.


async def test_hostile_names_stay_apart_and_inside_the_folder(tmp_path: Path) -> None:
    signs = [chr(code) for code in range(0x21, 0x7F) if chr(code) not in "{}"]
    long = "x" * 254
    paths = [".", "..", "../..", "/", "//", "/etc/passwd", "a/b", "con", "nul", "-rf", "~root"]
    cases = ["a", "A", "Session/A", "session/A", "session/a", "session_a"]
    names = sorted({*signs, *paths, *cases, "x" * 60, "x" * 61, long, long + "a", long + "b"})
    async with opened(tmp_path / "in", durability="process") as driver, opened(tmp_path / "in") as other:
        writes = [write(name, Put("k", name.encode())) for name in names]
        assert await driver.commit(writes) == [True] * len(names)
        for name in names:
            assert await content(other, name) == {"k": name.encode()}
        assert sorted((await other.partitions(None, 1_000))[0]) == names
    files = [file.name for file in logs(tmp_path)]
    assert len({name.lower() for name in files}) == len(names) == len(files)
    assert max(map(len, files)) < 120
    assert all(file.resolve().is_relative_to(tmp_path / "in" / "default") for file in logs(tmp_path))


async def test_namespaces_that_differ_in_case_have_folders_that_do_not(tmp_path: Path) -> None:
    async with opened(tmp_path, namespace="a") as lower, opened(tmp_path, namespace="A") as upper:
        await put(lower, "p", k=b"1")
        assert await content(upper) == {}
        assert (await upper.partitions(None, 9))[0] == []
    folders = [folder.name.lower() for folder in tmp_path.iterdir()]
    assert len(folders) == len(set(folders)) == 2


async def test_a_file_under_anothers_name_is_refused(tmp_path: Path) -> None:
    async with opened(tmp_path) as driver:
        await put(driver, "p", a=b"1")
        (log,) = logs(tmp_path)
        await put(driver, "q", a=b"2")
        other = next(file for file in logs(tmp_path) if file != log)
        os.replace(log, other)
        with pytest.raises(CorruptRecordError, match="holds another partition, 'p'"):
            await content(driver, "q")


async def test_files_are_for_their_owner_alone(tmp_path: Path) -> None:
    async with opened(tmp_path / "in") as driver:
        for number in range(20):
            await put(driver, "p", a=b"\xff" * 12_000, b=b"%d" % number)  # goes through a compaction
    for path in (tmp_path / "in", *(tmp_path / "in").rglob("*")):
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600)


# Faults.


@pytest.mark.parametrize("room", [0, 1, 50])
async def test_a_full_disk_leaves_the_file_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: int
) -> None:
    write_all = os.write

    def short(fd: int, data: bytes) -> int:
        if not room:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write_all(fd, data[:room])

    async with opened(tmp_path) as driver, opened(tmp_path) as other:
        await put(driver, "p", a=b"1")
        (log,) = logs(tmp_path)
        before = log.read_bytes()
        with monkeypatch.context() as patch:
            patch.setattr(os, "write", short)
            for name in ("p", "new"):
                with pytest.raises(UnavailableError, match="No space left"):
                    await driver.commit([write(name, Put("a", b"2"), Put("b", b"3"))])
        assert log.read_bytes() == before
        assert await content(driver) == await content(other) == {"a": b"1"}
        assert await content(driver, "new") == await content(other, "new") == {}
        for name in ("p", "new"):
            await put(other, name, a=b"4")
            assert await content(driver, name) == {"a": b"4"}


@pytest.mark.parametrize("durability", ["power", "process"])
async def test_the_names_of_a_new_file_and_its_folders_are_made_safe_for_power_alone(
    durability: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sync, synced = os.fsync, set[int]()

    def note(fd: int) -> None:
        synced.add(os.fstat(fd).st_ino)
        sync(fd)

    monkeypatch.setattr(os, "fsync", note)
    async with opened(tmp_path / "a" / "b", durability=durability) as driver:
        await put(driver, "p", a=b"1")
        (path,) = tmp_path.glob("**/*.jsonl")
        holders = [folder for folder in path.parents if folder.is_relative_to(tmp_path)]
        assert len(holders) == 5
        assert synced == ({folder.stat().st_ino for folder in holders} if durability == "power" else set())
        synced.clear()
        await driver.purge("p", "", None)
        assert synced == ({path.parent.stat().st_ino} if durability == "power" else set())


@pytest.mark.parametrize("durability", ["power", "process"])
async def test_a_torn_line_is_cut_off_for_good_before_the_next_is_written_for_power_alone(
    durability: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sync, sizes = log_module._sync_file, list[int]()

    def note(fd: int) -> None:
        sizes.append(os.fstat(fd).st_size)
        sync(fd)

    async with opened(tmp_path, durability=durability) as driver:
        await put(driver, "p", a=b"1")
        (log,) = logs(tmp_path)
        good = log.stat().st_size
        with log.open("ab") as file:
            file.write(b'{"sum":"')
        monkeypatch.setattr(log_module, "_sync_file", note)
        await put(driver, "p", a=b"2")
        assert sizes == ([good, log.stat().st_size] if durability == "power" else [])


async def test_a_write_that_could_not_be_synced_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sync, failures = os.fdatasync, list[OSError]()

    def fail_once(fd: int) -> None:
        if failures:
            raise failures.pop()
        sync(fd)

    async with opened(tmp_path) as driver, opened(tmp_path) as other:
        await put(driver, "p", a=b"1")
        assert await content(other) == {"a": b"1"}
        monkeypatch.setattr(os, "fdatasync", fail_once)
        for name in ("p", "new"):
            failures.append(OSError(errno.EIO, "Input/output error"))
            with pytest.raises(UnavailableError, match="Input/output error"):
                await driver.commit([write(name, Put("a", b"2"), Put("b", b"3"))])
        await put(other, "p", c=b"4")  # at once: nobody holds the lock of the file that was replaced
        assert await content(driver) == await content(other) == {"a": b"1", "c": b"4"}
        assert await content(driver, "new") == await content(other, "new") == {}


async def test_what_is_not_allowed_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=f"the folder {tmp_path / 'none'} is missing"):
        await filesystem_driver(tmp_path / "none", create=False).open()
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigurationError, match="Not a directory"):
        await filesystem_driver(tmp_path / "file").open()


async def test_an_url_names_the_folder_and_the_options(tmp_path: Path) -> None:
    odd = tmp_path / "a b%#"
    url = f"file://{str(odd).replace('%', '%25').replace(' ', '%20').replace('#', '%23')}"
    driver = from_url(f"{url}?namespace=n&durability=process&create=yes")
    assert repr(driver) == f"filesystem_driver({str(odd)!r}, namespace='n')"
    await driver.open()
    await put(driver, "p", a=b"1")
    await driver.close()
    assert len(logs(odd)) == 1
    for wrong in ("file://host/a", "file:a", "file:///a#b", "file:///a?mode=1", "file://"):
        with pytest.raises(ConfigurationError):
            from_url(wrong)


# Other processes, and their end.

PARTITIONS = ["p", "q", "r"]


async def test_a_partition_that_is_often_compacted_is_noted_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or the bound on open files would be reached by one, and room be made for ever."""
    monkeypatch.setattr(module, "_OPEN_FILES", 8)
    monkeypatch.setattr(log_module, "_COMPACT_BYTES", 300)
    async with opened(tmp_path, durability="process") as driver:
        for _ in range(60):
            await put(driver, "hot", k=b'"%s"' % (b"x" * 200))
        writes = [write(name, Put("k", b"1")) for name in ("hot", "new")]
        assert await driver.commit(writes) == [True, True]


async def test_a_failed_reopening_leaves_no_index_of_another_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(tmp_path) as a, opened(tmp_path) as b:
        old = write("p", Put("k", b"1"), Put("x", b'"xxxx"'))
        await a.commit([old])
        await b.purge("p", "", None)
        await b.commit([write("p", Put("k", b"2"), Put("y", b'"yyyy"'))])
        read = os.pread

        def fail(fd: int, size: int, at: int) -> bytes:
            if at == 0:
                raise OSError(errno.EIO, "failed")
            return read(fd, size, at)

        with monkeypatch.context() as patch:
            patch.setattr(os, "pread", fail)
            with pytest.raises(UnavailableError):
                await a.get([Key("p", "k")])
        keys = [Key("p", "k"), Key("p", "x")]
        assert await a.get(keys) == await b.get(keys)
        assert await a.commit([write("p", Put("k", b"3", old.version))]) == [False]


@pytest.mark.parametrize("length", [0, 60])
def test_a_file_that_gets_its_header_while_it_is_listed_is_not_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, length: int
) -> None:
    path, header = tmp_path / "x.jsonl", log_module._header("p")
    path.write_bytes(header[:length])

    class Grows(io.FileIO):
        def readinto(self, buffer: Any) -> int | None:
            size = super().readinto(buffer)
            path.write_bytes(header + log_module._line(7, [("k", b"1")], []))
            return size

    monkeypatch.setattr(
        log_module, "open", lambda path, _: io.BufferedReader(Grows(path, "r")), raising=False
    )
    assert log_module.partition_of(path) in (None, "p")


async def test_the_folder_stays_where_it_was_when_the_working_folder_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    async with opened(Path("data")) as driver, opened(Path("data")) as other:
        await put(driver, "p", k=b"1")
        monkeypatch.chdir("/")
        assert await content(other) == {"k": b"1"}
        assert await other.partitions(None, 5) == (["p"], None)


async def test_few_descriptors_are_enough(tmp_path: Path) -> None:
    before, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    async with opened(tmp_path, durability="process") as driver:
        resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 40, most))
        try:
            for number in range(150):
                await put(driver, f"p{number}", k=b"1")
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (before, most))


async def test_a_driver_that_is_not_open_says_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="not open"):
        await put(filesystem_driver(tmp_path), "p", k=b"1")


async def test_compaction_gives_a_damaged_value_no_good_sum(tmp_path: Path) -> None:
    async with opened(tmp_path) as driver:
        await put(driver, "p", precious=b'{"balance":1000}')
        (path,) = logs(tmp_path)
        with path.open("r+b") as file:
            file.seek(file.read().index(b"1000"))
            file.write(b"9")
        for _ in range(3):  # large enough to be compacted
            await put(driver, "p", other=b'"%s"' % (b"x" * 60_000))
        await driver._run(lambda: None)  # whatever is left to do was asked for before
    async with opened(tmp_path) as driver:
        with pytest.raises(CorruptRecordError):
            await driver.get([Key("p", "precious")])


async def test_a_write_that_could_neither_be_synced_nor_mended_is_not_reported_as_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(fd: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    async with create_persistence(filesystem_driver(tmp_path)) as p:
        await p.sessions.add_message("s", {"n": 0})
        with monkeypatch.context() as patch:
            patch.setattr(log_module, "_sync_file", broken)
            with pytest.raises((UnavailableError, OutcomeUnknownError)):
                await p.sessions.add_message("s", {"n": 1}, timeout=1)
        await p.sessions.add_message("s", {"n": 2})
        stored = [message["n"] for message in await p.sessions.get_messages("s")]
        assert stored in ([0, 2], [0, 1, 2])


async def test_a_purge_leaves_nothing_of_a_killed_compaction(tmp_path: Path) -> None:
    async with opened(tmp_path) as driver:
        await put(driver, "p", k=b"1")
        (path,) = logs(tmp_path)
        path.with_suffix(".new").write_bytes(path.read_bytes())
        await driver.purge("p", "", None)
        assert not path.with_suffix(".new").exists()


def keep_committing(path: Path, seed: int, pipe: Connection) -> None:
    """Commit one Write after another to three partitions, and tell which are acknowledged."""

    async def main() -> None:
        chance = random.Random(seed)
        async with opened(path) as driver:
            for number in count(1):
                value = base64.b16encode(chance.randbytes(chance.choice((10, 1_000, 40_000))))
                writes = [
                    Write(
                        name,
                        (
                            *(Put(key, b'"%d %b"' % (number, value)) for key in "abc"),
                            Put(f"log/{seed:03}/{number:06}", b"1", ABSENT),
                        ),
                        chance.getrandbits(60) + 1,
                    )
                    for name in PARTITIONS
                ]
                pipe.send((number, await driver.commit(writes)))

    asyncio.run(main())


async def test_what_a_killed_writer_had_acknowledged_is_whole(tmp_path: Path) -> None:
    chance = random.Random(0)
    logged: dict[str, int] = dict.fromkeys(PARTITIONS, 0)
    async with opened(tmp_path) as driver:
        for seed in range(60):
            here, there = processes.Pipe(duplex=False)
            child = processes.Process(target=keep_committing, args=(tmp_path, seed, there), daemon=True)
            child.start()
            there.close()
            acknowledged = 0
            for _ in range(chance.randint(1, 8)):
                acknowledged, outcomes = here.recv()
                assert outcomes == [True] * len(PARTITIONS)
            await asyncio.sleep(chance.uniform(0, 0.004))
            child.kill()
            with suppress(EOFError):
                while True:
                    acknowledged, outcomes = here.recv()
            child.join()
            here.close()
            for name in PARTITIONS:
                found = await content(driver, name)
                log = [key for key in found if key.startswith(f"log/{seed:03}/")]
                assert acknowledged <= len(log) <= acknowledged + 1
                assert log == [f"log/{seed:03}/{number:06}" for number in range(1, len(log) + 1)]
                logged[name] += len(log)
                assert len(found) == logged[name] + 3 * (logged[name] > 0)
                if log:
                    assert found["a"] == found["b"] == found["c"]
                    assert found["a"].startswith(b'"%d ' % len(log))
        await put(driver, "p", a=b"1")


# What somebody else may have put there.


async def test_no_link_leads_a_compaction_to_a_file_that_is_none_of_ours(tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.write_text("precious")
    async with opened(tmp_path / "store") as driver:
        await put(driver, "p", a=b"1")
        (log,) = logs(tmp_path / "store")
        log.with_suffix(".new").symlink_to(other)
        for _ in range(60):
            await put(driver, "p", a=b"x" * 8_000)
        assert log.stat().st_size < 60 * 8_000
        assert await content(driver) == {"a": b"x" * 8_000}
    assert other.read_text() == "precious"


async def test_no_link_leads_a_write_to_a_file_that_is_none_of_ours(tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.write_text("precious, and without a newline")
    async with opened(tmp_path / "store") as driver:
        await put(driver, "p", a=b"1")
    (log,) = logs(tmp_path / "store")
    log.unlink()
    log.symlink_to(other)
    async with opened(tmp_path / "store") as driver:
        with pytest.raises(ConfigurationError, match="symbolic link"):
            await put(driver, "p", a=b"2")
    assert other.read_text() == "precious, and without a newline"
