"""Checkpoints where others interfere at the worst moment, and at the edges of what they promise."""

from __future__ import annotations

import asyncio
import os
from datetime import UTC, datetime
from enum import Enum
from typing import Any

import pytest
from faulty_driver import RecordingDriver

from persistence import (
    ConflictError,
    CorruptRecordError,
    InvalidKeyError,
    InvalidValueError,
    NotFoundError,
    Persistence,
    SessionRecord,
    create_persistence,
)
from persistence.driver import Delete, Entry, Key, Page, Put, Write
from persistence.drivers.memory import MemoryDriver
from persistence.numbering import BLOCKS
from persistence.testing import MakeDriver
from persistence.thread_reader import piece_key

STORED = pytest.mark.parametrize("make_driver", ["memory", "sqlite"], indirect=True)


def state(n: int, of: str = "") -> dict[str, Any]:
    return {"messages": [{"i": i, "text": f"{of}{i} " * 100} for i in range(n)]}


async def keys(p: Persistence, partition: str) -> list[str]:
    return [e.key for e in (await p._store.coalescer.scan(partition, "", None, limit=4000)).entries]


class Hooked(MemoryDriver):
    """Calls what is in `hooks`, once, before (or after) the call that it is named after."""

    def __init__(self) -> None:
        super().__init__()
        self.hooks: dict[str, Any] = {}

    async def _at(self, name: str) -> None:
        hook = self.hooks.pop(name, None)
        if hook is not None:
            await hook()

    async def scan(
        self, partition: str, start: str, end: str | None, *, limit: int, reverse: bool = False
    ) -> Page:
        name = f"scan {partition} {start.partition('/')[0]}"
        await self._at(name)
        page = await super().scan(partition, start, end, limit=limit, reverse=reverse)
        await self._at(f"after {name}")
        return page

    async def purge(self, partition: str, start: str, end: str | None) -> None:
        await self._at(f"purge {partition}")
        await super().purge(partition, start, end)

    async def commit(self, writes: Any) -> Any:
        for write in writes:
            await self._at(f"commit {write.partition} {write.ops[-1].key.partition('/')[0]}")
        return await super().commit(writes)


@STORED
@pytest.mark.parametrize("new", [{"blobs": 80}, {"messages": 600}])
async def test_a_large_put_of_a_writer_that_was_overtaken_removes_nothing_of_others(
    make_driver: MakeDriver, new: dict[str, int]
) -> None:
    async with create_persistence(make_driver()) as p, create_persistence(make_driver()) as q:
        await p.checkpoints.put("t", state(1))
        theirs = await q.checkpoints.put("t", state(20, "q"))
        large = {"b": [os.urandom(30_000).hex() for _ in range(80)]} if "blobs" in new else state(600, "p")
        await p.checkpoints.put("t", large)
        async with create_persistence(make_driver()) as other:
            assert await other.checkpoints.get("t", theirs.id) == state(20, "q")
            assert await other.checkpoints.get("t") == large


async def test_a_thread_that_goes_on_while_it_is_copied() -> None:
    driver = Hooked()
    async with create_persistence(driver) as p, create_persistence(driver) as q:
        await p.checkpoints.put("t", state(3))

        async def go_on() -> None:
            await q.checkpoints.put("t", state(5))

        driver.hooks["scan thread/t checkpoint"] = go_on
        await p.checkpoints.copy_thread("t", "u")
        await p.checkpoints.put("u", state(9, "other"))
        for meta in (await p.checkpoints.list("u"))[1:]:
            assert await p.checkpoints.get("u", meta.id) == await p.checkpoints.get("t", meta.id)


async def test_a_thread_that_is_deleted_or_pruned_while_it_is_copied() -> None:
    driver = Hooked()
    async with create_persistence(driver) as p, create_persistence(driver) as q:
        for i in range(3):
            await p.checkpoints.put("t", state(4, str(i)))
        driver.hooks["scan thread/t piece"] = lambda: q.checkpoints.prune("t", keep_last=1)
        assert await p.checkpoints.copy_thread("t", "u") == 1
        assert await p.checkpoints.get("u") == state(4, "2")
        assert len([key for key in await keys(p, "thread/u") if key.startswith("checkpoint/")]) == 1
        driver.hooks["scan thread/t checkpoint"] = lambda: q.checkpoints.delete("t")
        with pytest.raises(NotFoundError):
            await p.checkpoints.copy_thread("t", "v")


