"""Every record and method, on every engine."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Sequence
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import pytest
from faulty_driver import RecordingDriver

from persistence import (
    ConflictError,
    ContainerRecord,
    CorruptRecordError,
    Deleted,
    ImageRecord,
    InvalidKeyError,
    InvalidValueError,
    LLMProviderRecord,
    NotFoundError,
    Persistence,
    PrototypeRecord,
    SessionRecord,
    StoredMessage,
    UnavailableError,
    create_persistence,
    memory_driver,
)
from persistence.driver import Entry, Key
from persistence.drivers.memory import MemoryDriver
from persistence.testing import MakeDriver

HOSTILE_IDS = [
    *("", "0", "null", "true", "1e3", "9007199254740993", "../x", "..", ".", "a/b", "a:b", "a_b", "a%b"),
    *(
        "abc?1",
        "abc?2",
        "{t}",
        "%41",
        "\0",
        "😀",
        "Case",
        "case",
        "CASE",
        " ",
        "a ",
        "a\n",
        "$end$",
        "~",
        "%",
    ),
    *("x" * 500, "x" * 501, "é" * 300, "e\u0301" * 300, "[a-z]*", "'; DROP TABLE x; --", "__proto__"),
]


def image(image_id: str = "img_1", **fields: Any) -> ImageRecord:
    return ImageRecord(
        **{"image_id": image_id, "container_id": "c", "session_id": "s", "name": "coder", **fields}
    )


def session(session_id: str = "s", **fields: Any) -> SessionRecord:
    return SessionRecord(**{"session_id": session_id, "image_id": "img_1", "container_id": "c", **fields})


def provider(id: str = "openai", **fields: Any) -> LLMProviderRecord:
    return LLMProviderRecord(
        **{
            "id": id,
            "container_id": "c",
            "name": id,
            "vendor": id,
            "protocol": "openai",
            "api_key": "sk-123",
            "updated_at": 0,
            **fields,
        }
    )


def ids(records: list[Any], field: str = "image_id") -> list[str]:
    return [getattr(record, field) for record in records]


# ---- records


async def test_a_record_comes_back_as_it_was_saved(p: Persistence) -> None:
    full = image(
        description="writes code",
        system_prompt="",
        parent_image_id="img_0",
        mcp_servers={"files": {"command": "mcp", "args": [], "env": {"TOKEN": "x"}, "unknown": [0]}},
        metadata={"driverSessionId": "d", "zero": 0, "none": None, "empty": "", "order": 1, "an": 2},
        role_id="r",
        os_id="o",
        model="m",
        prototype_id="proto",
        thinking="high",
        provider_options={"temperature": 0.0, "big": 2**80},
        custom_data={
            "at": datetime(2026, 1, 2, tzinfo=UTC),
            "raw": b"\0\xff",
            "pair": (1, 2),
            "n": Decimal("1.50"),
        },
        created_at=1,
        updated_at=-5,
        extra={"from_the_future": {"a": [1]}},
    )
    version = await p.images.save_image(full)
    found = await p.images.find_image_by_id("img_1")
    assert found == full
    assert (found != full) is False
    assert found != image()
    assert found is not None
    assert found.version == version
    assert list(found.metadata or {}) == list(full.metadata or {})
    assert found.custom_data == full.custom_data
    assert type((found.custom_data or {})["pair"]) is tuple


async def test_saving_again_replaces_the_whole_record(p: Persistence) -> None:
    await p.images.save_image(image(description="old", extra={"x": 1}))
    await p.images.save_image(image(name="new"))
    found = await p.images.find_image_by_id("img_1")
    assert found is not None
    assert (found.name, found.description, found.extra) == ("new", None, {})


async def test_a_mapping_with_unknown_fields_is_a_record_too(p: Persistence) -> None:
    await p.containers.save_container(
        {"container_id": "c", "config": {"a": 1}, "owner": "me", "created_at": 7}
    )
    found = await p.containers.find_container_by_id("c")
    assert found is not None
    assert (found.config, found.extra, found.created_at) == ({"a": 1}, {"owner": "me"}, 7)


@pytest.mark.parametrize(
    "bad", [{"image_id": "i"}, {"name": 5}, {"created_at": 1.5}, {"created_at": 2**63}, 5]
)
async def test_a_record_of_wrong_types_is_refused(p: Persistence, bad: Any) -> None:
    record = bad if not isinstance(bad, dict) or "image_id" in bad else image(**bad)
    with pytest.raises(InvalidValueError):
        await p.images.save_image(record)
    assert await p.images.find_all_images() == []


async def test_expected_version_lets_one_of_two_writers_win(p: Persistence) -> None:
    first = await p.images.save_image(image(), expected_version=0)
    with pytest.raises(ConflictError):
        await p.images.save_image(image(), expected_version=0)
    results = await asyncio.gather(
        *(p.images.save_image(image(name=f"n{n}"), expected_version=first) for n in range(8)),
        return_exceptions=True,
    )
    assert sum(isinstance(result, int) for result in results) == 1
    assert sum(isinstance(result, ConflictError) for result in results) == 7
    winner = next(n for n, result in enumerate(results) if isinstance(result, int))
    assert ids(await p.images.find_images_by_name(f"n{winner}")) == ["img_1"]
    assert await p.images.count_images() == 1


async def test_absent_things_are_none_empty_or_false(p: Persistence) -> None:
    assert await p.containers.find_container_by_id("x") is None
    assert await p.images.find_image_by_id("x") is None
    assert await p.sessions.find_session_by_id("x") is None
    assert await p.sessions.find_session_by_image_id("x") is None
    assert await p.prototypes.find_prototype_by_id("x") is None
    assert await p.llm_providers.find_llm_provider_by_id("x") is None
    assert await p.llm_providers.find_default_llm_provider("x") is None
    assert not await p.containers.container_exists("x")
    assert not await p.images.image_exists("x")
    assert not await p.sessions.session_exists("x")
    assert not await p.prototypes.prototype_exists("x")
    assert not await p.llm_providers.llm_provider_exists("x")
    assert await p.sessions.get_messages("x") == []
    assert await p.sessions.count_messages("x") == 0
    assert await p.sessions.clear_messages("x") == 0
    for delete in (
        p.containers.delete_container,
        p.images.delete_image,
        p.sessions.delete_session,
        p.prototypes.delete_prototype,
        p.llm_providers.delete_llm_provider,
    ):
        assert await delete("x") == Deleted()
    assert not Deleted()


async def test_any_id_works_and_never_meets_another(p: Persistence) -> None:
    for number, id in enumerate(HOSTILE_IDS):
        await p.images.save_image(image(id, name=id, container_id=id, created_at=number))
        await p.sessions.save_session(session(id, image_id=id, container_id=id))
        await p.sessions.add_message(id, {"id": id})
    for number, id in enumerate(HOSTILE_IDS):
        found = await p.images.find_image_by_id(id)
        assert found is not None
        assert (found.image_id, found.created_at) == (id, number)
        assert ids(await p.images.find_images_by_name(id)) == [id]
        assert ids(await p.images.find_images_by_container_id(id)) == [id]
        assert await p.sessions.get_messages(id) == [{"id": id}]
        of_image = await p.sessions.find_session_by_image_id(id)
        assert of_image is not None
        assert of_image.session_id == id
    assert ids(await p.images.find_all_images()) == HOSTILE_IDS[::-1]
    assert await p.images.delete_image("") == Deleted(images=1, sessions=1, messages=1)
    assert await p.images.count_images() == len(HOSTILE_IDS) - 1


async def test_an_id_that_is_no_text_is_refused(p: Persistence) -> None:
    for bad in (5, None, b"x", "\ud800", "x" * 100_000):
        with pytest.raises(InvalidKeyError):
            await p.images.find_image_by_id(bad)  # type: ignore[arg-type]
        with pytest.raises(InvalidKeyError):
            await p.sessions.add_message(bad, {})  # type: ignore[arg-type]


async def test_listings_are_newest_first_with_ties_by_id(p: Persistence) -> None:
    for id, created_at in [("b", 5), ("a", 5), ("old", -(2**63)), ("new", 2**63 - 1), ("c", 5), ("zero", 0)]:
        await p.images.save_image(image(id, created_at=created_at))
    expected = ["new", "a", "b", "c", "zero", "old"]
    assert ids(await p.images.find_all_images()) == expected
    assert ids(await p.images.find_images_by_name("coder")) == expected
    paged: list[str] = []
    cursor = None
    while True:
        page = await p.images.find_images_by_container_id("c", limit=4, cursor=cursor)
        paged += ids(page)
        cursor = page.cursor
        if cursor is None:
            break
    assert paged == expected
    empty = await p.images.find_all_images(limit=0)
    assert empty == []
    assert len(await p.images.find_all_images(limit=100)) == 6


@pytest.mark.parametrize("bad", [{"limit": -1}, {"limit": 1.5}, {"limit": True}, {"limit": "3"}])
async def test_a_bad_limit_is_refused(p: Persistence, bad: dict[str, Any]) -> None:
    with pytest.raises(InvalidValueError):
        await p.images.find_all_images(**bad)


@pytest.mark.parametrize("cursor", ["", "x", "0" * 20, "0" * 20 + "/", 5, "0" * 20 + "/a b"])
async def test_a_bad_cursor_is_refused(p: Persistence, cursor: Any) -> None:
    with pytest.raises(InvalidKeyError):
        await p.images.find_all_images(cursor=cursor)


async def test_update_metadata_merges_and_touches_the_rest_not(p: Persistence) -> None:
    await p.images.save_image(image(metadata={"a": 1, "b": 2}, description="d", updated_at=0))
    updated = await p.images.update_metadata("img_1", {"b": 3, "c": None}, remove=["a"])
    found = await p.images.find_image_by_id("img_1")
    assert found == updated
    assert found is not None
    assert found.metadata == {"b": 3, "c": None}
    assert found.description == "d"
    assert found.updated_at > 0
    with pytest.raises(NotFoundError, match="Image not found: nobody"):
        await p.images.update_metadata("nobody", {})


async def test_concurrent_metadata_updates_lose_nothing(p: Persistence) -> None:
    await p.images.save_image(image())
    await asyncio.gather(*(p.images.update_metadata("img_1", {f"k{n}": n}) for n in range(12)))
    found = await p.images.find_image_by_id("img_1")
    assert found is not None
    assert found.metadata == {f"k{n}": n for n in range(12)}


async def test_many_updates_of_one_record_at_once_take_turns() -> None:
    driver = RecordingDriver()
    async with create_persistence(driver) as p:
        await p.images.save_image(image())
        driver.forget()
        await asyncio.gather(*(p.images.update_metadata("img_1", {f"k{n}": n}) for n in range(100)))
        found = await p.images.find_image_by_id("img_1")
        assert found is not None
        assert found.metadata == {f"k{n}": n for n in range(100)}
        writes = [write for writes in driver.commits for write in writes if write.partition == "image/img_1"]
        assert len(writes) == 100


async def test_many_saves_of_one_record_at_once_take_turns() -> None:
    driver = RecordingDriver()
    async with create_persistence(driver) as p:
        await asyncio.gather(*(p.images.save_image(image(name=f"n{n}")) for n in range(100)))
        writes = [write for writes in driver.commits for write in writes if write.partition == "image/img_1"]
        assert len(writes) == 100
        found = await p.images.find_image_by_id("img_1")
        assert found is not None
        assert [await p.images.find_images_by_name(f"n{n}") == [found] for n in range(100)].count(True) == 1


async def test_updates_of_one_record_do_not_wait_for_each_other_on_a_store_that_is_down(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Down(RecordingDriver):
        down = False

        async def get(self, keys: Sequence[Key]) -> list[Entry | None]:
            if self.down:
                raise UnavailableError("down")
            return await super().get(keys)

    for module in ("coalescer", "collection"):
        monkeypatch.setattr(f"persistence.{module}.RETRY_SECONDS", 0.3)
    driver = Down()
    async with create_persistence(driver) as p:
        await p.images.save_image(image())
        driver.down = True
        loop = asyncio.get_running_loop()
        begun = loop.time()
        updates = [p.images.update_metadata("img_1", {f"k{n}": n}) for n in range(10)]
        errors = await asyncio.gather(*updates, return_exceptions=True)
        assert {type(error) for error in errors} == {UnavailableError}
        assert loop.time() - begun < 2
        driver.down = False
        assert (await p.images.update_metadata("img_1", {"k": 1})).metadata == {"k": 1}


async def test_the_session_of_an_image_is_its_most_recent(p: Persistence) -> None:
    await p.sessions.save_session(session("zzz", created_at=1))
    await p.sessions.save_session(session("aaa", created_at=3))
    await p.sessions.save_session(session("mmm", created_at=2))
    found = await p.sessions.find_session_by_image_id("img_1")
    assert found is not None
    assert found.session_id == "aaa"
    assert ids(await p.sessions.find_sessions_by_image_id("img_1"), "session_id") == ["aaa", "mmm", "zzz"]
    assert ids(await p.sessions.find_sessions_by_container_id("c", limit=1), "session_id") == ["aaa"]
    assert await p.sessions.count_sessions(image_id="img_1") == 3
    assert await p.sessions.count_sessions(container_id="other") == 0


async def test_prototypes_do_what_images_do(p: Persistence) -> None:
    record = PrototypeRecord(
        prototype_id="p", container_id="c", name="n", mcp_servers={"a": {"command": "x"}}
    )
    await p.prototypes.save_prototype(record)
    assert await p.prototypes.find_prototype_by_id("p") == record
    assert await p.prototypes.find_all_prototypes() == [record]
    assert await p.prototypes.find_prototypes_by_container_id("c") == [record]
    assert await p.prototypes.prototype_exists("p")
    assert await p.prototypes.delete_prototype("p") == Deleted(prototypes=1)
    assert await p.prototypes.find_all_prototypes() == []


async def test_a_container_has_one_default_provider(p: Persistence) -> None:
    await p.llm_providers.save_llm_provider(provider("a", is_default=True, created_at=1))
    await p.llm_providers.save_llm_provider(provider("b", created_at=2))
    assert await p.llm_providers.find_llm_provider_by_id("a") == provider("a", is_default=True, created_at=1)
    default = await p.llm_providers.find_default_llm_provider("c")
    assert default is not None
    assert default.id == "a"
    await asyncio.gather(*(p.llm_providers.set_default_llm_provider(id) for id in ("a", "b") * 4))
    listed = await p.llm_providers.find_llm_providers_by_container_id("c")
    assert sum(record.is_default for record in listed) == 1
    await p.llm_providers.set_default_llm_provider("b")
    assert [(r.id, r.is_default) for r in await p.llm_providers.find_all_llm_providers()] == [
        ("b", True),
        ("a", False),
    ]
    await p.llm_providers.save_llm_provider(provider("b", is_default=False, created_at=2))
    assert await p.llm_providers.find_default_llm_provider("c") is None
    await p.llm_providers.set_default_llm_provider("b")
    assert await p.llm_providers.delete_llm_provider("b") == Deleted(llm_providers=1)
    assert await p.llm_providers.find_default_llm_provider("c") is None
    with pytest.raises(NotFoundError):
        await p.llm_providers.set_default_llm_provider("b")


async def test_an_expected_version_sees_that_another_has_become_the_default(p: Persistence) -> None:
    for id in ("a", "b"):
        await p.llm_providers.save_llm_provider(provider(id, is_default=id == "a"))
    read = [await p.llm_providers.find_llm_provider_by_id(id) for id in ("a", "b")]
    await p.llm_providers.set_default_llm_provider("b")
    for record in read:
        assert record is not None
        with pytest.raises(ConflictError):
            await p.llm_providers.save_llm_provider(record, expected_version=record.version)
    default = await p.llm_providers.find_default_llm_provider("c")
    assert default is not None
    assert default.id == "b"


# ---- messages


async def test_messages_come_back_in_order_just_as_given(
    p: Persistence, conversations: list[dict[str, Any]]
) -> None:
    for conversation in conversations:
        numbers = await p.sessions.add_messages(conversation["session_id"], conversation["messages"])
        assert numbers == list(range(1, len(conversation["messages"]) + 1))
    for conversation in conversations:
        found = await p.sessions.get_messages(conversation["session_id"])
        assert found == conversation["messages"]
        assert [list(message) for message in found] == [list(message) for message in conversation["messages"]]


@pytest.mark.parametrize(
    "message",
    [
        {},
        {"content": "\0 \u2028 😀", "falsy": [0, 0.0, False, "", None, [], {}], "__proto__": {"x": 1}},
        {"$bytes": "aGk="},
        {"$bytes": "aGk=", "raw": b"hi", "nested": {"$tuple": [1]}},
        {"id": uuid.UUID(int=1), "set": {1, 2}, 5: "five", "inf": float("inf"), "big": -(2**200)},
        {
            "subtype": "tool-result",
            "toolResult": {"output": {"type": "json", "value": False}},
            "timestamp": 0,
        },
    ],
)
async def test_a_message_is_whatever_mapping_the_caller_has(p: Persistence, message: dict[Any, Any]) -> None:
    await p.sessions.add_message("s", message)
    (found,) = await p.sessions.get_messages("s")
    assert found == message
    assert [type(value) for value in found.values()] == [type(value) for value in message.values()]
    assert list(found) == list(message)


async def test_nan_is_stored_as_nan(p: Persistence) -> None:
    await p.sessions.add_message("s", {"x": float("nan")})
    (found,) = await p.sessions.get_messages("s")
    assert found["x"] != found["x"]


@pytest.mark.parametrize(
    "bad", ["text", ["list"], None, {"x": object()}, {"x": "\ud800"}, {"f": frozenset()}]
)
async def test_what_cannot_be_stored_exactly_is_refused_before_anything_is_written(
    p: Persistence, bad: Any
) -> None:
    with pytest.raises(InvalidValueError):
        await p.sessions.add_message("s", bad)
    with pytest.raises(InvalidValueError) as caught:
        await p.sessions.add_messages("s", [{"fine": 1}, bad])
    assert caught.value.stored == 0
    assert await p.sessions.count_messages("s") == 0


async def test_pages_of_messages(p: Persistence) -> None:
    await p.sessions.add_messages("s", [{"n": n} for n in range(1, 11)])

    async def page(**bounds: int) -> list[int]:
        return [message["n"] for message in await p.sessions.get_messages("s", **bounds)]

    assert await page() == list(range(1, 11))
    assert await page(limit=3) == [1, 2, 3]
    assert await page(last=3) == [8, 9, 10]
    assert await page(last=99) == list(range(1, 11))
    assert await page(last=0) == await page(limit=0) == await page(after=10) == await page(before=1) == []
    assert await page(after=0) == list(range(1, 11))
    assert await page(after=7) == [8, 9, 10]
    assert await page(after=2, limit=2) == [3, 4]
    assert await page(before=4) == [1, 2, 3]
    assert await page(before=9, limit=2) == [7, 8]
    assert await page(before=99, limit=1) == [10]
    for bad in ({"last": 1, "after": 1}, {"after": 1, "before": 5}, {"last": 1, "limit": 1}, {"last": -1}):
        with pytest.raises(InvalidValueError):
            await page(**bad)
    first = (await p.sessions.read_messages("s", limit=1))[0]
    assert first == StoredMessage(1, first.created_at, {"n": 1})


async def test_expected_last_refuses_who_did_not_see_the_last_message(p: Persistence) -> None:
    assert await p.sessions.add_message("s", {"n": 1}, expected_last=0) == 1
    with pytest.raises(ConflictError):
        await p.sessions.add_message("s", {"n": 1}, expected_last=0)
    results = await asyncio.gather(
        *(p.sessions.add_message("s", {"n": n}, expected_last=1) for n in range(8)), return_exceptions=True
    )
    assert sorted(str(type(result).__name__) for result in results) == ["ConflictError"] * 7 + ["int"]
    await p.sessions.clear_messages("s")
    number = await p.sessions.add_message("s", {"n": 2}, expected_last=0)
    assert await p.sessions.add_messages("s", [{}, {}], expected_last=number) == [number + 1, number + 2]


async def test_an_idempotency_key_adds_once(p: Persistence) -> None:
    first = await p.sessions.add_message("s", {"n": 1}, idempotency_key="k")
    assert await p.sessions.add_message("s", {"n": 1}, idempotency_key="k") == first
    numbers = await asyncio.gather(
        *(p.sessions.add_message("s", {"n": 2}, idempotency_key="same/😀") for _ in range(8))
    )
    assert len(set(numbers)) == 1
    assert await p.sessions.add_messages("s", [{"n": 3}, {"n": 4}], idempotency_key="many") == [3, 4]
    assert await p.sessions.add_messages("s", [{"n": 3}, {"n": 4}], idempotency_key="many") == [3, 4]
    assert [message["n"] for message in await p.sessions.get_messages("s")] == [1, 2, 3, 4]
    for other in ([{"n": 3}], [{"n": 3}, {"n": 4}, {"n": 5}]):
        with pytest.raises(ConflictError, match="used for 2"):
            await p.sessions.add_messages("s", other, idempotency_key="many")
    assert await p.sessions.add_message("s", {"n": 1}, idempotency_key="k", expected_last=0) == first


async def test_nothing_is_removed_that_the_caller_has_not_seen(p: Persistence) -> None:
    await p.sessions.add_messages("s", [{"n": n} for n in range(1, 4)])
    for remove in (
        p.sessions.clear_messages("s", expected_last=2),
        p.sessions.truncate_after_message("s", seq=1, expected_last=4),
    ):
        with pytest.raises(ConflictError, match="the last number is 3"):
            await remove
    assert await p.sessions.count_messages("s") == 3
    assert await p.sessions.truncate_after_message("s", seq=1, expected_last=3) == 2
    assert await p.sessions.clear_messages("s", expected_last=1) == 1
    assert await p.sessions.clear_messages("s", expected_last=0) == 0
    assert await p.sessions.clear_messages("nobody", expected_last=0) == 0


async def test_many_who_take_the_last_message_away_take_each_one_once(p: Persistence) -> None:
    async def pop() -> int | None:
        while True:
            *before, last = [None, *await p.sessions.read_messages("s", last=2)]
            if last is None:
                return None
            try:
                if previous := before[-1]:
                    await p.sessions.truncate_after_message("s", seq=previous.seq, expected_last=last.seq)
                else:
                    await p.sessions.clear_messages("s", expected_last=last.seq)
            except (ConflictError, NotFoundError):
                continue
            return int(last.message["n"])

    await p.sessions.add_messages("s", [{"n": n} for n in range(6)])
    taken = await asyncio.gather(*(pop() for _ in range(8)))
    assert sorted(n for n in taken if n is not None) == list(range(6))


async def test_clear_truncate_and_go_on(p: Persistence) -> None:
    await p.sessions.add_messages("s", [{"id": f"m{n % 4}", "n": n} for n in range(1, 9)])
    assert await p.sessions.truncate_after_message("s", "m2") == 2  # the later one of n=2 and n=6
    assert await p.sessions.count_messages("s") == 6
    assert await p.sessions.truncate_after_message("s", seq=4) == 2
    assert await p.sessions.truncate_after_message("s", seq=4) == 0
    with pytest.raises(NotFoundError):
        await p.sessions.truncate_after_message("s", seq=5)
    with pytest.raises(NotFoundError):
        await p.sessions.truncate_after_message("s", "nobody")
    for bad in ({}, {"message_id": "m1", "seq": 1}):
        with pytest.raises(InvalidValueError):
            await p.sessions.truncate_after_message("s", **bad)  # type: ignore[arg-type]
    number = await p.sessions.add_message("s", {"n": 99})
    assert number > 8
    assert [message["n"] for message in await p.sessions.get_messages("s")] == [1, 2, 3, 4, 99]
    assert [message["n"] for message in await p.sessions.get_messages("s", last=2)] == [4, 99]
    assert [message["n"] for message in await p.sessions.get_messages("s", before=number, limit=1)] == [4]
    assert await p.sessions.clear_messages("s") == 5
    assert await p.sessions.get_messages("s") == []
    assert await p.sessions.add_message("s", {"n": 100}) > number
    assert await p.sessions.count_messages("s") == 1


async def test_a_deleted_session_refuses_until_it_is_saved_again(p: Persistence) -> None:
    await p.sessions.save_session(session())
    await p.sessions.add_messages("s", [{"n": 1}, {"n": 2}])
    assert await p.sessions.delete_session("s") == Deleted(sessions=1, messages=2)
    assert await p.sessions.delete_session("s") == Deleted()
    assert await p.sessions.find_session_by_id("s") is None
    assert await p.sessions.find_all_sessions() == []
    assert await p.sessions.get_messages("s") == []
    with pytest.raises(NotFoundError):
        await p.sessions.add_message("s", {})
    await p.sessions.save_session(session())
    await p.sessions.add_message("s", {"n": 3})
    assert await p.sessions.get_messages("s") == [{"n": 3}]
    assert await p.sessions.find_all_sessions() == [await p.sessions.find_session_by_id("s")]


async def test_a_key_of_a_life_before_the_delete_adds_again(p: Persistence) -> None:
    await p.sessions.save_session(session())
    await p.sessions.add_message("s", {"n": 1}, idempotency_key="k")
    await p.sessions.clear_messages("s")
    assert await p.sessions.add_message("s", {"n": 1}, idempotency_key="k") == 1
    await p.sessions.delete_session("s")
    with pytest.raises(NotFoundError):
        await p.sessions.add_message("s", {"n": 2}, idempotency_key="k")
    await p.sessions.save_session(session())
    number = await p.sessions.add_message("s", {"n": 3}, idempotency_key="k")
    assert await p.sessions.add_message("s", {"n": 3}, idempotency_key="k") == number
    assert await p.sessions.get_messages("s") == [{"n": 3}]


async def test_nine_hundred_messages_are_added_together(p: Persistence) -> None:
    assert await p.sessions.add_messages("s", [{}] * 900, idempotency_key="k") == list(range(1, 901))
    page = await p._driver.scan("session/s", "message/", "message0", limit=900)
    assert len({entry.version for entry in page.entries}) == 1
    assert await p.sessions.add_messages("s", [{}] * 1000) == list(range(901, 1901))


async def test_messages_of_a_session_that_was_never_saved(p: Persistence) -> None:
    await p.sessions.add_message("loose", {"n": 1})
    assert not await p.sessions.session_exists("loose")
    assert await p.sessions.delete_session("loose") == Deleted(messages=1)
    with pytest.raises(NotFoundError):
        await p.sessions.add_message("loose", {"n": 2})


async def test_a_fork_is_a_copy_that_stands_alone(p: Persistence) -> None:
    await p.sessions.save_session(session(extra={"title": "t"}))
    await p.sessions.add_messages("s", [{"n": n} for n in range(1, 7)])
    await p.sessions.truncate_after_message("s", seq=4)
    await p.sessions.add_message("s", {"n": 7})
    fork = await p.sessions.fork_session("s")
    assert (fork.parent_session_id, fork.image_id, fork.extra) == ("s", "img_1", {"title": "t"})
    assert [m.seq for m in await p.sessions.read_messages(fork.session_id)] == [1, 2, 3, 4, 5]
    assert await p.sessions.get_messages(fork.session_id) == await p.sessions.get_messages("s")
    part = await p.sessions.fork_session("s", new_session_id="part", through=2)
    assert (part.session_id, part.parent_seq) == ("part", 2)
    assert await p.sessions.get_messages("part") == [{"n": 1}, {"n": 2}]
    await p.sessions.delete_session("s")
    assert len(await p.sessions.get_messages(fork.session_id)) == 5
    with pytest.raises(ConflictError):
        await p.sessions.fork_session("part", new_session_id=fork.session_id)
    with pytest.raises(NotFoundError):
        await p.sessions.fork_session("s")


async def test_a_fork_of_what_is_truncated_meanwhile_is_refused(
    p: Persistence, monkeypatch: pytest.MonkeyPatch
) -> None:
    await p.sessions.save_session(session())
    await p.sessions.add_messages("s", [{"n": n} for n in range(1, 601)])
    read = p.sessions.log.read

    async def read_and_truncate(*args: Any, **bounds: Any) -> Any:
        page = await read(*args, **bounds)
        if bounds["above"] == 500:
            await p.sessions.truncate_after_message("s", seq=10)
        return page

    monkeypatch.setattr(p.sessions.log, "read", read_and_truncate)
    with pytest.raises(ConflictError, match="fork it again"):
        await p.sessions.fork_session("s", new_session_id="copy")
    assert not await p.sessions.session_exists("copy")
    assert await p.sessions.count_messages("copy") == 0


async def test_an_image_forks_with_its_session(p: Persistence) -> None:
    await p.images.save_image(image(metadata={"a": 1}, extra={"x": 1}))
    await p.sessions.save_session(session())
    await p.sessions.add_messages("s", [{"n": 1}, {"n": 2}])
    fork = await p.images.fork_image("img_1", name="branch", through=1)
    assert (fork.parent_image_id, fork.name, fork.metadata, fork.extra) == (
        "img_1",
        "branch",
        {"a": 1},
        {"x": 1},
    )
    assert await p.images.find_image_by_id(fork.image_id) == fork
    of_fork = await p.sessions.find_session_by_image_id(fork.image_id)
    assert of_fork is not None
    assert (of_fork.session_id, of_fork.parent_session_id) == (fork.session_id, "s")
    assert await p.sessions.get_messages(fork.session_id) == [{"n": 1}]
    with pytest.raises(NotFoundError):
        await p.images.fork_image("nobody")
    with pytest.raises(ConflictError):
        await p.images.fork_image("img_1", new_image_id=fork.image_id)


async def test_deleting_a_container_takes_all_that_is_in_it_along(p: Persistence) -> None:
    await p.containers.save_container(ContainerRecord(container_id="c"))
    await p.containers.save_container(ContainerRecord(container_id="other"))
    await p.images.save_image(image("kept", container_id="other"))
    for n in range(3):
        await p.images.save_image(image(f"i{n}"))
        await p.sessions.save_session(session(f"s{n}", image_id=f"i{n}"))
        await p.sessions.add_messages(f"s{n}", [{}, {}])
    await p.sessions.save_session(session("stray", image_id="kept"))
    await p.prototypes.save_prototype(PrototypeRecord(prototype_id="p", container_id="c", name="n"))
    await p.llm_providers.save_llm_provider(provider())
    removed = await p.containers.delete_container("c")
    assert removed == Deleted(containers=1, images=3, sessions=4, messages=6, prototypes=1, llm_providers=1)
    assert ids(await p.images.find_all_images()) == ["kept"]
    assert await p.sessions.find_all_sessions() == []
    assert ids(await p.containers.find_all_containers(), "container_id") == ["other"]


async def test_what_was_never_saved_or_is_deleted_already_takes_its_children_along_too(
    p: Persistence,
) -> None:
    await p.images.save_image(ImageRecord(image_id="i", container_id="c", session_id="s", name="n"))
    await p.sessions.save_session(SessionRecord(session_id="t", image_id="j", container_id="c"))
    assert await p.images.delete_image("j") == Deleted(sessions=1)
    removed = await p.containers.delete_container("c")
    assert (removed.containers, removed.images) == (0, 1)
    assert not await p.containers.delete_container("c")
    await p.containers.save_container(ContainerRecord(container_id="c"))
    assert await p.containers.delete_container("c", cascade=False) == Deleted(containers=1)
    await p.images.save_image(ImageRecord(image_id="k", container_id="c", session_id="s", name="n"))
    assert await p.containers.delete_container("c") == Deleted(images=1)


async def test_a_fork_of_the_same_millisecond_is_the_most_recent_session_of_the_image() -> None:
    async with create_persistence(memory_driver(), clock=lambda: 1_000) as p:
        await p.sessions.save_session(session("s", created_at=1_000))
        first = await p.sessions.fork_session("s", new_session_id="z")
        assert await p.sessions.find_session_by_image_id("img_1") == first
        second = await p.sessions.fork_session("z")
        assert await p.sessions.find_session_by_image_id("img_1") == second


async def test_an_image_takes_the_messages_of_its_session_along_that_was_never_saved(p: Persistence) -> None:
    for image_id, session_id in (("img_1", "loose"), ("img_2", "loose_2"), ("img_3", "another's")):
        await p.images.save_image(image(image_id, session_id=session_id))
        await p.sessions.add_messages(session_id, [{"n": 1}, {"n": 2}])
    await p.sessions.save_session(session("another's", image_id="img_9", container_id="d"))
    assert await p.images.delete_image("img_1") == Deleted(images=1, messages=2)
    assert await p.sessions.get_messages("loose") == []
    with pytest.raises(NotFoundError):
        await p.sessions.add_message("loose", {"n": 3})
    assert await p.containers.delete_container("c") == Deleted(images=2, messages=2)
    assert await p.sessions.count_messages("another's") == 2


async def test_without_cascade_the_children_stay(p: Persistence) -> None:
    await p.images.save_image(image())
    await p.sessions.save_session(session())
    assert await p.images.delete_image("img_1", cascade=False) == Deleted(images=1)
    assert await p.sessions.session_exists("s")


async def test_long_values_are_kept_in_chunks_and_go_with_their_record(p: Persistence) -> None:
    long = {"text": "ü" * 3_000_000, "raw": b"\0" * 500_000}
    number = await p.sessions.add_message("s", long)
    await p.images.save_image(image(custom_data=long))
    assert (await p.sessions.get_messages("s"))[0] == long
    found = await p.images.find_image_by_id("img_1")
    assert found is not None
    assert found.custom_data == long
    await p.images.save_image(image(custom_data={"short": 1}))
    await p.sessions.add_messages("s", [{"n": 1}, long, {"n": 2}])
    assert await p.sessions.get_messages("s", after=number) == [{"n": 1}, long, {"n": 2}]
    await p.sessions.clear_messages("s")
    for partition in ("image/img_1", "session/s"):
        page = await p._driver.scan(partition, "chunk/", "chunk0", limit=10)
        assert page.entries == []


async def test_a_second_object_sees_everything_at_once(make_driver: MakeDriver) -> None:
    async with create_persistence(make_driver()) as one, create_persistence(make_driver()) as two:
        for n in range(10):
            await (one, two)[n % 2].sessions.add_message("s", {"n": n})
        assert [m["n"] for m in await one.sessions.get_messages("s")] == list(range(10))
        await one.sessions.truncate_after_message("s", seq=4)
        assert await two.sessions.count_messages("s") == 4
        await two.sessions.add_message("s", {"n": 10})
        await one.sessions.delete_session("s")
        with pytest.raises(NotFoundError):
            await two.sessions.add_message("s", {"n": 11})


async def test_concurrent_appends_lose_nothing(p: Persistence) -> None:
    numbers = await asyncio.gather(*(p.sessions.add_message("one", {"n": n}) for n in range(50)))
    assert sorted(numbers) == list(range(1, 51))
    await asyncio.gather(*(p.sessions.add_message(f"s{n % 16}", {"n": n}) for n in range(256)))
    for s in range(16):
        assert sorted(m["n"] for m in await p.sessions.get_messages(f"s{s}")) == list(range(s, 256, 16))
    stored = await p.sessions.read_messages("one")
    assert [m.message["n"] for m in stored] == [numbers.index(m.seq) for m in stored]


# ---- expiry


async def test_an_expired_session_is_not_there(make_driver: MakeDriver) -> None:
    now = 1_800_000_000_000
    async with create_persistence(make_driver(), clock=lambda: now) as p:
        soon = session("soon", created_at=1, expires_at=now + 1000)
        await p.sessions.save_session(soon)
        await p.sessions.save_session(session("stays", created_at=2, expires_at=now + 1000))
        await p.sessions.set_expiry("stays", None)
        await p.sessions.save_session(session("later", created_at=3))
        assert (await p.sessions.set_expiry("later", now + 2000)).expires_at == now + 2000
        await p.sessions.add_messages("soon", [{"n": 1}, {"n": 2}])
        assert await p.sessions.find_session_by_id("soon") == soon
        assert await p.sessions.delete_expired() == Deleted()
        now += 1000
        assert await p.sessions.find_session_by_id("soon") is None
        assert not await p.sessions.session_exists("soon")
        assert [found.session_id for found in await p.sessions.find_all_sessions()] == ["later", "stays"]
        assert await p.sessions.count_sessions(image_id="img_1") == 2
        with pytest.raises(NotFoundError):
            await p.sessions.set_expiry("soon", None)
        assert await p.sessions.delete_expired() == Deleted(sessions=1, messages=2)
        assert await p.sessions.delete_expired() == Deleted()
        with pytest.raises(NotFoundError):
            await p.sessions.add_message("soon", {"n": 3})
        now += 5_000_000  # another hour
        assert await p.sessions.delete_expired() == Deleted(sessions=1)
        assert [found.session_id for found in await p.sessions.find_all_sessions()] == ["stays"]
        page = await p._driver.scan("index/deadlines", "", None, limit=10)
        assert page.entries == []


async def test_nobody_reads_an_expired_session_or_adds_to_it(make_driver: MakeDriver) -> None:
    now = 1_800_000_000_000
    driver = make_driver()
    async with (
        create_persistence(driver, clock=lambda: now) as p,
        create_persistence(driver, clock=lambda: now) as q,
    ):
        await p.sessions.save_session(session("s"))
        assert await p.sessions.add_messages("s", [{"n": 1}, {"n": 2}], idempotency_key="k") == [1, 2]
        await q.sessions.set_expiry("s", now + 2000)
        assert await p.sessions.add_message("s", {"n": 3}) == 4  # though it does not know of that
        await q.sessions.set_expiry("s", now + 5000)
        await p.sessions.set_expiry("s", now + 1000)
        await p.sessions.truncate_after_message("s", seq=2)
        assert await q.sessions.get_messages("s") == [{"n": 1}, {"n": 2}]
        assert await q.sessions.count_messages("s") == 2
        now += 1000
        for one in (p, q):
            for attempt in (
                one.sessions.add_message("s", {"n": 4}),
                one.sessions.add_messages("s", [{"n": 1}, {"n": 2}], idempotency_key="k"),
                one.sessions.fork_session("s"),
                one.sessions.truncate_after_message("s", seq=1),
                one.sessions.truncate_after_message("s", "id"),
            ):
                with pytest.raises(NotFoundError):
                    await attempt
            assert await one.sessions.get_messages("s") == []
            assert await one.sessions.get_messages("s", last=5) == []
            assert await one.sessions.read_messages("s", before=9) == []
            assert await one.sessions.count_messages("s") == await one.sessions.clear_messages("s") == 0
        await q.sessions.save_session(session("s"))
        await p.sessions.add_message("s", {"n": 5})
        now += 10**10
        assert await q.sessions.get_messages("s") == [{"n": 5}]


async def test_who_extends_the_life_of_a_session_need_not_tell_those_who_write(
    make_driver: MakeDriver,
) -> None:
    now = 1_800_000_000_000
    driver = make_driver()
    async with (
        create_persistence(driver, clock=lambda: now) as p,
        create_persistence(driver, clock=lambda: now) as q,
    ):
        await p.sessions.save_session(session("s", expires_at=now + 1000))
        for n in range(5):
            await p.sessions.add_message("s", {"n": n})
            await q.sessions.set_expiry("s", now + 1500)
            now += 1000
        record = await q.sessions.find_session_by_id("s")
        assert record is not None
        record.extra["title"] = "t"
        number = await p.sessions.add_message("s", {"n": 5})
        await q.sessions.save_session(record)
        assert await p.sessions.add_message("s", {"n": 6}) == number + 1 == 8  # the first time took one
        assert [message["n"] for message in await q.sessions.get_messages("s")] == list(range(7))
        now += 500
        assert await p.sessions.get_messages("s") == []


async def test_an_expired_session_that_is_saved_starts_anew(make_driver: MakeDriver) -> None:
    now = 1_800_000_000_000
    async with create_persistence(make_driver(), clock=lambda: now) as p:
        await p.sessions.save_session(session("s", expires_at=now + 1000))
        await p.sessions.add_message("s", {"n": 1})
        now += 1000
        await p.sessions.save_session(session("s"), expected_version=0)
        assert await p.sessions.get_messages("s") == []
        assert [found.session_id for found in await p.sessions.find_all_sessions()] == ["s"]
        assert await p.sessions.add_message("s", {"n": 2}) > 1
        assert await p.sessions.delete_expired() == Deleted()  # the deadline was that of the first life
        assert await p.sessions.get_messages("s") == [{"n": 2}]


@pytest.mark.parametrize("of", ["container", "image"])
async def test_a_cascade_takes_the_sessions_along_whose_time_has_come(of: str) -> None:
    now = 999
    async with create_persistence(memory_driver(), clock=lambda: now) as p:
        await p.images.save_image(image())
        await p.sessions.save_session(session("s", expires_at=1_000))
        await p.sessions.add_message("s", {"n": 1})
        now += 1
        delete = p.containers.delete_container("c") if of == "container" else p.images.delete_image("img_1")
        assert await delete == Deleted(images=1, sessions=1, messages=1)
        assert await p.sessions.get_messages("s") == []


@pytest.mark.parametrize("expires_at", ["soon", 1.5, True, 1 << 63])
async def test_a_bad_expiry_is_refused(p: Persistence, expires_at: Any) -> None:
    with pytest.raises(InvalidValueError, match="expires_at"):
        await p.sessions.save_session(session("s", expires_at=expires_at))
    assert await p.sessions.find_session_by_id("s") is None


async def test_fields_that_are_named_like_those_of_the_library_stay(p: Persistence) -> None:
    some: list[dict[str, Any]] = [{"extra": {}}, {"extra": {"a": 1}}, {"version": 0}, {"version": 7}]
    for odd in [*some, {"version": "x", "f": 2}]:
        fields = {"session_id": "s", "image_id": "i", "container_id": "c", **odd}
        version = await p.sessions.save_session(fields)
        found = await p.sessions.find_session_by_id("s")
        assert found is not None
        assert (found.extra, found.version) == (odd, version)
        assert {**found.to_mapping(), **odd} == found.to_mapping()


@pytest.mark.parametrize("damaged", [b"", b"{", b'{"f":1,"v":5}', b'{"f":1}'])
@pytest.mark.parametrize(
    ("kind", "id_field", "others"),
    [
        ("container", "container_id", ()),
        ("image", "image_id", ("container_id", "session_id", "name")),
        ("session", "session_id", ("container_id", "image_id")),
        ("prototype", "prototype_id", ("container_id", "name")),
        ("llm_provider", "id", ("container_id", "name", "vendor", "protocol", "api_key")),
    ],
)
async def test_a_record_that_cannot_be_read_can_be_deleted(
    kind: str, id_field: str, others: tuple[str, ...], damaged: bytes
) -> None:
    """Or it would stand in the way of every listing that it is in."""
    memory = memory_driver()
    async with create_persistence(memory) as p:
        repository: Any = getattr(p, f"{kind}s")
        save, delete = getattr(repository, f"save_{kind}"), getattr(repository, f"delete_{kind}")
        for id in ("one", "two"):
            await save({id_field: id, **dict.fromkeys(others, "x")})
        records = repository.records
        place = records.kind.places(await records.find("two"))[0]
        held = memory._partitions[records.kind.partition("one")].entries
        held["record"] = held["record"]._replace(value=damaged)

        with pytest.raises(CorruptRecordError, match="one"):
            await records.page(place)
        assert getattr(await delete("one"), f"{kind}s") == 1
        assert [records.kind.id_of(record) for record in await records.page(place)] == ["two"]
        assert not await delete("one")


async def test_a_provider_can_be_deleted_though_nobody_can_read_which_one_is_the_default() -> None:
    memory = memory_driver()
    async with create_persistence(memory) as p:
        await p.containers.save_container({"container_id": "c"})
        for id in ("a", "b"):
            await p.llm_providers.save_llm_provider(provider(id, is_default=True))
        held = memory._partitions["container/c"].entries
        held["default-llm-provider"] = held["default-llm-provider"]._replace(value=b"{")
        assert await p.llm_providers.delete_llm_provider("a") == Deleted(llm_providers=1)
        assert await p.containers.delete_container("c") == Deleted(containers=1, llm_providers=1)


@pytest.mark.parametrize("version", ["5", 1.0, False, True])
async def test_an_expected_version_of_the_wrong_type_is_refused(p: Persistence, version: Any) -> None:
    with pytest.raises(InvalidValueError, match="expected_version"):
        await p.containers.save_container({"container_id": "c"}, expected_version=version)
    assert await p.containers.find_all_containers() == []


async def test_a_cascade_deletes_many_at_once() -> None:
    driver = RecordingDriver()
    async with create_persistence(driver) as p:
        for i in range(64):
            await p.sessions.save_session(session(f"s{i}", container_id="c1"))
            await p.sessions.add_message(f"s{i}", {"i": i})
        driver.forget()
        removed = await p.containers.delete_container("c1")
        assert (removed.sessions, removed.messages) == (64, 64)
        assert driver.calls.count("commit") < 64
        assert driver.calls.count("get") < 64
        assert await p.sessions.find_all_sessions() == []


async def test_reading_a_long_session_lets_others_have_a_turn() -> None:
    class Counted:
        most = now = 0

        def decode(self, text: bytes) -> Any:
            self.now += 1
            self.most = max(self.most, self.now)
            return decode(text)

    async with create_persistence(MemoryDriver()) as p:
        await p.sessions.add_messages("s", ({"i": i} for i in range(5_000)))
        decode, counted = p.sessions.log._plain.decode, Counted()
        p.sessions.log._plain = counted  # type: ignore[assignment]
        reading = asyncio.ensure_future(p.sessions.get_messages("s"))
        while not reading.done():
            counted.now = 0
            await asyncio.sleep(0)
        assert [message["i"] for message in await reading] == list(range(5_000))
        assert counted.most <= 500
