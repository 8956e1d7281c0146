"""Threads of checkpoints, changed only together with their heads.

Every Write that adds or removes anything puts ``head`` under the version that
its writer had read, so no two of them cross, and no number is given out twice.
An upload is the exception: its head reserves numbers for it, and its Writes
check ``pending/<id>``, which goes when the upload ends or the thread is deleted.

A writer remembers the head and the numbers of the pieces of the latest state,
and of those that it put before, so its next put is one Write. If somebody else
wrote meanwhile it is refused, reads what changed, and tries again.

A piece goes when no checkpoint that is kept names it, in the same Write as the
last checkpoint that did. What is too much for a Write is noted in the head as
dead (numbers in `dr`, checkpoints up to `fl`), and then purged.
"""

from __future__ import annotations

import asyncio
import secrets
import uuid
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

from msgspec import Raw
from msgspec.structs import replace

from persistence.coalescer import Tries, backoff
from persistence.collection import HintBody
from persistence.deadlines import hour
from persistence.driver import ABSENT, Delete, Entry, Key, Op, Put
from persistence.errors import (
    ConflictError,
    CorruptRecordError,
    NotFoundError,
    OutcomeUnknownError,
    PersistenceError,
    UnavailableError,
)
from persistence.keys import after, prefix_end
from persistence.numbering import BLOCK, BLOCKS, Numbers, place
from persistence.pieces import Cut, Span, count, digest, runs, subtract, union
from persistence.store import Body, pack
from persistence.thread_reader import (
    CHECKPOINT,
    HEAD,
    PENDING,
    PIECE,
    CheckpointBody,
    Found,
    HeadBody,
    Kept,
    ThreadReader,
    Upload,
    Warm,
    checkpoint_key,
    number_of,
    piece_key,
)

__all__ = ["RUNS_AT_ONCE", "New", "Threads"]

_COPY_TRIES = 6
_WRITE_PIECES = 500  # pieces that travel in the Write of their checkpoint
_WRITE_BYTES = 3 << 20
_LARGE_SKELETON = 1_500  # bytes
_REMOVED_AT_ONCE = 200  # checkpoints, and as many pieces, that one Write removes
_FEW_RUNS = 8  # are purged, each by a call,
_SHORT_RUN = 50  # as are those of more pieces
RUNS_AT_ONCE = 20_000  # of numbers of pieces that go, noted in the head, which must stay a value


class New(NamedTuple):
    """A checkpoint to put: everything but its id and the numbers of its pieces."""

    cut: Cut
    at: int | None = None
    metadata: tuple[bytes, bool] | None = None
    parent: str | None = None
    expected_latest: str | int | None = None
    labels: Sequence[str] = ()
    run: str | None = None
    version: Any = None
    fields: dict[str, str] | None = None
    cap: int | None = None
    expires_at: int | None = None


