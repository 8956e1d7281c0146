"""The shapes that the ancestors' callers know."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from persistence import (
    ConfigurationError,
    ConflictError,
    ImageRecord,
    InvalidValueError,
    create_persistence,
    memory_driver,
)
from persistence.compat import (
    AgentCheckpointStorage,
    Checkpointer,
    MySQLConfig,
    MySQLStorage,
    PaginatedResult,
    PostgresConfig,
    PostgresStorage,
    SQLiteConfig,
    SQLiteStorage,
    migrate_snapshot,
    record,
    storage,
    storage_config,
)


def checkpoint(i: int = 0, **fields: Any) -> dict[str, Any]:
    return {
        "agentId": f"agent-{i % 2}",
        "sessionId": "app-1",
        "agentType": "coder",
        "name": f"step {i}",
        "state": {"TodoState": {"todos": [i]}},
        "createdAt": i,
        **fields,
    }


@pytest_asyncio.fixture
async def sqlite(tmp_path: Path) -> AsyncIterator[AgentCheckpointStorage]:
    async with storage({"type": "sqlite", "databasePath": str(tmp_path / "agents.db")}) as started:
        yield started


async def test_a_storage_stores_retrieves_and_lists(sqlite: AgentCheckpointStorage) -> None:
    stored = [await sqlite.store_checkpoint(checkpoint(i)) for i in range(3)]
    found = await sqlite.retrieve_checkpoint(stored[1])
    assert found is not None
    assert (found.id, found.agent_id, found.state, found.created_at) == (
        *(stored[1], "agent-1", {"TodoState": {"todos": [1]}}, 1),
    )
    assert [item.id for item in await sqlite.list_checkpoints()] == stored[::-1]
    assert await sqlite.retrieve_checkpoint("7") is None


async def test_the_coded_names_do_what_the_documented_ones_do(sqlite: AgentCheckpointStorage) -> None:
    id = await sqlite.store_agent_checkpoint(checkpoint(config={"a": 1}, previousResponseId="r"))
    found = await sqlite.retrieve_agent_checkpoint(id)
    assert found is not None
    assert found == await sqlite.retrieve_checkpoint(id)
    assert found.extra == {"config": {"a": 1}, "previousResponseId": "r"}
    assert await sqlite.list_agent_checkpoints() == await sqlite.list_checkpoints()


async def test_fields_may_be_in_either_spelling(sqlite: AgentCheckpointStorage) -> None:
    first = await sqlite.store_checkpoint(checkpoint())
    found = await sqlite.retrieve_checkpoint(first)
    assert found is not None
    second = await sqlite.store_checkpoint(
        {
            "agent_id": "agent-0",
            "session_id": "app-1",
            "agent_type": "coder",
            "name": "step 0",
            "state": found.state,
            "created_at": 0,
        }
    )
    again = await sqlite.retrieve_checkpoint(second)
    assert again is not None
    assert (again.agent_id, again.extra) == (found.agent_id, found.extra)


async def test_pages_by_offset_as_the_newest_version_has_them(sqlite: AgentCheckpointStorage) -> None:
    for i in range(7):
        await sqlite.store_checkpoint(checkpoint(i))
    page = await sqlite.list_agent_checkpoints({"limit": 3, "offset": 2})
    assert isinstance(page, PaginatedResult)
    assert [item.created_at for item in page.items] == [4, 3, 2]
    assert (page.total, page.has_more, page.limit, page.offset) == (7, True, 3, 2)
    options = {"agentId": "agent-0", "orderBy": "createdAt", "orderDir": "ASC", "after": 0, "sessionId": None}
    page = await sqlite.list_agent_checkpoints(options)
    assert isinstance(page, PaginatedResult)
    assert [item.created_at for item in page.items] == [2, 4, 6]
    assert (page.total, page.has_more, page.limit) == (3, False, 50)
    wrong: list[dict[str, Any]] = [{"limit": limit} for limit in (0, 1.5, "3", True)]
    wrong += [{"offset": offset} for offset in (-1, 1.5, "3")]
    for bad in (*wrong, {"userId": "x"}, {"orderBy": "name"}):
        with pytest.raises(InvalidValueError):
            await sqlite.list_agent_checkpoints(bad)


async def test_checkpoints_of_applications(sqlite: AgentCheckpointStorage) -> None:
    assert await sqlite.retrieve_latest_app_checkpoint() is None
    stored = [
        await sqlite.store_app_checkpoint(
            {
                "sessionId": f"s{i}",
                "hostname": "h",
                "workingDirectory": "/w",
                "state": {"i": i},
                "createdAt": i,
                "projectDirectory": "/p",
            }
        )
        for i in range(3)
    ]
    latest = await sqlite.retrieve_latest_app_checkpoint()
    assert latest is not None
    assert latest == await sqlite.retrieve_app_checkpoint(stored[2])
    assert latest.extra == {"projectDirectory": "/p"}
    found = await sqlite.list_app_checkpoints()
    assert isinstance(found, list)
    assert [item.id for item in found] == stored[::-1]
    page = await sqlite.list_app_checkpoints({"sessionId": "s1"})
    assert isinstance(page, PaginatedResult)
    assert page.total == 1


@pytest.mark.parametrize("name", ["projectDirectory", "project_directory", "workspaceDirectory"])
async def test_the_directory_of_an_application_may_have_its_later_names(
    sqlite: AgentCheckpointStorage, name: str
) -> None:
    id = await sqlite.store_app_checkpoint({"sessionId": "s", "hostname": "h", name: "/w", "state": 1})
    found = await sqlite.retrieve_app_checkpoint(id)
    assert found is not None
    assert found.working_directory == "/w"


async def test_what_is_no_mapping_is_refused(sqlite: AgentCheckpointStorage) -> None:
    for call in (
        sqlite.store_checkpoint([("agentId", "a")]),  # type: ignore[arg-type]
        Checkpointer(sqlite.persistence).list("t", ["limit"]),  # type: ignore[arg-type]
        Checkpointer(sqlite.persistence).list("t", {"before": 1}),
    ):
        with pytest.raises(InvalidValueError):
            await call


async def test_saving_at_once_gives_distinct_ids(sqlite: AgentCheckpointStorage) -> None:
    stored = await asyncio.gather(*(sqlite.store_checkpoint(checkpoint(createdAt=5)) for _ in range(20)))
    assert len(set(stored)) == len(await sqlite.list_checkpoints()) == 20


async def test_start_is_idempotent_and_needed(tmp_path: Path) -> None:
    one = SQLiteStorage(str(tmp_path / "a.db"))
    with pytest.raises(ConfigurationError, match="start"):
        await one.list_checkpoints()
    await one.start()
    await one.start()
    id = await one.store_checkpoint(checkpoint())
    await one.stop()
    await one.stop()
    await one.start()
    assert await one.retrieve_checkpoint(id) is not None
    await one.stop()


async def test_who_starts_and_stops_at_once_opens_it_once_and_leaves_it_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[Any] = []

    def opening(driver: Any) -> Any:
        opened.append(driver)
        return create_persistence(driver)

    monkeypatch.setattr("persistence.compat.create_persistence", opening)
    one = SQLiteStorage(str(tmp_path / "a.db"))
    await asyncio.gather(one.start(), one.start(), one.stop())
    assert len(opened) == 1
    with pytest.raises(ConfigurationError, match="start"):
        await one.list_checkpoints()


def test_a_storage_says_what_it_is_and_no_secret() -> None:
    found: list[AgentCheckpointStorage] = [
        SQLiteStorage("data/agents.db"),
        MySQLStorage("mysql://me:s3cret@db.example/agents"),
        PostgresStorage("postgres://me:s3cret@db.example:5432/agents"),
    ]
    assert [(one.name, one.description) for one in found] == [
        ("SQLiteStorage", "SQLite storage provider"),
        ("MySQLStorage", "MySQL storage provider"),
        ("PostgresStorage", "Postgres storage provider"),
    ]
    assert [one.display_name for one in found] == [
        "SQLite (data/agents.db)",
        "MySQL (mysql://me:***@db.example/agents)",
        "Postgres (postgres://me:***@db.example:5432/agents)",
    ]
    assert "s3cret" not in repr(found)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"type": "sqlite", "databasePath": "a.db"}, SQLiteConfig("a.db")),
        ({"type": "sqlite", "database_path": "a.db", "migrationsFolder": "m"}, SQLiteConfig("a.db", "m")),
        ({"type": "mysql", "connectionString": "mysql://h/d"}, MySQLConfig("mysql://h/d")),
        ({"type": "postgres", "connection_string": "postgres://h/d"}, PostgresConfig("postgres://h/d")),
    ],
)
def test_a_configuration_is_a_tagged_union(given: dict[str, Any], expected: Any) -> None:
    assert storage_config(given) == storage_config(expected) == expected


@pytest.mark.parametrize(
    "bad",
    [
        {},
        {"type": "oracle"},
        {"type": "sqlite"},
        {"type": "sqlite", "databasePath": 5},
        {"type": "sqlite", "connectionString": "x"},
        {"type": "mysql", "connectionString": "mysql://u:s3cret@h/d", "databasePath": "x"},
        {"databasePath": "x"},
        "sqlite",
    ],
)
def test_a_wrong_configuration_is_refused(bad: Any) -> None:
    with pytest.raises(ConfigurationError) as caught:
        storage_config(bad)
    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize("bad", ["host=x password=s3cret", "s3cret", "http://u:s3cret@h/"])
def test_a_connection_string_that_is_no_url_is_refused_without_being_shown(bad: str) -> None:
    for type in ("mysql", "postgres"):
        with pytest.raises(ConfigurationError) as caught:
            storage({"type": type, "connectionString": bad})
        assert "s3cret" not in str(caught.value)


def test_the_representation_of_a_configuration_shows_no_secret() -> None:
    for config in (MySQLConfig("mysql://u:s3cret@h/d"), PostgresConfig("postgres://u:s3cret@h/d")):
        assert "s3cret" not in repr(config)


async def test_the_documented_list_is_filtered_as_well(sqlite: AgentCheckpointStorage) -> None:
    stored = [await sqlite.store_checkpoint(checkpoint(i)) for i in range(4)]
    assert [item.id for item in await sqlite.list_checkpoints(agent_id="agent-1", limit=1)] == [stored[3]]


async def test_the_limit_of_a_checkpointer_may_be_a_keyword() -> None:
    async with create_persistence(memory_driver()) as p:
        ids = [await Checkpointer(p).put("t", {"version": 2, "step": i}) for i in range(3)]
        assert [meta.id for meta in await Checkpointer(p).list("t", limit=1)] == ids[2:]


def test_a_snapshot_of_the_first_version_becomes_one_of_the_second() -> None:
    first = {"version": 1, "step": 3}
    assert migrate_snapshot(first) == {"version": 2, "step": 3}
    assert first["version"] == 1
    second = {"version": 2}
    assert migrate_snapshot(second) is second
    for bad in ({"version": 3}, {"version": True}, {}):
        with pytest.raises(InvalidValueError, match="version"):
            migrate_snapshot(bad)


async def test_a_checkpointer_keeps_threads_of_snapshots() -> None:
    async with create_persistence(memory_driver()) as p:
        checkpointer = Checkpointer(p, max_checkpoints_per_thread=2, now=lambda: 1.5)
        stored = [await checkpointer.put("t", {"version": 2, "step": i}) for i in range(3)]
        found = await checkpointer.list("t")
        assert [(meta.id, meta.version, meta.created_at) for meta in found] == [
            (stored[2], 2, 1),
            (stored[1], 2, 1),
        ]
        assert await checkpointer.get("t") == {"version": 2, "step": 2}
        assert await checkpointer.get("t", stored[1]) == {"version": 2, "step": 1}
        assert await checkpointer.get("t", "") is None
        assert [meta.id for meta in await checkpointer.list("t", {"limit": 1.7})] == [stored[2]]
        assert await checkpointer.list("t", {"limit": 0}) == []
        assert len(await checkpointer.list("t", {"limit": float("inf")})) == 2
        await checkpointer.delete("t", "")
        assert await checkpointer.thread_count() == 1
        await checkpointer.delete("t")
        await checkpointer.delete("t")
        assert await checkpointer.get("t") is None
        unlimited = Checkpointer(p, max_checkpoints_per_thread=float("inf"))
        await unlimited.put("t", 1)
        assert await unlimited.thread_count() == 1


async def test_a_storage_gives_what_deletes_and_prunes(
    sqlite: AgentCheckpointStorage, tmp_path: Path
) -> None:
    ids = [await sqlite.store_checkpoint(checkpoint(2 * i)) for i in range(3)]
    assert await sqlite.persistence.checkpoints.delete_checkpoint(ids[0])
    assert (await sqlite.persistence.checkpoints.prune_checkpoints(keep_last=1)).checkpoints == 1
    assert [item.id for item in await sqlite.list_checkpoints()] == ids[2:]
    with pytest.raises(ConfigurationError, match="not started"):
        _ = SQLiteStorage(str(tmp_path / "other.db")).persistence


async def test_a_thread_of_a_checkpointer_goes_some_time_after_its_last_snapshot() -> None:
    now = 1_800_000_000_000
    async with create_persistence(memory_driver(), clock=lambda: now) as p:
        checkpointer = Checkpointer(p, ttl_seconds=2.5)
        await checkpointer.put("t", {"version": 2})
        now += 2_499
        latest = await checkpointer.put("t", {"version": 2})
        now += 2_499
        assert len(await checkpointer.list("t")) == 2
        await checkpointer.put("t", {"version": 2}, expected_latest=latest)
        with pytest.raises(ConflictError):
            await checkpointer.put("t", {"version": 2}, expected_latest=latest)
        now += 2_500
        assert await checkpointer.get("t") is None
        for wrong in (0, -1, float("inf"), float("nan")):
            with pytest.raises(InvalidValueError, match="ttl_seconds"):
                Checkpointer(p, ttl_seconds=wrong)


def test_a_record_may_be_in_either_spelling() -> None:
    ids = {"imageId": "i", "containerId": "c", "session_id": "s", "name": "n"}
    made = record(ImageRecord, {**ids, "createdAt": 5, "mcpServers": {"a": {"maxTokens": 1}}, "ownField": 1})
    assert (made.image_id, made.session_id, made.created_at) == ("i", "s", 5)
    assert made.mcp_servers == {"a": {"maxTokens": 1}}
    assert made.extra == {"ownField": 1}
    with pytest.raises(InvalidValueError, match="imageId is there in two spellings"):
        record(ImageRecord, {**ids, "image_id": "other"})
    with pytest.raises(InvalidValueError, match="missing required field `image_id`"):
        record(ImageRecord, {})
