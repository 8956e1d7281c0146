"""Several processes on one store: nothing lost, nothing doubled, and one winner where there can be one."""

from __future__ import annotations

import asyncio
import multiprocessing
from collections.abc import Callable, Coroutine
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from typing import Any

import pytest
from engines import ENGINES

from persistence import ConflictError, ImageRecord, Persistence, create_persistence
from persistence.testing import MakeDriver

SHARED = [name for name, engine in ENGINES.items() if engine.shared]
PROCESSES = 4

Work = Callable[[Persistence, int], Coroutine[Any, Any, Any]]


def in_processes(make_driver: MakeDriver, work: Work, count: int = PROCESSES) -> list[Any]:
    """Run `work` in `count` processes at once, each with a store of its own on the same data."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(count, mp_context=context) as pool:
        list(pool.map(partial(_run, make_driver, _nothing), range(count)))  # all are up before they race
        return list(pool.map(partial(_run, make_driver, work), range(count)))


def _run(make_driver: MakeDriver, work: Work, number: int) -> Any:
    async def main() -> Any:
        async with create_persistence(make_driver()) as p:
            return await work(p, number)

    return asyncio.run(main())


async def _nothing(p: Persistence, number: int) -> None:
    pass


async def _append(p: Persistence, number: int) -> list[int]:
    tokens = [{"process": number, "n": n} for n in range(40)]
    return await asyncio.gather(*(p.sessions.add_message("s", token) for token in tokens[:20])) + [
        await p.sessions.add_message("s", token, idempotency_key=f"{number}-{token['n']}")
        for token in tokens[20:]
    ]


async def _race(p: Persistence, number: int) -> int:
    won = 0
    for last in range(10):
        while await p.sessions.count_messages("race") < last:  # noqa: ASYNC110 - another process appends
            await asyncio.sleep(0)
        try:
            await p.sessions.add_message("race", {"process": number}, expected_last=last)
            won += 1
        except ConflictError:
            pass
    return won


async def _update(p: Persistence, number: int) -> None:
    for n in range(8):
        await p.images.update_metadata("img", {f"{number}-{n}": n})


@pytest.mark.parametrize("make_driver", SHARED, indirect=True)
def test_processes_share_a_store(make_driver: MakeDriver) -> None:
    numbers = in_processes(make_driver, _append)

    async def appended() -> None:
        async with create_persistence(make_driver()) as p:
            stored = await p.sessions.read_messages("s")
            assert [message.seq for message in stored] == list(range(1, 40 * PROCESSES + 1))
            assert sorted(seq for own in numbers for seq in own) == [message.seq for message in stored]
            for message in stored:
                process, n = message.message["process"], message.message["n"]
                assert numbers[process][n] == message.seq
            await p.images.save_image(ImageRecord(image_id="img", container_id="c", session_id="s", name="n"))

    asyncio.run(appended())
    assert sum(in_processes(make_driver, _race, 3)) == 10
    in_processes(make_driver, _update, 3)

    async def updated() -> None:
        async with create_persistence(make_driver()) as p:
            assert await p.sessions.count_messages("race") == 10
            image = await p.images.find_image_by_id("img")
            assert image is not None
            assert image.metadata == {f"{number}-{n}": n for number in range(3) for n in range(8)}

    asyncio.run(updated())
