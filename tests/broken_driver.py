"""Drivers with one mistake each. Every mistake must be found by the conformance suite.

The classic one, read and then write, is `persistence.testing.BrokenDriver`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, Self

from persistence.driver import MAX_WRITE_BYTES, Check, Delete, Entry, Key, Page, Put, Write
from persistence.drivers.memory import MemoryDriver


class HalfWriteDriver(MemoryDriver):
    """Applies the ops before the one that is refused."""

    async def commit(self, writes: Sequence[Write]) -> list[bool | None]:
        outcomes: list[bool | None] = []
        for write in writes:
            applied: list[bool | None] = []
            for op in write.ops:
                applied += await super().commit([write._replace(ops=(op,))])
                if not applied[-1]:
                    break
            outcomes.append(all(applied))
        return outcomes


class AllOrNoneDriver(MemoryDriver):
    """Lets one refused Write refuse the others of its call."""

    async def commit(self, writes: Sequence[Write]) -> list[bool | None]:
        for write in writes:
            checks = tuple(Check(op.key, op.expect) for op in write.ops if op.expect)
            if await super().commit([write._replace(ops=checks)]) == [False]:
                return [False] * len(writes)
        return await super().commit(writes)


class NoCheckDriver(MemoryDriver):
    """Takes a Check for a hint: two Writes may each rely on what the other changes."""

    async def commit(self, writes: Sequence[Write]) -> list[bool | None]:
        return await super().commit(
            [
                write._replace(ops=tuple(op for op in write.ops if not isinstance(op, Check)))
                for write in writes
            ]
        )


class SkewedDriver(MemoryDriver):
    """Tests its Checks first and everything else later, as snapshot isolation may."""

    async def commit(self, writes: Sequence[Write]) -> list[bool | None]:
        outcomes: list[bool | None] = []
        for write in writes:
            checks = tuple(op for op in write.ops if isinstance(op, Check))
            others = tuple(op for op in write.ops if not isinstance(op, Check))
            (outcome,) = await super().commit([write._replace(ops=checks)])
            if outcome:
                # Nothing else is wrong: what fails here has changed nothing.
                await asyncio.sleep(0)
                (outcome,) = await super().commit([write._replace(ops=others)])
            outcomes.append(outcome)
        return outcomes


class DoubleVersionDriver(MemoryDriver):
    """Compares versions as doubles, as Lua and JavaScript do."""

    async def commit(self, writes: Sequence[Write]) -> list[bool | None]:
        rounded = []
        for write in writes:
            found = await self.get([Key(write.partition, op.key) for op in write.ops])
            ops = tuple(
                op._replace(expect=entry.version)
                if entry and op.expect and float(op.expect) == float(entry.version)
                else op
                for op, entry in zip(write.ops, found, strict=True)
            )
            rounded.append(write._replace(ops=ops))
        return await super().commit(rounded)


class LostTailDriver(MemoryDriver):
    """Acknowledges a Write's last Put without storing it, every hundredth time."""

    count = 0

    async def commit(self, writes: Sequence[Write]) -> list[bool | None]:
        outcomes = await super().commit(writes)
        for write, outcome in zip(writes, outcomes, strict=True):
            self.count += 1
            if outcome and self.count % 100 == 0 and isinstance(write.ops[-1], Put):
                await super().commit([write._replace(ops=(Delete(write.ops[-1].key),))])
        return outcomes


class TimidDriver(MemoryDriver):
    """Says "refused" where it only gave up."""

    busy = False

    async def commit(self, writes: Sequence[Write]) -> list[bool | None]:
        if self.busy:
            return [False] * len(writes)
        self.busy = True
        try:
            await asyncio.sleep(0)
            return await super().commit(writes)
        finally:
            self.busy = False


class TornReadDriver(MemoryDriver):
    """Reads key by key."""

    async def get(self, keys: Sequence[Key]) -> list[Entry | None]:
        found: list[Entry | None] = []
        for key in keys:
            found += await super().get([key])
            await asyncio.sleep(0)
        return found


class LateCheckDriver(MemoryDriver):
    """Tests its Checks first and everything else later, only in Writes that delete something too."""

    async def commit(self, writes: Sequence[Write]) -> list[bool | None]:
        outcomes: list[bool | None] = []
        for write in writes:
            checks = tuple(op for op in write.ops if isinstance(op, Check))
            if checks and any(isinstance(op, Delete) for op in write.ops):
                if await super().commit([write._replace(ops=checks)]) == [False]:
                    outcomes.append(False)
                    continue
                await asyncio.sleep(0)
                write = write._replace(ops=tuple(op for op in write.ops if not isinstance(op, Check)))
            outcomes += await super().commit([write])
        return outcomes


class ChecksAloneDriver(MemoryDriver):
    """Takes a Write that changes nothing for one that cannot fail."""

    async def commit(self, writes: Sequence[Write]) -> list[bool | None]:
        outcomes = await super().commit(writes)
        for number, write in enumerate(writes):
            if len(write.ops) > 1 and all(isinstance(op, Check) for op in write.ops):
                outcomes[number] = True
        return outcomes


