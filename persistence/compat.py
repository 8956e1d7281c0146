"""Other spellings: the shapes and names by which the ancestors' callers know these things.

`SQLiteStorage`, `MySQLStorage`, `PostgresStorage`: checkpoints of agents and
applications behind the interface ``AgentCheckpointStorage``, with the method
names of its documentation and those of its code. `storage` makes one of its
configuration. `Checkpointer`: threads of snapshots, where `put` gives an id.

What they hold is what `Persistence.checkpoints` holds; the two can be mixed.
"""

from __future__ import annotations

import asyncio
import importlib
import re
from collections.abc import Callable, Mapping
from math import isfinite, isinf
from types import TracebackType
from typing import Any, ClassVar, Final, Literal, Self, TypeVar

import msgspec

from persistence.checkpoints import (
    DEFAULT_CAP,
    AgentCheckpointListItem,
    AppCheckpointListItem,
    CheckpointMeta,
    Checkpoints,
    StoredAgentCheckpoint,
    StoredAppCheckpoint,
)
from persistence.collection import Listing
from persistence.connect import Persistence, create_persistence
from persistence.driver import Driver
from persistence.errors import ConfigurationError, InvalidValueError, shown
from persistence.ids import lifetime_ms
from persistence.options import is_text, masked_url
from persistence.records import Record

__all__ = [
    "AgentCheckpointStorage",
    "Checkpointer",
    "MySQLConfig",
    "MySQLStorage",
    "PaginatedResult",
    "PostgresConfig",
    "PostgresStorage",
    "ResumableStreamEventStore",
    "SQLiteConfig",
    "SQLiteStorage",
    "StorageConfig",
    "camel_case",
    "migrate_snapshot",
    "record",
    "storage",
    "storage_config",
]

R = TypeVar("R", bound=Record)

_DEFAULT_LIMIT: Final = 50
_CAMEL = re.compile(r"(?<=[a-z0-9])[A-Z]")


# ---- configuration


class _Config(msgspec.Struct, frozen=True, tag_field="type", rename="camel", forbid_unknown_fields=True):
    pass


class SQLiteConfig(_Config, tag="sqlite", frozen=True):
    """A file. `migrations_folder` is accepted and not needed: there is nothing to migrate."""

    database_path: str
    migrations_folder: str | None = None


class _Server(_Config, frozen=True):
    connection_string: str

    def __repr__(self) -> str:
        return f"{type(self).__name__}({masked_url(self.connection_string)!r})"


class MySQLConfig(_Server, tag="mysql", frozen=True):
    """A MySQL or MariaDB server, by its URL."""

    __repr__ = _Server.__repr__


class PostgresConfig(_Server, tag="postgres", frozen=True):
    """A PostgreSQL server, by its URL."""

    __repr__ = _Server.__repr__


StorageConfig = SQLiteConfig | MySQLConfig | PostgresConfig


def storage_config(config: Mapping[str, Any] | StorageConfig) -> StorageConfig:
    """Return a configuration, checked: ``{"type": "sqlite", "databasePath": …}`` and its siblings.

    `type` is ``sqlite``, ``mysql`` or ``postgres``; the latter two take
    `connectionString`. Names may be in snake_case too. Raises `ConfigurationError`.
    """
    if isinstance(config, SQLiteConfig | MySQLConfig | PostgresConfig):
        return config
    if not isinstance(config, Mapping):
        message = f"the storage's configuration must be a mapping, not {type(config).__name__}"
        raise ConfigurationError(message)
    try:
        fields = {camel_case(str(name)): value for name, value in config.items()}
        checked: StorageConfig = msgspec.convert(fields, StorageConfig)
    except (msgspec.ValidationError, UnicodeError) as error:  # the latter: half a surrogate pair
        message = f"the storage's configuration: {error} (`type` is sqlite, mysql or postgres)"
        raise ConfigurationError(message) from None
    return checked


