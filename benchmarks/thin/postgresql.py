"""PostgreSQL through asyncpg: one statement an operation, on a held connection or through its pool."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import asyncpg

_CREATE = """CREATE TABLE thin (
    s text COLLATE "C", n bigint, v bytea NOT NULL, ver bigint NOT NULL, PRIMARY KEY (s, n))"""
_EXTEND = "INSERT INTO thin SELECT $1, n, v, 1 FROM unnest($2::bigint[], $3::bytea[]) AS row(n, v)"
_SWAP = """
WITH held AS MATERIALIZED (
  SELECT n FROM thin WHERE s = $1 AND n = ANY($2::bigint[]) AND ver = $4 ORDER BY n FOR UPDATE
)
UPDATE thin SET v = row.v, ver = $5 FROM unnest($2::bigint[], $3::bytea[]) AS row(n, v)
WHERE thin.s = $1 AND thin.n = row.n AND (SELECT count(*) FROM held) = cardinality($2::bigint[])
"""


class ThinPostgreSQL:
    """Keep values in a table, through a pool of `size` connections, or on one where that is None."""

    client = "asyncpg"

    def __init__(self, url: str, size: int | None) -> None:
        self._url = url
        self._size = size
        self._db: Any = None  # a connection and a pool have the same methods

    async def open(self) -> None:
        if self._size is None:
            self._db = await asyncpg.connect(self._url)
        else:
            self._db = await asyncpg.create_pool(self._url, min_size=self._size, max_size=self._size)
        await self._db.execute("DROP TABLE IF EXISTS thin")
        await self._db.execute(_CREATE)

    async def close(self) -> None:
        await self._db.execute("DROP TABLE thin")
        await self._db.close()

    async def append(self, session: str, number: int, value: bytes) -> None:
        await self._db.execute("INSERT INTO thin VALUES ($1, $2, $3, 1)", session, number, value)

    async def extend(self, session: str, first: int, values: Sequence[bytes]) -> None:
        await self._db.execute(_EXTEND, session, range(first, first + len(values)), values)

    async def get(self, session: str, number: int) -> bytes:
        value: bytes = await self._db.fetchval("SELECT v FROM thin WHERE s = $1 AND n = $2", session, number)
        return value

    async def last(self, session: str, count: int) -> list[bytes]:
        statement = "SELECT v FROM thin WHERE s = $1 ORDER BY n DESC LIMIT $2"
        return [row[0] for row in await self._db.fetch(statement, session, count)]

    async def swap(self, session: str, values: Sequence[bytes], old: int, new: int) -> None:
        numbers = range(1, len(values) + 1)
        status = await self._db.execute(_SWAP, session, numbers, values, old, new)
        if status != f"UPDATE {len(values)}":
            raise RuntimeError(status)
