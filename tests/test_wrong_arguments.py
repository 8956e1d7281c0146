"""What callers give by mistake is refused by an error of ours that names the parameter."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from datetime import datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any, get_type_hints

import pytest

from persistence import (
    ConfigurationError,
    ContainerRecord,
    ImageRecord,
    InvalidKeyError,
    InvalidValueError,
    LLMProviderRecord,
    Persistence,
    PersistenceError,
    PrototypeRecord,
    SessionRecord,
    create_persistence,
    memory_driver,
)
from persistence.calls import Repository
from persistence.compat import MySQLStorage, PostgresStorage, SQLiteStorage, record, storage_config
from persistence.connect import driver_from_url
from persistence.drivers import (
    filesystem_driver,
    mongodb_driver,
    mysql_driver,
    postgresql_driver,
    redis_driver,
    sqlite_driver,
)
from persistence.services import AgentCheckpointService, CheckpointCommands, CheckpointRPC

HUGE = 10**5000  # has more digits than Python shows
WRONG: list[Any] = [-1, True, 1.5, math.nan, HUGE, b"x", [1], object(), "\ud800", "x" * 70_000]
WRONG += [timedelta(days=-1), datetime(2026, 1, 1)]

GIVEN: dict[str, Any] = {
    **dict.fromkeys(("session_id", "image_id", "container_id", "prototype_id", "thread_id", "id"), "a"),
    **dict.fromkeys(("stream_id", "agent_id", "name", "token", "checkpoint_id", "a", "b"), "a"),
    **{name: {"a": 1} for name in ("message", "metadata", "snapshot", "part")},
    "messages": [{"a": 1}],
    "labels": ["a"],
    "index": 0,
    "expires_at": 4_000_000_000_000,
    "new_thread_id": "b",
}
RECORDS: dict[str, Any] = {
    "save_session": SessionRecord(session_id="a", image_id="a", container_id="a"),
    "save_image": ImageRecord(image_id="a", container_id="a", session_id="a", name="a", metadata={"b": 1}),
    "save_container": ContainerRecord(container_id="a"),
    "save_prototype": PrototypeRecord(prototype_id="a", container_id="a", name="a"),
    "save_llm_provider": LLMProviderRecord(
        id="a", container_id="a", name="a", vendor="a", protocol="a", api_key="a"
    ),
}
NAMED = {"agent_id": "a", "session_id": "a", "agent_type": "a", "name": "a", "state": 1}
APP = {"session_id": "a", "hostname": "a", "working_directory": "a", "state": 1}

ANY = {"snapshot", "part"}  # any value that can be stored
FLAGS = {"cascade", "dry_run"}
SERVED = {"version", "now"}  # what they hold is looked at elsewhere


async def prepared() -> Persistence:
    p = await create_persistence(memory_driver())
    await p.containers.save_container(RECORDS["save_container"])
    await p.images.save_image(RECORDS["save_image"])
    await p.sessions.save_session(RECORDS["save_session"])
    await p.checkpoints.put("a", {"a": 1})
    return p


def kind(wrong: object) -> str:
    return type(wrong).__name__  # not all of them can be shown


def needed(method: str, parameter: inspect.Parameter) -> Any:
    if parameter.name == "record":
        return RECORDS[method]
    if parameter.name == "checkpoint":
        return APP if "app" in method else NAMED
    return GIVEN[parameter.name]


def public_calls() -> list[tuple[str, str, str]]:
    owners: dict[str, type[Repository]] = {"": Persistence, **get_type_hints(Persistence)}
    return [
        (owner, name, parameter)
        for owner, one in owners.items()
        for name, method in inspect.getmembers(one, inspect.isfunction)
        if not name.startswith("_")
        for parameter in inspect.signature(method).parameters
        if parameter not in ANY | FLAGS | SERVED | {"self"}
    ]


@pytest.mark.parametrize(("owner", "name", "parameter"), public_calls())
async def test_a_wrong_argument_of_a_public_call_is_an_error_that_names_it(
    owner: str, name: str, parameter: str
) -> None:
    p = await prepared()
    method = getattr(getattr(p, owner) if owner else p, name)
    parameters = inspect.signature(method).parameters
    arguments = {
        one.name: needed(name, one) for one in parameters.values() if one.default is inspect.Parameter.empty
    }
    if name.startswith("prune") and parameter != "older_than":
        arguments["keep_last"] = 1
    if name == "truncate_after_message" and parameter != "message_id":
        arguments["seq"] = 1
    for wrong in WRONG:
        try:
            await method(**arguments | {parameter: wrong})
        except (InvalidKeyError, InvalidValueError) as error:
            text = str(error)
            assert parameter.rstrip("s") in text or parameter in ("record", "checkpoint", "messages"), wrong
            assert len(text) < 1000
        except PersistenceError:
            pass  # there is nothing of that id, or another version


@pytest.mark.parametrize("wrong", [HUGE, b"x", [1], object(), "\ud800", "x" * 70_000, math.nan], ids=kind)
@pytest.mark.parametrize(
    ("owner", "name", "parameter"),
    [one for one in public_calls() if one[2] in ("timeout", "limit", "cursor", "expected_last", "progress")],
)
async def test_what_cannot_be_meant_is_not_taken(owner: str, name: str, parameter: str, wrong: Any) -> None:
    if wrong is HUGE and parameter in ("limit", "timeout"):
        return  # more than there will ever be
    p = await prepared()
    method = getattr(getattr(p, owner) if owner else p, name)
    needs = inspect.signature(method).parameters.values()
    arguments = {one.name: needed(name, one) for one in needs if one.default is inspect.Parameter.empty}
    with pytest.raises((InvalidValueError, InvalidKeyError), match=parameter):
        await method(**arguments | {parameter: wrong})


async def test_a_parameter_is_named_as_the_caller_knows_it() -> None:
    p = await prepared()
    wrong: Any = 5
    calls = {
        "new_session_id": p.sessions.fork_session("a", new_session_id=wrong),
        "new_image_id": p.images.fork_image("a", new_image_id=wrong),
        "new_thread_id": p.checkpoints.copy_thread("a", wrong),
        "parent_id": p.checkpoints.put("a", 1, parent_id=wrong),
        "before": p.checkpoints.list("a", before=wrong),
        "agent_id": p.checkpoints.delete_agent_checkpoints(wrong),
        "session_id": p.checkpoints.delete_session_checkpoints(wrong),
    }
    for name, call in calls.items():
        with pytest.raises(InvalidKeyError, match=f"^{name} must be a text"):
            await call


async def test_an_age_below_0_removes_nothing() -> None:
    p = await prepared()
    for prune in (p.checkpoints.prune, p.checkpoints.prune_checkpoints, p.checkpoints.prune_app_checkpoints):
        with pytest.raises(InvalidValueError, match="older_than"):
            await prune(older_than=timedelta(days=-30))
    assert await p.checkpoints.get("a") == {"a": 1}


async def test_a_signalling_nan_is_compared_as_any_other() -> None:
    p = await prepared()
    signalling = Decimal("sNaN")
    first = await p.checkpoints.put("a", {"n": signalling}, metadata={"n": signalling})
    second = await p.checkpoints.put("a", {"n": Decimal(1)}, metadata={"n": Decimal(1)})
    [change] = await p.checkpoints.diff("a", first.id, second.id)
    assert change.path == ("n",)
    assert await p.checkpoints.diff("a", first.id, first.id) == []
    assert [one.id for one in await p.checkpoints.list("a", metadata={"n": Decimal(1)})] == [second.id]
    assert [one.id for one in await p.checkpoints.list("a", metadata={"n": signalling})] == [first.id]


async def test_only_now_may_be_a_clock() -> None:
    p = await prepared()
    clock: Any = lambda: 5  # noqa: E731
    assert (await p.checkpoints.put("a", 1, now=clock)).created_at == 5
    with pytest.raises(InvalidValueError, match="expires_at"):
        await p.checkpoints.put("a", 1, expires_at=clock)
    with pytest.raises(InvalidValueError, match="created_at"):
        await p.checkpoints.store_checkpoint(NAMED | {"created_at": clock})


@pytest.mark.parametrize("wrong", [5, "secret", ["secret"], None])
def test_a_record_with_wrong_fields_can_be_shown(wrong: Any) -> None:
    image = ImageRecord(
        image_id="a", container_id="a", session_id="a", name="a", mcp_servers=wrong, extra=wrong
    )
    assert "image_id='a'" in repr(image)
    assert "secret" not in repr(image)


# ---- drivers, and what is built of them

SERVERS: list[tuple[Callable[..., Any], str]] = [
    (postgresql_driver, "postgresql://u@127.0.0.1:1/d"),
    (mysql_driver, "mysql://u@127.0.0.1:1/d"),
    (redis_driver, "redis://127.0.0.1:1"),
    (mongodb_driver, "mongodb://127.0.0.1:1/d"),
]
OPTIONS = """namespace durability pool_size timeout connect_timeout table schema prefix host port user
    password database client statement_cache_size ssl_ca""".split()


@pytest.mark.parametrize(
    ("make", "url", "option"),
    [
        (make, url, option)
        for make, url in SERVERS
        for option in OPTIONS
        if option in inspect.signature(make).parameters
    ],
)
def test_a_wrong_option_of_a_driver_is_an_error_that_names_it(
    make: Callable[..., Any], url: str, option: str
) -> None:
    for wrong in (object(), b"x", [1], "\ud800", HUGE, math.nan, -1, True):
        if option == "client" and isinstance(wrong, bool):
            continue
        if wrong is HUGE and option in ("database", "statement_cache_size"):
            continue  # a number, whatever the server has
        with pytest.raises(ConfigurationError, match=option) as caught:
            make(**{option: wrong}) if option in ("host", "port") else make(url, **{option: wrong})
        assert option != "password" or "\ud800" not in str(caught.value)


@pytest.mark.parametrize("make", [sqlite_driver, filesystem_driver, SQLiteStorage])
@pytest.mark.parametrize("wrong", [None, 5, b"x", "", "a\0b", [1], "\ud800"])
def test_what_is_no_path_is_refused(make: Callable[..., Any], wrong: Any) -> None:
    with pytest.raises(ConfigurationError, match="path="):
        make(wrong)


@pytest.mark.parametrize("wrong", [None, 5, b"x", "\ud800", HUGE], ids=kind)
def test_what_is_no_url_is_refused(wrong: Any) -> None:
    for make in (driver_from_url, MySQLStorage, PostgresStorage):
        with pytest.raises(ConfigurationError):
            make(wrong)


async def test_a_file_that_cannot_be_reached_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for create in (True, False):
        with pytest.raises(ConfigurationError, match="too long"):
            await create_persistence(sqlite_driver(tmp_path / ("x" * 5000), create=create))

    def refuse(*_: object, **__: object) -> bool:
        raise PermissionError(13, "Permission denied")  # as for a folder that one may not enter

    monkeypatch.setattr(Path, "is_dir", refuse)
    with pytest.raises(ConfigurationError, match="Permission denied"):
        await create_persistence(sqlite_driver(tmp_path / "a.db"))


@pytest.mark.parametrize("wrong", [5, "x", [1], object()])
def test_what_is_no_clock_is_refused(wrong: Any) -> None:
    with pytest.raises(ConfigurationError, match="clock="):
        create_persistence(memory_driver(), clock=wrong)


# ---- what other programs send


@pytest.mark.parametrize("params", ["\ud800", {"limit": "\ud800"}, {"\ud800": 1}, {"id": "\ud800"}, 5])
async def test_a_remote_call_of_no_valid_unicode_is_refused(params: Any) -> None:
    p = await prepared()
    rpc = CheckpointRPC(AgentCheckpointService(p.checkpoints))
    for method in ("listCheckpoints", "getCheckpoint"):
        with pytest.raises((InvalidValueError, InvalidKeyError)):
            await rpc.call(method, params)


async def test_what_is_no_command_no_configuration_and_no_kind_of_record_is_refused() -> None:
    p = await prepared()
    agent: Any = None
    wrong: Any
    for wrong in (None, 5, b"list"):
        with pytest.raises(InvalidValueError, match="command"):
            await CheckpointCommands(AgentCheckpointService(p.checkpoints)).execute(wrong, agent)
        with pytest.raises(InvalidValueError, match="kind="):
            record(wrong, {})
        with pytest.raises(ConfigurationError):
            storage_config({"type": "sqlite", "databasePath": wrong})
    with pytest.raises(ConfigurationError):
        storage_config({"type": "sqlite", "\ud800": 1})


@pytest.mark.parametrize("wrong", [0, -1, math.nan, math.inf, "5", None])
def test_how_often_a_stream_looks_is_checked(wrong: Any) -> None:
    with pytest.raises(ConfigurationError, match="interval_seconds"):
        CheckpointRPC(AgentCheckpointService(), interval_seconds=wrong)
