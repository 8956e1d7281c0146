"""Messages: appended by many, cleared, truncated and deleted meanwhile, against a plain list."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import suppress
from typing import Any

import msgspec
import pytest
import pytest_asyncio
from faulty_driver import FaultyDriver, RecordingDriver

from persistence import (
    ConflictError,
    CorruptRecordError,
    ImageRecord,
    InvalidValueError,
    NotFoundError,
    OutcomeUnknownError,
    Persistence,
    SessionRecord,
    UnavailableError,
    create_persistence,
)
from persistence.driver import Delete, Key, Put, Write
from persistence.drivers.memory import MemoryDriver
from persistence.log import APPEND_ENTRIES
from persistence.store import MAX_BYTES

SESSION = "session/s"


@pytest.fixture
def memory() -> MemoryDriver:
    return MemoryDriver()


@pytest.fixture
def driver(memory: MemoryDriver) -> RecordingDriver:
    return RecordingDriver(memory)


@pytest_asyncio.fixture
async def p(driver: RecordingDriver) -> AsyncIterator[Persistence]:
    async with create_persistence(driver) as opened:
        driver.forget()
        yield opened
    assert driver.broken == []


@pytest_asyncio.fixture
async def q(memory: MemoryDriver) -> AsyncIterator[Persistence]:
    """Another process on the same store."""
    async with create_persistence(RecordingDriver(memory)) as opened:
        yield opened


def session(id: str = "s") -> SessionRecord:
    return SessionRecord(session_id=id, image_id="i", container_id="c")


def key(number: int) -> str:
    return f"message/{number:012d}"


async def poke(memory: MemoryDriver, key: str, value: bytes, partition: str = SESSION) -> None:
    """Store bytes as somebody might who is not this library."""
    assert await memory.commit([Write(partition, (Put(key, value),), 7)]) == [True]


async def peek(memory: MemoryDriver, key: str, partition: str = SESSION) -> bytes:
    (entry,) = await memory.get([Key(partition, key)])
    assert entry is not None
    return entry.value


# ---- cost


async def test_driver_calls_are_what_was_promised(p: Persistence, driver: RecordingDriver) -> None:
    async def cost(call: Any) -> list[str]:
        driver.forget()
        await call
        return sorted(driver.calls)

    assert await cost(p.sessions.add_message("s", {})) == ["commit", "scan"]
    assert await cost(p.sessions.add_message("s", {})) == ["commit"]
    assert await cost(p.sessions.add_message("s", {}, idempotency_key="a")) == ["commit"]
    assert await cost(p.sessions.add_message("s", {}, expected_last=3)) == ["commit"]
    assert await cost(p.sessions.add_messages("s", [{}] * 800)) == ["commit"]
    assert await cost(p.sessions.get_messages("s", last=50)) == ["scan"]
    assert await cost(p.sessions.count_messages("s")) == ["scan"]
    assert await cost(p.sessions.get_messages("s", limit=50)) == ["scan", "scan"]  # at once
    assert await cost(p.sessions.get_messages("s", after=700, limit=50)) == ["scan", "scan"]
    assert await cost(p.sessions.get_messages("s", last=0)) == []
    assert await cost(p.sessions.add_messages("s", [])) == []
    await p.sessions.truncate_after_message("s", seq=700)
    assert await cost(p.sessions.add_message("s", {})) == ["commit", "scan"]
    assert await cost(p.sessions.add_message("s", {})) == ["commit"]
    assert await cost(p.sessions.get_messages("s", last=2)) == ["scan"]
    assert len(await cost(p.sessions.get_messages("s", last=50))) <= 3


async def test_the_two_reads_of_a_first_page_are_under_way_at_once(
    p: Persistence, driver: RecordingDriver
) -> None:
    await p.sessions.add_message("s", {})
    driver.forget()
    driver.gate.clear()
    reading = asyncio.ensure_future(p.sessions.get_messages("s"))
    for _ in range(20):
        await asyncio.sleep(0)
    assert driver.calls == ["scan", "scan"]
    driver.gate.set()
    assert await reading == [{}]


# ---- concurrent appends


async def test_fifty_concurrent_appends_keep_all_fifty(p: Persistence, driver: RecordingDriver) -> None:
    numbers = await asyncio.gather(*(p.sessions.add_message("s", {"n": n}) for n in range(50)))
    stored = await p.sessions.read_messages("s")
    assert [message.seq for message in stored] == list(range(1, 51))
    assert {message.message["n"]: message.seq for message in stored} == dict(enumerate(numbers))
    assert driver.calls.count("commit") <= 3


async def test_tasks_on_many_sessions_share_driver_calls(p: Persistence, driver: RecordingDriver) -> None:
    async def work(s: int) -> None:
        for n in range(10):
            assert await p.sessions.add_message(f"s{s}", {"n": n}) == n + 1

    await asyncio.gather(*(work(s) for s in range(64)))
    assert driver.calls.count("commit") <= 64  # of 640 appends; cold sessions start eight by eight
    for s in range(64):
        assert await p.sessions.get_messages(f"s{s}") == [{"n": n} for n in range(10)]


async def test_processes_that_append_to_one_session_take_turns(memory: MemoryDriver) -> None:
    opened = [await create_persistence(RecordingDriver(memory)) for _ in range(5)]
    numbers: dict[str, int] = {}

    async def work(process: int, task: int) -> None:
        for n in range(8):
            name = f"{process}-{task}-{n}"
            numbers[name] = await opened[process].sessions.add_message("s", {"n": name})

    await asyncio.gather(*(work(process, task) for process in range(5) for task in range(4)))
    stored = await opened[0].sessions.read_messages("s")
    for p in opened:
        await p.close()
    assert {message.message["n"]: message.seq for message in stored} == numbers
    assert [message.seq for message in stored] == list(range(1, 161))


async def test_of_many_who_expect_the_same_last_number_one_wins(memory: MemoryDriver) -> None:
    opened = [await create_persistence(RecordingDriver(memory)) for _ in range(3)]
    last = 0
    for _ in range(10):
        outcomes = await asyncio.gather(
            *(opened[n % 3].sessions.add_message("s", {"n": n}, expected_last=last) for n in range(12)),
            return_exceptions=True,
        )
        winners = [outcome for outcome in outcomes if isinstance(outcome, int)]
        assert winners == [last + 1]
        assert sum(isinstance(outcome, ConflictError) for outcome in outcomes) == 11
        (last,) = winners
    for p in opened:
        await p.close()


async def test_an_expected_number_may_be_that_of_another_process(p: Persistence, q: Persistence) -> None:
    await p.sessions.add_message("s", {})
    last = await q.sessions.add_message("s", {})
    assert await p.sessions.add_message("s", {}, expected_last=last) == 3
    await q.sessions.truncate_after_message("s", seq=1)
    with pytest.raises(ConflictError, match="is 1, not 3") as caught:
        await p.sessions.add_message("s", {}, expected_last=3)
    assert caught.value.partition == SESSION
    assert await p.sessions.add_message("s", {}, expected_last=1) == 5


# ---- idempotency keys


async def test_a_repeated_key_adds_once_however_it_is_repeated(p: Persistence, q: Persistence) -> None:
    async def add(opened: Persistence, name: str) -> int:
        return await opened.sessions.add_message("s", {"n": name}, idempotency_key=name)

    # Within one batch, from two processes, one after the other.
    numbers = await asyncio.gather(*(add((p, q)[n % 2], f"k{n % 7}") for n in range(70)))
    for n in range(7):
        assert len(set(numbers[n::7])) == 1
    assert numbers[:7] == [await add(p, f"k{n}") for n in range(7)]
    stored = await q.sessions.read_messages("s")
    assert sorted(message.message["n"] for message in stored) == [f"k{n}" for n in range(7)]
    assert {message.message["n"]: message.seq for message in stored} == {
        f"k{n}": numbers[n] for n in range(7)
    }
    await p.sessions.clear_messages("s")
    assert [await add(q, f"k{n}") for n in range(7)] == numbers[:7]
    assert await p.sessions.count_messages("s") == 0  # added once, and cleared


async def test_a_repeated_key_wins_over_what_was_expected(p: Persistence, q: Persistence) -> None:
    assert await p.sessions.add_message("s", {}, idempotency_key="k", expected_last=0) == 1
    await q.sessions.add_message("s", {})
    for opened in (p, q):
        assert await opened.sessions.add_message("s", {}, idempotency_key="k", expected_last=0) == 1


async def test_a_list_repeated_under_its_key_is_stored_once(p: Persistence, q: Persistence) -> None:
    many = [{"n": n} for n in range(2_000)]
    numbers = await p.sessions.add_messages("s", many, idempotency_key="k")
    assert numbers == await q.sessions.add_messages("s", many, idempotency_key="k")
    assert await q.sessions.get_messages("s") == many


# ---- lists


@pytest.mark.parametrize("count", [1, 2, APPEND_ENTRIES - 1])
async def test_a_list_within_the_limits_is_one_write(
    p: Persistence, driver: RecordingDriver, count: int
) -> None:
    await p.sessions.count_messages("s")
    driver.forget()
    assert await p.sessions.add_messages("s", [{}] * count) == list(range(1, count + 1))
    assert driver.calls == ["commit"]
    assert len(driver.commits[0]) == 1
    driver.forget()
    await p.sessions.add_messages("s", [{"x": "y" * 1_000_000}] * 3)
    assert driver.calls == ["commit"]


@pytest.mark.parametrize("count", [4, 100, APPEND_ENTRIES])
async def test_three_mebibytes_are_one_write_however_many_messages_they_are(
    p: Persistence, driver: RecordingDriver, count: int
) -> None:
    await p.sessions.count_messages("s")
    driver.forget()
    text = "y" * ((3 << 20) // count - len(b'{"x":""}'))
    await p.sessions.add_messages("s", [{"x": text}] * count)
    assert driver.calls == ["commit"]


async def test_a_longer_list_goes_batch_by_batch_and_says_how_far_it_got(
    p: Persistence, driver: RecordingDriver
) -> None:
    def messages() -> Iterator[dict[str, Any]]:
        for n in range(2_500):
            yield {"n": n}
        yield {"n": object()}

    with pytest.raises(InvalidValueError) as caught:
        await p.sessions.add_messages("s", messages())
    assert caught.value.stored == await p.sessions.count_messages("s")
    assert caught.value.stored is not None
    assert 0 < caught.value.stored < 2_500
    assert f"({caught.value.stored} stored)" in str(caught.value)
    with pytest.raises(InvalidValueError) as caught:
        await p.sessions.add_messages("t", [{}, {"n": object()}])
    assert caught.value.stored == 0
    assert await p.sessions.get_messages("t") == []


async def test_two_lists_that_fail_together_tell_each_its_own_count(
    p: Persistence, driver: RecordingDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("persistence.coalescer.RETRY_SECONDS", 0.05)
    lost = driver.memory.commit
    left = 1

    async def commit(writes: Any) -> Any:
        nonlocal left
        left -= 1
        if left < 0:
            raise ConnectionResetError
        return await lost(writes)

    driver.memory.commit = commit  # type: ignore[method-assign]
    calls = [
        asyncio.ensure_future(p.sessions.add_messages("s", [{}] * (APPEND_ENTRIES + 100))),
        asyncio.ensure_future(p.sessions.add_messages("s", [{}] * 10)),
    ]
    await asyncio.sleep(0.02)  # while the second fails, the rest of the first and a third wait together
    calls.append(asyncio.ensure_future(p.sessions.add_messages("s", [{}] * 20)))
    errors = await asyncio.gather(*calls, return_exceptions=True)
    assert all(isinstance(error, OutcomeUnknownError) for error in errors)
    stored = [getattr(error, "stored", None) for error in errors]
    driver.memory.commit = lost  # type: ignore[method-assign]
    assert stored == [await p.sessions.count_messages("s"), 0, 0]


# ---- reading


def expected(
    model: list[int], last: int | None, after: int | None, before: int | None, limit: int | None
) -> list[int]:
    if last is not None:
        return model[len(model) - min(last, len(model)) :]
    if before is not None:
        found = [n for n in model if n < before]
        return found if limit is None else found[len(found) - min(limit, len(found)) :]
    return [n for n in model if n > (after or 0)][: None if limit is None else limit]


@pytest.mark.parametrize("seed", range(3))
async def test_every_page_is_that_of_the_list(p: Persistence, seed: int) -> None:
    """Many markers: the visible numbers lie in many ranges."""
    rng = random.Random(seed)
    model: list[int] = []
    for _ in range(60):
        if model and rng.random() < 0.25:
            seq = rng.choice(model[-12:])
            await p.sessions.truncate_after_message("s", seq=seq)
            model = [n for n in model if n <= seq]
        else:
            model += await p.sessions.add_messages("s", [{}] * rng.randrange(1, 40))
    sizes = [0, 1, 2, 7, 50, len(model) - 1, len(model), len(model) + 1, 499, 500, 501, 10**12 - 1]
    places = [0, 1, *rng.sample(model, 5), model[-1], model[-1] + 1, 10**12 - 1]
    places += [n + rng.randrange(-2, 3) for n in rng.sample(model[3:], 5)]
    calls: list[tuple[int | None, int | None, int | None, int | None]] = [(None, None, None, None)]
    calls += [(size, None, None, None) for size in sizes]
    for limit in (None, 0, 1, 5, 600):
        calls.append((None, None, None, limit))
        calls += [(None, place, None, limit) for place in places]
        calls += [(None, None, place, limit) for place in places]
    for last, after, before, limit in calls:
        stored = await p.sessions.read_messages("s", last=last, after=after, before=before, limit=limit)
        assert [m.seq for m in stored] == expected(model, last, after, before, limit), (last, after, before)
    assert await p.sessions.count_messages("s") == len(model)


@pytest.mark.parametrize(
    "wrong",
    [
        {"last": -1},
        {"last": True},
        {"last": 1.0},
        {"limit": "1"},
        {"after": -1},
        {"before": 10**12},
        {"last": 1, "limit": 1},
        {"after": 1, "before": 2},
        {"last": 1, "after": 1},
    ],
    ids=str,
)
async def test_a_wrong_bound_is_refused(p: Persistence, driver: RecordingDriver, wrong: Any) -> None:
    with pytest.raises(InvalidValueError):
        await p.sessions.get_messages("s", **wrong)
    assert driver.calls == []


@pytest.mark.parametrize("seed", range(3))
async def test_who_reads_while_another_truncates_sees_one_state(memory: MemoryDriver, seed: int) -> None:
    """Whatever is read is a state that the session has had: it ends in a run of one round's messages."""
    rng = random.Random(seed)
    reader = await create_persistence(RecordingDriver(memory))
    writer = await create_persistence(RecordingDriver(memory))
    await writer.sessions.add_messages("s", [{"round": 0}] * 700)
    states: list[list[int]] = [[0] * 700]
    done = False

    async def write() -> None:
        nonlocal done
        for turn in range(1, 15):
            keep = rng.randrange(300, 700)
            stored = await writer.sessions.read_messages("s")
            states.append(states[-1][:keep])
            await writer.sessions.truncate_after_message("s", seq=stored[keep - 1].seq)
            states.append(states[-1] + [turn] * (700 - keep))
            await writer.sessions.add_messages("s", [{"round": turn}] * (700 - keep))
            await asyncio.sleep(0.002)
        done = True

    async def read() -> int:
        count = 0
        while not done:
            found = [m["round"] for m in await reader.sessions.get_messages("s")]
            assert found in states
            tail = [m["round"] for m in await reader.sessions.get_messages("s", last=600)]
            assert any(tail == state[-600:] for state in states)
            count += 1
        return count

    outcomes = await asyncio.gather(write(), read(), read(), read())
    assert sum(outcomes[1:]) > 10
    await reader.close()
    await writer.close()


