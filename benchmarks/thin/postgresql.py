"""PostgreSQL through asyncpg: one statement an operation, on a held connection or through its pool."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from uuid import uuid4

import asyncpg

_CREATE = """CREATE TABLE {t} (
    s text COLLATE "C", n bigint, v bytea NOT NULL, ver bigint NOT NULL, PRIMARY KEY (s, n))"""
_APPEND = "INSERT INTO {t} VALUES ($1, $2, $3, 1)"
_EXTEND = "INSERT INTO {t} SELECT $1, n, v, 1 FROM unnest($2::bigint[], $3::bytea[]) AS row(n, v)"
_GET = "SELECT v FROM {t} WHERE s = $1 AND n = $2"
_LAST = "SELECT v FROM {t} WHERE s = $1 ORDER BY n DESC LIMIT $2"
_SWAP = """
WITH held AS MATERIALIZED (
  SELECT n FROM {t} WHERE s = $1 AND n = ANY($2::bigint[]) AND ver = $4 ORDER BY n FOR UPDATE
)
UPDATE {t} AS t SET v = row.v, ver = $5 FROM unnest($2::bigint[], $3::bytea[]) AS row(n, v)
WHERE t.s = $1 AND t.n = row.n AND (SELECT count(*) FROM held) = cardinality($2::bigint[])
"""


class ThinPostgreSQL:
    """Keep values in a table, through a pool of `size` connections, or on one where that is None."""

    client = "asyncpg"

    def __init__(self, url: str, size: int | None) -> None:
        self._url = url
        self._size = size
        self._db: Any = None  # a connection and a pool have the same methods
        self._table = f"thin_{uuid4().hex}"
        self._append, self._extend, self._get, self._last, self._swap = [
            statement.format(t=self._table) for statement in (_APPEND, _EXTEND, _GET, _LAST, _SWAP)
        ]

    async def open(self) -> None:
        if self._size is None:
            self._db = await asyncpg.connect(self._url)
        else:
            self._db = await asyncpg.create_pool(self._url, min_size=self._size, max_size=self._size)
        await self._db.execute(_CREATE.format(t=self._table))

    async def close(self) -> None:
        await self._db.execute(f"DROP TABLE {self._table}")
        await self._db.close()

    async def append(self, session: str, number: int, value: bytes) -> None:
        await self._db.execute(self._append, session, number, value)

    async def extend(self, session: str, first: int, values: Sequence[bytes]) -> None:
        await self._db.execute(self._extend, session, range(first, first + len(values)), values)

    async def get(self, session: str, number: int) -> bytes:
        value: bytes = await self._db.fetchval(self._get, session, number)
        return value

    async def last(self, session: str, count: int) -> list[bytes]:
        return [row[0] for row in await self._db.fetch(self._last, session, count)]

    async def swap(self, session: str, values: Sequence[bytes], old: int, new: int) -> None:
        numbers = range(1, len(values) + 1)
        status = await self._db.execute(self._swap, session, numbers, values, old, new)
        if status != f"UPDATE {len(values)}":
            raise RuntimeError(status)
