"""What a driver promises. `persistence.testing.DriverConformance` holds every driver to it.

A driver moves opaque bytes in and out of one engine. It never looks into a
value, never invents a version, never escapes a name: the core above it owns
keys, encoding, versions, batching, indexes, paging and retries. Write a class
with these seven methods, run the conformance suite on it, and everything else
of this library works on your engine.

The data: a *partition* (a text) holds *entries*, sorted by key. An entry is a
key (a text), a value (bytes) and a version (a positive integer below 2**62).

Names. Partitions and keys are printable ASCII, 0x21 to 0x7E without ``{`` and
``}``, and sort by code point, which is the order of their bytes. Upper and
lower case differ. The core keeps every limit below before it calls a driver;
a driver need not test them.

Atomicity. A `Write` touches one partition and is applied whole or not at all.
Nothing is atomic across partitions. One `get` or `scan` sees each Write to a
partition whole or not at all, and sees every Write acknowledged before the
call began, whichever process made it.

Conditions. Every ``expect`` of a Write is tested before its first change, in
one atomic step with the changes. A Write names a key at most once.

Concurrency. All methods may be called at once by many tasks of one event
loop, between `open` and `close`; and, for a driver on shared storage, by many
processes. A caller's cancellation never reaches a driver: the core runs each
call in a task of its own. No lock, cursor or transaction outlives a call.

Durability. When `commit` reports True the Write survives what the driver's
``durability`` option says: "power" (the machine may lose power) or "process"
(this process may die).

Errors. A driver raises `persistence.errors.UnavailableError` when the engine
does not answer (the core retries), `ConfigurationError` when it cannot work as
set up, `CorruptRecordError` when what is stored cannot be read; it keeps the
client's own error as the cause and shows no password. Every wait is bounded.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final, NamedTuple, Protocol, TypeAlias, runtime_checkable

__all__ = [
    "ABSENT",
    "MAX_GET_KEYS",
    "MAX_KEY_CHARS",
    "MAX_PARTITION_CHARS",
    "MAX_VALUE_BYTES",
    "MAX_WRITE_BYTES",
    "MAX_WRITE_OPS",
    "PAGE_BYTES",
    "Check",
    "Delete",
    "Driver",
    "Entry",
    "Key",
    "Op",
    "Page",
    "Put",
    "Write",
    "page_of",
]

ABSENT: Final = 0
"""The version of a key that is not there."""

MAX_PARTITION_CHARS: Final = 255
MAX_KEY_CHARS: Final = 1024
MAX_VALUE_BYTES: Final = 1 << 20
MAX_WRITE_OPS: Final = 1_000
"""Ops in one Write, and in all Writes of one `commit` together."""
MAX_WRITE_BYTES: Final = 4 << 20
"""Keys and values of one Write, and of all Writes of one `commit` together."""
MAX_GET_KEYS: Final = 256
PAGE_BYTES: Final = 4 << 20
"""About where a `scan` ends its page early."""


class Key(NamedTuple):
    """The full name of an entry."""

    partition: str
    key: str


class Entry(NamedTuple):
    """What is stored under a key."""

    key: str
    value: bytes
    version: int


class Page(NamedTuple):
    """Entries of a range, in the order asked for, and whether the range holds more behind them."""

    entries: list[Entry]
    more: bool


def page_of(entries: Iterable[Entry], limit: int) -> Page:
    """Return what `scan` does of `entries`, which begin where the page does and go beyond it if they can."""
    page: list[Entry] = []
    size = 0
    for entry in entries:
        size += len(entry.key) + len(entry.value)
        if page and (len(page) == limit or size > PAGE_BYTES):
            return Page(page, True)
        page.append(entry)
    return Page(page, False)


class Put(NamedTuple):
    """Store `value` under `key`.

    `expect` is the version that must be there now: None for whatever is
    there, `ABSENT` for nothing at all.
    """

    key: str
    value: bytes
    expect: int | None = None


class Delete(NamedTuple):
    """Remove `key`. Without `expect` a missing key is no failure; with it (never `ABSENT`) it is."""

    key: str
    expect: int | None = None


class Check(NamedTuple):
    """Require that `key` has version `expect` (never `ABSENT`), and change nothing."""

    key: str
    expect: int


Op: TypeAlias = Put | Delete | Check


class Write(NamedTuple):
    """Ops on distinct keys of one partition, all or nothing.

    Every Put of it stores `version`, a random number that no other Write has.
    """

    partition: str
    ops: tuple[Op, ...]
    version: int


@runtime_checkable
class Driver(Protocol):
    """The contract. Nobody inherits from it; any object with these methods is a driver.

    An optional attribute ``lanes: int`` says how many `commit` calls the core
    may have under way at once (1 where it is missing: one at a time). Lanes
    are chosen by partition; Writes to one partition never overlap. Another,
    ``any_loop: bool``, says that it holds nothing that belongs to the event
    loop it was opened on. A third, ``may_lose: bool``, says once it is open that
    its server may come back without the last Writes it acknowledged: then the
    core asserts with each append, by a `Check`, that the one before is there.
    """

    async def open(self) -> None:
        """Connect, and create what is missing. Idempotent; safe while other processes do the same."""
        ...

    async def close(self) -> None:
        """Release what `open` took. Idempotent. A client that was passed in stays open."""
        ...

    async def get(self, keys: Sequence[Key]) -> list[Entry | None]:
        """Return the entry of each key, None where there is none, in the order of `keys`.

        At most `MAX_GET_KEYS`, of any partitions, a key possibly twice. One round trip.
        """
        ...

    async def scan(
        self, partition: str, start: str, end: str | None, *, limit: int, reverse: bool = False
    ) -> Page:
        """Return the first `limit` (1 or more) entries with ``start <= key < end``, by rising key.

        `reverse` returns the last ones, by falling key. `end` None: no upper
        bound; `end` at or below `start`: nothing. A page may hold fewer
        entries, at least one, with ``more=True`` once it reaches about
        `PAGE_BYTES`. ``more`` is exact: it is True only if entries of the
        range follow. One round trip.
        """
        ...

    async def commit(self, writes: Sequence[Write]) -> list[bool | None]:
        """Apply Writes to different partitions, each whole or not at all.

        The result has one outcome a Write: True, applied; False, refused by an
        ``expect``, nothing of it changed; None, unknown. A refused Write never
        undoes another. An exception leaves the outcome of all of them unknown;
        the core then reads back and decides, so a driver must not send a Write
        a second time once it may have been applied. An `UnavailableError`
        whose `unapplied` is set says that none of them was, as when it could
        not connect. As few round trips as the engine allows, whatever the
        number of Writes.
        """
        ...

    async def purge(self, partition: str, start: str, end: str | None) -> None:
        """Remove all entries of the range, which nobody needs any more.

        Not atomic: it may be seen half done and may be called again. It must
        not block other callers for long, however many entries there are.
        """
        ...

    async def partitions(self, cursor: str | None, limit: int) -> tuple[list[str], str | None]:
        """Return up to `limit` partitions that hold entries, and a cursor for the next page.

        None as cursor starts; None as next cursor ends. In any order. May
        repeat a partition; misses none that existed throughout. Only
        partitions of this driver's namespace.
        """
        ...