# ---- a memory of the end that is out of date


async def test_a_clear_clears_what_others_added(p: Persistence, q: Persistence) -> None:
    assert await p.sessions.count_messages("s") == 0
    await q.sessions.add_messages("s", [{}] * 3)
    assert await p.sessions.clear_messages("s") == 3
    assert await q.sessions.count_messages("s") == 0


async def test_a_clear_that_waits_behind_a_message_takes_it_along(p: Persistence, q: Persistence) -> None:
    await p.sessions.add_messages("s", [{"n": 0}, {"n": 1}])
    # Neither knows where the session ends: they wait for that together.
    _, cleared = await asyncio.gather(q.sessions.add_message("s", {"n": 2}), q.sessions.clear_messages("s"))
    assert cleared == 3
    assert await p.sessions.get_messages("s") == []
    assert await q.sessions.add_message("s", {"n": 3}) == 5


async def test_a_truncate_knows_what_others_added(p: Persistence, q: Persistence) -> None:
    await p.sessions.add_message("s", {})
    await q.sessions.add_messages("s", [{}] * 3)
    assert await p.sessions.truncate_after_message("s", seq=3) == 1


async def test_clears_of_two_processes_find_each_other_s_markers(p: Persistence, q: Persistence) -> None:
    await p.sessions.add_messages("s", [{}] * 5)
    await p.sessions.truncate_after_message("s", seq=3)
    await p.sessions.add_message("s", {})
    assert await q.sessions.clear_messages("s") == 4  # and the marker that p remembers is gone
    await q.sessions.add_message("s", {})
    assert await p.sessions.clear_messages("s") == 1