@pytest.mark.parametrize("how", ["deleted", "expired", "emptied"])
async def test_a_small_thread_that_was_there_is_no_target_of_a_copy(how: str) -> None:
    async with create_persistence(MemoryDriver()) as p:
        c = p.checkpoints
        await c.put("t", {"a": 1})
        meta = await c.put("u", {"old": 1}, expires_at=1 if how == "expired" else None)
        if how != "expired":
            await c.delete("u", meta.id if how == "emptied" else None)
        with pytest.raises(ConflictError):
            await c.copy_thread("t", "u")


async def test_a_thread_that_lacks_a_piece_is_not_copied() -> None:
    driver = MemoryDriver()
    async with create_persistence(driver) as p:
        await p.checkpoints.put("t", state(200))
        piece = next(key for key in await keys(p, "thread/t") if key.startswith("piece/"))
        await driver.purge("thread/t", piece, piece + "!")
        with pytest.raises(CorruptRecordError, match="missing"):
            await p.checkpoints.copy_thread("t", "u")
        assert await p.checkpoints.list("u") == []


async def test_who_goes_on_while_what_went_before_is_cleared_away_is_not_overwritten() -> None:
    driver = Hooked()
    async with create_persistence(driver) as p, create_persistence(driver) as q:
        await p.checkpoints.put("t", state(200, "old"), expires_at=1)
        driver.hooks["purge thread/t"] = lambda: q.checkpoints.put("t", state(200, "q"))
        await p.checkpoints.put("t", state(200, "p"))
        assert driver.hooks == {}
        assert await p.checkpoints.get("t") == state(200, "q")
        assert len(await p.checkpoints.list("t")) == 2


async def test_what_was_before_a_thread_began_anew_is_not_read_while_it_is_cleared_away() -> None:
    driver = Hooked()
    async with create_persistence(driver) as p, create_persistence(driver) as q:
        old = await p.checkpoints.put("t", state(200, "old"), expires_at=1)
        seen: list[Any] = []

        async def read() -> None:
            seen.append(await q.checkpoints.get("t", old.id))

        driver.hooks["purge thread/t"] = read
        await p.checkpoints.put("t", state(200, "p"))
        assert seen == [None]


async def test_who_remembers_a_forgotten_thread_mixes_nothing_of_it_into_another() -> None:
    driver, now = MemoryDriver(), 1_700_000_000_000
    async with create_persistence(driver, clock=lambda: now) as p, create_persistence(driver) as q:
        await p.checkpoints.put("t", state(200, "old"))
        assert await q.checkpoints.get("t") == state(200, "old")
        await p.checkpoints.delete("t")
        now += 8 * 86_400_000
        assert (await p.repair()).tombstones_removed == 1
        first = await p.checkpoints.put("t", state(200, "new"))
        await p.checkpoints.put("t", state(300, "newer"))
        assert await q.checkpoints.get("t", first.id) == state(200, "new")


async def test_who_remembers_pieces_that_another_has_removed_puts_them_anew() -> None:
    driver = MemoryDriver()
    async with create_persistence(driver) as p, create_persistence(driver) as q:
        await p.checkpoints.put("t", state(200, "a"))
        await q.checkpoints.put("t", state(200, "b"))
        await q.checkpoints.prune("t", keep_last=1)
        await p.checkpoints.put("t", state(200, "a"))
        assert await q.checkpoints.get("t") == state(200, "a")


async def test_a_put_while_labels_are_set_stays_the_latest() -> None:
    driver = Hooked()
    async with create_persistence(driver) as p, create_persistence(driver) as q:
        meta = await p.checkpoints.put("t", {"n": 1})
        driver.hooks["commit thread/t checkpoint"] = lambda: q.checkpoints.put("t", {"n": 2})
        await p.checkpoints.set_labels("t", meta.id, ["good"])
        assert await p.checkpoints.get("t") == {"n": 2}
        assert [list(one.labels) for one in await p.checkpoints.list("t")] == [[], ["good"]]


