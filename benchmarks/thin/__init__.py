"""What somebody would write who needs just this: the thinnest correct use of each engine's client.

No layers, no abstraction, statements for exactly this purpose. Numbered values
of a session, as bytes, and durability as our own driver has it in the same
run. One module an engine, each with a class `Thin…` that has these methods.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

__all__ = ["Swapping", "Thin"]


class Thin(Protocol):
    """An engine's client, used directly: one connection that is held, or the client's own pool."""

    client: str

    async def open(self) -> None:
        """Connect, and make an empty table."""
        ...

    async def close(self) -> None:
        """Remove the table, and disconnect."""
        ...

    async def append(self, session: str, number: int, value: bytes) -> None:
        """Create one value; it must not be there."""
        ...

    async def extend(self, session: str, first: int, values: Sequence[bytes]) -> None:
        """Create several, in one step if the engine can."""
        ...

    async def get(self, session: str, number: int) -> bytes:
        """Return one value."""
        ...

    async def last(self, session: str, count: int) -> list[bytes]:
        """Return the `count` last values, newest first."""
        ...


class Swapping(Thin, Protocol):
    """The clients of servers do this too."""

    async def swap(self, session: str, values: Sequence[bytes], old: int, new: int) -> None:
        """Replace the values 1, 2, 3, … in one step, all of which must have version `old`; the first is 1."""
        ...