class Threads(ThreadReader):
    """Reads and changes the threads of one kind."""

    async def put(self, thread_id: str, new: New) -> CheckpointBody:
        """Store a checkpoint: one round trip after the last put or read of the latest, else two or three."""
        partition = self.partition(thread_id)
        warm = self._warm_of(partition)
        async with warm.lock:
            upload = _Uploading()
            try:
                return await self._put(partition, thread_id, new, warm, upload)
            except BaseException:
                warm.head = None  # the Write may have been applied
                if upload.id:
                    self.store.coalescer.start(self._give_up(partition, upload.id))
                raise

    async def _put(
        self, partition: str, thread_id: str, new: New, warm: Warm, upload: _Uploading
    ) -> CheckpointBody:
        tries = Tries(partition)
        looked = False
        hinted: set[Any] = set()  # what was put into listings ahead of the checkpoint
        while True:
            found, known = warm.head, warm.numbers()
            if found is None or (new.parent is not None and not looked and not _is_latest(found, new.parent)):
                found = await self._look(partition, thread_id, warm, new)
                known, looked = warm.numbers(), True
            version = warm.version
            now = self.store.clock()
            head = found
            if not self.alive(head, now):
                head = _restarted(head, now)
                warm.known = known = {}
                warm.kept = []
            doubt = _doubt(partition, head, new)
            if doubt is not None:
                if looked:
                    raise doubt
                warm.head = None
                continue
            if warm.kept is None:
                warm.kept = await self._kept(partition, head, new)
            if upload.version and upload.id not in head.p:
                upload.forget()  # the thread was deleted meanwhile, or repair ended the upload
            plan = _planned(new.cut, head, version, {**known, **upload.known} if upload.version else known)
            plan.ops.extend(Delete(PENDING + id) for id in found.p if id not in head.p)
            await self._announce(partition, thread_id, new, head, hinted)
            if plan.size > _WRITE_BYTES or len(plan.fresh) > _WRITE_PIECES:
                if await self._upload(partition, warm, plan, new.cut, upload):
                    tries = Tries(partition)  # it may have taken longer than those last
                    continue
            else:
                body = await self._store(partition, thread_id, new, warm, plan, upload, hinted)
                if body is not None:
                    return body
            warm.head = None
            await tries.another()

    async def _announce(
        self, partition: str, thread_id: str, new: New, head: HeadBody, hinted: set[Any]
    ) -> None:
        """Put the thread into the listings where it is not yet: before its head says that it is there."""
        puts: list[Awaitable[None]] = []
        if new.expires_at is not None and (head.e is None or hour(new.expires_at) != hour(head.e)):
            puts.append(self.deadlines.put(partition, new.expires_at))
        if head.l is None and head.at not in hinted:
            hinted.add(head.at)
            puts.append(self.put_thread_hint(thread_id, head))
        if puts:
            await asyncio.gather(*puts)

    async def _upload(self, partition: str, warm: Warm, plan: _Plan, cut: Cut, upload: _Uploading) -> bool:
        """Write the new pieces ahead of their checkpoint, in numbers reserved for them. False: refused."""
        upload.id = upload.id or self.store.ids()
        reserved, spans = upload.begin(plan, self.store.clock())
        mark = Put(PENDING + upload.id, pack(Body()), upload.version)
        ops = [Put(HEAD, pack(reserved), plan.version), mark, *plan.ops]
        version = await self.store.coalescer.write(partition, ops)
        if not version:
            return False
        warm.head, warm.version, upload.version, upload.spans = reserved, version, version, spans
        puts = (Put(piece_key(plan.placed[index]), cut.texts[index]) for index in plan.fresh)
        upload.version = await self._put_in_batches(partition, upload.id, version, puts)
        if not upload.version:
            return False
        upload.known.update((cut.digests[index], plan.placed[index]) for index in plan.fresh)
        upload.bytes += plan.size
        return True

    async def _store(
        self,
        partition: str,
        thread_id: str,
        new: New,
        warm: Warm,
        plan: _Plan,
        upload: _Uploading,
        hinted: set[Any],
    ) -> CheckpointBody | None:
        """Write the checkpoint, with those of its pieces that are new. None: refused."""
        head = plan.head
        skeleton = new.cut.skeleton(plan.placed)
        now = self.store.clock()
        body = self._body(head, new, skeleton, upload.bytes + plan.size, now)
        if self.places is not None and body.id not in hinted:
            hinted.add(body.id)
            await self.put_hints(thread_id, body)
        change = self._change(warm, head, plan.numbers, new, body, now)
        if upload.version:
            del change.head.p[upload.id]
            spare = subtract(upload.spans, self.spans(partition, body))
            change.head.dr = union([*change.head.dr, *spare])
            plan.ops.append(Delete(PENDING + upload.id, upload.version))
        pieces = (Put(piece_key(plan.placed[index]), new.cut.texts[index]) for index in plan.fresh)
        ops = [Put(HEAD, pack(change.head), plan.version), *change.ops, *pieces, *plan.ops]
        version = await self.store.coalescer.write(partition, ops)
        if not version:
            await self._remove_hints(self.hints(body, thread_id))
            return None
        upload.forget()
        warm.head, warm.version, warm.kept, warm.g = change.head, version, change.kept, head.g
        self._remember(partition, warm, new.cut, plan.placed, change.gone)
        # The checkpoint is stored; what cannot be removed now, `repair` will.
        with suppress(UnavailableError, OutcomeUnknownError):
            await self._remove_hints(change.hints)
            if change.head.dr or change.head.sw:
                await self._clean_up(partition, warm)
        return body

    async def _look(self, partition: str, thread_id: str, warm: Warm, new: New) -> HeadBody:
        """Read the head, and find out the numbers of the pieces of the state that the next one resembles."""
        texts: dict[int, bytes] = {}
        if new.parent is None:
            entry, texts = await self.first_page(partition, at_hand=bool(warm.numbers()))
            parents = []
        else:
            keys = [Key(partition, HEAD), Key(partition, checkpoint_key(new.parent))]
            entry, *parents = await self.store.coalescer.get(keys)
        if entry is None:
            if new.parent is not None:
                raise _no_checkpoint(new.parent, partition)
            warm.kept, warm.version = [], ABSENT
            warm.head = HeadBody(id=thread_id, g=self.store.ids(), at=self.store.clock())
            warm.belongs_to(warm.head)
            return warm.head
        head = self.head(partition, entry)
        warm.belongs_to(head)
        bodies = [] if head.l is None else [head.l]
        if new.parent is not None and not _is_latest(head, new.parent):
            parent = self.chosen(partition, [entry, *parents], new.parent)
            if parent is None:
                raise _no_checkpoint(new.parent, partition)
            bodies.append(parent)
        spans = union(span for body in bodies for span in self.spans(partition, body))
        there = {number for first, last in spans for number in range(first, last + 1)}
        known = {text: number for text, number in warm.numbers().items() if number in there}
        known.update((digest(text), number) for number, text in texts.items() if number in there)
        missing = runs(there.difference(known.values()))

        async def learn() -> None:
            async for entries in self.pages(partition, missing):
                for entry in entries:
                    known[digest(entry.value)] = number_of(partition, entry.key)

        _, warm.kept = await asyncio.gather(learn(), self._kept(partition, head, new))
        warm.head, warm.version, warm.known = head, entry.version, known
        return head

    async def _kept(self, partition: str, head: HeadBody, new: New) -> list[Kept] | None:
        """Return all checkpoints, oldest first, if a put will exceed the cap, so that some must go."""
        if new.cap is None or head.k < new.cap:
            return None
        return [self.kept_of(found, head.id) for found in await self.listed(partition, head)]

    def _body(self, head: HeadBody, new: New, skeleton: bytes, written: int, now: int) -> CheckpointBody:
        id = self.store.ids()
        if id <= head.i:
            id = _id_after(head.i)
        body = CheckpointBody(
            id=id,
            at=now if new.at is None else new.at,
            n=head.o + 1,
            s=Raw(skeleton),
            z=new.cut.size,
            b=written,
            parent=new.parent if new.parent is not None else None if head.l is None else head.l.id,
            labels=list(new.labels),
            run=new.run,
            ver=new.version,
            x=new.fields or {},
        )
        if new.metadata is not None:
            body.v, body.t = Raw(new.metadata[0]), new.metadata[1]
        body.b += len(checkpoint_key(id)) + len(pack(body))
        return body

    def _change(
        self, warm: Warm, head: HeadBody, numbers: Numbers, new: New, body: CheckpointBody, now: int
    ) -> _Change:
        """Return the head after a put, and the ops beside it, with what the cap removes."""
        after_put = replace(
            head,
            n=numbers.n,
            blocks=numbers.blocks,
            open=list(numbers.open.items()),
            i=body.id,
            o=body.n,
            k=head.k + 1,
            l=body,
            up=now,
            p=dict(head.p),
            e=head.e if new.expires_at is None else new.expires_at,
        )
        ops: list[Op] = [Put(checkpoint_key(body.id), pack(body))]
        if new.cap is None or warm.kept is None:
            return _Change(after_put, ops, None, [], [])
        kept = [*warm.kept, self.kept_of(Found(body.id, body), head.id)]
        if len(kept) <= new.cap:
            return _Change(after_put, ops, kept, [], [])
        victims, kept = kept[: len(kept) - new.cap], kept[len(kept) - new.cap :]
        after_put.k = len(kept)
        if not kept:
            after_put.l = None
        gone = _only(victims, kept)
        after_put.fl = victims[-1].id
        if len(victims) <= _REMOVED_AT_ONCE:
            ops += [Delete(checkpoint_key(victim.id)) for victim in victims if victim.id != body.id]
            if victims[-1].id == body.id:
                ops = ops[1:]
        else:
            after_put.sw = True
        if count(gone) <= _REMOVED_AT_ONCE and kept:
            ops += [Delete(piece_key(number)) for first, last in gone for number in range(first, last + 1)]
        else:
            # More would not fit into the head; `repair` removes the rest.
            after_put.dr = union([*after_put.dr, *gone])[:RUNS_AT_ONCE]
        return _Change(after_put, ops, kept, [key for victim in victims for key in victim.hints], gone)

    async def _give_up(self, partition: str, upload_id: str) -> None:
        with suppress(PersistenceError):  # the caller has an error already; what is left, `repair` finds
            await self.abandon(partition, upload_id)

    async def abandon(self, partition: str, upload_id: str) -> None:
        """Give up an upload: what it wrote is dead."""

        async def end(head: HeadBody) -> tuple[HeadBody, list[Op]] | None:
            if upload_id not in head.p:
                return None
            dead = union([*head.dr, *head.p[upload_id].spans])
            rest = {id: upload for id, upload in head.p.items() if id != upload_id}
            # Of a copy there may be checkpoints, too.
            return replace(head, p=rest, dr=dead, sw=head.sw or bool(head.fl)), [Delete(PENDING + upload_id)]

        if await self._edit(partition, end):
            await self.clean(partition)

    async def delete(self, thread_id: str) -> int:
        """Delete a thread, at once, if need be without its head; return how many checkpoints that removed."""
        partition = self.partition(thread_id)
        try:
            return await self._delete(partition, lambda head: True)
        except CorruptRecordError:
            await self._replace_head(partition, thread_id)
            return await self._delete(partition, lambda head: True)

    async def delete_expired(self, partition: str) -> int:
        """Delete the thread of `partition` if it has expired; return how many checkpoints that removed."""
        return await self._delete(partition, lambda head: head.e is not None and head.e <= self.store.clock())

    async def _delete(self, partition: str, wanted: Callable[[HeadBody], bool]) -> int:
        async with self._warm_of(partition).lock:
            removed = 0
            hints: list[Key] = []
            listed: list[tuple[Key, Entry | None]] = []

            async def bury(head: HeadBody) -> tuple[HeadBody, list[Op]] | None:
                nonlocal removed, hints, listed
                if head.gone is not None or not (head.holds_any() or head.p) or not wanted(head):
                    return None
                removed = head.k
                key = Key(self.listing.partition, self.thread_hint(head))
                listed = [(key, entry) for entry in await self.store.coalescer.get([key])]
                if self.places is not None:
                    found = await self.listed(partition, head)
                    hints = [
                        key for one in found if one.body is not None for key in self.hints(one.body, head.id)
                    ]
                uploads: list[Op] = [Delete(PENDING + id) for id in head.p]
                return replace(_restarted(head, head.at), gone=self.store.clock()), uploads

            if not await self._edit(partition, bury):
                return 0
            await self.clean(partition)
            await self._remove_hints(hints)
            for key, entry in listed:
                if entry is not None:  # refused: begun anew meanwhile
                    delete = Delete(key.key, entry.version)
                    await self.store.coalescer.write(key.partition, [delete], hint=True)
            return removed

    async def _replace_head(self, partition: str, thread_id: str) -> None:
        """Put a head that knows what lies in the thread in the place of one that cannot be read."""
        coalescer = self.store.coalescer
        (entry,) = await coalescer.get([Key(partition, HEAD)])
        if entry is None:
            return
        with suppress(CorruptRecordError):
            self.head(partition, entry)
            return  # it can: somebody has put another one meanwhile
        head = HeadBody(id=thread_id, g=self.store.ids(), at=self.store.clock())
        found = await self.listed(partition, head)
        for start, end in ((PIECE, piece_key(BLOCKS)), (piece_key(BLOCKS), prefix_end(PIECE))):
            for last in (await coalescer.scan(partition, start, end, limit=1, reverse=True)).entries:
                number = number_of(partition, last.key)
                if number < BLOCKS:
                    head.n = number
                else:
                    head.blocks = (number - BLOCKS) // BLOCK + 1
        head.k, head.i = len(found), found[-1].id if found else ""
        head.o = max((one.body.n for one in found if one.body is not None), default=len(found))
        uploads = [Delete(PENDING + id) for id in await coalescer.names(partition, PENDING)]
        self.forget(partition)
        await coalescer.write(partition, [Put(HEAD, pack(head), entry.version), *uploads])

    async def remove(
        self,
        thread_id: str,
        choose: Callable[[list[Found]], Iterable[str]],
        *,
        dry_run: bool = False,
    ) -> tuple[int, int]:
        """Remove the checkpoints that `choose` names of all; return how many, and how many pieces went along.

        Each Write removes some whole, with what only they needed.
        """
        partition = self.partition(thread_id)
        removed = pieces = 0
        at_once = _REMOVED_AT_ONCE
        tries = Tries(partition)
        version = ABSENT  # of the head that `found` is about; whoever changes the thread puts another
        async with self._warm_of(partition).lock:
            while True:
                if not version:
                    stored, version = await self.stored_head(partition)
                    if stored is None or not self.alive(stored, self.store.clock()):
                        return removed, pieces
                    head = stored
                    found = await self.listed(partition, head)
                chosen = set(choose(found))
                victims = [one for one in found if one.id in chosen]
                if not victims:
                    return removed, pieces
                if not dry_run:
                    victims = victims[:at_once]
                ids = {one.id for one in victims}
                kept = [one for one in found if one.id not in ids]
                leaving = [self.kept_of(one, head.id) for one in victims]
                gone = _only(leaving, [self.kept_of(one, head.id) for one in kept])
                if dry_run:
                    return len(victims), count(gone)
                if len(gone) > RUNS_AT_ONCE and len(victims) > 1:
                    at_once = len(victims) // 2
                    continue
                latest = next((one.body for one in reversed(kept) if one.body is not None), None)
                if head.l is not None and kept and kept[-1].id == head.l.id:
                    latest = head.l  # whole, whatever became of its own entry
                left = replace(head, k=len(kept), l=latest, up=self.store.clock())
                ops: list[Op] = [Delete(checkpoint_key(one.id)) for one in victims]
                if count(gone) <= _REMOVED_AT_ONCE:
                    ops += [Delete(piece_key(n)) for first, last in gone for n in range(first, last + 1)]
                else:
                    left.dr = union([*left.dr, *gone])
                self.forget(partition)
                version = await self.store.coalescer.write(partition, [Put(HEAD, pack(left), version), *ops])
                if not version:
                    await tries.another()
                    continue
                tries = Tries(partition)  # each Write has its own time: there may be many
                removed += len(victims)
                pieces += count(gone)
                await self._remove_hints(key for one in leaving for key in one.hints)
                head, version = await self._cleaned(partition, left, version)
                found = kept

    async def clean(self, partition: str) -> None:
        """Purge what the head says is gone, and then say so no more."""
        head, _ = await self.stored_head(partition)
        if head is None or not (head.dr or head.sw):
            return
        await self._purge(partition, head)
        dead, floor = head.dr, head.fl

        async def cleaned(head: HeadBody) -> tuple[HeadBody, list[Op]] | None:
            return replace(head, dr=subtract(head.dr, dead), sw=head.sw and head.fl != floor), []

        await self._edit(partition, cleaned)

    async def _clean_up(self, partition: str, warm: Warm) -> None:
        """Do what `clean` does, for a writer that knows the head."""
        if warm.head is not None:
            head, warm.version = await self._cleaned(partition, warm.head, warm.version)
            warm.head = head if warm.version else None

    async def _cleaned(self, partition: str, head: HeadBody, version: int) -> tuple[HeadBody, int]:
        """Do what `clean` does after `head`; return the one that is there then, `ABSENT` if another's."""
        if not (head.dr or head.sw):
            return head, version
        await self._purge(partition, head)
        cleaned = replace(head, dr=[], sw=False)
        version = await self.store.coalescer.write(partition, [Put(HEAD, pack(cleaned), version)])
        if not version:
            await self.clean(partition)
        return cleaned, version

    async def _purge(self, partition: str, head: HeadBody) -> None:
        purge = self.store.coalescer.purge
        if head.sw:
            await purge(partition, CHECKPOINT, after(checkpoint_key(head.fl)))
        # Many short runs go by the Write: a call for each would take as long as all the rest.
        short = [span for span in head.dr if count([span]) <= _SHORT_RUN] if len(head.dr) > _FEW_RUNS else []
        numbers = [number for first, last in short for number in range(first, last + 1)]
        for at in range(0, len(numbers), _WRITE_PIECES):
            deletes = [Delete(piece_key(number)) for number in numbers[at : at + _WRITE_PIECES]]
            await self.store.coalescer.write(partition, deletes, hint=True)
        for first, last in subtract(head.dr, short):
            await purge(partition, piece_key(first), piece_key(last + 1))

    async def _edit(
        self,
        partition: str,
        change: Callable[[HeadBody], Awaitable[tuple[HeadBody, list[Op]] | None]],
    ) -> bool:
        """Change the head, with the ops that belong to it, until nobody interferes. False: no change."""
        tries = Tries(partition)
        while True:
            head, version = await self.stored_head(partition)
            if head is None:
                return False
            changed = await change(head)
            if changed is None:
                return False
            self.forget(partition)
            ops = [Put(HEAD, pack(changed[0]), version), *changed[1]]
            if await self.store.coalescer.write(partition, ops):
                return True
            await tries.another()

    async def relabel(self, thread_id: str, checkpoint_id: str, labels: Sequence[str]) -> CheckpointBody:
        """Replace the labels of a checkpoint."""
        partition = self.partition(thread_id)
        tries = Tries(partition)
        while True:
            key = checkpoint_key(checkpoint_id)
            entries = await self.store.coalescer.get([Key(partition, HEAD), Key(partition, key)])
            body = self.chosen(partition, entries, checkpoint_id)
            if body is None or entries[0] is None:
                raise _no_checkpoint(checkpoint_id, partition)
            head = self.head(partition, entries[0])
            changed = replace(body, labels=list(labels))
            if head.l is not None and head.l.id == checkpoint_id:
                head.l = changed
            self.forget(partition)
            ops = [Put(HEAD, pack(head), entries[0].version), Put(key, pack(changed))]
            if await self.store.coalescer.write(partition, ops):
                return changed
            await tries.another()

    async def expire(self, thread_id: str, expires_at: int | None) -> bool:
        """Set or take away the time at which a thread expires. False: there is no such thread."""
        partition = self.partition(thread_id)
        if expires_at is not None:
            await self.deadlines.put(partition, expires_at)

        async def change(head: HeadBody) -> tuple[HeadBody, list[Op]] | None:
            if not self.alive(head, self.store.clock()):
                return None
            return replace(head, e=expires_at), []

        return await self._edit(partition, change)

    async def fork(self, thread_id: str, new: New, source_id: str) -> CheckpointBody:
        """Put a child of checkpoint `source_id` with the very same state: a reference, no data."""
        partition = self.partition(thread_id)
        tries = Tries(partition)
        async with self._warm_of(partition).lock:
            while True:
                key = checkpoint_key(source_id)
                entries = await self.store.coalescer.get([Key(partition, HEAD), Key(partition, key)])
                source = self.chosen(partition, entries, source_id)
                if source is None or entries[0] is None:
                    raise _no_checkpoint(source_id, partition)
                warm = Warm()
                warm.head = head = self.head(partition, entries[0])
                warm.version = entries[0].version
                warm.kept = await self._kept(partition, head, new)
                now = self.store.clock()
                body = self._child(head, new, source, now)
                if self.places is not None:
                    await self.put_hints(thread_id, body)
                change = self._change(warm, head, Numbers(head.n, head.blocks, head.open), new, body, now)
                ops = [Put(HEAD, pack(change.head), warm.version), *change.ops]
                self.forget(partition)
                if await self.store.coalescer.write(partition, ops):
                    await self._remove_hints(change.hints)
                    if change.head.dr or change.head.sw:
                        await self.clean(partition)
                    return body
                await tries.another()

    def _child(self, head: HeadBody, new: New, source: CheckpointBody, now: int) -> CheckpointBody:
        """Return a checkpoint of the same state as `source`."""
        body = self._body(head, new, bytes(source.s), 0, now)
        body.z, body.parent = source.z, source.id
        body.ver, body.x = source.ver, source.x
        body.b = len(checkpoint_key(body.id)) + len(pack(body))
        return body

    async def copy(
        self, source_thread: str, thread_id: str, checkpoint_id: str | None, child: New | None = None
    ) -> list[CheckpointBody]:
        """Copy a thread, or one checkpoint of it, to a thread that does not exist.

        Returns the checkpoints. The copy shares nothing with its source. `child`
        is put after the last of them, with the same state. The head comes last:
        without it, nothing was copied.
        """
        source, target = self.partition(source_thread), self.partition(thread_id)
        for attempt in range(_COPY_TRIES):
            keys = [HEAD] if checkpoint_id is None else [HEAD, checkpoint_key(checkpoint_id)]
            entry, *only = await self.store.coalescer.get([Key(source, key) for key in keys])
            head = None if entry is None else self.head(source, entry)
            if head is None or not self.alive(head, self.store.clock()):
                message = f"no thread {source_thread!r}"
                raise NotFoundError(message, partition=source)
            if checkpoint_id is None:
                # Later ones have numbers that this head has not given out.
                found = [one for one in await self.listed(source, head) if one.id <= head.i]
            else:
                found = [self._found(source, one) for one in only if one and checkpoint_id > head.fl]
                if not found:
                    raise _no_checkpoint(checkpoint_id, source)
            if not found:  # all were removed since the head was read
                await backoff(attempt)
                continue
            bodies = []
            for one in found:
                if one.body is None:
                    message = f"checkpoint {one.id} cannot be copied: {one.error}"
                    raise CorruptRecordError(message, partition=source, key=checkpoint_key(one.id))
                bodies.append(one.body)
            return await self._copy(source, head, bodies, thread_id, target, child)
        message = "the thread was changed again and again while it was copied"
        raise ConflictError(message, partition=source)

    async def _copy(
        self,
        source: str,
        head: HeadBody,
        bodies: list[CheckpointBody],
        thread_id: str,
        target: str,
        child: New | None,
    ) -> list[CheckpointBody]:
        """Copy the checkpoints, but those that are removed from the source meanwhile; return them."""
        upload_id = self.store.ids()
        spans = union(span for body in bodies for span in self.spans(source, body))
        now = self.store.clock()
        was, expected = await self.stored_head(target)
        if was is not None:
            if self.alive(was, now):
                message = (
                    f"there is a thread {thread_id!r} already"
                    if was.holds_any()
                    else f"a copy to thread {thread_id!r} was begun: if it was interrupted, delete the thread"
                )
                raise ConflictError(message, partition=target)
            # Its numbers may still be known to readers, unless nothing ever came of it.
            if was.o or was.dr or was.sw:
                message = f"the thread id {thread_id!r} was used before"
                raise ConflictError(message, partition=target)
        # The copy keeps the numbers of its source, so that skeletons need not change.
        begun = HeadBody(
            id=thread_id,
            g=upload_id,
            at=now,
            n=head.n,
            blocks=head.blocks,
            open=head.open,
            i=head.i,
            fl=head.i,  # not `sw`: nobody may purge what is about to be put
            p={upload_id: Upload(now, _given_out(head))},  # no others are there: few runs, however these lie
        )
        mark = Put(PENDING + upload_id, pack(Body()), ABSENT)
        version = await self.store.coalescer.write(target, [Put(HEAD, pack(begun), expected), mark])
        if not version:
            message = f"somebody else has begun the thread {thread_id!r}"
            raise ConflictError(message, partition=target)
        mark_version = version
        changed = f"somebody else has changed the thread {thread_id!r}"
        try:
            copied: set[int] = set()
            async for entries in self.pages(source, spans):
                for one in entries:
                    self.store.check_decrypted(source, one)
                copied.update(number_of(source, entry.key) for entry in entries)
                pieces = (Put(entry.key, entry.value) for entry in entries)
                mark_version = await self._put_in_batches(target, upload_id, mark_version, pieces)
                if not mark_version:
                    raise ConflictError(changed, partition=target)
            if len(copied) != count(spans):
                now_head, _ = await self.stored_head(source)
                left = set() if now_head is None else {one.id for one in await self.listed(source, now_head)}
                bodies = [body for body in bodies if body.id in left]
                if not bodies:
                    message = "the checkpoints were removed while they were copied"
                    raise ConflictError(message, partition=source)
            last = head
            made = bodies
            if child is not None:
                body = self._child(head, child, bodies[-1], self.store.clock())
                last = replace(head, i=body.id, o=body.n)  # its id follows those of all copies
                made = [*bodies, body]
                bodies = made if child.cap is None else made[max(0, len(made) - child.cap) :]
            copies = bodies if last is head else [body for body in bodies if body.id != last.i]
            puts = (Put(checkpoint_key(body.id), pack(body)) for body in copies)
            needed = union(span for body in bodies for span in self.spans(source, body))
            if subtract(needed, runs(copied)):
                message = "pieces of a checkpoint are missing"
                raise CorruptRecordError(message, partition=source)
            spare = subtract(spans, needed)
            latest = bodies[-1] if bodies else None
            done = replace(begun, k=len(bodies), i=last.i, o=last.o, l=latest, fl="", dr=spare, p={}, up=now)
            await self.put_thread_hint(thread_id, done)
            mark_version = await self._put_in_batches(target, upload_id, mark_version, puts)
            ops: list[Op] = [Put(HEAD, pack(done), version), Delete(PENDING + upload_id, mark_version)]
            # Not before: the head that announces the copy does not hide it.
            ops += [Put(checkpoint_key(body.id), pack(body)) for body in bodies[len(copies) :]]
            if not (mark_version and await self.store.coalescer.write(target, ops)):
                raise ConflictError(changed, partition=target)
            if self.places is not None:
                for body in bodies:
                    await self.put_hints(thread_id, body)
        except BaseException:
            self.store.coalescer.start(self._give_up(target, upload_id))
            raise
        if spare:
            await self.clean(target)
        return made

    async def _put_in_batches(self, partition: str, upload_id: str, version: int, puts: Iterable[Put]) -> int:
        """Write `puts` as a part of an upload; return the version of its mark, `ABSENT` if it was ended.

        `version` is the mark's. Each Write puts it anew, so that `repair` sees the upload go on.
        """
        mark = Put(PENDING + upload_id, pack(Body()))
        for batch in _batches(puts):
            version = await self.store.coalescer.write(partition, [mark._replace(expect=version), *batch])
            if not version:
                break
        return version

    async def put_hints(self, thread_id: str, body: CheckpointBody) -> None:
        """Put the entries of a checkpoint in its listings."""
        at = self.store.clock()
        hint = pack(HintBody(at=at, id=body.id, of=thread_id))
        await asyncio.gather(
            *(
                self.store.coalescer.write(key.partition, [Put(key.key, hint)], hint=True)
                for key in self.hints(body, thread_id)
            )
        )

    async def _remove_hints(self, keys: Iterable[Key]) -> None:
        # No checkpoint is ever listed again under the same key: whatever is there may go.
        by_partition: dict[str, list[Op]] = {}
        for key in keys:
            by_partition.setdefault(key.partition, []).append(Delete(key.key))
        await asyncio.gather(
            *(
                self.store.coalescer.write(partition, ops[at : at + 500], hint=True)
                for partition, ops in by_partition.items()
                for at in range(0, len(ops), 500)
            )
        )

    async def put_thread_hint(self, thread_id: str, head: HeadBody) -> None:
        """Put the entry of a thread in the listing of all."""
        hint = pack(HintBody(at=self.store.clock(), id=thread_id))
        put = Put(self.thread_hint(head), hint)
        await self.store.coalescer.write(self.listing.partition, [put], hint=True)

    async def delete_all_expired(self) -> int:
        """Delete the threads whose time has come; return how many checkpoints that removed."""
        removed = 0

        async def expire(partition: str) -> bool:
            nonlocal removed
            gone = await self.delete_expired(partition)
            removed += gone
            head, _ = await self.stored_head(partition)
            if head is not None and head.e is not None:
                await self.deadlines.put(partition, head.e)  # not yet: a put has renewed it, within the hour
            return gone > 0

        await self.deadlines.sweep(self.kind, expire)
        return removed


