"""Several processes on one store: nothing lost, nothing doubled, and one winner where there can be one."""

from __future__ import annotations

import asyncio
import multiprocessing
from collections.abc import Callable, Coroutine
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from threading import Barrier
from typing import Any
from urllib.parse import urlsplit, urlunsplit
from uuid import uuid4

import pytest
from engines import ENGINES
from pymongo import MongoClient

from persistence import ConflictError, ImageRecord, Persistence, create_persistence
from persistence.drivers.mongodb import mongodb_driver
from persistence.testing import MakeDriver

SHARED = [name for name, engine in ENGINES.items() if engine.shared]
ROUNDS = 10
START_SECONDS = 60  # a process that does not come breaks the barrier, and the test

Work = Callable[[Persistence, int], Coroutine[Any, Any, Any]]

_barrier: Barrier  # of the racing processes; set in each of them


def in_processes(make_driver: MakeDriver, work: Work, count: int) -> list[Any]:
    """Run `work` in `count` processes at once, each with a store of its own on the same data.

    They open it at the same moment, which is a race of its own.
    """
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(count)
    with ProcessPoolExecutor(count, mp_context=context, initializer=_start, initargs=(barrier,)) as pool:
        return list(pool.map(partial(_run, make_driver, work), range(count)))


def _start(barrier: Barrier) -> None:
    global _barrier
    _barrier = barrier


def _run(make_driver: MakeDriver, work: Work, number: int) -> Any:
    async def main() -> Any:
        driver = make_driver()  # imports what it needs before the race begins
        _barrier.wait(START_SECONDS)
        async with create_persistence(driver) as p:
            return await work(p, number)

    return asyncio.run(main())


def image(image_id: str, **fields: Any) -> ImageRecord:
    return ImageRecord(image_id=image_id, container_id="c", session_id="s", name="n", **fields)


async def _append(p: Persistence, number: int) -> list[int]:
    tokens = [{"process": number, "n": n} for n in range(30)]
    numbers = await asyncio.gather(*(p.sessions.add_message("s", token) for token in tokens[:15]))
    numbers += [
        await p.sessions.add_message("s", token, idempotency_key=f"{number}-{token['n']}")
        for token in tokens[15:24]
    ]
    return numbers + await p.sessions.add_messages("s", tokens[24:])


async def _append_once(p: Persistence, number: int) -> list[int]:
    """Add the same messages as all others, under the same keys, each process in another order."""
    order = [(n + number * 3) % ROUNDS for n in range(ROUNDS)]
    seqs = {n: await p.sessions.add_message("once", {"n": n}, idempotency_key=str(n)) for n in order}
    return [seqs[n] for n in range(ROUNDS)]


async def _race_append(p: Persistence, number: int) -> list[int]:
    won = []
    for last in range(ROUNDS):
        while await p.sessions.count_messages("race") < last:  # noqa: ASYNC110 - another process appends
            await asyncio.sleep(0)
        try:
            won.append(await p.sessions.add_message("race", {"process": number}, expected_last=last))
        except ConflictError:
            continue
    return won


async def _race_save(p: Persistence, number: int) -> list[int]:
    won = []
    for turn in range(ROUNDS):
        while (found := await p.images.find_image_by_id("race")) is None or found.updated_at < turn:  # noqa: ASYNC110
            await asyncio.sleep(0)
        if found.updated_at > turn:
            continue
        try:
            await p.images.save_image(
                image("race", created_at=1, updated_at=turn + 1, metadata={"process": number}),
                expected_version=found.version,
            )
            won.append(turn)
        except ConflictError:
            continue
    return won


async def _race_create(p: Persistence, number: int) -> list[int]:
    won = []
    for turn in range(ROUNDS):
        try:
            await p.images.save_image(image(f"new-{turn}", metadata={"process": number}), expected_version=0)
            won.append(turn)
        except ConflictError:
            continue
    return won


async def _update(p: Persistence, number: int) -> None:
    for n in range(8):
        await p.images.update_metadata("shared", {f"{number}-{n}": n})


async def _race(p: Persistence, number: int) -> tuple[list[int], ...]:
    won = await asyncio.gather(
        _race_append(p, number), _race_save(p, number), _race_create(p, number), _append_once(p, number)
    )
    await _update(p, number)
    return tuple(won)


@pytest.mark.parametrize("make_driver", SHARED, indirect=True)
def test_eight_processes_open_an_empty_store_and_write_one_session(make_driver: MakeDriver) -> None:
    numbers = in_processes(make_driver, _append, 8)

    async def check() -> None:
        async with create_persistence(make_driver()) as p:
            stored = await p.sessions.read_messages("s")
            assert [message.seq for message in stored] == list(range(1, 8 * 30 + 1))
            for message in stored:
                process, n = message.message["process"], message.message["n"]
                assert numbers[process][n] == message.seq
            for own in numbers:
                assert own[24:] == list(range(own[24], own[24] + 6))  # a batch is not torn apart

    asyncio.run(check())


@pytest.mark.parametrize("make_driver", SHARED, indirect=True)
def test_racing_processes_have_one_winner_a_round(make_driver: MakeDriver) -> None:
    async def prepare() -> None:
        async with create_persistence(make_driver()) as p:
            await p.images.save_image(image("race", created_at=1, updated_at=0))
            await p.images.save_image(image("shared"))

    asyncio.run(prepare())
    appended, saved, created, once = zip(*in_processes(make_driver, _race, 3), strict=True)

    async def check() -> None:
        async with create_persistence(make_driver()) as p:
            race = await p.sessions.read_messages("race")
            assert sorted(seq for won in appended for seq in won) == list(range(1, ROUNDS + 1))
            assert [message.seq for message in race] == list(range(1, ROUNDS + 1))
            assert all(message.seq in appended[message.message["process"]] for message in race)
            assert sorted(turn for won in saved for turn in won) == list(range(ROUNDS))
            assert sorted(turn for won in created for turn in won) == list(range(ROUNDS))
            for turn in range(ROUNDS):
                made = await p.images.find_image_by_id(f"new-{turn}")
                assert made is not None
                assert made.metadata is not None
                assert turn in created[made.metadata["process"]]
            assert once[0] == once[1] == once[2]
            assert sorted(once[0]) == list(range(1, ROUNDS + 1))
            assert await p.sessions.count_messages("once") == ROUNDS
            shared = await p.images.find_image_by_id("shared")
            assert shared is not None
            assert shared.metadata == {f"{number}-{n}": n for number in range(3) for n in range(8)}

    asyncio.run(check())


def test_eight_processes_open_a_mongodb_database_that_there_is_not(server: Callable[[str], Any]) -> None:
    """The other engines whose drivers create something have this test in their own files."""
    url, name = server("mongodb").url, f"new-{uuid4().hex}"
    new = urlunsplit(urlsplit(url)._replace(path=f"/{name}"))
    numbers = in_processes(partial(mongodb_driver, new), _append, 8)
    assert sorted(seq for own in numbers for seq in own) == list(range(1, 8 * 30 + 1))
    with MongoClient[dict[str, Any]](url) as client:
        assert client[name].list_collection_names() == ["storage"]
        client.drop_database(name)
