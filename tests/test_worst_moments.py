"""What others, or the store, do at the worst moment: nothing is lost, and no error says what is not so."""

from __future__ import annotations

import asyncio
import types
from collections.abc import Awaitable, Callable, Generator, Sequence
from functools import partial
from typing import Any

import pytest
from faulty_driver import RecordingDriver

from persistence import (
    CorruptRecordError,
    ImageRecord,
    NotFoundError,
    OutcomeUnknownError,
    SessionRecord,
    UnavailableError,
    create_persistence,
)
from persistence import coalescer as coalescer_module
from persistence.driver import Entry, Key, Page, Put, Write
from persistence.drivers.memory import MemoryDriver
from persistence.repair import DAY_MS


def session(id: str = "s") -> SessionRecord:
    return SessionRecord(session_id=id, image_id="i", container_id="c")


def image(**fields: Any) -> ImageRecord:
    return ImageRecord(image_id="i", container_id="c", session_id="s", name="n", **fields)


@pytest.mark.parametrize("behind", [0, 50])
async def test_a_key_of_a_forgotten_life_is_forgotten(behind: int) -> None:
    """Whatever the clocks of those who appended and who deleted."""
    now, memory = 1_700_000_000_000, MemoryDriver()
    p = await create_persistence(RecordingDriver(memory), clock=lambda: now)
    q = await create_persistence(RecordingDriver(memory), clock=lambda: now - behind)
    await p.sessions.save_session(session())
    await p.sessions.add_message("s", {"n": 1}, idempotency_key="job")
    await q.sessions.delete_session("s")
    now += 8 * DAY_MS
    await p.repair()
    await p.sessions.save_session(session())
    await p.sessions.add_message("s", {"n": 2}, idempotency_key="job")
    assert await p.sessions.get_messages("s") == [{"n": 2}]
    await p.close()
    await q.close()


async def test_a_message_of_a_deleted_session_is_not_called_repeated() -> None:
    p = await create_persistence(MemoryDriver())
    await p.sessions.save_session(session())
    await p.sessions.add_message("s", {}, idempotency_key="job")
    await p.sessions.delete_session("s")
    for key in ("job", None):
        with pytest.raises(NotFoundError):
            await p.sessions.add_message("s", {}, idempotency_key=key)
    await p.close()


class HeldGets(RecordingDriver):
    held = False

    async def get(self, keys: Sequence[Key]) -> list[Entry | None]:
        if self.held:
            await self.gate.wait()
        return await super().get(keys)

    async def _pass(self) -> None:
        await asyncio.sleep(0)


async def test_a_clear_that_was_called_unavailable_does_not_happen_later() -> None:
    driver = HeldGets()
    async with create_persistence(driver) as p:
        await p.sessions.add_messages("s", [{"n": 1}, {"n": 2}])
        await p.sessions.truncate_after_message("s", seq=1)  # now there is a marker to be read
        driver.held = True
        driver.gate.clear()
        with pytest.raises(UnavailableError):
            await p.sessions.clear_messages("s", timeout=0.02)
        driver.gate.set()
        await asyncio.sleep(0.02)
        assert await p.sessions.get_messages("s") == [{"n": 1}]


class DiesAfter(RecordingDriver):
    """Answers nothing any more once a Write to `partition` was applied and acknowledged."""

    partition: str | None = None
    dead = False

    def _used(self, call: str) -> None:
        super()._used(call)
        if self.dead:
            raise UnavailableError("gone")

    async def apply(self, writes: Sequence[Write]) -> list[bool | None]:
        outcomes = await super().apply(writes)
        self.dead = any(write.partition == self.partition for write in writes)
        return outcomes


async def test_what_failed_after_a_change_is_not_called_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coalescer_module, "RETRY_SECONDS", 0.05)
    driver = DiesAfter()
    async with create_persistence(driver) as p:
        await p.sessions.add_messages("s", [{"n": 1}, {"n": 2}])
        driver.partition = "session/s"
        with pytest.raises(OutcomeUnknownError):
            await p.sessions.clear_messages("s")
        driver.dead, driver.partition = False, None
        assert await p.sessions.get_messages("s") == []


@pytest.mark.parametrize("what", ["clear_messages", "delete_session"])
async def test_a_corrupt_message_does_not_keep_the_others_from_going(what: str) -> None:
    memory = MemoryDriver()
    async with create_persistence(RecordingDriver(memory)) as p:
        await p.sessions.add_messages("s", [{"n": n} for n in range(3)])
        await memory.commit([Write("session/s", (Put("message/000000000002", b"rubbish"),), 77)])
        await getattr(p.sessions, what)("s")
        page: Page = await memory.scan("session/s", "message/", "message/000000000004", limit=9)
        stays = what == "clear_messages"  # a session that is deleted takes it along
        stubs = [b'"stub"' in entry.value for entry in page.entries]
        assert stubs == [True, not stays, True]
        assert (page.entries[1].value == b"rubbish") == stays
        assert (await p.repair()).corrupt_count == int(stays)


