"""Many awaiting callers, one driver call: the one place that batches, probes and retries.

A call goes out at once when its lane is idle; what arrives meanwhile leaves
together in the next one. No timers: a lone caller waits for nobody. Writes to
one partition that share no key are merged into one Write if every op carries
an ``expect`` or they only put hints; a definite refusal splits them again.

Every driver call runs in a task of this module, so that a caller who gives up
never interrupts one: a cancelled write is whole or absent.

An unknown outcome is settled here (`_settle`): read a key that the Write puts;
its version there means applied. Otherwise the same Write, with the same
version, is sent again, which is safe because its own ``expect`` refuses a
second application. What cannot be repeated safely, or not settled within
`RETRY_SECONDS`, ends in `OutcomeUnknownError`; in `UnavailableError` if the
driver says that it was not applied, as when it cannot connect.
"""

from __future__ import annotations

import asyncio
import math
import os
import random
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Sequence
from contextlib import suppress
from contextvars import ContextVar
from functools import partial
from itertools import islice
from typing import Any, Final, Protocol, TypeVar
from weakref import WeakKeyDictionary
from zlib import crc32

import msgspec

from persistence.driver import (
    ABSENT,
    MAX_GET_KEYS,
    MAX_KEY_CHARS,
    MAX_PARTITION_CHARS,
    MAX_VALUE_BYTES,
    MAX_WRITE_BYTES,
    MAX_WRITE_OPS,
    Driver,
    Entry,
    Key,
    Op,
    Page,
    Put,
    Write,
)
from persistence.errors import (
    ConfigurationError,
    CorruptRecordError,
    InvalidKeyError,
    InvalidValueError,
    OutcomeUnknownError,
    PersistenceError,
    UnavailableError,
)
from persistence.ids import random_version
from persistence.keys import after, prefix_end

__all__ = [
    "CALL",
    "RETRY_SECONDS",
    "Call",
    "Coalescer",
    "Lodger",
    "Reply",
    "Room",
    "Tries",
    "backoff",
    "fail",
    "give_way",
    "outpaced",
    "some_at_once",
]

S = TypeVar("S")
T = TypeVar("T")

RETRY_SECONDS: Final = 10.0
"""How long an unanswered call is tried again before its caller gets an error."""

_ROOM_BYTES = 64 << 20  # waiting writes; above this, callers wait too
_SCANS_AT_ONCE = 8
_AT_ONCE = 16  # of many things that one call removes
_LOOK_AHEAD = 4_000  # queued writes looked at for one commit
_PROBES = 4  # puts of a Write that are looked up to find out whether it was applied
_TRANSIENT = (UnavailableError, OSError, TimeoutError)
_NOT_WRITTEN = "the store does not answer; nothing was written"


_forks = 0  # how often this process was forked off another since this module was loaded


def _forked() -> None:
    global _forks
    _forks += 1


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)


_homes: WeakKeyDictionary[Driver, tuple[asyncio.AbstractEventLoop, int]] = WeakKeyDictionary()
"""Where each open driver was opened: its event loop, and `_forks` of its process."""


class Call:
    """What a public call needs to know when its time is up, or it fails after a change."""

    __slots__ = ("changed", "sent", "stored")

    def __init__(self) -> None:
        self.changed = False  # True once a write of this call was applied, hints aside
        self.stored: int | None = None  # of a list, how many items are known to be stored
        self.sent = False  # True once a write of this call may leave, whatever becomes of its caller


CALL: ContextVar[Call | None] = ContextVar("persistence_call", default=None)


async def backoff(attempt: int) -> None:
    """Sleep before try number `attempt` + 2: 20 ms doubling up to 1 s, with full jitter."""
    await asyncio.sleep(random.uniform(0.5, 1) * min(1.0, 0.02 * 2 ** min(attempt, 10)))


async def give_way(attempt: int) -> None:
    """Sleep before try number `attempt` + 2 after losing to another writer: up to 10 ms, growing to 80 ms.

    Not twice as long each time, for the winner does not pause: he would win for ever.
    """
    await asyncio.sleep(random.uniform(0, 0.01 * min(attempt + 1, 8)))


