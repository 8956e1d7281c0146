"""Around the checkpoints of agents: when they are made, and how users and other programs ask for them.

A *provider* keeps them: `Persistence.checkpoints`, a storage of
`persistence.compat`, or whatever has the same methods. An *agent* gives a
checkpoint of itself, and takes a state back.

    service = AgentCheckpointService(p.checkpoints)
    service.attach(agent)                                  # from now on after every input
    id = await service.save_agent_checkpoint("before the refactoring", agent)
    await service.restore_agent_checkpoint(id, agent)

What a provider or an agent raises reaches the caller as it is.
"""

from __future__ import annotations

import asyncio
import inspect
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from datetime import UTC
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import Any, ClassVar, Final, Protocol, TypeVar
from weakref import WeakSet

import msgspec

from persistence import codec
from persistence.checkpoints import AgentCheckpointListItem, StoredAgentCheckpoint, StoredAppCheckpoint
from persistence.collection import Listing
from persistence.compat import camel_case
from persistence.errors import ConfigurationError, CorruptRecordError, InvalidValueError, NotFoundError
from persistence.ids import shown_time
from persistence.options import check_seconds

__all__ = [
    "Agent",
    "AgentCheckpointService",
    "App",
    "AppCheckpointProvider",
    "AppCheckpointService",
    "AutoCheckpoint",
    "CheckpointCommands",
    "CheckpointProvider",
    "CheckpointRPC",
    "HookedAgent",
]

P = TypeVar("P")
T = TypeVar("T")

_DEFAULT_LABEL: Final = "New Checkpoint"
_LISTED: Final = 100
_READ_AT_ONCE: Final = 8  # states, which may be large
_NAME_CHARS: Final = 40_000  # six bytes each at the most; all texts of a listing have 256 KiB
_SHOWN_CHARS: Final = 80  # of a name, which may be a whole message

_running: Final[WeakSet[AgentCheckpointService | AppCheckpointService]] = WeakSet()


class CheckpointProvider(Protocol):
    """What keeps the checkpoints of agents. One with `start` and `stop` is started and stopped."""

    async def store_checkpoint(self, checkpoint: Mapping[str, Any], /) -> str:
        """Store a checkpoint; return its new id.

        It takes `max_checkpoints_per_agent` as well if the service was given that.
        """
        ...

    async def retrieve_checkpoint(self, id: str, /) -> StoredAgentCheckpoint | None:
        """Return a checkpoint, None if there is none."""
        ...

    async def list_checkpoints(self) -> Sequence[AgentCheckpointListItem]:
        """Return checkpoints, newest first; one that takes `limit` and `cursor` may give a page of them."""
        ...


class AppCheckpointProvider(Protocol):
    """What keeps the checkpoints of applications."""

    async def store_app_checkpoint(self, checkpoint: Mapping[str, Any], /) -> str:
        """Store a checkpoint; return its new id."""
        ...

    async def retrieve_latest_app_checkpoint(self) -> StoredAppCheckpoint | None:
        """Return the newest checkpoint, None if there is none.

        If it takes `hostname` and `working_directory`, of those.
        """
        ...


class Agent(Protocol):
    """Something that can be saved and restored, by methods that may be coroutine functions."""

    def generate_checkpoint(self) -> Mapping[str, Any] | Awaitable[Mapping[str, Any]]:
        """Return `agent_id`, `session_id`, `agent_type`, `state`, and whatever else is to be kept."""
        ...

    def restore_state(self, state: Any) -> Awaitable[None] | None:
        """Become what the state says."""
        ...


class HookedAgent(Agent, Protocol):
    """An agent that calls the hooks that it was given."""

    def enable_hook(self, hook: AutoCheckpoint) -> None:
        """Call ``await hook.after_input(agent, message)`` after each message that was handled."""
        ...