class _Plan(NamedTuple):
    """What a put is going to do: after which head, of which version; the numbers, and the new pieces."""

    head: HeadBody
    version: int
    numbers: Numbers
    placed: list[int]
    fresh: list[int]
    size: int
    ops: list[Op]


class _Change(NamedTuple):
    head: HeadBody
    ops: list[Op]
    kept: list[Kept] | None
    hints: list[Key]
    gone: list[Span]  # pieces


class _Uploading:
    """An upload of this call, if `version` says that it has begun."""

    __slots__ = ("bytes", "id", "known", "spans", "version")

    def __init__(self) -> None:
        self.id = ""
        self.version = ABSENT
        self.spans: list[Span] = []
        self.known: dict[bytes, int] = {}  # its pieces: digest → number
        self.bytes = 0

    def begin(self, plan: _Plan, now: int) -> tuple[HeadBody, list[Span]]:
        """Return the head that reserves numbers for the new pieces, and all numbers of the upload."""
        head, numbers = plan.head, plan.numbers
        spans = union([*self.spans, *runs(plan.placed[index] for index in plan.fresh)])
        pending = {**head.p, self.id: Upload(now, spans)}
        reserved = replace(
            head, n=numbers.n, blocks=numbers.blocks, open=list(numbers.open.items()), p=pending
        )
        return reserved, spans

    def forget(self) -> None:
        """It has ended, or was ended."""
        self.id, self.version, self.spans, self.known, self.bytes = "", ABSENT, [], {}, 0