class Tries:
    """Retries after conflicts with other writers: pauses between them, an error once the time is up."""

    def __init__(self, partition: str) -> None:
        self._partition = partition
        self._deadline = asyncio.get_running_loop().time() + RETRY_SECONDS
        self.made = 0

    async def another(self) -> None:
        """Wait before the next try; raise `UnavailableError` if it is too late for one."""
        if asyncio.get_running_loop().time() > self._deadline:
            raise outpaced(self._partition)
        if self.made:
            await give_way(self.made - 1)
        self.made += 1


def outpaced(partition: str) -> UnavailableError:
    """Return the error for a writer that lost to others until its time was up."""
    message = f"other writers were faster for {RETRY_SECONDS:.0f} seconds"
    return UnavailableError(message, partition=partition)


async def some_at_once(work: Callable[[S], Awaitable[object]], items: Iterable[S]) -> None:
    """Do `work` for each of `items`, some of them at once, so that they share driver calls.

    The first error is raised once those under way have come to their end.
    """
    rest = iter(items)
    while some := list(islice(rest, _AT_ONCE)):
        for outcome in await asyncio.gather(*map(work, some), return_exceptions=True):
            if isinstance(outcome, BaseException):
                raise outcome


class Room:
    """A bound on the bytes that wait in memory: beyond it callers wait until there is room."""

    __slots__ = ("_free", "_waiting")

    def __init__(self, size: int) -> None:
        self._free = size
        self._waiting: deque[asyncio.Future[None]] = deque()

    def take_at_once(self, size: int) -> bool:
        """Reserve `size` bytes if nobody needs to wait; tell whether that is so."""
        if self._free <= 0 or self._waiting:
            return False
        self._free -= size
        return True

    async def take(self, size: int) -> None:
        """Reserve `size` bytes, waiting while others hold too many."""
        while self._free <= 0:
            waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiting.append(waiter)
            try:
                await waiter
            except asyncio.CancelledError:
                self._wake()  # the turn may have come just now: pass it on
                raise
        self._free -= size
        self._wake()  # one wakes the next: what was given back may be room for many

    def give(self, size: int) -> None:
        """Return what `take` reserved."""
        self._free += size
        if self._waiting:
            self._wake()

    def _wake(self) -> None:
        while self._waiting and self._free > 0:
            waiter = self._waiting.popleft()
            if not waiter.done():
                waiter.set_result(None)
                return


class Reply(Protocol):
    """Who is told what became of a write: an ``asyncio.Future[int]``, or whatever acts like one."""

    def done(self) -> bool:
        """Tell whether nobody waits any more: then a write that was not sent yet is dropped."""
        ...

    def set_result(self, result: int, /) -> None:
        """Take the version of the Write, or `ABSENT` if it was refused."""
        ...

    def set_exception(self, exception: BaseException, /) -> None:
        """Take the error that it ended in."""
        ...

    def cancel(self) -> object:
        """Take note that the event loop ends: there will be no answer."""
        ...


# These are made for every write: a Struct takes a third of the time of an ordinary class.


class Lodger(msgspec.Struct, eq=False, kw_only=True):
    """A write whose bytes take up `Room`.

    Its caller gives them back, unless he is cancelled while it is under way:
    it stays in memory then, so he leaves that to it.
    """

    sent: bool = False  # it is under way
    leave: Callable[[], None] | None = None  # gives the bytes back; set by a cancelled caller

    def give_room(self) -> None:
        """Take note that it is not under way, and return the room that its caller has left to it."""
        self.sent = False
        if self.leave is not None:
            self.leave()
            self.leave = None


class _Member(Lodger, eq=False):
    """One caller's write."""

    ops: tuple[Op, ...]
    size: int
    reply: Reply
    calls: Sequence[Call]