async def test_what_an_unreadable_checkpoint_may_need_is_kept_for_it() -> None:
    driver = MemoryDriver()
    async with create_persistence(driver) as p:
        first = await p.checkpoints.put("t", state(200))
        second = await p.checkpoints.put("t", state(200) | {"second": True})
        await p.checkpoints.put("t", {"small": True})
        key = Key("thread/t", f"checkpoint/{second.id}")
        [entry] = await driver.get([key])
        assert entry is not None
        newer = entry.value.replace(b'"f":1', b'"f":2', 1)
        for value in (newer, entry.value):
            await driver.commit([Write(key.partition, (Put(key.key, value),), entry.version + 1)])
            if value is newer:
                await p.checkpoints.delete("t", first.id)
                assert (await p.repair()).pieces_removed == 0
        async with create_persistence(driver) as q:
            assert await q.checkpoints.get("t", second.id) == state(200) | {"second": True}


async def test_repair_beside_a_put_that_begins_a_thread_leaves_it_listed() -> None:
    driver = Hooked()
    async with create_persistence(driver) as p, create_persistence(driver) as q:
        driver.hooks["commit thread/t checkpoint"] = q.repair
        await p.checkpoints.put("t", {"a": 1})
        assert driver.hooks == {}
        assert [thread.thread_id for thread in await p.checkpoints.list_threads()] == ["t"]


async def test_a_thread_that_begins_anew_while_repair_forgets_it_stays() -> None:
    driver, now = Hooked(), 1_700_000_000_000
    async with create_persistence(driver, clock=lambda: now) as p, create_persistence(driver) as q:
        await p.checkpoints.put("t", state(3))
        await p.checkpoints.delete("t")
        now += 8 * 86_400_000
        driver.hooks["commit thread/t head"] = lambda: q.checkpoints.put("t", {"anew": True})
        await p.repair()
        assert driver.hooks == {}
        assert await p.checkpoints.get("t") == {"anew": True}


async def test_a_put_while_repair_frees_a_thread_stays() -> None:
    driver = Hooked()
    async with create_persistence(driver) as p, create_persistence(driver) as q:
        await p.checkpoints.put("t", state(3))
        await driver.commit([Write("thread/t", (Put(piece_key(999), b"0"),), 5)])  # which nothing needs
        driver.hooks["commit thread/t head"] = lambda: q.checkpoints.put("t", state(5))
        await p.repair()
        assert driver.hooks == {}
        assert await p.checkpoints.get("t") == state(5)
        assert len(await p.checkpoints.list("t")) == 2


async def test_what_is_removed_while_repair_reads_a_thread_is_not_taken_for_missing() -> None:
    driver = Hooked()
    async with create_persistence(driver) as p, create_persistence(driver) as q:
        for of in "ab":
            await p.checkpoints.put("t", state(3, of))
        driver.hooks["scan thread/t piece"] = lambda: q.checkpoints.prune("t", keep_last=1)
        assert (await p.repair()).corrupt == []
        assert driver.hooks == {}


async def test_repair_leaves_a_checkpoint_listed_that_cannot_be_read() -> None:
    driver, now = MemoryDriver(), 1_800_000_000_000
    async with create_persistence(driver, clock=lambda: now) as p:
        step = {"agent_id": "a", "session_id": "s", "agent_type": "coder", "name": "step", "state": {}}
        id, other = [await p.checkpoints.store_checkpoint(step) for _ in range(2)]
        key = f"checkpoint/{id.partition(':')[0]}"
        assert key in await keys(p, "named/a")
        await driver.commit([Write("named/a", (Put(key, b"junk"),), 5)])
        now += 2 * 3_600_000
        report = await p.repair()
        assert (report.hints_removed, report.corrupt_count) == (0, 1)
        assert [one.id for one in await p.checkpoints.list_checkpoints(agent_id="a")] == [other]