class DeletesApartDriver(MemoryDriver):
    """Applies a Write of Deletes alone op by op."""

    async def commit(self, writes: Sequence[Write]) -> list[bool | None]:
        outcomes: list[bool | None] = []
        for write in writes:
            if all(isinstance(op, Delete) for op in write.ops):
                parts = [
                    await super(DeletesApartDriver, self).commit([write._replace(ops=(op,))])
                    for op in write.ops
                ]
                outcomes.append(all(part == [True] for part in parts))
            else:
                outcomes += await super().commit([write])
        return outcomes


class SmallPacketDriver(MemoryDriver):
    """Refuses what is larger than a packet, as a server may."""

    async def commit(self, writes: Sequence[Write]) -> list[bool | None]:
        size = sum(len(op.key) + len(op.value) for write in writes for op in write.ops if isinstance(op, Put))
        assert size < MAX_WRITE_BYTES, "packet too large"
        return await super().commit(writes)


class KeepingDriver(MemoryDriver):
    """Objects on one store, each of which keeps what it has read until it writes."""

    def __init__(self) -> None:
        super().__init__()
        self._kept: dict[object, Any] = {}

    def another(self) -> Self:
        other = type(self)()
        other._partitions = self._partitions
        return other

    async def commit(self, writes: Sequence[Write]) -> list[bool | None]:
        self._kept.clear()
        return await super().commit(writes)

    async def purge(self, partition: str, start: str, end: str | None) -> None:
        self._kept.clear()
        await super().purge(partition, start, end)


class KeptAbsenceDriver(KeepingDriver):
    """Keeps in mind which keys were not there."""

    async def get(self, keys: Sequence[Key]) -> list[Entry | None]:
        found = await super().get(keys)
        found = [None if key in self._kept else entry for key, entry in zip(keys, found, strict=True)]
        self._kept.update((key, None) for key, entry in zip(keys, found, strict=True) if entry is None)
        return found


class KeptPageDriver(KeepingDriver):
    """Keeps the pages it has read."""

    async def scan(
        self, partition: str, start: str, end: str | None, *, limit: int, reverse: bool = False
    ) -> Page:
        asked = partition, start, end, limit, reverse
        if asked not in self._kept:
            self._kept[asked] = await super().scan(partition, start, end, limit=limit, reverse=reverse)
        entries, more = self._kept[asked]
        return Page([*entries], more)


class KeptNamesDriver(KeepingDriver):
    """Keeps the names of the partitions."""

    async def partitions(self, cursor: str | None, limit: int) -> tuple[list[str], str | None]:
        if (cursor, limit) not in self._kept:
            self._kept[cursor, limit] = await super().partitions(cursor, limit)
        names, following = self._kept[cursor, limit]
        return [*names], following


class StaleReadDriver(MemoryDriver):
    """Answers `get` from before the last commit."""

    def __init__(self) -> None:
        super().__init__()
        self._before: dict[Key, Entry | None] = {}

    async def get(self, keys: Sequence[Key]) -> list[Entry | None]:
        now = await super().get(keys)
        return [self._before.pop(key, entry) for key, entry in zip(keys, now, strict=True)]

    async def commit(self, writes: Sequence[Write]) -> list[bool | None]:
        keys = [Key(write.partition, op.key) for write in writes for op in write.ops]
        self._before = dict(zip(keys, await super().get(keys), strict=True))
        return await super().commit(writes)


class InexactMoreDriver(MemoryDriver):
    """Takes a full page for a sign that there is more."""

    async def scan(
        self, partition: str, start: str, end: str | None, *, limit: int, reverse: bool = False
    ) -> Page:
        page = await super().scan(partition, start, end, limit=limit, reverse=reverse)
        return page._replace(more=page.more or len(page.entries) == limit)


class CaseBlindDriver(MemoryDriver):
    """Sorts upper and lower case together, as a database's collation may."""

    async def scan(
        self, partition: str, start: str, end: str | None, *, limit: int, reverse: bool = False
    ) -> Page:
        page = await super().scan(partition, start, end, limit=limit, reverse=reverse)
        page.entries.sort(key=lambda entry: entry.key.lower(), reverse=reverse)
        return page


class InclusiveEndDriver(MemoryDriver):
    """Purges the end of the range as well."""

    async def purge(self, partition: str, start: str, end: str | None) -> None:
        await super().purge(partition, start, end if end is None else end + "!")


class ForgetfulListDriver(MemoryDriver):
    """Lists partitions by position, so that removing one hides another."""

    async def partitions(self, cursor: str | None, limit: int) -> tuple[list[str], str | None]:
        names, _ = await super().partitions(None, 10_000)
        begin = int(cursor or 0)
        end = begin + limit
        return names[begin:end], str(end) if end < len(names) else None


class SkippedNameDriver(MemoryDriver):
    """Goes on behind the least name that follows the last one of a page."""

    async def partitions(self, cursor: str | None, limit: int) -> tuple[list[str], str | None]:
        return await super().partitions(cursor and cursor + "!", limit)