async def test_a_delete_deletes_what_others_added(p: Persistence, q: Persistence) -> None:
    assert await p.sessions.count_messages("s") == 0
    await q.sessions.add_messages("s", [{}] * 3)
    assert (await p.sessions.delete_session("s")).messages == 3
    assert await q.sessions.count_messages("s") == 0


async def test_a_session_that_another_deleted_lives_once_it_is_saved(p: Persistence, q: Persistence) -> None:
    await p.sessions.save_session(session())
    await p.sessions.add_message("s", {"n": 1})
    await q.sessions.delete_session("s")
    await p.sessions.save_session(session())
    for opened in (p, q):
        await opened.sessions.add_message("s", {"n": 2})
    assert await p.sessions.get_messages("s") == [{"n": 2}] * 2


@pytest.mark.parametrize("how", ["clear", "truncate", "delete", "delete and save"])
async def test_an_append_after_a_remembered_number_never_vanishes(
    p: Persistence, q: Persistence, how: str
) -> None:
    await p.sessions.save_session(session())
    await p.sessions.add_messages("s", [{"n": n} for n in range(4)])  # p remembers 4
    await q.sessions.add_messages("s", [{"n": n} for n in (4, 5)])
    match how:
        case "clear":
            await q.sessions.clear_messages("s")
        case "truncate":
            await q.sessions.truncate_after_message("s", seq=4)
        case "delete":
            await q.sessions.delete_session("s")
        case _:
            await q.sessions.delete_session("s")
            await q.sessions.save_session(session())
    await q.repair()
    if how == "delete":
        with pytest.raises(NotFoundError):
            await p.sessions.add_message("s", {"n": "late"})
        assert await q.sessions.count_messages("s") == 0
        return
    assert await p.sessions.add_message("s", {"n": "late"}) > 6
    for opened in (p, q):
        assert (await opened.sessions.get_messages("s"))[-1] == {"n": "late"}
    assert await p.sessions.count_messages("s") == (5 if how == "truncate" else 1)