async def test_a_thread_is_forgotten_a_week_after_its_last_checkpoint_went_however_old_it_is() -> None:
    driver, now = MemoryDriver(), 1_700_000_000_000
    async with create_persistence(driver, clock=lambda: now) as p:
        meta = await p.checkpoints.put("t", state(3))
        now += 8 * 86_400_000
        await p.checkpoints.delete("t", meta.id)
        assert (await p.repair()).tombstones_removed == 0
        now += 8 * 86_400_000
        assert (await p.repair()).tombstones_removed == 1


async def test_a_listing_passes_by_a_thread_whose_first_put_was_killed_and_ends_where_it_ends() -> None:
    driver, now = MemoryDriver(), 1_700_000_000_000
    async with create_persistence(driver, clock=lambda: now) as p:
        for n in range(6):
            now += 1
            await p.checkpoints.put(f"t{n}", n)
        await driver.purge("thread/t4", "!", None)  # its entry in the listing comes first
        cursor, pages = None, []
        for limit in (2, 2, 1):
            page = await p.checkpoints.list_threads(limit=limit, cursor=cursor)
            pages.append([thread.thread_id for thread in page])
            cursor = page.cursor
        assert (pages, cursor) == ([["t5", "t3"], ["t2", "t1"], ["t0"]], None)


async def test_a_dry_run_tells_what_a_repair_of_threads_does_and_changes_nothing() -> None:
    driver, now = MemoryDriver(), 1_700_000_000_000

    async def everything() -> list[list[Entry]]:
        names, _ = await driver.partitions(None, 100)
        return [(await driver.scan(name, "", None, limit=1000)).entries for name in names]

    async with create_persistence(driver, clock=lambda: now) as p:
        await p.checkpoints.put("expired", state(3), expires_at=now + 1)
        await p.checkpoints.put("spare", state(3))
        await driver.commit([Write("thread/spare", (Put(piece_key(999), b"0"),), 5)])  # which nothing needs
        await p.checkpoints.put("forgotten", 1)
        await p.checkpoints.delete("forgotten")
        await driver.purge("index/deadlines", "!", None)  # those are found without it
        now += 8 * 86_400_000
        before = await everything()
        foreseen = await p.repair(dry_run=True)
        assert (foreseen.threads_expired, foreseen.pieces_removed, foreseen.tombstones_removed) == (1, 1, 1)
        assert await everything() == before
        assert await p.repair() == foreseen
        assert await keys(p, "thread/expired") == ["head"]
        assert piece_key(999) not in await keys(p, "thread/spare")
        assert await keys(p, "thread/forgotten") == []
        assert await p.checkpoints.get("spare") == state(3)


async def test_a_thread_that_was_renewed_within_the_hour_goes_at_its_new_time() -> None:
    hour = 3_600_000
    now = start = 400_000 * hour
    async with create_persistence(MemoryDriver(), clock=lambda: now) as p:
        await p.checkpoints.put("t", {"n": 1}, expires_at=start + 2 * hour + 1)
        await p.checkpoints.put("t", {"n": 2}, expires_at=start + 3 * hour - 1)
        now = start + 2 * hour + 2
        assert await p.checkpoints.delete_expired() == 0  # which takes the first deadline with it
        now = start + 3 * hour
        assert await p.checkpoints.delete_expired() == 2


async def test_a_deadline_that_is_noted_while_its_hour_is_forgotten_comes() -> None:
    driver, hour = Hooked(), 3_600_000
    now = start = 400_000 * hour
    async with create_persistence(driver, clock=lambda: now) as p, create_persistence(driver) as q:
        await p.checkpoints.put("t", 1, expires_at=start + 1)
        now += 3 * hour
        forgets = f"commit index/deadlines {start // hour:012d}"
        driver.hooks[forgets] = lambda: q.checkpoints.put("u", 1, expires_at=start + 2)
        assert await p.checkpoints.delete_expired() == 1
        assert driver.hooks == {}
        assert await p.checkpoints.delete_expired() == 1


async def test_repair_beside_a_copy_removes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("persistence.thread_repair._UPLOAD_PAUSE", 0.2)
    driver = Hooked()
    async with create_persistence(driver) as p, create_persistence(driver) as q:
        for i in range(5):
            await p.checkpoints.put("t", state(i))
        repairs: list[asyncio.Task[Any]] = []

        async def repair() -> None:
            repairs.append(asyncio.ensure_future(q.repair()))
            await asyncio.sleep(0.1)  # it has seen the copy, and waits whether it goes on

        driver.hooks["commit thread/u checkpoint"] = repair
        assert await p.checkpoints.copy_thread("t", "u") == 5
        (report,) = await asyncio.gather(*repairs)
        assert (report.uploads_ended, report.pieces_removed) == (0, 0)
        assert len(await p.checkpoints.list("u")) == 5


