"""Streams that a client can take up again: the parts of an answer, numbered from 0, while it is being made.

In the partition ``stream/<id>`` the entry ``head`` names the present *life* of
the stream: an id made with its first part. Part *i* is the entry
``part/<life>/<i>``, created where nothing was, ``expect=ABSENT``: so an append
is one Put, and no two writers add the same part. Each part carries what the
next one must know: how long all are together, whether the last has come.

A life ends when the stream is deleted, or begins anew after it has expired:
one Write gives the head no life, or another, and puts a *mark* where the next
part would go, so that a writer who knows of nothing is refused. What is left
of a life that is over is never read, and may be removed at any time; the mark,
and a head without a life, stay for a day: longer than any writer goes by what
it knows, or any Write is on its way.

``lock`` says who continues the stream, and until when.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import AsyncIterator, Mapping
from contextlib import suppress
from typing import Any, Final, NamedTuple, NoReturn

import msgspec
from msgspec import UNSET, Raw

from persistence.calls import Repository, public, public_change
from persistence.coalescer import Tries, backoff
from persistence.deadlines import Deadlines
from persistence.driver import ABSENT, Check, Delete, Entry, Key, Op, Put
from persistence.errors import (
    ConflictError,
    CorruptRecordError,
    InvalidValueError,
    OutcomeUnknownError,
    UnavailableError,
    shown,
)
from persistence.ids import lifetime_ms, steady_seconds
from persistence.keys import MAX_NUMBER, encode_id, key_number, number_key, prefix_end
from persistence.log import FORGET_SECONDS
from persistence.store import Body, Chunks, MissingChunkError, Store, pack

__all__ = ["StreamMeta", "StreamRepair", "Streams"]

_KIND: Final = "stream"
_HEAD, _LOCK, _PART = "head", "lock", "part/"
_LAST_PARTS = frozenset({"finish", "error"})
_REMEMBERED = 10_000  # streams whose end a process remembers
_PAGE = 500
_READ_TRIES = 6


class StreamMeta(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of a stream. Times are Unix milliseconds."""

    next_index: int
    """How many parts there are, and so the index of the next one."""
    completed: bool
    """Whether the last part is one that ends the stream."""
    updated_at: int | None
    """When the last part was appended; None where there is none."""
    size_bytes: int
    """The length of all parts as JSON."""
    expires_at: int | None
    """When the stream goes unless it is continued before; None: never."""


class _Head(Body):
    """`life`: the id of the present life; "" if the stream was deleted, which was at `at`."""

    id: str = ""
    life: str = ""
    at: int = 0


class _PartBody(Body):
    """A part (`v` or `c`), or the mark after the last one (`gone`).

    `z`: bytes of all parts so far. `done`: this one ends the stream. `ttl`: milliseconds that the
    stream stays, 0: for ever. `big`: some parts so far lie in chunks.
    """

    at: int = 0
    z: int = 0
    done: bool = False
    ttl: int = 0
    big: bool = False
    gone: bool = False


class _LockBody(Body):
    token: str = ""
    until: int = 0


class _Limits(NamedTuple):
    events: int | None
    bytes: int | None
    ttl: int | None  # milliseconds


class _End(NamedTuple):
    """What is known of a stream, and since when: its head, how many parts it has, and the last of them."""

    id: str
    life: str  # "": it was deleted, and has no parts
    head: int  # the version of the head
    parts: int
    last: _PartBody
    since: float
    version: int = ABSENT  # of the last part


class StreamRepair(NamedTuple):
    """What was done for one stream, or would be."""

    expired: bool
    left: int  # lives that were over, and of which parts were left
    marks: int


class _Warm:
    """What a process remembers of a stream."""

    __slots__ = ("end", "lock")

    def __init__(self) -> None:
        self.lock = asyncio.Lock()  # held by who appends
        self.end: _End | None = None


class _ChangedError(Exception):
    """The stream was deleted, or began anew, while it was read."""


