"""Threads of checkpoints: one partition each, changed only together with its head.

====================  ==========================================================
``head``              the last number and id given out, how many checkpoints
                      there are, and the latest of them, whole
``checkpoint/<id>``   a checkpoint: its skeleton (`persistence.pieces`) and what
                      is known about it; ids rise in the order of the commits
``piece/<number>``    a piece of a state
``pending/<id>``      an upload under way, of a state too large for one Write
====================  ==========================================================

Every Write that adds or removes anything puts ``head`` under the version that
its writer had read, so no two of them cross, and no number is given out twice.
An upload is the exception: its head reserves numbers for it, and its Writes
check ``pending/<id>``, which goes when the upload ends or the thread is deleted.

A writer remembers the head and the numbers of the pieces of the latest state,
so its next put is one Write. If somebody else wrote meanwhile it is refused,
reads what changed, and tries again.

Numbers. The pieces that a list gains, put by put, should be one run of numbers
in the skeleton, though other parts of the state gain pieces between them. So a
list that grows gets a *block* of numbers of its own; everything else is
numbered in one sequence.

Removing. A piece goes when no checkpoint that is kept names it, in the same
Write as the last checkpoint that did. What is too much for a Write is noted in
the head as dead (numbers in `dr`, checkpoints up to `fl`), and then purged.
"""

from __future__ import annotations

import asyncio
import secrets
import uuid
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from operator import ne
from typing import Any, Final, NamedTuple

import msgspec
from msgspec import Raw
from msgspec.structs import replace

from persistence import codec
from persistence.coalescer import backoff
from persistence.collection import HintBody, Place
from persistence.driver import ABSENT, MAX_GET_KEYS, Check, Delete, Entry, Key, Op, Put
from persistence.errors import (
    ConflictError,
    CorruptRecordError,
    NotFoundError,
    PersistenceError,
    UnavailableError,
)
from persistence.keys import after, encode_id, newest_first, number_key, prefix_end
from persistence.pieces import Cut, Span, assemble, count, covered, digest, runs, spans_of, subtract, union
from persistence.store import Body, Store, pack

__all__ = ["CheckpointBody", "Found", "HeadBody", "New", "RepairedThread", "Threads", "Upload"]

HEAD: Final = "head"
CHECKPOINT: Final = "checkpoint/"
PIECE: Final = "piece/"
PENDING: Final = "pending/"
DEADLINES: Final = "index/deadlines"

UPLOAD_AGE_MS: Final = 3_600_000
"""An upload older than this is given up by `repair`."""

_END = "head!"  # after the head, which comes after the checkpoints: one scan reads both
_CONTENTION_SECONDS = 10.0
_READ_TRIES = 6
_PAGE = 1_000
_PIECES_PAGE = 4_000  # a page ends at 4 MiB anyway
_SEGMENTS_AT_ONCE = 8

_WRITE_PIECES = 500  # pieces that travel in the Write of their checkpoint
_WRITE_BYTES = 3 << 20
_REMOVED_AT_ONCE = 200  # checkpoints, and as many pieces, that one Write removes

_BLOCKS: Final = 500_000_000_000  # numbers from here on lie in blocks
_BLOCK: Final = 100_000
_OPEN_BLOCKS = 16
_GROWING = 4  # pieces that a list must have before it gets a block

_WARM_THREADS = 2_000  # threads that a writer remembers,
_WARM_PIECES = 300_000  # and pieces of them all
_FRAGMENTS = 128  # runs in a skeleton from which on it pays to store a state anew, in one run


class CheckpointBody(Body):
    """A checkpoint. `v` is its metadata."""

    id: str
    at: int  # created, milliseconds
    n: int  # place in the order of the thread's commits, from 1
    s: Raw  # the skeleton
    z: int  # bytes of the state as JSON
    b: int  # bytes stored on its account
    parent: str | None = None
    labels: list[str] = msgspec.field(default_factory=list)
    run: str | None = None
    ver: Any = None
    x: dict[str, str] = msgspec.field(default_factory=dict)  # what a view adds (agent, session, name …)


class Upload(msgspec.Struct, array_like=True, frozen=True):
    """An upload under way: since when, and the numbers that are its own."""

    at: int
    spans: list[Span]


class HeadBody(Body):
    """The head of a thread; without `l` there is no checkpoint, and for readers no thread."""

    id: str
    at: int  # when the thread began
    up: int = 0  # when it last changed
    o: int = 0  # checkpoints ever put
    k: int = 0  # checkpoints there are
    i: str = ""  # the last id given out
    n: int = 0  # the last number given out, and those in blocks:
    blocks: int = 0
    open: list[Span] = msgspec.field(default_factory=list)  # block and its last number, the last used last
    l: CheckpointBody | None = None  # noqa: E741 - names in stored objects are short
    fl: str = ""  # checkpoints up to this id are gone
    sw: bool = False  # and some of them may still have to be removed
    dr: list[Span] = msgspec.field(default_factory=list)  # numbers of pieces that are gone, likewise
    p: dict[str, Upload] = msgspec.field(default_factory=dict)
    e: int | None = None  # when the thread expires
    gone: int | None = None  # when it was deleted


class _Piece(msgspec.Struct):
    f: int
    v: Any
    t: bool = False


class Found(NamedTuple):
    """A checkpoint that was listed; without a body it is corrupt, and `error` says how."""

    id: str
    body: CheckpointBody | None
    error: str = ""


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


class RepairedThread(msgspec.Struct):
    """What the repair of a thread did."""

    pieces_removed: int = 0
    checkpoints_removed: int = 0
    uploads_ended: int = 0
    hints_added: int = 0
    expired: bool = False
    forgotten: bool = False
    corrupt: list[str] = msgspec.field(default_factory=list)


class _Kept(NamedTuple):
    id: str
    spans: list[Span] | None  # None: it cannot be read
    hints: list[Key]


class _Warm:
    """What a writer remembers of a thread."""

    __slots__ = ("head", "kept", "known", "lock", "version")

    def __init__(self) -> None:
        self.lock = asyncio.Lock()
        self.head: HeadBody | None = None
        self.version = ABSENT
        self.known: dict[bytes, int] = {}  # digest → number, of pieces that are there
        self.kept: list[_Kept] | None = None  # all checkpoints, oldest first


class _MissingPieceError(CorruptRecordError):
    """A piece is gone: the checkpoint was removed meanwhile (look again), or it is corrupt."""


class _Numbers:
    """Gives out numbers after those of a head."""

    def __init__(self, head: HeadBody) -> None:
        self.n = head.n
        self.blocks = head.blocks
        self.open = dict(head.open)

    def next(self) -> int:
        self.n += 1
        return self.n

    def after(self, last: int, pieces: int) -> int:
        """Return a number for what follows piece `last` in a list of so many: the next, if it is free."""
        if last >= _BLOCKS:
            block, place = divmod(last - _BLOCKS, _BLOCK)
            if self.open.get(block) == last and place + 1 < _BLOCK:
                del self.open[block]
                self.open[block] = last + 1
                return last + 1
        elif last == self.n:
            return self.next()
        if pieces < _GROWING:
            return self.next()
        number = _BLOCKS + self.blocks * _BLOCK
        self.open[self.blocks] = number
        self.blocks += 1
        if len(self.open) > _OPEN_BLOCKS:
            del self.open[next(iter(self.open))]
        return number


