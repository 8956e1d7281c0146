"""Many callers, few driver calls: batches, limits, cancellation, unknown outcomes, life and death."""

from __future__ import annotations

import asyncio
import gc
import inspect
import os
import random
import subprocess
import sys
import textwrap
import tracemalloc
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from faulty_driver import FaultyDriver, RecordingDriver

from persistence import (
    ConfigurationError,
    ConflictError,
    CorruptRecordError,
    ImageRecord,
    InvalidKeyError,
    InvalidValueError,
    NotFoundError,
    OutcomeUnknownError,
    Persistence,
    SessionRecord,
    UnavailableError,
    create_persistence,
)
from persistence.calls import Repository
from persistence.coalescer import Coalescer, Room
from persistence.driver import (
    ABSENT,
    MAX_GET_KEYS,
    MAX_VALUE_BYTES,
    MAX_WRITE_OPS,
    Check,
    Delete,
    Driver,
    Entry,
    Key,
    Op,
    Page,
    Put,
    Write,
)
from persistence.drivers.memory import MemoryDriver
from persistence.drivers.sqlite import sqlite_driver
from persistence.options import unapplied


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("persistence.coalescer.RETRY_SECONDS", 0.3)


@pytest.fixture(autouse=True)
def _nothing_is_left_behind() -> Iterator[None]:
    """Fail a test that leaves an exception which nobody looked at."""
    left: list[str] = []

    def hook(unraisable: Any) -> None:
        left.append(str(unraisable))

    previous, sys.unraisablehook = sys.unraisablehook, hook
    yield
    gc.collect()
    sys.unraisablehook = previous
    assert left == []


@pytest_asyncio.fixture(autouse=True)
async def _no_task_leaks() -> AsyncIterator[None]:
    complaints: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: complaints.append(context))
    yield
    gc.collect()
    assert complaints == []
    assert asyncio.all_tasks() == {asyncio.current_task()}


@pytest.fixture
def driver() -> RecordingDriver:
    return RecordingDriver()


@pytest_asyncio.fixture
async def core(driver: RecordingDriver) -> AsyncIterator[Coalescer]:
    coalescer = Coalescer(driver)
    await coalescer.open()
    yield coalescer
    driver.gate.set()
    await coalescer.close()
    assert driver.broken == []


@pytest_asyncio.fixture
async def p(driver: RecordingDriver) -> AsyncIterator[Persistence]:
    async with create_persistence(driver) as opened:
        yield opened
        driver.gate.set()
    assert driver.broken == []


def image(n: int, **fields: Any) -> ImageRecord:
    return ImageRecord(
        **{"image_id": f"i{n}", "container_id": "c", "session_id": "s", "name": f"n{n}", **fields}
    )


async def until(condition: Callable[[], object]) -> None:
    """Let other tasks go on until something is so."""
    for _ in range(10_000):
        if condition():
            return
        await asyncio.sleep(0)
    pytest.fail("it never came about")


async def beats(count: int = 20) -> None:
    """Let other tasks go as far as they can."""
    for _ in range(count):
        await asyncio.sleep(0)


# ---- what leaves together


async def test_a_lone_call_goes_out_at_once_and_alone(core: Coalescer, driver: RecordingDriver) -> None:
    assert await core.write("p", [Put("k", b"1", ABSENT)])
    assert (await core.get([Key("p", "k")]))[0] is not None
    await core.scan("p", "a", None, limit=1)
    assert driver.calls == ["commit", "get", "scan"]
    assert [len(writes) for writes in driver.commits] == [1]


async def test_what_arrives_meanwhile_leaves_together(core: Coalescer, driver: RecordingDriver) -> None:
    driver.gate.clear()
    first = asyncio.ensure_future(core.write("p0", [Put("k", b"0")]))
    await until(lambda: driver.commits)
    rest = [asyncio.ensure_future(core.write(f"p{n}", [Put("k", b"0")])) for n in range(1, 64)]
    await beats()
    assert len(driver.commits) == 1
    driver.gate.set()
    assert all(await asyncio.gather(first, *rest))
    assert [len(writes) for writes in driver.commits] == [1, 63]
    driver.forget()
    driver.gate.clear()
    reads = [asyncio.ensure_future(core.get([Key(f"p{n}", "k")])) for n in range(64)]
    await beats()
    driver.gate.set()
    assert [entry.value for (entry,) in await asyncio.gather(*reads) if entry] == [b"0"] * 64
    assert len(driver.calls) <= 2


async def test_each_reader_gets_its_own_entries(core: Coalescer, driver: RecordingDriver) -> None:
    await asyncio.gather(*(core.write("p", [Put(f"k{n}", b"%d" % n)]) for n in range(700)))
    rng = random.Random(1)
    wanted = [[rng.randrange(-9, 700) for _ in range(rng.randrange(1, 60))] for _ in range(50)]
    wanted.append(list(range(700)))
    found = await asyncio.gather(*(core.get([Key("p", f"k{n}") for n in keys]) for keys in wanted))
    for keys, entries in zip(wanted, found, strict=True):
        assert [e and e.value for e in entries] == [b"%d" % n if n >= 0 else None for n in keys]
    assert await core.get([]) == []


async def test_calls_stay_within_the_limits(core: Coalescer, driver: RecordingDriver) -> None:
    rng = random.Random(2)

    def write(n: int) -> Any:
        kind = rng.randrange(4)
        if kind == 0:  # many ops
            return core.write(f"p{n}", [Put(f"k{i}", b"", ABSENT) for i in range(rng.randrange(1, 1001))])
        if kind == 1:  # many bytes
            return core.write(
                f"p{n}", [Put(f"k{i}", bytes(1 << 20), ABSENT) for i in range(rng.randrange(1, 4))]
            )
        if kind == 2:  # much to merge
            return core.write("one", [Put(f"k{n}-{i}", bytes(9), ABSENT) for i in range(300)])
        return core.write("hints", [Put(f"k{n % 7}", bytes(100_000))], hint=True)

    assert all(await asyncio.gather(*(write(n) for n in range(150))))
    assert driver.broken == []


async def test_writes_that_share_no_key_and_expect_something_become_one(
    core: Coalescer, driver: RecordingDriver
) -> None:
    driver.gate.clear()
    block = asyncio.ensure_future(core.write("other", [Put("k", b"")]))
    await until(lambda: driver.commits)
    waiting = [asyncio.ensure_future(core.write("p", [Put(f"k{n}", b"", ABSENT)])) for n in range(5)]
    hints = [asyncio.ensure_future(core.write("h", [Put(f"k{n}", b"")], hint=True)) for n in range(5)]
    plain = [asyncio.ensure_future(core.write("q", [Put(f"k{n}", b"")])) for n in range(3)]
    await beats()
    driver.gate.set()
    versions = await asyncio.gather(*waiting)
    await asyncio.gather(block, *hints, *plain)
    assert len(set(versions)) == 1  # one Write
    second = {write.partition: len(write.ops) for write in driver.commits[1]}
    assert second == {"p": 5, "h": 5, "q": 1}
    assert len(driver.commits) == 4  # those without expect go one by one


