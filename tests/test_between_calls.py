"""What another process does between two calls of the driver: nothing is lost, doubled, or waits for ever."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from persistence import (
    ConflictError,
    ImageRecord,
    InvalidValueError,
    NotFoundError,
    OutcomeUnknownError,
    Persistence,
    PersistenceError,
    create_persistence,
)
from persistence.driver import Key, Put, Write
from persistence.drivers.memory import MemoryDriver
from persistence.ids import Clock, now_ms

SESSION = {"session_id": "s", "image_id": "i", "container_id": "c"}
PROVIDER = {"id": "p", "container_id": "c", "name": "n", "vendor": "v", "protocol": "o", "api_key": "k"}


class Between:
    """A MemoryDriver that does something once, before (or after) the first call that `when` names."""

    lanes = 1

    def __init__(self, memory: MemoryDriver) -> None:
        self.memory = memory
        self.when: Callable[[str, Any], bool] = lambda name, first: False
        self.do: Callable[[], Awaitable[Any]] | None = None
        self.after = False
        self.bytes = 0

    async def _call(self, name: str, *args: Any, **kwargs: Any) -> Any:
        do = self.do
        if do is not None and self.when(name, args[0]):
            self.do = None
            if not self.after:
                await do()
            result = await getattr(self.memory, name)(*args, **kwargs)
            if self.after:
                await do()
            return result
        return await getattr(self.memory, name)(*args, **kwargs)

    async def open(self) -> None: ...
    async def close(self) -> None: ...
    async def get(self, *args: Any) -> Any:
        return await self._call("get", *args)

    async def scan(self, *args: Any, **kwargs: Any) -> Any:
        return await self._call("scan", *args, **kwargs)

    async def commit(self, writes: Any) -> Any:
        self.bytes += sum(len(getattr(op, "value", b"")) for write in writes for op in write.ops)
        await asyncio.sleep(0.001)
        return await self._call("commit", writes)

    async def purge(self, *args: Any) -> Any:
        return await self._call("purge", *args)

    async def partitions(self, *args: Any) -> Any:
        return await self._call("partitions", *args)


async def two(clock: Clock = now_ms) -> tuple[Between, Persistence, Persistence]:
    memory = MemoryDriver()
    between = Between(memory)
    opened = [await create_persistence(driver, clock=clock) for driver in (between, memory)]
    return between, opened[0], opened[1]


async def test_a_long_message_is_repeated_at_once() -> None:
    between, p, _ = await two()
    message = {"text": "x" * 4_000_000}
    assert await p.sessions.add_message("s", message, idempotency_key="k") == 1
    between.bytes = 0
    assert await p.sessions.add_message("s", message, idempotency_key="k", timeout=3) == 1
    assert between.bytes < 3 * 4_000_000


async def test_a_long_message_takes_the_key_of_an_earlier_life(tmp_path: Path) -> None:
    async with create_persistence(f"sqlite:///{tmp_path}/x.db") as p:
        await p.sessions.save_session(SESSION)
        await p.sessions.add_message("s", {"a": 1}, idempotency_key="k")
        await p.sessions.delete_session("s")
        await p.sessions.save_session(SESSION)
        await p.sessions.count_messages("s")
        assert await p.sessions.add_message("s", {"a": "x" * 1_200_000}, idempotency_key="k") == 4


async def test_refused_long_values_leave_room_for_their_chunks() -> None:
    memory = MemoryDriver()
    a, b = await create_persistence(memory), await create_persistence(memory)
    for p in (a, b):  # then a remembers ends that are none
        for number in range(24):
            await p.sessions.add_message(f"s{number}", {})
    batch = [{"t": "x" * size} for size in (1_000_000, 1_000_000, 990_000, 1_200_000)]
    async with asyncio.timeout(20):
        await asyncio.gather(*(a.sessions.add_messages(f"s{number}", batch) for number in range(24)))


async def test_a_long_record_that_is_replaced_while_it_is_read_is_read_anew() -> None:
    between, p, q = await two()
    image = {"image_id": "i", "container_id": "c", "session_id": "s", "name": "n"}
    await q.images.save_image(image | {"description": "x" * 2_000_000})
    between.when = lambda name, first: name == "get" and first[0].key.startswith("chunk/")
    between.do = lambda: q.images.save_image(image | {"description": "y" * 2_000_000})
    found = await p.images.find_image_by_id("i")
    assert between.do is None
    assert found is not None
    assert found.description == "y" * 2_000_000


async def test_a_long_record_that_is_refused_leaves_nothing() -> None:
    between, p, _ = await two()
    image = {"image_id": "i", "container_id": "c", "session_id": "s", "name": "n"}
    with pytest.raises(ConflictError):
        await p.images.save_image(image | {"description": "x" * 2_000_000}, expected_version=7)
    assert (await between.memory.scan("image/i", "", None, limit=9)).entries == []


async def test_messages_that_are_too_much_for_one_write_leave_in_several() -> None:
    _, p, _ = await two()
    calls = (p.sessions.add_message("s", {"text": "x" * 900_000}) for _ in range(12))
    assert sorted(await asyncio.gather(*calls)) == list(range(1, 13))


async def test_a_page_that_ends_behind_a_stale_entry_is_not_the_last() -> None:
    _, p, _ = await two()
    image = {"container_id": "c", "session_id": "s", "name": "n"}
    for n in range(4):
        await p.images.save_image(image | {"image_id": f"i{n}", "created_at": n})
    ghost = ImageRecord.from_mapping(image | {"image_id": "ghost", "created_at": 9})
    await p.images.records.put_hints("ghost", p.images.records.kind.hints(ghost))
    page = await p.images.find_all_images(limit=2)
    rest = await p.images.find_all_images(limit=2, cursor=page.cursor)
    assert [found.image_id for found in (*page, *rest)] == ["i3", "i2", "i1", "i0"]


async def test_a_thread_that_is_to_expire_from_a_later_put_on_goes() -> None:
    async with create_persistence(MemoryDriver(), clock=lambda: now) as p:
        now = 1_700_000_000_000
        await p.checkpoints.put("t", {"n": 1})
        await p.checkpoints.put("t", {"n": 2}, expires_at=now + 1_000)
        now += 2_000
        assert await p.checkpoints.delete_expired() == 2


async def test_a_fork_of_a_session_that_is_cleared_meanwhile_is_no_half_one() -> None:
    between, a, b = await two()
    await b.sessions.save_session(SESSION)
    await b.sessions.add_messages("s", [{"n": n} for n in range(1200)])
    reads = 0

    def second_page(name: str, first: Any) -> bool:
        nonlocal reads
        reads += name == "scan" and first == "session/s"
        return reads == 5

    between.when, between.do = second_page, lambda: b.sessions.clear_messages("s")
    with pytest.raises(ConflictError):
        await a.sessions.fork_session("s", new_session_id="f")
    assert await b.sessions.get_messages("f") == []


async def test_a_fork_of_a_session_that_is_deleted_meanwhile_is_no_empty_one() -> None:
    between, a, b = await two()
    await b.sessions.save_session(SESSION)
    await b.sessions.add_message("s", {"n": 1})
    between.when, between.do = lambda name, first: name == "scan", lambda: b.sessions.delete_session("s")
    with pytest.raises(NotFoundError):
        await a.sessions.fork_session("s", new_session_id="f")


async def test_a_fork_that_fails_deletes_nobody_elses_session() -> None:
    between, a, b = await two()
    await b.sessions.save_session(SESSION)
    await b.sessions.add_messages("s", [{"n": n} for n in range(9)])

    async def meanwhile() -> None:
        await b.sessions.truncate_after_message("s", seq=5)
        await b.sessions.save_session(SESSION | {"session_id": "f"})
        await b.sessions.add_message("f", {"precious": 1})

    reads = 0

    def first_page(name: str, first: Any) -> bool:
        nonlocal reads
        reads += name == "scan" and first == "session/s"
        return reads == 2

    between.when, between.do = first_page, meanwhile
    with pytest.raises(ConflictError):
        await a.sessions.fork_session("s", new_session_id="f")
    assert await b.sessions.get_messages("f") == [{"precious": 1}]


@pytest.mark.parametrize("call", [1, 2, 3])
async def test_a_fork_leaves_nothing_in_a_session_that_others_begin_under_its_id(call: int) -> None:
    between, a, b = await two()
    await b.sessions.save_session(SESSION)
    await b.sessions.add_messages("s", [{"n": n} for n in range(901)])
    precious = [] if call == 3 else [{"precious": 1}]

    async def meanwhile() -> None:
        await b.sessions.save_session(SESSION | {"session_id": "f"})
        await b.sessions.add_messages("f", precious)

    commits = 0

    def later(name: str, first: Any) -> bool:
        nonlocal commits
        commits += name == "commit" and any(write.partition == "session/f" for write in first)
        return commits == call

    between.when, between.do = later, meanwhile
    with pytest.raises(ConflictError):
        await a.sessions.fork_session("s", new_session_id="f")
    assert await b.sessions.get_messages("f") == precious
    assert await b.sessions.session_exists("f")
    await b.sessions.add_message("f", {"mine": 1})
    assert await a.sessions.get_messages("f") == [*precious, {"mine": 1}]


async def test_a_cascade_leaves_what_was_moved_out_of_its_reach() -> None:
    between, a, b = await two()
    for n in range(3):
        image = {"image_id": f"i{n}", "container_id": "old", "session_id": "-", "name": "n", "created_at": n}
        await b.images.save_image(image)
        await b.sessions.save_session(
            SESSION | {"session_id": f"s{n}", "container_id": "old", "created_at": n}
        )
        await b.sessions.add_message(f"s{n}", {"n": n})

    async def move() -> None:
        await b.images.save_image(image | {"image_id": "i0", "container_id": "new", "created_at": 0})
        await b.sessions.save_session(SESSION | {"session_id": "s0", "container_id": "new", "created_at": 0})

    between.do = move
    between.when = lambda name, first: name == "commit" and any(w.partition == "image/i2" for w in first)
    assert (await a.containers.delete_container("old")).sessions == 2
    assert await b.images.image_exists("i0")
    assert await b.sessions.get_messages("s0") == [{"n": 0}]


async def test_a_cascade_of_an_image_leaves_what_was_moved_to_another_one() -> None:
    between, p, q = await two()
    for n in range(40):  # more than are deleted at once
        await p.sessions.save_session(SESSION | {"session_id": f"s{n}"})
        await p.sessions.add_message(f"s{n}", {"n": 1})
    await p.images.save_image({"image_id": "i", "container_id": "c", "session_id": "s0", "name": "n"})
    left: list[str] = []

    async def move() -> None:
        page = await q.sessions.find_sessions_by_image_id("i")
        left.extend(record.session_id for record in page)
        for id in left:
            await q.sessions.save_session(SESSION | {"session_id": id, "image_id": "j"})

    between.when = lambda name, first: (
        name == "purge"
        or (name == "commit" and first[0].partition.startswith("session/") and len(first[0].ops) == 2)
    )
    between.after, between.do = True, move
    assert (await p.images.delete_image("i")).sessions == 40 - len(left) > 0
    assert len(left) > 20
    for id in left:
        assert await p.sessions.get_messages(id) == [{"n": 1}]
    assert sorted(r.session_id for r in await p.sessions.find_sessions_by_image_id("j")) == sorted(left)


async def test_who_saves_over_an_expired_session_deletes_none_that_began_meanwhile() -> None:
    between, p, q = await two()
    await p.sessions.save_session(SESSION | {"expires_at": 1})
    looks: list[str] = []

    def when(name: str, first: Any) -> bool:
        looks.extend("session" for key in first if name == "get" and key.partition == "session/s")
        return len(looks) == 2  # it has seen that the session is over, and is about to delete it

    async def begin() -> None:
        await q.sessions.save_session(SESSION)
        await q.sessions.add_message("s", {"n": 1})

    between.when, between.do = when, begin
    await p.sessions.save_session(SESSION)
    assert between.do is None
    assert await p.sessions.get_messages("s") == [{"n": 1}]


async def test_a_key_that_is_used_while_a_life_before_is_forgotten_is_remembered() -> None:
    now, between = 1_700_000_000_000, Between(MemoryDriver())
    p = await create_persistence(between, clock=lambda: now)
    q = await create_persistence(between.memory)
    await p.sessions.save_session(SESSION)
    await p.sessions.add_message("s", {"n": 1})
    await p.sessions.delete_session("s")
    now += 8 * 86_400_000

    async def begin() -> None:
        await q.sessions.save_session(SESSION)
        await q.sessions.add_message("s", {"n": 2}, idempotency_key="k")

    between.when = lambda name, first: name == "purge" and first == "session/s"
    between.do = begin
    await p.repair()
    assert between.do is None
    await p.sessions.add_message("s", {"n": 2}, idempotency_key="k")
    assert await p.sessions.get_messages("s") == [{"n": 2}]


async def test_who_is_saved_again_during_a_cascade_stays() -> None:
    between, p, q = await two()
    image = {"image_id": "i", "container_id": "c", "session_id": "s", "name": "n"}
    await p.images.save_image(image)
    await p.sessions.save_session(SESSION)
    between.when = lambda name, first: name == "commit" and first[0].partition == "session/s"
    between.do = lambda: q.images.save_image(image | {"name": "again"})
    await p.images.delete_image("i")
    found = await p.images.find_image_by_id("i")
    assert found is not None
    assert found.name == "again"


async def test_a_slow_delete_takes_away_no_newer_default() -> None:
    between, a, b = await two()

    async def save() -> None:
        await b.llm_providers.save_llm_provider(PROVIDER | {"is_default": True})

    await save()
    between.after, between.do = True, save
    between.when = lambda name, first: (
        name == "commit" and any(w.partition == "llm-provider/p" for w in first)
    )
    await a.llm_providers.delete_llm_provider("p")
    found = await b.llm_providers.find_default_llm_provider("c")
    assert found is not None
    assert found.id == "p"


async def test_a_time_out_says_how_many_messages_are_stored() -> None:
    _, p, _ = await two()
    real, calls, answer = p._driver.commit, 0, asyncio.Event()

    async def hanging(writes: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > 2:
            await answer.wait()
        return await real(writes)

    p._driver.commit = hanging  # type: ignore[method-assign]
    with pytest.raises(OutcomeUnknownError) as caught:
        await p.sessions.add_messages("s", [{}] * 5000, timeout=1)
    assert caught.value.stored == 1800
    answer.set()


async def test_a_sweep_leaves_the_deadline_of_who_is_still_saving() -> None:
    now = 1_800_000_000_000
    memory = MemoryDriver()
    between = Between(memory)
    a, b = (Persistence(driver, clock=lambda: now) for driver in (between, memory))
    await b.sessions.save_session(SESSION)

    async def sweep() -> None:
        nonlocal now
        now += 10
        await b.sessions.delete_expired()

    between.when, between.do = lambda name, first: name == "get", sweep
    await a.sessions.set_expiry("s", now + 5)
    now += 8 * 3_600_000
    assert (await b.sessions.delete_expired()).sessions == 1


async def test_repair_leaves_no_deadlines() -> None:
    now = 1_800_000_000_000
    memory = MemoryDriver()
    p = Persistence(memory, clock=lambda: now)
    await p.sessions.save_session(SESSION | {"expires_at": now + 5})
    now += 86_400_000
    await p.repair()
    assert not [name for name in (await memory.partitions(None, 99))[0] if "deadlines" in name]


@pytest.mark.parametrize("remove", ["model", 5, None])
async def test_keys_to_remove_are_no_text(remove: Any) -> None:
    _, p, _ = await two()
    await p.images.save_image(
        {"image_id": "i", "container_id": "c", "session_id": "s", "name": "n", "metadata": {"mode": 1}}
    )
    with pytest.raises(InvalidValueError):
        await p.images.update_metadata("i", {}, remove=remove)


async def test_a_drivers_own_kind_of_error_is_told() -> None:
    class OwnError(PersistenceError):
        def __init__(self) -> None:
            Exception.__init__(self, "own")

    _, p, _ = await two()
    await p.sessions.add_message("s", {})

    async def fails(*args: Any, **kwargs: Any) -> Any:
        raise OwnError

    p._driver.get = p._driver.commit = fails  # type: ignore[method-assign]
    with pytest.raises(OwnError):
        async with asyncio.timeout(5):
            await p.sessions.add_message("s", {})


async def test_huge_numbers_are_typed_errors_or_for_ever() -> None:
    _, p, _ = await two()
    assert await p.sessions.count_messages("s", timeout=10**400) == 0
    await p.repair(tombstone_days=float("inf"))
    with pytest.raises(InvalidValueError):
        await p.sessions.set_expiry("s", 10**400)
    with pytest.raises(InvalidValueError):
        await p.repair(tombstone_days="7")  # type: ignore[arg-type]


@pytest.mark.parametrize("torn", ["index/deadlines", "index/deadlines/277777"])
async def test_an_unreadable_deadline_does_its_duty_and_goes(torn: str) -> None:
    now = 1_000_000_000_000
    memory = MemoryDriver()
    p = await create_persistence(memory, clock=lambda: now)
    await p.checkpoints.put("gone", {}, expires_at=now)
    await p.checkpoints.delete("gone")
    for id in "ab":
        await p.sessions.save_session({**SESSION, "session_id": id, "expires_at": now + 1000})
    await p.streams.append("later", 0, {}, ttl_seconds=7200)
    held = memory._partitions[torn].entries
    for key in [*held]:
        held[key] = held[key]._replace(value=b"{torn")
    now += 9_000_000
    assert (await p.sessions.delete_expired()).sessions == 2
    assert await p.checkpoints.delete_expired() == 0
    assert await p.streams.delete_expired() == 1
    assert not [name for name in memory._partitions if name.startswith("index/deadlines/")]


@pytest.mark.parametrize("ahead", [0, 2000])
@pytest.mark.parametrize("how", ["set_expiry", "put", "append"])
async def test_a_deadline_that_is_swept_before_its_thing_says_so_stays(how: str, ahead: int) -> None:
    now = 1_000_000_000_000
    driver = Between(MemoryDriver())
    p = await create_persistence(driver, clock=lambda: now)
    other = await create_persistence(driver.memory, clock=lambda: now + ahead)
    await p.checkpoints.put("t", {}, expires_at=now + 10_000_000)
    await p.streams.append("t", 0, {}, ttl_seconds=10_000)

    async def sweep() -> None:
        nonlocal now
        now += 2000 - ahead
        await other.checkpoints.delete_expired()
        await other.streams.delete_expired()

    driver.when = lambda name, first: name == "commit" and first[0].partition in ("thread/t", "stream/t")
    driver.do = sweep
    if how == "put":
        await p.checkpoints.put("t", {}, expires_at=now + 1000)
    elif how == "set_expiry":
        await p.checkpoints.set_expiry("t", now + 1000)
    else:
        await p.streams.append("t", 1, {}, ttl_seconds=1)
    now += 2000
    assert await other.checkpoints.delete_expired() + await other.streams.delete_expired() > 0


async def test_an_image_is_not_forked_whose_new_session_is_deleted_meanwhile() -> None:
    driver, p, other = await two()
    await p.sessions.add_messages("s", [{"n": n} for n in range(2000)])
    await p.images.save_image({"image_id": "i", "container_id": "c", "session_id": "s", "name": "n"})
    driver.when = lambda name, first: name == "commit" and first[0].partition == "session/new"
    driver.after = True
    driver.do = lambda: other.sessions.delete_session("new")
    with pytest.raises(NotFoundError):
        await p.images.fork_image("i", new_session_id="new")


async def test_a_deadline_on_its_way_is_found_though_its_hour_was_swept() -> None:
    now = 1_000_000_000_000
    memory = MemoryDriver()
    p = await create_persistence(memory, clock=lambda: now)
    await p.sessions.save_session(SESSION)
    await p.sessions.set_expiry("s", now - 3_600_000)
    hour = f"index/deadlines/{now // 3_600_000 - 1}"
    on_its_way = memory._partitions.pop(hour)  # the two parts of a deadline come in any order
    await p.sessions.delete_expired()
    memory._partitions[hour] = on_its_way
    assert (await p.sessions.delete_expired()).sessions == 1


async def test_what_another_adds_to_half_a_fork_while_it_is_ended_stays() -> None:
    now = 1_800_000_000_000
    between, p, q = await two(lambda: now)
    await q.sessions.save_session(SESSION)
    await q.sessions.add_messages("s", [{"n": n} for n in range(3)])
    await q.sessions._copy("s", "f", None)  # and then it was killed
    now += 2 * 3_600_000
    between.when = lambda name, first: name == "commit" and first[0].partition == "session/f"
    between.do = lambda: q.sessions.add_message("f", {"precious": 1})
    assert (await p.repair()).forks_ended == 1
    assert between.do is None
    assert await q.sessions.get_messages("f") == [{"precious": 1}]


async def test_a_fork_takes_all_its_copies_back_though_others_had_cleared_the_session_before() -> None:
    between, a, b = await two()
    await b.sessions.save_session(SESSION)
    await b.sessions.add_messages("s", [{"n": n} for n in range(5)])

    async def meanwhile() -> None:
        await b.sessions.save_session(SESSION | {"session_id": "f"})
        await b.sessions.add_message("f", {"n": 0})
        await b.sessions.clear_messages("f")

    between.after = True
    between.when = lambda name, first: name == "scan" and first == "session/s"
    between.do = meanwhile
    with pytest.raises(ConflictError):
        await a.sessions.fork_session("s", new_session_id="f")
    assert between.do is None
    assert await b.sessions.get_messages("f") == []


async def test_a_delete_for_a_bad_head_leaves_a_good_one_as_it_is() -> None:
    between, p, q = await two()
    meta = await q.checkpoints.put("t", 1)
    (head,) = await between.memory.get([Key("thread/t", "head")])
    assert head is not None
    await between.memory.commit([Write("thread/t", (Put("head", b"{"),), head.version)])

    commits = 0

    def second(name: str, first: Any) -> bool:
        nonlocal commits
        commits += name == "commit" and first[0].partition == "thread/t"
        return commits == 2

    async def put() -> None:
        assert (await q.checkpoints.put("t", 2)).parent_id == meta.id
        between.when, between.do, between.after = second, asyncio.Event().wait, False  # p dies

    between.when, between.do, between.after = lambda name, first: name == "get", put, True
    with pytest.raises(OutcomeUnknownError):
        await p.checkpoints.delete("t", timeout=0.3)
    assert await q.checkpoints.get("t") is None


@pytest.mark.parametrize("how", ["delete", "repair"])
async def test_a_fork_whose_copies_went_before_its_record_came_has_failed(how: str) -> None:
    now = 1_800_000_000_000
    between, p, q = await two(lambda: now)
    await q.sessions.save_session(SESSION)
    await q.sessions.add_messages("s", [{"n": n} for n in range(5)])

    async def meanwhile() -> None:
        nonlocal now
        if how == "delete":
            await q.sessions.delete_session("f")
        else:  # p was stopped for as long as that
            now += 2 * 3_600_000
            assert (await q.repair()).forks_ended == 1

    between.after = True
    between.when = lambda name, first: name == "commit" and first[0].partition == "session/f"
    between.do = meanwhile
    with pytest.raises(ConflictError):
        await p.sessions.fork_session("s", new_session_id="f")
    assert between.do is None
    assert not await q.sessions.session_exists("f")