async def test_a_copy_that_somebody_gets_in_the_way_of_leaves_nothing() -> None:
    driver = Hooked()
    async with create_persistence(driver) as p, create_persistence(driver) as q:
        for i in range(5):
            await p.checkpoints.put("t", state(i))

        async def begin() -> None:
            await q.checkpoints.put("u", 1)

        driver.hooks["commit thread/u checkpoint"] = begin
        with pytest.raises(ConflictError):
            await p.checkpoints.copy_thread("t", "u")
        await asyncio.sleep(0.1)
        assert len([key for key in await keys(p, "thread/u") if key.startswith("checkpoint/")]) == 1


async def test_a_thread_that_expires_during_a_large_put() -> None:
    clock, driver = [10**12], Hooked()
    async with create_persistence(driver, clock=lambda: clock[0]) as p:
        await p.checkpoints.put("t", 1, expires_at=clock[0] + 1000)

        async def late() -> None:
            clock[0] += 2000

        driver.hooks["commit thread/t piece"] = late
        large = {"m": [os.urandom(40_000).hex() for _ in range(60)]}
        await p.checkpoints.put("t", large)
        assert await p.checkpoints.get("t") == large


async def test_a_renewed_expiry_is_not_forgotten() -> None:
    clock = [3_600_000 * 300_000]
    async with create_persistence(MemoryDriver(), clock=lambda: clock[0]) as p:
        await p.checkpoints.put("t", 1, expires_at=clock[0] + 60_000)
        await p.checkpoints.put("t", 2, expires_at=clock[0] + 600_000)
        clock[0] += 120_000
        assert await p.checkpoints.delete_expired() == 0
        clock[0] += 86_400_000
        assert await p.checkpoints.delete_expired() == 2


async def test_expired_threads_are_freed_behind_many_hours_of_sessions() -> None:
    clock, hour = [10**12], 3_600_000
    async with create_persistence(MemoryDriver(), clock=lambda: clock[0]) as p:
        for i in range(510):
            at = clock[0] + i * hour + 1
            await p.sessions.save_session(
                SessionRecord(session_id=str(i), image_id="i", container_id="c", expires_at=at)
            )
        await p.checkpoints.put("t", 1, expires_at=clock[0] + 510 * hour)
        clock[0] += 600 * hour
        assert await p.checkpoints.delete_expired() == 1


async def test_one_conflict_does_not_end_a_removal_that_takes_long(monkeypatch: pytest.MonkeyPatch) -> None:
    class Slow(MemoryDriver):
        removals = 0

        async def commit(self, writes: Any) -> Any:
            if any(isinstance(op, Delete) for op in writes[0].ops):
                self.removals += 1
                await asyncio.sleep(0.1)
                if self.removals == 4:  # somebody else is faster
                    (head,) = await self.get([Key("thread/t", "head")])
                    assert head is not None
                    await super().commit([Write("thread/t", (Put("head", head.value),), 7)])
            return await super().commit(writes)

    monkeypatch.setattr("persistence.coalescer.RETRY_SECONDS", 0.2)
    async with create_persistence(Slow()) as p:
        for n in range(801):
            await p.checkpoints.put("t", n, max_checkpoints_per_thread=None)
        assert (await p.checkpoints.prune("t", keep_last=1)).checkpoints == 800