def storage(config: Mapping[str, Any] | StorageConfig) -> AgentCheckpointStorage:
    """Return the storage of a configuration, not started."""
    checked = storage_config(config)
    if isinstance(checked, SQLiteConfig):
        return SQLiteStorage(checked.database_path)
    if isinstance(checked, MySQLConfig):
        return MySQLStorage(checked.connection_string)
    return PostgresStorage(checked.connection_string)


# ---- records


def record(kind: type[R], fields: Mapping[str, Any]) -> R:
    """Return the record of these fields, in the ancestors' spelling or ours: ``record(ImageRecord, {…})``.

    Raises `InvalidValueError` for a field that is missing, mistyped, or there in both spellings.
    """
    if not (isinstance(kind, type) and issubclass(kind, Record)):
        message = f"kind={shown(kind)}: use one of the record types, such as ImageRecord"
        raise InvalidValueError(message)
    if not isinstance(fields, Mapping):
        message = f"{kind.__name__}: the fields must be a mapping, not {type(fields).__name__}"
        raise InvalidValueError(message)
    ours = {camel_case(name): name for name in kind.__struct_fields__ if name not in ("extra", "version")}
    renamed = {ours.get(name, name): value for name, value in fields.items()}
    if len(renamed) < len(fields):
        twice = [name for name in fields if name in ours and ours[name] != name and ours[name] in fields]
        message = f"{kind.__name__}: {', '.join(twice)} is there in two spellings"
        raise InvalidValueError(message)
    return kind.from_mapping(renamed)


# ---- checkpoints of agents and applications


class PaginatedResult(msgspec.Struct, kw_only=True):
    """A page of a listing, by offset."""

    items: list[Any]
    total: int
    has_more: bool
    limit: int
    offset: int


