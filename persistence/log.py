"""Sequences: messages and events that are appended, never edited.

Entry number *i* of a sequence is the key ``message/<i as 12 digits>``. An append
creates the key after the greatest one, ``expect=ABSENT``: one Put, one round
trip, and whoever is slower is refused and goes on after the winner. So numbers
have no gaps, and their order is the order of the commits, on every engine.

Clear, truncate and delete append a *marker*: it lists the number ranges that
are still visible, and thereby hides everything else at once, in one Put. Each
entry carries `n`, the count of visible entries up to it, and `m`, the number of
the last marker before it, so the greatest entry alone answers "how many" and
tells a reader whether there is a marker to read.

Hidden entries are then overwritten by empty *stubs*: their numbers must not
become free while a slow writer may still remember a number before them. A
writer forgets what it remembers after `FORGET_SECONDS`; `repair` removes stubs
after a day.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from functools import partial
from math import inf
from typing import Any, Final, Literal, TypeVar

import msgspec
from msgspec import UNSET
from msgspec.structs import replace

from persistence.coalescer import CALL, RETRY_SECONDS, Call, Lodger, Tries, backoff, fail, give_way, outpaced
from persistence.driver import ABSENT, MAX_WRITE_OPS, Check, Delete, Entry, Key, Op, Put
from persistence.errors import (
    ConflictError,
    CorruptRecordError,
    NotFoundError,
    PersistenceError,
    UnavailableError,
)
from persistence.ids import steady_seconds
from persistence.keys import MAX_NUMBER, key_number, number_key, prefix_end
from persistence.store import Body, Chunks, MissingChunkError, Store, pack

__all__ = [
    "APPEND_BYTES",
    "APPEND_ENTRIES",
    "COPIED",
    "FORGET_SECONDS",
    "Item",
    "Log",
    "LogBody",
    "Span",
    "StoredItem",
    "Tail",
]

T = TypeVar("T")

APPEND_ENTRIES: Final = 900
"""Entries that one append can add atomically."""
_OVERHEAD_BYTES = 128  # key and object around a value
APPEND_BYTES: Final = (3 << 20) + APPEND_ENTRIES * _OVERHEAD_BYTES
"""Bytes that one append can add atomically: 3 MiB of values, and what is around them."""
COPIED: Final = "~/"
"""How the `once` of an append begins that copies: that of a user, an encoded id, never does."""
FORGET_SECONDS: Final = 600.0
"""How long a writer goes by a number that it remembers."""

_REMEMBERED = 10_000  # sequences whose end a writer remembers
_PAGE = 500
_READ_TRIES = 6
_REFUSALS = 3  # so many at least make an append give up: a store that was away for long is no competitor

Span = tuple[int, int]
"""First and last number of a run of entries."""

Kind = Literal["entry", "cut", "delete", "restore", "stub"]


class LogBody(Body):
    """An entry (`v` or `c`), a marker (`r`), or a stub.

    `n`: visible entries up to this one. `m`: number of the last marker, this
    one included. `b`: number of the marker after the last delete, 0: none. `at`:
    milliseconds. `e`: when the sequence expires, likewise. `r`: the ranges that
    a marker leaves visible. Under the key of a `once`, `n` is the first number
    that its append got, `m` how many it got.
    """

    n: int = 0
    m: int = 0
    b: int = 0
    at: int = 0
    e: int | None = None
    k: Kind = "entry"
    r: list[Span] | msgspec.UnsetType = UNSET


class _Plain(msgspec.Struct, gc=False):
    """An entry whose value can be read along with it. Anything else a decoder of this refuses."""

    f: Literal[1]  # FORMAT
    v: Any
    at: int = 0
    k: None = None
    t: None = None


class Item(msgspec.Struct, gc=False):
    """An entry to append: its object with the value filled in, and its size in bytes."""

    body: LogBody
    size: int
    value: Any = UNSET  # only if it lies in chunks


class StoredItem(msgspec.Struct, frozen=True, gc=False):
    """An entry that was read."""

    number: int
    at: int
    value: Any


class Tail(msgspec.Struct, gc=False):
    """What the greatest entry tells: all that an append needs."""

    number: int  # the greatest number, markers included; 0: nothing was ever appended
    visible: int  # how many visible entries there are
    marker: int  # number of the last marker, 0: none
    last: int  # number of the last visible entry, 0: none
    deleted: bool
    since: float  # when it was true
    born: int = 0  # number of the marker after the last delete: what was before is another life
    expires: int | None = None  # milliseconds
    version: int = ABSENT  # of the greatest entry


class _Append(Lodger, eq=False):
    """Entries that one caller waits for, numbered together."""

    future: asyncio.Future[int]
    call: Call | None
    items: Sequence[Item] = ()
    size: int = 0
    once: str | None = None
    once_version: int = ABSENT  # what lies under `once` and does not count
    expected_last: int | None = None
    edit: Callable[[Tail], Awaitable[tuple[Op, ...] | None]] | None = None
    looked: bool = False  # the end was read after this append had been asked for
    deadline: float | None = None  # set when another writer was faster for the first time
    refusals: int = 0  # how often one was


class _Flight(msgspec.Struct, eq=False):
    """A Write on its way, and who is told what became of it (a `Reply`): it passes that on to `landed`."""

    batch: list[_Append]
    firsts: list[int]  # the number that each begins with
    tail: Tail  # the end after it
    landed: _Landed
    over: bool = False

    def done(self) -> bool:
        return self.over  # not while callers give up: numbers have been given

    def set_result(self, version: int, /) -> None:
        self.over = True
        self.landed(self, version, None)

    def set_exception(self, error: BaseException, /) -> None:
        self.over = True
        self.landed(self, ABSENT, error)

    def cancel(self) -> None:
        self.set_exception(asyncio.CancelledError())


_Landed = Callable[[_Flight, int, BaseException | None], None]


class _ChangedError(CorruptRecordError):
    """An entry that should be visible is not: it was hidden meanwhile, or is corrupt."""


class Log:
    """The sequences of one kind: one in each partition, under `prefix` (which ends in a slash).

    `expires_at` tells when the sequence of a partition expires by now (ms, None:
    never). It is asked once the time is up that the entries tell: whoever makes
    it sooner puts a marker, whoever makes it later need not.
    """

    def __init__(self, store: Store, prefix: str, expires_at: Callable[[str], Awaitable[int | None]]) -> None:
        self._store = store
        self._prefix = prefix
        self._expires_at = expires_at
        self._end = prefix_end(prefix)
        self._once = f"once/{prefix}"
        self._queues: dict[str, deque[_Append]] = {}  # of the sequences to which something is on its way
        self._tails: OrderedDict[str, Tail] = OrderedDict()
        self._decoder = msgspec.json.Decoder(LogBody)
        self._plain = msgspec.json.Decoder(_Plain)

    # ---- appending

    async def item(self, partition: str, value: Any, at: int | None = None) -> Item:
        """Make the entry for `value`; `at` is its time in milliseconds, by default now."""
        body = LogBody(at=self._store.clock() if at is None else at)
        size = _OVERHEAD_BYTES + await self._store.fill(partition, body, value)
        return Item(body, size, UNSET if body.c is UNSET else value)

    async def append(
        self,
        partition: str,
        items: Sequence[Item],
        *,
        once: str | None = None,
        expected_last: int | None = None,
    ) -> int:
        """Append `items` (within `APPEND_ENTRIES` and `APPEND_BYTES`) atomically; return the first number.

        A second append with the same `once` (encoded) changes nothing and returns the
        number that the first one got; `ConflictError` if that had not as many
        items. `expected_last` is the number of the last visible entry that the
        caller knows of, 0 for none; `ConflictError` if it is another. Raises
        `NotFoundError` if the sequence was deleted, `UnavailableError` if others
        are faster for 10 seconds.
        """
        coalescer = self._store.coalescer
        size = items[0].size if len(items) == 1 else sum(item.size for item in items)
        append = _Append(coalescer.loop.create_future(), CALL.get(), items, size)
        if once is not None:
            append.once = self._once + once
        append.expected_last = expected_last
        while True:
            if not coalescer.room.take_at_once(size):
                await coalescer.room.take(size)
            try:
                first = await self._enqueue(partition, append)
            except BaseException:
                if append.sent and append.future.cancelled():  # its Write is under way, and in memory
                    append.leave = partial(coalescer.room.give, size)
                else:
                    append.items = ()
                    coalescer.room.give(size)
                raise
            coalescer.room.give(size)  # before the chunks ask for room
            if first:
                return first
            for item in items:  # refused; what has no chunks has no value here either
                await self._store.refill(partition, item.body, item.value)
            append = replace(append, future=coalescer.loop.create_future(), looked=False)

    async def edit(
        self, partition: str, make: Callable[[Tail], Awaitable[tuple[Op, ...] | None]]
    ) -> int | None:
        """Put what `make` makes of the end of the sequence, in turn with the appends.

        Returns the version, `ABSENT` if it was refused (somebody was faster:
        call again), or None if `make` had nothing to change.
        """
        append = _Append(self._store.coalescer.loop.create_future(), CALL.get(), edit=make)
        version = await self._enqueue(partition, append)
        return None if version < 0 else version

    def _enqueue(self, partition: str, append: _Append) -> asyncio.Future[int]:
        queue = self._queues.get(partition)
        if queue is None:
            self._queues[partition] = queue = deque((append,))
            self._go_on(partition, queue)
        else:
            queue.append(append)
        return append.future

    def _go_on(self, partition: str, queue: deque[_Append]) -> None:
        """Send what waits for one sequence: at once, or by a task where that takes more than one step."""
        if not queue:
            del self._queues[partition]
        elif not self._send_at_once(partition, queue):
            self._store.coalescer.start(self._drain(partition, queue))

    def _send_at_once(self, partition: str, queue: deque[_Append]) -> bool:
        now = steady_seconds()
        tail = self._remembered(partition, now)
        if tail is None or queue[0].edit is not None:
            return False
        batch = self._take(partition, queue, tail)
        if not batch:
            return False

        def landed(flight: _Flight, version: int, error: BaseException | None) -> None:
            if isinstance(error, asyncio.CancelledError):
                _fail(queue, error)
                queue.clear()
            if not self._arrive(partition, flight, version, error):
                queue.extendleft(reversed(batch))
            self._go_on(partition, queue)

        try:
            self._depart(partition, batch, tail, now, landed)
        except Exception as error:  # the batch alone has failed, not those behind it
            _fail(batch, error)
            return False
        return True

    async def _drain(self, partition: str, queue: deque[_Append]) -> None:
        """Send what waits for one sequence: one Write in flight, numbers given as it leaves."""
        batch: list[_Append] = []
        attempt = 0
        try:
            while queue:
                tail = self._remembered(partition, steady_seconds())
                if tail is None:
                    tail = await self._look(partition, queue)
                batch = self._take(partition, queue, tail)
                if not batch:
                    if queue:  # its first doubts what we remember
                        self._tails.pop(partition, None)
                    continue
                if batch[0].edit is not None:
                    await self._send_edit(partition, batch[0], tail)
                elif await self._send(partition, batch, tail):
                    attempt = 0
                else:
                    queue.extendleft(reversed(batch))
                    batch = []
                    await give_way(attempt)
                    attempt += 1
                batch = []
        except (Exception, asyncio.CancelledError) as error:
            self._tails.pop(partition, None)
            # Those in flight have their answer; those that wait could not be
            # sent for the same reason.
            _fail([*batch, *queue], error)
            queue.clear()
            if isinstance(error, asyncio.CancelledError):
                raise
        finally:
            del self._queues[partition]

    async def _look(self, partition: str, queue: deque[_Append]) -> Tail:
        """Read the end of the sequence, and answer those whose `once` is there already."""
        for append in queue:
            append.looked = True
        repeated = [append for append in queue if append.once is not None]
        keys = [Key(partition, append.once) for append in repeated if append.once is not None]
        tail, entries = await asyncio.gather(self.tail(partition), self._store.coalescer.get(keys))
        for append, entry in zip(repeated, entries, strict=True):
            append.once_version = ABSENT
            if entry is None or self.gone(tail) or append.future.done():
                continue
            try:
                once = self._unpack(partition, entry)
            except CorruptRecordError as error:
                append.future.set_exception(error)
                continue
            if once.n <= tail.born:  # of a life before the last delete: to be replaced
                append.once_version = entry.version
            elif once.m == len(append.items):
                append.future.set_result(once.n)
            else:
                message = f"the idempotency key was used for {once.m} entries, not {len(append.items)}"
                append.future.set_exception(ConflictError(message, partition=partition, key=append.once))
        self._remember(partition, tail)
        return tail

    def _take(self, partition: str, queue: deque[_Append], tail: Tail) -> list[_Append]:
        """Take the appends that leave together. If it takes none and some wait, read the end first."""
        batch: list[_Append] = []
        onces: set[str] = set()
        ops = size = 0
        last, number = tail.last, tail.number
        while queue:
            append = queue[0]
            if append.future.done():
                queue.popleft()
                continue
            if append.edit is not None:
                # It decides by the end that it is given, perhaps to change nothing:
                # that must be no older than the call.
                if not batch and append.looked:
                    batch.append(queue.popleft())
                return batch
            if append.deadline is not None and not append.looked:
                return batch  # refused before: what it did not know may be its `once`, not the end
            count = len(append.items) + (append.once is not None)
            if batch and (ops + count > APPEND_ENTRIES or size + append.size > APPEND_BYTES):
                return batch
            if append.once is not None and append.once in onces:
                return batch
            doubt = self._doubt(partition, append, tail, last)
            if doubt is not None:
                if batch or not append.looked:
                    return batch
                queue.popleft()
                append.future.set_exception(doubt)
                continue
            batch.append(queue.popleft())
            if append.once is not None:
                onces.add(append.once)
            ops += count
            size += append.size
            last = number = number + len(append.items)
        return batch

    def _doubt(self, partition: str, append: _Append, tail: Tail, last: int) -> PersistenceError | None:
        if tail.deleted:
            return NotFoundError("it was deleted; save it again first", partition=partition)
        if self.gone(tail):
            return NotFoundError("its time was up; save it again first", partition=partition)
        if append.expected_last is not None and append.expected_last != last:
            return _unexpected(partition, append.expected_last, last)
        if append.refusals >= _REFUSALS and append.deadline is not None:
            return outpaced(partition) if self._store.coalescer.loop.time() > append.deadline else None
        return None

    async def _send(self, partition: str, batch: list[_Append], tail: Tail) -> bool:
        """Write the batch after `tail`. False: refused, to be tried again."""
        arrived: asyncio.Future[bool] = self._store.coalescer.loop.create_future()

        def landed(flight: _Flight, version: int, error: BaseException | None) -> None:
            taken = self._arrive(partition, flight, version, error)
            if isinstance(error, asyncio.CancelledError):
                arrived.cancel()
            elif not arrived.done():
                arrived.set_result(taken)

        try:
            self._depart(partition, batch, tail, steady_seconds(), landed)
        except Exception as error:  # the batch alone has failed, not those behind it
            _fail(batch, error)
            return True
        return await arrived

    def _depart(self, partition: str, batch: list[_Append], tail: Tail, now: float, landed: _Landed) -> None:
        """Number the batch after `tail` and hand it over to be written."""
        number, count = tail.number, tail.visible
        ops: list[Op] = []
        firsts: list[int] = []
        for append in batch:
            append.sent = True
            firsts.append(number + 1)
            for item in append.items:
                number += 1
                count += 1
                body = item.body
                body.n, body.m, body.b, body.e = count, tail.marker, tail.born, tail.expires
                ops.append(Put(number_key(self._prefix, number), pack(body), ABSENT))
            if append.once is not None:
                once = LogBody(n=firsts[-1], m=len(append.items), at=self._store.clock())
                ops.append(Put(append.once, pack(once), append.once_version))
        ops += self._follows(tail)
        calls = [append.call for append in batch if append.call is not None]
        for call in calls:
            call.sent = True  # in a numbered batch nobody can step back any more
        end = Tail(number, count, tail.marker, number, False, now, tail.born, tail.expires)
        self._store.coalescer.submit(partition, tuple(ops), _Flight(batch, firsts, end, landed), calls)

    def _follows(self, tail: Tail) -> tuple[Check, ...]:
        """Return what asserts that the end is still there, on a store that may have lost it.

        What comes after a lost entry would leave a hole, which nobody could read over.
        """
        if not (self._store.coalescer.may_lose and tail.version):
            return ()
        return (Check(number_key(self._prefix, tail.number), tail.version),)

    def _arrive(self, partition: str, flight: _Flight, version: int, error: BaseException | None) -> bool:
        """Tell the callers how it went. False: refused, to be tried again."""
        if version:
            flight.tail.version = version
            self._remember(partition, flight.tail)
            for append, first in zip(flight.batch, flight.firsts, strict=True):
                if not append.future.done():
                    append.future.set_result(first)
                else:
                    append.give_room()
            return True
        self._tails.pop(partition, None)
        for append in flight.batch:
            append.give_room()
        if error is None:
            deadline = self._store.coalescer.loop.time() + RETRY_SECONDS
            for append in flight.batch:
                append.deadline = append.deadline or deadline
                append.refusals += 1
                if not append.future.done() and any(item.value is not UNSET for item in append.items):
                    append.future.set_result(0)
            return False
        _fail(flight.batch, error)  # it alone has failed, not those behind it
        return True

    async def _send_edit(self, partition: str, append: _Append, tail: Tail) -> None:
        # Whatever it puts, the next append had better look.
        self._tails.pop(partition, None)
        try:
            ops = await append.edit(tail) if append.edit is not None else None
            version = -1
            # Whoever has given up meanwhile was told that nothing was changed.
            if ops is not None and not append.future.done():
                calls = () if append.call is None else (append.call,)
                for call in calls:
                    call.sent = True
                ops += self._follows(tail)
                written: asyncio.Future[int] = self._store.coalescer.loop.create_future()
                self._store.coalescer.submit(partition, ops, written, calls)
                version = await written
        except Exception as error:
            _fail([append], error)
        else:
            if not append.future.done():
                append.future.set_result(version)

    # ---- the end of a sequence

    async def tail(self, partition: str) -> Tail:
        """Read the end of the sequence: one round trip."""
        since = steady_seconds()
        tail = await self._tail_of(partition, await self._greatest(partition), since)
        if partition not in self._queues:  # who appends there knows better
            self._remember(partition, tail)
        return tail

    async def _greatest(self, partition: str) -> list[Entry]:
        """Return the greatest entry, if there is one."""
        page = await self._store.coalescer.scan(partition, self._prefix, self._end, limit=1, reverse=True)
        return page.entries

    async def _tail_of(self, partition: str, entries: Sequence[Entry], since: float) -> Tail:
        tail = self._told_by(partition, entries, since)
        if self.gone(tail) and not tail.deleted:
            return replace(tail, expires=await self._expires_at(partition))
        return tail

    def _told_by(self, partition: str, entries: Sequence[Entry], since: float) -> Tail:
        if not entries:
            return Tail(0, 0, 0, 0, False, since)
        body, version = self._unpack(partition, entries[0]), entries[0].version
        number = self._number(partition, entries[0].key)
        if body.k == "entry" and 0 < body.n <= number and 0 <= body.m < number:
            return Tail(number, body.n, body.m, number, False, since, body.b, body.e, version)
        if body.k in ("entry", "stub") or body.r is UNSET:
            message = "the greatest entry is neither an entry nor a marker"
            raise CorruptRecordError(message, partition=partition, key=entries[0].key)
        last = body.r[-1][1] if body.r else 0
        return Tail(number, body.n, number, last, body.k == "delete", since, body.b, body.e, version)

    def gone(self, tail: Tail) -> bool:
        """Tell whether a sequence with this end was deleted, or has expired."""
        return tail.deleted or (tail.expires is not None and tail.expires <= self._store.clock())

    def _remembered(self, partition: str, now: float) -> Tail | None:
        tail = self._tails.get(partition)
        if tail is not None and now - tail.since > FORGET_SECONDS:
            del self._tails[partition]
            return None
        return tail

    def _remember(self, partition: str, tail: Tail) -> None:
        known = self._tails.get(partition)
        if known is not None and known.since > tail.since:
            return
        self._tails[partition] = tail
        self._tails.move_to_end(partition)
        if len(self._tails) > _REMEMBERED:
            self._tails.popitem(last=False)

    # ---- reading

    async def read(
        self,
        partition: str,
        *,
        above: int = 0,
        below: int | None = None,
        limit: int | None = None,
        most: float = inf,
        newest: bool = False,
    ) -> list[StoredItem]:
        """Return the visible entries with ``above < number < below``, oldest first.

        `limit` keeps the first ones, with `newest` the last ones; so does
        `most`, in bytes, but one comes however long it is. As few round trips
        as there are pages: one for the last entries of a sequence without
        markers, and for the first ones.
        """
        if limit == 0:
            return []
        return await _steadily(lambda: self._read(partition, above, below, limit, most, newest=newest))

    async def _read(
        self, partition: str, above: int, below: int | None, limit: int | None, most: float, *, newest: bool
    ) -> list[StoredItem]:
        wanted = _PAGE if limit is None else min(limit, _PAGE)
        start = self._key(above + 1)
        end = self._end if below is None else self._key(below)
        first = self._store.coalescer.scan(partition, start, end, limit=wanted, reverse=newest)
        if newest and below is None:
            since = steady_seconds()
            page = await first
            ending = page.entries[:1]
            if not ending and above:
                tail = await self.tail(partition)
            else:
                tail = await self._tail_of(partition, ending, since)
        else:
            page, tail = await asyncio.gather(first, self.tail(partition))
        if self.gone(tail):
            return []
        if newest and below is None and limit is not None and 0 < limit == len(page.entries):
            oldest = self._number(partition, page.entries[-1].key)
            if tail.number - oldest == limit - 1 and oldest > tail.marker:
                # All after the last marker, and no gap: no need to read the marker, or every key.
                items = await self._items(partition, range(tail.number, oldest - 1, -1), page.entries, most)
                return items[::-1]
        ready = self._by_number(partition, page.entries)
        spans = await self.spans(partition, tail, ready)
        spans = _within(spans, above + 1, tail.number if below is None else below - 1)
        numbers, entries = await self._collect(partition, spans, ready, limit, most, newest=newest)
        items = await self._items(partition, numbers, entries, most)
        return items[::-1] if newest else items

    async def _collect(
        self,
        partition: str,
        spans: list[Span],
        ready: dict[int, Entry],
        limit: int | None,
        most: float,
        *,
        newest: bool,
    ) -> tuple[list[int], list[Entry]]:
        """Return the numbers and entries of `spans`; those in `ready` need not be read."""
        step = -1 if newest else 1
        numbers: list[int] = []
        entries: list[Entry] = []
        size = 0
        for low, high in reversed(spans) if newest else spans:
            number, stop = (high, low - 1) if newest else (low, high + 1)
            while number != stop:
                if len(entries) == limit or size > most:
                    return numbers, entries
                entry = ready.get(number)
                if entry is None:
                    # On to the far end: many a hole is small, and one page goes over it.
                    bounds = (spans[0][0], number) if newest else (number, spans[-1][1])
                    wanted = min(_PAGE, bounds[1] - bounds[0] + 1)
                    if limit is not None:
                        wanted = min(wanted, (limit - len(entries)) * (1 if len(spans) == 1 else 3))
                    page = await self._store.coalescer.scan(
                        partition,
                        self._key(bounds[0]),
                        self._key(bounds[1] + 1),
                        limit=wanted,
                        reverse=newest,
                    )
                    ready = self._by_number(partition, page.entries)
                    entry = ready.get(number)
                if entry is None:
                    message = f"entry {number} is missing"
                    raise _ChangedError(message, partition=partition)
                numbers.append(number)
                entries.append(entry)
                size += len(entry.value)
                number += step
        return numbers, entries

    async def _items(
        self, partition: str, numbers: Sequence[int], entries: list[Entry], most: float
    ) -> list[StoredItem]:
        items: list[StoredItem] = []
        size = 0
        for at, (number, entry) in enumerate(zip(numbers, entries, strict=True), 1):
            if not at % _PAGE:
                await asyncio.sleep(0)  # to decode tens of thousands takes long: let others have a turn
            try:
                plain = self._plain.decode(entry.value)
            except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
                body = self._unpack(partition, entry)  # which tells them apart
            else:
                items.append(StoredItem(number, plain.at, plain.v))
                continue
            if body.k != "entry":
                message = f"entry {number} is hidden"
                raise _ChangedError(message, partition=partition)
            size += body.c.size if isinstance(body.c, Chunks) else 0
            if items and size > most:
                break
            items.append(StoredItem(number, body.at, await self._store.value(partition, entry.key, body)))
        return items

    def _by_number(self, partition: str, entries: Sequence[Entry]) -> dict[int, Entry]:
        if not entries:
            return {}
        first, last = self._number(partition, entries[0].key), self._number(partition, entries[-1].key)
        step = 1 if first <= last else -1
        if abs(last - first) == len(entries) - 1:  # no gap: no need to read every key
            return dict(zip(range(first, last + step, step), entries, strict=True))
        return {self._number(partition, entry.key): entry for entry in entries}

    async def spans(self, partition: str, tail: Tail, ready: Mapping[int, Entry] | None = None) -> list[Span]:
        """Return the ranges of visible entries up to `tail`; its marker need not be read if it is `ready`."""
        spans: list[Span] = []
        if tail.marker:
            entry = ready.get(tail.marker) if ready else None
            if entry is None:
                (entry,) = await self._store.coalescer.get([Key(partition, self._key(tail.marker))])
            if entry is None:
                message = f"marker {tail.marker} is missing"
                raise _ChangedError(message, partition=partition)
            body = self._unpack(partition, entry)
            if body.r is UNSET:
                message = f"marker {tail.marker} is hidden"
                raise _ChangedError(message, partition=partition)
            spans = list(body.r)
        if tail.number > tail.marker:
            spans.append((tail.marker + 1, tail.number))
        return spans

    def _unpack(self, partition: str, entry: Entry) -> LogBody:
        return self._store.unpack(self._decoder, partition, entry)

    def _key(self, number: int) -> str:
        return number_key(self._prefix, number)

    def _number(self, partition: str, key: str) -> int:
        return key_number(partition, self._prefix, key)

    # ---- hiding

    async def cut(self, partition: str, through: int | None, expected_last: int | None) -> int:
        """Hide what is visible after number `through` (None: everything); return how many entries.

        `through` must be visible, else `NotFoundError`, and `expected_last` the
        number of the last visible entry (0: none), else `ConflictError`. Hidden at
        once, in one Put; then the hidden entries are emptied, one Write a thousand.
        """
        return await self._hide(partition, ((through or 0) + 1, MAX_NUMBER), through, expected_last)

    async def take_back(self, partition: str, span: Span) -> None:
        """Hide the entries of `span`, which a copy has appended, and no others."""
        await self._hide(partition, span)

    async def _hide(
        self, partition: str, span: Span, after: int | None = None, expected_last: int | None = None
    ) -> int:
        """Hide what is visible in `span`, if number `after` is visible; return how many entries."""
        hidden: list[Span] = []
        replaced = 0

        async def make(tail: Tail) -> tuple[Op, ...] | None:
            nonlocal hidden, replaced
            spans = [] if self.gone(tail) else await self.spans(partition, tail)
            last = spans[-1][1] if spans else 0
            if expected_last is not None and expected_last != last:
                raise _unexpected(partition, expected_last, last)
            if after is not None and not _within(spans, after, after):
                message = f"no visible entry has number {after}"
                raise NotFoundError(message, partition=partition)
            replaced = tail.marker
            hidden = _within(spans, *span)
            kept = _within(spans, 1, span[0] - 1) + _within(spans, span[1] + 1, MAX_NUMBER)
            return (self.marker(tail, "cut", kept, tail.expires),) if hidden else None

        tries = Tries(partition)
        while await _steadily(lambda: self.edit(partition, make)) == ABSENT:
            await tries.another()
        if hidden:
            await self.empty(partition, [(replaced, replaced), *hidden] if replaced else hidden)
        return _count(hidden)

    def marker(self, tail: Tail, kind: Kind, kept: list[Span], expires: int | None = None) -> Put:
        """Return the Put of a marker after `tail` that leaves `kept` visible, until `expires` (ms)."""
        number = tail.number + 1
        born = number if kind == "restore" else tail.born
        body = LogBody(n=_count(kept), m=number, b=born, at=self._store.clock(), e=expires, k=kind, r=kept)
        return Put(self._key(number), pack(body), ABSENT)

    async def end_unread(self, partition: str, put: Put) -> int:
        """Put `put` and the marker of a delete after a greatest entry that cannot be read.

        Returns the version, `ABSENT` if it was refused.
        """
        entries = await self._greatest(partition)
        number = self._number(partition, entries[0].key) if entries else 0
        self._tails.pop(partition, None)
        end = Tail(number, 0, 0, 0, False, steady_seconds())
        return await self._store.coalescer.write(partition, [put, self.marker(end, "delete", [])])

    async def hidden(self, partition: str) -> list[Span]:
        """Return the ranges of entries that are not visible, the last marker aside."""
        return await _steadily(lambda: self._hidden(partition))

    async def _hidden(self, partition: str) -> list[Span]:
        tail = await self.tail(partition)
        if not tail.marker:
            return []
        spans = sorted([*await self.spans(partition, tail), (tail.marker, tail.marker)])
        edges = [0, *(edge for low, high in spans for edge in (low - 1, high))]
        gaps = zip(edges[0::2], edges[1::2], strict=False)
        return [(low + 1, high) for low, high in gaps if low < high]

    async def empty(
        self, partition: str, spans: Sequence[Span], *, unread: int = 0, dry_run: bool = False
    ) -> int:
        """Overwrite hidden entries by stubs; return how many. Can be repeated and interrupted.

        What cannot be read is left as it is, and named by `repair`; up to number `unread` it is
        overwritten too.
        """
        emptied = 0
        guard = await self._hiding(partition, spans) if self._store.coalescer.may_lose else ()
        if guard is None:
            return 0
        for low, high in spans:
            async for entries in self._pages(partition, self._key(low), self._key(high + 1)):
                full: list[tuple[Entry, LogBody]] = []
                for entry in entries:
                    try:
                        body = self._unpack(partition, entry)
                    except CorruptRecordError:
                        if self._number(partition, entry.key) > unread:
                            continue
                        body = LogBody()
                    if body.k != "stub":
                        full.append((entry, body))
                if dry_run:
                    emptied += len(full)
                elif full:
                    stub = pack(LogBody(at=self._store.clock(), k="stub"))
                    puts = [Put(entry.key, stub, entry.version) for entry, _ in full]
                    if guard:  # refused: the marker is lost, or others empty the same; `repair` goes on
                        parts = [puts[at : at + _PAGE] for at in range(0, len(puts), _PAGE)]
                    else:  # One Write for all; what is refused somebody else has emptied just now.
                        parts = [[put] for put in puts]
                    writes = (self._store.coalescer.write(partition, [*part, *guard]) for part in parts)
                    done = await asyncio.gather(*writes)
                    emptied += sum(len(part) for part, version in zip(parts, done, strict=True) if version)
                    if all(done) or not guard:
                        await self._store.drop_chunks(partition, (body.c for _, body in full))
        return emptied

    async def _hiding(self, partition: str, spans: Sequence[Span]) -> tuple[Check, ...] | None:
        """Return what asserts that the marker is still there which hides `spans`; None if they are visible.

        A stub must not outlive it: as the greatest entry it would tell nothing.
        """
        tail = await self.tail(partition)
        (entry,) = await self._store.coalescer.get([Key(partition, self._key(tail.marker))])
        if entry is None or (entry.version != tail.version and tail.number == tail.marker):
            return None
        visible = await self.spans(partition, tail, {tail.marker: entry})
        if any(_within(visible, low, high) for low, high in spans):
            return None
        return (Check(entry.key, entry.version),)

    async def drop_stubs(
        self, partition: str, spans: Sequence[Span], before: int, *, dry_run: bool = False
    ) -> int:
        """Remove the stubs among hidden entries that are older than `before` (ms); return how many."""
        dropped = 0
        for low, high in spans:
            async for entries in self._pages(partition, self._key(low), self._key(high + 1)):
                bodies = [(entry, self._unpack(partition, entry)) for entry in entries]
                old = [entry for entry, body in bodies if body.k == "stub" and body.at < before]
                if dry_run:
                    dropped += len(old)
                elif old:
                    deletes = [Delete(entry.key, entry.version) for entry in old]
                    if await self._store.coalescer.write(partition, deletes, hint=True):
                        dropped += len(old)
        return dropped

    async def forget(self, partition: str, tombstone: Delete) -> None:
        """Remove a deleted sequence: its marker and `tombstone` last, in one Write."""
        tail = await self.tail(partition)
        (marker,) = await self._store.coalescer.get([Key(partition, self._key(tail.number))])
        if not tail.deleted or marker is None:
            return  # saved again meanwhile
        # Whoever saves it again from here on gets numbers after the marker:
        # nothing of his is touched.
        await self._store.coalescer.purge(partition, self._prefix, marker.key)
        await self._forget_onces(partition, tail.number)
        await self._store.coalescer.write(
            partition, [tombstone, Delete(marker.key, marker.version)], hint=True
        )

    async def _forget_onces(self, partition: str, number: int) -> None:
        async for entries in self._pages(partition, self._once, prefix_end(self._once)):
            old = [entry for entry in entries if self._once_of(partition, entry) < number]
            deletes = [Delete(entry.key, entry.version) for entry in old]
            if deletes:
                await self._store.coalescer.write(partition, deletes, hint=True)

    def _once_of(self, partition: str, entry: Entry) -> int:
        try:
            return self._unpack(partition, entry).n
        except CorruptRecordError:
            return 0  # of no use to anybody

    async def copied(self, partition: str) -> tuple[int, Span] | None:
        """Return when a copy added the last entry (ms), and which are its own: all, or None."""
        tail = await self.tail(partition)
        last = entries = 0
        start = self._once + COPIED
        async for page in self._pages(partition, start, prefix_end(start)):
            for body in (self._unpack(partition, entry) for entry in page):
                last, entries = max(last, body.at), entries + body.m
        return (last, (1, entries)) if entries and entries == tail.number else None

    async def chunk_ids(self, partition: str) -> set[str]:
        """Return the ids of all chunks that entries refer to. Reads the whole sequence, page by page."""
        found: set[str] = set()
        async for entries in self._pages(partition, self._prefix, self._end):
            bodies = [self._unpack(partition, entry) for entry in entries]
            found.update(body.c.id for body in bodies if isinstance(body.c, Chunks))
        return found

    def _pages(self, partition: str, start: str, end: str) -> AsyncIterator[list[Entry]]:
        return self._store.coalescer.pages(partition, start, end, limit=MAX_WRITE_OPS)


async def _steadily(work: Callable[[], Awaitable[T]]) -> T:
    """Run `work`, a read, and again if entries were hidden meanwhile. What stays missing is corrupt."""
    missing = set()
    for attempt in range(_READ_TRIES - 1):
        try:
            return await work()
        except (_ChangedError, MissingChunkError) as error:
            missing.add(str(error))
            await backoff(attempt)
    try:
        return await work()
    except (_ChangedError, MissingChunkError) as error:
        if str(error) in missing:
            raise CorruptRecordError(error.args[0], partition=error.partition, key=error.key) from error
        message = "it is changed faster than it can be read"
        raise UnavailableError(message, partition=error.partition) from error


def _fail(appends: Sequence[_Append], error: BaseException) -> None:
    for append in appends:
        fail(append.future, error)


def _unexpected(partition: str, expected_last: int, last: int) -> ConflictError:
    return ConflictError(f"the last number is {last}, not {expected_last}", partition=partition)


def _within(spans: Sequence[Span], low: int, high: int) -> list[Span]:
    clipped = ((max(first, low), min(last, high)) for first, last in spans)
    return [(first, last) for first, last in clipped if first <= last]


def _count(spans: Sequence[Span]) -> int:
    return sum(last - first + 1 for first, last in spans)
