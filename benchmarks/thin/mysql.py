"""MySQL and MariaDB: one statement an operation, on a held connection or through the client's pool.

Bytes stand in the statements as hexadecimal literals, as in our driver: the
clients need far longer to escape them. Both clients have the same interface.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from urllib.parse import unquote, urlsplit
from uuid import uuid4

_CREATE = """CREATE TABLE {t} (
    s VARBINARY(255), n BIGINT, v LONGBLOB NOT NULL, ver BIGINT NOT NULL, PRIMARY KEY (s, n)) ENGINE=InnoDB"""
_ISOLATION = "SET SESSION TRANSACTION ISOLATION LEVEL READ COMMITTED"  # as our driver has it


class ThinMySQL:
    """Keep values in a table, through a pool of `size` connections, or on one where that is None."""

    def __init__(self, url: str, size: int | None, client_library: Any) -> None:
        self.client: str = client_library.__name__
        self._library = client_library
        parts = urlsplit(url)
        self._options: dict[str, Any] = {
            "host": parts.hostname,
            "port": parts.port or 3306,
            "user": unquote(parts.username or ""),
            "password": unquote(parts.password or ""),
            "db": parts.path[1:],
            "autocommit": True,
            "init_command": _ISOLATION,
        }
        self._size = size
        self._table = f"thin_{uuid4().hex}"
        self._pool: Any = None
        self._held: Any = None

    async def open(self) -> None:
        size = self._size or 1
        self._pool = await self._library.create_pool(minsize=size, maxsize=size, **self._options)
        if self._size is None:
            self._held = await self._pool.acquire()
        await self._run(_CREATE.format(t=self._table))

    async def close(self) -> None:
        await self._run(f"DROP TABLE {self._table}")
        if self._held is not None:
            self._pool.release(self._held)
        self._pool.close()
        await self._pool.wait_closed()

    async def append(self, session: str, number: int, value: bytes) -> None:
        await self._run(f"INSERT INTO {self._table} VALUES ('{session}', {number}, x'{value.hex()}', 1)")

    async def extend(self, session: str, first: int, values: Sequence[bytes]) -> None:
        rows = ", ".join(f"('{session}', {n}, x'{value.hex()}', 1)" for n, value in enumerate(values, first))
        await self._run(f"INSERT INTO {self._table} VALUES {rows}")

    async def get(self, session: str, number: int) -> bytes:
        _, rows = await self._run(f"SELECT v FROM {self._table} WHERE s = '{session}' AND n = {number}")
        value: bytes = rows[0][0]
        return value

    async def last(self, session: str, count: int) -> list[bytes]:
        _, rows = await self._run(
            f"SELECT v FROM {self._table} WHERE s = '{session}' ORDER BY n DESC LIMIT {count}"
        )
        return [row[0] for row in rows]

    async def swap(self, session: str, values: Sequence[bytes], old: int, new: int) -> None:
        rows = " UNION ALL ".join(
            f"SELECT '{session}' AS s, {n} AS n, x'{v.hex()}' AS v" for n, v in enumerate(values, 1)
        )
        those = f"s = '{session}' AND n <= {len(values)} AND ver = {old}"
        affected, _ = await self._run(
            f"INSERT INTO {self._table} (s, n, v, ver) SELECT s, n, v, {new} FROM ({rows}) AS w"
            f" WHERE (SELECT COUNT(*) FROM {self._table} WHERE {those} FOR UPDATE) = {len(values)}"
            f" ON DUPLICATE KEY UPDATE v = w.v, ver = {new}"
        )
        if affected != 2 * len(values):  # the server counts an update as two
            raise RuntimeError(affected)

    async def _run(self, statement: str) -> tuple[int, Sequence[Any]]:
        if self._held is not None:
            return await _execute(self._held, statement)
        async with self._pool.acquire() as connection:
            return await _execute(connection, statement)


async def _execute(connection: Any, statement: str) -> tuple[int, Sequence[Any]]:
    async with connection.cursor() as cursor:
        await cursor.execute(statement)
        rows = await cursor.fetchall() if cursor.description else ()
        return cursor.rowcount, rows