class AgentCheckpointStorage:
    """Checkpoints of agents and applications on one store, which `start` opens.

    Before that every call raises `ConfigurationError`; after it, what `Persistence` says.

    Checkpoints may be given with the fields of either spelling, ``agentId`` or ``agent_id``.
    """

    name: ClassVar[str] = "AgentCheckpointStorage"
    description: ClassVar[str] = "Agent checkpoint storage provider"

    def __init__(self, driver: Driver, display_name: str) -> None:
        self.display_name = display_name
        self._driver = driver
        self._persistence: Persistence | None = None
        self._turn = asyncio.Lock()

    def __repr__(self) -> str:
        return f"<{self.name}: {self.display_name}>"

    async def start(self) -> None:
        """Open the store, and create what is missing. Idempotent.

        Raises what `create_persistence` raises.
        """
        async with self._turn:
            if self._persistence is None:
                self._persistence = await create_persistence(self._driver)

    async def stop(self) -> None:
        """Close the store. Idempotent."""
        async with self._turn:
            opened, self._persistence = self._persistence, None
            if opened is not None:
                await opened.close()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    # as documented

    async def store_checkpoint(
        self, data: Mapping[str, Any], *, max_checkpoints_per_agent: int | None = None
    ) -> str:
        """Store a checkpoint of an agent; return its new id."""
        return await self._checkpoints.store_checkpoint(
            _snake(data), max_checkpoints_per_agent=max_checkpoints_per_agent
        )

    async def retrieve_checkpoint(self, id: str) -> StoredAgentCheckpoint | None:
        """Return a checkpoint of an agent, None if there is none."""
        return await self._checkpoints.retrieve_checkpoint(str(id))

    async def list_checkpoints(self, **filters: Any) -> Listing[AgentCheckpointListItem]:
        """Return the checkpoints of agents without their states, newest first, all or those asked for.

        `filters` are those of `Checkpoints.list_checkpoints`: agent_id, session_id, limit, cursor, …;
        TypeError for any other.
        """
        return await self._checkpoints.list_checkpoints(**filters)

    # as coded

    async def store_agent_checkpoint(self, data: Mapping[str, Any]) -> str:
        """Do what `store_checkpoint` does."""
        return await self.store_checkpoint(data)

    async def retrieve_agent_checkpoint(self, id: str) -> StoredAgentCheckpoint | None:
        """Do what `retrieve_checkpoint` does."""
        return await self.retrieve_checkpoint(id)

    async def list_agent_checkpoints(
        self, options: Mapping[str, Any] | None = None
    ) -> list[AgentCheckpointListItem] | PaginatedResult:
        """Return all checkpoints of agents; with `options`, of the newest version, a page of them.

        `options`: sessionId, agentId, agentType, limit (50), offset, before, after,
        orderBy (createdAt or id), orderDir (ASC or DESC). `InvalidValueError` for any other.
        Times are Unix milliseconds.
        """
        if options is None:
            return await self.list_checkpoints()
        known = ("session_id", "agent_id", "agent_type", "before", "after", "order_by", "order_dir")
        filters, limit, offset = _options(options, known)
        if "order_by" in filters:
            filters["order_by"] = _snake_name(str(filters["order_by"]))
        found = await self._checkpoints.list_checkpoints(**filters)
        return _paginated(found, limit, offset)

    async def store_app_checkpoint(self, data: Mapping[str, Any]) -> str:
        """Store a checkpoint of an application; return its new id."""
        given = _snake(data)
        for later in ("project_directory", "projectDirectory", "workspace_directory", "workspaceDirectory"):
            if later in given and "working_directory" not in given:
                given["working_directory"] = given.pop(later)
        return await self._checkpoints.store_app_checkpoint(given)

    async def retrieve_app_checkpoint(self, id: str) -> StoredAppCheckpoint | None:
        """Return a checkpoint of an application, None if there is none."""
        return await self._checkpoints.retrieve_app_checkpoint(str(id))

    async def list_app_checkpoints(
        self, options: Mapping[str, Any] | None = None
    ) -> list[AppCheckpointListItem] | PaginatedResult:
        """Return all checkpoints of applications; with `options` (sessionId, limit, …), a page of them."""
        if options is None:
            return await self._checkpoints.list_app_checkpoints()
        known = ("session_id", "hostname", "working_directory", "before", "after")
        filters, limit, offset = _options(options, known)
        return _paginated(await self._checkpoints.list_app_checkpoints(**filters), limit, offset)

    async def retrieve_latest_app_checkpoint(
        self, *, hostname: str | None = None, working_directory: str | None = None
    ) -> StoredAppCheckpoint | None:
        """Return the newest checkpoint of any application, or of one host or directory; None if none."""
        return await self._checkpoints.retrieve_latest_app_checkpoint(
            hostname=hostname, working_directory=working_directory
        )

    @property
    def persistence(self) -> Persistence:
        """The opened store, which deletes, prunes and repairs. `ConfigurationError` if not started."""
        if self._persistence is None:
            message = f"{self.name} is not started: call start()"
            raise ConfigurationError(message)
        return self._persistence

    @property
    def _checkpoints(self) -> Checkpoints:
        return self.persistence.checkpoints


class SQLiteStorage(AgentCheckpointStorage):
    """Checkpoints in an SQLite file."""

    name = "SQLiteStorage"
    description = "SQLite storage provider"

    def __init__(self, database_path: str) -> None:
        driver = _module("sqlite").SQLiteDriver(database_path)
        super().__init__(driver, f"SQLite ({database_path})")


class MySQLStorage(AgentCheckpointStorage):
    """Checkpoints on a MySQL or MariaDB server."""

    name = "MySQLStorage"
    description = "MySQL storage provider"

    def __init__(self, connection_string: str) -> None:
        url = _url(connection_string, ("mysql", "mariadb"), "mysql")
        super().__init__(_module("mysql").from_url(url), f"MySQL ({masked_url(connection_string)})")


