"""What was weak, racy or wrong in the system this one follows (its fifteen known faults), shown absent."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from typing import Any

import pytest
import pytest_asyncio
from faulty_driver import end_of_the_process

from persistence import (
    CorruptRecordError,
    ImageRecord,
    LLMProviderRecord,
    NotFoundError,
    Persistence,
    SessionRecord,
    UnavailableError,
    create_persistence,
    memory_driver,
)
from persistence.driver import Entry, Key, Page, Put, Write
from persistence.drivers.memory import MemoryDriver
from persistence.testing import MakeDriver


class Watched(MemoryDriver):
    """Counts calls, entries read and bytes written; dies after `lives` commits if told to."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []
        self.entries_read = 0
        self.bytes_written = 0
        self.lives: int | None = None

    def forget(self) -> None:
        self.calls, self.entries_read, self.bytes_written = [], 0, 0

    async def get(self, keys: Sequence[Key]) -> list[Entry | None]:
        self.calls.append("get")
        self.entries_read += len(keys)
        return await super().get(keys)

    async def scan(
        self, partition: str, start: str, end: str | None, *, limit: int, reverse: bool = False
    ) -> Page:
        self.calls.append("scan")
        page = await super().scan(partition, start, end, limit=limit, reverse=reverse)
        self.entries_read += len(page.entries)
        return page

    async def commit(self, writes: Sequence[Write]) -> list[bool | None]:
        if self.lives is not None:
            self.lives -= 1
            if self.lives < 0:
                await end_of_the_process()
        self.calls.append("commit")
        for write in writes:
            self.bytes_written += sum(len(op.value) for op in write.ops if isinstance(op, Put))
        return await super().commit(writes)


@pytest.fixture
def driver() -> Watched:
    return Watched()


@pytest_asyncio.fixture
async def watched(driver: Watched) -> AsyncIterator[Persistence]:
    async with create_persistence(driver) as opened:
        yield opened


def image(image_id: str, **fields: Any) -> ImageRecord:
    return ImageRecord(
        **{"image_id": image_id, "container_id": "c", "session_id": "s", "name": "n", **fields}
    )


async def names(p: Persistence, name: str) -> list[str]:
    return [record.image_id for record in await p.images.find_images_by_name(name)]


async def test_1_an_append_costs_the_same_however_long_the_session_is(
    watched: Persistence, driver: Watched
) -> None:
    sizes = []
    for _ in range(500):
        driver.forget()
        await watched.sessions.add_message("s", {"content": "x" * 300})
        sizes.append(driver.bytes_written)
        assert driver.calls in (["commit"], ["scan", "commit"])
    assert max(sizes) - min(sizes) < 10
    assert driver.entries_read == 0


async def test_2_concurrent_writers_in_several_objects_lose_nothing(make_driver: MakeDriver) -> None:
    opened = [await create_persistence(make_driver()) for _ in range(3)]
    await asyncio.gather(*(opened[n % 3].sessions.add_message("s", {"n": n}) for n in range(60)))
    found = await opened[0].sessions.get_messages("s")
    for p in opened:
        await p.close()
    assert sorted(message["n"] for message in found) == list(range(60))


async def test_3_a_find_reads_what_it_returns_and_nothing_else(watched: Persistence, driver: Watched) -> None:
    await asyncio.gather(*(watched.images.save_image(image(f"i{n}", name=f"n{n}")) for n in range(2_000)))
    driver.forget()
    assert await names(watched, "n77") == ["i77"]
    assert driver.entries_read == 2  # the entry of the listing and the record
    driver.forget()
    assert await names(watched, "*") == []
    assert await names(watched, "n_7") == []
    assert driver.entries_read == 0


async def test_4_a_list_takes_two_round_trips_a_page_and_can_be_counted(
    watched: Persistence, driver: Watched
) -> None:
    await asyncio.gather(*(watched.images.save_image(image(f"i{n}")) for n in range(200)))
    driver.forget()
    assert len(await watched.images.find_images_by_container_id("c")) == 200
    assert driver.calls == ["scan", "get"]
    driver.forget()
    assert len(await watched.images.find_images_by_container_id("c", limit=20)) == 20
    assert driver.entries_read <= 42
    assert await watched.images.count_images(container_id="c") == 200


