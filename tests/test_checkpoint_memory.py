"""A state of 100 MB takes less than 300 MB beside it, also after a crash in the middle of its put."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import random
import re
import signal
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from test_checkpoints import spare, stored

from persistence import Persistence, create_persistence
from persistence.testing import MakeDriver

MESSAGES = 91_000
LIMIT = 300_000_000
DEADLY_COMMIT = 25  # of more than thirty that a put of this size takes

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="measures memory as Linux reports it"),
    pytest.mark.parametrize("make_driver", ["filesystem", "postgresql", "sqlite"], indirect=True),
]


def messages(seed: int) -> Iterator[dict[str, Any]]:
    chance = random.Random(seed)
    for i in range(MESSAGES):
        yield {"role": "user", "i": i, "content": chance.randbytes(520).hex()}


def peak() -> int:
    """Return the most memory that this process has had at once, in bytes.

    `resource.getrusage` would do, did a process not inherit the peak of the one that started it, under
    which any growth would be hidden.
    """
    found = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) << 10


async def put(p: Persistence, seed: int) -> None:
    """Put a state; it is there before anything is measured."""
    state = {"messages": list(messages(seed))}
    before = peak()
    meta = await p.checkpoints.put("t", state)
    assert 95_000_000 < meta.size_bytes < 100_000_000
    assert peak() - before < LIMIT


async def put_and_die(p: Persistence, seed: int) -> None:
    commit, calls = p._driver.commit, 0

    async def last_one(writes: Any) -> Any:
        nonlocal calls
        calls += 1
        under_way = asyncio.ensure_future(commit(writes))
        if calls == DEADLY_COMMIT:
            await asyncio.sleep(0)
            os.kill(os.getpid(), signal.SIGKILL)
        return await under_way

    p._driver.commit = last_one  # type: ignore[method-assign]
    await put(p, seed)


async def repair_and_get(p: Persistence, seed: int) -> None:
    before = peak()
    report = await p.repair()
    assert (report.uploads_ended, report.corrupt) == (1, [])
    assert peak() - before < LIMIT / 3  # page by page
    state = await p.checkpoints.get("t")
    assert peak() - before < LIMIT  # with the state
    assert len(state["messages"]) == MESSAGES
    assert all(map(dict.__eq__, state["messages"], messages(seed)))


def _child(make: MakeDriver, work: Callable[[Persistence, int], Any], seed: int) -> None:
    async def run() -> None:
        async with create_persistence(make()) as p:
            await work(p, seed)

    asyncio.run(run())


async def in_process(make: MakeDriver, work: Callable[[Persistence, int], Any], seed: int) -> int | None:
    """Do `work` in a process of its own; return how it ended."""
    process = multiprocessing.get_context("spawn").Process(target=_child, args=(make, work, seed))
    process.start()
    await asyncio.to_thread(process.join)
    return process.exitcode


async def test_a_hundred_megabytes_take_less_than_three_hundred_more(make_driver: MakeDriver) -> None:
    run = partial(in_process, make_driver)
    assert await run(put, 1) == 0
    assert await run(put_and_die, 2) == -signal.SIGKILL
    async with create_persistence(make_driver()) as p:
        assert await spare(p) > 3_000  # of the put that was killed
    assert await run(repair_and_get, 1) == 0
    async with create_persistence(make_driver()) as p:
        assert await spare(p) == 0
        assert {key.partition("/")[0] for key, _ in await stored(p)} == {"head", "checkpoint", "piece"}
        assert [meta.seq for meta in await p.checkpoints.list("t")] == [1]
