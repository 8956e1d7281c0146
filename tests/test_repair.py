"""What a crash leaves behind goes, what is needed stays, and writers are not disturbed."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest
import pytest_asyncio

from persistence import (
    ContainerRecord,
    ImageRecord,
    InvalidValueError,
    OutcomeUnknownError,
    Persistence,
    SessionRecord,
    UnavailableError,
    create_persistence,
)
from persistence.driver import Delete, Put, Write
from persistence.drivers.memory import MemoryDriver
from persistence.ids import IdFactory
from persistence.options import unapplied
from persistence.repair import DAY_MS, RepairReport
from persistence.testing import MakeDriver

HOUR = 3_600_000


class Clock:
    def __init__(self) -> None:
        self.now = 1_800_000_000_000

    def __call__(self) -> int:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest_asyncio.fixture
async def timed(make_driver: MakeDriver, clock: Clock) -> AsyncIterator[Persistence]:
    async with create_persistence(make_driver(), clock=clock) as opened:
        yield opened


async def commit(p: Persistence, partition: str, *ops: Put | Delete, version: int = 99) -> None:
    assert await p._driver.commit([Write(partition, ops, version)]) == [True]


async def keys(p: Persistence, partition: str) -> list[str]:
    return [entry.key for entry in (await p._driver.scan(partition, "", None, limit=1000)).entries]


async def repaired(p: Persistence) -> dict[str, Any]:
    """Repair; return what was found, which a dry run had foretold and a second run finds no more."""
    foretold = await p.repair(dry_run=True)
    report = await p.repair()
    foretold.partitions = report.partitions  # a listing of partitions may repeat some
    assert foretold == report
    again = await p.repair()
    for field in ("hints_added", "hints_removed", "entries_emptied", "stubs_removed", "chunks_removed"):
        assert getattr(again, field) == 0
    assert (again.deletes_finished, again.tombstones_removed) == (0, 0)
    fresh = RepairReport()
    return {
        field: getattr(report, field)
        for field in report.__struct_fields__
        if field != "partitions" and getattr(report, field) != getattr(fresh, field)
    }


def image(image_id: str = "i", **fields: Any) -> ImageRecord:
    return ImageRecord(
        **{"image_id": image_id, "container_id": "c", "session_id": "s", "name": "n", **fields}
    )


def session(session_id: str = "s") -> SessionRecord:
    return SessionRecord(session_id=session_id, image_id="i", container_id="c")


async def test_stubs_go_after_a_day_and_numbers_go_on(timed: Persistence, clock: Clock) -> None:
    await timed.sessions.add_messages("s", [{"n": n} for n in range(5)])
    await timed.sessions.truncate_after_message("s", seq=2)
    assert await repaired(timed) == {}
    clock.now += DAY_MS - HOUR  # a slow writer may still go by their numbers
    assert await repaired(timed) == {}
    clock.now += HOUR + 1
    assert await repaired(timed) == {"stubs_removed": 3}
    assert await timed.sessions.add_message("s", {"n": 5}) == 7
    assert [message["n"] for message in await timed.sessions.get_messages("s")] == [0, 1, 5]
    assert await timed.sessions.clear_messages("s") == 3
    clock.now += DAY_MS + 1
    await timed.repair()
    assert await keys(timed, "session/s") == ["message/000000000008"]  # the marker keeps the number
    assert await timed.sessions.add_message("s", {"n": 6}) == 9


async def test_hidden_entries_that_were_not_emptied_are(timed: Persistence, clock: Clock) -> None:
    await timed.sessions.add_messages("s", [{"n": n} for n in range(3)])
    marker = {"f": 1, "n": 1, "m": 4, "at": clock.now, "k": "cut", "r": [[1, 1]]}
    await commit(timed, "session/s", Put("message/000000000004", json.dumps(marker).encode(), 0))
    assert await repaired(timed) == {"entries_emptied": 2}
    assert await timed.sessions.get_messages("s") == [{"n": 0}]


async def test_two_who_empty_the_same_entries_leave_none(timed: Persistence, make_driver: MakeDriver) -> None:
    async with create_persistence(make_driver()) as other:
        await timed.sessions.add_messages("s", [{"n": n} for n in range(40)])
        log = timed.sessions.log
        await timed.sessions.truncate_after_message("s", seq=39)
        tail = await log.tail("session/s")
        await commit(timed, "session/s", log.marker(tail, "cut", []))
        hidden = await log.hidden("session/s")
        emptied = await asyncio.gather(
            log.empty("session/s", hidden), other.sessions.log.empty("session/s", hidden[:1])
        )
        assert sum(emptied) == 40  # 39 messages and the marker before
        assert await log.empty("session/s", hidden) == 0


async def test_expired_sessions_go(timed: Persistence, clock: Clock) -> None:
    record = SessionRecord(session_id="s", image_id="i", container_id="c", expires_at=clock.now + 1)
    await timed.containers.save_container(ContainerRecord(container_id="c"))
    await timed.images.save_image(image())
    await timed.sessions.save_session(record)
    await timed.sessions.add_message("s", {"n": 1})
    assert await repaired(timed) == {}
    clock.now += 1
    assert await repaired(timed) == {"sessions_expired": 1}
    assert await keys(timed, "session/s") == [*(f"message/{n:012d}" for n in (1, 2, 3)), "record"]


async def test_what_a_fork_leaves_that_was_killed_goes_after_an_hour(
    timed: Persistence, clock: Clock
) -> None:
    await timed.sessions.save_session(SessionRecord(session_id="s", image_id="i", container_id="c"))
    await timed.sessions.add_messages("s", [{"n": n} for n in range(5)])
    await timed.sessions.fork_session("s", new_session_id="whole")
    for id in ("half", "used"):
        await timed.sessions._copy("s", id, None)  # and then it was killed
    await timed.sessions.add_message("used", {"precious": 1})
    await timed.sessions.add_message("never saved", {"n": 1}, idempotency_key="~")
    clock.now += HOUR
    assert (await timed.repair()).forks_ended == 0
    clock.now += 1
    assert (await timed.repair(dry_run=True)).forks_ended == 1
    assert (await timed.repair()).forks_ended == 1
    assert (await timed.repair()).forks_ended == 0
    counts = [await timed.sessions.count_messages(id) for id in ("half", "used", "whole", "never saved")]
    assert counts == [0, 6, 5, 1]


async def test_unreferenced_chunks_go_after_an_hour(timed: Persistence, clock: Clock) -> None:
    long = {"text": "x" * 2_500_000}
    await timed.containers.save_container(ContainerRecord(container_id="c"))
    await timed.images.save_image(image(custom_data=long))
    await timed.sessions.add_message("s", long)
    for partition in ("image/i", "session/s"):
        await commit(timed, partition, Put(f"chunk/{IdFactory(clock)()}/000000", b"lost", 0))
    assert await repaired(timed) == {}
    clock.now += HOUR + 1
    assert await repaired(timed) == {"chunks_removed": 2}
    found = await timed.images.find_image_by_id("i")
    assert found is not None
    assert found.custom_data == long
    assert await timed.sessions.get_messages("s") == [long]


async def test_stale_hints_go_and_missing_ones_come(timed: Persistence, clock: Clock) -> None:
    await timed.containers.save_container(ContainerRecord(container_id="c"))
    await timed.images.save_image(image())
    (hint,) = await keys(timed, "index/images-by-name/n")
    await commit(timed, "index/images-by-name/n", Delete(hint))
    stale = json.dumps({"f": 1, "at": clock.now, "id": "i", "of": "other"}).encode()
    await commit(timed, "index/images-by-name/other", Put(hint, stale))
    assert await timed.images.find_images_by_name("other") == []
    assert await repaired(timed) == {"hints_added": 1}
    assert len(await timed.images.find_images_by_name("n")) == 1
    clock.now += HOUR + 1
    assert await repaired(timed) == {"hints_removed": 1}
    assert await keys(timed, "index/images-by-name/other") == []


async def test_an_interrupted_cascade_is_finished(timed: Persistence, clock: Clock) -> None:
    await timed.containers.save_container(ContainerRecord(container_id="c"))
    await timed.images.save_image(image())
    await timed.sessions.save_session(session())
    await timed.sessions.add_message("s", {})
    tombstone = json.dumps({"f": 1, "deleted": clock.now, "cascade": True}).encode()
    await commit(timed, "container/c", Put("record", tombstone))
    assert not await timed.containers.container_exists("c")
    report = await timed.repair()
    assert report.deletes_finished == 1
    assert not await timed.images.image_exists("i")
    assert not await timed.sessions.session_exists("s")
    assert await timed.sessions.get_messages("s") == []
    await timed.images.save_image(image("later"))  # into a container that is gone: no business of the cascade
    await timed.repair()
    assert await timed.images.image_exists("later")


async def test_tombstones_go_after_a_week_but_not_what_was_saved_again(
    timed: Persistence, clock: Clock
) -> None:
    await timed.containers.save_container(ContainerRecord(container_id="c"))
    for id in ("gone", "back"):
        await timed.sessions.save_session(session(id))
        await timed.sessions.add_message(id, {"n": 1}, idempotency_key="k")
        await timed.sessions.delete_session(id)
        await timed.images.save_image(image(id))
        await timed.images.delete_image(id)
    await timed.sessions.save_session(session("back"))
    await timed.sessions.add_message("back", {"n": 2}, idempotency_key="k2")
    await timed.images.save_image(image("back"))
    clock.now += 7 * DAY_MS + 1
    report = await timed.repair()
    assert report.tombstones_removed == 2
    assert await keys(timed, "session/gone") == []
    assert await keys(timed, "image/gone") == []
    assert await timed.sessions.get_messages("back") == [{"n": 2}]
    assert await timed.images.image_exists("back")
    assert await timed.sessions.add_message("gone", {"n": 3}) == 1
    with pytest.raises(InvalidValueError):
        await timed.repair(tombstone_days=0)


async def test_orphans_are_named_and_left(timed: Persistence) -> None:
    await timed.images.save_image(image())
    report = await timed.repair()
    assert report.orphans == ["image/i: there is no container 'c'"]
    assert await timed.images.image_exists("i")


async def test_what_is_corrupt_is_named_and_left(timed: Persistence) -> None:
    await timed.sessions.add_message("fine", {"n": 1})
    await commit(timed, "image/i", Put("record", b"{"))
    await commit(timed, "index/images", Put("0" * 20 + "/i", b"nothing"))
    report = await timed.repair()
    assert report.corrupt_count == 2
    assert any("image/i" in line for line in report.corrupt)
    assert await keys(timed, "image/i") == ["record"]
    assert await timed.sessions.get_messages("fine") == [{"n": 1}]


async def test_progress_is_told(timed: Persistence) -> None:
    for n in range(70):
        await timed.sessions.add_message(f"s{n}", {})
    seen: list[int] = []
    report = await timed.repair(progress=seen.append)
    assert seen == sorted(seen)
    assert seen[-1] == report.partitions >= 70


async def test_it_disturbs_no_writer(timed: Persistence, clock: Clock) -> None:
    counts = [0] * 4

    async def write(number: int) -> None:
        for n in range(30):
            await timed.sessions.add_message(f"s{number}", {"n": n})
            counts[number] += 1
            await timed.images.save_image(image(f"i{number}", name=f"n{n % 3}", container_id=f"c{n % 2}"))
            clock.now += HOUR // 2
            if n % 10 == 9:
                await timed.sessions.truncate_after_message(f"s{number}", seq=1)
                counts[number] = 1

    async def repair_all_the_time() -> None:
        while True:
            await timed.repair()
            await asyncio.sleep(0)

    repairing = asyncio.create_task(repair_all_the_time())
    await asyncio.gather(*(write(number) for number in range(4)))
    repairing.cancel()
    for number in range(4):
        assert await timed.sessions.count_messages(f"s{number}") == counts[number]
        assert len(await timed.sessions.get_messages(f"s{number}")) == counts[number]
        assert [record.image_id for record in await timed.images.find_images_by_container_id("c1")].count(
            f"i{number}"
        ) == 1
    assert len(await timed.images.find_images_by_name("n2")) == 4
    assert await timed.images.count_images() == 4


async def test_a_repair_that_is_cut_off_does_not_say_that_nothing_was_changed(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Cut(MemoryDriver):
        cut = False

        async def commit(self, writes: Sequence[Write]) -> list[bool | None]:
            if self.cut and any(write.partition == "container/c" for write in writes):
                raise unapplied(UnavailableError("cannot connect"))
            return await super().commit(writes)

    monkeypatch.setattr("persistence.coalescer.RETRY_SECONDS", 0.1)
    driver = Cut()
    async with create_persistence(driver, clock=clock) as p:
        await p.sessions.save_session(
            SessionRecord(session_id="s", image_id="i", container_id="c", expires_at=clock.now + 1)
        )
        clock.now += HOUR
        driver.cut = True
        with pytest.raises(OutcomeUnknownError, match="a part of the change was made"):
            await p.repair()  # the session has gone, its entry in the listing of "c" has not
        driver.cut = False
        assert (await p.repair()).sessions_expired == 0


@pytest.mark.parametrize("saved_again", [False, True])
async def test_a_delete_that_was_killed_takes_what_cannot_be_read_along(
    timed: Persistence, monkeypatch: pytest.MonkeyPatch, saved_again: bool
) -> None:
    record = SessionRecord(session_id="s", image_id="i", container_id="c")
    await timed.sessions.save_session(record)
    await timed.sessions.add_messages("s", [{"n": n} for n in range(3)])
    await commit(timed, "session/s", Put("message/000000000003", b'{"secret"'))
    with monkeypatch.context() as patch:
        patch.setattr(timed.sessions.log, "empty", killed)
        with pytest.raises(asyncio.CancelledError):
            await timed.sessions.delete_session("s")
    if saved_again:
        await timed.sessions.save_session(record)
    report = await timed.repair()
    assert (report.entries_emptied, report.corrupt) == (4 if saved_again else 3, [])


async def killed(*args: object, **kwargs: object) -> None:
    raise asyncio.CancelledError


async def test_an_idempotency_key_that_cannot_be_read_is_forgotten_with_its_session(
    timed: Persistence, clock: Clock
) -> None:
    await timed.sessions.save_session(SessionRecord(session_id="s", image_id="i", container_id="c"))
    for key in ("k", "l"):
        await timed.sessions.add_message("s", {}, idempotency_key=key)
    await commit(timed, "session/s", Put("once/message/k", b"{"))
    await timed.sessions.delete_session("s")
    clock.now += 8 * DAY_MS
    report = await timed.repair()
    assert (report.tombstones_removed, report.corrupt) == (1, [])
    assert (await timed.repair()).tombstones_removed == 0
    assert (await timed._store.coalescer.scan("session/s", "", None, limit=9)).entries == []