class Threads:
    """The threads of one kind. `places` says where each checkpoint is listed, if anywhere."""

    def __init__(
        self,
        store: Store,
        kind: str,
        listing: str,
        places: Callable[[CheckpointBody, str], Sequence[Place]] | None = None,
    ) -> None:
        self.store = store
        self.kind = kind
        self.listing = Place(listing)
        self.places = places
        self.heads = msgspec.json.Decoder(HeadBody)
        self.bodies = msgspec.json.Decoder(CheckpointBody)
        self.hint_decoder = msgspec.json.Decoder(HintBody)
        self._pieces = msgspec.json.Decoder(list[_Piece])
        self._warm: OrderedDict[str, _Warm] = OrderedDict()
        self._warm_pieces = 0
        self._seen: OrderedDict[str, list[Span]] = OrderedDict()  # pieces of the latest

    def partition(self, thread_id: str) -> str:
        """Return the partition of a thread."""
        return f"{self.kind}/{encode_id(thread_id, 'thread_id')}"

    # ---- putting

    async def put(self, thread_id: str, new: New) -> CheckpointBody:
        """Store a checkpoint. One round trip for a writer that knows the thread, three for any other."""
        partition = self.partition(thread_id)
        warm = self._warm_of(partition)
        async with warm.lock:
            before = len(warm.known)
            upload = _Uploading(self.store.ids())
            try:
                return await self._put(partition, thread_id, new, warm, upload)
            except BaseException:
                warm.head = None  # the Write may have been applied
                if upload.version:
                    self.store.coalescer.start(self._abandon(partition, upload.id))
                raise
            finally:
                self._warm_pieces += len(warm.known) - before
                self._cool()

    async def _put(
        self, partition: str, thread_id: str, new: New, warm: _Warm, upload: _Uploading
    ) -> CheckpointBody:
        deadline = asyncio.get_running_loop().time() + _CONTENTION_SECONDS
        attempt = 0
        looked = False
        listed: int | None = None
        hinted = ""
        while True:
            found = warm.head
            if found is None or (new.parent is not None and not looked and not _is_latest(found, new.parent)):
                found = await self._look(partition, thread_id, warm, new)
                looked = True
            version = warm.version
            now = self.store.clock()
            head = found
            if not self._alive(head, now):
                head = _restarted(head, now)
                warm.known, warm.kept = {}, []
            doubt = _doubt(partition, head, new)
            if doubt is not None:
                if looked:
                    raise doubt
                warm.head = None
                continue
            if new.cap is not None and head.k + 1 > new.cap and warm.kept is None:
                warm.kept = [self._kept(one, head.id) for one in await self.listed(partition, head)]
            if upload.version and upload.id not in head.p:
                upload.forget()  # the thread was deleted meanwhile, or repair found the upload too old
            numbers = _Numbers(head)
            placed, fresh = _place(new.cut, {**warm.known, **upload.known}, numbers)
            expires_at = head.e if new.expires_at is None else new.expires_at
            if listed != head.at and head.l is None:
                await asyncio.gather(
                    self._put_thread_hint(thread_id, head), self._put_deadline(partition, expires_at)
                )
                listed = head.at
            elif expires_at is not None and (head.e is None or _hour(expires_at) != _hour(head.e)):
                await self._put_deadline(partition, expires_at)
            ended: list[Op] = [Delete(PENDING + id) for id in found.p if id not in head.p]
            size = sum(len(new.cut.texts[index]) for index in fresh)
            if size > _WRITE_BYTES or len(fresh) > _WRITE_PIECES:
                upload.begin(head, numbers, runs(placed[index] for index in fresh), self.store.clock())
                mark = Put(PENDING + upload.id, pack(Body()), upload.version)
                ops = [Put(HEAD, pack(upload.head), version), mark, *ended]
                warm.version = await self.store.coalescer.write(partition, ops)
                if warm.version:
                    warm.head, upload.version = upload.head, warm.version
                    check = Check(PENDING + upload.id, upload.version)
                    puts = (Put(_piece_key(placed[index]), new.cut.texts[index], ABSENT) for index in fresh)
                    if await self._put_in_batches(partition, check, puts):
                        upload.known.update((new.cut.digests[index], placed[index]) for index in fresh)
                        upload.bytes += size + len(fresh) * len(_piece_key(0))
                        continue
            else:
                written = upload.bytes + size + len(fresh) * len(_piece_key(0))
                body = self._body(head, new, new.cut.skeleton(placed), written, now)
                if self.places is not None and hinted != body.id:
                    await self._put_hints(thread_id, body)
                    hinted = body.id
                change = self._change(warm, head, numbers, new, body, now)
                if upload.version:
                    del change.head.p[upload.id]
                    spare = subtract(upload.spans, self.spans(partition, body))
                    change.head.dr = union([*change.head.dr, *spare])
                    ended.append(Delete(PENDING + upload.id, upload.version))
                pieces = (Put(_piece_key(placed[index]), new.cut.texts[index], ABSENT) for index in fresh)
                ops = [Put(HEAD, pack(change.head), version), *change.ops, *pieces, *ended]
                warm.version = await self.store.coalescer.write(partition, ops)
                if warm.version:
                    upload.forget()
                    warm.head, warm.kept = change.head, change.kept
                    warm.known = dict(zip(new.cut.digests, placed, strict=True)) if change.head.l else {}
                    self._saw(partition, body)
                    await self._remove_hints(change.hints)
                    if change.head.dr or change.head.sw:
                        await self._clean_up(partition, warm)
                    return body
            warm.head = None
            await self._pause(partition, attempt, deadline)
            attempt += 1

    async def _pause(self, partition: str, attempt: int, deadline: float) -> None:
        if asyncio.get_running_loop().time() > deadline:
            message = f"other writers were faster for {_CONTENTION_SECONDS:.0f} seconds"
            raise UnavailableError(message, partition=partition)
        if attempt:
            await backoff(attempt - 1)

    async def _look(self, partition: str, thread_id: str, warm: _Warm, new: New) -> HeadBody:
        """Read the head, and find out the numbers of the pieces of the state that the next one resembles."""
        keys = [Key(partition, HEAD)]
        if new.parent is not None:
            keys.append(Key(partition, _checkpoint_key(new.parent)))
        entry, *parents = await self.store.coalescer.get(keys)
        if entry is None:
            if new.parent is not None:
                raise _no_checkpoint(new.parent, partition)
            warm.known, warm.kept, warm.version = {}, [], ABSENT
            warm.head = HeadBody(id=thread_id, at=self.store.clock())
            return warm.head
        head = self.head(partition, entry)
        bodies = [] if head.l is None else [head.l]
        if new.parent is not None and not _is_latest(head, new.parent):
            parent = self.chosen(partition, [entry, *parents], new.parent)
            if parent is None:
                raise _no_checkpoint(new.parent, partition)
            bodies.append(parent)
        spans = union(span for body in bodies for span in self.spans(partition, body))
        there = {number for first, last in spans for number in range(first, last + 1)}
        known = {text: number for text, number in warm.known.items() if number in there}
        missing = runs(there.difference(known.values()))

        async def learn() -> None:
            async for entries in self._pages(partition, missing):
                for entry in entries:
                    known[digest(entry.value)] = _number(partition, entry.key)

        warm.kept = None
        if new.cap is not None and head.k + 1 > new.cap:
            _, found = await asyncio.gather(learn(), self.listed(partition, head))
            warm.kept = [self._kept(one, head.id) for one in found]
        else:
            await learn()
        warm.head, warm.version, warm.known = head, entry.version, known
        return head

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
        body.b += len(_checkpoint_key(id)) + len(pack(body))
        return body

    def _change(
        self, warm: _Warm, head: HeadBody, numbers: _Numbers, new: New, body: CheckpointBody, now: int
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
        ops: list[Op] = [Put(_checkpoint_key(body.id), pack(body), ABSENT)]
        if new.cap is None or warm.kept is None:
            return _Change(after_put, ops, None, [])
        kept = [*warm.kept, self._kept(Found(body.id, body), head.id)]
        if len(kept) <= new.cap:
            return _Change(after_put, ops, kept, [])
        victims, kept = kept[: len(kept) - new.cap], kept[len(kept) - new.cap :]
        after_put.k = len(kept)
        if not kept:
            after_put.l = None
        gone = _only(victims, kept)
        after_put.fl = victims[-1].id
        if len(victims) <= _REMOVED_AT_ONCE:
            ops += [Delete(_checkpoint_key(victim.id)) for victim in victims if victim.id != body.id]
            if victims[-1].id == body.id:
                ops = ops[1:]
        else:
            after_put.sw = True
        if count(gone) <= _REMOVED_AT_ONCE and kept:
            ops += [Delete(_piece_key(number)) for first, last in gone for number in range(first, last + 1)]
        else:
            after_put.dr = union([*after_put.dr, *gone])
        return _Change(after_put, ops, kept, [key for victim in victims for key in victim.hints])

    # ---- states too large for one Write

    async def _abandon(self, partition: str, upload_id: str) -> None:
        """Give up an upload: what it wrote is dead."""

        def end(head: HeadBody) -> tuple[HeadBody, list[Op]] | None:
            if upload_id not in head.p:
                return None
            dead = union([*head.dr, *head.p[upload_id].spans])
            rest = {id: upload for id, upload in head.p.items() if id != upload_id}
            return replace(head, p=rest, dr=dead), [Delete(PENDING + upload_id)]

        if await self._edit(partition, end):
            await self.clean(partition)

    # ---- reading

    async def read(self, thread_id: str, checkpoint_id: str | None) -> tuple[CheckpointBody, Any] | None:
        """Return a checkpoint and its state; by default the latest. One or two round trips."""
        partition = self.partition(thread_id)
        attempt = 0
        while True:
            body, ready = await self._find(partition, checkpoint_id)
            if body is None:
                return None
            try:
                return body, await self._state(partition, body, ready)
            except _MissingPieceError:
                # Removed while we read: look again. What stays missing is corrupt.
                if attempt == _READ_TRIES:
                    raise
                self._seen.pop(partition, None)
                await backoff(attempt)
                attempt += 1

    async def find(self, thread_id: str, checkpoint_id: str | None) -> CheckpointBody | None:
        """Return a checkpoint without its state; by default the latest."""
        partition = self.partition(thread_id)
        keys = [Key(partition, HEAD)]
        if checkpoint_id is not None:
            keys.append(Key(partition, _checkpoint_key(checkpoint_id)))
        return self.chosen(partition, await self.store.coalescer.get(keys), checkpoint_id)

    async def live_head(self, thread_id: str) -> HeadBody | None:
        """Return the head of a thread that there is."""
        partition = self.partition(thread_id)
        (entry,) = await self.store.coalescer.get([Key(partition, HEAD)])
        head = None if entry is None else self.head(partition, entry)
        if head is None or head.l is None or not self._alive(head, self.store.clock()):
            return None
        return head

    async def _find(
        self, partition: str, checkpoint_id: str | None
    ) -> tuple[CheckpointBody | None, dict[int, Entry]]:
        keys = [Key(partition, HEAD)]
        guess: list[int] = []
        if checkpoint_id is not None:
            keys.append(Key(partition, _checkpoint_key(checkpoint_id)))
        elif partition in self._seen:
            # The pieces of what was the latest when we last looked, in the same call.
            guess = [n for first, last in self._seen[partition] for n in range(first, last + 1)]
        fetched = await self.store.coalescer.get([*keys, *(Key(partition, _piece_key(n)) for n in guess)])
        body = self.chosen(partition, fetched[: len(keys)], checkpoint_id)
        ready = {n: entry for n, entry in zip(guess, fetched[len(keys) :], strict=True) if entry is not None}
        if body is not None and checkpoint_id is None:
            self._saw(partition, body)
        return body, ready

    def chosen(
        self, partition: str, entries: Sequence[Entry | None], checkpoint_id: str | None
    ) -> CheckpointBody | None:
        if entries[0] is None:
            return None
        head = self.head(partition, entries[0])
        if not self._alive(head, self.store.clock()):
            return None
        if checkpoint_id is None:
            return head.l
        if entries[1] is None or checkpoint_id <= head.fl:
            return None
        return self.body(partition, entries[1])

    def _saw(self, partition: str, body: CheckpointBody) -> None:
        spans = self.spans(partition, body)
        self._seen[partition] = spans if count(spans) < MAX_GET_KEYS else []
        self._seen.move_to_end(partition)
        if len(self._seen) > _WARM_THREADS:
            self._seen.popitem(last=False)

    async def _state(self, partition: str, body: CheckpointBody, ready: dict[int, Entry]) -> Any:
        key = _checkpoint_key(body.id)
        try:
            skeleton = msgspec.json.decode(body.s)
            spans = spans_of(skeleton)
            values: dict[int, Any] = {}
            if ready:
                self._decode(partition, body.id, [ready[n] for n in ready if covered(n, spans)], values)
            missing = subtract(spans, runs(values)) if values else spans
            async for entries in self._pages(partition, missing):
                self._decode(partition, body.id, entries, values)
            return assemble(skeleton, values)
        except KeyError as error:
            message = f"checkpoint {body.id} lacks piece {error}"
            raise _MissingPieceError(message, partition=partition, key=key) from error
        except (ValueError, TypeError, IndexError, AttributeError, msgspec.MsgspecError) as error:
            message = f"checkpoint {body.id} cannot be read: {error}"
            raise CorruptRecordError(message, partition=partition, key=key) from error

    def _decode(
        self, partition: str, checkpoint_id: str, entries: Sequence[Entry], values: dict[int, Any]
    ) -> None:
        # All in one text: a decoder call for each would take longer than the decoding.
        try:
            found = self._pieces.decode(b"[%b]" % b",".join([entry.value for entry in entries]))
            whole = len(found) == len(entries)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            whole = False
        if not whole:
            found = []
            for entry in entries:
                try:
                    found += self._pieces.decode(b"[%b]" % entry.value)
                except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
                    message = f"a piece of checkpoint {checkpoint_id} cannot be read: {error}"
                    raise CorruptRecordError(message, partition=partition, key=entry.key) from error
            if len(found) != len(entries):
                message = f"a piece of checkpoint {checkpoint_id} is no piece"
                raise CorruptRecordError(message, partition=partition)
        for entry, piece in zip(entries, found, strict=True):
            value = codec.decode(msgspec.json.encode(piece.v), True) if piece.t else piece.v
            values[_number(partition, entry.key)] = value

    async def _pages(self, partition: str, spans: Sequence[Span]) -> AsyncIterator[list[Entry]]:
        """Yield the pieces with these numbers, those that there are: in one call, or one a page."""
        segments = _segments(spans)
        if not segments:
            return
        if len(segments) > 1 and count(spans) <= MAX_GET_KEYS:
            keys = [Key(partition, _piece_key(n)) for first, last in spans for n in range(first, last + 1)]
            yield [entry for entry in await self.store.coalescer.get(keys) if entry is not None]
            return
        for at in range(0, len(segments), _SEGMENTS_AT_ONCE):
            some = segments[at : at + _SEGMENTS_AT_ONCE]
            starts = [_piece_key(first) for first, _ in some]
            while some:
                pages = await asyncio.gather(
                    *(
                        self.store.coalescer.scan(partition, start, _piece_key(last + 1), limit=_PIECES_PAGE)
                        for start, (_, last) in zip(starts, some, strict=True)
                    )
                )
                for page in pages:
                    entries = page.entries
                    if len(segments) < len(spans):  # between those wanted, some others
                        entries = [e for e in entries if covered(_number(partition, e.key), spans)]
                    if entries:
                        yield entries
                starts = [after(page.entries[-1].key) for page in pages if page.more]
                some = [segment for segment, page in zip(some, pages, strict=True) if page.more]

    # ---- listing

    async def page(
        self,
        thread_id: str,
        *,
        limit: int | None,
        before: str | None = None,
        after_id: str | None = None,
        match: Callable[[CheckpointBody], bool] | None = None,
    ) -> tuple[list[Found], bool]:
        """Return checkpoints, newest first, and whether there are more. One round trip for the first page."""
        partition = self.partition(thread_id)
        start = CHECKPOINT if after_id is None else after(_checkpoint_key(after_id))
        end = _END if before is None else _checkpoint_key(before)
        wanted = _PAGE if limit is None or match is not None else min(limit + 2, _PAGE)
        first = self.store.coalescer.scan(partition, start, end, limit=wanted, reverse=True)
        if before is None:
            page = await first
            entries = page.entries
            if not entries or entries[0].key != HEAD:
                return [], False
            head_entry: Entry | None = entries[0]
            entries = entries[1:]
        else:
            page, (head_entry,) = await asyncio.gather(
                first, self.store.coalescer.get([Key(partition, HEAD)])
            )
            entries = page.entries
        if head_entry is None:
            return [], False
        head = self.head(partition, head_entry)
        if not self._alive(head, self.store.clock()):
            return [], False
        floor = _checkpoint_key(head.fl) if head.fl else CHECKPOINT
        found: list[Found] = []
        while True:
            for entry in entries:
                if entry.key <= floor:
                    return found, False
                one = self._found(partition, entry)
                if match is None or (one.body is not None and match(one.body)):
                    if len(found) == limit:
                        return found, True
                    found.append(one)
            if not page.more:
                return found, False
            page = await self.store.coalescer.scan(
                partition, start, page.entries[-1].key, limit=wanted, reverse=True
            )
            entries = page.entries

    async def listed(self, partition: str, head: HeadBody) -> list[Found]:
        """Return all checkpoints of a thread, oldest first."""
        found: list[Found] = []
        start, more = after(_checkpoint_key(head.fl)) if head.fl else CHECKPOINT, True
        while more:
            page = await self.store.coalescer.scan(partition, start, prefix_end(CHECKPOINT), limit=_PAGE)
            found += [self._found(partition, entry) for entry in page.entries]
            more = page.more
            if more:
                start = after(page.entries[-1].key)
        return found

    def _found(self, partition: str, entry: Entry) -> Found:
        id = entry.key[len(CHECKPOINT) :]
        try:
            body = self.body(partition, entry)
            self.spans(partition, body)
        except CorruptRecordError as error:
            return Found(id, None, str(error))
        return Found(id, body)

    def _kept(self, found: Found, thread_id: str) -> _Kept:
        if found.body is None:
            return _Kept(found.id, None, [])
        return _Kept(found.id, self.spans("", found.body), list(self.hints(found.body, thread_id)))

    async def threads(self, *, limit: int | None, cursor: str | None) -> tuple[list[HeadBody], str | None]:
        """Return the threads that there are, those begun last first, and a cursor for more."""
        place = self.listing
        start = place.prefix if cursor is None else after(place.prefix + cursor)
        found: list[HeadBody] = []
        last: str | None = None
        while limit is None or len(found) < limit:
            wanted = MAX_GET_KEYS if limit is None else min(limit - len(found) + 1, MAX_GET_KEYS)
            page = await self.store.coalescer.scan(place.partition, start, None, limit=wanted)
            ids = [self.store.unpack(self.hint_decoder, place.partition, e).id for e in page.entries]
            heads = await self.store.coalescer.get([Key(self.partition(id), HEAD) for id in ids])
            for index, (hint, id, entry) in enumerate(zip(page.entries, ids, heads, strict=True)):
                if entry is None:
                    continue
                head = self.head(self.partition(id), entry)
                if head.l is None or not self._alive(head, self.store.clock()):
                    continue
                if hint.key != self._thread_hint(head):
                    continue
                found.append(head)
                last = hint.key
                if len(found) == limit:
                    return found, last if page.more or index < len(page.entries) - 1 else None
            if not page.more:
                return found, None
            start = after(page.entries[-1].key)
        return found, last

    # ---- removing

    async def delete(self, thread_id: str) -> int:
        """Delete a thread, at once; return how many checkpoints that removed."""
        return await self._delete(self.partition(thread_id), lambda head: True)

    async def delete_expired(self, partition: str) -> int:
        """Delete the thread of `partition` if it has expired; return how many checkpoints that removed."""
        return await self._delete(partition, lambda head: head.e is not None and head.e <= self.store.clock())

    async def _delete(self, partition: str, wanted: Callable[[HeadBody], bool]) -> int:
        async with self._warm_of(partition).lock:
            removed = 0
            hints: list[Key] = []
            listed: list[tuple[Key, Entry | None]] = []

            async def prepare(head: HeadBody) -> None:
                nonlocal hints, listed
                key = Key(self.listing.partition, self._thread_hint(head))
                (entry,) = await self.store.coalescer.get([key])
                listed = [(key, entry)]
                if self.places is not None:
                    found = await self.listed(partition, head)
                    hints = [
                        key for one in found if one.body is not None for key in self.hints(one.body, head.id)
                    ]

            def bury(head: HeadBody) -> tuple[HeadBody, list[Op]] | None:
                nonlocal removed
                if head.gone is not None or not (head.l or head.p) or not wanted(head):
                    return None
                removed = head.k
                uploads: list[Op] = [Delete(PENDING + id) for id in head.p]
                return replace(_restarted(head, head.at), gone=self.store.clock()), uploads

            if not await self._edit(partition, bury, prepare):
                return 0
            await self.clean(partition)
            await self._remove_hints(hints)
            for key, entry in listed:
                if entry is not None:  # refused: begun anew meanwhile
                    delete = Delete(key.key, entry.version)
                    await self.store.coalescer.write(key.partition, [delete], hint=True)
            return removed

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
        attempt = 0
        deadline = asyncio.get_running_loop().time() + _CONTENTION_SECONDS
        async with self._warm_of(partition).lock:
            while True:
                (entry,) = await self.store.coalescer.get([Key(partition, HEAD)])
                if entry is None:
                    return removed, pieces
                head = self.head(partition, entry)
                if not self._alive(head, self.store.clock()):
                    return removed, pieces
                found = await self.listed(partition, head)
                chosen = set(choose(found))
                victims = [one for one in found if one.id in chosen]
                if not victims:
                    return removed, pieces
                if not dry_run:
                    victims = victims[:_REMOVED_AT_ONCE]
                ids = {one.id for one in victims}
                kept = [one for one in found if one.id not in ids]
                gone = _only(
                    (self._kept(one, head.id) for one in victims), [self._kept(one, head.id) for one in kept]
                )
                if dry_run:
                    return len(victims), count(gone)
                latest = next((one.body for one in reversed(kept) if one.body is not None), None)
                left = replace(head, k=len(kept), l=latest if kept else None, up=self.store.clock())
                ops: list[Op] = [Delete(_checkpoint_key(one.id)) for one in victims]
                if count(gone) <= _REMOVED_AT_ONCE:
                    ops += [Delete(_piece_key(n)) for first, last in gone for n in range(first, last + 1)]
                else:
                    left.dr = union([*left.dr, *gone])
                self.forget(partition)
                if not await self.store.coalescer.write(
                    partition, [Put(HEAD, pack(left), entry.version), *ops]
                ):
                    await self._pause(partition, attempt, deadline)
                    attempt += 1
                    continue
                removed += len(victims)
                pieces += count(gone)
                await self._remove_hints(
                    key for one in victims if one.body is not None for key in self.hints(one.body, head.id)
                )
                if left.dr:
                    await self.clean(partition)

    async def clean(self, partition: str) -> None:
        """Purge what the head says is gone, and then say so no more."""
        (entry,) = await self.store.coalescer.get([Key(partition, HEAD)])
        if entry is None:
            return
        head = self.head(partition, entry)
        if not head.dr and not head.sw:
            return
        await self._purge(partition, head)
        dead, floor = head.dr, head.fl

        def cleaned(head: HeadBody) -> tuple[HeadBody, list[Op]] | None:
            return replace(head, dr=subtract(head.dr, dead), sw=head.sw and head.fl != floor), []

        await self._edit(partition, cleaned)

    async def _clean_up(self, partition: str, warm: _Warm) -> None:
        """Do what `clean` does, for a writer that knows the head."""
        head = warm.head
        if head is None or not (head.dr or head.sw):
            return
        await self._purge(partition, head)
        cleaned = replace(head, dr=[], sw=False)
        version = await self.store.coalescer.write(partition, [Put(HEAD, pack(cleaned), warm.version)])
        if version:
            warm.head, warm.version = cleaned, version
        else:
            warm.head = None
            await self.clean(partition)

    async def _purge(self, partition: str, head: HeadBody) -> None:
        purge = self.store.coalescer.purge
        if head.sw:
            await purge(partition, CHECKPOINT, after(_checkpoint_key(head.fl)))
        for first, last in head.dr:
            await purge(partition, _piece_key(first), _piece_key(last + 1))

    async def _edit(
        self,
        partition: str,
        change: Callable[[HeadBody], tuple[HeadBody, list[Op]] | None],
        prepare: Callable[[HeadBody], Awaitable[None]] | None = None,
    ) -> bool:
        """Change the head, with the ops that belong to it, until nobody interferes. False: no change."""
        deadline = asyncio.get_running_loop().time() + _CONTENTION_SECONDS
        attempt = 0
        while True:
            (entry,) = await self.store.coalescer.get([Key(partition, HEAD)])
            if entry is None:
                return False
            head = self.head(partition, entry)
            if prepare is not None:
                await prepare(head)
            changed = change(head)
            if changed is None:
                return False
            self.forget(partition)
            ops = [Put(HEAD, pack(changed[0]), entry.version), *changed[1]]
            if await self.store.coalescer.write(partition, ops):
                return True
            await self._pause(partition, attempt, deadline)
            attempt += 1

    async def relabel(self, thread_id: str, checkpoint_id: str, labels: Sequence[str]) -> CheckpointBody:
        """Replace the labels of a checkpoint."""
        return await self._rewrite(thread_id, checkpoint_id, lambda body: replace(body, labels=list(labels)))

    async def _rewrite(
        self, thread_id: str, checkpoint_id: str, change: Callable[[CheckpointBody], CheckpointBody]
    ) -> CheckpointBody:
        partition = self.partition(thread_id)
        deadline = asyncio.get_running_loop().time() + _CONTENTION_SECONDS
        attempt = 0
        while True:
            key = _checkpoint_key(checkpoint_id)
            entries = await self.store.coalescer.get([Key(partition, HEAD), Key(partition, key)])
            body = self.chosen(partition, entries, checkpoint_id)
            if body is None or entries[0] is None:
                raise _no_checkpoint(checkpoint_id, partition)
            head = self.head(partition, entries[0])
            changed = change(body)
            if head.l is not None and head.l.id == checkpoint_id:
                head.l = changed
            self.forget(partition)
            ops = [Put(HEAD, pack(head), entries[0].version), Put(key, pack(changed))]
            if await self.store.coalescer.write(partition, ops):
                return changed
            await self._pause(partition, attempt, deadline)
            attempt += 1

    async def expire(self, thread_id: str, expires_at: int | None) -> bool:
        """Set or take away the time at which a thread expires. False: there is no such thread."""
        partition = self.partition(thread_id)
        if expires_at is not None:
            await self._put_deadline(partition, expires_at)

        def change(head: HeadBody) -> tuple[HeadBody, list[Op]] | None:
            if not self._alive(head, self.store.clock()):
                return None
            return replace(head, e=expires_at), []

        return await self._edit(partition, change)

    # ---- branches and copies

    async def fork(self, thread_id: str, new: New, source_id: str) -> CheckpointBody:
        """Put a child of checkpoint `source_id` with the very same state: a reference, no data."""
        partition = self.partition(thread_id)
        deadline = asyncio.get_running_loop().time() + _CONTENTION_SECONDS
        attempt = 0
        async with self._warm_of(partition).lock:
            while True:
                key = _checkpoint_key(source_id)
                entries = await self.store.coalescer.get([Key(partition, HEAD), Key(partition, key)])
                source = self.chosen(partition, entries, source_id)
                if source is None or entries[0] is None:
                    raise _no_checkpoint(source_id, partition)
                warm = _Warm()
                warm.head = head = self.head(partition, entries[0])
                warm.version = entries[0].version
                if new.cap is not None and head.k + 1 > new.cap:
                    warm.kept = [self._kept(found, head.id) for found in await self.listed(partition, head)]
                now = self.store.clock()
                body = self._body(head, new, bytes(source.s), 0, now)
                body.z, body.parent = source.z, source_id
                body.ver, body.x = source.ver, source.x
                body.b = len(_checkpoint_key(body.id)) + len(pack(body))
                if self.places is not None:
                    await self._put_hints(thread_id, body)
                change = self._change(warm, head, _Numbers(head), new, body, now)
                ops = [Put(HEAD, pack(change.head), warm.version), *change.ops]
                self.forget(partition)
                if await self.store.coalescer.write(partition, ops):
                    await self._remove_hints(change.hints)
                    if change.head.dr or change.head.sw:
                        await self.clean(partition)
                    return body
                await self._pause(partition, attempt, deadline)
                attempt += 1

    async def copy(self, source_thread: str, thread_id: str, checkpoint_id: str | None) -> int:
        """Copy a thread, or one checkpoint of it, to a thread that does not exist.

        Returns how many checkpoints. The copy shares nothing with its source.
        Its head comes last: without it, nothing was copied.
        """
        source, target = self.partition(source_thread), self.partition(thread_id)
        for attempt in range(_READ_TRIES):
            (entry,) = await self.store.coalescer.get([Key(source, HEAD)])
            head = None if entry is None else self.head(source, entry)
            if head is None or not self._alive(head, self.store.clock()):
                message = f"no thread {source_thread!r}"
                raise NotFoundError(message, partition=source)
            found = await self.listed(source, head)
            if checkpoint_id is not None:
                found = [one for one in found if one.id == checkpoint_id]
                if not found:
                    raise _no_checkpoint(checkpoint_id, source)
            bodies = []
            for one in found:
                if one.body is None:
                    message = f"checkpoint {one.id} cannot be copied: {one.error}"
                    raise CorruptRecordError(message, partition=source, key=_checkpoint_key(one.id))
                bodies.append(one.body)
            if await self._copy(source, head, bodies, thread_id, target):
                return len(bodies)
            await backoff(attempt)
        message = "the thread was changed again and again while it was copied"
        raise ConflictError(message, partition=source)

    async def _copy(
        self, source: str, head: HeadBody, bodies: list[CheckpointBody], thread_id: str, target: str
    ) -> bool:
        """Copy the checkpoints. False: some were removed from the source meanwhile."""
        upload_id = self.store.ids()
        spans = union(span for body in bodies for span in self.spans(source, body))
        now = self.store.clock()
        (old,) = await self.store.coalescer.get([Key(target, HEAD)])
        empty = HeadBody(id=thread_id, at=now)
        if old is not None:
            empty = self.head(target, old)
            if self._alive(empty, now):
                message = f"there is a thread {thread_id!r} already"
                raise ConflictError(message, partition=target)
            if empty.n or empty.blocks:  # its numbers are used up
                message = f"the thread id {thread_id!r} was used before"
                raise ConflictError(message, partition=target)
        # The copy keeps the numbers of its source, so that skeletons need not change.
        begun = replace(
            empty,
            at=now,
            n=head.n,
            blocks=head.blocks,
            open=head.open,
            i=head.i,
            fl=head.i,
            sw=True,
            p={upload_id: Upload(now, spans)},
        )
        mark = Put(PENDING + upload_id, pack(Body()), ABSENT)
        expected = ABSENT if old is None else old.version
        version = await self.store.coalescer.write(target, [Put(HEAD, pack(begun), expected), mark])
        if not version:
            message = f"somebody else has begun the thread {thread_id!r}"
            raise ConflictError(message, partition=target)
        check = Check(PENDING + upload_id, version)
        changed = f"somebody else has changed the thread {thread_id!r}"
        try:
            copied = 0
            async for entries in self._pages(source, spans):
                copied += len(entries)
                if not await self._put_in_batches(
                    target, check, (Put(e.key, e.value, ABSENT) for e in entries)
                ):
                    raise ConflictError(changed, partition=target)
            if copied != count(spans):
                await self._abandon(target, upload_id)
                return False
            puts = (Put(_checkpoint_key(body.id), pack(body), ABSENT) for body in bodies)
            done = replace(begun, k=len(bodies), o=head.o, l=bodies[-1], fl="", sw=False, p={}, up=now)
            await self._put_thread_hint(thread_id, done)
            ops: list[Op] = [Put(HEAD, pack(done), version), Delete(PENDING + upload_id, version)]
            if not (
                await self._put_in_batches(target, check, puts)
                and await self.store.coalescer.write(target, ops)
            ):
                raise ConflictError(changed, partition=target)
            if self.places is not None:
                for body in bodies:
                    await self._put_hints(thread_id, body)
        except BaseException:
            self.store.coalescer.start(self._abandon(target, upload_id))
            raise
        return True

    async def _put_in_batches(self, partition: str, check: Check, puts: Iterable[Put]) -> bool:
        """Write `puts`, each Write under `check`. False: it does not hold any more."""
        batch: list[Op] = [check]
        size = 0
        for put in puts:
            if len(batch) > _WRITE_PIECES or size + len(put.value) > _WRITE_BYTES:
                if not await self.store.coalescer.write(partition, batch):
                    return False
                batch, size = [check], 0
            batch.append(put)
            size += len(put.value)
        return bool(len(batch) == 1 or await self.store.coalescer.write(partition, batch))

    # ---- listings

    def hints(self, body: CheckpointBody, thread_id: str) -> dict[Key, Place]:
        """Return the keys under which a checkpoint is listed."""
        if self.places is None:
            return {}
        tail = f"{newest_first(body.at)}/{body.id}"
        return {Key(place.partition, place.prefix + tail): place for place in self.places(body, thread_id)}

    async def _put_hints(self, thread_id: str, body: CheckpointBody) -> None:
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

    def _thread_hint(self, head: HeadBody) -> str:
        return f"{self.listing.prefix}{newest_first(head.at)}/{encode_id(head.id, 'thread_id')}"

    async def _put_thread_hint(self, thread_id: str, head: HeadBody) -> None:
        hint = pack(HintBody(at=self.store.clock(), id=thread_id))
        put = Put(self._thread_hint(head), hint)
        await self.store.coalescer.write(self.listing.partition, [put], hint=True)

    async def _put_deadline(self, partition: str, expires_at: int | None) -> None:
        if expires_at is None:
            return
        # Two hints: the hour, and in a partition of that hour the thread.
        hour = _hour(expires_at)
        by_hour = Put(f"{hour:012d}", pack(HintBody(at=self.store.clock(), id="")))
        entry = Put(f"{expires_at:015d}/{partition}", pack(HintBody(at=self.store.clock(), id=partition)))
        await asyncio.gather(
            self.store.coalescer.write(DEADLINES, [by_hour], hint=True),
            self.store.coalescer.write(f"{DEADLINES}/{hour}", [entry], hint=True),
        )

    async def delete_all_expired(self) -> int:
        """Delete the threads whose time has come; return how many checkpoints that removed."""
        removed = 0
        now = self.store.clock()
        hours = await self.store.coalescer.scan(DEADLINES, "", f"{_hour(now) + 1:012d}", limit=_PAGE)
        for hour in hours.entries:
            name = f"{DEADLINES}/{int(hour.key)}"
            start, more = "", True
            while more:
                page = await self.store.coalescer.scan(name, start, f"{now + 1:015d}", limit=_PAGE)
                for entry in page.entries:
                    due = self.store.unpack(self.hint_decoder, name, entry).id
                    if due.startswith(f"{self.kind}/"):
                        removed += await self.delete_expired(due)
                        await self.store.coalescer.write(name, [Delete(entry.key, entry.version)], hint=True)
                more = page.more
                if more:
                    start = after(page.entries[-1].key)
            rest = await self.store.coalescer.scan(name, "", None, limit=1)
            if not rest.entries and int(hour.key) < _hour(now):
                # Refused: a deadline of this hour has come in meanwhile.
                await self.store.coalescer.write(DEADLINES, [Delete(hour.key, hour.version)], hint=True)
        return removed

    # ---- repair

    async def repair(self, partition: str, *, before: int, dry_run: bool) -> RepairedThread:
        """Finish what was left half done in a thread, and remove what nothing needs."""
        done = RepairedThread()
        (entry,) = await self.store.coalescer.get([Key(partition, HEAD)])
        if entry is None:
            return done
        head = self.head(partition, entry)
        now = self.store.clock()
        if head.gone is None and head.e is not None and head.e <= now:
            done.expired = True
            if not dry_run:
                await self.delete_expired(partition)
            return done
        stale = [id for id, upload in head.p.items() if upload.at < now - UPLOAD_AGE_MS]
        done.uploads_ended = len(stale)
        if not dry_run:
            for id in stale:
                await self._abandon(partition, id)
            await self.clean(partition)
        (entry,) = await self.store.coalescer.get([Key(partition, HEAD)])
        if entry is None:
            return done
        head = self.head(partition, entry)
        await self._sweep(partition, head, entry.version, done, dry_run=dry_run)
        if head.l is not None:
            hint = Key(self.listing.partition, self._thread_hint(head))
            (listed,) = await self.store.coalescer.get([hint])
            if listed is None:
                done.hints_added += 1
                if not dry_run:
                    await self._put_thread_hint(head.id, head)
        elif not head.p and not done.pieces_removed and (head.gone or head.up or head.at) < before:
            done.forgotten = True
            if not dry_run:
                await self.store.coalescer.write(partition, [Delete(HEAD, entry.version)])
        return done

    async def _sweep(
        self, partition: str, head: HeadBody, version: int, done: RepairedThread, *, dry_run: bool
    ) -> None:
        """Remove the pieces that no checkpoint needs; name the checkpoints that lack any."""
        found = await self.listed(partition, head)
        kept = [self._kept(one, head.id) for one in found]
        needed = union(span for one in kept for span in one.spans or ())
        held = union([*needed, *(span for upload in head.p.values() for span in upload.spans)])
        there: list[Span] = []
        start, more = PIECE, True
        while more:
            page = await self.store.coalescer.scan(partition, start, prefix_end(PIECE), limit=_PAGE)
            there = union([*there, *runs(_number(partition, entry.key) for entry in page.entries)])
            more = page.more
            if more:
                start = after(page.entries[-1].key)
        done.corrupt = [one.error for one in found if one.body is None]
        done.corrupt += [
            f"pieces of a checkpoint are missing [{partition} · {_checkpoint_key(one.id)}]"
            for one in kept
            if one.spans and subtract(one.spans, there)
        ]
        if self.places is not None:
            await self._put_missing_hints(head.id, found, done, dry_run=dry_run)
        if any(one.spans is None for one in kept):
            return  # nobody knows what it needs
        spare = subtract(there, held)
        wrong = len(found) != head.k
        done.pieces_removed = count(spare)
        if dry_run or not (spare or wrong):
            return
        # Refused: the thread has changed meanwhile; the next repair will find what is left.
        left = replace(head, dr=union([*head.dr, *spare]), k=len(found))
        if await self.store.coalescer.write(partition, [Put(HEAD, pack(left), version)]):
            self.forget(partition)
            await self.clean(partition)

    # ---- behind it all

    async def _put_missing_hints(
        self, thread_id: str, found: Sequence[Found], done: RepairedThread, *, dry_run: bool
    ) -> None:
        for one in found:
            if one.body is not None:
                hints = await self.store.coalescer.get(list(self.hints(one.body, thread_id)))
                if None in hints:
                    done.hints_added += hints.count(None)
                    if not dry_run:
                        await self._put_hints(thread_id, one.body)

    async def sweep_hints(self, partition: str, *, before: int, dry_run: bool) -> int:
        """Remove the entries of a listing, older than `before`, that match nothing; return how many."""
        removed = 0
        start, more = "", True
        while more:
            page = await self.store.coalescer.scan(partition, start, None, limit=MAX_GET_KEYS // 2)
            hints = [(e, self.store.unpack(self.hint_decoder, partition, e)) for e in page.entries]
            hints = [(entry, hint) for entry, hint in hints if hint.at < before]
            for entry, hint in hints:
                if not await self._listed_rightly(partition, entry.key, hint):
                    removed += 1
                    if not dry_run:
                        delete = Delete(entry.key, entry.version)
                        await self.store.coalescer.write(partition, [delete], hint=True)
            more = page.more
            if more:
                start = after(page.entries[-1].key)
        return removed

    async def _listed_rightly(self, partition: str, key: str, hint: HintBody) -> bool:
        if partition == self.listing.partition:
            head = await self.live_head(hint.id)
            return head is not None and self._thread_hint(head) == key
        try:
            body = await self.find(hint.of, hint.id)
        except CorruptRecordError:
            return True  # it is there
        return body is not None and Key(partition, key) in self.hints(body, hint.of)

    def _alive(self, head: HeadBody, now: int) -> bool:
        return head.gone is None and (head.e is None or head.e > now) and (head.l is not None or bool(head.p))

    def head(self, partition: str, entry: Entry) -> HeadBody:
        """Return the stored head."""
        return self.store.unpack(self.heads, partition, entry)

    def body(self, partition: str, entry: Entry) -> CheckpointBody:
        """Return a stored checkpoint."""
        return self.store.unpack(self.bodies, partition, entry)

    def spans(self, partition: str, body: CheckpointBody) -> list[Span]:
        """Return the numbers of the pieces of a checkpoint."""
        try:
            return spans_of(msgspec.json.decode(body.s))
        except (TypeError, KeyError, IndexError, msgspec.MsgspecError) as error:
            message = f"the skeleton of checkpoint {body.id} cannot be read: {error}"
            raise CorruptRecordError(message, partition=partition, key=_checkpoint_key(body.id)) from error

    def forget(self, partition: str) -> None:
        """Forget what is remembered of a thread: it is about to change."""
        warm = self._warm.get(partition)
        if warm is not None:
            warm.head = None

    def _warm_of(self, partition: str) -> _Warm:
        warm = self._warm.get(partition)
        if warm is None:
            warm = self._warm[partition] = _Warm()
        self._warm.move_to_end(partition)
        return warm

    def _cool(self) -> None:
        """Forget the threads that were not written for the longest time."""
        while len(self._warm) > _WARM_THREADS or (self._warm_pieces > _WARM_PIECES and len(self._warm) > 1):
            coldest = next((name for name, warm in self._warm.items() if not warm.lock.locked()), None)
            if coldest is None:
                return
            self._warm_pieces -= len(self._warm.pop(coldest).known)


class _Change(NamedTuple):
    head: HeadBody
    ops: list[Op]
    kept: list[_Kept] | None
    hints: list[Key]


class _Uploading:
    """An upload of this call, if `version` says that it has begun."""

    __slots__ = ("bytes", "head", "id", "known", "spans", "version")

    def __init__(self, id: str) -> None:
        self.id = id
        self.head = HeadBody(id="", at=0)  # with what is reserved
        self.version = ABSENT
        self.spans: list[Span] = []
        self.known: dict[bytes, int] = {}  # its pieces: digest → number
        self.bytes = 0

    def begin(self, head: HeadBody, numbers: _Numbers, spans: list[Span], now: int) -> None:
        """Reserve the numbers `spans`, which `numbers` gave out."""
        self.spans = union([*self.spans, *spans])
        pending = {**head.p, self.id: Upload(now, self.spans)}
        self.head = replace(
            head, n=numbers.n, blocks=numbers.blocks, open=list(numbers.open.items()), p=pending
        )

    def forget(self) -> None:
        """It has ended, or was ended."""
        self.version, self.spans, self.known, self.bytes = ABSENT, [], {}, 0


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
    dead = [*head.dr]
    if head.n:
        dead.append((1, head.n))
    if head.blocks:
        dead.append((_BLOCKS, _BLOCKS + head.blocks * _BLOCK - 1))
    return replace(
        head,
        at=now,
        k=0,
        l=None,
        fl=head.i,
        sw=bool(head.i),
        dr=union(dead),
        p={},
        open=[],
        e=None,
        gone=None,
    )


def _only(victims: Iterable[_Kept], kept: Sequence[_Kept]) -> list[Span]:
    """Return the pieces that only `victims` need: none, if it cannot be known what the others need."""
    spans = union(span for victim in victims for span in victim.spans or ())
    if not spans or any(one.spans is None for one in kept):
        return []
    return subtract(spans, [span for one in kept for span in one.spans or ()])


def _place(cut: Cut, known: dict[bytes, int], numbers: _Numbers) -> tuple[list[int], list[int]]:
    """Return the number of each piece, and the indexes of those that are new."""
    state = (numbers.n, numbers.blocks, dict(numbers.open))
    placed, fresh = _numbered(cut, known, numbers)
    breaks = sum(map(ne, placed[1:], map((1).__add__, placed)))
    if breaks > _FRAGMENTS and breaks > len(placed) // 8:
        again = _Numbers(HeadBody(id="", at=0, n=state[0], blocks=state[1], open=list(state[2].items())))
        anew, all_fresh = _numbered(cut, {}, again)
        if sum(map(ne, anew[1:], map((1).__add__, anew))) < breaks // 2:
            numbers.n, numbers.blocks, numbers.open = again.n, again.blocks, again.open
            return anew, all_fresh
    return placed, fresh


def _numbered(cut: Cut, known: dict[bytes, int], numbers: _Numbers) -> tuple[list[int], list[int]]:
    placed: list[Any] = list(map(known.get, cut.digests))
    fresh: list[int] = []
    if None not in placed:
        return placed, fresh
    given: dict[bytes, int] = {}
    for node in cut.root.nodes():
        own = node.pieces()
        old = 0  # of its pieces, those up to the last one that is known
        for place in range(len(own) - 1, -1, -1):
            if placed[own[place]] is not None:
                old = place + 1
                break
        if old == len(own) and None not in [placed[index] for index in own]:
            continue
        for place, index in enumerate(own):
            if placed[index] is not None:
                continue
            number = given.get(cut.digests[index])
            if number is None:
                if old and place >= old:
                    number = numbers.after(placed[own[place - 1]], place)
                else:
                    number = numbers.next()
                given[cut.digests[index]] = number
                fresh.append(index)
            placed[index] = number
    return placed, fresh


def _segments(spans: Sequence[Span]) -> list[Span]:
    """Join spans that are near each other: to read a few pieces too many is cheaper than a call."""
    segments: list[Span] = []
    for first, last in spans:
        if segments and first - segments[-1][1] <= 32:
            segments[-1] = (segments[-1][0], last)
        else:
            segments.append((first, last))
    return segments


def _id_after(id: str) -> str:
    """Return a UUIDv7 that follows `id`: a clock is behind the one that made it."""
    number = uuid.UUID(id).int
    stamp = ((number >> 80) << 12 | number >> 64 & 0xFFF) + 1
    number = (stamp >> 12) << 80 | 7 << 76 | (stamp & 0xFFF) << 64 | 2 << 62 | secrets.randbits(62)
    return str(uuid.UUID(int=number))


def _hour(at: int) -> int:
    return at // 3_600_000


def _checkpoint_key(id: str) -> str:
    return CHECKPOINT + encode_id(id, "checkpoint_id")


def _piece_key(number: int) -> str:
    return number_key(PIECE, number)


def _number(partition: str, key: str) -> int:
    try:
        return int(key[len(PIECE) :])
    except ValueError as error:
        message = "the key of a piece ends in no number"
        raise CorruptRecordError(message, partition=partition, key=key) from error
