"""`repair`, for threads of checkpoints."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import msgspec
from msgspec.structs import replace

from persistence.collection import HintBody
from persistence.driver import MAX_GET_KEYS, Delete, Key, Put
from persistence.errors import CorruptRecordError
from persistence.keys import prefix_end
from persistence.pieces import Span, count, runs, subtract, union
from persistence.store import pack
from persistence.thread_reader import HEAD, PAGE, PENDING, PIECE, Found, HeadBody, checkpoint_key, number_of
from persistence.threads import RUNS_AT_ONCE, Threads

__all__ = ["RepairedThread", "ThreadRepair"]

_UPLOAD_PAUSE = 3.0
"""Seconds in which who is putting a large state puts some of it."""


class RepairedThread(msgspec.Struct):
    """What the repair of a thread did."""

    pieces_removed: int = 0
    uploads_ended: int = 0
    hints_added: int = 0
    expired: bool = False
    forgotten: bool = False
    corrupt: list[str] = msgspec.field(default_factory=list)


class ThreadRepair:
    """Repairs threads of one kind."""

    def __init__(self, threads: Threads, *, dry_run: bool) -> None:
        self._threads = threads
        self._store = threads.store
        self._dry_run = dry_run

    async def repair(self, partition: str, *, before: int) -> RepairedThread:
        """Finish what was left half done in a thread, and remove what nothing needs."""
        done = RepairedThread()
        head, _ = await self._threads.stored_head(partition)
        if head is None:
            return done
        now = self._store.clock()
        if head.gone is None and head.e is not None and head.e <= now:
            done.expired = True
            if not self._dry_run:
                await self._threads.delete_expired(partition)
            return done
        stale = await self._stale_uploads(partition, head)
        done.uploads_ended = len(stale)
        if not self._dry_run:
            for id in stale:
                await self._threads.abandon(partition, id)
            await self._threads.clean(partition)
        head, version = await self._threads.stored_head(partition)
        if head is None:
            return done
        await self._sweep(partition, head, version, done)
        if head.holds_any():
            hint = Key(self._threads.listing.partition, self._threads.thread_hint(head))
            (listed,) = await self._store.coalescer.get([hint])
            if listed is None:
                done.hints_added += 1
                if not self._dry_run:
                    await self._threads.put_thread_hint(head.id, head)
        elif not head.p and not done.pieces_removed and (head.gone or head.up or head.at) < before:
            done.forgotten = True
            if not self._dry_run:
                await self._store.coalescer.write(partition, [Delete(HEAD, version)])
        return done

    async def _stale_uploads(self, partition: str, head: HeadBody) -> list[str]:
        """Return the uploads that do not go on. If their writer was not killed after all, it begins again."""
        if not head.p:
            return []
        marks = [Key(partition, PENDING + id) for id in head.p]
        before = await self._store.coalescer.get(marks)
        await asyncio.sleep(_UPLOAD_PAUSE)
        after = await self._store.coalescer.get(marks)
        return [
            id
            for id, was, now in zip(head.p, before, after, strict=True)
            if (was and was.version) == (now and now.version)
        ]

    async def _sweep(self, partition: str, head: HeadBody, version: int, done: RepairedThread) -> None:
        """Remove the pieces that no checkpoint needs; name the checkpoints that lack any."""
        found = await self._threads.listed(partition, head)
        kept = [self._threads.kept_of(one, head.id) for one in found]
        needed = union(span for one in kept for span in one.spans or ())
        held = union([*needed, *(span for upload in head.p.values() for span in upload.spans)])
        there: list[Span] = []
        async for entries in self._store.coalescer.pages(partition, PIECE, prefix_end(PIECE), limit=PAGE):
            there = union([*there, *runs(number_of(partition, entry.key) for entry in entries)])
        done.corrupt = [one.error for one in found if one.body is None]
        (now,) = await self._store.coalescer.get([Key(partition, HEAD)])
        if now is None or now.version != version:
            return  # it has changed while we read it: what is missing may have been removed
        done.corrupt += [
            f"pieces of a checkpoint are missing [{partition} · {checkpoint_key(one.id)}]"
            for one in kept
            if one.spans and subtract(one.spans, there)
        ]
        if self._threads.places is not None:
            await self._put_missing_hints(head.id, found, done)
        if any(one.spans is None for one in kept):
            return  # nobody knows what it needs
        spare = subtract(there, held)[:RUNS_AT_ONCE]  # the next repair goes on
        wrong = len(found) != head.k
        done.pieces_removed = count(spare)
        if self._dry_run or not (spare or wrong):
            return
        # Refused: the thread has changed after all; the next repair will find what is left.
        left = replace(head, dr=union([*head.dr, *spare]), k=len(found))
        if await self._store.coalescer.write(partition, [Put(HEAD, pack(left), version)]):
            self._threads.forget(partition)
            await self._threads.clean(partition)

    async def _put_missing_hints(self, thread_id: str, found: Sequence[Found], done: RepairedThread) -> None:
        readable = [one.body for one in found if one.body is not None]
        for at in range(0, len(readable), PAGE):
            hints = {
                key: body for body in readable[at : at + PAGE] for key in self._threads.hints(body, thread_id)
            }
            entries = await self._store.coalescer.get(list(hints))
            missing = [body for body, entry in zip(hints.values(), entries, strict=True) if entry is None]
            done.hints_added += len(missing)
            if not self._dry_run:
                for body in {body.id: body for body in missing}.values():
                    await self._threads.put_hints(thread_id, body)

    async def sweep_hints(self, partition: str, *, before: int) -> int:
        """Remove the entries of a listing, older than `before`, that match nothing; return how many."""
        removed = 0
        async for entries in self._store.coalescer.pages(partition, "", None, limit=MAX_GET_KEYS // 2):
            hints = [(e, self._store.unpack(self._threads.hint_decoder, partition, e)) for e in entries]
            hints = [(entry, hint) for entry, hint in hints if hint.at < before]
            # All at once: that is one `get`.
            right = await asyncio.gather(
                *(self._listed_rightly(partition, entry.key, hint) for entry, hint in hints)
            )
            for (entry, _), is_right in zip(hints, right, strict=True):
                if not is_right:
                    removed += 1
                    if not self._dry_run:
                        delete = Delete(entry.key, entry.version)
                        await self._store.coalescer.write(partition, [delete], hint=True)
        return removed

    async def _listed_rightly(self, partition: str, key: str, hint: HintBody) -> bool:
        if partition == self._threads.listing.partition:
            head = await self._threads.live_head(hint.id)
            return head is not None and self._threads.thread_hint(head) == key
        try:
            body = await self._threads.find(hint.of, hint.id)
        except CorruptRecordError:
            return True  # it is there
        return body is not None and Key(partition, key) in self._threads.hints(body, hint.of)