class _Group(msgspec.Struct, eq=False):
    """Members that travel as one Write."""

    partition: str
    members: list[_Member]
    ops: int
    size: int
    hint: bool
    since: float  # when it was asked for
    merged: bool = False  # a part of a refused merge
    keys: set[str] | None = None
    write: Write = Write("", (), ABSENT)
    unapplied: bool = False  # known of every attempt so far
    lost: bool = False  # sent without an answer, and not looked for since
    settled: bool = False

    def waiting(self) -> bool:
        """Tell whether anybody still wants this written; forget those who do not."""
        if len(self.members) == 1 and not self.members[0].reply.done():
            return True
        if any(member.reply.done() for member in self.members):
            for member in self.members:
                if member.reply.done():
                    member.give_room()
            self.members = [member for member in self.members if not member.reply.done()]
            self.ops = sum(len(member.ops) for member in self.members)
        return bool(self.members)

    def mergeable(self) -> bool:
        """Tell whether it may be one Write with others."""
        # A part of a refused merge stays as it is, or it might be merged again for ever.
        return not self.merged and (self.hint or all(op.expect is not None for op in self.members[0].ops))

    def absorb(self, other: _Group) -> bool:
        """Take over the members of `other` if the two may be one Write."""
        if self.hint != other.hint or not (self.mergeable() and other.mergeable()):
            return False
        if self.ops + other.ops > MAX_WRITE_OPS or self.size + other.size > MAX_WRITE_BYTES:
            return False
        if self.keys is None:
            self.keys = {op.key for member in self.members for op in member.ops}
        keys = {op.key for member in other.members for op in member.ops}
        if not self.keys.isdisjoint(keys):
            return False
        self.keys |= keys
        self.members += other.members
        self.ops += other.ops
        self.size += other.size
        return True

    def seal(self) -> Write:
        """Make the Write, when it leaves."""
        members = self.members
        ops = members[0].ops if len(members) == 1 else tuple(op for member in members for op in member.ops)
        self.write = Write(self.partition, ops, random_version())
        for member in members:
            member.sent = True
            for call in member.calls:
                call.sent = True
        return self.write

    def resolve(self, version: int) -> None:
        """Give every member its answer."""
        self.settled = True
        for member in self.members:
            if member.calls and version and not self.hint:
                for call in member.calls:
                    call.changed = True
            if not member.reply.done():
                member.reply.set_result(version)
            else:
                member.give_room()

    def fail(self, error: BaseException) -> None:
        """Give every member the error."""
        self.settled = True
        for member in self.members:
            member.give_room()
            fail(member.reply, error)


class _Lane:
    """Writes to the partitions of one hash class: one `commit` at a time."""

    __slots__ = ("busy", "free", "queue", "task")

    def __init__(self) -> None:
        self.queue: deque[_Group] = deque()
        self.busy: set[str] = set()  # partitions with a Write whose outcome is being settled
        self.free = asyncio.Lock()
        self.task: asyncio.Task[None] | None = None  # while there is something to send