class App(Protocol):
    """An application that can be saved and restored, by methods that may be coroutine functions."""

    @property
    def session_id(self) -> str:
        """Return the id of the session that it runs in; a plain attribute does as well."""
        ...

    def generate_checkpoint(self) -> Any:
        """Return the state."""
        ...

    def restore_state(self, state: Any) -> Awaitable[None] | None:
        """Become what the state says."""
        ...


class AgentCheckpointService:
    """Saves and restores agents. `max_checkpoints_per_agent`: when there are more, the agent's oldest go."""

    def __init__(
        self, provider: CheckpointProvider | None = None, *, max_checkpoints_per_agent: int | None = None
    ) -> None:
        self._provider = provider
        self._options = (
            {}
            if max_checkpoints_per_agent is None
            else {"max_checkpoints_per_agent": max_checkpoints_per_agent}
        )

    def set_checkpoint_provider(self, provider: CheckpointProvider) -> None:
        """Keep the checkpoints there."""
        self._provider = provider

    @property
    def provider(self) -> CheckpointProvider:
        """Where the checkpoints are kept; `ConfigurationError` if nobody has said."""
        return _given(self._provider)

    async def start(self) -> None:
        """Start the provider, if that is one to be started. `ConfigurationError` if there is none."""
        await _start(self.provider, self)

    run = start  # as some call it

    async def stop(self) -> None:
        """Stop the provider, if that is one to be stopped and no other service uses it.

        Starts are not counted: one stop is enough after two starts.
        """
        await _stop(self.provider, self)

    def attach(self, agent: HookedAgent, creation_context: list[str] | None = None) -> None:
        """Save a checkpoint of `agent` after every message that it has handled.

        `creation_context`: what the agent is told when it is made; where its checkpoints go is added.
        """
        if creation_context is not None:
            provider = self.provider
            shown = getattr(provider, "display_name", type(provider).__name__)
            creation_context.append(f"Checkpoint provider: {shown}")
        agent.enable_hook(AutoCheckpoint(self))

    async def save_agent_checkpoint(self, name: str, agent: Agent) -> str:
        """Store a checkpoint of `agent` as it is now; return its id."""
        checkpoint = {**await _awaited(agent.generate_checkpoint()), "name": name}
        store: Callable[..., Awaitable[str]] = self.provider.store_checkpoint
        return await store(checkpoint, **self._options)

    async def restore_agent_checkpoint(self, id: str, agent: Agent) -> None:
        """Give `agent` the state of a checkpoint. `NotFoundError` if there is none."""
        found = await self.retrieve_agent_checkpoint(id)
        if found is None:
            message = f"Checkpoint {id!s:.200} not found"
            raise NotFoundError(message)
        await _awaited(agent.restore_state(found.state))

    async def retrieve_agent_checkpoint(self, id: str) -> StoredAgentCheckpoint | None:
        """Return a checkpoint, None if there is none."""
        return await self.provider.retrieve_checkpoint(id)

    async def list_checkpoints(
        self, *, limit: int | None = None, cursor: str | None = None
    ) -> Listing[AgentCheckpointListItem]:
        """Return the checkpoints of all agents without their states, newest first, or a page of them."""
        found = await _asked(self.provider.list_checkpoints, limit=limit, cursor=cursor)
        return found if isinstance(found, Listing) else Listing(found[:limit])


class AutoCheckpoint:
    """The hook that saves an agent after each message; its name is the message, 40,000 characters at most."""

    name: ClassVar[str] = "@tokenring-ai/checkpoint/autoCheckpoint"
    display_name: ClassVar[str] = "Checkpoint after every input"

    def __init__(self, service: AgentCheckpointService | None) -> None:
        self._service = service

    async def after_input(self, agent: Agent, message: object) -> str | None:
        """Save a checkpoint; return its id. Without a service nothing is saved."""
        if self._service is None:
            return None
        return await self._service.save_agent_checkpoint(_as_name(message), agent)