class Overtaken(RecordingDriver):
    """Loses the answer to the first Write of `key`, after `then` was done by somebody else."""

    key = ""
    then: Callable[[], Awaitable[object]] | None = None

    async def apply(self, writes: Sequence[Write]) -> list[bool | None]:
        outcomes = await super().apply(writes)
        if self.then is not None and any(op.key == self.key for write in writes for op in write.ops):
            then, self.then = self.then, None
            await then()
            raise ConnectionResetError
        return outcomes


async def test_a_long_value_that_is_written_again_has_its_chunks() -> None:
    memory, long = MemoryDriver(), {"text": "y" * 2_000_000}
    driver = Overtaken(memory)
    async with create_persistence(driver) as p, create_persistence(RecordingDriver(memory)) as q:
        driver.key, driver.then = "record", lambda: q.images.save_image(image(description="of another"))
        await p.images.save_image(image(metadata=long))
        found = await q.images.find_image_by_id("i")
        assert found is not None
        assert found.metadata == long
        driver.key, driver.then = "message/000000000001", lambda: q.sessions.clear_messages("s")
        await p.sessions.add_message("s", long)
        assert await q.sessions.get_messages("s") == [long]
        driver.key, driver.then = "head", lambda: q.streams.delete("x")
        await p.streams.append("x", 0, long)
        assert await q.streams.get_parts("x") == [long]
        later = await q.repair()
        assert (later.corrupt, later.chunks_removed) == ([], 0)


async def test_a_fork_of_an_image_takes_the_messages_of_a_session_never_saved() -> None:
    async with create_persistence(MemoryDriver()) as p:
        await p.images.save_image(image())
        await p.sessions.add_message("s", {"n": 1})
        fork = await p.images.fork_image("i")
        assert await p.sessions.get_messages(fork.session_id) == [{"n": 1}]


@types.coroutine
def _rest(work: Any, waited: Any) -> Generator[Any, Any, Any]:
    """Go on with `work`, which has come as far as to wait for `waited`."""
    while True:
        try:
            answer = yield waited
        except BaseException as error:
            step = partial(work.throw, error)
        else:
            step = partial(work.send, answer)
        try:
            waited = step()
        except StopIteration as done:
            return done.value


def _eager(loop: asyncio.AbstractEventLoop, work: Any, **options: Any) -> asyncio.Future[Any]:
    """Do what ``asyncio.eager_task_factory`` does from Python 3.12 on: begin at once."""

    async def rest(waited: Any) -> Any:
        return await _rest(work, waited)

    try:
        waited = work.send(None)
    except StopIteration as done:
        future = loop.create_future()
        future.set_result(done.value)
        return future
    return asyncio.Task(rest(waited), loop=loop)


async def test_tasks_may_be_eager() -> None:
    loop = asyncio.get_running_loop()
    async with create_persistence(MemoryDriver()) as p:
        loop.set_task_factory(getattr(asyncio, "eager_task_factory", _eager))
        try:
            async with asyncio.timeout(5):
                for n in range(1, 4):
                    assert await p.sessions.add_message("s", {"n": n}) == n
                    assert not await p.sessions.session_exists("s")
        finally:
            loop.set_task_factory(None)


async def test_a_session_that_cannot_be_read_does_not_keep_the_others_from_expiring() -> None:
    now, memory = 1_700_000_000_000, MemoryDriver()
    async with create_persistence(RecordingDriver(memory), clock=lambda: now) as p:
        for n in range(3):
            record = SessionRecord(session_id=f"s{n}", image_id="i", container_id="c", expires_at=now + n + 1)
            await p.sessions.save_session(record)
            await p.sessions.add_message(f"s{n}", {"n": n})
        await memory.commit([Write("session/s0", (Put("record", b"rubbish"),), 77)])
        now += 10
        with pytest.raises(CorruptRecordError):
            await p.sessions.delete_expired()
        found = await memory.get([Key(f"session/s{n}", "message/000000000002") for n in range(3)])
        assert [entry is not None and b'"v":' in entry.value for entry in found] == [True, False, False]


async def test_a_session_truncated_often_is_read_by_the_page() -> None:
    driver = RecordingDriver()
    async with create_persistence(driver) as p:
        for _ in range(300):
            first = (await p.sessions.add_messages("s", [{"role": "user"}, {"role": "assistant"}]))[0]
            await p.sessions.truncate_after_message("s", seq=first)
            await p.sessions.add_message("s", {"role": "assistant"})
        for wanted, most in ((None, 5), (50, 2)):
            driver.forget()
            assert len(await p.sessions.get_messages("s", last=wanted)) == (wanted or 600)
            assert len(driver.calls) <= most