class Coalescer:
    """The driver, for many callers at once. Made, opened and closed on one event loop."""

    def __init__(self, driver: Driver) -> None:
        self._driver = driver
        self._lanes = [_Lane() for _ in range(max(1, int(getattr(driver, "lanes", 1))))]
        self._reads: deque[tuple[Sequence[Key], asyncio.Future[list[Entry | None]]]] = deque()
        self._reader: asyncio.Task[None] | None = None  # while there is something to read
        self._scans = asyncio.Semaphore(_SCANS_AT_ONCE)
        self.fault = -math.inf, ""  # when the driver failed last, and how: the error would keep its frames
        self._tasks: set[asyncio.Task[Any]] = set()
        self.loop = asyncio.get_running_loop()
        self._forks = _forks
        self._active = 0
        self._closed: asyncio.Future[None] | None = None  # done when the last public call has left
        self._closing: asyncio.Task[None] | None = None
        self.room = Room(_ROOM_BYTES)
        self.may_lose = False  # see `Driver`, which knows once it is open

    # ---- life

    async def open(self) -> None:
        """Open the driver on this event loop. What fails, or is given up, is closed again."""
        self._settle_in()
        opening = self.loop.create_task(self._driver.open())
        try:
            await asyncio.shield(opening)
            self.may_lose = getattr(self._driver, "may_lose", False)
        except asyncio.CancelledError:
            # It must not reach the driver, which opens and then is closed.
            self.start(self._close_opened(opening))
            raise
        except BaseException:
            await self._close_driver()
            raise

    def _settle_in(self) -> None:
        """Raise `ConfigurationError` for a driver whose connections another loop or process made."""
        with suppress(TypeError):  # a driver may be of a kind that cannot be noted
            loop, forks = _homes.get(self._driver, (self.loop, _forks))
            if forks != _forks:
                message = f"{self._driver!r} was opened before a fork; make a new driver in the child"
                raise ConfigurationError(message)
            if loop is not self.loop and not getattr(self._driver, "any_loop", False):
                message = f"{self._driver!r} is open on another event loop; make a driver for each loop"
                raise ConfigurationError(message)
            _homes[self._driver] = self.loop, _forks

    async def _close_driver(self) -> None:
        with suppress(TypeError):
            _homes.pop(self._driver, None)
        await self._driver.close()

    async def _close_opened(self, opening: asyncio.Task[None]) -> None:
        with suppress(Exception):  # nobody waits for it any more
            await opening
        await self._close_driver()

    async def close(self) -> None:
        """Let the public calls under way finish, then close the driver. Idempotent."""
        if self._closing is None:
            self.check()
            self._closed = self.loop.create_future()
            self._closing = self.loop.create_task(self._close(self._closed))
        elif self._closing.done():
            return
        # A caller who gives up waiting does not keep the driver open.
        await asyncio.shield(self._closing)

    async def _close(self, last_call_has_left: asyncio.Future[None]) -> None:
        if self._active:
            await last_call_has_left
        while tasks := self._under_way():
            await asyncio.wait(tasks)
        await self._close_driver()

    def check(self) -> None:
        """Raise `ConfigurationError` where this object must not be used."""
        if self._closed is not None:
            message = "this persistence is closed; call create_persistence() again"
        elif self._forks != _forks:
            message = "opened before a fork; call create_persistence() in the child, with a new driver"
        elif asyncio.get_running_loop() is not self.loop:
            message = "this persistence was opened on another event loop; open one for each loop"
        else:
            return
        raise ConfigurationError(message)

    def enter(self) -> None:
        """Begin a public call: `close` waits for it."""
        self.check()
        self._active += 1

    def leave(self) -> None:
        """End a public call."""
        self._active -= 1
        if self._closed is not None and not self._active and not self._closed.done():
            self._closed.set_result(None)

    # ---- reads

    async def get(self, keys: Sequence[Key]) -> list[Entry | None]:
        """Return the entry of each key, None where there is none."""
        if len(keys) <= MAX_GET_KEYS:
            return await self.ask(keys) if keys else []
        parts = [self.ask(keys[at : at + MAX_GET_KEYS]) for at in range(0, len(keys), MAX_GET_KEYS)]
        return [entry for part in await asyncio.gather(*parts) for entry in part]

    def ask(self, keys: Sequence[Key]) -> asyncio.Future[list[Entry | None]]:
        """Return a future of what `get` returns, for 1 to 256 keys."""
        future: asyncio.Future[list[Entry | None]] = self.loop.create_future()
        self._reads.append((keys, future))
        if self._reader is None:
            # Never an eager one, which might have ended, and said so, before it is noted here.
            self._reader = asyncio.Task(self._read(), loop=self.loop)
        return future

    async def scan(
        self, partition: str, start: str, end: str | None, *, limit: int, reverse: bool = False
    ) -> Page:
        """Return one page of a range; see `Driver.scan`."""

        async def call() -> Page:
            async with self._scans:
                try:
                    scan = self._driver.scan(partition, start, end, limit=limit, reverse=reverse)
                    page = await _answered(scan)
                except CorruptRecordError as error:
                    _locate(error, {partition})
                    raise
            if len(page.entries) > limit or (page.more and not page.entries):
                message = f"the driver's scan() gave {len(page.entries)} of {limit} entries, more={page.more}"
                raise ConfigurationError(message)
            return page

        return await self._run(call)

    async def pages(
        self, partition: str, start: str, end: str | None, *, limit: int, reverse: bool = False
    ) -> AsyncIterator[list[Entry]]:
        """Yield the entries of a range, at most `limit` at a time."""
        more = True
        while more:
            page = await self.scan(partition, start, end, limit=limit, reverse=reverse)
            yield page.entries
            more = page.more
            if more and reverse:
                end = page.entries[-1].key
            elif more:
                start = after(page.entries[-1].key)

    async def names(self, partition: str, prefix: str) -> list[str]:
        """Return what stands in keys between `prefix` and the next slash. A scan of one entry for each."""
        found: list[str] = []
        start, end = prefix, prefix_end(prefix)
        while (page := await self.scan(partition, start, end, limit=1)).entries:
            found.append(page.entries[0].key[len(prefix) :].partition("/")[0])
            start = prefix_end(f"{prefix}{found[-1]}/")
        return found

    async def purge(self, partition: str, start: str, end: str | None) -> None:
        """Remove a range that nobody needs any more; see `Driver.purge`."""
        await self._run(lambda: self._driver.purge(partition, start, end))

    async def partitions(self, cursor: str | None, limit: int) -> tuple[list[str], str | None]:
        """Return a page of partitions; see `Driver.partitions`."""
        return await self._run(lambda: self._driver.partitions(cursor, limit))

    async def _read(self) -> None:
        try:
            while self._reads:
                await self._read_batch()
        finally:
            self._reader = None

    async def _read_batch(self) -> None:
        reads, batch = self._reads, []
        keys: list[Key] = []
        while reads and len(keys) + len(reads[0][0]) <= MAX_GET_KEYS:
            read = reads.popleft()
            if not read[1].done():
                batch.append(read)
                keys += read[0]
        if not batch:
            return
        try:
            entries = await self._get(keys)
        except Exception:  # each caller gets its own answer, below
            for part, future in batch:
                self.start(self._answer(future, partial(self._read_alone, part)))
            return
        except asyncio.CancelledError:
            for _, future in (*batch, *self._reads):
                future.cancel()
            raise
        at = 0
        for part, future in batch:
            if not future.done():
                future.set_result(entries[at : at + len(part)])
            at += len(part)

    async def _read_alone(self, keys: Sequence[Key]) -> list[Entry | None]:
        async with self._scans:
            return await self._get(keys)

    async def _get(self, keys: Sequence[Key]) -> list[Entry | None]:
        try:
            entries = await _answered(self._driver.get(keys))
        except CorruptRecordError as error:
            _locate(error, {key.partition for key in keys})
            raise
        if len(entries) != len(keys):
            message = f"the driver's get() gave {len(entries)} entries for {len(keys)} keys"
            raise ConfigurationError(message)
        return entries

    async def _persist(self, call: Callable[[], Awaitable[T]]) -> T:
        """Repeat a call that may be repeated, until the store answers or the time is up."""
        deadline = self.loop.time() + RETRY_SECONDS
        attempt = 0
        while True:
            try:
                return await call()
            except _TRANSIENT as error:
                self._note(error)
                if self.loop.time() >= deadline:
                    if isinstance(error, UnavailableError):
                        raise
                    message = f"the store does not answer: {type(error).__name__}"
                    raise UnavailableError(message) from error
            await backoff(attempt)
            attempt += 1

    def _note(self, fault: BaseException) -> None:
        shown = str(fault) if isinstance(fault, PersistenceError) else type(fault).__name__
        self.fault = self.loop.time(), shown

    async def _run(self, call: Callable[[], Awaitable[T]]) -> T:
        """Persist in a task of its own, which the caller's cancellation does not reach."""
        future: asyncio.Future[T] = self.loop.create_future()
        self.start(self._answer(future, call))
        return await future

    async def _answer(self, future: asyncio.Future[T], call: Callable[[], Awaitable[T]]) -> None:
        try:
            result = await self._persist(call)
        except (Exception, asyncio.CancelledError) as error:
            fail(future, error)
        else:
            if not future.done():
                future.set_result(result)

    def start(self, coroutine: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Run a task that belongs to no caller; `close` waits for it."""
        task = self.loop.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _under_way(self) -> list[asyncio.Task[Any]]:
        # Lanes and the reader come and go with every lone call: a done callback for each would be felt.
        own = [self._reader, *(lane.task for lane in self._lanes)]
        return [*self._tasks, *(task for task in own if task is not None and not task.done())]

    # ---- writes

    async def write(self, partition: str, ops: Iterable[Op], *, hint: bool = False) -> int:
        """Apply `ops` whole or not at all; return their version, or `ABSENT` if an ``expect`` refused.

        `hint` marks ops that may be applied twice, in any order (index entries, stubs).
        Raises `OutcomeUnknownError`, `UnavailableError`, `InvalidKeyError`, `InvalidValueError`.
        """
        ops = tuple(ops)
        size = _checked_size(partition, ops)
        if not self.room.take_at_once(size):
            await self.room.take(size)
        call = CALL.get()
        future: asyncio.Future[int] = self.loop.create_future()
        member = _Member(ops, size, future, () if call is None else (call,))
        try:
            self._queue(partition, member, hint)
            version = await future
        except BaseException:
            if member.sent and future.cancelled():  # it is under way, and in memory
                member.leave = partial(self.room.give, size)
            else:
                member.ops = ()
                self.room.give(size)
            raise
        self.room.give(size)
        return version

    def submit(self, partition: str, ops: tuple[Op, ...], reply: Reply, calls: Sequence[Call]) -> None:
        """Do what `write` does for the public `calls`, and tell `reply`. The caller has taken room."""
        self._queue(partition, _Member(ops, _checked_size(partition, ops), reply, calls), hint=False)

    def _queue(self, partition: str, member: _Member, hint: bool) -> None:
        lane = self._lanes[crc32(partition.encode()) % len(self._lanes)]
        group = _Group(partition, [member], len(member.ops), member.size, hint, self.loop.time())
        lane.queue.append(group)
        self._kick(lane)

    def _kick(self, lane: _Lane) -> None:
        if lane.task is None and lane.queue:
            lane.task = asyncio.Task(self._commit_lane(lane), loop=self.loop)  # never an eager one, see `ask`

    async def _commit_lane(self, lane: _Lane) -> None:
        try:
            while lane.queue:
                # The lock before the batch: what arrives while `_settle` holds it can leave with this batch.
                async with lane.free:
                    batch = _next_batch(lane)
                    if not batch:
                        break
                    await self._commit(lane, batch)
        except asyncio.CancelledError as error:
            for group in lane.queue:
                group.fail(error)
            raise
        finally:
            lane.task = None

    async def _commit(self, lane: _Lane, batch: list[_Group]) -> None:
        for group in batch:
            group.seal()
        cause: BaseException | None = None
        try:
            outcomes = await self._send(batch)
        except Exception as error:  # every outcome is unknown, and settled below
            self._note(error)
            cause = error
            outcomes = [None] * len(batch)
        except asyncio.CancelledError as error:
            for group in batch:
                group.fail(error)
            raise
        unknown = []
        unapplied = _is_unapplied(cause)
        for group, outcome in zip(batch, outcomes, strict=True):
            if outcome is None:
                group.unapplied = unapplied
                group.lost = not unapplied and (cause is None or isinstance(cause, _TRANSIENT))
                unknown.append(group)
                lane.busy.add(group.partition)
            else:
                self._decide(lane, group, applied=outcome)
        if unknown:
            self.start(self._settle(lane, unknown, cause))

    async def _send(self, groups: Sequence[_Group]) -> Sequence[bool | None]:
        outcomes = await _answered(self._driver.commit([group.write for group in groups]))
        if len(outcomes) != len(groups):
            message = f"the driver's commit() gave {len(outcomes)} outcomes for {len(groups)} writes"
            raise ConfigurationError(message)
        return outcomes

    def _decide(self, lane: _Lane, group: _Group, *, applied: bool) -> None:
        if applied:
            group.resolve(group.write.version)
        elif len(group.members) == 1:
            group.resolve(ABSENT)
        else:
            group.settled = True
            half = len(group.members) // 2
            for members in (group.members[half:], group.members[:half]):
                ops, size = sum(len(member.ops) for member in members), sum(member.size for member in members)
                part = _Group(group.partition, members, ops, size, group.hint, group.since, merged=True)
                lane.queue.appendleft(part)

    async def _settle(self, lane: _Lane, groups: list[_Group], cause: BaseException | None) -> None:
        """Find out what became of writes whose outcome is unknown; their partitions wait meanwhile."""
        deadline = self.loop.time() + RETRY_SECONDS
        attempt = 0
        try:
            while True:
                try:
                    await self._probe([group for group in groups if not group.unapplied])
                    await self._send_again(lane, groups, cause)
                except _TRANSIENT as error:
                    self._note(error)
                    cause = error
                groups = self._unsettled(lane, groups)
                if not groups or self.loop.time() >= deadline:
                    break
                await backoff(attempt)
                attempt += 1
        except asyncio.CancelledError as error:
            for group in groups:
                group.fail(error)
            raise
        except Exception as error:  # probing is impossible: that is what the callers are told
            cause = error
        finally:
            given_up = [group for group in groups if not group.settled]
            for group in given_up:
                group.fail(_unknown(group, cause))
            _fail_those_behind(
                lane, {group.partition for group in given_up}, self.loop.time() - RETRY_SECONDS
            )
            self._unsettled(lane, groups)

    def _unsettled(self, lane: _Lane, groups: list[_Group]) -> list[_Group]:
        """Return the groups that are still open; let the partitions of the others go on."""
        lane.busy.difference_update(group.partition for group in groups if group.settled)
        self._kick(lane)
        return [group for group in groups if not group.settled]

    async def _probe(self, groups: Sequence[_Group]) -> None:
        """Resolve the groups of which a put is found in the store; fail those that cannot be looked up."""
        probes = [
            (group, Key(group.partition, put.key))
            for group in groups
            for put in islice((op for op in group.write.ops if isinstance(op, Put)), _PROBES)
        ]
        for at in range(0, len(probes), MAX_GET_KEYS):
            part = probes[at : at + MAX_GET_KEYS]
            try:
                entries = await self._get([key for _, key in part])
            except _TRANSIENT:
                raise
            except Exception as error:
                if len(groups) == 1:
                    groups[0].fail(_unknown(groups[0], error))
                else:  # each for itself: what cannot be read of one partition is not the others' fault
                    for group in groups:
                        if not group.settled:
                            await self._probe([group])
                return
            for (group, _), entry in zip(part, entries, strict=True):
                group.lost = False
                if entry is not None and entry.version == group.write.version:
                    group.resolve(group.write.version)

    async def _send_again(self, lane: _Lane, groups: list[_Group], cause: BaseException | None) -> None:
        """Send each open group singly, so that a poison Write fails alone."""
        for group in [group for group in groups if not group.settled]:
            unapplied = group.unapplied
            if unapplied and all(member.reply.done() for member in group.members):
                group.resolve(ABSENT)  # nobody wants it any more
                continue
            if not (unapplied or group.hint or any(op.expect is not None for op in group.write.ops)):
                group.fail(_unknown(group, cause))
                continue
            group.unapplied = False
            try:
                async with lane.free:
                    (outcome,) = await self._send([group])
            except _TRANSIENT as error:
                group.unapplied = unapplied and _is_unapplied(error)
                group.lost = group.lost or not _is_unapplied(error)
                # Let the others go first next time: it may be this one's shard alone.
                groups.remove(group)
                groups.append(group)
                raise
            except Exception as error:  # alone, and not for want of a connection: the fault is its own
                await self._probe([group])
                if not group.settled:
                    group.fail(_unknown(group, error))
                continue
            # A refusal is final where none before it can have been applied.
            if outcome or (outcome is False and (group.hint or unapplied)):
                self._decide(lane, group, applied=outcome)
            elif outcome is False:
                await self._refused(lane, group, cause)

    async def _refused(self, lane: _Lane, group: _Group, cause: BaseException | None) -> None:
        """Decide about a repeated Write that was refused: perhaps by its own first application."""
        if not any(isinstance(op, Put) for op in group.write.ops):
            group.fail(_unknown(group, cause))
            return
        await self._probe([group])
        if not group.settled:
            self._decide(lane, group, applied=False)


async def _answered(call: Awaitable[T]) -> T:
    """Await a driver's call; one that ends as if cancelled, though nobody has, got no answer."""
    try:
        return await call
    except asyncio.CancelledError as error:
        task = asyncio.current_task()
        if task is None or task.cancelling():
            raise
        message = "the driver's client has cancelled a call"
        raise UnavailableError(message) from error


def _locate(error: CorruptRecordError, partitions: set[str]) -> None:
    """Name the partition at fault where the driver does not, and there is but one."""
    if error.partition is None and len(partitions) == 1:
        (error.partition,) = partitions


def _is_unapplied(error: BaseException | None) -> bool:
    return isinstance(error, UnavailableError) and error.unapplied


def _unknown(group: _Group, cause: BaseException | None) -> PersistenceError:
    """Return what the callers of a group are told that was not settled in time."""
    if (
        not group.lost
        and isinstance(cause, PersistenceError)
        and not isinstance(cause, UnavailableError)
        and cause.partition in (None, group.partition)
    ):
        own = _copy(cause)  # the driver says why it cannot work: that tells the caller more
        if isinstance(own, CorruptRecordError):
            _locate(own, {group.partition})
        return own
    kind = UnavailableError if group.unapplied else OutcomeUnknownError
    message = _NOT_WRITTEN if group.unapplied else "the store does not tell whether this was written"
    if isinstance(cause, PersistenceError | OSError):
        message = f"{message}: {cause}"
    error = kind(message, partition=group.partition)
    error.__cause__ = cause
    return error


def _fail_those_behind(lane: _Lane, partitions: set[str], before: float) -> None:
    """Fail what has waited since `before` for partitions that do not answer: its turn would be no better."""
    for group in lane.queue:
        if group.partition in partitions and group.since <= before:
            group.fail(UnavailableError(_NOT_WRITTEN, partition=group.partition))


def _next_batch(lane: _Lane) -> list[_Group]:
    """Take what may leave together: in order within a partition, within the limits of one call."""
    batch: dict[str, _Group] = {}
    later: list[_Group] = []
    held: set[str] = set()  # partitions of which something stays behind
    ops = size = 0
    while lane.queue and len(later) < _LOOK_AHEAD:
        group = lane.queue.popleft()
        if not group.waiting():
            continue
        if batch and (ops + group.ops > MAX_WRITE_OPS or size + group.size > MAX_WRITE_BYTES):
            later.append(group)
            break
        name = group.partition
        if name in lane.busy or name in held:
            later.append(group)
            held.add(name)
            continue
        first = batch.get(name)
        if first is None:
            batch[name] = group
        elif not first.absorb(group):
            later.append(group)
            held.add(name)
            continue
        ops += group.ops
        size += group.size
    lane.queue.extendleft(reversed(later))
    return list(batch.values())


def _checked_size(partition: str, ops: tuple[Op, ...]) -> int:
    """Return the bytes of a write; raise for what exceeds a limit of the contract."""
    if len(partition) > MAX_PARTITION_CHARS:
        message = f"the partition's name has {len(partition)} characters; the limit is {MAX_PARTITION_CHARS}"
        raise InvalidKeyError(message, partition=partition)
    if not 0 < len(ops) <= MAX_WRITE_OPS:
        message = f"a write has {len(ops):,} changes; 1 to {MAX_WRITE_OPS:,} are possible"
        raise InvalidValueError(message, partition=partition)
    size = 0
    for op in ops:
        size += len(op.key)
        if len(op.key) > MAX_KEY_CHARS:
            message = f"the key has {len(op.key)} characters; the limit is {MAX_KEY_CHARS}"
            raise InvalidKeyError(message, partition=partition, key=op.key)
        if isinstance(op, Put):
            size += len(op.value)
            if len(op.value) > MAX_VALUE_BYTES:
                message = f"the value has {len(op.value):,} bytes; the limit is {MAX_VALUE_BYTES:,}"
                raise InvalidValueError(message, partition=partition, key=op.key)
        elif op.expect == ABSENT:
            message = "only a Put can expect that nothing is there"
            raise InvalidValueError(message, partition=partition, key=op.key)
    if size > MAX_WRITE_BYTES:
        message = f"a write has {size:,} bytes; the limit is {MAX_WRITE_BYTES:,}"
        raise InvalidValueError(message, partition=partition)
    if len(ops) > 1 and len({op.key for op in ops}) < len(ops):
        message = "a write names a key twice"
        raise InvalidValueError(message, partition=partition)
    return size


def fail(reply: Reply | asyncio.Future[Any], error: BaseException) -> None:
    """Give an error to one of those that share it: a copy, because callers add to what they raise."""
    if reply.done():
        return
    if isinstance(error, asyncio.CancelledError):
        reply.cancel()
    elif isinstance(error, PersistenceError):
        reply.set_exception(_copy(error))
    else:
        reply.set_exception(error)


def _copy(error: PersistenceError) -> PersistenceError:
    own = type(error).__new__(type(error), *error.args)  # a driver's class may have its own __init__
    own.__dict__.update(error.__dict__)
    own.__cause__ = error.__cause__
    return own