class AppCheckpointService:
    """Saves an application when it stops, and restores it when it starts.

    With `restore_previous_state` it begins as the last one did that ran on
    this host in this project. `hostname` is by default the system's.
    """

    def __init__(
        self,
        app: App,
        provider: AppCheckpointProvider | None = None,
        *,
        project_directory: str | Path,
        hostname: str | None = None,
        restore_previous_state: bool = False,
    ) -> None:
        self._app = app
        self._provider = provider
        self._place = {
            "hostname": socket.gethostname() if hostname is None else hostname,
            "working_directory": str(project_directory),
        }
        self._restore = restore_previous_state
        self._started = False
        self._turn = asyncio.Lock()

    def set_checkpoint_provider(self, provider: AppCheckpointProvider) -> None:
        """Keep the checkpoints there."""
        self._provider = provider

    async def start(self) -> StoredAppCheckpoint | None:
        """Restore the application if that is asked for; return the checkpoint that it was restored from."""
        provider = _given(self._provider)
        async with self._turn:
            if self._started:
                return None
            # In a thread: it asks the system for the working folder. "." is another project elsewhere.
            place = await asyncio.to_thread(Path(self._place["working_directory"]).absolute)
            self._place["working_directory"] = str(place)
            await _start(provider, self)
            try:
                found = await self._restored(provider) if self._restore else None
            except BaseException:
                await _stop(provider, self)
                raise
            self._started = True
            return found

    async def _restored(self, provider: AppCheckpointProvider) -> StoredAppCheckpoint | None:
        found = await _asked(provider.retrieve_latest_app_checkpoint, **self._place)
        if found is not None:
            await _awaited(self._app.restore_state(found.state))
        return found

    async def stop(self) -> str | None:
        """Save the application, once; return the id of the checkpoint. None if it was not started."""
        if not self._started:
            return None  # at once, though a start be under way: it may wait for long
        async with self._turn:
            if not self._started:
                return None
            provider = _given(self._provider)
            state = await _awaited(self._app.generate_checkpoint())
            checkpoint = {"session_id": self._app.session_id, "state": state, **self._place}
            id = await provider.store_app_checkpoint(checkpoint)
            self._started = False  # not before: what failed can be called again
            await _stop(provider, self)
            return id


class CheckpointCommands:
    """What a user types: create, restore, list, history. Each gives the text to show.

    `choose` lets the user choose one of the checkpoints that ``list`` found,
    and returns its id, or None if the user would rather not.
    """

    usage: ClassVar[str] = "create [label] | restore <id> | list | history"

    def __init__(
        self,
        service: AgentCheckpointService,
        *,
        choose: Callable[[Sequence[AgentCheckpointListItem]], Awaitable[str | None]] | None = None,
        limit: int = _LISTED,
    ) -> None:
        self._service = service
        self._choose = choose
        self._limit = limit

    async def execute(self, line: str, agent: Agent) -> str:
        """Do what `line` says, by default ``list``. `InvalidValueError` tells how it should be."""
        if not isinstance(line, str):
            message = f"a command must be a text, not {type(line).__name__}"
            raise InvalidValueError(message)
        command, rest = (*line.strip().split(maxsplit=1), "", "")[:2]
        if command == "create":
            id = await self._service.save_agent_checkpoint(rest or _DEFAULT_LABEL, agent)
            return f"Checkpoint created: {id}"
        if command == "restore":
            if not rest:
                message = "usage: restore <id>; list shows the ids"
                raise InvalidValueError(message)
            return await self._restore(rest, agent)
        if command not in ("", "list", "history"):
            message = f"unknown command {command!r:.80}; usage: {self.usage}"
            raise InvalidValueError(message)
        found = await self._service.list_checkpoints(limit=self._limit)
        if not found:
            return "There are no checkpoints"
        return await (self._history(found) if command == "history" else self._list(found, agent))

    async def _restore(self, id: str, agent: Agent) -> str:
        await self._service.restore_agent_checkpoint(id, agent)
        return f"Checkpoint {id} restored"

    async def _list(self, found: Listing[AgentCheckpointListItem], agent: Agent) -> str:
        if self._choose is None:
            days = groupby(found, lambda item: _time(item)[:10])
            groups = ((day, [_line(item, _time(item)[11:]) for item in items]) for day, items in days)
            return _outline(groups, found.cursor)
        id = await self._choose(found)
        return "Nothing was changed" if id is None else await self._restore(id, agent)

    async def _history(self, found: Listing[AgentCheckpointListItem]) -> str:
        by_agent = attrgetter("agent_id")
        agents = groupby(sorted(found, key=by_agent), by_agent)  # stable: the newest stays first
        lines: dict[str, str] = {}
        for first in range(0, len(found), _READ_AT_ONCE):
            part = found[first : first + _READ_AT_ONCE]
            shown = await asyncio.gather(*(self._slices(item.id) for item in part))
            for item, slices in zip(part, shown, strict=True):
                lines[item.id] = _line(item, _time(item)) + (slices and f": {slices}")
        groups = ((agent, [lines[item.id] for item in items]) for agent, items in agents)
        return _outline(groups, found.cursor)

    async def _slices(self, id: str) -> str:
        try:
            found = await self._service.retrieve_agent_checkpoint(id)
        except CorruptRecordError:  # it must not hide the others
            return "its state cannot be read"
        state = None if found is None else found.state
        return ", ".join(_shown(str(name)) for name in state) if isinstance(state, Mapping) else ""