async def test_5_a_name_finds_itself_not_what_begins_with_it(p: Persistence) -> None:
    for id, name in [("1", "foo"), ("2", "foo:bar"), ("3", "foo/baz"), ("4", ""), ("5", "fo"), ("6", "Foo")]:
        await p.images.save_image(image(id, name=name))
    assert await names(p, "foo") == ["1"]
    assert await names(p, "") == ["4"]


async def test_6_question_marks_and_slashes_belong_to_the_id(p: Persistence) -> None:
    for id in ("abc?1", "abc?2", "sess/1", "sess:1"):
        await p.sessions.add_message(id, {"id": id})
        await p.images.save_image(image(id, name=id))
    for id in ("abc?1", "abc?2", "sess/1", "sess:1"):
        assert await p.sessions.get_messages(id) == [{"id": id}]
        assert await names(p, id) == [id]


async def test_7_ids_that_look_like_values_are_found(p: Persistence) -> None:
    odd = ["0", "null", "1e3", "9007199254740993", "true", "end$"]
    for id in odd:
        await p.images.save_image(image(id))
    assert sorted(await names(p, "n")) == sorted(odd)


async def test_8_a_rename_or_a_move_leaves_nothing_behind(watched: Persistence, driver: Watched) -> None:
    await watched.images.save_image(image("i", name="old", container_id="c1", created_at=1))
    await watched.images.save_image(image("i", name="new", container_id="c2", created_at=2))
    assert await names(watched, "old") == []
    assert await names(watched, "new") == ["i"]
    assert await watched.images.find_images_by_container_id("c1") == []
    partitions, _ = await driver.partitions(None, 100)
    assert partitions == ["container/c2", "image/i", "index/images", "index/images-by-name/new"]
    await watched.images.delete_image("i")
    partitions, _ = await driver.partitions(None, 100)
    assert partitions == ["image/i"]  # the tombstone


@pytest.mark.parametrize("lives", range(12))
async def test_9_a_crash_between_two_writes_loses_nothing_and_shows_nothing_wrong(lives: int) -> None:
    driver = Watched()
    before = await create_persistence(driver)
    await before.images.save_image(image("i", name="old", container_id="c1"))
    await before.sessions.save_session(SessionRecord(session_id="s", image_id="i", container_id="c1"))
    await before.sessions.add_message("s", {"n": 1})
    driver.lives = lives

    async def work() -> None:
        await before.images.save_image(image("i", name="new", container_id="c2"))
        await before.images.save_image(image("j", name="new", container_id="c2"))
        await before.images.delete_image("i")

    with suppress(asyncio.CancelledError):  # not raised once it lives long enough to get through
        await work()
    driver.lives = None

    async with create_persistence(driver) as after:

        async def check() -> None:
            for name in ("old", "new"):
                for record in await after.images.find_images_by_name(name):
                    assert record.name == name
                    assert await after.images.find_image_by_id(record.image_id) == record
            for id in ("i", "j"):
                found = await after.images.find_image_by_id(id)
                if found is not None:  # whoever finds it by id finds it in every listing
                    assert id in await names(after, found.name)
                    assert found in await after.images.find_images_by_container_id(found.container_id)
                    assert found in await after.images.find_all_images()
            if await after.sessions.session_exists("s"):
                assert await after.sessions.get_messages("s") == [{"n": 1}]
            else:
                assert await after.sessions.get_messages("s") == []

        await check()
        await after.repair()
        await check()
        if not await after.images.image_exists("i"):
            assert not await after.sessions.session_exists("s")  # repair ended the cascade


async def test_10_the_most_recent_session_is_found_whatever_its_id(p: Persistence) -> None:
    for id, created_at in (("b", 2), ("a", 1), ("c", 3), ("0", 0)):
        await p.sessions.save_session(
            SessionRecord(session_id=id, image_id="i", container_id="c", created_at=created_at)
        )
    found = await p.sessions.find_session_by_image_id("i")
    assert found is not None
    assert found.session_id == "c"


async def test_11_deletes_cascade(p: Persistence) -> None:
    await p.images.save_image(image("i"))
    await p.sessions.save_session(SessionRecord(session_id="s", image_id="i", container_id="c"))
    await p.sessions.add_message("s", {})
    removed = await p.images.delete_image("i")
    assert (removed.images, removed.sessions, removed.messages) == (1, 1, 1)
    assert await p.sessions.find_sessions_by_container_id("c") == []


