"""Agents saved and restored: by call, by hook, by command, by another program; and whole applications."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from persistence import (
    ConfigurationError,
    InvalidValueError,
    NotFoundError,
    Persistence,
    UnavailableError,
    create_persistence,
    memory_driver,
)
from persistence.checkpoints import AgentCheckpointListItem, StoredAgentCheckpoint, StoredAppCheckpoint
from persistence.collection import Listing
from persistence.compat import AgentCheckpointStorage, storage
from persistence.services import (
    AgentCheckpointService,
    AppCheckpointService,
    AutoCheckpoint,
    CheckpointCommands,
    CheckpointProvider,
    CheckpointRPC,
)
from persistence.testing import MakeDriver


class TodoAgent:
    """An agent with a list of things to do, to which each input adds one."""

    def __init__(self, id: str = "a1") -> None:
        self.id = id
        self.todos: list[str] = []
        self.hooks: list[AutoCheckpoint] = []

    def generate_checkpoint(self) -> Mapping[str, Any]:
        state = {"TodoState": {"todos": self.todos}, "CostTrackingState": {"usd": 0.5}}
        return {"agent_id": self.id, "session_id": "app", "agent_type": "coder", "state": state}

    def restore_state(self, state: Any) -> None:
        self.todos = list(state["TodoState"]["todos"])

    def enable_hook(self, hook: AutoCheckpoint) -> None:
        self.hooks.append(hook)

    async def handle(self, message: str) -> None:
        self.todos.append(message)
        for hook in self.hooks:
            await hook.after_input(self, message)


class AsyncAgent(TodoAgent):
    """The same, with coroutine functions."""

    async def generate_checkpoint(self) -> Mapping[str, Any]:  # type: ignore[override]
        return super().generate_checkpoint()

    async def restore_state(self, state: Any) -> None:  # type: ignore[override]
        super().restore_state(state)


async def named(service: AgentCheckpointService) -> list[str]:
    return [item.name for item in await service.list_checkpoints()]


# ---- agents


async def test_a_saved_agent_is_restored(p: Persistence) -> None:
    service = AgentCheckpointService(p.checkpoints)
    await service.start()
    agent = TodoAgent()
    await agent.handle("write the tests")
    id = await service.save_agent_checkpoint("before", agent)
    await agent.handle("delete everything")
    other = TodoAgent()
    await service.restore_agent_checkpoint(id, other)
    assert other.todos == ["write the tests"]
    found = await service.retrieve_agent_checkpoint(id)
    assert found is not None
    assert (found.name, found.agent_id, found.session_id) == ("before", "a1", "app")
    assert found.created_at > 1_700_000_000_000
    await service.stop()


async def test_the_methods_of_an_agent_may_be_coroutine_functions(p: Persistence) -> None:
    service = AgentCheckpointService(p.checkpoints)
    agent = AsyncAgent()
    agent.todos = ["one"]
    id = await service.save_agent_checkpoint("", agent)
    agent.todos = []
    await service.restore_agent_checkpoint(id, agent)
    assert agent.todos == ["one"]


async def test_what_is_not_there_is_named(p: Persistence) -> None:
    service = AgentCheckpointService(p.checkpoints)
    assert await service.retrieve_agent_checkpoint("7") is None
    with pytest.raises(NotFoundError, match="Checkpoint 7 not found"):
        await service.restore_agent_checkpoint("7", TodoAgent())
    assert await service.list_checkpoints() == []


async def test_an_attached_agent_is_saved_after_every_input_under_its_name(p: Persistence) -> None:
    service = AgentCheckpointService(p.checkpoints)
    agent, context = TodoAgent(), ["You are a coder."]
    service.attach(agent, context)
    assert context == ["You are a coder.", "Checkpoint provider: Checkpoints"]
    (hook,) = agent.hooks
    for odd, name in (("half a pair: \ud83d", "half a pair: ?"), ("\x1b" * 1_000_000, "\x1b" * 40_000)):
        await hook.after_input(agent, odd)
        assert (await named(service))[0] == name
    messages = ["", "two\nlines", "\N{WAVING HAND SIGN}" * 1_000_000]
    for message in messages:
        await agent.handle(message)
    assert (await named(service))[:3] == [messages[2][:40_000], *messages[1::-1]]
    (latest, *_) = await service.list_checkpoints(limit=1)
    restored = TodoAgent()
    await service.restore_agent_checkpoint(latest.id, restored)
    assert restored.todos == messages


async def test_automatic_checkpoints_can_be_bounded(p: Persistence) -> None:
    service = AgentCheckpointService(p.checkpoints, max_checkpoints_per_agent=3)
    agents = [TodoAgent("a1"), TodoAgent("a2")]
    for agent in agents:
        service.attach(agent)
    for number in range(10):
        for agent in agents:
            await agent.handle(f"{agent.id} {number}")
    names = {f"{agent.id} {number}" for agent in agents for number in (7, 8, 9)}
    assert set(await named(service)) == names


async def test_saves_at_once_have_ids_of_their_own(p: Persistence) -> None:
    service = AgentCheckpointService(p.checkpoints)
    saves = (service.save_agent_checkpoint(f"n{i}", TodoAgent(f"a{i % 3}")) for i in range(50))
    assert len(set(await asyncio.gather(*saves))) == 50
    assert len(await service.list_checkpoints()) == 50


async def test_without_a_provider_it_says_what_to_do() -> None:
    service = AgentCheckpointService()
    for call in (service.start, service.run, service.list_checkpoints):
        with pytest.raises(ConfigurationError, match="set_checkpoint_provider"):
            await call()
    agent = TodoAgent()
    service.attach(agent)
    with pytest.raises(ConfigurationError, match="set_checkpoint_provider"):
        await agent.handle("hello")
    async with create_persistence(memory_driver()) as p:
        service.set_checkpoint_provider(p.checkpoints)
        await agent.handle("hello")
        assert await named(service) == ["hello"]


class Broken(CheckpointProvider):
    async def start(self) -> None:
        raise UnavailableError("start")

    async def store_checkpoint(self, checkpoint: Mapping[str, Any], /, **options: Any) -> str:
        raise UnavailableError("store")

    async def retrieve_checkpoint(self, id: str, /) -> StoredAgentCheckpoint | None:
        raise UnavailableError("retrieve")

    async def list_checkpoints(self, **options: Any) -> Listing[AgentCheckpointListItem]:
        raise UnavailableError("list")


class Plain:
    """A provider as the ancestor has it: it lists everything, in a plain list."""

    def __init__(self) -> None:
        self.kept: list[StoredAgentCheckpoint] = []

    async def store_checkpoint(self, checkpoint: Mapping[str, Any]) -> str:
        self.kept.insert(0, StoredAgentCheckpoint(id=str(len(self.kept)), created_at=0, **checkpoint))
        return self.kept[0].id

    async def retrieve_checkpoint(self, id: str) -> StoredAgentCheckpoint | None:
        return next((one for one in self.kept if one.id == id), None)

    async def list_checkpoints(self) -> list[StoredAgentCheckpoint]:
        return self.kept

    async def store_app_checkpoint(self, checkpoint: Mapping[str, Any]) -> str:
        raise UnavailableError("store")

    async def retrieve_latest_app_checkpoint(self) -> StoredAppCheckpoint | None:
        raise UnavailableError("latest")


async def test_a_provider_need_not_know_any_options() -> None:
    service, agent = AgentCheckpointService(), TodoAgent()
    service.set_checkpoint_provider(Plain())
    for name in ("one", "two"):
        await service.save_agent_checkpoint(name, agent)
    assert await named(service) == ["two", "one"]
    assert [item.name for item in await service.list_checkpoints(limit=1)] == ["two"]
    assert "one" in await CheckpointCommands(service).execute("list", agent)
    assert len((await CheckpointRPC(service).call("listCheckpoints"))["checkpoints"]) == 2
    app = AppCheckpointService(CounterApp(), Plain(), project_directory="/w", restore_previous_state=True)
    with pytest.raises(UnavailableError, match="latest"):
        await app.start()


async def test_a_hook_without_a_service_saves_nothing() -> None:
    assert await AutoCheckpoint(None).after_input(TodoAgent(), "hello") is None


async def test_what_the_provider_raises_reaches_the_caller() -> None:
    service, agent = AgentCheckpointService(Broken()), TodoAgent()
    service.attach(agent)
    for name, call in {
        "start": service.start(),
        "store": agent.handle("hello"),
        "retrieve": service.restore_agent_checkpoint("7", agent),
        "list": service.list_checkpoints(),
    }.items():
        with pytest.raises(UnavailableError, match=name):
            await call


async def test_a_storage_of_the_ancestor_is_a_provider(tmp_path: Path) -> None:
    kept = storage({"type": "sqlite", "databasePath": str(tmp_path / "agents.db")})
    assert isinstance(kept, AgentCheckpointStorage)
    service, agent = AgentCheckpointService(kept, max_checkpoints_per_agent=2), TodoAgent()
    await service.start()
    context: list[str] = []
    service.attach(agent, context)
    assert context == [f"Checkpoint provider: SQLite ({tmp_path / 'agents.db'})"]
    for number in range(3):
        await agent.handle(str(number))
    assert await named(service) == ["2", "1"]
    await service.stop()
    with pytest.raises(ConfigurationError, match="call start"):
        await service.list_checkpoints()


# ---- commands


async def test_commands_create_and_restore(p: Persistence) -> None:
    service, agent = AgentCheckpointService(p.checkpoints), TodoAgent()
    commands = CheckpointCommands(service)
    assert await commands.execute("", agent) == "There are no checkpoints"
    assert await commands.execute("history", agent) == "There are no checkpoints"
    agent.todos = ["one"]
    for line in ("create", "create   my  label  ", "create\tx"):
        assert (await commands.execute(line, agent)).startswith("Checkpoint created: ")
    assert await named(service) == ["x", "my  label", "New Checkpoint"]
    agent.todos = []
    (first, *_) = await service.list_checkpoints()
    assert await commands.execute(f"restore {first.id}", agent) == f"Checkpoint {first.id} restored"
    assert agent.todos == ["one"]
    with pytest.raises(InvalidValueError, match="usage: restore <id>"):
        await commands.execute("restore", agent)
    with pytest.raises(NotFoundError, match="Checkpoint 7 not found"):
        await commands.execute("restore 7", agent)
    with pytest.raises(InvalidValueError, match=r"unknown command 'drop'.*create"):
        await commands.execute("drop all", agent)


def checkpoint(agent: str, name: str, at: int) -> dict[str, Any]:
    fields = {"agent_id": agent, "session_id": "app", "agent_type": "coder", "name": name, "created_at": at}
    return {**fields, "state": {"TodoState": {}, "CostTrackingState": {}}}


async def test_lists_are_by_day_and_histories_by_agent() -> None:
    day = 86_400_000
    async with create_persistence(memory_driver()) as p:
        ids = [
            await p.checkpoints.store_checkpoint(checkpoint(*given))
            for given in (
                ("b", "late\x1b[2J\nname", 20_000 * day + 3_600_000),
                ("a", "later", 20_000 * day + 7_200_000),
                ("a", "x" * 200, 20_001 * day),
            )
        ]
        service = AgentCheckpointService(p.checkpoints)
        assert await CheckpointCommands(service).execute("list", TodoAgent()) == (
            "2024-10-05\n"
            f"  00:00:00  coder  {'x' * 79}…  {ids[2]}\n"
            "2024-10-04\n"
            f"  02:00:00  coder  later  {ids[1]}\n"
            f"  01:00:00  coder  late\ufffd[2J name  {ids[0]}"
        )
        slices = "TodoState, CostTrackingState"
        assert await CheckpointCommands(service).execute("history", TodoAgent()) == (
            "a\n"
            f"  2024-10-05 00:00:00  coder  {'x' * 79}…  {ids[2]}: {slices}\n"
            f"  2024-10-04 02:00:00  coder  later  {ids[1]}: {slices}\n"
            "b\n"
            f"  2024-10-04 01:00:00  coder  late\ufffd[2J name  {ids[0]}: {slices}"
        )
        await p.checkpoints.store_checkpoint(checkpoint("c\x1b[2J", "odd", 20_002 * day))
        assert "\x1b" not in await CheckpointCommands(service).execute("history", TodoAgent())
        await p.checkpoints.delete_agent_checkpoints("c\x1b[2J")
        short = await CheckpointCommands(service, limit=1).execute("list", TodoAgent())
        assert short.endswith(f"{ids[2]}\nThere are older ones")


async def test_a_history_names_what_cannot_be_read_beside_the_others() -> None:
    memory = memory_driver()
    async with create_persistence(memory) as p:
        long = {"TodoState": ["x" * 5_000]}
        given = [checkpoint(agent, "step", 0) | {"state": long} for agent in "ab"]
        ids = [await p.checkpoints.store_checkpoint(one) for one in given]
    held = memory._partitions["named/a"].entries
    for key in [key for key in held if key.startswith("piece/")]:
        held[key] = held[key]._replace(value=b"{")
    async with create_persistence(memory) as p:
        commands = CheckpointCommands(AgentCheckpointService(p.checkpoints))
        history = await commands.execute("history", TodoAgent())
        assert f"{ids[0]}: its state cannot be read" in history
        assert f"{ids[1]}: TodoState" in history


async def test_who_chooses_none_changes_nothing(p: Persistence) -> None:
    service, agent = AgentCheckpointService(p.checkpoints), TodoAgent()
    agent.todos = ["one"]
    id = await service.save_agent_checkpoint("one", agent)
    answer: str | None = None

    async def choose(found: Sequence[AgentCheckpointListItem]) -> str | None:
        assert [item.id for item in found] == [id]
        return answer

    commands = CheckpointCommands(service, choose=choose)
    agent.todos = []
    assert await commands.execute("list", agent) == "Nothing was changed"
    assert agent.todos == []
    answer = id
    assert await commands.execute("list", agent) == f"Checkpoint {id} restored"
    assert agent.todos == ["one"]


# ---- other programs


async def test_remote_calls_list_get_and_launch(p: Persistence) -> None:
    service = AgentCheckpointService(p.checkpoints)
    launched: list[tuple[StoredAgentCheckpoint, bool]] = []

    async def launch(found: StoredAgentCheckpoint, headless: bool) -> str:
        launched.append((found, headless))
        return f"agent-{len(launched)}"

    rpc = CheckpointRPC(service, launch=launch)
    for at in range(3):
        await p.checkpoints.store_checkpoint({**checkpoint("a", f"n{at}", at), "previousResponseId": "r"})
    page = await rpc.call("listCheckpoints", {"limit": 2})
    assert [item["name"] for item in page["checkpoints"]] == ["n2", "n1"]
    rest = await rpc.call("listCheckpoints", {"cursor": page["cursor"]})
    assert [item["name"] for item in rest["checkpoints"]] == ["n0"]
    assert rest["cursor"] is None
    id = page["checkpoints"][0]["id"]
    assert await rpc.call("getCheckpoint", {"id": id}) == {
        "status": "success",
        "checkpoint": {
            "id": id,
            "agentId": "a",
            "sessionId": "app",
            "agentType": "coder",
            "name": "n2",
            "createdAt": 2,
            "previousResponseId": "r",
            "state": {"TodoState": {}, "CostTrackingState": {}},
        },
    }
    assert await rpc.call("launchAgentFromCheckpoint", {"checkpointId": id, "headless": True}) == {
        "status": "success",
        "agentId": "agent-1",
    }
    await rpc.call("launchAgentFromCheckpoint", {"checkpointId": id})
    assert [(found.id, headless) for found, headless in launched] == [(id, True), (id, False)]
    missing = {"status": "checkpointNotFound"}
    assert await rpc.call("getCheckpoint", {"id": "7"}) == missing
    assert await rpc.call("launchAgentFromCheckpoint", {"checkpointId": "7"}) == missing


async def test_bad_remote_calls_are_refused_by_name() -> None:
    async with create_persistence(memory_driver()) as p:
        rpc = CheckpointRPC(AgentCheckpointService(p.checkpoints))
        for method, params, message in (
            ("dropAll", {}, "no method 'dropAll'; it has listCheckpoints"),
            ("getCheckpoint", {}, "missing required field `id`"),
            ("getCheckpoint", {"id": 7}, "`str`"),
            ("getCheckpoint", {"id": "7", "deep": True}, "unknown field `deep`"),
            ("launchAgentFromCheckpoint", {"checkpointId": "7", "headless": "no"}, "`bool`"),
            ("listCheckpoints", {"limit": "all"}, "`int | null`"),
            ("listCheckpoints", [1], "`object`"),
            (["listCheckpoints"], {}, "no method"),
        ):
            with pytest.raises(InvalidValueError, match=message):
                await rpc.call(method, params)  # type: ignore[arg-type]
        with pytest.raises(ConfigurationError, match="launch="):
            await rpc.call("launchAgentFromCheckpoint", {"checkpointId": "7"})


async def test_a_stream_tells_of_changes_alone(make_driver: MakeDriver) -> None:
    async with create_persistence(make_driver()) as p:
        rpc = CheckpointRPC(AgentCheckpointService(p.checkpoints), limit=2, interval_seconds=0.01)
        pages = rpc.stream_checkpoints()
        seen = []

        async def changed(*names: str) -> None:
            page = await asyncio.wait_for(anext(pages), 10)
            seen.append(page)
            assert [item["name"] for item in page["checkpoints"]] == list(names)

        await changed()
        first = await p.checkpoints.store_checkpoint(checkpoint("a", "first", 1))
        await changed("first")
        await p.checkpoints.store_checkpoint(checkpoint("a", "second", 2) | {"score": math.nan})
        await changed("second", "first")
        await p.checkpoints.delete_checkpoint(first)
        await changed("second")
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(anext(pages), 0.1)


# ---- applications


class CounterApp:
    """An application that counts."""

    def __init__(self, session_id: str = "run-1", count: int = 0) -> None:
        self._session_id = session_id
        self.count = count

    @property
    def session_id(self) -> str:  # mypy tells if it had to be settable
        return self._session_id

    def generate_checkpoint(self) -> Any:
        return {"count": self.count}

    def restore_state(self, state: Any) -> None:
        self.count = state["count"]


async def test_an_application_goes_on_where_the_last_one_stopped(p: Persistence) -> None:
    app = CounterApp()
    service = AppCheckpointService(app, p.checkpoints, project_directory="/work", hostname="h")
    assert await service.start() is None
    app.count = 7
    assert await service.start() is None  # once is enough
    id = await service.stop()
    assert id is not None
    assert await service.stop() is None

    for place, count in ((("/work", "h"), 7), (("/other", "h"), 0), (("/work", "elsewhere"), 0)):
        again = CounterApp("run-2")
        restoring = AppCheckpointService(
            *(again, p.checkpoints),
            project_directory=place[0],
            hostname=place[1],
            restore_previous_state=True,
        )
        found = await restoring.start()
        assert again.count == count
        assert (found is not None and found.id == id) == bool(count)

    fresh = CounterApp("run-3")
    await AppCheckpointService(fresh, p.checkpoints, project_directory="/work", hostname="h").start()
    assert fresh.count == 0


class LoggedProvider:
    """A provider that tells what it was asked for, in order."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    async def start(self) -> None:
        self.calls.append("start")

    async def stop(self) -> None:
        self.calls.append("stop")

    async def store_app_checkpoint(self, checkpoint: Mapping[str, Any], /) -> str:
        await asyncio.sleep(0)
        self.calls.append("store")
        return "7"

    async def retrieve_latest_app_checkpoint(self, **_: str | None) -> StoredAppCheckpoint | None:
        await asyncio.sleep(0)
        fields = {"id": "7", "session_id": "run-1", "created_at": 0, "hostname": "", "working_directory": ""}
        return StoredAppCheckpoint(**fields, state={})  # type: ignore[arg-type]