class _Params(msgspec.Struct, rename="camel", forbid_unknown_fields=True):
    pass


class _Page(_Params):
    limit: int | None = None
    cursor: str | None = None


class _Wanted(_Params):
    id: str


class _Launch(_Params):
    checkpoint_id: str
    headless: bool = False


class CheckpointRPC:
    """The same for other programs, under ``/rpc/checkpoint``: mappings in, mappings out, named as in JSON.

    `launch` makes an agent of a checkpoint, headless or not, and returns the
    agent's id. `limit`: how many checkpoints a listing has if it is not told.
    `interval_seconds`: how often a stream looks.
    """

    path: ClassVar[str] = "/rpc/checkpoint"

    def __init__(
        self,
        service: AgentCheckpointService,
        *,
        launch: Callable[[StoredAgentCheckpoint, bool], Awaitable[str]] | None = None,
        limit: int = _LISTED,
        interval_seconds: float = 5.0,
    ) -> None:
        self._service = service
        self._launch = launch
        check_seconds("interval_seconds", interval_seconds)
        self._limit = limit
        self._interval = interval_seconds

    async def call(self, method: str, params: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Call ``listCheckpoints``, ``getCheckpoint`` or ``launchAgentFromCheckpoint``.

        Raises `InvalidValueError` for any other, and for parameters that are missing or not known.
        """
        calls: dict[str, tuple[type[_Params], Callable[..., Awaitable[dict[str, Any]]]]] = {
            "listCheckpoints": (_Page, self.list_checkpoints),
            "getCheckpoint": (_Wanted, self.get_checkpoint),
            "launchAgentFromCheckpoint": (_Launch, self.launch_agent_from_checkpoint),
        }
        if not isinstance(method, str) or method not in calls:
            message = f"{self.path} has no method {method!r:.80}; it has {', '.join(calls)}"
            raise InvalidValueError(message)
        takes, call = calls[method]
        try:
            asked = msgspec.convert({} if params is None else params, takes)
        except (msgspec.ValidationError, UnicodeError) as error:  # the latter: half a surrogate pair
            message = f"{self.path} {method}: {error}"
            raise InvalidValueError(message) from None
        return await call(**msgspec.structs.asdict(asked))

    async def list_checkpoints(
        self, *, limit: int | None = None, cursor: str | None = None
    ) -> dict[str, Any]:
        """Return a page of checkpoints without their states, newest first; `cursor` asks for the next."""
        found = await self._service.list_checkpoints(
            limit=self._limit if limit is None else limit, cursor=cursor
        )
        return {"checkpoints": [_camel_fields(item) for item in found], "cursor": found.cursor}

    async def stream_checkpoints(self) -> AsyncIterator[dict[str, Any]]:
        """Yield a page of the newest checkpoints, now and whenever it has changed, until it is closed.

        An error of the provider ends it: call it again.
        """
        shown = None
        while True:
            listed = await self.list_checkpoints()
            encoded = codec.encode(listed)  # a NaN in it is not equal to itself
            if encoded != shown:
                yield listed
                shown = encoded
            await asyncio.sleep(self._interval)

    async def get_checkpoint(self, id: str) -> dict[str, Any]:
        """Return a checkpoint; `status` is ``success`` or ``checkpointNotFound``."""
        found = await self._service.retrieve_agent_checkpoint(id)
        if found is None:
            return {"status": "checkpointNotFound"}
        return {"status": "success", "checkpoint": _camel_fields(found)}

    async def launch_agent_from_checkpoint(
        self, checkpoint_id: str, *, headless: bool = False
    ) -> dict[str, Any]:
        """Make an agent of a checkpoint; `status` is ``success`` or ``checkpointNotFound``."""
        if self._launch is None:
            message = "agents cannot be launched here: give CheckpointRPC launch="
            raise ConfigurationError(message)
        found = await self._service.retrieve_agent_checkpoint(checkpoint_id)
        if found is None:
            return {"status": "checkpointNotFound"}
        return {"status": "success", "agentId": await self._launch(found, headless)}


async def _asked(method: Callable[..., Awaitable[T]], **options: Any) -> T:
    """Call a provider's method with those of the options that it takes."""
    takes = inspect.signature(method).parameters.values()
    if not any(one.kind is inspect.Parameter.VAR_KEYWORD for one in takes):
        options = {one.name: options[one.name] for one in takes if one.name in options}
    return await method(**options)


def _given(provider: P | None) -> P:
    if provider is None:
        message = "there is no checkpoint provider: call set_checkpoint_provider()"
        raise ConfigurationError(message)
    return provider


async def _start(provider: object, service: AgentCheckpointService | AppCheckpointService) -> None:
    _running.add(service)
    try:
        await _call_if_there(provider, "start")
    except BaseException:
        _running.discard(service)
        raise


async def _stop(provider: object, service: AgentCheckpointService | AppCheckpointService) -> None:
    _running.discard(service)
    if not any(other._provider is provider for other in _running):
        await _call_if_there(provider, "stop")


async def _call_if_there(provider: object, method: str) -> None:
    call = getattr(provider, method, None)
    if call is not None:
        await _awaited(call())


async def _awaited(value: T | Awaitable[T]) -> T:
    return await value if inspect.isawaitable(value) else value


def _outline(groups: Iterable[tuple[str, Iterable[str]]], cursor: str | None) -> str:
    lines = [line for title, under in groups for line in (_shown(title), *(f"  {line}" for line in under))]
    return "\n".join(lines if cursor is None else [*lines, "There are older ones"])


def _line(item: AgentCheckpointListItem, time: str) -> str:
    return f"{time}  {_shown(item.agent_type)}  {_shown(item.name)}  {_printable(item.id)}"


def _shown(text: str) -> str:
    """Return a text that may hold anything as a part of one line."""
    text = " ".join(text.split())
    return _printable(text if len(text) <= _SHOWN_CHARS else f"{text[: _SHOWN_CHARS - 1]}…")


def _printable(text: str) -> str:
    return "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in text)


def _time(item: AgentCheckpointListItem) -> str:
    return shown_time(item.created_at, UTC)


def _camel_fields(item: AgentCheckpointListItem) -> dict[str, Any]:
    fields = msgspec.structs.asdict(item)
    extra = fields.pop("extra")
    return {**extra, **{camel_case(name): value for name, value in fields.items()}}


def _as_name(message: object) -> str:
    """Return a message, which may be anything, as a name that can be stored."""
    return str(message)[:_NAME_CHARS].encode(errors="replace").decode()