@pytest.mark.parametrize("garbage", [b"", b"[]", b"{", b"null", b'{"f":1}', b'{"f":99,"v":{}}', b"\xff\xfe"])
async def test_12_corrupt_data_is_never_read_as_empty_nor_overwritten(p: Persistence, garbage: bytes) -> None:
    await p.sessions.add_messages("s", [{"n": 1}, {"n": 2}])
    await p.images.save_image(image("i"))
    writes = [
        Write("session/s", (Put("message/000000000002", garbage),), 7),
        Write("image/i", (Put("record", garbage),), 8),
    ]
    assert await p._driver.commit(writes) == [True, True]
    with pytest.raises(CorruptRecordError) as caught:
        await p.sessions.get_messages("s")
    assert (caught.value.partition, caught.value.key) == ("session/s", "message/000000000002")
    with pytest.raises(CorruptRecordError) as caught:
        await p.images.find_image_by_id("i")
    assert (caught.value.partition, caught.value.key) == ("image/i", "record")
    with pytest.raises(CorruptRecordError):
        await p.images.save_image(image("i"))
    with pytest.raises(CorruptRecordError):
        await p.images.find_all_images()
    (entry,) = await p._driver.get([Key("image/i", "record")])
    assert entry is not None
    assert entry.value == garbage
    report = await p.repair()
    assert report.corrupt_count >= 1


async def test_12_proto_members_stay(p: Persistence) -> None:
    message = json.loads('{"__proto__": {"polluted": true}, "constructor": 1}')
    await p.sessions.add_message("s", message)
    assert await p.sessions.get_messages("s") == [message]


async def test_13_exists_says_no_where_there_is_nothing(p: Persistence) -> None:
    assert not await p.images.image_exists("i")
    await p.images.save_image(image("i"))
    assert await p.images.image_exists("i")
    await p.images.delete_image("i")
    assert not await p.images.image_exists("i")


async def test_14_dots_and_long_names_are_names(p: Persistence) -> None:
    for name in ("..", "../..", "a", "a/b", "x" * 300, "X" * 300):
        await p.images.save_image(image(name, name=name))
    for name in ("..", "../..", "a", "a/b", "x" * 300, "X" * 300):
        assert await names(p, name) == [name]


async def test_15_a_key_is_in_no_repr_and_no_error() -> None:
    record = LLMProviderRecord(
        id="p", container_id="c", name="n", vendor="v", protocol="openai", api_key="sk-secret"
    )
    assert "sk-secret" not in repr(record)
    assert "sk-secret" not in f"{record}"
    with_servers = ImageRecord(
        image_id="i",
        container_id="c",
        session_id="s",
        name="n",
        mcp_servers={"m": {"env": {"TOKEN": "sk-secret"}}},
        extra={"api_key": "sk-secret"},
    )
    assert "sk-secret" not in repr(with_servers)


async def test_15_lists_have_limits_counts_and_times_to_live() -> None:
    now = 1_800_000_000_000
    async with create_persistence(MemoryDriver(), clock=lambda: now) as p:
        for n in range(5):
            record = {"session_id": f"s{n}", "image_id": "i", "container_id": "c", "expires_at": now + n + 1}
            await p.sessions.save_session(record)
        assert len(await p.sessions.find_all_sessions(limit=2)) == 2
        assert await p.sessions.count_sessions() == 5
        now += 3
        assert await p.sessions.count_sessions() == 2
        assert (await p.sessions.delete_expired()).sessions == 3
        numbers = await p.sessions.add_messages("s4", [{"n": n} for n in range(900)])
        assert numbers == list(range(2, 902))  # the first is that of the time to live
        for id in ("s0", "s3"):
            now += 1
            with pytest.raises(NotFoundError):
                await p.sessions.add_message(id, {})


async def test_15_a_closed_object_says_so(p: Persistence) -> None:
    await p.close()
    await p.close()
    with pytest.raises(Exception, match="closed"):
        await p.sessions.add_message("s", {})


async def test_a_lost_store_is_a_typed_error(monkeypatch: pytest.MonkeyPatch) -> None:
    async def lost(keys: Sequence[Key]) -> list[Entry | None]:
        raise ConnectionResetError

    monkeypatch.setattr("persistence.coalescer.RETRY_SECONDS", 0.1)
    memory = MemoryDriver()
    async with create_persistence(memory) as p:
        monkeypatch.setattr(memory, "get", lost)
        with pytest.raises(UnavailableError):
            await p.images.find_image_by_id("i")


def test_memory_is_the_default_of_the_readme() -> None:
    assert repr(memory_driver()) == "memory_driver()"
