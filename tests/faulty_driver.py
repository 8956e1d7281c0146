"""Drivers on a MemoryDriver that watch what the core does, and that fail in the ways engines do."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Sequence
from itertools import groupby

from persistence.driver import (
    ABSENT,
    MAX_GET_KEYS,
    MAX_KEY_CHARS,
    MAX_PARTITION_CHARS,
    MAX_VALUE_BYTES,
    MAX_WRITE_BYTES,
    MAX_WRITE_OPS,
    Entry,
    Key,
    Page,
    Put,
    Write,
)
from persistence.drivers.memory import MemoryDriver
from persistence.errors import UnavailableError
from persistence.options import unapplied


def is_name(text: str, limit: int) -> bool:
    """Tell whether `text` is a partition or key of the contract."""
    return 0 < len(text) <= limit and all("!" <= char <= "~" and char not in "{}" for char in text)


async def end_of_the_process() -> None:
    """Be cancelled, as whatever runs when a process ends: there is no answer, and nobody asks again."""
    task = asyncio.current_task()
    if task is not None:
        task.cancel()
    await asyncio.Event().wait()


class RecordingDriver:
    """Keeps the core to its side of the contract, counts calls, and can hold them up at a gate.

    Several of them on one MemoryDriver stand for several processes.
    """

    def __init__(self, memory: MemoryDriver | None = None, *, lanes: int = 1) -> None:
        self.memory = MemoryDriver() if memory is None else memory
        self.lanes = lanes
        self.calls: list[str] = []
        self.commits: list[list[Write]] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.opened = False
        self.closed = 0
        self.broken: list[str] = []  # rules of the contract that the core broke
        self._partitions = Counter[str]()  # with a Write under way
        self._commits = 0
        self._gets = 0

    def forget(self) -> None:
        """Start counting anew."""
        self.calls, self.commits = [], []

    def phases(self) -> list[str]:
        """Return the kinds of the calls made, repetitions in a row as one."""
        return [kind for kind, _ in groupby(self.calls)]

    async def open(self) -> None:
        self.opened = True

    async def close(self) -> None:
        self._rule(self._commits == self._gets == 0, "close waits for all calls")
        self.closed += 1

    async def get(self, keys: Sequence[Key]) -> list[Entry | None]:
        self._used("get")
        self._rule(0 < len(keys) <= MAX_GET_KEYS, f"{len(keys)} keys in a get")
        for key in keys:
            self._rule(is_name(key.partition, MAX_PARTITION_CHARS), f"partition {key.partition!r}")
            self._rule(is_name(key.key, MAX_KEY_CHARS), f"key {key.key!r}")
        self._gets += 1
        try:
            await self._pass()
            return await self.memory.get(keys)
        finally:
            self._gets -= 1

    async def scan(
        self, partition: str, start: str, end: str | None, *, limit: int, reverse: bool = False
    ) -> Page:
        self._used("scan")
        self._rule(limit >= 1, f"limit {limit}")
        await self._pass()
        return await self.memory.scan(partition, start, end, limit=limit, reverse=reverse)

    async def commit(self, writes: Sequence[Write]) -> list[bool | None]:
        self._used("commit")
        self.commits.append(list(writes))
        self._check(writes)
        names = [write.partition for write in writes]
        self._partitions.update(names)
        self._commits += 1
        self._rule(self._commits <= self.lanes, f"{self._commits} commits at once")
        self._rule(max(self._partitions.values()) == 1, "writes to one partition overlap")
        try:
            await self._pass()
            return await self.apply(writes)
        finally:
            self._partitions.subtract(names)
            self._commits -= 1

    async def apply(self, writes: Sequence[Write]) -> list[bool | None]:
        """Do what `commit` is for."""
        return await self.memory.commit(writes)

    async def purge(self, partition: str, start: str, end: str | None) -> None:
        self._used("purge")
        await self._pass()
        await self.memory.purge(partition, start, end)

    async def partitions(self, cursor: str | None, limit: int) -> tuple[list[str], str | None]:
        self._used("partitions")
        return await self.memory.partitions(cursor, limit)

    async def _pass(self) -> None:
        await asyncio.sleep(0)
        await self.gate.wait()

    def _used(self, call: str) -> None:
        self._rule(self.opened and not self.closed, f"{call} before open or after close")
        self.calls.append(call)

    def _check(self, writes: Sequence[Write]) -> None:
        ops = [op for write in writes for op in write.ops]
        self._rule(0 < len(ops) <= MAX_WRITE_OPS, f"{len(ops)} ops")
        size = sum(len(op.key) + (len(op.value) if isinstance(op, Put) else 0) for op in ops)
        self._rule(size <= MAX_WRITE_BYTES, f"{size} bytes")
        self._rule(len({write.partition for write in writes}) == len(writes), "a partition twice")
        for write in writes:
            self._rule(is_name(write.partition, MAX_PARTITION_CHARS), f"partition {write.partition!r}")
            self._rule(0 < write.version < 1 << 62, f"version {write.version}")
            self._rule(len({op.key for op in write.ops}) == len(write.ops) > 0, "a key twice")
            for op in write.ops:
                self._rule(is_name(op.key, MAX_KEY_CHARS), f"key {op.key!r}")
                if isinstance(op, Put):
                    self._rule(len(op.value) <= MAX_VALUE_BYTES, f"{len(op.value)} bytes in a value")
                else:
                    self._rule(op.expect != ABSENT, "absence expected by something else than a Put")

    def _rule(self, kept: bool, rule: str) -> None:
        # An exception raised here would be taken for the store's; the tests look at `broken`.
        if not kept:
            self.broken.append(rule)


class FaultyDriver(RecordingDriver):
    """Fails at random while `faults` is set, in every way that the contract allows for.

    `poison` names partitions whose Writes make the whole commit call fail.
    """

    def __init__(
        self, memory: MemoryDriver | None = None, *, seed: int = 0, rate: float = 0.0, lanes: int = 1
    ) -> None:
        super().__init__(memory, lanes=lanes)
        self.random = random.Random(seed)
        self.rate = rate
        self.poison: set[str] = set()
        self.seen = Counter[str]()
        self.late: set[asyncio.Task[None]] = set()

    async def settle(self) -> None:
        """Stop failing, and let arrive what is still on its way."""
        self.rate = 0.0
        while self.late:
            await asyncio.wait(self.late)

    async def get(self, keys: Sequence[Key]) -> list[Entry | None]:
        self._lose_answer("get")
        return await super().get(keys)

    async def scan(
        self, partition: str, start: str, end: str | None, *, limit: int, reverse: bool = False
    ) -> Page:
        self._lose_answer("scan")
        page = await super().scan(partition, start, end, limit=limit, reverse=reverse)
        if self.random.random() < self.rate and len(page.entries) > 1:  # allowed: fewer, and more
            self.seen["short page"] += 1
            return Page(page.entries[: self.random.randrange(1, len(page.entries))], True)
        return page

    async def apply(self, writes: Sequence[Write]) -> list[bool | None]:
        if any(write.partition in self.poison for write in writes):
            self.seen["poison"] += 1
            raise ValueError("this write is poison")
        if self.random.random() >= self.rate:
            return await super().apply(writes)
        way = self.random.choice(
            [
                *(self._no_connection, self._lost_before, self._lost_after, self._half),
                *(self._some_unknown, self._delayed, self._hung),
            ]
        )
        self.seen[way.__name__] += 1
        return await way(writes)

    def _lose_answer(self, call: str) -> None:
        if self.random.random() < self.rate:
            self.seen[call] += 1
            raise self.random.choice([UnavailableError("gone"), ConnectionResetError()])

    def _error(self) -> Exception:
        return self.random.choice([UnavailableError("gone"), ConnectionResetError(), RuntimeError("odd")])

    async def _no_connection(self, writes: Sequence[Write]) -> list[bool | None]:
        raise unapplied(UnavailableError("nobody there"))

    async def _lost_before(self, writes: Sequence[Write]) -> list[bool | None]:
        raise self._error()

    async def _lost_after(self, writes: Sequence[Write]) -> list[bool | None]:
        await self.memory.commit(writes)
        raise self._error()

    async def _half(self, writes: Sequence[Write]) -> list[bool | None]:
        await self.memory.commit(writes[: len(writes) // 2])
        raise self._error()

    async def _some_unknown(self, writes: Sequence[Write]) -> list[bool | None]:
        outcomes: list[bool | None] = []
        for write in writes:
            match self.random.randrange(3):
                case 0:
                    outcomes += await self.memory.commit([write])
                case 1:
                    await self.memory.commit([write])
                    outcomes.append(None)
                case _:
                    outcomes.append(None)
        return outcomes

    async def _delayed(self, writes: Sequence[Write]) -> list[bool | None]:
        """Apply them after the core was told that something is wrong, while it probes and repeats."""

        async def arrive() -> None:
            for write in writes:
                await asyncio.sleep(self.random.random() * 0.03)
                await self.memory.commit([write])

        task = asyncio.get_running_loop().create_task(arrive())
        self.late.add(task)
        task.add_done_callback(self.late.discard)
        raise self._error()

    async def _hung(self, writes: Sequence[Write]) -> list[bool | None]:
        await asyncio.sleep(0.02)
        return await self.memory.commit(writes)