async def test_a_refusal_splits_a_merge_and_hits_its_own_alone(
    core: Coalescer, driver: RecordingDriver
) -> None:
    await core.write("p", [Put("k13", b"mine")])
    await core.write("p", [Put("k37", b"mine")])
    driver.gate.clear()
    block = asyncio.ensure_future(core.write("other", [Put("k", b"")]))
    await until(lambda: len(driver.commits) == 3)
    waiting = [asyncio.ensure_future(core.write("p", [Put(f"k{n}", b"theirs", ABSENT)])) for n in range(64)]
    await beats()
    driver.gate.set()
    versions = await asyncio.gather(*waiting)
    assert [n for n, version in enumerate(versions) if not version] == [13, 37]
    found = await core.get([Key("p", f"k{n}") for n in range(64)])
    assert [n for n, entry in enumerate(found) if entry and entry.value == b"mine"] == [13, 37]
    assert [entry.version for entry in found if entry and entry.value == b"theirs"] == [
        v for v in versions if v
    ]
    assert len(driver.commits) < 30
    await block


async def test_writes_to_one_key_happen_in_the_order_they_were_asked_for(core: Coalescer) -> None:
    rng = random.Random(3)
    for _ in range(20):
        futures = []
        for n in range(30):
            kind: list[Op] = [Put("k", b"%d" % n)] if rng.random() < 0.7 else [Delete("k")]
            futures.append(asyncio.ensure_future(core.write("p", kind, hint=rng.random() < 0.5)))
            last = kind
            if rng.random() < 0.1:
                await asyncio.sleep(0)
        await asyncio.gather(*futures)
        (entry,) = await core.get([Key("p", "k")])
        assert (entry.value if entry else None) == (last[0].value if isinstance(last[0], Put) else None)


async def test_nothing_overtakes_what_could_not_leave_along(core: Coalescer, driver: RecordingDriver) -> None:
    driver.gate.clear()
    ops = [Put("lead", b""), Put("a", b"", ABSENT), Put("b", b"1"), Put("b", b"2", ABSENT)]
    tasks = []
    for op in ops:
        tasks.append(asyncio.ensure_future(core.write("p", [op])))
        await beats()
    driver.gate.set()
    assert [bool(version) for version in await asyncio.gather(*tasks)] == [True, True, True, False]


async def test_sixty_four_saves_take_a_few_calls_a_phase(p: Persistence, driver: RecordingDriver) -> None:
    driver.forget()
    await asyncio.gather(*(p.images.save_image(image(n)) for n in range(64)))
    assert len(driver.calls) <= 8, driver.calls
    driver.forget()
    await asyncio.gather(*(p.images.save_image(image(n, name=f"m{n}")) for n in range(64)))
    assert len(driver.phases()) <= 8, driver.phases()
    assert len(driver.calls) <= 16, driver.calls
    driver.forget()
    found = await asyncio.gather(*(p.images.find_image_by_id(f"i{n}") for n in range(64)))
    assert all(found)
    assert len(driver.calls) <= 2


async def test_many_lanes_keep_to_the_contract_too() -> None:
    driver = FaultyDriver(lanes=4, rate=0.1, seed=4)
    async with create_persistence(driver) as p:
        async with asyncio.timeout(20):
            await asyncio.gather(
                *(p.sessions.add_message(f"s{n % 40}", {"n": n}) for n in range(400)), return_exceptions=True
            )
        await driver.settle()
    assert driver.broken == []
    assert any(len(writes) > 1 for writes in driver.commits)


# ---- limits


@pytest.mark.parametrize(
    ("partition", "ops", "error"),
    [
        ("p" * 256, [Put("k", b"")], InvalidKeyError),
        ("p", [Put("k" * 1025, b"")], InvalidKeyError),
        ("p", [], InvalidValueError),
        ("p", [Put(f"k{n}", b"") for n in range(MAX_WRITE_OPS + 1)], InvalidValueError),
        ("p", [Put("k", bytes(MAX_VALUE_BYTES + 1))], InvalidValueError),
        ("p", [Put(f"k{n}", bytes(MAX_VALUE_BYTES)) for n in range(4)], InvalidValueError),
        ("p", [Put("k", b""), Delete("k")], InvalidValueError),
        ("p", [Delete("k", ABSENT)], InvalidValueError),
        ("p", [Check("k", ABSENT)], InvalidValueError),
    ],
)
async def test_what_exceeds_a_limit_is_refused_before_it_is_sent(
    core: Coalescer, driver: RecordingDriver, partition: str, ops: list[Op], error: type[Exception]
) -> None:
    with pytest.raises(error):
        await core.write(partition, ops)
    assert driver.calls == []
    assert await core.write("p" * 255, [Put("k" * 1024, b"")])


async def test_the_bytes_that_wait_are_bounded(driver: RecordingDriver) -> None:
    core = Coalescer(driver)
    core.room = Room(10 << 20)
    await core.open()
    driver.gate.clear()
    submitted = 0

    async def write(n: int) -> int:
        nonlocal submitted
        await core.room.take(1 << 20)
        submitted += 1
        try:
            written: asyncio.Future[int] = core.loop.create_future()
            core.submit(f"p{n}", (Put("k", bytes(1 << 20)),), written, ())
            return await written
        finally:
            core.room.give(1 << 20)

    tasks = [asyncio.ensure_future(write(n)) for n in range(40)]
    await beats(200)
    assert submitted == 10
    for task in tasks[8:30:3]:
        task.cancel()
    await beats(200)
    assert submitted < 20
    driver.gate.set()
    done = await asyncio.gather(*tasks, return_exceptions=True)
    assert sum(isinstance(outcome, int) for outcome in done) == 32
    await core.close()


@pytest.mark.parametrize("session", ["s", "s{}"])
async def test_callers_that_give_up_do_not_fill_the_memory(driver: RecordingDriver, session: str) -> None:
    async with create_persistence(driver) as p:
        core = p._store.coalescer
        core.room = Room(10 << 20)
        await p.sessions.add_message(session, {})
        driver.gate.clear()
        tracemalloc.start()
        try:
            for n in range(60):
                message = {"text": "x" * 900_000}
                with pytest.raises((UnavailableError, OutcomeUnknownError)):
                    await p.sessions.add_message(session.format(n), message, timeout=0.003)
            assert tracemalloc.get_traced_memory()[0] < 30 << 20
        finally:
            tracemalloc.stop()
            driver.gate.set()
        assert await p.sessions.add_message(session, {}) > 1
        assert core.room._free == 10 << 20


