"""Checkpoints: states of agents and applications, kept step by step.

Three views. A *thread* of checkpoints, by its id: `put`, `get`, `list`. The
*named* checkpoints of an agent: `store_checkpoint`, `retrieve_checkpoint`,
`list_checkpoints`. Those of an application: `store_app_checkpoint` and its
siblings. They lie apart, and all cost what changed since the checkpoint before
(`persistence.pieces`, `persistence.threads`).
"""

from __future__ import annotations

import asyncio
import builtins
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from datetime import datetime, timedelta
from decimal import Decimal
from typing import Any, Final, Literal

import msgspec

from persistence import codec
from persistence.calls import Repository, public, public_change
from persistence.collection import Listing, Place, check_cursor, next_page
from persistence.driver import Key
from persistence.errors import CorruptRecordError, InvalidValueError, NotFoundError, shown
from persistence.ids import as_ms
from persistence.keys import after as after_key
from persistence.keys import encode_id, newest_first
from persistence.pieces import cut
from persistence.store import Store
from persistence.thread_reader import CHECKPOINT, HEAD, CheckpointBody, Found, HeadBody
from persistence.threads import New, Threads

__all__ = [
    "AgentCheckpointListItem",
    "AppCheckpointListItem",
    "AppSessionCheckpoint",
    "Change",
    "Checkpoint",
    "CheckpointMeta",
    "Checkpoints",
    "NamedAgentCheckpoint",
    "Pruned",
    "StoredAgentCheckpoint",
    "StoredAppCheckpoint",
    "ThreadMeta",
]

DEFAULT_CAP: Final = 100

_METADATA_BYTES = 64 << 10
_FIELDS_BYTES = 256 << 10
_INT64 = 1 << 63
_PAGE = 200
_UUID_CHARS = 36


