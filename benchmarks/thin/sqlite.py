"""SQLite through aiosqlite: one connection in autocommit, one statement and thread hop an operation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import aiosqlite

from persistence.options import Durability

_CREATE = """CREATE TABLE thin (
    s TEXT NOT NULL, n INTEGER NOT NULL, v BLOB NOT NULL, ver INTEGER NOT NULL, PRIMARY KEY (s, n))"""


class ThinSQLite:
    """Keep values in a table of one file."""

    client = "aiosqlite"

    def __init__(self, path: Path, durability: Durability) -> None:
        self._connecting = aiosqlite.connect(path, isolation_level=None)
        self._synchronous = "FULL" if durability == "power" else "NORMAL"

    async def open(self) -> None:
        self._db = await self._connecting
        await self._db.execute("PRAGMA journal_mode = WAL")
        await self._db.execute(f"PRAGMA synchronous = {self._synchronous}")
        await self._db.execute(_CREATE)

    async def close(self) -> None:
        await self._db.close()

    async def append(self, session: str, number: int, value: bytes) -> None:
        await self._db.execute("INSERT INTO thin VALUES (?, ?, ?, 1)", (session, number, value))

    async def extend(self, session: str, first: int, values: Sequence[bytes]) -> None:
        rows = ", ".join(["(?, ?, ?, 1)"] * len(values))
        parameters = [part for n, value in enumerate(values, first) for part in (session, n, value)]
        await self._db.execute(f"INSERT INTO thin VALUES {rows}", parameters)

    async def get(self, session: str, number: int) -> bytes:
        rows = await self._db.execute_fetchall("SELECT v FROM thin WHERE s = ? AND n = ?", (session, number))
        ((value,),) = rows
        return bytes(value)

    async def last(self, session: str, count: int) -> list[bytes]:
        statement = "SELECT v FROM thin WHERE s = ? ORDER BY n DESC LIMIT ?"
        return [value for (value,) in await self._db.execute_fetchall(statement, (session, count))]