def _planned(cut: Cut, head: HeadBody, version: int, known: dict[bytes, int]) -> _Plan:
    numbers = Numbers(head.n, head.blocks, head.open)
    large = head.l is not None and len(memoryview(head.l.s)) > _LARGE_SKELETON
    placed, fresh = place(cut, known, numbers, in_pieces=large)
    size = sum(len(cut.texts[index]) for index in fresh) + len(fresh) * len(piece_key(0))
    return _Plan(head, version, numbers, placed, fresh, size, [])


def _batches(puts: Iterable[Put]) -> Iterator[list[Put]]:
    """Yield `puts` in parts that fit into a Write beside others."""
    batch: list[Put] = []
    size = 0
    for put in puts:
        if len(batch) >= _WRITE_PIECES or size + len(put.value) > _WRITE_BYTES:
            yield batch
            batch, size = [], 0
        batch.append(put)
        size += len(put.value)
    if batch:
        yield batch


def _is_latest(head: HeadBody, id: str) -> bool:
    return head.l is not None and head.l.id == id


def _doubt(partition: str, head: HeadBody, new: New) -> PersistenceError | None:
    latest = None if head.l is None else head.l.id
    if new.expected_latest is not None and new.expected_latest != (ABSENT if latest is None else latest):
        message = f"the latest checkpoint is {latest}, not {new.expected_latest!r:.80}"
        return ConflictError(message, partition=partition)
    if new.parent is not None and latest is None:
        return _no_checkpoint(new.parent, partition)
    return None