async def test_one_conflict_does_not_end_a_put_that_takes_long(monkeypatch: pytest.MonkeyPatch) -> None:
    class Slow(MemoryDriver):
        uploaded = overtaken = False

        async def commit(self, writes: Any) -> Any:
            keys = [op.key.partition("/")[0] for op in writes[0].ops]
            if "piece" in keys:
                self.uploaded = True
                await asyncio.sleep(0.1)
            elif self.uploaded and not self.overtaken:
                self.overtaken = True
                await q.checkpoints.put("t", 2)
            return await super().commit(writes)

    monkeypatch.setattr("persistence.coalescer.RETRY_SECONDS", 0.2)
    driver = Slow()
    async with create_persistence(driver) as p, create_persistence(driver) as q:
        large = {"b": [os.urandom(30_000).hex() for _ in range(200)]}
        meta = await p.checkpoints.put("t", large)
        assert driver.overtaken
        assert meta.seq == 2
        assert await q.checkpoints.get("t") == large


async def test_pruning_keeps_a_latest_whose_entry_is_corrupt_but_which_can_be_read() -> None:
    driver = MemoryDriver()
    async with create_persistence(driver) as p:
        metas = [await p.checkpoints.put("t", i) for i in range(3)]
        await driver.commit([Write("thread/t", (Put(f"checkpoint/{metas[2].id}", b"junk"),), 5)])
        await p.checkpoints.prune("t", keep_last=1)
        assert await p.checkpoints.get("t") == 2


async def test_a_thread_of_which_nothing_can_be_read_is_not_taken_for_empty() -> None:
    driver = MemoryDriver()
    async with create_persistence(driver) as p:
        first, second = [await p.checkpoints.put("t", state(i)) for i in range(2)]
        await driver.commit([Write("thread/t", (Put(f"checkpoint/{first.id}", b"junk"),), 5)])
        await p.checkpoints.delete("t", second.id)
        for _ in range(2):
            for read in (
                p.checkpoints.get("t"),
                p.checkpoints.get_meta("t"),
                p.checkpoints.get("t", first.id),
            ):
                with pytest.raises(CorruptRecordError):
                    await read
            assert [meta.corrupt is not None for meta in await p.checkpoints.list("t")] == [True]
            assert [thread.thread_id for thread in await p.checkpoints.list_threads()] == ["t"]
            await p.repair()
        await p.checkpoints.put("t", 5)
        assert await p.checkpoints.get("t") == 5
        assert len(await p.checkpoints.list("t")) == 2
        assert await p.checkpoints.delete("t") == 2
        assert await p.checkpoints.get("t") is None


async def test_a_fork_with_bad_arguments_makes_no_thread() -> None:
    async with create_persistence(MemoryDriver()) as p:
        await p.checkpoints.put("t", 1)
        with pytest.raises(InvalidValueError, match="labels"):
            await p.checkpoints.fork("t", new_thread_id="u", labels="abc")
        assert await p.checkpoints.get_thread("u") is None
        for labels in (5, ["x", 5]):
            with pytest.raises((InvalidValueError, InvalidKeyError)):
                await p.checkpoints.put("t", 1, labels=labels)  # type: ignore[arg-type]


@STORED
async def test_of_named_checkpoints_of_one_time_the_last_comes_first(make_driver: MakeDriver) -> None:
    async with create_persistence(make_driver()) as p:
        for i in range(5):
            app = {"session_id": "s", "hostname": "h", "working_directory": "/", "state": i, "created_at": 5}
            await p.checkpoints.store_app_checkpoint(app)
        latest = await p.checkpoints.retrieve_latest_app_checkpoint()
        assert latest is not None
        assert latest.state == 4