class Streams(Repository):
    """Answers while they are being made: one producer appends, whoever was cut off reads on.

    What all calls have in common, `Persistence` says.
    """

    def __init__(self, store: Store) -> None:
        super().__init__(store)
        self._deadlines = Deadlines(store)
        self._warm: OrderedDict[str, _Warm] = OrderedDict()
        self._heads = msgspec.json.Decoder(_Head)
        self._parts = msgspec.json.Decoder(_PartBody)
        self._locks = msgspec.json.Decoder(_LockBody)

    # ---- what users call

    @public
    async def append(
        self,
        stream_id: str,
        index: int,
        part: Any,
        *,
        max_events: int | None = None,
        max_bytes: int | None = None,
        ttl_seconds: float | None = None,
        timeout: float | None = None,
    ) -> StreamMeta:
        """Append a part, any value that can be stored; return what is known of the stream then.

        One round trip for who begins the stream (two on MongoDB), or has
        appended or read before; two for any other. One more where a new
        `ttl_seconds` is noted; three for who begins what another has deleted.

        `index` must be the number of parts so far, else `ConflictError`: so a
        part is there once, whoever repeats the call. After a part whose `type`
        is ``finish`` or ``error`` nothing more can be appended:
        `ConflictError`. `InvalidValueError` if there would be more than
        `max_events` parts, or more than `max_bytes` bytes of JSON.
        `ttl_seconds`: how long the stream stays after its last part; it is
        kept for later parts that do not say.
        """
        partition = _partition(stream_id)
        limits = _Limits(
            None if max_events is None else _whole(1, max_events, "max_events"),
            None if max_bytes is None else _whole(1, max_bytes, "max_bytes"),
            None if ttl_seconds is None else lifetime_ms(ttl_seconds, "ttl_seconds"),
        )
        _whole(0, index, "index")
        body = _PartBody(done=_is_last(part))
        await self._store.fill(partition, body, part)
        warm = self._warm_of(partition)
        async with warm.lock:
            try:
                end = await self._append(partition, stream_id, index, body, part, limits, warm)
            except (ConflictError, InvalidValueError):
                await self._store.drop_chunks(partition, [body.c])
                raise
            except BaseException:
                warm.end = None  # the Write may have been applied
                raise
        return _meta(end)

    @public
    async def get_parts(
        self,
        stream_id: str,
        from_index: int = 0,
        *,
        limit: int | None = None,
        timeout: float | None = None,
    ) -> list[Any]:
        """Return the parts from `from_index` on, at most `limit`; none if there are none yet.

        `InvalidValueError` if there are fewer than `from_index`: what the
        client has seen is not there any more.
        """
        partition = _partition(stream_id)
        _whole(0, from_index, "from_index")
        if limit is not None:
            _whole(0, limit, "limit")
        for attempt in range(_READ_TRIES):
            with suppress(_ChangedError):
                return await self._read(partition, from_index, limit)
            await backoff(attempt)
        raise _restless(partition)

    @public
    async def get_meta(self, stream_id: str, *, timeout: float | None = None) -> StreamMeta:
        """Return what is known of a stream; one that is not there has no parts."""
        return _meta(self._alive(await self._look(_partition(stream_id))))

    @public_change
    async def delete(self, stream_id: str, *, timeout: float | None = None) -> int:
        """Delete a stream; return how many parts it had. It may begin anew, with index 0."""
        partition = _partition(stream_id)
        try:
            end = await self._delete(partition)
        except CorruptRecordError:
            await self._replace_head(partition, stream_id)
            end = await self._delete(partition)
        await self._drop_unread_lock(partition)
        return end.parts if end is not None and self._alive(end) else 0

    @public_change
    async def delete_expired(self, *, timeout: float | None = None) -> int:
        """Delete the expired streams, which nobody sees any more anyway; return how many."""
        return await self._sweep()

    @public
    async def acquire_continue_lock(
        self, stream_id: str, *, lease_seconds: float = 30.0, timeout: float | None = None
    ) -> str | None:
        """Become the one who continues a stream; return a token, or None if another one is.

        The lock ends by itself after `lease_seconds`, by the clocks of those
        who ask. It keeps two from doing the same work; parts are safe without
        it, because each index is appended once.
        """
        token = self._store.ids()
        lease = lifetime_ms(lease_seconds, "lease_seconds")
        taken = await self._hold(_partition(stream_id), None, token, lease)
        return token if taken else None

    @public
    async def renew_continue_lock(
        self, stream_id: str, token: str, *, lease_seconds: float = 30.0, timeout: float | None = None
    ) -> bool:
        """Hold a lock, whose `token` one has, for `lease_seconds` from now on.

        False: it had ended, or is another's by now.
        """
        lease = lifetime_ms(lease_seconds, "lease_seconds")
        return await self._hold(_partition(stream_id), token, token, lease)

    @public
    async def release_continue_lock(
        self, stream_id: str, token: str, *, timeout: float | None = None
    ) -> bool:
        """Give a lock, whose `token` one has, back. False: it had ended, or is another's by now."""
        return await self._hold(_partition(stream_id), token, token, None)

    # ---- appending

    async def _append(
        self,
        partition: str,
        stream_id: str,
        index: int,
        body: _PartBody,
        part: Any,
        limits: _Limits,
        warm: _Warm,
    ) -> _End:
        tries = Tries(partition)
        hinted = False
        end = warm.end if warm.end is None or steady_seconds() - warm.end.since < FORGET_SECONDS else None
        looked = False  # nothing is known of most streams that begin: the Write itself finds out
        while True:
            live = self._alive(end)
            body.at = max(self._store.clock(), live.last.at if live else 0)  # clocks differ, and step back
            _continue(body, live, limits)
            doubt = _doubt(partition, index, body, live, limits)
            if doubt is None:
                if body.ttl and not hinted and (live is None or body.ttl != live.last.ttl):
                    await self._deadlines.put(partition, body.at + body.ttl)
                    hinted = True
                created = await self._create(partition, stream_id, index, body, end, live)
                if created is not None:
                    warm.end = created
                    # The part is stored; what cannot be done now, `repair` will do.
                    with suppress(UnavailableError, OutcomeUnknownError):
                        if live is None and end is not None and end.life:
                            await self._drop_life(partition, end)
                    return created
                await tries.another()
                await self._store.refill(partition, body, part)
            elif looked:
                warm.end = end
                raise doubt
            end, looked = await self._look(partition), True

    async def _create(
        self, partition: str, stream_id: str, index: int, body: _PartBody, end: _End | None, live: _End | None
    ) -> _End | None:
        """Write a part after `live`, or the first of a life after `end`; return the end, None: refused."""
        since = steady_seconds()
        life = self._store.ids() if live is None else live.life
        ops: list[Op] = [Put(_part_key(life, index), pack(body), ABSENT)]
        if live is None:
            ops.append(Put(_HEAD, pack(_Head(id=stream_id, life=life)), end.head if end else ABSENT))
            if end is not None and end.life:
                ops.append(self._mark(end))
        elif self._store.coalescer.may_lose and live.version:  # after a lost one it would leave a hole
            ops.append(Check(_part_key(life, index - 1), live.version))
        version = await self._store.coalescer.write(partition, ops)
        if not version:
            return None
        body.v = body.c = UNSET  # what is remembered must stay small
        return _End(stream_id, life, version if live is None else live.head, index + 1, body, since, version)

    def _alive(self, end: _End | None) -> _End | None:
        """Return `end` unless the stream was deleted, or has expired."""
        if end is None or not end.life:
            return None
        return None if end.last.ttl and self._store.clock() >= end.last.at + end.last.ttl else end

    def _mark(self, end: _End) -> Put:
        """Return what ends a life: nobody appends to it any more."""
        return Put(_part_key(end.life, end.parts), pack(_PartBody(at=self._store.clock(), gone=True)), ABSENT)

    async def _look(self, partition: str, *, deleting: bool = False) -> _End | None:
        """Read the end of the stream, expired or not: one round trip, two for one that began anew of late.

        Who is `deleting` it need not be able to read the last part.
        """
        for attempt in range(_READ_TRIES):
            since = steady_seconds()
            heads, entry = await asyncio.gather(
                self._store.coalescer.get([Key(partition, _HEAD)]), self._greatest(partition, _PART)
            )
            if heads[0] is None:
                return None
            head = self._store.unpack(self._heads, partition, heads[0])
            life, version = head.life, heads[0].version
            if not life:
                return _End(head.id, "", version, 0, _PartBody(at=head.at), since)
            if entry is None or not entry.key.startswith(_life_prefix(life)):
                entry = await self._greatest(partition, _life_prefix(life))
            if entry is None:
                message = "the stream has no parts"
                raise CorruptRecordError(message, partition=partition, key=_HEAD)
            try:
                body = self._store.unpack(self._parts, partition, entry)
            except CorruptRecordError:
                if not deleting:
                    raise
                body = _PartBody(big=True)  # perhaps
            if not body.gone:
                body.v = body.c = UNSET
                parts = key_number(partition, _life_prefix(life), entry.key) + 1
                return _End(head.id, life, version, parts, body, since, entry.version)
            await backoff(attempt)  # its head was read before the end of this life, the mark after it
        raise _restless(partition)

    async def _greatest(self, partition: str, prefix: str) -> Entry | None:
        page = await self._store.coalescer.scan(partition, prefix, prefix_end(prefix), limit=1, reverse=True)
        return page.entries[0] if page.entries else None

    def _warm_of(self, partition: str) -> _Warm:
        warm = self._warm.get(partition)
        if warm is None:
            warm = self._warm[partition] = _Warm()
            if len(self._warm) > _REMEMBERED:
                self._warm.popitem(last=False)
        self._warm.move_to_end(partition)
        return warm

    # ---- reading

    async def _read(self, partition: str, start: int, limit: int | None) -> list[Any]:
        warm = self._warm_of(partition)
        page: list[Entry] = []
        if warm.end is None:
            end = await self._look(partition)
        else:
            # Who knows the life reads both at once; of another life nothing is used.
            guess = warm.end.life
            end, page = await asyncio.gather(
                self._look(partition), self._page(partition, guess, start, _PAGE if limit is None else limit)
            )
            if end is None or end.life != guess:
                page = []
        if not warm.lock.locked():
            warm.end = end
        live = self._alive(end)
        count = 0 if live is None else live.parts
        if start > count:
            message = f"from_index={start}: the stream has {count} parts"
            raise InvalidValueError(message, partition=partition)
        parts: list[Any] = []
        if live is None:
            return parts
        stop = count if limit is None else min(count, start + limit)
        while start < stop:
            page = page or await self._page(partition, live.life, start, stop - start)
            if not page:
                await self._missing(partition, live, start)
            for entry in page[: stop - start]:
                parts.append(await self._value(partition, live, start, entry))
                start += 1
            page = []
        return parts

    async def _page(self, partition: str, life: str, start: int, limit: int) -> list[Entry]:
        if not limit:
            return []
        first, end = _part_key(life, start), prefix_end(_life_prefix(life))
        return (await self._store.coalescer.scan(partition, first, end, limit=min(limit, _PAGE))).entries

    async def _value(self, partition: str, end: _End, index: int, entry: Entry) -> Any:
        body = self._store.unpack(self._parts, partition, entry)
        if body.gone or entry.key != _part_key(end.life, index):
            await self._missing(partition, end, index)
        try:
            return await self._store.value(partition, entry.key, body)
        except MissingChunkError:
            await self._missing(partition, end, index)

    async def _missing(self, partition: str, end: _End, index: int) -> NoReturn:
        """Raise for a part that is not there: the stream was deleted meanwhile, or is corrupt."""
        now = await self._look(partition)
        if now is None or now.life != end.life:
            raise _ChangedError
        message = f"part {index} of the stream is missing, or its content is"
        raise CorruptRecordError(message, partition=partition, key=_part_key(end.life, index))

    # ---- removing

    async def _sweep(self) -> int:
        """Do what `delete_expired` does."""
        deleted = 0

        async def expire(partition: str) -> bool:
            nonlocal deleted
            gone = await self._delete(partition, only_expired=True) is not None
            deleted += gone
            return gone

        await self._deadlines.sweep(_KIND, expire)
        return deleted

    async def _delete(self, partition: str, *, only_expired: bool = False) -> _End | None:
        """End the present life; return what its end was, None if there is nothing to delete.

        With `only_expired` one that goes on is left as it is, and its new deadline noted.
        """
        tries = Tries(partition)
        while True:
            end = await self._look(partition, deleting=not only_expired)
            if end is None or not end.life:
                return None
            if only_expired and self._alive(end):
                if end.last.ttl:  # it went on since it was noted: its end is a later one
                    await self._deadlines.put(partition, end.last.at + end.last.ttl)
                return None
            # The lock stays: who deletes a stream to begin it anew may be the one who holds it.
            head = Put(_HEAD, pack(_Head(id=end.id, at=self._store.clock())), end.head)
            if await self._store.coalescer.write(partition, [self._mark(end), head]):
                await self._drop_life(partition, end)
                return end
            await tries.another()

    async def _replace_head(self, partition: str, stream_id: str) -> None:
        """Put a head with the life that is not over in the place of one that cannot be read."""
        (entry,) = await self._store.coalescer.get([Key(partition, _HEAD)])
        if entry is None:
            return
        present = ""
        for life in await self._store.coalescer.names(partition, _PART):
            last = await self._greatest(partition, _life_prefix(life))
            with suppress(CorruptRecordError):
                if last is None or self._store.unpack(self._parts, partition, last).gone:
                    continue
            present = life
        head = _Head(id=stream_id, life=present, at=self._store.clock())
        await self._store.coalescer.write(partition, [Put(_HEAD, pack(head), entry.version)])

    async def _drop_life(self, partition: str, end: _End) -> None:
        if end.last.big:
            chunks = [one async for one in self._chunks(partition, end.life)]
            await self._store.drop_chunks(partition, chunks)
        await self._purge(partition, end.life, end.parts)

    async def _purge(self, partition: str, life: str, count: int) -> None:
        await self._store.coalescer.purge(partition, _part_key(life, 0), _part_key(life, count))

    async def _chunks(self, partition: str, life: str | None = None) -> AsyncIterator[Chunks]:
        """Yield where parts lie in chunks: all of them, or those of a life that can be read."""
        prefix = _PART if life is None else _life_prefix(life)
        async for entries in self._store.coalescer.pages(partition, prefix, prefix_end(prefix), limit=_PAGE):
            for entry in entries:
                try:
                    body = self._store.unpack(self._parts, partition, entry)
                except CorruptRecordError:
                    if life is None:
                        raise
                    continue
                if isinstance(body.c, Chunks):
                    yield body.c

    # ---- repair

    async def _repair(self, partition: str, *, before: int, dry_run: bool) -> StreamRepair:
        """Remove an expired stream, what a crash left of deleted ones, old marks, and a lock that has ended.

        Marks, and a head without a life, go if they are older than `before` (ms).
        """
        end = await self._look(partition)
        expired = end is not None and bool(end.life) and not self._alive(end)
        if expired and not dry_run:
            await self._delete(partition, only_expired=True)
        left = marks = 0
        if end is not None and not end.life and end.last.at < before and not dry_run:
            await self._store.coalescer.write(partition, [Delete(_HEAD, end.head)])
        for life, entry in await self._lives_over(partition):
            try:
                body = self._store.unpack(self._parts, partition, entry)
            except CorruptRecordError:
                # Nothing of this life is wanted: a new mark takes the place, and goes in its turn.
                body = _PartBody(at=self._store.clock(), gone=True)
                mark = Put(entry.key, pack(body), entry.version)
                if not dry_run and not await self._store.coalescer.write(partition, [mark]):
                    continue
            count = key_number(partition, _life_prefix(life), entry.key) + (not body.gone)
            first = await self._page(partition, life, 0, 1)
            if first and first[0].key < _part_key(life, count):
                left += 1
                if not dry_run:
                    await self._purge(partition, life, count)
            if body.gone and body.at < before:
                marks += 1
                if not dry_run:
                    await self._store.coalescer.write(
                        partition, [Delete(entry.key, entry.version)], hint=True
                    )
        held, version = await self._held(partition)
        if held is None and version and not dry_run:
            await self._store.coalescer.write(partition, [Delete(_LOCK, version)])
        return StreamRepair(expired, left, marks)

    async def _lives_over(self, partition: str) -> list[tuple[str, Entry]]:
        """Return the lives that are over and their greatest entries."""
        lives = await self._store.coalescer.names(partition, _PART)
        ends = [(life, await self._greatest(partition, _life_prefix(life))) for life in lives]
        # Read after them: what was there, and is not the present life, will never be again.
        (head,) = await self._store.coalescer.get([Key(partition, _HEAD)])
        present = "" if head is None else self._store.unpack(self._heads, partition, head).life
        return [(life, entry) for life, entry in ends if entry is not None and life != present]

    async def _chunk_ids(self, partition: str) -> set[str]:
        """Return the ids of the chunks that parts lie in."""
        return {chunks.id async for chunks in self._chunks(partition)}

    # ---- locks

    async def _held(self, partition: str) -> tuple[str | None, int]:
        """Return the token of who holds the lock, and the version of what lies there."""
        (entry,) = await self._store.coalescer.get([Key(partition, _LOCK)])
        if entry is None:
            return None, ABSENT
        body = self._store.unpack(self._locks, partition, entry)
        return (body.token if body.until > self._store.clock() else None), entry.version

    async def _drop_unread_lock(self, partition: str) -> None:
        """Remove a lock that cannot be read: nobody holds it, and nobody could take it."""
        (entry,) = await self._store.coalescer.get([Key(partition, _LOCK)])
        if entry is not None:
            try:
                self._store.unpack(self._locks, partition, entry)
            except CorruptRecordError:
                await self._store.coalescer.write(partition, [Delete(_LOCK, entry.version)])

    async def _hold(self, partition: str, holder: str | None, token: str, lease: int | None) -> bool:
        """Give the lock to `token`, or back if `lease` is None, if `holder` holds it now."""
        if not isinstance(token, str):
            message = f"token={shown(token)}: use what acquire_continue_lock has returned"
            raise InvalidValueError(message, partition=partition)
        tries = Tries(partition)
        while True:
            held, version = await self._held(partition)
            if held != holder:
                return False
            op: Op
            if lease is None:
                op = Delete(_LOCK, version)
            else:
                op = Put(_LOCK, pack(_LockBody(token=token, until=self._store.clock() + lease)), version)
            if await self._store.coalescer.write(partition, [op]):
                return True
            await tries.another()


