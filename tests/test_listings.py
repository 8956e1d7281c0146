"""Listings agree with the records, whoever renames, moves, deletes and saves again at the same time."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence

import pytest
from faulty_driver import RecordingDriver

from persistence import ImageRecord, Persistence, SessionRecord, create_persistence
from persistence.driver import Delete, Entry, Key, Page, Write
from persistence.drivers.memory import MemoryDriver

NAMES = ["x", "y"]
CONTAINERS = ["c1", "c2"]
IDS = ["a", "b"]


class Shuffled(MemoryDriver):
    """Gives way before and after each call, now and then for long: every order of calls can happen."""

    lanes = 4

    def __init__(self, chance: random.Random) -> None:
        super().__init__()
        self._chance = chance

    async def _wait(self) -> None:
        for _ in range(self._chance.choice([0, 0, 1, 2, 5, 20])):
            await asyncio.sleep(0)

    async def get(self, keys: Sequence[Key]) -> list[Entry | None]:
        await self._wait()
        found = await super().get(keys)
        await self._wait()
        return found

    async def scan(
        self, partition: str, start: str, end: str | None, *, limit: int, reverse: bool = False
    ) -> Page:
        await self._wait()
        page = await super().scan(partition, start, end, limit=limit, reverse=reverse)
        await self._wait()
        return page

    async def commit(self, writes: Sequence[Write]) -> list[bool | None]:
        await self._wait()
        outcomes = await super().commit(writes)
        await self._wait()
        return outcomes


async def change(p: Persistence, chance: random.Random) -> None:
    for _ in range(12):
        id = chance.choice(IDS)
        match chance.randrange(8):
            case 0:
                await p.images.delete_image(id)
            case 1:
                name = chance.choice(NAMES)
                for record in await p.images.find_images_by_name(name):
                    assert record.name == name
            case _:
                await p.images.save_image(
                    ImageRecord(
                        image_id=id,
                        container_id=chance.choice(CONTAINERS),
                        session_id="s",
                        name=chance.choice(NAMES),
                        created_at=chance.randrange(3),
                    )
                )


async def check(p: Persistence) -> None:
    records = {id: await p.images.find_image_by_id(id) for id in IDS}
    there = {record.image_id: record for record in records.values() if record is not None}
    order = sorted(there, key=lambda id: (-there[id].created_at, id))
    assert [record.image_id for record in await p.images.find_all_images()] == order
    for name in NAMES:
        found = [record.image_id for record in await p.images.find_images_by_name(name)]
        assert found == [id for id in order if there[id].name == name]
    for container in CONTAINERS:
        found = [record.image_id for record in await p.images.find_images_by_container_id(container)]
        assert found == [id for id in order if there[id].container_id == container]


@pytest.mark.parametrize("seed", range(40))
async def test_no_order_of_calls_loses_a_record_from_a_listing(seed: int) -> None:
    chance = random.Random(seed)
    driver = Shuffled(chance)
    opened = [await create_persistence(driver) for _ in range(4)]
    await asyncio.gather(*(change(p, chance) for p in opened for _ in range(2)))
    await check(opened[0])
    day = 86_400_000
    async with create_persistence(driver, clock=lambda: 2**42 + day) as later:
        before = await later.images.find_all_images()
        report = await later.repair()
        assert report.hints_added == 0
        assert await later.images.find_all_images() == before
        assert (await later.repair()).hints_removed == 0
        await check(later)
    for p in opened:
        await p.close()


class SlowRemover(MemoryDriver):
    """Keeps back the removal of entries from listings until it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.held = asyncio.Event()
        self.go_on = asyncio.Event()

    async def commit(self, writes: Sequence[Write]) -> list[bool | None]:
        if any(isinstance(op, Delete) for write in writes for op in write.ops):
            self.held.set()
            await self.go_on.wait()
        return await super().commit(writes)


async def test_a_slow_remover_does_not_take_away_what_was_listed_again() -> None:
    driver = SlowRemover()

    def image(name: str) -> ImageRecord:
        return ImageRecord(
            image_id="a", container_id="c1", session_id="s", name=name, created_at=0, updated_at=0
        )

    async with create_persistence(driver) as one, create_persistence(driver) as two:
        await one.images.save_image(image("x"))
        slow = asyncio.create_task(one.images.save_image(image("y")))
        await driver.held.wait()
        back = asyncio.create_task(two.images.save_image(image("x")))
        while (await two.images.find_image_by_id("a")) != image("x"):  # noqa: ASYNC110 - no event tells this
            await asyncio.sleep(0)
        driver.go_on.set()
        await asyncio.gather(slow, back)
        assert len(await two.images.find_images_by_name("x")) == 1
        assert await two.images.find_images_by_name("y") == []


async def test_what_has_expired_in_front_costs_few_calls() -> None:
    clock = [0]
    driver = RecordingDriver()
    async with create_persistence(driver, clock=lambda: clock[0]) as p:
        for n in range(1000):
            record = SessionRecord(
                session_id=f"s{n}", image_id="i", container_id="c", created_at=n, expires_at=5 if n else None
            )
            await p.sessions.save_session(record)
            clock[0] = n % 4
            await p.checkpoints.put(f"t{n}", n, expires_at=5 if n else None)
        clock[0] = 9
        for look in (p.sessions.find_sessions_by_image_id("i", limit=1), p.checkpoints.list_threads(limit=1)):
            driver.forget()
            (found,) = await look
            assert getattr(found, "session_id", "s0") == "s0"
            assert getattr(found, "thread_id", "t0") == "t0"
            assert len(driver.calls) < 40