async def test_a_refused_append_whose_caller_gave_up_gives_its_room_back(driver: RecordingDriver) -> None:
    other = RecordingDriver(driver.memory)
    async with create_persistence(driver) as p, create_persistence(other) as q:
        await p.sessions.add_message("s", {})
        await q.sessions.add_message("s", {})
        room = p._store.coalescer.room
        free = room._free
        driver.gate.clear()
        call = asyncio.ensure_future(p.sessions.add_message("s", {}))
        await beats()
        call.cancel()
        await beats()
        driver.gate.set()
        assert await p.sessions.add_message("s", {}) == 3
        assert room._free == free


async def test_room_given_back_at_once_is_room_for_all_that_fit() -> None:
    room = Room(100)
    await room.take(150)
    tasks = [asyncio.ensure_future(room.take(10)) for _ in range(12)]
    await beats()
    assert not any(task.done() for task in tasks)
    room.give(150)
    await beats(50)
    assert sum(task.done() for task in tasks) == 10
    tasks[-1].cancel()
    room.give(10)
    await beats(50)
    assert all(task.done() for task in tasks)


async def test_who_gives_up_as_his_turn_comes_leaves_it_to_the_next() -> None:
    room = Room(10)
    await room.take(10)
    first, second = (asyncio.ensure_future(room.take(1)) for _ in range(2))
    await beats()
    room.give(10)
    first.cancel()  # woken, and not awake yet
    await beats()
    assert (first.cancelled(), second.done()) == (True, True)


@pytest.mark.parametrize("poison", [False, True])
async def test_a_write_whose_caller_gave_up_holds_its_room_until_its_outcome(poison: bool) -> None:
    driver = FaultyDriver()
    core = Coalescer(driver)
    core.room = Room(10)
    await core.open()
    driver.poison = {"p"} if poison else set()
    driver.gate.clear()
    call = asyncio.ensure_future(core.write("p", [Put("k", bytes(19), ABSENT)]))
    await beats()
    call.cancel()
    await beats()
    assert (call.cancelled(), core.room._free) == (True, -10)  # it is under way, and in memory
    driver.gate.set()
    await core.close()
    assert core.room._free == 10