def _continue(body: _PartBody, live: _End | None, limits: _Limits) -> None:
    """Fill in the fields of a part that sum up the stream so far."""
    before = _PartBody() if live is None else live.last
    size = body.c.size if isinstance(body.c, Chunks) else len(body.v) if isinstance(body.v, Raw) else 0
    body.z = before.z + size
    body.ttl = before.ttl if limits.ttl is None else limits.ttl
    body.big = before.big or isinstance(body.c, Chunks)


def _doubt(
    partition: str, index: int, body: _PartBody, live: _End | None, limits: _Limits
) -> ConflictError | InvalidValueError | None:
    count = 0 if live is None else live.parts
    if index != count:
        message = f"the stream has {count} parts: the next index is {count}, not {index}"
        return ConflictError(message, partition=partition)
    if live is not None and live.last.done:
        message = "the stream has ended: delete it to begin it anew"
        return ConflictError(message, partition=partition)
    if limits.events is not None and count >= limits.events:
        message = f"the stream has {count} parts; max_events={limits.events}"
        return InvalidValueError(message, partition=partition)
    if limits.bytes is not None and body.z > limits.bytes:
        message = f"the stream would have {body.z:,} bytes; max_bytes={limits.bytes}"
        return InvalidValueError(message, partition=partition)
    return None


def _restless(partition: str) -> UnavailableError:
    message = "the stream changes faster than it can be read"
    return UnavailableError(message, partition=partition)


def _is_last(part: Any) -> bool:
    kind = part.get("type") if isinstance(part, Mapping) else None
    return isinstance(kind, str) and kind in _LAST_PARTS


def _meta(end: _End | None) -> StreamMeta:
    if end is None:
        return StreamMeta(next_index=0, completed=False, updated_at=None, size_bytes=0, expires_at=None)
    last = end.last
    return StreamMeta(
        next_index=end.parts,
        completed=last.done,
        updated_at=last.at,
        size_bytes=last.z,
        expires_at=last.at + last.ttl if last.ttl else None,
    )


def _partition(stream_id: str) -> str:
    return f"{_KIND}/{encode_id(stream_id, 'stream_id')}"


def _life_prefix(life: str) -> str:
    return f"{_PART}{life}/"


def _part_key(life: str, index: int) -> str:
    return number_key(_life_prefix(life), index)


def _whole(least: int, value: int, what: str) -> int:
    if type(value) is not int or not least <= value <= MAX_NUMBER:
        message = f"{what}: use a whole number from {least} to {MAX_NUMBER:,}"
        raise InvalidValueError(message)
    return value