async def test_a_number_is_forgotten_after_a_while(
    p: Persistence, driver: RecordingDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1_000.0
    monkeypatch.setattr("persistence.log.steady_seconds", lambda: now)
    await p.sessions.add_message("s", {})
    now += 599
    driver.forget()
    await p.sessions.add_message("s", {})
    assert driver.calls == ["commit"]
    now += 601
    driver.forget()
    await p.sessions.add_message("s", {})
    assert driver.calls == ["scan", "commit"]


async def test_stubs_go_after_a_day_and_the_numbers_stay_right(memory: MemoryDriver) -> None:
    now = 1_700_000_000_000
    async with create_persistence(RecordingDriver(memory), clock=lambda: now) as p:
        await p.sessions.add_messages("s", [{"n": n} for n in range(6)])
        await p.sessions.truncate_after_message("s", seq=2)
        await p.sessions.add_message("s", {"n": 7})
        report = await p.repair()
        assert report.stubs_removed == 0
        now += 2 * 86_400_000
        report = await p.repair()
        assert report.stubs_removed == 4
        assert [m.seq for m in await p.sessions.read_messages("s")] == [1, 2, 8]
        assert await p.sessions.add_message("s", {"n": 8}) == 9
        assert await p.sessions.count_messages("s") == 4
        await p.sessions.delete_session("s")
        now += 30 * 86_400_000
        await p.repair()
        assert await memory.partitions(None, 10) == ([], None)
        assert await p.sessions.add_message("s", {"n": 9}) == 1


async def test_a_clear_that_is_always_outpaced_gives_up(
    p: Persistence, driver: RecordingDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("log", "coalescer"):
        monkeypatch.setattr(f"persistence.{module}.RETRY_SECONDS", 0.1)
    await p.sessions.add_message("s", {})

    async def refuse(writes: Any) -> Any:
        return [False] * len(writes)

    commit = driver.apply
    driver.apply = refuse  # type: ignore[method-assign]
    for call in (p.sessions.clear_messages("s"), p.sessions.add_message("s", {})):
        with pytest.raises(UnavailableError, match="other writers were faster") as caught:
            await call
        assert caught.value.partition == SESSION
    driver.apply = commit  # type: ignore[method-assign]
    assert await p.sessions.count_messages("s") == 1


async def test_a_store_that_was_away_between_two_refusals_is_no_faster_writer(
    p: Persistence, driver: RecordingDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("persistence.log.RETRY_SECONDS", 0.01)
    await p.sessions.add_message("s", {"n": 1})
    apply, tries = driver.apply, 0

    async def lose_twice(writes: Any) -> Any:
        nonlocal tries
        tries += 1
        await asyncio.sleep(0.02)
        return await apply(writes) if tries > 2 else [False] * len(writes)

    driver.apply = lose_twice  # type: ignore[method-assign]
    assert await p.sessions.add_message("s", {"n": 2}) == 2


async def test_who_loses_to_others_again_and_again_does_not_pause_ever_longer(
    p: Persistence, driver: RecordingDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses: list[float] = []
    sleep = asyncio.sleep

    async def pause(seconds: float) -> None:
        pauses.append(seconds)
        await sleep(0)

    apply, tries = driver.apply, 0

    async def lose_often(writes: Any) -> Any:
        nonlocal tries
        tries += 1
        return [False] * len(writes) if tries <= 20 else await apply(writes)

    monkeypatch.setattr("persistence.coalescer.asyncio.sleep", pause)
    await p.sessions.add_message("s", {"n": 1})
    driver.apply = lose_often  # type: ignore[method-assign]
    assert await p.sessions.add_message("s", {"n": 2}) == 2
    assert sum(seconds > 0 for seconds in pauses) == 20
    assert max(pauses) <= 0.08  # the winner makes none: whoever doubled them would never have a turn


async def test_a_slow_store_is_no_faster_writer(
    p: Persistence, driver: RecordingDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("persistence.log.RETRY_SECONDS", 0.01)
    await p.sessions.count_messages("s")
    driver.gate.clear()
    calls = [asyncio.ensure_future(p.sessions.add_message("s", {"n": n})) for n in range(3)]
    await asyncio.sleep(0.03)
    driver.gate.set()
    assert await asyncio.gather(*calls) == [1, 2, 3]


# ---- all at once; test_log_model.py has them one after the other


@pytest.mark.parametrize("rate", [0.0, 0.15])
@pytest.mark.parametrize("seed", range(4))
async def test_several_processes_at_once_keep_what_was_acknowledged(
    memory: MemoryDriver, monkeypatch: pytest.MonkeyPatch, seed: int, rate: float
) -> None:
    """Nobody removes anything in `quiet`; in `noisy` all do everything. With a `rate` the store fails."""
    if rate:
        monkeypatch.setattr("persistence.coalescer.RETRY_SECONDS", 0.5)
    rng = random.Random(seed)
    drivers = [FaultyDriver(memory, seed=9 * seed + n, rate=rate, lanes=1 + n) for n in range(3)]
    opened = [await create_persistence(driver) for driver in drivers]
    numbers: dict[str, dict[str, int]] = {"quiet": {}, "noisy": {}}
    trouble = (OutcomeUnknownError, UnavailableError) if rate else ()
    done = False

    async def add(p: Persistence, id: str, text: str) -> None:
        with suppress(*trouble):
            numbers[id][text] = await p.sessions.add_message(id, {"t": text})

    async def work(task: int) -> None:
        p = opened[task % 3]
        for step in range(15):
            text = f"{task}-{step}"
            await add(p, "quiet", text)
            with suppress(NotFoundError, *trouble):  # deleted; or the number was hidden meanwhile
                match rng.randrange(12):
                    case 0:
                        await p.sessions.clear_messages("noisy")
                    case 1:
                        stored = await p.sessions.read_messages("noisy", last=20)
                        if stored:
                            await p.sessions.truncate_after_message("noisy", seq=rng.choice(stored).seq)
                    case 2 if rng.random() < 0.3:
                        await p.sessions.delete_session("noisy")
                    case 2 | 3:
                        await p.sessions.save_session(session("noisy"))
                    case 4:
                        await p.repair()
                    case _:
                        await add(p, "noisy", text)

    async def read() -> None:
        p = opened[0]
        while not done:
            with suppress(*trouble):
                for id in ("quiet", "noisy"):
                    seen = [m.seq for m in await p.sessions.read_messages(id)]
                    assert seen == sorted(set(seen))
                    await p.sessions.count_messages(id)
            await asyncio.sleep(0.001)

    async def write() -> None:
        nonlocal done
        await asyncio.gather(*(work(task) for task in range(36)))
        done = True

    async with asyncio.timeout(60):
        await asyncio.gather(write(), read())
    for driver in drivers:
        await driver.settle()
    for p in opened:
        stored = await p.sessions.read_messages("quiet")
        found = {m.message["t"]: m.seq for m in stored}
        assert numbers["quiet"].items() <= found.items(), "lost"
        assert len(found) == len(stored), "doubled"
        assert rate or found == numbers["quiet"]
        assert [m.seq for m in stored] == list(range(1, len(stored) + 1)), "gaps"
        stored = await p.sessions.read_messages("noisy")
        assert len({m.message["t"] for m in stored}) == len(stored), "doubled"
        for m in stored:
            assert numbers["noisy"].get(m.message["t"], m.seq) == m.seq
        assert await p.sessions.count_messages("noisy") == len(stored)
        await p.sessions.save_session(session("noisy"))
        number = await p.sessions.add_message("noisy", {"t": "end"})
        assert [m.seq for m in await p.sessions.read_messages("noisy", last=1)] == [number]
        numbers["noisy"]["end"] = number
        await p.sessions.clear_messages("noisy")
    assert len(set(numbers["noisy"].values())) == len(numbers["noisy"])  # no number twice
    await opened[1].repair()
    page = await memory.scan("session/noisy", "message/", "message0", limit=10_000)
    assert [entry.key for entry in page.entries] == [key(n + 1) for n in range(len(page.entries))], "gaps"
    assert len(page.entries) >= max(numbers["noisy"].values())
    for p, driver in zip(opened, drivers, strict=True):
        await p.close()
        assert driver.broken == []
    assert sum(len(driver.seen) for driver in drivers) >= (10 if rate else 0)  # it was a test


# ---- what cannot be read

GARBAGE = [b"", b"[]", b"{", b"null", b"{}", b'{"f":1}', b'{"f":"1"}', b'{"f":1,"k":"new"}', b"\xff\xfe"]
NEWER = b'{"f":2,"v":{"n":1},"shape":"unknown to us"}'


@pytest.mark.parametrize("garbage", [*GARBAGE, NEWER])
async def test_a_corrupt_last_message_stops_appends_and_is_left_alone(
    memory: MemoryDriver, p: Persistence, q: Persistence, garbage: bytes
) -> None:
    await p.sessions.add_messages("s", [{"n": n} for n in range(3)])
    await poke(memory, key(3), garbage)
    for call in (
        q.sessions.add_message("s", {}),
        q.sessions.count_messages("s"),
        q.sessions.get_messages("s"),
        q.sessions.get_messages("s", last=1),
        q.sessions.clear_messages("s"),
    ):
        with pytest.raises(CorruptRecordError) as caught:
            await call
        assert (caught.value.partition, caught.value.key) == (SESSION, key(3))
    assert await peek(memory, key(3)) == garbage
    await q.sessions.add_message("other", {})  # another session is not concerned


@pytest.mark.parametrize("saved", [False, True])
@pytest.mark.parametrize("garbage", [*GARBAGE, NEWER])
async def test_a_session_whose_last_message_is_corrupt_can_be_deleted(
    memory: MemoryDriver, p: Persistence, q: Persistence, garbage: bytes, saved: bool
) -> None:
    record = {"session_id": "s", "image_id": "i", "container_id": "c"}
    if saved:
        await p.sessions.save_session(record)
    await p.sessions.add_messages("s", [{"n": n} for n in range(3)])
    await poke(memory, key(3), garbage)
    removed = await q.sessions.delete_session("s")
    assert (removed.sessions, removed.messages) == (int(saved), 3)
    assert await q.sessions.get_messages("s") == []
    assert not await q.sessions.delete_session("s")
    for one in (p, q):
        with pytest.raises(NotFoundError):
            await one.sessions.add_message("s", {})
    assert (await q.repair()).corrupt == []  # nothing of it is left
    await p.sessions.save_session(record)
    await p.sessions.add_message("s", {"n": 3})
    assert await q.sessions.get_messages("s") == [{"n": 3}]


@pytest.mark.parametrize("garbage", [*GARBAGE, NEWER, b'{"f":1,"n":2,"at":1,"t":true,"v":{"$bytes":5}}'])
async def test_a_corrupt_message_does_not_hide_the_others(
    memory: MemoryDriver, p: Persistence, garbage: bytes
) -> None:
    await p.sessions.add_messages("s", [{"n": n} for n in range(5)])
    await poke(memory, key(2), garbage)
    with pytest.raises(CorruptRecordError) as caught:
        await p.sessions.get_messages("s")
    assert (caught.value.partition, caught.value.key) == (SESSION, key(2))
    assert await p.sessions.get_messages("s", after=2) == [{"n": 2}, {"n": 3}, {"n": 4}]
    assert await p.sessions.get_messages("s", before=2) == [{"n": 0}]
    assert await p.sessions.count_messages("s") == 5
    assert await p.sessions.add_message("s", {"n": 5}) == 6
    assert await peek(memory, key(2)) == garbage


async def test_what_a_newer_version_stored_is_called_by_its_name(
    memory: MemoryDriver, p: Persistence
) -> None:
    await poke(memory, key(1), NEWER)
    await poke(memory, "record", NEWER, "image/i")
    for call in (p.sessions.get_messages("s"), p.images.find_image_by_id("i")):
        with pytest.raises(CorruptRecordError, match="format 2 by a newer version of agent-persistence"):
            await call


async def test_a_corrupt_marker_is_named(memory: MemoryDriver, p: Persistence, q: Persistence) -> None:
    await p.sessions.add_messages("s", [{}] * 4)
    await p.sessions.truncate_after_message("s", seq=2)
    await p.sessions.add_message("s", {})
    await poke(memory, key(5), b"{")
    for call in (q.sessions.get_messages("s"), q.sessions.clear_messages("s")):
        with pytest.raises(CorruptRecordError) as caught:
            await call
        assert (caught.value.partition, caught.value.key) == (SESSION, key(5))
    assert await peek(memory, key(5)) == b"{"
    assert await q.sessions.get_messages("s", last=1) == [{}]
    assert await q.sessions.add_message("s", {}) == 7


async def test_a_corrupt_idempotency_key_stops_its_own_callers_alone(
    memory: MemoryDriver, p: Persistence, q: Persistence
) -> None:
    await p.sessions.add_message("s", {}, idempotency_key="k")
    await poke(memory, "once/message/k", b"{")
    wrong, right, plain = await asyncio.gather(
        q.sessions.add_message("s", {}, idempotency_key="k"),
        q.sessions.add_message("s", {}, idempotency_key="other"),
        q.sessions.add_message("s", {}),
        return_exceptions=True,
    )
    assert isinstance(wrong, CorruptRecordError)
    assert wrong.key == "once/message/k"
    assert {right, plain} == {2, 3}


@pytest.mark.parametrize("garbage", [b"{", NEWER, b"{}"])
async def test_a_corrupt_entry_of_a_listing_is_named(
    memory: MemoryDriver, p: Persistence, garbage: bytes
) -> None:
    record = ImageRecord(image_id="i", container_id="c", session_id="s", name="n")
    await p.images.save_image(record)
    hint = "9223372036854775807/x"
    await poke(memory, hint, garbage, "index/images")
    with pytest.raises(CorruptRecordError) as caught:
        await p.images.find_all_images()
    assert (caught.value.partition, caught.value.key) == ("index/images", hint)
    assert await p.images.find_image_by_id("i") == record
    assert await p.images.find_images_by_name("n") == [record]
    assert await peek(memory, hint, "index/images") == garbage


async def test_an_entry_that_is_missing_is_corrupt_not_skipped(memory: MemoryDriver, p: Persistence) -> None:
    await p.sessions.add_messages("s", [{"n": n} for n in range(5)])
    assert await memory.commit([Write(SESSION, (Delete(key(3)),), 7)]) == [True]
    for call in (p.sessions.get_messages("s"), p.sessions.get_messages("s", last=4)):
        with pytest.raises(CorruptRecordError, match="entry 3 is missing") as caught:
            await call
        assert caught.value.partition == SESSION
    assert await p.sessions.get_messages("s", last=2) == [{"n": 3}, {"n": 4}]


# ---- long values


async def test_a_long_value_is_cut_and_comes_back(p: Persistence, driver: RecordingDriver) -> None:
    long = {"text": "ü€😀" * 2_000_000, "raw": b"\0\xff" * 1_000_000}  # 20 MB
    await p.sessions.add_messages("s", [{"n": 1}, long, {"n": 2}])
    assert await p.sessions.get_messages("s") == [{"n": 1}, long, {"n": 2}]
    record = ImageRecord(image_id="i", container_id="c", session_id="s", name="n", custom_data=long)
    await p.images.save_image(record)
    assert await p.images.find_image_by_id("i") == record


@pytest.mark.parametrize(
    "length", [1_000_000, 1_044_000, 1_048_576, 1_999_990, 2_000_000, 2_000_001, 5_000_000]
)
async def test_lengths_about_a_cut_come_back(p: Persistence, length: int) -> None:
    value = {"t": "x" * length}
    await p.sessions.add_message("s", value)
    assert await p.sessions.get_messages("s") == [value]


async def test_a_hundred_megabytes_are_the_limit(p: Persistence, driver: RecordingDriver) -> None:
    empty = len(b'{"t":""}')
    value = {"t": "x" * (MAX_BYTES - empty)}
    await p.sessions.add_message("s", value)
    assert await p.sessions.get_messages("s") == [value]
    driver.forget()
    value["t"] += "x"
    with pytest.raises(InvalidValueError, match="limit is 105,906,176"):
        await p.sessions.add_message("s", value)
    assert driver.calls == []


async def chunk_keys(memory: MemoryDriver, partition: str) -> list[str]:
    page = await memory.scan(partition, "chunk/", "chunk0", limit=1_000)
    return [entry.key for entry in page.entries]


@pytest.mark.parametrize("tamper", ["missing", "changed", "cut", "swapped"])
async def test_a_tampered_chunk_is_corrupt(memory: MemoryDriver, p: Persistence, tamper: str) -> None:
    value = {"t": "".join(str(n) for n in range(700_000))}
    await p.sessions.add_messages("s", [{"n": 1}, value])
    await p.images.save_image(
        ImageRecord(image_id="i", container_id="c", session_id="s", name="n", custom_data=value)
    )
    for partition in (SESSION, "image/i"):
        first, second, *_ = await chunk_keys(memory, partition)
        one, two = await peek(memory, first, partition), await peek(memory, second, partition)
        match tamper:
            case "missing":
                await memory.commit([Write(partition, (Delete(second),), 7)])
            case "changed":
                await poke(memory, second, two[:-1] + b"X", partition)
            case "cut":
                await poke(memory, second, two[:-1], partition)
            case _:
                await poke(memory, first, two, partition)
                await poke(memory, second, one, partition)
    with pytest.raises(CorruptRecordError, match="chunk") as caught:
        await p.sessions.get_messages("s")
    assert (caught.value.partition, caught.value.key) == (SESSION, key(2))
    assert await p.sessions.get_messages("s", before=2) == [{"n": 1}]
    with pytest.raises(CorruptRecordError, match="chunk") as caught:
        await p.images.find_image_by_id("i")
    assert (caught.value.partition, caught.value.key) == ("image/i", "record")


async def test_what_is_stored_can_be_read_in_any_tool(memory: MemoryDriver, p: Persistence) -> None:
    await p.sessions.add_message("s", {"role": "user", "content": "hello"})
    stored = msgspec.json.decode(await peek(memory, key(1)))
    assert stored["f"] == 1
    assert stored["v"] == {"role": "user", "content": "hello"}
    assert "t" not in stored


async def test_a_clock_of_floats_does_no_harm(memory: MemoryDriver) -> None:
    async with create_persistence(RecordingDriver(memory), clock=lambda: 1.7e12 + 0.5) as p:  # type: ignore[arg-type, return-value]
        await p.sessions.add_message("s", {"n": 1}, idempotency_key="k")
        await p.sessions.clear_messages("s")
        await p.sessions.add_message("s", {"n": 2}, idempotency_key="l")
        (stored,) = await p.sessions.read_messages("s")
        assert (stored.created_at, stored.message) == (1_700_000_000_000, {"n": 2})
        await p.images.save_image(ImageRecord(image_id="i", container_id="c", session_id="s", name="n"))
        await p.images.update_metadata("i", {"a": 1})
        assert len(await p.images.find_all_images()) == 1
        await p.images.delete_image("i")
        await p.repair()


async def test_any_depth_that_is_stored_can_be_read(p: Persistence) -> None:
    value: dict[str, Any] = {}
    depth = 0
    for step in (100, 10, 1):
        while True:
            deeper = value
            for _ in range(step):
                deeper = {"a": deeper}
            try:
                await p.sessions.add_message(f"{depth + step}", deeper)
            except InvalidValueError:
                break
            value, depth = deeper, depth + step
            assert await p.sessions.get_messages(f"{depth}") == [value]
    assert depth == 499  # around an empty one


async def test_pages_of_long_messages_are_short(p: Persistence) -> None:
    for n in range(8):
        await p.sessions.add_message("s", {"n": n, "text": "x" * (3_000_000 if n % 2 else 900_000)})

    async def numbers(**bounds: Any) -> list[int]:
        return [item.number for item in await p.sessions.log.read(SESSION, limit=500, **bounds)]

    assert await numbers(most=5 << 20) == [1, 2, 3]
    assert await numbers(most=5 << 20, above=3) == [4, 5]
    assert await numbers(most=5 << 20, newest=True) == [7, 8]
    assert await numbers(most=1, below=3, newest=True) == [2]
    assert await numbers() == [1, 2, 3, 4, 5, 6, 7, 8]
    assert [message["n"] for message in await p.sessions.get_messages("s")] == list(range(8))


class Forgetful(MemoryDriver):
    """A driver of a server that comes back without the last Writes it acknowledged."""

    may_lose = True

    async def lose(self, partition: str, *keys: str) -> None:
        assert await self.commit([Write(partition, tuple(map(Delete, keys)), 5)]) == [True]


@pytest.mark.parametrize("then", ["add", "clear", "delete", "save"])
async def test_what_a_store_has_lost_leaves_no_hole(then: str) -> None:
    store = Forgetful()
    async with create_persistence(store) as p, create_persistence(store) as q:
        await p.sessions.save_session(session())
        await p.sessions.add_messages("s", [{"n": n} for n in range(3)])
        for n in (3, 4):
            await p.sessions.add_message("s", {"n": n}, idempotency_key=str(n))
        await store.lose(SESSION, key(4), key(5), "once/message/3", "once/message/4")
        left = [{"n": 0}, {"n": 1}, {"n": 2}]
        if then == "add":
            assert await p.sessions.add_message("s", {"n": 4}, idempotency_key="4") == 4
            left.append({"n": 4})
        elif then == "clear":
            assert await p.sessions.clear_messages("s") == 3
            left = []
        elif then == "delete":
            assert (await p.sessions.delete_session("s")).messages == 3
            left = []
        else:
            await p.sessions.set_expiry("s", 10**14)
        assert await q.sessions.get_messages("s") == left
        if then != "delete":
            await p.sessions.add_message("s", {"n": 9})
            assert await q.sessions.get_messages("s") == [*left, {"n": 9}]


async def test_no_entry_is_emptied_after_the_store_has_lost_the_marker_that_hid_it() -> None:
    class Sudden(Forgetful):
        sudden = True

        async def commit(self, writes: Sequence[Write]) -> list[bool | None]:
            if self.sudden and any(b'"stub"' in getattr(op, "value", b"") for w in writes for op in w.ops):
                self.sudden = False
                await self.lose(SESSION, key(4))
            return await super().commit(writes)

    async with create_persistence(Sudden()) as p:
        messages = [{"n": n} for n in range(3)]
        await p.sessions.add_messages("s", messages)
        await p.sessions.clear_messages("s")
        assert await p.sessions.get_messages("s") == messages
        await p.sessions.add_message("s", {"n": 3})
        assert await p.sessions.clear_messages("s") == 4
        assert await p.sessions.get_messages("s") == []


async def test_what_a_lost_marker_has_hidden_stays_though_there_is_one_before_it() -> None:
    class Sudden(Forgetful):
        async def commit(self, writes: Sequence[Write]) -> list[bool | None]:
            done = await super().commit(writes)
            if any(isinstance(op, Put) and op.key == key(6) for write in writes for op in write.ops):
                await self.lose(SESSION, key(6))
            return done

    async with create_persistence(Sudden()) as p:
        await p.sessions.add_message("s", {"old": True})
        await p.sessions.clear_messages("s")
        messages = [{"n": n} for n in range(3)]
        await p.sessions.add_messages("s", messages)
        await p.sessions.clear_messages("s")
        assert await p.sessions.get_messages("s") == messages


async def test_only_a_store_that_may_lose_something_pays(p: Persistence, driver: RecordingDriver) -> None:
    await p.sessions.add_message("s", {})
    driver.forget()
    await p.sessions.add_message("s", {})
    assert [len(write.ops) for writes in driver.commits for write in writes] == [1]