async def test_the_latest_app_checkpoint_is_the_one_before_where_it_is_deleted_meanwhile(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    driver = MemoryDriver()
    async with create_persistence(driver) as p, create_persistence(driver) as q:
        app = {"session_id": "s", "hostname": "h", "working_directory": "/", "state": 1}
        first, second = [await p.checkpoints.store_app_checkpoint({**app, "created_at": n}) for n in (5, 6)]
        read, deleted = p.checkpoints.apps.read, [second]

        async def late(*of: Any) -> Any:
            while deleted:
                await q.checkpoints.delete_app_checkpoint(deleted.pop())
            return await read(*of)

        monkeypatch.setattr(p.checkpoints.apps, "read", late)
        latest = await p.checkpoints.retrieve_latest_app_checkpoint()
        assert latest is not None
        assert latest.id == first
        deleted.append(first)
        assert await p.checkpoints.retrieve_latest_app_checkpoint() is None


async def test_writers_that_overtake_each_other_leave_nothing_in_the_listings() -> None:
    driver = MemoryDriver()
    async with create_persistence(driver) as p, create_persistence(driver) as q:
        for i in range(6):
            one = {"agent_id": "a", "session_id": "s", "agent_type": "t", "name": "n", "state": i}
            await (p, q)[i % 2].checkpoints.store_checkpoint(one)
        assert len(await keys(p, "index/named-checkpoints")) == 6


async def test_a_member_of_an_enum_is_a_key_by_its_value() -> None:
    class Role(str, Enum):  # noqa: UP042 - a StrEnum shows itself by its value
        USER = "user"

    async with create_persistence(MemoryDriver()) as p:
        await p.checkpoints.put("t", {Role.USER: ["x" * 100] * 200})
        assert list(await p.checkpoints.get("t")) == ["user"]


async def test_a_copy_that_failed_can_be_made_again() -> None:
    driver = Hooked()
    async with create_persistence(driver) as p:
        await p.checkpoints.put("t", state(3))

        async def fail() -> None:
            raise RuntimeError

        driver.hooks["scan thread/t piece"] = fail
        with pytest.raises(RuntimeError):
            await p.checkpoints.copy_thread("t", "u")
        for _ in range(100):
            if all(key == "head" for key in await keys(p, "thread/u")):
                break
            await asyncio.sleep(0.01)
        assert await p.checkpoints.copy_thread("t", "u") == 1
        assert await p.checkpoints.get("u") == state(3)


async def test_a_time_without_a_zone_is_refused() -> None:
    local = datetime(2026, 1, 2)
    async with create_persistence(MemoryDriver()) as p:
        await p.checkpoints.put("t", 1)
        await p.sessions.save_session(SessionRecord(session_id="s", image_id="i", container_id="c"))
        for call in (
            lambda: p.checkpoints.put("t", 1, expires_at=local),
            lambda: p.checkpoints.put("t", 1, now=local),
            lambda: p.checkpoints.set_expiry("t", local),
            lambda: p.checkpoints.prune(older_than=local),
            lambda: p.sessions.set_expiry("s", local),
        ):
            with pytest.raises(InvalidValueError, match="time zone"):
                await call()
        at = datetime(2026, 1, 2, tzinfo=UTC)
        assert (await p.sessions.set_expiry("s", at)).expires_at == at.timestamp() * 1000


async def test_versions_and_cursors_of_other_kinds_are_refused() -> None:
    async with create_persistence(MemoryDriver()) as p:
        for version in (object(), b"x", float("nan"), True, "\ud800"):
            with pytest.raises((InvalidValueError, InvalidKeyError)):
                await p.checkpoints.put("t", 1, version=version)  # type: ignore[arg-type]
        for call in (
            p.checkpoints.list_threads,
            p.checkpoints.list_checkpoints,
            p.checkpoints.list_app_checkpoints,
        ):
            with pytest.raises(InvalidKeyError, match="cursor"):
                await call(cursor="x")


def agent(**fields: Any) -> dict[str, Any]:
    return {"agent_id": "a", "session_id": "s", "agent_type": "t", "name": "n", "state": 1, **fields}


def app(**fields: Any) -> dict[str, Any]:
    return {"session_id": "s", "hostname": "h", "working_directory": "/", "state": 1, **fields}


@STORED
async def test_named_checkpoints_are_pruned_and_put_only_after_what_is_expected(
    make_driver: MakeDriver,
) -> None:
    async with create_persistence(make_driver()) as p:
        c = p.checkpoints
        for store, prune, listed, one in (
            (c.store_checkpoint, c.prune_checkpoints, c.list_checkpoints, agent),
            (c.store_app_checkpoint, c.prune_app_checkpoints, c.list_app_checkpoints, app),
        ):
            first = await store(one(created_at=1), expected_latest=0)
            second = await store(one(created_at=2), expected_latest=first)
            other = await store(one(agent_id="b") if one is agent else one(session_id="b"))
            for wrong in (first, other, 0, "", "x"):
                with pytest.raises(ConflictError):
                    await store(one(), expected_latest=wrong)
            assert (await prune(older_than=2, dry_run=True)).checkpoints == 1
            assert (await prune(older_than=2)).checkpoints == 1
            assert [item.id for item in await listed()] == [other, second]
            await store(one())
            assert (await prune("s" if one is app else "a", keep_last=1)).checkpoints == 1
            assert len(await listed()) == 2
        assert await c.delete_session_checkpoints("s") == 1
        assert await c.delete_agent_checkpoints("a") == 1


@pytest.mark.parametrize("size", [1_000, 10_000, 30_000])
async def test_the_skeleton_stays_small_whatever_the_size_of_messages(size: int) -> None:
    driver = RecordingDriver()
    messages: list[Any] = []
    async with create_persistence(driver) as p:
        for i in range(120):
            messages.append({"role": "tool", "content": f"{i} ".ljust(size, "x")})
            driver.forget()
            await p.checkpoints.put("t", {"messages": messages})
            written = sum(len(op.value) for op in driver.commits[0][0].ops if isinstance(op, Put))
            assert written < size + 2_000


async def test_long_keys_are_no_part_of_the_skeleton() -> None:
    given = {f"{i:04d}".ljust(7000, "k"): ["v" * 100] * 90 for i in range(200)}
    async with create_persistence(MemoryDriver()) as p:
        await p.checkpoints.put("t", given)
        assert await p.checkpoints.get("t") == given


@STORED
async def test_nothing_is_left_of_a_deleted_thread_whose_lists_grew_in_turn(make_driver: MakeDriver) -> None:
    async with create_persistence(make_driver()) as p:
        lists: dict[str, list[str]] = {"a": [], "b": []}
        for i in range(12):
            for name, items in lists.items():
                items.append(f"{name}{i}".ljust(900, "x"))
                await p.checkpoints.put("t", lists)
        numbers = [int(key.removeprefix("piece/")) for key in await keys(p, "thread/t") if "piece/" in key]
        assert max(numbers) >= BLOCKS  # those of each list are together
        await p.checkpoints.delete("t")
        assert await keys(p, "thread/t") == ["head"]


async def test_a_thread_begun_anew_while_it_is_read_gets_none_of_the_old_pieces() -> None:
    driver, now = Hooked(), 1_800_000_000_000
    async with create_persistence(driver, clock=lambda: now) as p:
        await p.checkpoints.put("t", state(300))
    async with create_persistence(driver, clock=lambda: now) as p:

        async def begin_anew() -> None:
            nonlocal now
            await p.checkpoints.delete("t")
            now += 8 * 86_400_000
            await p.repair()
            assert await keys(p, "thread/t") == []
            await p.checkpoints.put("t", state(300, "new"))

        driver.hooks["after scan thread/t piece"] = begin_anew
        assert await p.checkpoints.get("t") == state(300)
        assert driver.hooks == {}
        await p.checkpoints.put("t", state(300))
    async with create_persistence(driver) as q:
        assert await q.checkpoints.get("t") == state(300)


async def test_the_checkpoints_of_one_application_are_found_without_reading_those_of_others() -> None:
    driver = RecordingDriver()
    async with create_persistence(driver) as p:
        one = {"project_directory": "/p", "working_directory": "/p", "state": {}}
        for n in range(300):
            await p.checkpoints.store_app_checkpoint({**one, "session_id": f"s{n}", "hostname": f"h{n % 10}"})
        driver.forget()
        (found,) = await p.checkpoints.list_app_checkpoints(session_id="s7", limit=1)
        assert (found.session_id, found.hostname) == ("s7", "h7")
        latest = await p.checkpoints.retrieve_latest_app_checkpoint(hostname="h3")
        assert latest is not None
        assert latest.session_id == "s293"
        assert await p.checkpoints.retrieve_latest_app_checkpoint(hostname="none") is None
        assert len(await p.checkpoints.list_app_checkpoints(hostname="h4")) == 30
        assert driver.calls.count("scan") <= 6
        assert await p.checkpoints.delete_session_checkpoints("s7") == 1
        assert await p.checkpoints.list_app_checkpoints(session_id="s7") == []
        report = await p.repair()
        assert (report.hints_added, report.hints_removed, report.corrupt_count) == (0, 0, 0)
