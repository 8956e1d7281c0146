"""Streams that a client can take up again: the parts of an answer, numbered from 0, while it is being made.

In the partition ``stream/<id>`` the entry ``head`` says how many parts there
are, and in which *life* of the stream: an id made with its first part. Part *i*
is ``part/<life>/<i as 12 digits>``, written together with the head and under
the version of the head that its writer had read. So an append is one Write, no
two writers add the same part, and what a delete or an expiry leaves behind
belongs to a life that is over: it is never read, and may be removed at any time.

``lock`` says who continues the stream, and until when.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import AsyncIterator, Mapping
from contextlib import suppress
from math import isfinite
from typing import Any, Final, NamedTuple

import msgspec
from msgspec import Raw
from msgspec.structs import replace

from persistence.calls import Repository, public, public_change
from persistence.coalescer import backoff
from persistence.deadlines import Deadlines
from persistence.driver import ABSENT, Delete, Entry, Key, Op, Put
from persistence.errors import (
    ConflictError,
    CorruptRecordError,
    InvalidValueError,
    OutcomeUnknownError,
    UnavailableError,
)
from persistence.keys import encode_id, number_key, prefix_end
from persistence.store import Body, Chunks, MissingChunkError, Store, pack

__all__ = ["StreamMeta", "Streams"]

_KIND: Final = "stream"
_HEAD, _LOCK, _PART = "head", "lock", "part/"
_LAST_PARTS = frozenset({"finish", "error"})
_CONTENTION_SECONDS = 10.0
_REMEMBERED = 10_000  # streams whose head a writer or reader remembers
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
    """`n` parts of `z` bytes, in the life `life`. `ttl`: milliseconds, 0: none. `big`: some lie in chunks."""

    id: str = ""
    life: str = ""
    n: int = 0
    z: int = 0
    done: bool = False
    at: int = 0
    ttl: int = 0
    big: bool = False

    def alive(self, now: int) -> bool:
        return not self.ttl or now < self.at + self.ttl


class _PartBody(Body):
    at: int = 0


class _LockBody(Body):
    token: str = ""
    until: int = 0


class _Limits(NamedTuple):
    events: int | None
    bytes: int | None
    ttl: int | None  # milliseconds


class _Warm:
    """What a process remembers of a stream."""

    __slots__ = ("head", "lock", "version")

    def __init__(self) -> None:
        self.lock = asyncio.Lock()  # held by who appends
        self.head: _Head | None = None
        self.version = ABSENT


class _ChangedError(Exception):
    """The stream was deleted, or began anew, while it was read."""


class Streams(Repository):
    """Answers while they are being made: one producer appends, whoever was cut off reads on."""

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

        One round trip (two on MongoDB) for who appended or read last, one more
        for any other. `index` must be the number of parts so far, else
        `ConflictError`: so a part is there once, whoever repeats the call.
        After a part whose `type` is ``finish`` or ``error`` nothing more can
        be appended: `ConflictError`. `InvalidValueError` if there would be
        more than `max_events` parts, or more than `max_bytes` bytes of JSON.
        `ttl_seconds`: how long the stream stays after its last part; it is
        kept for later parts that do not say.
        """
        partition = _partition(stream_id)
        limits = _Limits(
            None if max_events is None else _whole(1, max_events, "max_events"),
            None if max_bytes is None else _whole(1, max_bytes, "max_bytes"),
            None if ttl_seconds is None else _as_milliseconds(ttl_seconds, "ttl_seconds"),
        )
        _whole(0, index, "index")
        body = _PartBody(at=self._store.clock())
        last = _is_last(part)
        await self._store.fill(partition, body, part)
        warm = self._warm_of(partition)
        async with warm.lock:
            try:
                head = await self._append(partition, stream_id, index, body, part, last, limits, warm)
            except (ConflictError, InvalidValueError):
                await self._drop_chunks(partition, body)
                raise
            except BaseException:
                warm.head = None  # the Write may have been applied
                raise
        return _meta(head)

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
        message = "the stream changes faster than it can be read"
        raise UnavailableError(message, partition=partition)

    @public
    async def get_meta(self, stream_id: str, *, timeout: float | None = None) -> StreamMeta:
        """Return what is known of a stream; one that is not there has no parts."""
        head, _ = await self._look(_partition(stream_id))
        return _meta(head if head is not None and head.alive(self._store.clock()) else None)

    @public_change
    async def delete(self, stream_id: str, *, timeout: float | None = None) -> int:
        """Delete a stream; return how many parts it had. It may begin anew, with index 0."""
        return await self._delete(_partition(stream_id))

    @public_change
    async def delete_expired(self, *, timeout: float | None = None) -> int:
        """Delete the streams whose time has come; return how many. Nobody sees them any more as it is."""
        deleted = 0

        async def expire(partition: str) -> None:
            nonlocal deleted
            deleted += await self.expire(partition)

        await self._deadlines.sweep(_KIND, expire)
        return deleted

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
        lease = _as_milliseconds(lease_seconds, "lease_seconds")
        taken = await self._hold(_partition(stream_id), None, token, lease)
        return token if taken else None

    @public
    async def renew_continue_lock(
        self, stream_id: str, token: str, *, lease_seconds: float = 30.0, timeout: float | None = None
    ) -> bool:
        """Hold a lock for `lease_seconds` from now on. False: it had ended, or is another's by now."""
        lease = _as_milliseconds(lease_seconds, "lease_seconds")
        return await self._hold(_partition(stream_id), token, token, lease)

    @public
    async def release_continue_lock(
        self, stream_id: str, token: str, *, timeout: float | None = None
    ) -> bool:
        """Give a lock back. False: it had ended, or is another's by now."""
        return await self._hold(_partition(stream_id), token, token, None)

    # ---- appending

    async def _append(
        self,
        partition: str,
        stream_id: str,
        index: int,
        body: _PartBody,
        part: Any,
        last: bool,
        limits: _Limits,
        warm: _Warm,
    ) -> _Head:
        deadline = asyncio.get_running_loop().time() + _CONTENTION_SECONDS
        attempt = 0
        looked = hinted = False
        # Nothing is known of most streams that begin: the Write itself finds out whether that is right.
        found, version = warm.head, ABSENT if warm.head is None else warm.version
        while True:
            live = found if found is not None and found.alive(self._store.clock()) else None
            head = self._next(live, stream_id, body, last, limits)
            doubt = _doubt(partition, index, live, head, limits)
            if doubt is None:
                if head.ttl and not hinted and (live is None or head.ttl != live.ttl):
                    await self._deadlines.put(partition, head.at + head.ttl)
                    hinted = True
                ops: list[Op] = [
                    Put(_HEAD, pack(head), version),
                    Put(_part_key(head.life, index), pack(body), ABSENT),
                ]
                written = await self._store.coalescer.write(partition, ops)
                if written:
                    warm.head, warm.version = head, written
                    if found is not None and live is None:
                        # The part is stored; what cannot be removed now, `repair` will.
                        with suppress(UnavailableError, OutcomeUnknownError):
                            await self._drop_life(partition, found)
                    return head
                if asyncio.get_running_loop().time() > deadline:
                    message = f"other writers were faster for {_CONTENTION_SECONDS:.0f} seconds"
                    raise UnavailableError(message, partition=partition)
                if attempt:
                    await backoff(attempt - 1)
                attempt += 1
                if isinstance(body.c, Chunks):
                    # It may have been written, unanswered, and deleted since: then its chunks are
                    # gone, or about to go.
                    await self._drop_chunks(partition, body)
                    await self._store.fill(partition, body, part)
            elif looked:
                warm.head, warm.version = live, version
                raise doubt
            found, version = await self._look(partition)
            looked = True

    def _next(
        self, live: _Head | None, stream_id: str, body: _PartBody, last: bool, limits: _Limits
    ) -> _Head:
        """Return the head after a part."""
        head = _Head(id=stream_id, life=self._store.ids()) if live is None else live
        size = body.c.size if isinstance(body.c, Chunks) else len(body.v) if isinstance(body.v, Raw) else 0
        return replace(
            head,
            n=head.n + 1,
            z=head.z + size,
            done=head.done or last,
            at=max(head.at, body.at),
            ttl=head.ttl if limits.ttl is None else limits.ttl,
            big=head.big or isinstance(body.c, Chunks),
        )

    async def _look(self, partition: str) -> tuple[_Head | None, int]:
        """Return the head, were it expired, and its version."""
        (entry,) = await self._store.coalescer.get([Key(partition, _HEAD)])
        if entry is None:
            return None, ABSENT
        return self._store.unpack(self._heads, partition, entry), entry.version

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
        guess = warm.head
        # Who knows the life reads both at once; of what it was wrong about nothing is used.
        looking = self._look(partition)
        if guess is None:
            head, version = await looking
            page = None
        else:
            (head, version), page = await asyncio.gather(
                looking, self._page(partition, guess.life, start, limit)
            )
        live = head if head is not None and head.alive(self._store.clock()) else None
        count = 0 if live is None else live.n
        if not warm.lock.locked():
            warm.head, warm.version = live, version
        if start > count:
            message = f"from_index={start}: the stream has {count} parts"
            raise InvalidValueError(message, partition=partition)
        if live is None:
            return []
        end = count if limit is None else min(count, start + limit)
        if page is None or guess is None or guess.life != live.life:
            page = await self._page(partition, live.life, start, limit)
        parts: list[Any] = []
        while True:
            for entry in page:
                parts.append(await self._value(partition, live, start + len(parts), entry))
            if start + len(parts) >= end:
                return parts
            left = None if limit is None else limit - len(parts)
            page = await self._page(partition, live.life, start + len(parts), left)
            if not page:
                await self._missing(partition, live, start + len(parts))

    async def _page(self, partition: str, life: str, start: int, limit: int | None) -> list[Entry]:
        most = _PAGE if limit is None else min(limit, _PAGE)
        if not most:
            return []
        prefix = _part_prefix(life)
        page = await self._store.coalescer.scan(
            partition, _part_key(life, start), prefix_end(prefix), limit=most
        )
        return page.entries

    async def _value(self, partition: str, head: _Head, index: int, entry: Entry) -> Any:
        if entry.key != _part_key(head.life, index):
            await self._missing(partition, head, index)
        body = self._store.unpack(self._parts, partition, entry)
        try:
            return await self._store.value(partition, entry.key, body)
        except MissingChunkError:
            await self._missing(partition, head, index)
            raise

    async def _missing(self, partition: str, head: _Head, index: int) -> None:
        """Raise for a part that is not there: the stream was deleted meanwhile, or is corrupt."""
        now, _ = await self._look(partition)
        if now is None or now.life != head.life:
            raise _ChangedError
        message = f"part {index} of the stream is missing"
        raise CorruptRecordError(message, partition=partition, key=_part_key(head.life, index))

    # ---- removing

    async def _delete(self, partition: str) -> int:
        attempt = 0
        deadline = asyncio.get_running_loop().time() + _CONTENTION_SECONDS
        while True:
            head, version = await self._look(partition)
            if head is None:
                return 0
            if await self._remove(partition, head, version):
                return head.n if head.alive(self._store.clock()) else 0
            if asyncio.get_running_loop().time() > deadline:
                message = f"other writers were faster for {_CONTENTION_SECONDS:.0f} seconds"
                raise UnavailableError(message, partition=partition)
            await backoff(attempt)
            attempt += 1

    async def _remove(self, partition: str, head: _Head, version: int) -> bool:
        # The lock stays: who deletes a stream to begin it anew may be the one who holds it.
        if not await self._store.coalescer.write(partition, [Delete(_HEAD, version)]):
            return False
        await self._drop_life(partition, head)
        return True

    async def _drop_life(self, partition: str, head: _Head) -> None:
        prefix = _part_prefix(head.life)
        if head.big:
            async for chunks in self._chunks(partition, prefix):
                await self._store.drop_chunks(partition, [chunks])
        await self._store.coalescer.purge(partition, prefix, prefix_end(prefix))

    async def _chunks(self, partition: str, prefix: str) -> AsyncIterator[Chunks]:
        async for entries in self._store.coalescer.pages(partition, prefix, prefix_end(prefix), limit=_PAGE):
            for entry in entries:
                body = self._store.unpack(self._parts, partition, entry)
                if isinstance(body.c, Chunks):
                    yield body.c

    async def _drop_chunks(self, partition: str, body: _PartBody) -> None:
        if isinstance(body.c, Chunks):
            await self._store.drop_chunks(partition, [body.c])

    async def expire(self, partition: str) -> bool:
        """Delete the stream of `partition` if its time has come; tell whether it was so."""
        while True:
            head, version = await self._look(partition)
            if head is None:
                return False
            if head.alive(self._store.clock()):
                if head.ttl:  # it went on since: its end is a later one
                    await self._deadlines.put(partition, head.at + head.ttl)
                return False
            if await self._remove(partition, head, version):
                return True

    # ---- repair

    async def has_expired(self, partition: str) -> bool:
        """Tell whether the time of the stream of `partition` has come."""
        head, _ = await self._look(partition)
        return head is not None and not head.alive(self._store.clock())

    async def leftovers(self, partition: str) -> list[str]:
        """Return the lives that are over and of which parts are left."""
        lives = []
        start, end = _PART, prefix_end(_PART)
        while (page := await self._store.coalescer.scan(partition, start, end, limit=1)).entries:
            life = page.entries[0].key.split("/")[1]
            lives.append(life)
            start = prefix_end(_part_prefix(life))
        # Read after them: what was there and is not the present life will never be again.
        head, _ = await self._look(partition)
        return [life for life in lives if head is None or life != head.life]

    async def drop_leftovers(self, partition: str, lives: list[str]) -> None:
        """Remove what `leftovers` found."""
        for life in lives:
            await self._store.coalescer.purge(partition, _part_prefix(life), prefix_end(_part_prefix(life)))

    async def drop_ended_lock(self, partition: str) -> None:
        """Remove the lock if its time is up."""
        held, version = await self._held(partition)
        if held is None and version:
            await self._store.coalescer.write(partition, [Delete(_LOCK, version)])

    async def chunk_ids(self, partition: str) -> set[str]:
        """Return the ids of the chunks that parts lie in."""
        return {chunks.id async for chunks in self._chunks(partition, _PART)}

    # ---- locks

    async def _held(self, partition: str) -> tuple[str | None, int]:
        """Return the token of who holds the lock, and the version of what lies there."""
        (entry,) = await self._store.coalescer.get([Key(partition, _LOCK)])
        if entry is None:
            return None, ABSENT
        body = self._store.unpack(self._locks, partition, entry)
        return (body.token if body.until > self._store.clock() else None), entry.version

    async def _hold(self, partition: str, holder: str | None, token: str, lease: int | None) -> bool:
        """Give the lock to `token`, or back if `lease` is None, if `holder` holds it now."""
        held, version = await self._held(partition)
        if held != holder:
            return False
        op: Op
        if lease is None:
            op = Delete(_LOCK, version)
        else:
            op = Put(_LOCK, pack(_LockBody(token=token, until=self._store.clock() + lease)), version)
        return bool(await self._store.coalescer.write(partition, [op]))