async def test_a_part_of_a_refused_merge_that_nobody_waits_for_gives_its_room_back(
    core: Coalescer, driver: RecordingDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    apply, free = driver.apply, core.room._free

    async def give_up(writes: Sequence[Write]) -> list[bool | None]:
        if len(driver.commits) == 2:  # the merge, which will be refused for the sake of its last
            merged[0].cancel()
            await beats()
        return await apply(writes)

    monkeypatch.setattr(driver, "apply", give_up)
    driver.gate.clear()
    first = asyncio.ensure_future(core.write("p", [Put("a", b"")]))
    await beats()
    puts = [Put("b", b"", ABSENT), Put("c", b"", ABSENT), Put("d", b"", 1)]
    merged = [asyncio.ensure_future(core.write("p", [put])) for put in puts]
    await beats()
    driver.gate.set()
    assert await first
    assert [bool(version) for version in await asyncio.gather(*merged[1:])] == [True, False]
    assert core.room._free == free
    assert await core.get([Key("p", "b")]) == [None]


# ---- cancellation and timeouts


@pytest.mark.parametrize("seed", range(6))
async def test_a_cancelled_write_is_whole_or_absent(seed: int) -> None:
    rng = random.Random(seed)
    driver = FaultyDriver(seed=seed, rate=0.15 if seed % 2 else 0)
    acknowledged: set[int] = set()
    async with create_persistence(driver) as p:

        async def work(n: int) -> None:
            await p.sessions.add_messages(f"s{n % 5}", [{"n": n, "part": part} for part in range(3)])
            acknowledged.add(n)

        tasks = [asyncio.ensure_future(work(n)) for n in range(120)]
        for _ in range(60):
            await asyncio.sleep(0)
            rng.choice(tasks).cancel()
        async with asyncio.timeout(20):
            for outcome in await asyncio.gather(*tasks, return_exceptions=True):
                if isinstance(outcome, BaseException):
                    assert isinstance(
                        outcome, (asyncio.CancelledError, OutcomeUnknownError, UnavailableError)
                    )
        await driver.settle()
        found: list[int] = []
        for s in range(5):
            messages = await p.sessions.get_messages(f"s{s}")
            whole = [m["n"] for m in messages[::3]]
            assert messages == [{"n": n, "part": part} for n in whole for part in range(3)]
            found += whole
    assert len(found) == len(set(found))
    assert acknowledged <= set(found)
    assert driver.broken == []


async def test_cancelling_a_reader_disturbs_no_other(core: Coalescer, driver: RecordingDriver) -> None:
    await core.write("p", [Put("k", b"1")])
    driver.gate.clear()
    one, two = (asyncio.ensure_future(core.get([Key("p", "k")])) for _ in range(2))
    three = asyncio.ensure_future(core.scan("p", "k", None, limit=1))
    await beats()
    one.cancel()
    three.cancel()
    await beats()
    driver.gate.set()
    (entry,) = await two
    assert entry is not None
    assert one.cancelled()
    assert three.cancelled()


async def test_a_read_that_takes_too_long_is_unavailable(p: Persistence, driver: RecordingDriver) -> None:
    driver.gate.clear()
    for call in (
        p.images.find_image_by_id("i", timeout=0.01),
        p.sessions.get_messages("s", timeout=0.01),
        p.sessions.count_messages("s", timeout=0),
        p.images.find_all_images(timeout=0.01),
    ):
        with pytest.raises(UnavailableError, match="nothing was changed"):
            await call


async def test_a_timeout_tells_what_the_driver_raised_meanwhile(
    p: Persistence, driver: RecordingDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def down(*args: object, **options: object) -> Any:
        raise UnavailableError("connection refused")

    for name in ("get", "scan", "commit"):
        monkeypatch.setattr(driver, name, down)
    for call in (
        p.images.find_image_by_id("i", timeout=0.05),
        p.sessions.get_messages("s", timeout=0.05),
        p.images.save_image(image(1), timeout=0.05),
        p.streams.append("a", 0, {}, timeout=0.05),
    ):
        with pytest.raises(
            (UnavailableError, OutcomeUnknownError), match=r"no answer .*\(connection refused\)"
        ):
            await call
    monkeypatch.undo()
    driver.gate.clear()
    with pytest.raises(UnavailableError, match=r"nothing was changed$"):  # that was before this call
        await p.images.find_image_by_id("i", timeout=0.01)


async def test_a_write_that_was_sent_and_takes_too_long_is_unknown(
    p: Persistence, driver: RecordingDriver
) -> None:
    await p.sessions.count_messages("s")
    driver.gate.clear()
    with pytest.raises(OutcomeUnknownError):
        await p.sessions.add_message("s", {"n": 1}, timeout=0.01)
    driver.gate.set()
    assert await p.sessions.get_messages("s") == [{"n": 1}]
    driver.gate.clear()
    with pytest.raises(OutcomeUnknownError):
        await p.images.save_image(image(1), timeout=0.01)
    driver.gate.set()


class Unreachable(RecordingDriver):
    """Cannot be written to, and says so, for as many commits as are set."""

    refusals = 0

    async def apply(self, writes: Sequence[Write]) -> list[bool | None]:
        if self.refusals:
            self.refusals -= 1
            raise unapplied(UnavailableError("nobody there"))
        return await super().apply(writes)


async def test_a_write_that_never_reached_the_engine_is_not_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("persistence.coalescer.RETRY_SECONDS", 0.1)
    driver = Unreachable()
    async with create_persistence(driver) as p:
        assert await p.sessions.add_message("s", {"n": 1}) == 1
        driver.refusals = 1_000
        with pytest.raises(UnavailableError, match="nothing was written: nobody there"):
            await p.sessions.add_message("s", {"n": 2})
        driver.refusals = 0
        assert await p.sessions.add_message("s", {"n": 3}) == 2


async def test_any_write_is_repeated_that_never_reached_the_engine() -> None:
    driver = Unreachable()
    async with create_persistence(driver) as p:
        driver.refusals = 2
        version = await p._store.coalescer.write("p", [Put("k", b"1")])  # which else could not be
        driver.refusals = 2
        assert await p._store.coalescer.write("p", [Put("k", b"2", ABSENT)]) == ABSENT
        (entry,) = await p._store.coalescer.get([Key("p", "k")])
        assert entry == Entry("k", b"1", version)


async def test_a_write_that_nobody_waits_for_any_more_is_not_repeated() -> None:
    driver = Unreachable()
    async with create_persistence(driver) as p:
        driver.refusals = 1
        writing = asyncio.ensure_future(p._store.coalescer.write("p", [Put("k", b"1", ABSENT)]))
        await until(lambda: not driver.refusals)
        writing.cancel()
        await asyncio.sleep(0.1)
        assert await p._store.coalescer.get([Key("p", "k")]) == [None]
        assert await p._store.coalescer.write("p", [Put("k", b"2", ABSENT)])


@pytest.mark.parametrize("warm", [False, True])
async def test_what_is_called_unavailable_was_never_written(
    p: Persistence, driver: RecordingDriver, warm: bool
) -> None:
    """The call waits behind another one: for the lane, or for the end of the session."""
    sessions = [f"s{n}" for n in range(6)]
    if warm:
        for session in sessions:
            await p.sessions.count_messages(session)
    driver.gate.clear()
    block = asyncio.ensure_future(p._store.coalescer.write("other", [Put("k", b"")]))
    await until(lambda: driver.commits)
    calls = [p.sessions.add_message(session, {}, timeout=0.02) for session in sessions for _ in range(2)]
    calls.append(p.sessions.clear_messages("s0", timeout=0.02))
    outcomes = await asyncio.gather(*calls, return_exceptions=True)
    driver.gate.set()
    await block
    for n, session in enumerate(sessions):
        unknown = sum(isinstance(outcome, OutcomeUnknownError) for outcome in outcomes[2 * n : 2 * n + 2])
        assert await p.sessions.count_messages(session) <= unknown
    assert all(isinstance(outcome, OutcomeUnknownError | UnavailableError) for outcome in outcomes)


async def test_a_write_that_never_left_is_unavailable(p: Persistence, driver: RecordingDriver) -> None:
    driver.gate.clear()
    block = asyncio.ensure_future(p._store.coalescer.write("other", [Put("k", b"")]))
    await beats()
    with pytest.raises(UnavailableError, match="nothing was changed"):
        await p.images.save_image(image(1), timeout=0.01)
    driver.gate.set()
    await block
    assert await p.images.find_all_images() == []


@pytest.mark.parametrize("timeout", [-1, float("nan"), "1", [], -0.5])
async def test_a_timeout_that_is_none_is_refused(p: Persistence, timeout: Any) -> None:
    with pytest.raises(InvalidValueError, match="timeout"):
        await p.sessions.count_messages("s", timeout=timeout)


async def test_a_generous_timeout_changes_nothing(p: Persistence) -> None:
    assert await p.sessions.add_message("s", {"n": 1}, timeout=60) == 1
    assert await p.sessions.get_messages("s", timeout=float("inf")) == [{"n": 1}]


# ---- unknown outcomes


class Scripted(RecordingDriver):
    """Answers commits by a list of steps, then as it should."""

    def __init__(self, *steps: Any) -> None:
        super().__init__()
        self.steps = list(steps)

    async def apply(self, writes: Sequence[Write]) -> list[bool | None]:
        step = self.steps.pop(0) if self.steps else "apply"
        if callable(step):
            answer: list[bool | None] = await step(self, writes)
            return answer
        outcomes = await self.memory.commit(writes) if "apply" in step else []
        if "raise" in step:
            raise ConnectionResetError
        return [None] * len(writes) if "unknown" in step else outcomes


async def opened(driver: Any) -> Coalescer:
    core = Coalescer(driver)
    await core.open()
    return core


@pytest.mark.parametrize(
    "steps",
    [
        ("raise",),
        ("apply, raise",),
        ("unknown",),
        ("apply, unknown",),
        ("raise", "raise", "apply, raise"),
        ("raise", "unknown", "apply, unknown"),
    ],
)
async def test_a_write_that_expects_something_is_settled(steps: tuple[str, ...]) -> None:
    driver = Scripted(*steps)
    core = await opened(driver)
    version = await core.write("p", [Put("k", b"1", ABSENT)])
    (entry,) = await core.get([Key("p", "k")])
    assert entry == Entry("k", b"1", version)
    assert {write.version for writes in driver.commits for write in writes} == {version}
    assert await core.write("p", [Put("k", b"2", ABSENT)]) == ABSENT
    await core.close()
    assert driver.broken == []


async def test_a_refusal_behind_a_lost_answer_is_a_refusal() -> None:
    driver = Scripted("apply", "apply, raise")
    core = await opened(driver)
    await core.write("p", [Put("k", b"1")])
    assert await core.write("p", [Put("k", b"2", ABSENT)]) == ABSENT
    await core.close()


async def test_a_write_that_arrives_after_it_was_sent_again_is_applied_once() -> None:
    late: list[Sequence[Write]] = []

    async def lose(driver: Scripted, writes: Sequence[Write]) -> list[bool | None]:
        late.append(writes)
        raise ConnectionResetError

    async def arrive_first(driver: Scripted, writes: Sequence[Write]) -> list[bool | None]:
        await driver.memory.commit(late.pop())
        return await driver.memory.commit(writes)

    core = await opened(Scripted(lose, arrive_first))
    version = await core.write("p", [Put("k", b"1", ABSENT), Delete("gone")])
    (entry,) = await core.get([Key("p", "k")])
    assert entry is not None
    assert entry.version == version
    await core.close()


async def test_a_write_that_expects_nothing_is_not_sent_twice() -> None:
    for step in ("raise", "unknown"):
        driver = Scripted(step)
        core = await opened(driver)
        with pytest.raises(OutcomeUnknownError):
            await core.write("p", [Put("k", b"1")])
        assert len(driver.commits) == 1
        await core.close()
    driver = Scripted("apply, raise")
    core = await opened(driver)
    assert await core.write("p", [Put("k", b"1")])  # found by its version
    await core.close()


async def test_a_delete_whose_answer_is_lost_is_unknown_or_done() -> None:
    driver = Scripted("apply", "apply, raise")
    core = await opened(driver)
    version = await core.write("p", [Put("k", b"1")])
    with pytest.raises(OutcomeUnknownError):
        await core.write("p", [Delete("k", version)])
    version = await core.write("p", [Put("k", b"1")])
    driver.steps = ["raise"]
    assert await core.write("p", [Delete("k", version)])
    await core.close()


async def test_hints_are_sent_again_until_they_are_there() -> None:
    driver = Scripted("raise", "raise", "apply, raise")
    core = await opened(driver)
    assert await core.write("p", [Put("k", b"1")], hint=True)
    assert await core.write("p", [Delete("k", 77)], hint=True) == ABSENT
    await core.close()


async def test_a_poison_write_fails_alone() -> None:
    driver = FaultyDriver()
    driver.poison = {"p13"}
    core = await opened(driver)
    outcomes = await asyncio.gather(
        *(core.write(f"p{n}", [Put("k", b"", ABSENT)]) for n in range(40)), return_exceptions=True
    )
    for n, outcome in enumerate(outcomes):
        if n == 13:
            assert isinstance(outcome, OutcomeUnknownError)
            assert outcome.partition == "p13"
            assert isinstance(outcome.__cause__, ValueError)
        else:
            assert isinstance(outcome, int)
            assert outcome
    await core.close()
    assert driver.broken == []


async def test_what_is_corrupt_in_one_partition_is_not_the_others_fault() -> None:
    def corrupt(partition: str) -> CorruptRecordError:
        return CorruptRecordError("what is stored cannot be read", partition=partition)

    class Corrupt(RecordingDriver):
        async def get(self, keys: Sequence[Key]) -> list[Entry | None]:
            if any(key.partition == "p3" for key in keys):
                raise corrupt("p3")
            return await super().get(keys)

        async def apply(self, writes: Sequence[Write]) -> list[bool | None]:
            if any(write.partition == "p3" for write in writes):
                raise corrupt("p3")
            return await super().apply(writes)

    core = await opened(Corrupt())
    outcomes = await asyncio.gather(
        *(core.write(f"p{n}", [Put("k", b"", ABSENT)]) for n in range(8)),
        *(core.write(f"q{n}", [Put("k", b"")]) for n in range(8)),
        return_exceptions=True,
    )
    for n, outcome in enumerate(outcomes):
        if n == 3:
            assert isinstance(outcome, CorruptRecordError)
            assert outcome.partition == "p3"
        elif n < 8:
            assert isinstance(outcome, int)
        else:  # cannot be repeated, so unknown at worst, and never blamed on p3
            assert isinstance(outcome, int) or type(outcome) is OutcomeUnknownError
    reads = await asyncio.gather(*(core.get([Key(f"p{n}", "k")]) for n in range(8)), return_exceptions=True)
    assert [isinstance(read, CorruptRecordError) for read in reads] == [n == 3 for n in range(8)]
    await core.close()


async def test_what_turns_out_corrupt_when_it_is_sent_again_is_not_the_others_fault() -> None:
    def corrupt(partition: str) -> CorruptRecordError:
        return CorruptRecordError("what is stored cannot be read", partition=partition)

    class Corrupt(RecordingDriver):
        connected = False

        async def get(self, keys: Sequence[Key]) -> list[Entry | None]:
            if any(key.partition == "p1" for key in keys):
                raise corrupt("p1")
            return await super().get(keys)

        async def apply(self, writes: Sequence[Write]) -> list[bool | None]:
            if not self.connected:
                self.connected = True
                raise unapplied(UnavailableError("cannot connect"))
            if any(write.partition == "p1" for write in writes):
                raise corrupt("p1")
            return await super().apply(writes)

    core = await opened(Corrupt())
    first, *others = await asyncio.gather(
        *(core.write(f"p{n}", [Put("k", b"", ABSENT)]) for n in (1, 0, 2, 3)), return_exceptions=True
    )
    assert isinstance(first, CorruptRecordError)
    assert all(isinstance(outcome, int) for outcome in others)
    await core.close()


async def test_callers_who_share_a_failure_do_not_share_the_error() -> None:
    driver = Scripted()
    core = await opened(driver)

    class Loud(UnavailableError):
        def __init__(self, host: str, port: int) -> None:
            super().__init__(f"{host}:{port} is gone")

    async def fail(driver: Scripted, writes: Sequence[Write]) -> list[bool | None]:
        raise ConfigurationError("set up wrongly")

    driver.gate.clear()
    driver.steps = ["apply", *[fail] * 100]
    block = asyncio.ensure_future(core.write("p", [Put("k", b"")]))
    await beats()
    calls = [asyncio.ensure_future(core.write("q", [Put(f"k{n}", b"", ABSENT)])) for n in range(3)]
    await beats()
    driver.gate.set()
    await block
    errors = await asyncio.gather(*calls, return_exceptions=True)
    assert len({id(error) for error in errors}) == 3
    assert all(isinstance(error, ConfigurationError) and str(error) == "set up wrongly" for error in errors)
    await core.close()

    class Lost(MemoryDriver):
        async def commit(self, writes: Sequence[Write]) -> list[bool | None]:
            raise Loud("db", 5432)

    core = await opened(Lost())
    with pytest.raises(OutcomeUnknownError):
        await core.write("p", [Put("k", b"", ABSENT)])
    await core.close()


async def test_a_write_without_an_answer_stays_unknown_where_the_store_then_refuses_to_be_asked() -> None:
    class Refused(MemoryDriver):
        async def get(self, keys: Sequence[Key]) -> list[Entry | None]:
            raise ConfigurationError("the password is wrong")

        async def commit(self, writes: Sequence[Write]) -> list[bool | None]:
            await super().commit(writes)
            raise ConnectionResetError

    core = await opened(Refused())
    with pytest.raises(OutcomeUnknownError, match="the password is wrong"):
        await core.write("p", [Put("k", b"", ABSENT)])
    await core.close()


async def test_a_stalled_partition_does_not_stop_its_lane() -> None:
    driver = FaultyDriver()
    core = await opened(driver)
    await core.write("ok", [Put("k", b"")])

    async def apply(writes: Sequence[Write]) -> list[bool | None]:
        if any(write.partition == "stalled" for write in writes):
            raise UnavailableError("its shard is gone")
        return await driver.memory.commit(writes)

    driver.apply = apply  # type: ignore[method-assign]
    stalled = [asyncio.ensure_future(core.write("stalled", [Put("k", b"", ABSENT)])) for _ in range(40)]
    await beats()
    for n in range(20):
        async with asyncio.timeout(0.2):
            assert await core.write(f"p{n}", [Put("k", b"", ABSENT)])
    # The first is tried until its time is up; those behind it do not wait as long again, each in turn.
    async with asyncio.timeout(5):
        first, *behind = await asyncio.gather(*stalled, return_exceptions=True)
    assert isinstance(first, OutcomeUnknownError)
    assert all(isinstance(outcome, OutcomeUnknownError | UnavailableError) for outcome in behind)
    assert sum(isinstance(outcome, UnavailableError) for outcome in behind) >= 38
    await core.close()
    assert driver.broken == []


async def test_what_waits_for_a_write_that_is_settled_goes_on_by_itself(
    core: Coalescer, driver: RecordingDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    apply, lost = driver.apply, [True]

    async def lose(writes: Sequence[Write]) -> list[bool | None]:
        if lost:
            lost.clear()
            raise ConnectionResetError
        return await apply(writes)

    monkeypatch.setattr(driver, "apply", lose)
    async with asyncio.timeout(5):
        writes = (core.write("p", [Put("a", b"", ABSENT)]), core.write("p", [Put("b", b"")]))
        assert all(await asyncio.gather(*writes))


async def test_who_gives_up_a_repeated_call_does_not_fail_those_behind(driver: RecordingDriver) -> None:
    other = RecordingDriver(driver.memory)
    async with create_persistence(driver) as p, create_persistence(other) as q:
        await q.sessions.add_message("s", {}, idempotency_key="k")
        driver.gate.clear()
        repeated = asyncio.ensure_future(p.sessions.add_message("s", {}, idempotency_key="k"))
        behind = asyncio.ensure_future(p.sessions.add_message("s", {}))
        await beats()
        repeated.cancel()
        await beats()
        driver.gate.set()
        assert await behind == 2


async def test_who_comes_late_to_a_stalled_partition_has_his_own_time() -> None:
    driver = FaultyDriver()
    core = await opened(driver)
    late: list[asyncio.Future[int]] = []
    over = core.loop.time() + 0.3

    async def apply(writes: Sequence[Write]) -> list[bool | None]:
        if late:
            return await driver.memory.commit(writes)
        if core.loop.time() > over:  # the first is tried for the last time
            late.append(asyncio.ensure_future(core.write("stalled", [Put("late", b"", ABSENT)])))
            await beats()
        raise UnavailableError("its shard is gone")

    driver.apply = apply  # type: ignore[method-assign]
    with pytest.raises(OutcomeUnknownError):
        await core.write("stalled", [Put("k", b"", ABSENT)])
    assert await late[0]
    await core.close()


async def test_entries_of_listings_are_no_part_of_a_change(
    p: Persistence, driver: RecordingDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def get(keys: Sequence[Key]) -> list[Entry | None]:
        raise UnavailableError("down")

    monkeypatch.setattr(driver, "get", get)
    with pytest.raises(UnavailableError, match=r"down$"):
        await p.sessions.save_session(SessionRecord("s", "i", "c", expires_at=1))
    assert "commit" in driver.calls  # the entry of its deadline, which tells nobody anything


@pytest.mark.parametrize("answer", [[], [True] * 9, None, 7], ids=repr)
async def test_a_driver_that_answers_nonsense_hangs_nobody(answer: Any) -> None:
    class Nonsense(MemoryDriver):
        nonsense = False

        async def get(self, keys: Sequence[Key]) -> list[Entry | None]:
            return answer if self.nonsense else await super().get(keys)

        async def commit(self, writes: Sequence[Write]) -> list[bool | None]:
            return answer  # type: ignore[no-any-return]

    driver = Nonsense()
    core = await opened(driver)
    async with asyncio.timeout(5):
        outcomes = await asyncio.gather(
            *(core.write(f"p{n}", [Put("k", b"", ABSENT)]) for n in range(4)), return_exceptions=True
        )
        assert all(isinstance(outcome, ConfigurationError | OutcomeUnknownError) for outcome in outcomes)
        driver.nonsense = True
        with pytest.raises((ConfigurationError, TypeError)):
            await core.get([Key("p", "k")])
        with pytest.raises((ConfigurationError, OutcomeUnknownError)):
            await core.write("p", [Put("k", b"", ABSENT)])
    await core.close()


async def test_reads_are_repeated_until_the_store_answers() -> None:
    class Shaky(RecordingDriver):
        left = 3

        def _used(self, call: str) -> None:
            super()._used(call)
            if self.left:
                self.left -= 1
                raise UnavailableError("not yet")

    driver = Shaky()
    core = await opened(driver)
    assert await core.get([Key("p", "k")]) == [None]
    driver.left = 3
    assert (await core.scan("p", "a", None, limit=1)).entries == []
    driver.left = 1000
    for call in (core.get([Key("p", "k")]), core.scan("p", "a", None, limit=1), core.partitions(None, 1)):
        with pytest.raises(UnavailableError):
            await call
    driver.left = 0
    await core.close()


# ---- everything at once


@pytest.mark.parametrize("seed", range(4))
async def test_appends_under_faults_are_there_once_in_order(seed: int) -> None:
    driver = FaultyDriver(seed=seed, rate=0.25, lanes=1 + seed % 2 * 3)
    rng = random.Random(seed)
    sessions = [f"s{n}" for n in range(8)]
    tried: dict[str, set[str]] = {session: set() for session in sessions}
    numbers: dict[str, int] = {}  # of those acknowledged

    async with create_persistence(driver) as p:

        async def work(task: int) -> None:
            session, last = sessions[task % 8], 0
            for step in range(12):
                name = f"{task}-{step}"
                tried[session].add(name)
                once = name if rng.random() < 0.4 else None
                expected = None
                if rng.random() < 0.2:
                    with suppress(UnavailableError):
                        expected = await p.sessions.count_messages(session)
                for _ in range(4):
                    try:
                        number = await p.sessions.add_message(
                            session, {"n": name}, idempotency_key=once, expected_last=expected
                        )
                    except (OutcomeUnknownError, UnavailableError):
                        if once is None:
                            break
                    except ConflictError:
                        assert expected is not None
                        break
                    else:
                        assert number > last
                        numbers[name] = last = number
                        break

        async with asyncio.timeout(60):
            await asyncio.gather(*(work(task) for task in range(48)))
        await driver.settle()
        for session in sessions:
            stored = await p.sessions.read_messages(session)
            names = [message.message["n"] for message in stored]
            assert len(names) == len(set(names)), "doubled"
            assert set(names) <= tried[session], "from nowhere"
            assert [message.seq for message in stored] == list(range(1, len(stored) + 1)), "gaps"
            assert await p.sessions.count_messages(session) == len(stored)
            found = {message.message["n"]: message.seq for message in stored}
            acknowledged = {name: numbers[name] for name in tried[session] if name in numbers}
            assert acknowledged.items() <= found.items(), "lost"
    assert driver.broken == []
    assert len(driver.seen) >= 7, driver.seen  # it was a test
    assert len(numbers) > 300


@pytest.mark.parametrize("seed", range(3))
async def test_records_and_listings_agree_after_faults(seed: int) -> None:
    driver = FaultyDriver(seed=seed + 100, rate=0.15)
    rng = random.Random(seed)
    images, written = 12, {n: {f"n{n}"} for n in range(12)}
    marks: dict[int, set[str]] = {n: set() for n in range(images)}
    trouble = (OutcomeUnknownError, UnavailableError)
    async with create_persistence(driver) as p:
        driver.rate, rate = 0, driver.rate
        await asyncio.gather(*(p.images.save_image(image(n)) for n in range(images)))
        driver.rate = rate

        async def rename(task: int) -> None:
            for step in range(3):
                n = rng.randrange(images // 2)
                name = f"m{task}-{step}"
                written[n].add(name)
                with suppress(*trouble):
                    await p.images.save_image(image(n, name=name, container_id=rng.choice(["c", "d"])))

        async def mark(task: int) -> None:
            for step in range(3):
                n = rng.randrange(images // 2, images)
                with suppress(*trouble):
                    await p.images.update_metadata(f"i{n}", {f"{task}-{step}": 1})
                    marks[n].add(f"{task}-{step}")

        async def messages(task: int) -> None:
            session = f"s{task % 4}"
            for _ in range(3):
                with suppress(NotFoundError, *trouble):
                    match rng.randrange(5):
                        case 0:
                            await p.sessions.clear_messages(session)
                        case 1:
                            await p.sessions.delete_session(session)
                        case 2:
                            await p.sessions.save_session(
                                SessionRecord(session_id=session, image_id="i0", container_id="c")
                            )
                        case 3:
                            await p.sessions.get_messages(session, last=5)
                        case _:
                            await p.sessions.add_messages(session, [{"n": task}] * 3)

        async with asyncio.timeout(60):
            await asyncio.gather(*(work(n) for n in range(20) for work in (rename, mark, messages)))
        await driver.settle()

        records = [await p.images.find_image_by_id(f"i{n}") for n in range(images)]
        for n, record in enumerate(records):
            assert record is not None
            assert record.name in written[n]
            assert marks[n] <= set(record.metadata or {})
            assert record in await p.images.find_images_by_name(record.name)
            for name in written[n] - {record.name}:
                assert record not in await p.images.find_images_by_name(name)
        for container in ("c", "d"):
            listed = {r.image_id for r in await p.images.find_images_by_container_id(container)}
            assert listed == {r.image_id for r in records if r and r.container_id == container}
        for n in range(4):
            session = f"s{n}"
            stored = await p.sessions.read_messages(session)
            assert len(stored) == await p.sessions.count_messages(session)
            alive = await p.sessions.session_exists(session)
            listed_sessions = [r.session_id for r in await p.sessions.find_all_sessions()]
            assert (session in listed_sessions) == alive
            if alive:
                seq = await p.sessions.add_message(session, {"n": "last"})
                assert [m.seq for m in await p.sessions.read_messages(session, last=1)] == [seq]
    assert driver.broken == []


# ---- life


async def test_close_waits_for_the_calls_under_way(driver: RecordingDriver) -> None:
    p = await create_persistence(driver)
    driver.gate.clear()
    calls = [asyncio.ensure_future(p.sessions.add_message("s", {"n": n})) for n in range(5)]
    await beats()
    closing = [asyncio.ensure_future(p.close()) for _ in range(2)]
    await beats()
    assert not any(task.done() for task in (*calls, *closing))
    with pytest.raises(ConfigurationError, match="closed"):
        await p.sessions.count_messages("s")
    driver.gate.set()
    await asyncio.gather(*closing)
    assert sorted(await asyncio.gather(*calls)) == [1, 2, 3, 4, 5]
    await p.close()
    assert driver.closed == 1
    assert driver.broken == []


async def test_close_waits_for_what_a_cancelled_call_left_under_way(driver: RecordingDriver) -> None:
    p = await create_persistence(driver)
    driver.gate.clear()
    call = asyncio.ensure_future(p.images.save_image(image(1)))
    await beats()
    call.cancel()
    closing = asyncio.ensure_future(p.close())
    await beats()
    assert not closing.done()
    driver.gate.set()
    await closing
    assert (driver.closed, driver.broken) == (1, [])


async def test_giving_up_on_close_does_not_leave_the_driver_open(driver: RecordingDriver) -> None:
    p = await create_persistence(driver)
    driver.gate.clear()
    call = asyncio.ensure_future(p.sessions.add_message("s", {}))
    await beats()
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(p.close(), 0.01)
    driver.gate.set()
    await call
    await p.close()
    assert (driver.closed, driver.broken) == (1, [])


async def test_a_driver_that_cannot_close_says_so_once() -> None:
    class Stuck(MemoryDriver):
        async def close(self) -> None:
            raise UnavailableError("stuck")

    p = await create_persistence(Stuck())
    with pytest.raises(UnavailableError, match="stuck"):
        await p.close()
    await p.close()


async def test_use_after_close_and_on_another_loop_is_refused(driver: RecordingDriver) -> None:
    p = await create_persistence(driver)

    def elsewhere() -> None:
        with pytest.raises(ConfigurationError, match="another event loop"):
            asyncio.run(p.sessions.count_messages("s"))
        with pytest.raises(ConfigurationError, match="another event loop"):
            asyncio.run(p.close())

    await asyncio.to_thread(elsewhere)
    await p.sessions.add_message("s", {})
    await p.close()
    driver.forget()
    for call in (p.sessions.get_messages("s"), p.images.save_image(image(1)), p.repair()):
        with pytest.raises(ConfigurationError, match="closed"):
            await call
    assert driver.calls == []


async def test_every_public_call_has_a_timeout_and_is_refused_after_close(driver: RecordingDriver) -> None:
    p = await create_persistence(driver)
    repositories = [p, *(value for value in vars(p).values() if isinstance(value, Repository))]
    await p.close()
    calls = [
        method
        for repository in repositories
        for name, method in inspect.getmembers(repository, inspect.ismethod)
        if not name.startswith("_")
    ]
    assert len(calls) > 60
    for call in calls:
        parameters = inspect.signature(call).parameters.values()
        assert "timeout" in [parameter.name for parameter in parameters], call
        if call != p.close:
            with pytest.raises(ConfigurationError, match="closed"):
                await call(*(None for parameter in parameters if parameter.default is parameter.empty))


async def test_a_close_that_takes_too_long_says_so_and_goes_on(driver: RecordingDriver) -> None:
    p = await create_persistence(driver)
    driver.gate.clear()
    adding = asyncio.ensure_future(p.sessions.add_message("s", {}))
    await asyncio.sleep(0)
    with pytest.raises(UnavailableError):
        await p.close(timeout=0.01)
    with pytest.raises(ConfigurationError, match="closed"):
        await p.sessions.add_message("s", {})
    driver.gate.set()
    assert await adding == 1
    await p.close(timeout=5)
    assert driver.closed == 1


def test_use_after_a_fork_is_refused() -> None:
    code = """
        import asyncio, os
        from persistence import ConfigurationError, create_persistence, memory_driver

        async def use(p):
            await p.sessions.add_message("s", {})

        async def main():
            p = await create_persistence(memory_driver())
            await use(p)
            return p

        loop = asyncio.new_event_loop()
        p = loop.run_until_complete(main())
        if pid := os.fork():
            assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
            loop.run_until_complete(use(p))
        else:
            try:
                loop.run_until_complete(use(p))
            except ConfigurationError as error:
                assert "fork" in str(error)
                os._exit(0)
            os._exit(1)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        env=os.environ,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_a_loop_that_ends_in_the_middle_leaves_no_noise() -> None:
    code = """
        import asyncio
        from persistence import create_persistence, memory_driver

        class Slow(memory_driver):
            async def commit(self, writes):
                await asyncio.sleep(60)

        async def main():
            p = await create_persistence(Slow())
            await p.sessions.count_messages("warm")
            for n in range(20):
                asyncio.ensure_future(p.sessions.add_message("warm" if n % 2 else f"s{n}", {}))
                asyncio.ensure_future(p.images.find_image_by_id("i"))
            await asyncio.sleep(0.05)

        asyncio.run(main())
    """
    done = subprocess.run(
        [sys.executable, "-X", "dev", "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        env=os.environ,
        check=False,
        timeout=30,
    )
    assert (done.returncode, done.stderr) == (0, "")


async def test_no_get_asks_for_more_keys_than_the_contract_allows(
    core: Coalescer, driver: RecordingDriver
) -> None:
    assert MAX_GET_KEYS == 256
    driver.gate.clear()
    reads = [asyncio.ensure_future(core.get([Key("p", f"{n}-{of}") for of in range(100)])) for n in range(9)]
    await beats()
    driver.gate.set()
    assert await asyncio.gather(*reads) == [[None] * 100] * 9
    assert driver.calls.count("get") == 5


async def _open_and_count(driver: Driver) -> int:
    async with create_persistence(driver) as p:
        return await p.sessions.count_messages("s")


async def test_a_driver_that_is_open_on_another_event_loop_says_so(tmp_path: Path) -> None:
    driver = sqlite_driver(tmp_path / "a.db")
    async with create_persistence(driver) as p:
        with pytest.raises(ConfigurationError, match="another event loop"):
            await asyncio.to_thread(asyncio.run, _open_and_count(driver))
        assert await p.sessions.add_message("s", {}) == 1
    assert await asyncio.to_thread(asyncio.run, _open_and_count(driver)) == 1  # closed: it may move


async def test_a_driver_that_was_opened_before_a_fork_says_so_in_the_child(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = sqlite_driver(tmp_path / "a.db")
    async with create_persistence(driver):
        with monkeypatch.context() as child:
            child.setattr("persistence.coalescer._forks", 1)
            with pytest.raises(ConfigurationError, match="new driver in the child"):
                await create_persistence(driver)


def test_a_driver_that_could_not_be_opened_may_move_to_another_event_loop() -> None:
    class DownAtFirst(RecordingDriver):
        down = True

        async def open(self) -> None:
            if self.down:
                self.down = False
                raise UnavailableError("down")
            await super().open()

        async def close(self) -> None:
            pass

    driver = DownAtFirst()
    with pytest.raises(UnavailableError, match="down"):
        asyncio.run(_open_and_count(driver))
    assert asyncio.run(_open_and_count(driver)) == 0


@pytest.mark.parametrize(("beyond", "more"), [(1, False), (-1, True)])
async def test_a_page_that_breaks_the_contract_is_not_read_as_one(
    driver: RecordingDriver, monkeypatch: pytest.MonkeyPatch, beyond: int, more: bool
) -> None:
    async def scan(*_: Any, limit: int, reverse: bool = False) -> Page:
        return Page([Entry(f"k{n}", b"{}", 1) for n in range(limit + 1 if beyond > 0 else 0)], more)

    async with create_persistence(driver) as p:
        monkeypatch.setattr(driver, "scan", scan)
        with pytest.raises(ConfigurationError, match=r"scan\(\)"):
            await p.sessions.get_messages("s")


async def test_a_call_that_the_drivers_client_cancels_is_settled_as_any_other(
    driver: RecordingDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = driver.commit
    lost = [True, False]

    async def lose(writes: Sequence[Write]) -> list[bool | None]:
        outcomes = await commit(writes)
        if lost and lost.pop():
            raise asyncio.CancelledError
        return outcomes

    async with create_persistence(driver) as p:
        monkeypatch.setattr(driver, "commit", lose)
        assert [await p.sessions.add_message("s", {"n": n}) for n in range(4)] == [1, 2, 3, 4]
