"""`repair`: finish what a crash left half done, and remove what nobody needs any more.

It visits every partition once and may be interrupted and repeated at any time,
beside any number of writers: whatever it removes is removed under the version
that it had looked at. What is young enough to belong to a call under way is
left alone: an hour for listings and chunks, so the clocks of all writers must
agree to well within that.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any, Final

import msgspec

from persistence.checkpoints import Checkpoints
from persistence.collection import RECORD, Collection, Place, RecordBody
from persistence.driver import Delete, Key
from persistence.errors import CorruptRecordError
from persistence.keys import prefix_end
from persistence.repositories import Containers, Images, LLMProviders, Prototypes, Sessions
from persistence.store import CHUNK, Chunks, Store
from persistence.streams import Streams
from persistence.thread_repair import ThreadRepair

__all__ = ["DAY_MS", "HINT_AGE_MS", "Repair", "RepairReport", "drop_chunks"]

DAY_MS: Final = 86_400_000
HINT_AGE_MS: Final = 3_600_000
"""Hints and chunks younger than this may belong to a save that is not finished."""

_AT_ONCE = 64
_PAGE = 256
_LONG = 10**9  # days
_NAMED = 1_000  # orphans and corrupt records named in a report; all are counted


class RepairReport(msgspec.Struct, kw_only=True):
    """What `repair` did, or with ``dry_run`` would do."""

    partitions: int = 0
    """Partitions looked at."""
    hints_added: int = 0
    """Entries of listings that were missing."""
    hints_removed: int = 0
    """Entries of listings that matched no record."""
    entries_emptied: int = 0
    """Hidden messages whose content was still there."""
    stubs_removed: int = 0
    """Empty places of messages hidden more than a day ago."""
    chunks_removed: int = 0
    """Parts of long values that nothing refers to."""
    deletes_finished: int = 0
    """Cascading deletes that had been interrupted."""
    tombstones_removed: int = 0
    """Traces of things deleted long ago."""
    pieces_removed: int = 0
    """Parts of states that no checkpoint needs."""
    uploads_ended: int = 0
    """Puts of large states that were interrupted."""
    forks_ended: int = 0
    """Forks of sessions that had been interrupted more than an hour ago."""
    sessions_expired: int = 0
    """Sessions whose time had come."""
    threads_expired: int = 0
    """Threads of checkpoints whose time had come."""
    streams_expired: int = 0
    """Streams whose time had come."""
    streams_removed: int = 0
    """Deleted streams of which parts were left."""
    orphan_count: int = 0
    orphans: list[str] = msgspec.field(default_factory=list)
    """Records whose container or image does not exist: named, and left as they are (1,000 at most).

    No fault where you do not save containers, or images, at all.
    """
    corrupt_count: int = 0
    corrupt: list[str] = msgspec.field(default_factory=list)
    """What cannot be read: named, and left as it is (1,000 at most)."""


class Repair:
    """One run over a store."""

    def __init__(
        self,
        store: Store,
        *,
        containers: Containers,
        images: Images,
        sessions: Sessions,
        prototypes: Prototypes,
        llm_providers: LLMProviders,
        checkpoints: Checkpoints,
        streams: Streams,
        dry_run: bool,
        tombstone_days: float,
        progress: Callable[[int], None] | None,
    ) -> None:
        self.store = store
        self.dry_run = dry_run
        self.report = RepairReport()
        self._progress = progress
        self._now = store.clock()
        self._tombstones_before = self._now - int(min(tombstone_days, _LONG) * DAY_MS)
        self._containers = containers
        self._images = images
        self._sessions = sessions
        collections: list[Collection[Any]] = [
            containers.records,
            images.records,
            sessions.records,
            prototypes.records,
            llm_providers.records,
        ]
        self._collections = {collection.kind.name: collection for collection in collections}
        self._checkpoints = checkpoints
        self._streams = streams
        self._children: dict[str, Callable[[str], Awaitable[Any]]] = {
            "container": containers._delete_children,
            "image": images._delete_children,
        }

    async def run(self) -> RepairReport:
        """Visit all partitions."""
        cursor: str | None = None
        while True:
            names, cursor = await self.store.coalescer.partitions(cursor, _AT_ONCE)
            visits = await asyncio.gather(*(self._visit(name) for name in names), return_exceptions=True)
            for fault in visits:  # once all have come to their end
                if fault is not None:
                    raise fault
            self.report.partitions += len(names)
            if self._progress is not None:
                self._progress(self.report.partitions)
            if cursor is None:
                break
        if not self.dry_run:  # the deadlines of what has gone
            for sweep in (
                self._sessions._sweep,
                self._checkpoints.threads.delete_all_expired,
                self._streams._sweep,
            ):
                try:
                    await sweep()
                except CorruptRecordError as error:
                    self._corrupt(error)
        return self.report

    async def _visit(self, partition: str) -> None:
        kind = partition.partition("/")[0]
        steps: list[Callable[[str], Awaitable[None]]] = []
        threads = self._checkpoints._kind_of(partition)
        checkpoints = None if threads is None else ThreadRepair(threads, dry_run=self.dry_run)
        if kind == "index":
            steps = [self._sweep_hints]
            if checkpoints is not None:
                steps.append(partial(self._sweep_checkpoint_hints, checkpoints))
        elif checkpoints is not None:
            steps = [partial(self._thread, checkpoints)]
        elif kind == "stream":
            steps = [self._stream]
        elif kind in self._collections:
            steps = [self._record, self._sweep_hints, self._chunks]
            if kind == "session":
                steps.insert(1, self._messages)
        for step in steps:
            try:
                await step(partition)
            except CorruptRecordError as error:
                self._corrupt(error)

    def _corrupt(self, error: CorruptRecordError) -> None:
        if str(error) in self.report.corrupt:
            return  # found again through its deadline
        self.report.corrupt_count += 1
        if len(self.report.corrupt) < _NAMED:
            self.report.corrupt.append(str(error))

    # ---- records

    async def _record(self, partition: str) -> None:
        collection = self._collections[partition.partition("/")[0]]
        loaded = await collection.load_partition(partition)
        if loaded.body is not None and loaded.body.deleted is not None:
            await self._tombstone(partition, collection, loaded.body, loaded.version)
        elif loaded.record is not None and collection.expired(loaded.record):
            self.report.sessions_expired += 1
            if not self.dry_run:
                await self._sessions._expire(partition)
        elif loaded.record is not None:
            await self._listed(collection, loaded.record)
            await self._parents(partition, loaded.record)
        elif collection.kind.name == "session":
            await self._half_fork(partition)

    async def _half_fork(self, partition: str) -> None:
        """Hide the messages of a fork whose record never came. Its id stays used."""
        copied = await self._sessions.log.copied(partition)
        if copied is not None and copied[0] < self._now - HINT_AGE_MS:
            self.report.forks_ended += 1
            if not self.dry_run:  # what others add from now on stays
                await self._sessions.log.take_back(partition, copied[1])

    async def _tombstone(
        self, partition: str, collection: Collection[Any], body: RecordBody, version: int
    ) -> None:
        if body.cascade:
            self.report.deletes_finished += 1
            if not self.dry_run:
                await self._children[collection.kind.name](partition)
                await collection.finish(partition, version)
        elif body.deleted is not None and body.deleted < self._tombstones_before:
            self.report.tombstones_removed += 1
            if not self.dry_run:
                await drop_chunks(self.store, partition, _nothing, body.deleted + 1)
                if collection.kind.name == "session":
                    await self._sessions.log.forget(partition, Delete(RECORD, version))
                else:
                    await self.store.coalescer.write(partition, [Delete(RECORD, version)], hint=True)

    async def _listed(self, collection: Collection[Any], record: Any) -> None:
        hints = collection.kind.hints(record)
        entries = await self.store.coalescer.get(list(hints))
        missing = {key: hints[key] for key, entry in zip(hints, entries, strict=True) if entry is None}
        self.report.hints_added += len(missing)
        if missing and not self.dry_run:
            await collection.put_hints(collection.kind.id_of(record), missing)

    async def _parents(self, partition: str, record: Any) -> None:
        for field, collection in (
            ("container_id", self._containers.records),
            ("image_id", self._images.records),
        ):
            parent = getattr(record, field, None)
            if parent is None or partition.startswith(f"{collection.kind.name}/"):
                continue
            if not await collection.exists(parent):
                self.report.orphan_count += 1
                if len(self.report.orphans) < _NAMED:
                    self.report.orphans.append(f"{partition}: there is no {collection.kind.name} {parent!r}")

    # ---- messages

    async def _messages(self, partition: str) -> None:
        log = self._sessions.log
        hidden = await log.hidden(partition)
        if hidden:
            tail = await log.tail(partition)
            deleted = tail.number if tail.deleted else tail.born  # a delete that was cut off had come so far
            # Counted after the await: other partitions are visited meanwhile.
            emptied = await log.empty(partition, hidden, unread=deleted, dry_run=self.dry_run)
            self.report.entries_emptied += emptied
            before = self._now - DAY_MS
            dropped = await log.drop_stubs(partition, hidden, before, dry_run=self.dry_run)
            self.report.stubs_removed += dropped

    # ---- listings

    async def _sweep_hints(self, partition: str) -> None:
        for collection, place in self._listings(partition):
            end = prefix_end(place.prefix) if place.prefix else None
            async for entries in self.store.coalescer.pages(partition, place.prefix, end, limit=_PAGE):
                hints = [
                    (entry, self.store.unpack(collection.hint_decoder, partition, entry)) for entry in entries
                ]
                old = [(entry, hint) for entry, hint in hints if hint.at < self._now - HINT_AGE_MS]
                records = await collection.find_many([hint.id for _, hint in old])
                for (entry, _), record in zip(old, records, strict=True):
                    if record is None or Key(partition, entry.key) not in collection.kind.hints(record):
                        self.report.hints_removed += 1
                        if not self.dry_run:
                            delete = Delete(entry.key, entry.version)
                            await self.store.coalescer.write(partition, [delete], hint=True)

    def _listings(self, partition: str) -> Sequence[tuple[Collection[Any], Place]]:
        kind, _, rest = partition.partition("/")
        if kind == "index":
            name = rest.partition("/")[0].removesuffix("-by-name").removesuffix("s")
            return [(self._collections[name], Place(partition))] if name in self._collections else []
        children = {"container": ("image", "session", "prototype", "llm-provider"), "image": ("session",)}
        return [(self._collections[child], Place(partition, f"{child}/")) for child in children.get(kind, ())]

    # ---- checkpoints

    async def _thread(self, repair: ThreadRepair, partition: str) -> None:
        done = await repair.repair(partition, before=self._tombstones_before)
        self.report.pieces_removed += done.pieces_removed
        self.report.uploads_ended += done.uploads_ended
        self.report.hints_added += done.hints_added
        self.report.threads_expired += done.expired
        self.report.tombstones_removed += done.forgotten
        self.report.corrupt_count += len(done.corrupt)
        self.report.corrupt += done.corrupt[: max(0, _NAMED - len(self.report.corrupt))]

    async def _sweep_checkpoint_hints(self, repair: ThreadRepair, partition: str) -> None:
        removed = await repair.sweep_hints(partition, before=self._now - HINT_AGE_MS)
        self.report.hints_removed += removed  # not before the await: other partitions are visited meanwhile

    # ---- streams

    async def _stream(self, partition: str) -> None:
        before = self._now - DAY_MS
        done = await self._streams._repair(partition, before=before, dry_run=self.dry_run)
        self.report.streams_expired += done.expired
        self.report.streams_removed += done.left
        self.report.tombstones_removed += done.marks
        await self._drop_unused(partition, partial(self._streams._chunk_ids, partition))

    # ---- chunks

    async def _chunks(self, partition: str) -> None:
        collection = self._collections[partition.partition("/")[0]]

        async def used() -> set[str]:
            body = await collection.load_body(partition)
            found = {body.c.id} if body is not None and isinstance(body.c, Chunks) else set()
            if collection.kind.name == "session":
                found |= await self._sessions.log.chunk_ids(partition)
            return found

        await self._drop_unused(partition, used)

    async def _drop_unused(self, partition: str, used: Callable[[], Awaitable[set[str]]]) -> None:
        before = self._now - HINT_AGE_MS
        dropped = await drop_chunks(self.store, partition, used, before, dry_run=self.dry_run)
        self.report.chunks_removed += dropped


async def drop_chunks(
    store: Store,
    partition: str,
    used: Callable[[], Awaitable[set[str]]],
    before: int,
    *,
    dry_run: bool = False,
) -> int:
    """Remove the chunked values of a partition, begun before `before` (ms), that `used` does not name.

    Returns how many. `used` is asked after the chunks were listed: none of them can become used unseen.
    """
    old = [id for id in await store.coalescer.names(partition, CHUNK) if _uuid7_ms(id) < before]
    if not old:
        return 0
    in_use = await used()
    unused = [id for id in old if id not in in_use]
    if not dry_run:
        for id in unused:
            await store.coalescer.purge(partition, f"{CHUNK}{id}/", prefix_end(f"{CHUNK}{id}/"))
    return len(unused)


async def _nothing() -> set[str]:
    return set()


def _uuid7_ms(id: str) -> int:
    return int(id[:8] + id[9:13], 16)
