"""What expires when: ``index/deadlines`` lists hours, ``index/deadlines/<hour>`` what goes in each.

Like those of all listings the entries are hints: put before the thing that
expires says so itself, and removed once they are due and that is gone, or has
had an hour to say so.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable

import msgspec

from persistence.coalescer import some_at_once
from persistence.collection import HintBody
from persistence.driver import Delete, Entry, Put
from persistence.errors import CorruptRecordError
from persistence.store import Store, pack

__all__ = ["Deadlines", "hour"]

_DEADLINES = "index/deadlines"
_PAGE = 500
_HOUR_MS = 3_600_000


class Deadlines:
    """The deadlines of all things in a store."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._hints = msgspec.json.Decoder(HintBody)

    async def put(self, partition: str, at: int) -> None:
        """Note that what is in `partition` expires at the time `at` (milliseconds)."""
        now = self._store.clock()
        by_hour = Put(f"{hour(at):012d}", pack(HintBody(at=now, id="")))
        entry = Put(f"{at:015d}/{partition}", pack(HintBody(at=now, id=partition)))
        await asyncio.gather(
            self._store.coalescer.write(_DEADLINES, [by_hour], hint=True),
            self._store.coalescer.write(f"{_DEADLINES}/{hour(at)}", [entry], hint=True),
        )

    async def sweep(self, kind: str, expire: Callable[[str], Awaitable[object]]) -> None:
        """Call `expire` for each partition of a kind that may have expired; it must check that itself.

        If it returns something true, the entry is removed. If not, only once it
        is an hour old: the thing that it was put ahead of may be about to come.
        """
        coalescer, now = self._store.coalescer, self._store.clock()
        unreadable: CorruptRecordError | None = None
        old = now - _HOUR_MS

        async def one(place: tuple[str, Entry]) -> None:
            nonlocal unreadable
            name, entry = place
            try:
                done = await expire(entry.key.partition("/")[2])
            except CorruptRecordError as error:
                unreadable = unreadable or error  # told once the others are gone
                return
            if done or self._noted(name, entry) <= old:
                await coalescer.write(name, [Delete(entry.key, entry.version)], hint=True)

        async for found in self._hours(f"{hour(now) + 1:012d}"):
            name = f"{_DEADLINES}/{int(found.key)}"
            async for entries in coalescer.pages(name, "", f"{now + 1:015d}", limit=_PAGE):
                due = [entry for entry in entries if entry.key.partition("/")[2].startswith(f"{kind}/")]
                await some_at_once(one, ((name, entry) for entry in due))
            rest = await coalescer.scan(name, "", None, limit=1)
            # Not a young one: its first entry, put at the same time, may still be on its way.
            if not rest.entries and int(found.key) < hour(now) and self._noted(_DEADLINES, found) <= old:
                # Refused: a deadline of this hour has come in meanwhile.
                await coalescer.write(_DEADLINES, [Delete(found.key, found.version)], hint=True)
        if unreadable is not None:
            raise unreadable

    def _noted(self, partition: str, entry: Entry) -> int:
        try:
            return self._store.unpack(self._hints, partition, entry).at
        except CorruptRecordError:
            return 0  # what counts is in its key

    async def _hours(self, end: str) -> AsyncIterator[Entry]:
        async for entries in self._store.coalescer.pages(_DEADLINES, "", end, limit=_PAGE):
            for entry in entries:
                yield entry


def hour(at: int) -> int:
    """Return the number of the hour that a time is in."""
    return at // _HOUR_MS