def _doubt(
    partition: str, index: int, live: _Head | None, head: _Head, limits: _Limits
) -> ConflictError | InvalidValueError | None:
    count = 0 if live is None else live.n
    if index != count:
        message = f"the stream has {count} parts: the next index is {count}, not {index}"
        return ConflictError(message, partition=partition)
    if live is not None and live.done:
        message = "the stream has ended: delete it to begin it anew"
        return ConflictError(message, partition=partition)
    if limits.events is not None and head.n > limits.events:
        message = f"the stream has {count} parts; max_events={limits.events}"
        return InvalidValueError(message, partition=partition)
    if limits.bytes is not None and head.z > limits.bytes:
        message = f"the stream would have {head.z:,} bytes; max_bytes={limits.bytes}"
        return InvalidValueError(message, partition=partition)
    return None


def _is_last(part: Any) -> bool:
    kind = part.get("type") if isinstance(part, Mapping) else None
    return isinstance(kind, str) and kind in _LAST_PARTS


def _meta(head: _Head | None) -> StreamMeta:
    if head is None:
        return StreamMeta(next_index=0, completed=False, updated_at=None, size_bytes=0, expires_at=None)
    return StreamMeta(
        next_index=head.n,
        completed=head.done,
        updated_at=head.at,
        size_bytes=head.z,
        expires_at=head.at + head.ttl if head.ttl else None,
    )


def _partition(stream_id: str) -> str:
    return f"{_KIND}/{encode_id(stream_id, 'stream_id')}"


def _part_prefix(life: str) -> str:
    return f"{_PART}{life}/"


def _part_key(life: str, index: int) -> str:
    return number_key(_part_prefix(life), index)


def _whole(least: int, value: int, what: str) -> int:
    if type(value) is not int or value < least:
        message = f"{what}={value!r:.80}: use a whole number from {least} on"
        raise InvalidValueError(message)
    return value


def _as_milliseconds(seconds: float, what: str) -> int:
    number = isinstance(seconds, int | float) and not isinstance(seconds, bool)
    if not number or not isfinite(seconds) or seconds <= 0 or seconds * 1000 >= 1 << 53:
        message = f"{what}={seconds!r:.80}: use seconds, more than 0"
        raise InvalidValueError(message)
    return max(1, round(seconds * 1000))