class CheckpointMeta(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of a checkpoint, without its state."""

    id: str
    thread_id: str
    created_at: int = 0
    """Unix milliseconds."""
    version: Any = None
    """The member ``version`` of the state, or what was given as such."""
    size_bytes: int = 0
    """Of the state, as JSON."""
    stored_bytes: int = 0
    """That this checkpoint took: keys and values of what it has and the one before had not."""
    parent_id: str | None = None
    seq: int = 0
    """Place in the order of the thread's commits, from 1; never used twice."""
    labels: tuple[str, ...] = ()
    run_id: str | None = None
    metadata: dict[str, Any] = msgspec.field(default_factory=dict)
    corrupt: str | None = None
    """Why it cannot be read; then only its ids are known."""


class Checkpoint(msgspec.Struct, frozen=True):
    """A checkpoint with its state."""

    meta: CheckpointMeta
    state: Any


class ThreadMeta(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of a thread. Times are Unix milliseconds."""

    thread_id: str
    created_at: int
    updated_at: int
    checkpoints: int
    latest_id: str
    expires_at: int | None = None


class Pruned(msgspec.Struct, frozen=True, kw_only=True):
    """What `prune` removed, or with ``dry_run`` would remove. False: nothing."""

    threads: int = 0
    """Threads of which something was removed."""
    checkpoints: int = 0
    pieces: int = 0
    """Entries that held parts of their states, and that no other checkpoint needs."""

    def __bool__(self) -> bool:
        return self.checkpoints > 0


class Change(msgspec.Struct, frozen=True):
    """A place where two states differ: keys and indexes that lead to it, and what is there in each."""

    path: tuple[Any, ...]
    kind: Literal["added", "removed", "changed"]
    before: Any = None
    after: Any = None


class NamedAgentCheckpoint(msgspec.Struct, kw_only=True):
    """A checkpoint of an agent to store. Without `created_at` (Unix milliseconds) it is of now."""

    agent_id: str
    session_id: str
    agent_type: str
    name: str
    state: Any
    created_at: int | None = None
    extra: dict[str, Any] = msgspec.field(default_factory=dict)


class AgentCheckpointListItem(msgspec.Struct, kw_only=True):
    """A named checkpoint without its state. `created_at` is in Unix milliseconds.

    `extra` has the fields that this library does not know.
    """

    id: str
    agent_id: str
    session_id: str
    agent_type: str
    name: str
    created_at: int
    extra: dict[str, Any] = msgspec.field(default_factory=dict)


class StoredAgentCheckpoint(AgentCheckpointListItem):
    """A named checkpoint."""

    state: Any


class AppSessionCheckpoint(msgspec.Struct, kw_only=True):
    """A checkpoint of an application to store. Without `created_at` (Unix milliseconds) it is of now."""

    session_id: str
    hostname: str
    working_directory: str
    state: Any
    created_at: int | None = None
    extra: dict[str, Any] = msgspec.field(default_factory=dict)


class AppCheckpointListItem(msgspec.Struct, kw_only=True):
    """A checkpoint of an application without its state. `created_at` is in Unix milliseconds."""

    id: str
    session_id: str
    hostname: str
    working_directory: str
    created_at: int
    extra: dict[str, Any] = msgspec.field(default_factory=dict)


class StoredAppCheckpoint(AppCheckpointListItem):
    """A checkpoint of an application."""

    state: Any


class Checkpoints(Repository):
    """Threads of checkpoints, named checkpoints of agents, and those of applications.

    What all calls have in common, `Persistence` says.
    """

    def __init__(self, store: Store) -> None:
        super().__init__(store)
        self.threads = Threads(store, "thread", "index/threads")
        self.agents = Threads(store, "named", "index/named", _agent_places)
        self.apps = Threads(store, "app", "index/apps", _app_places)
        self._kinds = {
            "thread": self.threads,
            "named": self.agents,
            "app": self.apps,
            "index/threads": self.threads,
            "index/named": self.agents,
            "index/named-checkpoints": self.agents,
            "index/named-checkpoints-by-agent": self.agents,
            "index/named-checkpoints-by-session": self.agents,
            "index/apps": self.apps,
            "index/app-checkpoints": self.apps,
            "index/app-checkpoints-by-session": self.apps,
            "index/app-checkpoints-by-host": self.apps,
        }

    def _kind_of(self, partition: str) -> Threads | None:
        """Return the threads that a partition belongs to, as one of them or as a listing of theirs."""
        return self._kinds.get(partition) or self._kinds.get(partition.rpartition("/")[0])

    # ---- a thread

    @public
    async def put(
        self,
        thread_id: str,
        snapshot: Any,
        *,
        parent_id: str | None = None,
        expected_latest: str | Literal[0] | None = None,
        labels: Iterable[str] = (),
        run_id: str | None = None,
        metadata: Mapping[str, Any] | None = None,
        version: int | str | None = None,
        max_checkpoints_per_thread: int | None = DEFAULT_CAP,
        expires_at: int | datetime | None = None,
        now: float | datetime | Callable[[], float] | None = None,
        timeout: float | None = None,
    ) -> CheckpointMeta:
        """Store a state as the latest checkpoint of a thread; return what is known of it.

        One round trip for whoever put or read the latest before, two or three for any other.
        The state may be any value that can be stored, up to 100 MB; it is
        taken as it is now, before anything is awaited.

        `parent_id`: the checkpoint that this one continues, by default the
        latest; an older one begins a branch. `NotFoundError` if it is not there.
        `expected_latest`: `ConflictError` if the latest is another one (0:
        there must be none), so that of two who resume one checkpoint only the
        first goes on. `max_checkpoints_per_thread`: when there are more, the
        oldest go, in the same Write; None keeps all. `expires_at`: when the
        whole thread goes; it stays as it was if none is given. `now`: the
        checkpoint's time, by default the store's clock. Both are in
        milliseconds if they are numbers.

        `labels`, `run_id` and `metadata` (up to 64 KiB of JSON) are yours: `list` and
        `prune` choose by them. `version`: by default that in the state.
        """
        encode_id(thread_id, "thread_id")
        new = New(
            cut=cut(snapshot, self.threads.memo(thread_id)),
            at=_time(now() if callable(now) else now, "now"),
            metadata=_metadata(metadata),
            parent=_text_or_none(parent_id, "parent_id"),
            expected_latest=_checked_latest(expected_latest),
            labels=_labels(labels),
            run=_text_or_none(run_id, "run_id"),
            version=_version(snapshot) if version is None else _checked_version(version),
            cap=_cap(max_checkpoints_per_thread, "max_checkpoints_per_thread"),
            expires_at=_time(expires_at, "expires_at"),
        )
        return self._meta(thread_id, await self.threads.put(thread_id, new))

    @public
    async def get(
        self, thread_id: str, checkpoint_id: str | None = None, *, timeout: float | None = None
    ) -> Any:
        """Return the state of a checkpoint, by default the latest; None if there is none.

        One or two round trips. Where None may be a state, use `read`.
        `CorruptRecordError` if it cannot be read.
        """
        found = await self.threads.read(thread_id, checkpoint_id)
        return None if found is None else found[1]

    @public
    async def read(
        self, thread_id: str, checkpoint_id: str | None = None, *, timeout: float | None = None
    ) -> Checkpoint | None:
        """Return a checkpoint with its state, by default the latest; None if there is none.

        `CorruptRecordError` if it cannot be read.
        """
        found = await self.threads.read(thread_id, checkpoint_id)
        return None if found is None else Checkpoint(self._meta(thread_id, found[0]), found[1])

    @public
    async def get_meta(
        self, thread_id: str, checkpoint_id: str | None = None, *, timeout: float | None = None
    ) -> CheckpointMeta | None:
        """Return what is known of a checkpoint, by default the latest; None if there is none."""
        body = await self.threads.find(thread_id, checkpoint_id)
        return None if body is None else self._meta(thread_id, body)

    @public
    async def list(
        self,
        thread_id: str,
        limit: int | None = None,
        before: str | None = None,
        after: str | None = None,
        *,
        metadata: Mapping[str, Any] | None = None,
        label: str | None = None,
        run_id: str | None = None,
        timeout: float | None = None,
    ) -> Listing[CheckpointMeta]:
        """Return the checkpoints of a thread, newest first, without their states.

        `before`, `after`: only those older or newer than a checkpoint (which
        need not be there any more). `metadata`: only those that have these
        members, equal and of the same type; `label`, `run_id`: only those that have it.
        `limit` below 1 gives none. The listing's `cursor` is the `before` of the next
        page. One that cannot be read says so in `corrupt`.
        """
        _check_limit(limit)
        if limit is not None and limit < 1:
            return Listing()
        match = None
        _metadata(metadata)
        _check_texts(before=before, after=after, label=label, run_id=run_id)
        if metadata or label is not None or run_id is not None:
            wanted = dict(metadata or {})

            def match(body: CheckpointBody) -> bool:
                return self._matches(body, wanted, label, run_id)

        found, more = await self.threads.page(
            thread_id, limit=limit, before=before, after_id=after, match=match
        )
        return Listing(
            (self._found_meta(thread_id, one) for one in found), cursor=found[-1].id if more else None
        )

    @public_change
    async def delete(
        self, thread_id: str, checkpoint_id: str | None = None, *, timeout: float | None = None
    ) -> int:
        """Delete a thread, or one checkpoint of it; return how many checkpoints that removed.

        A thread goes at once, in one Write. Whoever still holds a checkpoint
        of it and names it as parent or as the expected latest is refused; a
        plain `put` begins the thread anew.
        """
        if checkpoint_id is None:
            return await self.threads.delete(thread_id)
        encode_id(checkpoint_id, "checkpoint_id")
        removed, _ = await self.threads.remove(thread_id, lambda found: [checkpoint_id])
        return removed

    # ---- branches, copies, labels

    @public_change
    async def fork(
        self,
        thread_id: str,
        checkpoint_id: str | None = None,
        *,
        new_thread_id: str | None = None,
        labels: Iterable[str] = (),
        run_id: str | None = None,
        metadata: Mapping[str, Any] | None = None,
        max_checkpoints_per_thread: int | None = None,
        now: float | datetime | Callable[[], float] | None = None,
        timeout: float | None = None,
    ) -> CheckpointMeta:
        """Begin a branch at a checkpoint, by default the latest: put a child of it with the same state.

        The child refers to the data that are there: a few hundred bytes,
        whatever the size of the state. Go on with `put`, whose parent is the
        latest checkpoint, or with ``parent_id=`` on any branch. With
        `new_thread_id` the branch is a thread of its own, which shares nothing
        with its source: that costs a copy of this one state. Nothing goes for
        it, unless `max_checkpoints_per_thread` says so. `labels`, `run_id`, `metadata` and
        `now` are those of the child, as in `put`.
        Raises `NotFoundError` if there is no such checkpoint, `ConflictError`
        if `new_thread_id` is in use.
        """
        _check_texts(new_thread_id=new_thread_id)
        source = await self.threads.find(thread_id, checkpoint_id)
        if source is None:
            raise self._not_found(thread_id, checkpoint_id)
        new = New(
            cut=cut(None),
            at=_time(now() if callable(now) else now, "now"),
            metadata=_metadata(metadata),
            labels=_labels(labels),
            run=_text_or_none(run_id, "run_id"),
            cap=_cap(max_checkpoints_per_thread, "max_checkpoints_per_thread"),
        )
        if new_thread_id is not None:
            made = await self.threads.copy(thread_id, new_thread_id, source.id, new)
            return self._meta(new_thread_id, made[-1])
        return self._meta(thread_id, await self.threads.fork(thread_id, new, source.id))

    @public_change
    async def copy_thread(
        self,
        thread_id: str,
        new_thread_id: str,
        *,
        checkpoint_id: str | None = None,
        timeout: float | None = None,
    ) -> int:
        """Copy a thread, or one checkpoint of it, into a thread that was not used before.

        Returns how many checkpoints. They keep their ids, times and parents.
        The two share nothing. Raises `NotFoundError`, and `ConflictError` if
        `new_thread_id` was used before or is used meanwhile.
        """
        encode_id(new_thread_id, "new_thread_id")
        _check_texts(checkpoint_id=checkpoint_id)
        return len(await self.threads.copy(thread_id, new_thread_id, checkpoint_id))

    @public
    async def set_labels(
        self, thread_id: str, checkpoint_id: str, labels: Iterable[str], *, timeout: float | None = None
    ) -> CheckpointMeta:
        """Replace the labels of a checkpoint; return what is known of it. Raises `NotFoundError`."""
        body = await self.threads.relabel(thread_id, checkpoint_id, _labels(labels))
        return self._meta(thread_id, body)

    @public
    async def branches(
        self, thread_id: str, *, timeout: float | None = None
    ) -> builtins.list[CheckpointMeta]:
        """Return the checkpoints that none continues, one for each branch, newest first."""
        found, _ = await self.threads.page(thread_id, limit=None)
        parents = {one.body.parent for one in found if one.body is not None}
        return [self._found_meta(thread_id, one) for one in found if one.id not in parents]

    @public
    async def diff(
        self, thread_id: str, a: str, b: str, *, timeout: float | None = None
    ) -> builtins.list[Change]:
        """Return where the state of checkpoint `b` differs from that of `a`, outermost first.

        Dicts are compared by key, lists by index. Raises `NotFoundError`.
        """
        _check_texts(a=a, b=b)
        before, now = await asyncio.gather(self.threads.read(thread_id, a), self.threads.read(thread_id, b))
        if before is None or now is None:
            raise self._not_found(thread_id, a if before is None else b)
        changes: builtins.list[Change] = []
        _compare(before[1], now[1], (), changes)
        return changes

    # ---- all threads

    @public
    async def list_threads(
        self, *, limit: int | None = None, cursor: str | None = None, timeout: float | None = None
    ) -> Listing[ThreadMeta]:
        """Return the threads, those begun last first."""
        _check_limit(limit)
        check_cursor(cursor)
        if limit is not None and limit < 1:
            return Listing(cursor=cursor)
        heads, more = await self.threads.threads(limit=limit, cursor=cursor)
        return Listing((_thread_meta(head) for head in heads), cursor=more)

    @public
    async def count_threads(self, *, timeout: float | None = None) -> int:
        """Count the threads. Reads the head of each."""
        counted = 0
        async for _ in self._heads(self.threads):
            counted += 1
        return counted

    @public
    async def get_thread(self, thread_id: str, *, timeout: float | None = None) -> ThreadMeta | None:
        """Return what is known of a thread, None if there is none."""
        head = await self.threads.live_head(thread_id)
        return None if head is None else _thread_meta(head)

    @public_change
    async def set_expiry(
        self, thread_id: str, expires_at: int | datetime | None, *, timeout: float | None = None
    ) -> None:
        """Say when a thread is to go (in milliseconds if a number), or with None that it stays.

        From then on it is not there for anybody. Its space is freed by
        `delete_expired` and by `repair`. Raises `NotFoundError`.
        """
        if not await self.threads.expire(thread_id, _time(expires_at, "expires_at")):
            raise self._not_found(thread_id)

    @public_change
    async def delete_expired(self, *, timeout: float | None = None) -> int:
        """Free the space of the threads whose time has come; return how many checkpoints they had."""
        return await self.threads.delete_all_expired()

    @public_change
    async def prune(
        self,
        thread_id: str | None = None,
        *,
        keep_last: int | None = None,
        older_than: int | datetime | timedelta | None = None,
        label: str | None = None,
        run_id: str | None = None,
        dry_run: bool = False,
        timeout: float | None = None,
    ) -> Pruned:
        """Remove checkpoints of a thread, or of all threads; return what was removed.

        Those go that meet every condition given, at least one: not among the
        `keep_last` latest of their thread; created before `older_than`, a time
        (in milliseconds if a number) or an age; labelled `label`; of the run
        `run_id`. `dry_run` only counts. Interrupted, it has removed some, each whole; call it again.
        """
        return await self._prune(
            self.threads, thread_id, keep_last, older_than, label, run_id, dry_run=dry_run
        )

    # ---- named checkpoints of agents

    @public
    async def store_checkpoint(
        self,
        checkpoint: Mapping[str, Any] | NamedAgentCheckpoint | StoredAgentCheckpoint,
        *,
        expected_latest: str | Literal[0] | None = None,
        max_checkpoints_per_agent: int | None = None,
        timeout: float | None = None,
    ) -> str:
        """Store a checkpoint of an agent; return its new id. An `id` in it is ignored.

        Its fields are `agent_id`, `session_id`, `agent_type`, `name`, `state`
        and `created_at` (now, if it has none); any other comes back in `extra`.
        `expected_latest`: `ConflictError` if the agent's latest has another id (0: if it has any).
        `max_checkpoints_per_agent`: when there are more, the oldest go; None keeps all.
        """
        fields = _fields(checkpoint, ("agent_id", "session_id", "agent_type", "name"))
        agent_id = fields.pop("agent_id")
        cap = _cap(max_checkpoints_per_agent, "max_checkpoints_per_agent")
        body = await self._store_named(self.agents, agent_id, checkpoint, fields, expected_latest, cap)
        return f"{body.id}:{agent_id}"

    @public
    async def retrieve_checkpoint(
        self, id: str, *, timeout: float | None = None
    ) -> StoredAgentCheckpoint | None:
        """Return a checkpoint of an agent, None if there is none with this id.

        `CorruptRecordError` if it cannot be read.
        """
        found = await self._read_named(self.agents, id)
        if found is None:
            return None
        thread_id, body, state = found
        return StoredAgentCheckpoint(**self._agent_fields(thread_id, body), state=state)

    @public
    async def list_checkpoints(
        self,
        *,
        agent_id: str | None = None,
        session_id: str | None = None,
        agent_type: str | None = None,
        name: str | None = None,
        before: int | None = None,
        after: int | None = None,
        limit: int | None = None,
        cursor: str | None = None,
        order_by: Literal["created_at", "id"] = "created_at",
        order_dir: Literal["ASC", "DESC"] = "DESC",
        timeout: float | None = None,
    ) -> Listing[AgentCheckpointListItem]:
        """Return checkpoints of agents without their states, by default the newest first, ties by id.

        `agent_id`, `session_id`, `agent_type`, `name`: only those that have it.
        `before`, `after`: created strictly before or after a time (ms).
        `order_by` and `order_dir` choose another order. By id, which is the order
        in which they were stored, all that match are read for each page.
        """
        wanted = {"session_id": session_id, "agent_type": agent_type, "name": name}
        _check_texts(agent_id=agent_id, **wanted)
        if agent_id is not None:
            place = _by("named", "agent", agent_id)
        elif session_id is not None:
            place = _by("named", "session", session_id)
        else:
            place = Place("index/named-checkpoints")
        page = await self._named_page(
            self.agents, place, agent_id, wanted, before, after, limit, cursor, order_by, order_dir
        )
        items = (AgentCheckpointListItem(**self._agent_fields(id, body)) for id, body in page)
        return Listing(items, cursor=page.cursor)

    @public_change
    async def delete_checkpoint(self, id: str, *, timeout: float | None = None) -> bool:
        """Delete a checkpoint of an agent; tell whether there was one."""
        return await self._delete_named(self.agents, id)

    @public_change
    async def delete_agent_checkpoints(self, agent_id: str, *, timeout: float | None = None) -> int:
        """Delete all checkpoints of an agent; return how many."""
        encode_id(agent_id, "agent_id")
        return await self.agents.delete(agent_id)

    @public_change
    async def prune_checkpoints(
        self,
        agent_id: str | None = None,
        *,
        keep_last: int | None = None,
        older_than: int | datetime | timedelta | None = None,
        dry_run: bool = False,
        timeout: float | None = None,
    ) -> Pruned:
        """Do what `prune` does, for the checkpoints of one agent, or of all agents.

        `keep_last` counts for each agent.
        """
        _check_texts(agent_id=agent_id)
        return await self._prune(self.agents, agent_id, keep_last, older_than, dry_run=dry_run)

    # ---- checkpoints of applications

    @public
    async def store_app_checkpoint(
        self,
        checkpoint: Mapping[str, Any] | AppSessionCheckpoint | StoredAppCheckpoint,
        *,
        expected_latest: str | Literal[0] | None = None,
        max_checkpoints_per_session: int | None = None,
        timeout: float | None = None,
    ) -> str:
        """Store a checkpoint of an application; return its new id.

        Its fields are `session_id`, `hostname`, `working_directory`, `state`
        and `created_at` (now, if it has none); any other comes back in `extra`.
        `expected_latest`: `ConflictError` if the session's latest has another id (0: if it has any).
        `max_checkpoints_per_session`: when there are more, the oldest go; None keeps all.
        """
        fields = _fields(checkpoint, ("session_id", "hostname", "working_directory"))
        session_id = fields.pop("session_id")
        cap = _cap(max_checkpoints_per_session, "max_checkpoints_per_session")
        body = await self._store_named(self.apps, session_id, checkpoint, fields, expected_latest, cap)
        return f"{body.id}:{session_id}"

    @public
    async def retrieve_app_checkpoint(
        self, id: str, *, timeout: float | None = None
    ) -> StoredAppCheckpoint | None:
        """Return a checkpoint of an application, None if there is none with this id.

        `CorruptRecordError` if it cannot be read.
        """
        found = await self._read_named(self.apps, id)
        if found is None:
            return None
        thread_id, body, state = found
        return StoredAppCheckpoint(**self._app_fields(thread_id, body), state=state)

    @public
    async def retrieve_latest_app_checkpoint(
        self,
        *,
        hostname: str | None = None,
        working_directory: str | None = None,
        timeout: float | None = None,
    ) -> StoredAppCheckpoint | None:
        """Return the newest checkpoint of any application (by `created_at`), or of one host or directory."""
        cursor: str | None = None
        while True:
            page = await self._app_page(None, hostname, working_directory, None, None, 1, cursor)
            if not page:
                return None
            id, body = page[0]
            found = await self.apps.read(id, body.id)
            if found is not None:
                return StoredAppCheckpoint(**self._app_fields(id, found[0]), state=found[1])
            if page.cursor is None:
                return None
            cursor = page.cursor

    @public
    async def list_app_checkpoints(
        self,
        *,
        session_id: str | None = None,
        hostname: str | None = None,
        working_directory: str | None = None,
        before: int | None = None,
        after: int | None = None,
        limit: int | None = None,
        cursor: str | None = None,
        timeout: float | None = None,
    ) -> Listing[AppCheckpointListItem]:
        """Return checkpoints of applications without their states, newest first, ties by id.

        `session_id`, `hostname`, `working_directory`: only those that have it.
        `before`, `after`: created strictly before or after a time (ms).
        """
        page = await self._app_page(session_id, hostname, working_directory, before, after, limit, cursor)
        items = (AppCheckpointListItem(**self._app_fields(id, body)) for id, body in page)
        return Listing(items, cursor=page.cursor)

    @public_change
    async def delete_app_checkpoint(self, id: str, *, timeout: float | None = None) -> bool:
        """Delete a checkpoint of an application; tell whether there was one."""
        return await self._delete_named(self.apps, id)

    @public_change
    async def delete_session_checkpoints(self, session_id: str, *, timeout: float | None = None) -> int:
        """Delete all checkpoints that applications stored for a session; return how many."""
        encode_id(session_id, "session_id")
        return await self.apps.delete(session_id)

    @public_change
    async def prune_app_checkpoints(
        self,
        session_id: str | None = None,
        *,
        keep_last: int | None = None,
        older_than: int | datetime | timedelta | None = None,
        dry_run: bool = False,
        timeout: float | None = None,
    ) -> Pruned:
        """Do what `prune` does, for the checkpoints that applications stored for one session, or for all.

        `keep_last` counts within each session: where a session is one run, use `older_than`.
        """
        _check_texts(session_id=session_id)
        return await self._prune(self.apps, session_id, keep_last, older_than, dry_run=dry_run)

    # ---- behind the calls

    def _not_found(self, thread_id: str, checkpoint_id: str | None = None) -> NotFoundError:
        message = (
            f"no thread {thread_id!r:.80}"
            if checkpoint_id is None
            else f"no checkpoint {checkpoint_id!r:.80}"
        )
        return NotFoundError(message, partition=self.threads.partition(thread_id))

    async def _prune(
        self,
        threads: Threads,
        thread_id: str | None,
        keep_last: int | None,
        older_than: int | datetime | timedelta | None,
        label: str | None = None,
        run_id: str | None = None,
        *,
        dry_run: bool,
    ) -> Pruned:
        if keep_last is None and older_than is None and label is None and run_id is None:
            message = "prune: say what is to go, by keep_last=, older_than=, label= or run_id="
            raise InvalidValueError(message)
        _check_texts(label=label, run_id=run_id)
        keep = _cap(keep_last, "keep_last")
        limit_at = self._before(older_than)

        def choose(found: builtins.list[Found]) -> builtins.list[str]:
            candidates = found if keep is None else found[: max(0, len(found) - keep)]
            return [
                one.id
                for one in candidates
                if one.body is not None
                and (limit_at is None or one.body.at < limit_at)
                and self._matches(one.body, {}, label, run_id)
            ]

        pruned = checkpoints = pieces = 0

        async def ids() -> AsyncIterator[str]:
            if thread_id is not None:
                yield thread_id
                return
            async for head in self._heads(threads):
                if keep is None or head.k > keep:  # of the others nothing can go: they need not be read
                    yield head.id

        async for id in ids():
            removed, dropped = await threads.remove(id, choose, dry_run=dry_run)
            pruned += removed > 0
            checkpoints += removed
            pieces += dropped
        return Pruned(threads=pruned, checkpoints=checkpoints, pieces=pieces)

    async def _store_named(
        self,
        threads: Threads,
        thread_id: str,
        checkpoint: Any,
        fields: dict[str, str],
        expected_latest: str | Literal[0] | None,
        cap: int | None,
    ) -> CheckpointBody:
        given = _mapping(checkpoint)
        if isinstance(expected_latest := _checked_latest(expected_latest), str):
            encode_id(expected_latest, "expected_latest")
            own, of = _named_id(expected_latest) or ("", "")
            expected_latest = own if of == thread_id else ""  # of another: never the latest of this one
        known = {"id", "agent_id", "session_id", "state", "created_at", "extra", *fields}
        extra = {} if given.get("extra") is None else given["extra"]
        if not isinstance(extra, Mapping):
            message = "the checkpoint's extra must be a mapping"
            raise InvalidValueError(message)
        extra = {**extra, **{name: value for name, value in given.items() if name not in known}}
        if "state" not in given:
            message = "the checkpoint has no state"
            raise InvalidValueError(message)
        new = New(
            cut=cut(given["state"], threads.memo(thread_id)),
            at=_time(given.get("created_at"), "created_at"),
            metadata=_metadata(extra),
            expected_latest=expected_latest,
            fields=fields,
            cap=cap,
        )
        return await threads.put(thread_id, new)

    async def _read_named(self, threads: Threads, id: str) -> tuple[str, CheckpointBody, Any] | None:
        parts = _named_id(id)
        if parts is None:
            return None
        found = await threads.read(parts[1], parts[0])
        return None if found is None else (parts[1], *found)

    async def _delete_named(self, threads: Threads, id: str) -> bool:
        parts = _named_id(id)
        if parts is None:
            return False
        removed, _ = await threads.remove(parts[1], lambda found: [parts[0]])
        return removed > 0

    async def _app_page(
        self,
        session_id: str | None,
        hostname: str | None,
        working_directory: str | None,
        before: int | None,
        after: int | None,
        limit: int | None,
        cursor: str | None,
    ) -> Listing[tuple[str, CheckpointBody]]:
        wanted = {"hostname": hostname, "working_directory": working_directory}
        _check_texts(session_id=session_id, **wanted)
        place = Place("index/app-checkpoints")
        if session_id is not None:
            place = _by("app", "session", session_id)
        elif hostname is not None:
            place = _by("app", "host", hostname)
        return await self._named_page(self.apps, place, session_id, wanted, before, after, limit, cursor)

    async def _named_page(
        self,
        threads: Threads,
        place: Place,
        thread_id: str | None,
        fields: Mapping[str, str | None],
        before: int | None,
        after: int | None,
        limit: int | None,
        cursor: str | None,
        order_by: str = "created_at",
        order_dir: str = "DESC",
    ) -> Listing[tuple[str, CheckpointBody]]:
        """Return a page of what is listed at `place`: of one thread, and with these fields, where given."""

        def match(of: str, body: CheckpointBody) -> bool:
            return thread_id in (None, of) and wanted <= body.x.items()

        wanted = {name: text for name, text in fields.items() if text is not None}.items()
        _check_limit(limit)
        if order_by not in ("created_at", "id") or order_dir not in ("ASC", "DESC"):
            message = (
                f"order_by={shown(order_by)}, order_dir={shown(order_dir)}: use created_at or id, ASC or DESC"
            )
            raise InvalidValueError(message)
        if order_by == "id" and cursor is not None:
            encode_id(cursor, "cursor")
        else:
            check_cursor(cursor)
        found: Listing[tuple[str, CheckpointBody]] = Listing(cursor=cursor)
        if limit is not None and limit < 1:
            return found
        reverse = order_dir == "ASC"  # the keys sort the newest first
        start = "" if before is None else newest_first(as_ms(before, "before") - 1)
        end = None if after is None else newest_first(as_ms(after, "after"))
        if order_by == "id":
            all_of_them = [item async for _, item in self._named(threads, place, start, end, match, None)]
            all_of_them.sort(key=lambda item: item[1].id, reverse=not reverse)
            if cursor is not None:
                all_of_them = [
                    it for it in all_of_them if (it[1].id > cursor if reverse else it[1].id < cursor)
                ]
            page = all_of_them if limit is None else all_of_them[:limit]
            return Listing(page, cursor=page[-1][1].id if len(page) < len(all_of_them) else None)
        if cursor is not None:
            if reverse:
                end = cursor
            else:
                start = after_key(cursor)
        found.cursor = None
        last: str | None = None
        async for key, item in self._named(threads, place, start, end, match, limit, reverse=reverse):
            if len(found) == limit:
                found.cursor = last
                break
            found.append(item)
            last = key
        return found

    async def _named(
        self,
        threads: Threads,
        place: Place,
        start: str,
        end: str | None,
        match: Callable[[str, CheckpointBody], bool],
        limit: int | None,
        *,
        reverse: bool = False,
    ) -> AsyncIterator[tuple[str, tuple[str, CheckpointBody]]]:
        """Yield what is listed at a place and is there; of what is behind `limit` of them, little is read."""
        coalescer = self._store.coalescer
        found = read = 0
        while True:
            wanted = min(next_page(limit, found, read), _PAGE // 2)
            page = await coalescer.scan(place.partition, start, end, limit=wanted, reverse=reverse)
            read += len(page.entries)
            hints = [self._store.unpack(threads.hint_decoder, place.partition, e) for e in page.entries]
            partitions = [threads.partition(hint.of) for hint in hints]
            names = list(dict.fromkeys(partitions))  # the head of each is read once
            keys = [Key(name, HEAD) for name in names]
            keys += [Key(name, CHECKPOINT + hint.id) for name, hint in zip(partitions, hints, strict=True)]
            entries = await coalescer.get(keys)
            heads = dict(zip(names, entries, strict=False))
            listed = zip(page.entries, hints, partitions, entries[len(names) :], strict=True)
            for hint_entry, hint, name, entry in listed:
                try:
                    body = threads.chosen(name, [heads[name], entry], hint.id)
                except CorruptRecordError:
                    continue  # named by repair, and by whoever asks for it; it does not hide the others
                if body is None or Key(place.partition, hint_entry.key) not in threads.hints(body, hint.of):
                    continue
                if match(hint.of, body):
                    found += 1
                    yield hint_entry.key, (hint.of, body)
            if not page.more:
                return
            if reverse:
                end = page.entries[-1].key
            else:
                start = after_key(page.entries[-1].key)

    def _agent_fields(self, agent_id: str, body: CheckpointBody) -> dict[str, Any]:
        own = {name: body.x.get(name, "") for name in ("session_id", "agent_type", "name")}
        return {"agent_id": agent_id, **own, **self._fields_of_all(self.agents, agent_id, body)}

    def _app_fields(self, session_id: str, body: CheckpointBody) -> dict[str, Any]:
        own = {name: body.x.get(name, "") for name in ("hostname", "working_directory")}
        return {"session_id": session_id, **own, **self._fields_of_all(self.apps, session_id, body)}

    def _fields_of_all(self, threads: Threads, thread_id: str, body: CheckpointBody) -> dict[str, Any]:
        extra = self._metadata(threads, thread_id, body)
        return {"id": f"{body.id}:{thread_id}", "created_at": body.at, "extra": extra}

    async def _heads(self, threads: Threads) -> AsyncIterator[HeadBody]:
        cursor = None
        while True:
            heads, cursor = await threads.threads(limit=_PAGE, cursor=cursor)
            for head in heads:
                yield head
            if cursor is None:
                return

    def _meta(self, thread_id: str, body: CheckpointBody) -> CheckpointMeta:
        return CheckpointMeta(
            id=body.id,
            thread_id=thread_id,
            created_at=body.at,
            version=body.ver,
            size_bytes=body.z,
            stored_bytes=body.b,
            parent_id=body.parent,
            seq=body.n,
            labels=tuple(body.labels),
            run_id=body.run,
            metadata=self._metadata(self.threads, thread_id, body),
        )

    def _found_meta(self, thread_id: str, found: Found) -> CheckpointMeta:
        if found.body is None:
            return CheckpointMeta(id=found.id, thread_id=thread_id, corrupt=found.error)
        try:
            return self._meta(thread_id, found.body)
        except CorruptRecordError as error:
            return CheckpointMeta(id=found.id, thread_id=thread_id, corrupt=str(error))

    def _metadata(self, threads: Threads, thread_id: str, body: CheckpointBody) -> dict[str, Any]:
        if body.v is msgspec.UNSET:
            return {}
        partition = threads.partition(thread_id)
        value: dict[str, Any] = self._store.inline_value(partition, CHECKPOINT + body.id, body)
        return value

    def _matches(
        self, body: CheckpointBody, metadata: Mapping[str, Any], label: str | None, run_id: str | None
    ) -> bool:
        if label is not None and label not in body.labels:
            return False
        if run_id is not None and body.run != run_id:
            return False
        if not metadata:
            return True
        has = self._metadata(self.threads, "", body)
        return all(name in has and _equal(has[name], value) for name, value in metadata.items())

    def _before(self, older_than: int | datetime | timedelta | None) -> int | None:
        if isinstance(older_than, timedelta):
            if older_than < timedelta():  # "30 days ago", perhaps: it would take everything
                message = f"older_than={older_than!r}: an age is 0 or more"
                raise InvalidValueError(message)
            return self._store.clock() - int(older_than.total_seconds() * 1000)
        return _time(older_than, "older_than")


def _agent_places(body: CheckpointBody, agent_id: str) -> Sequence[Place]:
    return (
        Place("index/named-checkpoints"),
        _by("named", "agent", agent_id),
        _by("named", "session", body.x.get("session_id", "")),
    )


def _app_places(body: CheckpointBody, session_id: str) -> Sequence[Place]:
    return (
        Place("index/app-checkpoints"),
        _by("app", "session", session_id),
        _by("app", "host", body.x.get("hostname", "")),
    )


def _by(kind: str, what: str, id: str) -> Place:
    return Place(f"index/{kind}-checkpoints-by-{what}/{encode_id(id, what)}")


def _thread_meta(head: HeadBody) -> ThreadMeta:
    return ThreadMeta(
        thread_id=head.id,
        created_at=head.at,
        updated_at=head.up,
        checkpoints=head.k,
        latest_id="" if head.l is None else head.l.id,
        expires_at=head.e,
    )


def _named_id(id: str) -> tuple[str, str] | None:
    """Return the two parts of the id of a named checkpoint: its own, and the thread's."""
    if isinstance(id, str) and id[_UUID_CHARS : _UUID_CHARS + 1] == ":":
        return id[:_UUID_CHARS], id[_UUID_CHARS + 1 :]  # whoever reads it checks both
    encode_id(id, "id")
    return None


# ---- what callers give


def _check_limit(limit: int | None) -> None:
    if limit is not None and (not isinstance(limit, int) or isinstance(limit, bool)):
        message = f"limit={shown(limit)}: use a whole number, or None for all"
        raise InvalidValueError(message)


def _cap(cap: int | None, what: str) -> int | None:
    if cap is not None and (not isinstance(cap, int) or isinstance(cap, bool) or cap < 0):
        message = f"{what}={shown(cap)}: use a whole number from 0 on, or None for no limit"
        raise InvalidValueError(message)
    return cap


def _time(value: Any, what: str) -> int | None:
    """Return a time in milliseconds: given as such, or as a datetime."""
    return None if value is None else as_ms(value, what)


def _text_or_none(value: str | None, what: str) -> str | None:
    if value is not None:
        encode_id(value, what)
    return value


def _check_texts(**given: str | None) -> None:
    for what, text in given.items():
        _text_or_none(text, what)


def _checked_latest(expected: str | Literal[0] | None) -> str | Literal[0] | None:
    if expected is None or isinstance(expected, str) or (type(expected) is int and expected == 0):
        return expected
    message = f"expected_latest={shown(expected)}: use the id of a checkpoint, or 0 for none at all"
    raise InvalidValueError(message)


def _labels(labels: Iterable[str]) -> builtins.list[str]:
    if isinstance(labels, str) or not isinstance(labels, Iterable):
        message = f"labels={shown(labels)}: use a list of texts"
        raise InvalidValueError(message)
    found = list(labels)
    for label in found:
        encode_id(label, "a label")
    return list(dict.fromkeys(found))


def _metadata(metadata: Mapping[str, Any] | None) -> tuple[bytes, bool] | None:
    if metadata is None:
        return None
    if not isinstance(metadata, Mapping):
        message = f"metadata must be a mapping, not {type(metadata).__name__}"
        raise InvalidValueError(message)
    if not metadata:
        return None
    text, tagged = codec.encode(dict(metadata))
    if len(text) > _METADATA_BYTES:
        message = f"the metadata have {len(text):,} bytes; the limit is {_METADATA_BYTES:,}"
        raise InvalidValueError(message)
    return text, tagged


def _version(snapshot: Any) -> int | str | None:
    found = snapshot.get("version") if isinstance(snapshot, Mapping) else None
    if type(found) is int and -_INT64 <= found < _INT64:
        return found
    return found if type(found) is str and len(found) <= 200 and found.isprintable() else None


def _checked_version(version: Any) -> int | str:
    if isinstance(version, str):
        encode_id(version, "version")
        return version
    if isinstance(version, int) and not isinstance(version, bool):
        return version
    message = f"version={shown(version)}: use a whole number or a text"
    raise InvalidValueError(message)


def _mapping(checkpoint: Any) -> dict[str, Any]:
    if isinstance(checkpoint, msgspec.Struct):
        return {name: getattr(checkpoint, name) for name in checkpoint.__struct_fields__}
    if isinstance(checkpoint, Mapping):
        return dict(checkpoint)
    message = f"a checkpoint must be a mapping, not {type(checkpoint).__name__}"
    raise InvalidValueError(message)


def _fields(checkpoint: Any, names: Sequence[str]) -> dict[str, str]:
    given = _mapping(checkpoint)
    fields = {}
    for name in names:
        if not isinstance(given.get(name), str):
            message = f"the checkpoint's {name} must be a text"
            raise InvalidValueError(message)
        fields[name] = str(given[name])
    if len(codec.encode(fields)[0]) > _FIELDS_BYTES:
        message = f"the checkpoint's {', '.join(names)} have more than {_FIELDS_BYTES:,} bytes"
        raise InvalidValueError(message)
    return fields


# ---- comparing


def _equal(a: Any, b: Any) -> bool:
    """Tell whether two values are equal type by type: True is not 1, and NaN is NaN."""
    pairs = [(a, b)]  # not by calling itself: they may be nested deeper than the stack allows
    while pairs:
        a, b = pairs.pop()
        if type(a) is not type(b):
            return False
        if isinstance(a, dict):
            if a.keys() != b.keys():
                return False
            pairs += [(value, b[key]) for key, value in a.items()]
        elif isinstance(a, builtins.list | tuple):
            if len(a) != len(b):
                return False
            pairs += zip(a, b, strict=True)
        elif isinstance(a, Decimal) and (a.is_nan() or b.is_nan()):  # a signalling one cannot be compared
            if not (a.is_nan() and b.is_nan()):
                return False
        elif a != b and (a == a or b == b):
            return False
    return True


def _compare(a: Any, b: Any, path: tuple[Any, ...], changes: list[Change]) -> None:
    if type(a) is type(b) and isinstance(a, dict):
        for key in a:
            if key not in b:
                changes.append(Change((*path, key), "removed", before=a[key]))
            else:
                _compare(a[key], b[key], (*path, key), changes)
        changes += [Change((*path, key), "added", after=b[key]) for key in b if key not in a]
    elif type(a) is type(b) and isinstance(a, list):
        for index in range(min(len(a), len(b))):
            _compare(a[index], b[index], (*path, index), changes)
        changes += [Change((*path, i), "removed", before=a[i]) for i in range(len(b), len(a))]
        changes += [Change((*path, i), "added", after=b[i]) for i in range(len(a), len(b))]
    elif not _equal(a, b):
        changes.append(Change(path, "changed", a, b))