async def test_a_relative_project_directory_is_that_of_this_working_folder(
    p: Persistence, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("one", "two"):
        await asyncio.to_thread((tmp_path / name).mkdir)
        await asyncio.to_thread(monkeypatch.chdir, tmp_path / name)
        service = AppCheckpointService(
            CounterApp(), p.checkpoints, project_directory=".", restore_previous_state=True
        )
        assert await service.start() is None
        await service.stop()
    (last, first) = await p.checkpoints.list_app_checkpoints()
    assert [first.working_directory, last.working_directory] == [str(tmp_path / "one"), str(tmp_path / "two")]


async def test_an_application_starts_and_stops_once_whoever_calls() -> None:
    provider = LoggedProvider()
    service = AppCheckpointService(CounterApp(), provider, project_directory="/work")
    await asyncio.gather(service.start(), service.start())
    assert sorted(map(str, await asyncio.gather(service.stop(), service.stop()))) == ["7", "None"]
    assert provider.calls == ["start", "store", "stop"]


async def test_an_application_that_has_not_started_yet_stops_at_once() -> None:
    class Away(LoggedProvider):
        async def start(self) -> None:
            await asyncio.sleep(3600)

    service = AppCheckpointService(CounterApp(), Away(), project_directory="/work")
    starting = asyncio.create_task(service.start())
    await asyncio.sleep(0)
    assert await asyncio.wait_for(service.stop(), 5) is None
    starting.cancel()


async def test_a_provider_is_stopped_again_if_the_application_cannot_be_restored() -> None:
    provider = LoggedProvider()
    service = AppCheckpointService(
        CounterApp(), provider, project_directory="/work", restore_previous_state=True
    )
    with pytest.raises(KeyError, match="count"):
        await service.start()
    assert await service.stop() is None
    assert provider.calls == ["start", "stop"]


async def test_an_application_without_a_provider_is_told_so() -> None:
    service = AppCheckpointService(CounterApp(), project_directory="/work")
    with pytest.raises(ConfigurationError, match="set_checkpoint_provider"):
        await service.start()
    async with create_persistence(memory_driver()) as p:
        service.set_checkpoint_provider(p.checkpoints)
        await service.start()
        id = await service.stop()
        assert id is not None
        found = await p.checkpoints.retrieve_app_checkpoint(id)
        assert found is not None
        assert found.hostname  # the system's


async def test_an_application_on_a_storage_of_the_ancestor_opens_and_closes_it(tmp_path: Path) -> None:
    path = str(tmp_path / "agents.db")
    for run in range(3):
        app = CounterApp(f"run-{run}")
        kept = storage({"type": "sqlite", "databasePath": path})
        service = AppCheckpointService(app, kept, project_directory="/work", restore_previous_state=True)
        await service.start()
        assert app.count == run
        app.count += 1
        await service.stop()
        with pytest.raises(ConfigurationError, match="call start"):
            await kept.list_checkpoints()


async def test_services_that_share_a_storage_close_it_last(tmp_path: Path) -> None:
    kept = storage({"type": "sqlite", "databasePath": str(tmp_path / "agents.db")})
    agents = AgentCheckpointService(kept)
    app = AppCheckpointService(CounterApp(), kept, project_directory="/work")
    await asyncio.gather(agents.start(), app.start())
    await agents.stop()
    assert await app.stop() is not None
    with pytest.raises(ConfigurationError, match="call start"):
        await kept.list_checkpoints()
    await agents.start()
    await kept.store_app_checkpoint(
        {"session_id": "s", "hostname": "h", "working_directory": "/", "state": {}}
    )
    failing = AppCheckpointService(
        CounterApp(), kept, project_directory="/", hostname="h", restore_previous_state=True
    )
    with pytest.raises(KeyError):
        await failing.start()
    await agents.save_agent_checkpoint("still open", TodoAgent())
    await agents.stop()
