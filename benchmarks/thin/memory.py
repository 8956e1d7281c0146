"""Memory: a dict of dicts."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice


class ThinMemory:
    """Keep values in dicts, in the order of their creation."""

    client = "dict"

    def __init__(self) -> None:
        self._sessions: dict[str, dict[int, bytes]] = {}

    async def open(self) -> None:
        """Do nothing."""

    async def close(self) -> None:
        """Do nothing."""

    async def append(self, session: str, number: int, value: bytes) -> None:
        if self._sessions.setdefault(session, {}).setdefault(number, value) is not value:
            raise KeyError(number)

    async def extend(self, session: str, first: int, values: Sequence[bytes]) -> None:
        for number, value in enumerate(values, first):
            await self.append(session, number, value)

    async def get(self, session: str, number: int) -> bytes:
        return self._sessions[session][number]

    async def last(self, session: str, count: int) -> list[bytes]:
        return list(islice(reversed(self._sessions[session].values()), count))