class PostgresStorage(AgentCheckpointStorage):
    """Checkpoints on a PostgreSQL server."""

    name = "PostgresStorage"
    description = "Postgres storage provider"

    def __init__(self, connection_string: str) -> None:
        url = _url(connection_string, ("postgresql", "postgres"), "postgresql")
        super().__init__(_module("postgresql").from_url(url), f"Postgres ({masked_url(connection_string)})")


# ---- threads of snapshots


def migrate_snapshot(snapshot: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a snapshot of an agent in the present version, 2; one that is of it as it is.

    Raises `InvalidValueError` for a version that is not known.
    """
    version = snapshot.get("version") if isinstance(snapshot, Mapping) else None
    if type(version) is int and version in (1, 2):
        return snapshot if version == 2 else {**snapshot, "version": 2}
    message = f"a snapshot of version {version!r:.80} is not known; use 1 or 2"
    raise InvalidValueError(message)


class Checkpointer:
    """Threads of snapshots: what agents call ``checkpointer``. `now` gives Unix milliseconds.

    `ttl_seconds`: how long a thread stays after its last snapshot.
    The calls raise what those of `Persistence.checkpoints` do.
    """

    def __init__(
        self,
        persistence: Persistence,
        *,
        max_checkpoints_per_thread: float | None = DEFAULT_CAP,
        ttl_seconds: float | None = None,
        now: Callable[[], float] | None = None,
    ) -> None:
        if isinstance(max_checkpoints_per_thread, float) and isinf(max_checkpoints_per_thread):
            max_checkpoints_per_thread = None
        self._clock = persistence._store.clock
        self._checkpoints = persistence.checkpoints
        self._cap = max_checkpoints_per_thread
        self._ttl = None if ttl_seconds is None else lifetime_ms(ttl_seconds, "ttl_seconds")
        self._now = now

    async def put(
        self, thread_id: str, snapshot: Any, *, expected_latest: str | Literal[0] | None = None
    ) -> str:
        """Store a snapshot; return the id of the checkpoint. `expected_latest`: see `Checkpoints.put`."""
        meta = await self._checkpoints.put(
            thread_id,
            snapshot,
            max_checkpoints_per_thread=self._cap,  # type: ignore[arg-type]  # checked there
            expected_latest=expected_latest,
            expires_at=None if self._ttl is None else self._clock() + self._ttl,
            now=self._now,
        )
        return meta.id

    async def get(self, thread_id: str, checkpoint_id: str | None = None) -> Any:
        """Return a snapshot, by default the latest; None if there is none."""
        return await self._checkpoints.get(thread_id, checkpoint_id)

    async def list(
        self,
        thread_id: str,
        options: Mapping[str, Any] | None = None,
        *,
        limit: float | None = None,
    ) -> Listing[CheckpointMeta]:
        """Return what is known of the checkpoints, newest first, at most `limit` (or ``{"limit": …}``)."""
        if options is not None:
            if not isinstance(options, Mapping) or not options.keys() <= {"limit"}:
                message = f"options={options!r:.80}: only a limit can be given"
                raise InvalidValueError(message)
            limit = options.get("limit", limit)
        if isinstance(limit, float):
            limit = int(limit // 1) if isfinite(limit) else 0 if limit < 0 else None
        return await self._checkpoints.list(thread_id, limit=limit)

    async def delete(self, thread_id: str, checkpoint_id: str | None = None) -> None:
        """Delete a thread, or one checkpoint of it; nothing where there is none."""
        await self._checkpoints.delete(thread_id, checkpoint_id)

    async def thread_count(self) -> int:
        """Count the threads."""
        return await self._checkpoints.count_threads()


class ResumableStreamEventStore:
    """Streams of parts that a client can take up again, with the limits of all of them.

    The calls raise what those of `Persistence.streams` do.
    """

    def __init__(
        self,
        persistence: Persistence,
        *,
        max_events_per_stream: int | None = None,
        max_bytes_per_stream: int | None = None,
        ttl_seconds: float | None = None,
    ) -> None:
        self._streams = persistence.streams
        self._limits: dict[str, Any] = {
            "max_events": max_events_per_stream,
            "max_bytes": max_bytes_per_stream,
            "ttl_seconds": ttl_seconds,
        }

    async def append(self, key: str, index: int, part: Any) -> None:
        """Append a part; `index` is how many there are. See `Streams.append` for what is refused."""
        await self._streams.append(key, index, part, **self._limits)

    async def get_parts(self, key: str, from_index: int = 0) -> list[Any]:
        """Return the parts from `from_index` on; `InvalidValueError` if there are fewer than that."""
        return await self._streams.get_parts(key, from_index)

    async def get_session_meta(self, key: str) -> dict[str, Any]:
        """Return ``nextIndex``, ``completed`` and, once there is a part, ``updatedAt`` (Unix ms)."""
        meta = await self._streams.get_meta(key)
        found: dict[str, Any] = {"nextIndex": meta.next_index, "completed": meta.completed}
        return found if meta.updated_at is None else {**found, "updatedAt": meta.updated_at}

    async def acquire_continue_lock(self, key: str) -> str | None:
        """Become the one who continues a stream, for 30 seconds; None if another one is."""
        return await self._streams.acquire_continue_lock(key)

    async def release_continue_lock(self, key: str, token: str) -> None:
        """Give the lock back, if it is still one's own."""
        await self._streams.release_continue_lock(key, token)


# ---- behind them


def _module(driver: str) -> Any:
    return importlib.import_module(f"persistence.drivers.{driver}")


def _url(connection_string: str, schemes: tuple[str, ...], scheme: str) -> str:
    given, colon, rest = connection_string.partition("://") if is_text(connection_string) else ("", "", "")
    if not colon or given.lower() not in schemes:
        message = f"the connection string must be an URL that begins with {schemes[0]}://"
        raise ConfigurationError(message)
    return f"{scheme}://{rest}"


def _snake_name(name: str) -> str:
    return _CAMEL.sub(lambda match: f"_{match[0].lower()}", name)


def camel_case(name: str) -> str:
    """Return a name in the ancestors' spelling."""
    first, *others = name.split("_")
    return first + "".join(map(str.capitalize, others))


_KNOWN: Final = frozenset(
    "agent_id session_id agent_type name state created_at hostname working_directory id".split()
)


def _snake(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a checkpoint in our spelling; one that we do not know keeps its own."""
    if isinstance(data, msgspec.Struct):
        data = msgspec.structs.asdict(data)
    if not isinstance(data, Mapping):
        message = f"a checkpoint must be a mapping, not {type(data).__name__}"
        raise InvalidValueError(message)
    return {
        snake if (snake := _snake_name(str(name))) in _KNOWN else name: value for name, value in data.items()
    }


def _options(options: Mapping[str, Any], known: tuple[str, ...]) -> tuple[dict[str, Any], int, int]:
    if not isinstance(options, Mapping):
        message = f"options must be a mapping, not {type(options).__name__}"
        raise InvalidValueError(message)
    given = {_snake_name(str(name)): value for name, value in options.items() if value is not None}
    unknown = [name for name in given if name not in (*known, "limit", "offset")]
    if unknown:
        message = f"unknown options: {', '.join(unknown)}"
        raise InvalidValueError(message)
    limit, offset = given.pop("limit", _DEFAULT_LIMIT), given.pop("offset", 0)
    if type(limit) is not int or limit < 1 or type(offset) is not int or offset < 0:
        given_page = f"limit={shown(limit)}, offset={shown(offset)}"
        message = f"{given_page}: use whole numbers, limit from 1 and offset from 0 on"
        raise InvalidValueError(message)
    return given, limit, offset


def _paginated(found: list[Any], limit: int, offset: int) -> PaginatedResult:
    end = offset + limit
    return PaginatedResult(
        items=list(found[offset:end]), total=len(found), has_more=end < len(found), limit=limit, offset=offset
    )
