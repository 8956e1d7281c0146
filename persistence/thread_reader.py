"""What is stored of a thread of checkpoints, and how it is read.

====================  ==========================================================
``head``              the last number and id given out, how many checkpoints
                      there are, and the latest of them, whole
``checkpoint/<id>``   a checkpoint: its skeleton (`persistence.pieces`) and what
                      is known about it; ids rise in the order of the commits
``piece/<number>``    a piece of a state
``pending/<id>``      an upload under way, of a state too large for one Write
====================  ==========================================================

All in one partition. `persistence.threads` writes it.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, Final, NamedTuple

import msgspec
from msgspec import Raw

from persistence import codec
from persistence.coalescer import backoff
from persistence.collection import HintBody, Place, next_page
from persistence.deadlines import Deadlines
from persistence.driver import ABSENT, MAX_GET_KEYS, Entry, Key
from persistence.errors import CorruptRecordError
from persistence.keys import after, encode_id, key_number, newest_first, number_key, prefix_end
from persistence.pieces import Cut, Memo, Span, assemble, count, covered, digest, runs, spans_of, subtract
from persistence.store import Body, Store

__all__ = [
    "CHECKPOINT",
    "HEAD",
    "PAGE",
    "PENDING",
    "PIECE",
    "CheckpointBody",
    "Found",
    "HeadBody",
    "Kept",
    "MissingPieceError",
    "ThreadReader",
    "Upload",
    "Warm",
    "checkpoint_key",
    "number_of",
    "piece_key",
]

HEAD: Final = "head"
CHECKPOINT: Final = "checkpoint/"
PIECE: Final = "piece/"
PENDING: Final = "pending/"

PAGE: Final = 1_000

_END = "head!"  # after the head, which comes after the checkpoints: one scan reads both
_READ_TRIES = 6
_LAST_FIRST = str.maketrans("0123456789abcdef", "fedcba9876543210")  # of ids with the same time
_PIECES_PAGE = 4_000  # a page ends at 4 MiB anyway
_FIRST_PAGE = 100  # the head and the pieces that come with it: all of a small thread
_SEGMENTS_AT_ONCE = 8
_log = logging.getLogger("persistence")

_WARM_THREADS = 2_000  # threads that are remembered,
_WARM_BYTES = 64 << 20  # and how much of them all
_WARM_STATE = 4 << 20  # of a larger state only the numbers are remembered
_EARLIER_PIECES = 4_000  # and twice as many as the latest state has: of the states before it


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
    """The head of a thread; if it holds no checkpoint there is, for readers, no thread."""

    id: str
    g: str  # made with the head; the numbers of pieces are those of this one
    at: int  # when the thread began
    up: int = 0  # when it last changed
    o: int = 0  # checkpoints ever put
    k: int = 0  # checkpoints there are
    i: str = ""  # the last id given out
    n: int = 0  # these three: see `persistence.numbering.Numbers`
    blocks: int = 0
    open: list[Span] = msgspec.field(default_factory=list)
    l: CheckpointBody | None = None  # noqa: E741 - names in stored objects are short
    fl: str = ""  # checkpoints up to this id are gone
    sw: bool = False  # and some of them may still have to be removed
    dr: list[Span] = msgspec.field(default_factory=list)  # numbers of pieces that are gone, likewise
    p: dict[str, Upload] = msgspec.field(default_factory=dict)
    e: int | None = None  # when the thread expires
    gone: int | None = None  # when it was deleted

    def holds_any(self) -> bool:
        """Tell whether there is a checkpoint, be it one that cannot be read."""
        return self.l is not None or self.k > 0


class _Piece(msgspec.Struct):
    f: int
    v: Any
    t: bool = False


class Found(NamedTuple):
    """A checkpoint that was listed; without a body it is corrupt, and `error` says how."""

    id: str
    body: CheckpointBody | None
    error: str = ""
    spans: list[Span] | None = None  # of its pieces


class Kept(NamedTuple):
    """What a writer remembers of a checkpoint: its pieces, and where it is listed."""

    id: str
    spans: list[Span] | None  # None: it cannot be read
    hints: list[Key]


class Warm:
    """What a writer remembers of a thread."""

    __slots__ = ("g", "head", "kept", "known", "lock", "memo", "texts", "version", "weight")

    def __init__(self) -> None:
        self.lock = asyncio.Lock()
        # For writers:
        self.head: HeadBody | None = None
        self.version = ABSENT
        self.known: dict[bytes, int] | None = {}  # digest → number, of pieces that are there; None: `texts`
        self.kept: list[Kept] | None = None  # all checkpoints, oldest first
        self.memo: Memo = {}
        # For readers: pieces of the latest state by number, for a number never means another piece.
        self.texts: dict[int, bytes] = {}
        self.g = ""  # of the head that the numbers are from
        self.weight = 0  # about the bytes of all this

    def numbers(self) -> dict[bytes, int]:
        """Return the digests of pieces that are there, with their numbers."""
        if self.known is None:
            self.known = {digest(text): number for number, text in self.texts.items()}
        return self.known

    def belongs_to(self, head: HeadBody) -> None:
        """Forget all numbers if they are from another head, long gone."""
        if self.g != head.g:
            self.g, self.known, self.texts = head.g, {}, {}


class MissingPieceError(CorruptRecordError):
    """A piece is gone: the checkpoint was removed meanwhile (look again), or it is corrupt."""


class ThreadReader:
    """The threads of one kind. `places` says where each checkpoint is listed, if anywhere."""

    def __init__(
        self,
        store: Store,
        kind: str,
        listing: str,
        places: Callable[[CheckpointBody, str], Sequence[Place]] | None = None,
    ) -> None:
        self.store = store
        self.deadlines = Deadlines(store)
        self.kind = kind
        self.listing = Place(listing)
        self.places = places
        self.heads = msgspec.json.Decoder(HeadBody)
        self.bodies = msgspec.json.Decoder(CheckpointBody)
        self.hint_decoder = msgspec.json.Decoder(HintBody)
        self._pieces = msgspec.json.Decoder(list[_Piece])
        self._warm: OrderedDict[str, Warm] = OrderedDict()
        self._warm_bytes = 0

    def partition(self, thread_id: str) -> str:
        """Return the partition of a thread."""
        return f"{self.kind}/{encode_id(thread_id, 'thread_id')}"

    async def read(self, thread_id: str, checkpoint_id: str | None) -> tuple[CheckpointBody, Any] | None:
        """Return a checkpoint and its state; by default the latest. One or two round trips."""
        partition = self.partition(thread_id)
        attempt = 0
        while True:
            try:
                if checkpoint_id is None:
                    return await self._read_latest(partition)
                return await self._read_older(partition, checkpoint_id)
            except MissingPieceError:
                # Removed while we read: look again. What stays missing is corrupt.
                if attempt == _READ_TRIES:
                    raise
                await backoff(attempt)
                attempt += 1

    async def _read_latest(self, partition: str) -> tuple[CheckpointBody, Any] | None:
        warm = self._warm.get(partition)
        entry, texts = await self.first_page(partition, at_hand=warm is not None and bool(warm.texts))
        body = self.chosen(partition, [entry], None)
        if body is None or entry is None:
            return None
        head = self.head(partition, entry)
        warm = self._warm_of(partition)
        warm.belongs_to(head)
        state, texts = await self._state(partition, body, texts or warm.texts)
        if body.z <= _WARM_STATE and warm.g == head.g:
            warm.texts = texts
            if not warm.lock.locked() and (warm.head is None or warm.version != entry.version):
                # Who reads the latest is about to put the next: that is one round trip then.
                warm.head, warm.version, warm.known, warm.kept = head, entry.version, None, None
            self._weigh(partition, warm, body.z)
        return body, state

    async def _read_older(self, partition: str, checkpoint_id: str) -> tuple[CheckpointBody, Any] | None:
        keys = [Key(partition, HEAD), Key(partition, checkpoint_key(checkpoint_id))]
        entries = await self.store.coalescer.get(keys)
        body = self.chosen(partition, entries, checkpoint_id)
        if body is None or entries[0] is None:
            return None
        warm = self._warm_of(partition)
        warm.belongs_to(self.head(partition, entries[0]))
        state, _ = await self._state(partition, body, warm.texts)
        return body, state

    async def first_page(self, partition: str, *, at_hand: bool) -> tuple[Entry | None, dict[int, bytes]]:
        """Return the head, and unless they are at hand the first pieces by number, in one round trip."""
        if at_hand:
            (entry,) = await self.store.coalescer.get([Key(partition, HEAD)])
            return entry, {}
        page = await self.store.coalescer.scan(partition, HEAD, prefix_end(PIECE), limit=_FIRST_PAGE)
        if not page.entries or page.entries[0].key != HEAD:
            return None, {}
        pieces = [entry for entry in page.entries if entry.key.startswith(PIECE)]
        return page.entries[0], {number_of(partition, entry.key): entry.value for entry in pieces}

    async def find(self, thread_id: str, checkpoint_id: str | None) -> CheckpointBody | None:
        """Return a checkpoint without its state; by default the latest."""
        partition = self.partition(thread_id)
        keys = [Key(partition, HEAD)]
        if checkpoint_id is not None:
            keys.append(Key(partition, checkpoint_key(checkpoint_id)))
        return self.chosen(partition, await self.store.coalescer.get(keys), checkpoint_id)

    async def live_head(self, thread_id: str) -> HeadBody | None:
        """Return the head of a thread that there is."""
        head, _ = await self.stored_head(self.partition(thread_id))
        if head is None or not head.holds_any() or not self.alive(head, self.store.clock()):
            return None
        return head

    async def stored_head(self, partition: str) -> tuple[HeadBody | None, int]:
        """Return the head that lies in `partition`, of whatever thread, and its version."""
        (entry,) = await self.store.coalescer.get([Key(partition, HEAD)])
        return (None, ABSENT) if entry is None else (self.head(partition, entry), entry.version)

    def chosen(
        self, partition: str, entries: Sequence[Entry | None], checkpoint_id: str | None
    ) -> CheckpointBody | None:
        """Return the checkpoint asked for, from the entries of the head and, if it has an id, its own."""
        if entries[0] is None:
            return None
        head = self.head(partition, entries[0])
        if not self.alive(head, self.store.clock()):
            return None
        if checkpoint_id is None:
            if head.l is None and head.k:
                message = "no checkpoint of the thread can be read"
                raise CorruptRecordError(message, partition=partition, key=HEAD)
            return head.l
        if entries[1] is None or checkpoint_id <= head.fl:
            return None
        return self.body(partition, entries[1])

    async def _state(
        self, partition: str, body: CheckpointBody, texts: dict[int, bytes]
    ) -> tuple[Any, dict[int, bytes]]:
        """Return the state, and its pieces by number. Those in `texts` need not be read."""
        key = checkpoint_key(body.id)
        try:
            skeleton = msgspec.json.decode(body.s)
            spans = spans_of(skeleton)
            values: dict[int, Any] = {}
            missing = spans
            ready: dict[int, bytes] = {}
            if texts:
                ready = {n: texts[n] for first, last in spans for n in range(first, last + 1) if n in texts}
                self._decode(partition, body.id, ready, values)
                missing = subtract(spans, runs(ready)) if len(ready) < count(spans) else []
            async for entries in self.pages(partition, missing):
                fetched = {number_of(partition, entry.key): entry.value for entry in entries}
                self._decode(partition, body.id, fetched, values)
                if body.z <= _WARM_STATE:
                    ready.update(fetched)
            state = assemble(skeleton, values)
        except KeyError as error:
            message = f"checkpoint {body.id} lacks piece {error}"
            raise MissingPieceError(message, partition=partition, key=key) from error
        except (ValueError, TypeError, IndexError, AttributeError, msgspec.MsgspecError) as error:
            message = f"checkpoint {body.id} cannot be read: {error}"
            raise CorruptRecordError(message, partition=partition, key=key) from error
        return state, ready

    def _decode(
        self, partition: str, checkpoint_id: str, texts: dict[int, bytes], values: dict[int, Any]
    ) -> None:
        # All in one text: a decoder call for each would take longer than the decoding.
        try:
            found = self._pieces.decode(b"[%b]" % b",".join(texts.values()))
            whole = len(found) == len(texts)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            whole = False
        if not whole:
            found = []
            for number, text in texts.items():
                try:
                    (piece,) = self._pieces.decode(b"[%b]" % text)
                except (ValueError, msgspec.MsgspecError, RecursionError) as error:
                    message = f"a piece of checkpoint {checkpoint_id} cannot be read: {error}"
                    raise CorruptRecordError(message, partition=partition, key=piece_key(number)) from error
                found.append(piece)
        for number, piece in zip(texts, found, strict=True):
            values[number] = codec.decode(msgspec.json.encode(piece.v), True) if piece.t else piece.v

    async def pages(self, partition: str, spans: Sequence[Span]) -> AsyncIterator[list[Entry]]:
        """Yield the pieces with these numbers, those that there are: in one call, or one a page."""
        segments = _segments(spans)
        if not segments:
            return
        if len(segments) > 1 and count(spans) <= MAX_GET_KEYS:
            keys = [Key(partition, piece_key(n)) for first, last in spans for n in range(first, last + 1)]
            yield [entry for entry in await self.store.coalescer.get(keys) if entry is not None]
            return
        for at in range(0, len(segments), _SEGMENTS_AT_ONCE):
            some = segments[at : at + _SEGMENTS_AT_ONCE]
            starts = [piece_key(first) for first, _ in some]
            while some:
                pages = await asyncio.gather(
                    *(
                        self.store.coalescer.scan(partition, start, piece_key(last + 1), limit=_PIECES_PAGE)
                        for start, (_, last) in zip(starts, some, strict=True)
                    )
                )
                for page in pages:
                    entries = page.entries
                    if len(segments) < len(spans):  # between those wanted, some others
                        entries = [e for e in entries if covered(number_of(partition, e.key), spans)]
                    yield entries
                starts = [after(page.entries[-1].key) for page in pages if page.more]
                some = [segment for segment, page in zip(some, pages, strict=True) if page.more]

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
        start = CHECKPOINT if after_id is None else after(checkpoint_key(after_id))
        end = _END if before is None else checkpoint_key(before)
        wanted = PAGE if limit is None or match is not None else min(limit + 2, PAGE)
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
        if not self.alive(head, self.store.clock()):
            return [], False
        floor = checkpoint_key(head.fl) if head.fl else CHECKPOINT
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
        start = after(checkpoint_key(head.fl)) if head.fl else CHECKPOINT
        async for entries in self.store.coalescer.pages(partition, start, prefix_end(CHECKPOINT), limit=PAGE):
            found += [self._found(partition, entry) for entry in entries]
        return found

    def _found(self, partition: str, entry: Entry) -> Found:
        id = entry.key[len(CHECKPOINT) :]
        try:
            body = self.body(partition, entry)
            spans = self.spans(partition, body)
        except CorruptRecordError as error:
            return Found(id, None, str(error))
        return Found(id, body, spans=spans)

    def kept_of(self, found: Found, thread_id: str) -> Kept:
        """Return what must be known of a checkpoint to remove it."""
        if found.body is None:
            return Kept(found.id, None, [])
        spans = self.spans("", found.body) if found.spans is None else found.spans
        return Kept(found.id, spans, list(self.hints(found.body, thread_id)))

    async def threads(self, *, limit: int | None, cursor: str | None) -> tuple[list[HeadBody], str | None]:
        """Return the threads that there are, those begun last first, and a cursor for more."""
        place = self.listing
        start = place.prefix if cursor is None else after(place.prefix + cursor)
        found: list[HeadBody] = []
        read = 0
        while True:
            wanted = next_page(limit, len(found), read)
            page = await self.store.coalescer.scan(place.partition, start, None, limit=wanted)
            read += len(page.entries)
            ids = [self.store.unpack(self.hint_decoder, place.partition, e).id for e in page.entries]
            heads = await self.store.coalescer.get([Key(self.partition(id), HEAD) for id in ids])
            for index, (hint, id, entry) in enumerate(zip(page.entries, ids, heads, strict=True)):
                if entry is None:
                    continue
                try:
                    head = self.head(self.partition(id), entry)
                except CorruptRecordError as error:
                    _log.warning("a thread is left out of the listing: %s", error)
                    continue  # repair names it too, and so does whoever asks for it
                if not head.holds_any() or not self.alive(head, self.store.clock()):
                    continue
                if hint.key != self.thread_hint(head):
                    continue
                found.append(head)
                if len(found) == limit:
                    return found, hint.key if page.more or index < len(page.entries) - 1 else None
            if not page.more:
                return found, None
            start = after(page.entries[-1].key)

    def hints(self, body: CheckpointBody, thread_id: str) -> dict[Key, Place]:
        """Return the keys under which a checkpoint is listed."""
        if self.places is None:
            return {}
        tail = f"{newest_first(body.at)}/{body.id.translate(_LAST_FIRST)}"
        return {Key(place.partition, place.prefix + tail): place for place in self.places(body, thread_id)}

    def thread_hint(self, head: HeadBody) -> str:
        """Return the key of a thread in the listing of all."""
        return f"{self.listing.prefix}{newest_first(head.at)}/{encode_id(head.id, 'thread_id')}"

    def alive(self, head: HeadBody, now: int) -> bool:
        """Tell whether there is such a thread at the time `now`."""
        return head.gone is None and (head.e is None or head.e > now) and (head.holds_any() or bool(head.p))

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
        except (TypeError, ValueError, KeyError, IndexError, msgspec.MsgspecError) as error:
            message = f"the skeleton of checkpoint {body.id} cannot be read: {error}"
            raise CorruptRecordError(message, partition=partition, key=checkpoint_key(body.id)) from error

    def forget(self, partition: str) -> None:
        """Forget what is remembered of a thread: it is about to change."""
        warm = self._warm.get(partition)
        if warm is not None:
            warm.head = None

    def memo(self, thread_id: str) -> Memo | None:
        """Return what `cut` has learnt from the state that was put last."""
        warm = self._warm.get(self.partition(thread_id))
        return None if warm is None else warm.memo

    def _warm_of(self, partition: str) -> Warm:
        warm = self._warm.get(partition)
        if warm is None:
            warm = self._warm[partition] = Warm()
            self._weigh(partition, warm, 0)
        self._warm.move_to_end(partition)
        return warm

    def _remember(
        self, partition: str, warm: Warm, cut: Cut, placed: Sequence[int], gone: Sequence[Span]
    ) -> None:
        """Remember the latest state, the one just put, and what is still there of those before it."""
        known = warm.numbers()
        if gone:
            known = {text: number for text, number in known.items() if not covered(number, gone)}
        if len(known) > _EARLIER_PIECES + 2 * len(placed):
            known = {}
        known.update(zip(cut.digests, placed, strict=True))
        warm.known = known
        small = cut.size <= _WARM_STATE
        warm.texts = dict(zip(placed, cut.texts, strict=True)) if small else {}
        warm.memo = cut.memo if small else {}
        self._weigh(partition, warm, cut.size if small else 0)

    def _weigh(self, partition: str, warm: Warm, size: int) -> None:
        """Count what is remembered; forget the threads that were not used for the longest time."""
        if self._warm.get(partition) is not warm:
            return
        # Texts are held as such, and by the memo a second time in another form.
        pieces = len(warm.known or warm.texts) + len(warm.texts)
        weight = 1000 + 200 * pieces + size * (2 if warm.memo else 1)
        if warm.kept:  # the latest stands for all: to look at each would be felt in every put
            latest = warm.kept[-1]
            weight += len(warm.kept) * (300 + 130 * len(latest.spans or ()) + 250 * len(latest.hints))
        self._warm_bytes += weight - warm.weight
        warm.weight = weight
        while len(self._warm) > _WARM_THREADS or (self._warm_bytes > _WARM_BYTES and len(self._warm) > 1):
            # Not this one: who asks for it is about to lock it.
            others = ((name, one) for name, one in self._warm.items() if one is not warm)
            coldest = next((name for name, one in others if not one.lock.locked()), None)
            if coldest is None:
                return
            self._warm_bytes -= self._warm.pop(coldest).weight


def _segments(spans: Sequence[Span]) -> list[Span]:
    """Join spans that are near each other: to read a few pieces too many is cheaper than a call."""
    segments: list[Span] = []
    for first, last in spans:
        if segments and first - segments[-1][1] <= 32:
            segments[-1] = (segments[-1][0], last)
        else:
            segments.append((first, last))
    return segments


def checkpoint_key(id: str) -> str:
    """Return the key of a checkpoint."""
    return CHECKPOINT + encode_id(id, "checkpoint_id")


def piece_key(number: int) -> str:
    """Return the key of a piece."""
    return number_key(PIECE, number)


def number_of(partition: str, key: str) -> int:
    """Return the number of the piece with this key."""
    return key_number(partition, PIECE, key)
