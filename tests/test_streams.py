"""Streams of parts: each index once, read from anywhere, ended, limited, expired, deleted; and their lock."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import pytest
from faulty_driver import FaultyDriver, RecordingDriver

from persistence import (
    ConflictError,
    CorruptRecordError,
    InvalidValueError,
    OutcomeUnknownError,
    Persistence,
    UnavailableError,
    create_persistence,
)
from persistence.compat import ResumableStreamEventStore
from persistence.driver import Delete, Entry, Key, Put, Write
from persistence.drivers.memory import MemoryDriver
from persistence.log import FORGET_SECONDS
from persistence.streams import StreamMeta, Streams
from persistence.testing import MakeDriver

DAY = 86_400_001
NOTHING = StreamMeta(next_index=0, completed=False, updated_at=None, size_bytes=0, expires_at=None)


def text(number: int) -> dict[str, Any]:
    return {"type": "text-delta", "text": f"word {number} "}


async def fill(p: Persistence, count: int, stream: str = "s", **options: Any) -> list[dict[str, Any]]:
    parts = [text(number) for number in range(count)]
    for index, part in enumerate(parts):
        await p.streams.append(stream, index, part, **options)
    return parts


async def keys(p: Persistence, partition: str = "stream/s") -> list[str]:
    return [
        entry.key
        async for entries in p._store.coalescer.pages(partition, "", None, limit=500)
        for entry in entries
    ]


class Clock:
    def __init__(self) -> None:
        self.now = 1_000_000

    def __call__(self) -> int:
        return self.now


# ---- on every engine


async def test_what_was_appended_is_read_from_anywhere(p: Persistence) -> None:
    assert await p.streams.get_parts("s") == []
    assert await p.streams.get_meta("s") == NOTHING
    parts = await fill(p, 12)
    assert await p.streams.get_parts("s") == parts
    assert await p.streams.get_parts("s", 7) == parts[7:]
    assert await p.streams.get_parts("s", 12) == []
    assert await p.streams.get_parts("s", 3, limit=4) == parts[3:7]
    assert await p.streams.get_parts("s", 3, limit=0) == []
    with pytest.raises(InvalidValueError, match="the stream has 12 parts"):
        await p.streams.get_parts("s", 13)
    meta = await p.streams.get_meta("s")
    assert (meta.next_index, meta.completed, meta.expires_at) == (12, False, None)
    assert meta.updated_at is not None


async def test_one_process_reads_what_another_appends(make_driver: MakeDriver) -> None:
    async with create_persistence(make_driver()) as writer, create_persistence(make_driver()) as reader:
        seen: list[Any] = []
        parts = []
        for index in range(30):
            parts.append(text(index))
            await writer.streams.append("s", index, parts[-1])
            if index % 7 == 0:
                seen += await reader.streams.get_parts("s", len(seen))
                assert seen == parts
        await writer.streams.append("s", 30, {"type": "finish"})
        assert (await reader.streams.get_meta("s")).completed


async def test_an_index_is_appended_once(make_driver: MakeDriver) -> None:
    async with create_persistence(make_driver()) as one, create_persistence(make_driver()) as two:

        async def produce(p: Persistence, name: str) -> int:
            mine = 0
            for index in range(20):
                try:
                    await p.streams.append("s", index, {"by": name, "index": index})
                except ConflictError:
                    continue
                mine += 1
            return mine

        won = await asyncio.gather(produce(one, "one"), produce(two, "two"), produce(two, "three"))
        parts = await one.streams.get_parts("s")
        assert [part["index"] for part in parts] == list(range(20))
        assert sum(won) == 20
        assert await two.streams.get_parts("s") == parts


async def test_parts_appended_at_once_keep_the_order_of_the_calls(p: Persistence) -> None:
    parts = [text(index) for index in range(50)]
    await asyncio.gather(*(p.streams.append("s", index, part) for index, part in enumerate(parts)))
    assert await p.streams.get_parts("s") == parts


async def test_a_wrong_index_is_refused_and_changes_nothing(p: Persistence) -> None:
    await fill(p, 3)
    for wrong in (0, 2, 4, 100):
        with pytest.raises(ConflictError, match=f"the next index is 3, not {wrong}"):
            await p.streams.append("s", wrong, text(9))
    await p.streams.append("s", 3, text(3))
    assert await p.streams.get_parts("s") == [text(index) for index in range(4)]


@pytest.mark.parametrize("kind", ["finish", "error"])
async def test_nothing_follows_the_last_part(p: Persistence, kind: str) -> None:
    await fill(p, 2)
    meta = await p.streams.append("s", 2, {"type": kind, "reason": "done"})
    assert meta.completed
    with pytest.raises(ConflictError, match="has ended"):
        await p.streams.append("s", 3, text(3))
    assert await p.streams.delete("s") == 3
    assert await p.streams.get_meta("s") == NOTHING
    await fill(p, 1)
    assert await p.streams.get_parts("s") == [text(0)]


async def test_limits_hold_and_name_themselves(p: Persistence) -> None:
    await fill(p, 2, max_events=2)
    with pytest.raises(InvalidValueError, match="max_events=2"):
        await p.streams.append("s", 2, text(2), max_events=2)
    size = (await p.streams.get_meta("s")).size_bytes
    with pytest.raises(InvalidValueError, match=f"max_bytes={size + 5}"):
        await p.streams.append("s", 2, text(2), max_bytes=size + 5)
    await p.streams.append("s", 2, 7, max_bytes=size + 1, max_events=3)
    assert await p.streams.get_parts("s") == [text(0), text(1), 7]


async def test_any_value_is_a_part_however_long(p: Persistence) -> None:
    parts = [None, "", 0, b"\x00\xff", {"text": "x" * 2_500_000}, (1, 2), {"type": ["finish"]}, "end"]
    for index, part in enumerate(parts):
        await p.streams.append("s", index, part)
    assert await p.streams.get_parts("s") == parts
    with pytest.raises(InvalidValueError):
        await p.streams.append("s", len(parts), object())
    assert await p.streams.delete("s") == len(parts)
    head, mark = await keys(p)
    assert head == "head"
    assert mark.endswith(f"/{len(parts):012d}")


async def test_long_streams_are_read_in_pages(p: Persistence) -> None:
    parts = [{"n": index} for index in range(1_101)]
    for first in range(0, len(parts), 100):
        await asyncio.gather(
            *(
                p.streams.append("s", first + index, part)
                for index, part in enumerate(parts[first : first + 100])
            )
        )
    assert await p.streams.get_parts("s") == parts
    assert await p.streams.get_parts("s", 1_099) == parts[1_099:]
    assert await p.streams.get_parts("s", 100, limit=900) == parts[100:1_000]


async def test_a_deleted_stream_begins_anew_for_everybody(make_driver: MakeDriver) -> None:
    async with create_persistence(make_driver()) as one, create_persistence(make_driver()) as two:
        await fill(one, 5)
        assert await two.streams.get_parts("s") == [text(index) for index in range(5)]
        assert await two.streams.delete("s") == 5
        assert await two.streams.delete("s") == 0
        with pytest.raises(ConflictError, match="the next index is 0, not 5"):
            await one.streams.append("s", 5, text(5))
        with pytest.raises(InvalidValueError, match="the stream has 0 parts"):
            await one.streams.get_parts("s", 5)
        await two.streams.append("s", 0, "new")
        assert await one.streams.get_parts("s") == ["new"]
        await one.streams.append("s", 1, "newer")
        assert await two.streams.get_parts("s", 1) == ["newer"]


async def test_any_text_is_a_stream_id(p: Persistence) -> None:
    ids = ["", "0", "null", "../x", "a/b", "a:b", "{t}", "\x00", "\N{WAVING HAND SIGN}", "S", "s", "x" * 600]
    for id in ids:
        await p.streams.append(id, 0, id)
    for id in ids:
        assert await p.streams.get_parts(id) == [id]


async def test_only_one_holds_the_lock(make_driver: MakeDriver) -> None:
    async with create_persistence(make_driver()) as one, create_persistence(make_driver()) as two:
        taken = await asyncio.gather(*(p.streams.acquire_continue_lock("s") for p in (one, two) * 8))
        (token,) = [token for token in taken if token is not None]
        assert not await two.streams.release_continue_lock("s", "another")
        assert not await two.streams.renew_continue_lock("s", "another")
        assert await two.streams.renew_continue_lock("s", token)
        assert await one.streams.release_continue_lock("s", token)
        assert not await one.streams.release_continue_lock("s", token)
        assert not await one.streams.renew_continue_lock("s", token)
        assert await two.streams.acquire_continue_lock("s") not in (None, token)


async def test_a_lease_ends_by_itself(make_driver: MakeDriver) -> None:
    clock = Clock()
    async with create_persistence(make_driver(), clock=clock) as p:
        first = await p.streams.acquire_continue_lock("s", lease_seconds=2)
        assert first is not None
        clock.now += 1_500
        assert await p.streams.renew_continue_lock("s", first, lease_seconds=2)
        clock.now += 1_500
        assert await p.streams.acquire_continue_lock("s") is None
        clock.now += 500
        second = await p.streams.acquire_continue_lock("s")
        assert second is not None
        assert not await p.streams.renew_continue_lock("s", first)
        assert not await p.streams.release_continue_lock("s", first)
        clock.now += 31_000
        await p.repair()
        assert await keys(p) == []


async def test_a_stream_goes_some_time_after_its_last_part(make_driver: MakeDriver) -> None:
    clock = Clock()
    async with (
        create_persistence(make_driver(), clock=clock) as p,
        create_persistence(make_driver(), clock=clock) as q,
    ):
        await fill(p, 3, ttl_seconds=10)
        assert (await p.streams.get_meta("s")).expires_at == clock.now + 10_000
        clock.now += 9_000
        await p.streams.append("s", 3, text(3))  # it slides on, with the same time to live
        clock.now += 9_999
        assert await p.streams.delete_expired() == 0
        assert len(await q.streams.get_parts("s")) == 4
        clock.now += 1
        assert await q.streams.get_parts("s") == []
        assert await p.streams.get_meta("s") == NOTHING
        with pytest.raises(ConflictError, match="the next index is 0"):
            await q.streams.append("s", 4, text(4))
        await q.streams.append("s", 0, "anew")
        assert await p.streams.get_parts("s") == ["anew"]
        assert len(await keys(p)) == 3  # with the mark of the life before
        await p.streams.append("s", 1, "for an hour", ttl_seconds=3_600)
        clock.now += 3_600_000
        assert await q.streams.delete_expired() == 1
        assert await q.streams.delete_expired() == 0
        assert len(await keys(p)) == 3
        clock.now += 7_200_000
        await p.streams.delete_expired()
        assert await keys(p, "index/deadlines") == []
        assert (await p.repair()).tombstones_removed == 0
        clock.now += DAY
        assert (await p.repair()).tombstones_removed == 2
        assert await keys(p) == []


async def test_repair_removes_expired_streams_and_what_a_killed_delete_left(
    make_driver: MakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    async with create_persistence(make_driver(), clock=clock) as p:
        await fill(p, 2, "expired", ttl_seconds=1)
        await fill(p, 2, "kept")
        await fill(p, 600, "half")
        with monkeypatch.context() as patch:
            patch.setattr(Streams, "_purge", unavailable)
            with pytest.raises(OutcomeUnknownError):
                await p.streams.delete("half")
        assert await p.streams.get_meta("half") == NOTHING
        clock.now += 2_000
        for _ in range(2):
            report = await p.repair(dry_run=True)
            assert (report.streams_expired, report.streams_removed, report.corrupt_count) == (1, 1, 0)
            assert len(await keys(p, "stream/half")) == 602
        report = await p.repair()
        assert (report.streams_expired, report.streams_removed) == (1, 1)
        assert len(await keys(p, "stream/half")) == len(await keys(p, "stream/expired")) == 2
        await fill(p, 1, "half")
        clock.now += DAY
        assert (await p.repair()).tombstones_removed == 2
        assert len(await keys(p, "stream/half")) == 2
        assert await keys(p, "stream/expired") == []
        assert len(await keys(p, "stream/kept")) == 3


async def unavailable(*_: object) -> None:
    raise UnavailableError("no answer")


# ---- on memory, with what goes wrong


async def test_appends_take_one_round_trip_and_a_first_look_one_more() -> None:
    memory = MemoryDriver()
    writer, other = RecordingDriver(memory), RecordingDriver(memory)
    async with create_persistence(writer) as p, create_persistence(other) as q:
        writer.forget()
        other.forget()
        await fill(p, 10)
        assert writer.calls == ["commit"] * 10
        assert len(await q.streams.get_parts("s")) == 10
        assert sorted(other.calls[:2]) + other.calls[2:] == ["get", "scan", "scan"]
        other.forget()
        await q.streams.append("s", 10, text(10))
        assert other.calls == ["commit"]
        other.forget()
        assert await q.streams.get_parts("s", 9) == [text(9), text(10)]
        assert sorted(other.calls) == ["get", "scan", "scan"]  # all at once


async def test_long_parts_that_are_refused_leave_nothing() -> None:
    async with create_persistence(MemoryDriver()) as p:
        await fill(p, 1)
        long = "x" * 3_000_000
        with pytest.raises(ConflictError):
            await p.streams.append("s", 0, long)
        with pytest.raises(InvalidValueError):
            await p.streams.append("s", 1, long, max_bytes=1_000)
        assert len(await keys(p)) == 2


async def test_a_hole_is_an_error_and_not_an_end() -> None:
    async with create_persistence(MemoryDriver()) as p:
        await fill(p, 5)
        part = (await keys(p))[3]
        await p._store.coalescer.purge("stream/s", part, f"{part}!")
        with pytest.raises(CorruptRecordError, match="part 2 of the stream is missing"):
            await p.streams.get_parts("s")
        assert await p.streams.get_parts("s", 3) == [text(3), text(4)]
        await p._store.coalescer.purge("stream/s", "part/", None)
        with pytest.raises(CorruptRecordError, match="the stream has no parts"):
            await p.streams.get_parts("s")


@pytest.mark.parametrize("parts_anew", [0, 3])
async def test_a_writer_that_remembers_a_deleted_stream_is_refused(parts_anew: int) -> None:
    memory = MemoryDriver()
    async with create_persistence(memory) as p, create_persistence(memory) as q:
        await fill(p, 5)
        await q.streams.delete("s")
        await fill(q, parts_anew)
        with pytest.raises(ConflictError, match=f"the next index is {parts_anew}, not 5"):
            await p.streams.append("s", 5, "late")
        assert len(await q.streams.get_parts("s")) == parts_anew


@pytest.mark.parametrize("part", ["old", "x" * 2_000_000])
async def test_a_write_that_arrives_late_brings_no_deleted_stream_back(part: str) -> None:
    class Late(RecordingDriver):
        """Its first part is written twice: once it has taken long, and once the core has repeated it."""

        late: Sequence[Write] = ()

        async def apply(self, writes: Sequence[Write]) -> list[bool | None]:
            if not self.late and any(op.key == "head" for write in writes for op in write.ops):
                self.late = writes
                raise UnavailableError("no answer")
            return await super().apply(writes)

    driver = Late()
    async with create_persistence(driver) as p:
        await p.streams.append("s", 0, part)
        assert await p.streams.delete("s") == 1
        assert await driver.memory.commit(driver.late) == [False]
        assert await p.streams.get_parts("s") == []
        await p.streams.append("s", 0, "new")
        assert await p.streams.get_parts("s") == ["new"]


@pytest.mark.parametrize("old", ["old", "x" * 2_000_000])
@pytest.mark.parametrize("call", ["scan", "get"])
async def test_a_stream_that_begins_anew_while_it_is_read_is_read_anew(old: str, call: str) -> None:
    memory = MemoryDriver()
    driver = RecordingDriver(memory)
    async with create_persistence(memory) as q, create_persistence(driver) as p:
        for index in range(3):
            await q.streams.append("s", index, old)
        read = getattr(driver, call)
        calls = 0

        async def read_later(*args: Any, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == 2:  # the end was seen, and now the parts or their content are read
                await q.streams.delete("s")
                await q.streams.append("s", 0, "new")
            return await read(*args, **options)

        setattr(driver, call, read_later)
        found = await p.streams.get_parts("s")
        assert found == (["new"] if calls > 1 else [old] * 3)
        assert calls > 1 or (call, old) == ("get", "old")


async def test_long_content_that_is_missing_is_an_error() -> None:
    async with create_persistence(MemoryDriver()) as p:
        await p.streams.append("s", 0, "x" * 2_000_000)
        await p._store.coalescer.purge("stream/s", "chunk/", "chunk0")
        with pytest.raises(CorruptRecordError, match="part 0 of the stream is missing, or its content is"):
            await p.streams.get_parts("s")


async def test_parts_that_wait_for_each_other_do_not_expire_meanwhile() -> None:
    clock = Clock()

    class Slow(RecordingDriver):
        async def apply(self, writes: Sequence[Write]) -> list[bool | None]:
            clock.now += 100
            return await super().apply(writes)

    async with create_persistence(Slow(), clock=clock) as p:
        await asyncio.gather(*(p.streams.append("s", index, index, ttl_seconds=1) for index in range(50)))
        assert await p.streams.get_parts("s") == list(range(50))


async def test_a_stream_that_took_long_to_begin_is_swept_all_the_same() -> None:
    clock, memory = Clock(), MemoryDriver()

    class Slow(RecordingDriver):
        async def apply(self, writes: Sequence[Write]) -> list[bool | None]:
            if any(op.key == "head" for write in writes for op in write.ops):
                clock.now += 6_000
                assert await q.streams.delete_expired() == 0  # which takes the deadline with it
            return await super().apply(writes)

    async with (
        create_persistence(memory, clock=clock) as q,
        create_persistence(Slow(memory), clock=clock) as p,
    ):
        await p.streams.append("s", 0, "x", ttl_seconds=5)
        clock.now += 3 * 3_600_000
        assert await q.streams.delete_expired() == 1


async def test_a_lock_that_ended_can_be_taken_while_it_is_removed() -> None:
    clock = Clock()
    memory = MemoryDriver()
    driver = RecordingDriver(memory)
    async with create_persistence(driver, clock=clock) as p, create_persistence(memory, clock=clock) as q:
        await p.streams.acquire_continue_lock("s")
        clock.now += 40_000
        get = driver.get

        async def get_and_repair(keys: Sequence[Key]) -> list[Entry | None]:
            found = await get(keys)
            await q.repair()
            return found

        driver.get = get_and_repair  # type: ignore[method-assign]
        token = await p.streams.acquire_continue_lock("s")
        assert token is not None
        renewals = (p.streams.renew_continue_lock("s", token) for _ in range(4))
        assert await asyncio.gather(*renewals) == [True] * 4


async def test_a_stream_can_be_deleted_though_its_last_part_cannot_be_read() -> None:
    memory = MemoryDriver()
    async with create_persistence(memory) as p:
        await p.streams.append("s", 0, "x" * 2_000_000)
        await p.streams.append("s", 1, "y")
        last = (await keys(p))[-1]
        assert await memory.commit([Write("stream/s", (Put(last, b"{"),), 7)]) == [True]
        with pytest.raises(CorruptRecordError):
            await p.streams.get_meta("s")
        assert await p.streams.delete("s") == 2
        assert [key.split("/")[0] for key in await keys(p)] == ["head", "part"]  # and no chunks
        await p.streams.append("s", 0, "new")
        assert await p.streams.get_parts("s") == ["new"]


async def test_a_part_that_cannot_be_read_keeps_nobody_from_deleting_or_beginning_anew() -> None:
    clock, memory = Clock(), MemoryDriver()
    async with create_persistence(memory, clock=clock) as p:
        for stream in ("s", "t"):
            await p.streams.append(stream, 0, "x" * 2_000_000, ttl_seconds=1)
            await p.streams.append(stream, 1, "y")
            place = next(key for key in await keys(p, f"stream/{stream}") if key.startswith("part/"))
            assert await memory.commit([Write(f"stream/{stream}", (Put(place, b"{"),), 7)]) == [True]
        assert await p.streams.delete("s") == 2
        clock.now += 2_000
        await p.streams.append("t", 0, "new")
        assert await p.streams.get_parts("t") == ["new"]


async def test_who_remembers_for_too_long_looks_again(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = RecordingDriver()
    now = 0.0
    monkeypatch.setattr("persistence.streams.steady_seconds", lambda: now)
    async with create_persistence(driver) as p:
        await fill(p, 2)
        now = FORGET_SECONDS + 1
        driver.forget()
        await p.streams.append("s", 2, text(2))
        assert sorted(driver.calls[:-1]) == ["get", "scan"]
        driver.forget()
        await p.streams.append("s", 3, text(3))
        assert driver.calls == ["commit"]


@pytest.mark.parametrize("key", ["head", "lock", "part/"])
async def test_what_cannot_be_read_is_named_by_reads_and_by_repair(key: str) -> None:
    memory = MemoryDriver()
    async with create_persistence(memory) as p:
        await fill(p, 2)
        await p.streams.acquire_continue_lock("s")
        place = [one for one in await keys(p) if one.startswith(key)][-1]
        assert await memory.commit([Write("stream/s", (Put(place, b"{"),), 7)]) == [True]
        reading = p.streams.acquire_continue_lock if key == "lock" else p.streams.get_parts
        with pytest.raises(CorruptRecordError) as error:
            await reading("s")
        assert (error.value.partition, error.value.key) == ("stream/s", place)
        report = await p.repair()
        assert report.corrupt_count >= 1
        assert place in await keys(p)  # left as it is


@pytest.mark.parametrize("part", [None, b"{", b'{"f":2}'])
async def test_a_stream_whose_head_or_lock_cannot_be_read_can_be_deleted(part: bytes | None) -> None:
    memory = MemoryDriver()
    async with create_persistence(memory) as p, create_persistence(memory) as q:
        await fill(p, 2)
        await p.streams.delete("s")  # the mark of this life stays
        await fill(p, 3)
        await q.streams.get_meta("s")
        puts = [Put("head", b"{"), Put("lock", b"{")]
        if part is not None:
            puts.append(Put((await keys(p))[-1], part))
        assert await memory.commit([Write("stream/s", tuple(puts), 7)]) == [True]
        assert await q.streams.delete("s") == 3
        assert await q.streams.get_parts("s") == []
        assert await q.streams.delete("s") == 0
        assert (await q.repair()).corrupt == []
        assert await q.streams.acquire_continue_lock("s") is not None
        with pytest.raises(ConflictError):
            await p.streams.append("s", 3, text(3))  # which remembers the end that was
        await fill(p, 1)
        assert await q.streams.get_parts("s") == [text(0)]


async def test_bad_arguments_are_refused(p: Persistence) -> None:
    for bad in (-1, True, 1.0, "1"):
        with pytest.raises(InvalidValueError, match="index"):
            await p.streams.append("s", bad, text(0))  # type: ignore[arg-type]
        with pytest.raises(InvalidValueError, match="from_index"):
            await p.streams.get_parts("s", bad)  # type: ignore[arg-type]
    for option in ("max_events", "max_bytes", "ttl_seconds"):
        with pytest.raises(InvalidValueError, match=option):
            await p.streams.append("s", 0, text(0), **{option: 0})
    for huge in (10**12, 10**5_000):
        with pytest.raises(InvalidValueError, match="index"):
            await p.streams.append("s", huge, text(0))
    for token in (None, 7):
        with pytest.raises(InvalidValueError, match="token"):
            await p.streams.renew_continue_lock("s", token)  # type: ignore[arg-type]
    for lease in (0, -1, float("inf"), float("nan"), True, 10**5_000):
        with pytest.raises(InvalidValueError, match="lease_seconds"):
            await p.streams.acquire_continue_lock("s", lease_seconds=lease)
    assert await p.streams.get_meta("s") == NOTHING


# ---- the shape that the ancestor's callers know


async def test_the_event_store_of_the_ancestor(p: Persistence) -> None:
    store = ResumableStreamEventStore(p, max_events_per_stream=3, max_bytes_per_stream=1_000, ttl_seconds=60)
    assert await store.get_session_meta("s") == {"nextIndex": 0, "completed": False}
    await store.append("s", 0, text(0))
    await store.append("s", 1, {"type": "finish"})
    assert await store.get_parts("s", 1) == [{"type": "finish"}]
    meta = await store.get_session_meta("s")
    assert meta is not None
    assert (meta["nextIndex"], meta["completed"]) == (2, True)
    assert isinstance(meta["updatedAt"], int)
    with pytest.raises(ConflictError):
        await store.append("s", 2, text(2))
    for index in range(3):
        await store.append("t", index, text(index))
    with pytest.raises(InvalidValueError, match="max_events=3"):
        await store.append("t", 3, text(3))
    token = await store.acquire_continue_lock("s")
    assert token is not None
    assert await store.acquire_continue_lock("s") is None
    await store.release_continue_lock("s", "not mine")
    assert await store.acquire_continue_lock("s") is None
    await store.release_continue_lock("s", token)
    assert await store.acquire_continue_lock("s") is not None


# ---- a store that does not always answer


@pytest.mark.parametrize("seed", range(12))
async def test_what_was_acknowledged_is_there_once_whatever_fails(seed: int) -> None:
    """Two producers race on a stream, each going on from what the store says after an error."""
    memory = MemoryDriver()
    drivers = [FaultyDriver(memory, seed=seed * 2 + number, rate=0.3) for number in range(2)]
    length = 25
    acknowledged: dict[int, str] = {}

    async def produce(p: Persistence, name: str) -> None:
        index = 0
        while index < length:
            try:
                await p.streams.append("s", index, [name, index])
            except ConflictError:
                index = (await p.streams.get_meta("s")).next_index
            except (OutcomeUnknownError, UnavailableError):
                await asyncio.sleep(0)
            else:
                assert index not in acknowledged
                acknowledged[index] = name
                index += 1

    async with create_persistence(drivers[0]) as p, create_persistence(drivers[1]) as q:
        await asyncio.gather(produce(p, "p"), produce(q, "q"))
        for driver in drivers:
            await driver.settle()
        parts = await p.streams.get_parts("s")
        assert [index for _, index in parts] == list(range(length))
        assert all(parts[index][0] == name for index, name in acknowledged.items())
        assert await q.streams.get_parts("s") == parts
        assert (await p.repair()).streams_removed == 0


@pytest.mark.parametrize("seed", range(16))
async def test_deletes_and_repairs_take_nothing_that_comes_after_them(seed: int) -> None:
    """Two producers, a deleter and a reader; what was acknowledged after the last delete began is there."""
    memory = MemoryDriver()
    rate = 0.15 if seed % 2 else 0.0
    drivers = [FaultyDriver(memory, seed=seed * 3 + number, rate=rate) for number in range(3)]
    chance = random.Random(seed)
    deleted = 0.0  # when the last delete was over
    acknowledged: list[tuple[float, int, str]] = []
    loop = asyncio.get_running_loop()

    async def produce(p: Persistence, name: str) -> None:
        index = 0
        for turn in range(60):
            begun = loop.time()
            value = f"{name}-{turn}"
            try:
                meta = await p.streams.append("s", index, [index, value], ttl_seconds=60)
            except ConflictError:
                index = (await p.streams.get_meta("s")).next_index
            except (OutcomeUnknownError, UnavailableError):
                pass
            else:
                assert meta.next_index == index + 1
                acknowledged.append((begun, index, value))
                index += 1
            if chance.random() < 0.3:
                await asyncio.sleep(0)

    async def look_after(p: Persistence) -> None:
        nonlocal deleted
        for _ in range(25):
            for call in chance.sample([p.streams.delete, p.streams.get_parts, p.streams.get_meta, None], 3):
                with suppress(OutcomeUnknownError, UnavailableError):
                    if call is None:
                        assert (await p.repair()).corrupt_count == 0
                    else:
                        found = await call("s")
                        if isinstance(found, list):
                            assert [index for index, _ in found] == list(range(len(found)))
                if call == p.streams.delete:
                    deleted = loop.time()
                await asyncio.sleep(chance.choice((0, 0, 0.001)))

    async with (
        create_persistence(drivers[0]) as p,
        create_persistence(drivers[1]) as q,
        create_persistence(drivers[2]) as r,
    ):
        await asyncio.gather(produce(p, "p"), produce(q, "q"), look_after(r))
        for driver in drivers:
            await driver.settle()
        parts = await q.streams.get_parts("s")
        assert parts == await r.streams.get_parts("s")
        assert [index for index, _ in parts] == list(range(len(parts)))
        assert len({value for _, value in parts}) == len(parts)
        for begun, index, value in acknowledged:
            if begun > deleted:
                assert parts[index] == [index, value]
        await r.repair()
        left = [key for key in await keys(r) if key.startswith("part/")]
        lives = {key.split("/")[1] for key in left}
        assert len(left) == len(parts) + len(lives) - bool(parts)  # and a mark for each life that is over


async def test_a_clock_that_is_behind_shortens_no_life(make_driver: MakeDriver) -> None:
    ahead, behind = Clock(), Clock()
    behind.now -= 60_000
    async with (
        create_persistence(make_driver(), clock=ahead) as p,
        create_persistence(make_driver(), clock=behind) as q,
    ):
        await p.streams.append("s", 0, "a", ttl_seconds=30)
        meta = await q.streams.append("s", 1, "b")
        assert meta.updated_at == ahead.now
        assert await p.streams.get_parts("s") == ["a", "b"]
        await p.streams.append("s", 2, "c")


async def test_what_begins_anew_takes_the_long_parts_of_the_life_before_along() -> None:
    clock = Clock()
    async with create_persistence(MemoryDriver(), clock=clock) as p:
        for _ in range(3):
            await p.streams.append("s", 0, "x" * 2_000_000, ttl_seconds=1)
            clock.now += 2_000
        assert await p.streams.delete_expired() == 1
        assert not [key for key in await keys(p) if key.startswith("chunk/")]


async def test_a_stream_that_went_on_after_its_deadline_was_noted_goes_at_a_later_one() -> None:
    now, hour = 1_700_000_000_000, 3_600_000
    async with create_persistence(MemoryDriver(), clock=lambda: now) as p:
        await p.streams.append("s", 0, {}, ttl_seconds=7_200)
        now += hour + hour // 2
        await p.streams.append("s", 1, {})
        now += hour
        assert await p.streams.delete_expired() == 0  # which takes the first deadline with it
        now += hour
        assert await p.streams.delete_expired() == 1


async def test_an_end_that_cannot_be_read_does_not_keep_repair_from_the_rest_of_a_stream() -> None:
    clock, memory = Clock(), MemoryDriver()
    async with create_persistence(memory, clock=clock) as p:
        for _ in range(2):
            await fill(p, 3)
            await p.streams.delete("s")
        mark = (await keys(p))[1]
        assert await memory.commit([Write("stream/s", (Put(mark, b"{"),), 7)]) == [True]
        clock.now += 25 * 3_600_000
        report = await p.repair()
        assert (report.corrupt, report.tombstones_removed) == ([], 1)
        assert await keys(p) == [mark]  # as young as one just put
        clock.now += 25 * 3_600_000
        await p.repair()
        assert await keys(p) == []


class Forgetful(MemoryDriver):
    may_lose = True


async def test_a_part_that_the_store_has_lost_leaves_no_hole() -> None:
    store = Forgetful()
    async with create_persistence(store) as p, create_persistence(store) as q:
        await fill(p, 4)
        lost = [Delete(key) for key in await keys(p) if key.endswith(("/000000000002", "/000000000003"))]
        assert await store.commit([Write("stream/s", tuple(lost), 5)]) == [True]
        with pytest.raises(ConflictError, match="the next index is 2"):
            await p.streams.append("s", 4, text(4))
        await p.streams.append("s", 2, text(2))
        await p.streams.append("s", 3, text(3))
        assert await q.streams.get_parts("s") == [text(n) for n in range(4)]
