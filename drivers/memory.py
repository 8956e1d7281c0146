"""A dict of entries and a sorted list of keys for each partition. The oracle of the model tests.

Nothing is kept when the process ends. The data belong to the driver object:
closing it keeps them, two objects share nothing, one process can use it.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import NamedTuple

from sortedcontainers import SortedDict, SortedList

from persistence.driver import ABSENT, Check, Entry, Key, Op, Page, Put, Write, page_of
from persistence.errors import ConfigurationError
from persistence.options import Durability, check_durability, check_namespace, flag, split_url

__all__ = ["MemoryDriver", "from_url", "memory_driver"]


class _Partition(NamedTuple):
    entries: dict[str, Entry]
    keys: SortedList[str]  # a third of a SortedDict's size, and most partitions are small


class MemoryDriver:
    """Keep everything in this process.

    The three options are those of every driver: here `namespace` and
    `durability` are checked and change nothing, for nothing outlives the
    process, and there is nothing to `create`.
    """

    any_loop = True

    def __init__(
        self,
        *,
        namespace: str = "default",
        durability: Durability = "process",
        create: bool = True,
    ) -> None:
        check_namespace(namespace)
        check_durability(durability)
        self._partitions: SortedDict[str, _Partition] = SortedDict()

    def __repr__(self) -> str:
        return "memory_driver()"

    async def open(self) -> None:
        """Do nothing: there is nothing to connect to."""

    async def close(self) -> None:
        """Do nothing: the data live as long as this object."""

    async def get(self, keys: Sequence[Key]) -> list[Entry | None]:
        found: list[Entry | None] = []
        for name, key in keys:
            partition = self._partitions.get(name)
            found.append(None if partition is None else partition.entries.get(key))
        return found

    async def scan(
        self, partition: str, start: str, end: str | None, *, limit: int, reverse: bool = False
    ) -> Page:
        held = self._partitions.get(partition)
        if held is None:
            return Page([], False)
        keys = held.keys.irange(start, end, (True, False), reverse=reverse)
        return page_of(map(held.entries.__getitem__, keys), limit)

    async def commit(self, writes: Sequence[Write]) -> list[bool | None]:
        return [self._apply(write) for write in writes]

    async def purge(self, partition: str, start: str, end: str | None) -> None:
        held = self._partitions.get(partition)
        if held is None:
            return
        for key in list(held.keys.irange(start, end, (True, False))):
            held.keys.remove(key)
            del held.entries[key]
        if not held.entries:
            del self._partitions[partition]

    async def partitions(self, cursor: str | None, limit: int) -> tuple[list[str], str | None]:
        after = self._partitions.irange(cursor, inclusive=(False, False))
        names = list(islice(after, limit))
        return names, names[-1] if len(names) == limit else None

    def _apply(self, write: Write) -> bool:
        held = self._partitions.get(write.partition)
        entries = held.entries if held is not None else {}
        if not all(_holds(op, entries) for op in write.ops):
            return False
        if held is None:
            held = self._partitions[write.partition] = _Partition(entries, SortedList())
        for op in write.ops:
            if isinstance(op, Put):
                if op.key not in entries:
                    held.keys.add(op.key)
                entries[op.key] = Entry(op.key, op.value, write.version)
            elif not isinstance(op, Check) and entries.pop(op.key, None) is not None:
                held.keys.remove(op.key)
        if not entries:
            del self._partitions[write.partition]
        return True


memory_driver = MemoryDriver


def from_url(url: str) -> MemoryDriver:
    """Return the driver of ``memory://?namespace=…``."""
    parts, options, _ = split_url(url, {"namespace": str, "durability": str, "create": flag})
    if parts.netloc or parts.path.strip("/"):
        message = "a memory:// URL names nothing: what is in memory has no place and no name"
        raise ConfigurationError(message)
    return MemoryDriver(**options)


def _holds(op: Op, entries: dict[str, Entry]) -> bool:
    if op.expect is None:
        return True
    entry = entries.get(op.key)
    return op.expect == (ABSENT if entry is None else entry.version)