def _no_checkpoint(id: str, partition: str) -> NotFoundError:
    message = f"no checkpoint {id!r:.80}"
    return NotFoundError(message, partition=partition)


def _restarted(head: HeadBody, now: int) -> HeadBody:
    """Return the head of a thread that begins anew, or is deleted: nothing of it is left but its numbers."""
    return replace(
        head,
        at=now,
        k=0,
        l=None,
        fl=head.i,
        sw=bool(head.i),
        dr=union([*head.dr, *_given_out(head)]),
        p={},
        open=[],
        e=None,
        gone=None,
    )


def _given_out(head: HeadBody) -> list[Span]:
    """Return all numbers that a head has given out."""
    blocks = (BLOCKS, BLOCKS + head.blocks * BLOCK - 1)
    return [span for span in ((1, head.n), blocks) if span[0] <= span[1]]


def _only(victims: Iterable[Kept], kept: Sequence[Kept]) -> list[Span]:
    """Return the pieces that only `victims` need: none, if it cannot be known what the others need."""
    left = union(span for victim in victims for span in victim.spans or ())
    for one in kept:  # the next one needs most of them: what is left to be looked up in the others is little
        if not left or one.spans is None:
            return []
        left = subtract(left, one.spans)
    return left


def _id_after(id: str) -> str:
    """Return a UUIDv7 that follows `id`: a clock is behind the one that made it."""
    number = uuid.UUID(id).int
    stamp = ((number >> 80) << 12 | number >> 64 & 0xFFF) + 1
    number = (stamp >> 12) << 80 | 7 << 76 | (stamp & 0xFFF) << 64 | 2 << 62 | secrets.randbits(62)
    return str(uuid.UUID(int=number))
