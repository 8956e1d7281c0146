"""One InnoDB table: ``p`` partition, ``k`` key, ``v`` value, ``ver`` version; primary key ``(p, k)``.

Names are VARBINARY, which knows no collation, padding or case; ``p`` is ``namespace/partition``. The table
is kept in the order of its primary key. `MySQLDriver.view_ddl` shows names and values as text.

MySQL 8, MariaDB 10.3, and later. Round trips: 1 for `get`; 1 for `scan`, 2 where values are long for a page;
1 for a `commit` of one Write that puts something, or of many that only create keys, or expect nothing; 2 for
any other, and then it is a transaction.
What would surprise:

* Bytes stand in the statements as hexadecimal literals, which no value can break out of: both clients need
  four times as long for their own escaping. A packet is twice as long as what it stores.
* READ COMMITTED: the gap locks of MySQL's default make writers of different keys deadlock.
* A row that is not there cannot be locked. So a create is a plain INSERT, whose duplicate error undoes the
  transaction, which then starts anew; and a Write that deletes, beside other ops, a key that may be absent
  inserts it first, with version 0.
* After an error the server keeps the transaction open, and the next BEGIN would commit it: every error is
  followed by a ROLLBACK or by the end of the connection.
* asyncmy is used where it is installed: it has aiomysql's interface and takes half the time.
"""

from __future__ import annotations

import asyncio
import logging
import random
import sys
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import suppress
from operator import itemgetter
from ssl import SSLContext, create_default_context
from typing import Any, NamedTuple, TypeAlias, TypeVar
from urllib.parse import parse_qsl, unquote
from weakref import WeakSet

from persistence.driver import ABSENT, PAGE_BYTES, Delete, Entry, Key, Op, Page, Put, Write
from persistence.errors import (
    ConfigurationError,
    CorruptRecordError,
    PersistenceError,
    UnavailableError,
    shown,
)
from persistence.options import (
    Durability,
    check_address,
    check_durability,
    check_identifier,
    check_namespace,
    check_pool_size,
    check_seconds,
    flag,
    masked_url,
    missing_client,
    split_url,
    take_apart,
    unapplied,
    untrusted,
)

try:
    import asyncmy as client_library
    from asyncmy.cursors import Cursor
    from asyncmy.errors import MySQLError
except ImportError:
    try:
        import aiomysql as client_library  # type: ignore[import-untyped,no-redef,unused-ignore]
        from aiomysql import Cursor  # type: ignore[no-redef,unused-ignore]
        from pymysql.err import MySQLError  # type: ignore[import-untyped,no-redef,unused-ignore]
    except ImportError as error:
        raise missing_client("mysql", "aiomysql") from error

_ERRORS: tuple[type[Exception], ...] = (MySQLError,)
try:
    from pymysql.err import MySQLError as PyMySQLError
except ImportError:
    pass
else:  # a pool that is passed in may be aiomysql's, even where asyncmy is installed
    _ERRORS += (PyMySQLError,)
_FAILURES: tuple[type[Exception], ...] = (*_ERRORS, OSError, EOFError)

__all__ = ["MySQLDriver", "client_library", "from_url", "mysql_driver"]

_GET_ONE = "SELECT v, ver FROM {table} WHERE p = {p} AND k = {k}"
_GET_KEY = "SELECT p, v, ver FROM {table} WHERE p IN ({partitions}) AND k = {k}"
_GET = "SELECT p, k, v, ver FROM {table} WHERE (p, k) IN ({keys})"

# Values that may not fit into the page are left out, and `_SCAN_CUT` is asked. For a page of few entries each
# is looked at by itself, which takes two thirds of the time.
_SCAN = (
    "SELECT k, CASE WHEN {fits} THEN v END, ver FROM {table} WHERE {range} ORDER BY k {order} LIMIT {beyond}"
)
_FEW, _ONE_FITS = 250, f"LENGTH(v) <= {4 * PAGE_BYTES // 250}"
_ALL_FIT = """(
  SELECT COALESCE(SUM(size), 0) FROM (
    SELECT LENGTH(v) AS size FROM {table} WHERE {range} ORDER BY k {order} LIMIT {limit}
  ) AS page
) <= {page_bytes}"""
# The values are fetched last, or they would all be copied to a temporary table.
_SCAN_CUT = """
SELECT t.k, t.v, t.ver, page.more FROM (
  SELECT k, SUM(size) OVER sofar AS total, LEAD(1) OVER sofar AS more FROM (
    SELECT k, LENGTH(v) AS size FROM {table} WHERE {range} ORDER BY k {order} LIMIT {beyond}
  ) AS entry WINDOW sofar AS (ORDER BY k {order} ROWS UNBOUNDED PRECEDING)
) AS page STRAIGHT_JOIN {table} AS t ON t.p = {p} AND t.k = page.k
WHERE page.total <= {page_bytes} ORDER BY page.k {order} LIMIT {limit}
"""

_HOLD = "INSERT INTO {table} (p, k, v, ver) VALUES {rows} ON DUPLICATE KEY UPDATE ver = ver"
_LOCK = "SELECT p, k, ver FROM {table} WHERE (p, k) IN ({keys}) ORDER BY p, k FOR UPDATE"
_CREATE = "INSERT INTO {table} (p, k, v, ver) VALUES {rows}"
_PUT = "REPLACE INTO {table} (p, k, v, ver) VALUES {rows}"
_DELETE = "DELETE FROM {table} WHERE (p, k) IN ({keys})"

# The versions of the rows are NULL, which is the error `_NULL`, unless all that must be there is; and so is
# that of a row which is there and must not be.
_EXPECT = "SELECT COUNT(*) INTO @held FROM {table} WHERE {expected} FOR UPDATE"
_PUT_IF = """
INSERT INTO {table} (p, k, v, ver) VALUES {rows}
ON DUPLICATE KEY UPDATE v = VALUES(v), ver = IF(VALUES(k) IN ({absent}), NULL, VALUES(ver))
"""

_PURGE_END = "SELECT k FROM {table} WHERE {range} ORDER BY k LIMIT 1 OFFSET {step}"
_PURGE = "DELETE FROM {table} WHERE {range}"

# From one partition to the next by the index, however many entries lie between them.
_PARTITIONS = """
WITH RECURSIVE found (p, n) AS (
  (SELECT p, 1 FROM {table} WHERE p > {first} AND p < {last} ORDER BY p LIMIT 1)
  UNION ALL
  SELECT (SELECT t.p FROM {table} AS t WHERE t.p > found.p AND t.p < {last} ORDER BY t.p LIMIT 1), n + 1
  FROM found WHERE p IS NOT NULL AND n < {limit}
)
SELECT p FROM found WHERE p IS NOT NULL
"""

# 319 bytes of namespace and partition, 1024 of key: the two are at most 3072.
_TABLE = """\
CREATE TABLE IF NOT EXISTS {table} (
  p VARBINARY(320) NOT NULL,
  k VARBINARY(1024) NOT NULL,
  v LONGBLOB NOT NULL,
  ver BIGINT NOT NULL,
  PRIMARY KEY (p, k)
) ENGINE=InnoDB ROW_FORMAT=DYNAMIC;
"""

_VIEW = """\
CREATE OR REPLACE VIEW {view} AS
SELECT CONVERT(SUBSTRING_INDEX(p, '/', 1) USING utf8mb4) AS namespace,
  CONVERT(SUBSTRING(p, LOCATE('/', p) + 1) USING utf8mb4) AS partition_name,
  CONVERT(k USING utf8mb4) AS key_name,
  CASE WHEN JSON_VALID(CONVERT(v USING utf8mb4)) THEN CONVERT(v USING utf8mb4) END AS value,
  LENGTH(v) AS bytes, ver AS version
FROM {table};
"""

_SESSION = (
    "SET SESSION TRANSACTION ISOLATION LEVEL READ COMMITTED;"
    " SET SESSION autocommit = 1, sql_mode = 'TRADITIONAL', sql_notes = 0,"
    " innodb_lock_wait_timeout = {lock_wait}, sql_select_limit = 18446744073709551615"
)
_SETTINGS = (
    "SHOW SESSION VARIABLES WHERE Variable_name IN ('max_allowed_packet', 'innodb_flush_log_at_trx_commit',"
    " 'log_bin', 'sync_binlog', 'binlog_format', 'read_only')"
)
_ENGINE = (
    "SELECT engine FROM information_schema.tables WHERE table_schema = DATABASE() AND table_name = '{name}'"
)

_LAST_KEY = "\x7f"
_HELD = 0  # the version of a row that is there only to be locked
_PACKET_BYTES = 12 << 20  # the longest packet: `MAX_WRITE_BYTES` as hexadecimal, and the names
_PURGE_STEP = 250
_PAGE_PARTITIONS = 500  # the servers stop a recursion at 1000
_LONGEST_PAUSE = 0.1  # seconds between two tries
_GRACE = 1.0  # seconds after which the server should have given up waiting for a lock
_MULTI_STATEMENTS = 1 << 16

_NULL = 1048
_DUPLICATE = 1062
_RETRIED = {1205, 1213, _DUPLICATE}  # lock wait timeout, deadlock, a key that was absent a moment ago
# And all below 1000, and 2000 to 2999. With 1290 and 1836 the server is a primary no longer.
_BROKEN = {1053, 1152, 1158, 1159, 1160, 1161, 1290, 1317, 1836, 1927, 3169, 4031}
_BUSY = {1021, 1040, 1041, 1047, 1114, 1129, 1203, 1205, 1213, 1226, 1792, 1969, 3024, _DUPLICATE}
# What the server says instead of doing it.
_UNDONE = _RETRIED | {1021, 1114, 1226, 1290, 1792, 1836, 1969, 3024}
_CORRUPT = {1034, 1194, 1195, 1712, 1877}
_FORBIDDEN = {1044, 1142, 1227}
_NO_TRANSACTIONS = {"MyISAM", "Aria", "MEMORY", "CSV", "ARCHIVE", "MRG_MyISAM", "BLACKHOLE"}
_PACKET_HINT = f"set max_allowed_packet={16 << 20} or more on the server, for the largest Write"
_NO_CLIENT_PLUGIN = {2059, 2061}

_OPTIONS: dict[str, Callable[[str], Any]] = {
    "namespace": str,
    "durability": str,
    "create": flag,
    "table": str,
    "pool_size": int,
    "timeout": float,
    "connect_timeout": float,
    "ssl": flag,
    "ssl_ca": str,
}
_TLS = 1 << 11  # the capability CLIENT_SSL
_log = logging.getLogger("persistence")

_T = TypeVar("_T")
_Name: TypeAlias = tuple[bytes, bytes]  # p, k


class _Step(NamedTuple):
    name: _Name
    op: Op
    version: int
    alone: bool  # the only op of its Write

    @property
    def held(self) -> bool:
        return isinstance(self.op, Delete) and self.op.expect is None and not self.alone


class MySQLDriver:
    """Keep everything in one table of a MySQL or MariaDB database.

    `url` is ``mysql://user:password@host:port/database`` or ``mariadb://…``; `host`, `port`, `user`,
    `password` and `database` go before what it says. Further options, in the query of the URL or here, go to
    the client's ``connect`` as they are, for instance ``unix_socket=…``. `ssl` is an ``ssl.SSLContext``, or
    True for the default one; `ssl_ca` names a file with the authorities that this trusts, not the system's.

    `client` is used instead where given, and not closed: a pool of asyncmy or aiomysql, which should be this
    driver's alone, for the sessions keep the settings below.

    `create` allows to create `table` where it is missing; with False, or without the right, `open` tells the
    statement to run (`ddl`). `pool_size` is how many connections there may be. `timeout` is how many seconds
    to wait for a connection or a reply; the server waits half of it for a lock.

    Each session is READ COMMITTED, autocommit and TRADITIONAL, which is strict. `durability` cannot change
    what the server does; `open` compares and warns on the logger "persistence". "power" needs
    ``innodb_flush_log_at_trx_commit=1``, and ``sync_binlog=1`` where there is a binary log. "process" says
    that the end of this process loses nothing, which is so with any setting; with others than these the
    server loses about its last second with its machine. `open` also warns of a ``max_allowed_packet`` that
    cannot take the largest Write, and refuses a table of an engine without transactions.
    """

    def __init__(
        self,
        url: str | None = None,
        *,
        host: str | None = None,
        port: int | None = None,
        user: str | None = None,
        password: str | None = None,
        database: str | None = None,
        table: str = "persistence",
        namespace: str = "default",
        durability: Durability = "power",
        create: bool = True,
        pool_size: int = 4,
        timeout: float = 5.0,
        ssl: SSLContext | bool | None = None,
        ssl_ca: str | None = None,
        client: Any = None,
        **client_options: Any,
    ) -> None:
        check_address("mysql", host, port, user, password, database)
        check_pool_size(pool_size)
        check_seconds("timeout", timeout, least=1)
        self._name = check_identifier(table, "table")
        self._table = f"`{table}`"
        self._first = f"{check_namespace(namespace)}/"
        self._durability = check_durability(durability)
        self.may_lose = False  # found out by `open`
        self._create = create
        self._timeout = timeout
        self._session = _SESSION.format(lock_wait=max(1, int(timeout / 2)))
        self._url = url
        said = {"host": host, "port": port, "user": user, "password": password, "db": database}
        self._connect_options: dict[str, Any] = {
            "charset": "utf8mb4",
            **(_parts(url) if url else {}),
            **{name: value for name, value in said.items() if value is not None},
            "connect_timeout": timeout,
            "client_flag": _MULTI_STATEMENTS,
            "ssl": _tls(ssl, ssl_ca),
            **client_options,
        }
        if secret := self._connect_options.get("password"):
            # Both clients send it as Latin-1, which servers compare with UTF-8.
            self._connect_options["password"] = secret.encode().decode("latin-1")
        self._cursor = Cursor if client is None else _cursor_of(client)
        if client is None and not self._connect_options.get("db"):
            raise ConfigurationError("mysql: name a database: mysql://user:password@host:port/database")
        self._client = client
        self._pool: Any = None
        self._pool_size: int = pool_size if client is None else client.maxsize
        self._configured: WeakSet[Any] = WeakSet()  # connections
        self._max_packet = _PACKET_BYTES
        self._opening = asyncio.Lock()
        self.lanes = min(2, self._pool_size)

    def __repr__(self) -> str:
        return (
            f"mysql_driver({masked_url(self._url)!r}, table={self._name!r})"
            if self._url
            else "mysql_driver()"
        )

    def ddl(self) -> str:
        """Return the statement that creates what this driver needs."""
        return _TABLE.format(table=self._table)

    def view_ddl(self) -> str:
        """Return the statement that creates a view of the data, ``<table>_view``, with all as text.

        A value that is no JSON is NULL there. This driver does not use the view.
        """
        return _VIEW.format(table=self._table, view=f"`{self._name}_view`")

    async def open(self) -> None:
        async with self._opening:
            if self._pool is not None:
                return
            self._slots = asyncio.Semaphore(self._pool_size)
            try:
                self._pool = self._client or await _make_pool(self._pool_size, self._connect_options)
                await self._prepare()
            except TypeError as error:  # an option of the pool that is no such value
                await self.close()
                message = f"mysql: {error}"
                raise ConfigurationError(message) from error
            except BaseException:
                await self.close()
                raise

    async def close(self) -> None:
        pool, self._pool = self._pool, None
        if pool is not None and self._client is None:
            pool.close()
            await pool.wait_closed()

    async def get(self, keys: Sequence[Key]) -> list[Entry | None]:
        if not keys:
            return []
        if len(keys) == 1:
            [(partition, key)] = keys
            p, k = _hex(self._partition(partition)), _hex(key.encode())
            rows = await self._fetch(_GET_ONE.format(table=self._table, p=p, k=k))
            return [Entry(key, *rows[0]) if rows else None]
        names = [(self._partition(key.partition), key.key.encode()) for key in keys]
        if len({k for _, k in names}) == 1:  # such as the records of many
            partitions, k = ",".join(_hex(p) for p, _ in names), _hex(names[0][1])
            rows = await self._fetch(_GET_KEY.format(table=self._table, partitions=partitions, k=k))
            entries = {p: Entry(keys[0].key, v, ver) for p, v, ver in rows}
            return [entries.get(p) for p, _ in names]
        rows = await self._fetch(_GET.format(table=self._table, keys=_keys(names)))
        found = {(p, k): Entry(k.decode(), v, ver) for p, k, v, ver in rows}
        return [found.get(name) for name in names]

    async def scan(
        self, partition: str, start: str, end: str | None, *, limit: int, reverse: bool = False
    ) -> Page:
        p = self._partition(partition)
        parts = {
            "table": self._table,
            "p": _hex(p),
            "range": _range(p, start.encode(), _end(end)),
            "order": "DESC" if reverse else "",
            "limit": limit,
            "beyond": limit + 1,
            "page_bytes": PAGE_BYTES,
        }
        fits = _ONE_FITS if limit < _FEW else _ALL_FIT.format(**parts)
        rows = await self._fetch(_SCAN.format(**parts, fits=fits))
        if all(row[1] is not None for row in rows):
            entries = [Entry(k.decode(), v, ver) for k, v, ver in rows]
            size = sum(len(entry.value) for entry in entries)
            more = len(entries) > limit or size > PAGE_BYTES
            while size > PAGE_BYTES:
                size -= len(entries.pop().value)
            return Page(entries[:limit], more)
        rows = await self._fetch(_SCAN_CUT.format(**parts))
        return Page([Entry(k.decode(), v, ver) for k, v, ver, _ in rows], bool(rows and rows[-1][3]))

    async def commit(self, writes: Sequence[Write]) -> list[bool | None]:
        if not writes:
            return []
        plans = [self._plan(write) for write in writes]
        steps = [step for plan in plans for step in plan]
        if not any(step.held or step.op.expect is not None for step in steps):
            changes = self._changes(steps)
            await self._fetch(";".join(["BEGIN", *changes, "COMMIT"] if len(changes) > 1 else changes))
            return [True] * len(writes)
        if all(step.op.expect == ABSENT for step in steps) and await self._run(
            lambda connection: self._create_all(connection, steps)
        ):
            return [True] * len(writes)
        if len(writes) == 1 and any(isinstance(step.op, Put) for step in steps):
            return [await self._run(lambda connection: self._apply(connection, steps))]
        return await self._run(lambda connection: self._decide(connection, plans))

    async def purge(self, partition: str, start: str, end: str | None) -> None:
        p, first, last = self._partition(partition), start.encode(), _end(end)
        while True:
            within = _range(p, first, last)
            rows = await self._fetch(_PURGE_END.format(table=self._table, range=within, step=_PURGE_STEP))
            step_end = rows[0][0] if rows else last
            await self._fetch(_PURGE.format(table=self._table, range=_range(p, first, step_end)))
            if not rows:
                return
            first = step_end

    async def partitions(self, cursor: str | None, limit: int) -> tuple[list[str], str | None]:
        limit = min(limit, _PAGE_PARTITIONS)
        first, last = _hex(self._partition(cursor or "")), _hex(f"{self._first[:-1]}0".encode())
        rows = await self._fetch(_PARTITIONS.format(table=self._table, first=first, last=last, limit=limit))
        found = [p.decode()[len(self._first) :] for (p,) in rows]
        return found, found[-1] if len(found) == limit else None

    def _partition(self, partition: str) -> bytes:
        return (self._first + partition).encode()

    def _plan(self, write: Write) -> list[_Step]:
        p, alone = self._partition(write.partition), len(write.ops) == 1
        return [_Step((p, op.key.encode()), op, write.version, alone) for op in write.ops]

    async def _create_all(self, connection: Any, steps: Sequence[_Step]) -> bool:
        """Try to insert everything, as if all keys were absent, which they mostly are."""
        try:
            await self._query(connection, _CREATE.format(table=self._table, rows=_rows(steps)))
        except _ERRORS as error:
            if _code(error) != _DUPLICATE:
                raise
            return False  # and nothing is inserted: one statement is whole
        return True

    async def _apply(self, connection: Any, steps: Sequence[_Step]) -> bool:
        """Commit one Write that puts something, in one packet, of which an error stops the rest."""
        expected = [step for step in steps if step.op.expect]
        absent = [_hex(step.name[1]) for step in steps if step.op.expect == ABSENT]
        deletes = [step.name for step in steps if isinstance(step.op, Delete)]
        packet = ["BEGIN", *self._hold(steps)]
        version = "", ""
        if expected:
            those = (
                f"(p = {_hex(p)} AND k = {_hex(k)} AND ver = {op.expect:d})" for (p, k), op, *_ in expected
            )
            packet.append(_EXPECT.format(table=self._table, expected=" OR ".join(those)))
            version = f"IF(@held = {len(expected)}, ", ", NULL)"
        rows = _rows(steps, *version)
        packet.append(_PUT_IF.format(table=self._table, rows=rows, absent=",".join(absent) or "NULL"))
        if deletes:
            packet.append(_DELETE.format(table=self._table, keys=_keys(deletes)))
        try:
            await self._query(connection, ";".join([*packet, "COMMIT"]))
        except _ERRORS as error:
            if _code(error) != _NULL:
                raise
            await self._query(connection, "ROLLBACK")
            return False
        return True

    def _hold(self, steps: Iterable[_Step]) -> list[str]:
        """Return what inserts the keys that must be locked though they may be absent."""
        held = [_Step(step.name, Put(step.op.key, b""), _HELD, True) for step in steps if step.held]
        return [_HOLD.format(table=self._table, rows=_rows(held))] if held else []

    async def _decide(self, connection: Any, plans: Sequence[Sequence[_Step]]) -> list[bool | None]:
        steps = [step for plan in plans for step in plan]
        lock = _LOCK.format(table=self._table, keys=_keys(step.name for step in steps))
        *_, rows = await self._query(connection, ";".join(["BEGIN", *self._hold(steps), lock]))
        found = {(p, k): version for p, k, version in rows}
        outcomes: list[bool | None] = [
            all(step.op.expect in (None, found.get(step.name, ABSENT)) for step in plan) for plan in plans
        ]
        applied = [step for plan, holds in zip(plans, outcomes, strict=True) if holds for step in plan]
        changes = self._changes(applied, [name for name, version in found.items() if version == _HELD])
        await self._query(connection, ";".join([*changes, "COMMIT"]))
        return outcomes

    def _changes(self, steps: Sequence[_Step], drop: Sequence[_Name] = ()) -> list[str]:
        """Return the statements that make the changes of `steps` and delete the rows `drop`."""
        creates = [step for step in steps if isinstance(step.op, Put) and step.op.expect == ABSENT]
        puts = [step for step in steps if isinstance(step.op, Put) and step.op.expect != ABSENT]
        deletes = {*drop, *(step.name for step in steps if isinstance(step.op, Delete))}
        return [
            *([_CREATE.format(table=self._table, rows=_rows(creates))] if creates else []),
            *([_PUT.format(table=self._table, rows=_rows(puts))] if puts else []),
            *([_DELETE.format(table=self._table, keys=_keys(deletes))] if deletes else []),
        ]

    async def _fetch(self, statement: str) -> Sequence[tuple[Any, ...]]:
        return (await self._run(lambda connection: self._query(connection, statement)))[-1]

    async def _query(self, connection: Any, statements: str) -> list[Sequence[tuple[Any, ...]]]:
        """Send `statements` in one packet and return the rows of each."""
        if len(statements) > self._max_packet:
            message = f"mysql: max_allowed_packet={self._max_packet} is too small: {_PACKET_HINT}"
            raise ConfigurationError(message)
        # Not closed: that would read on, on a connection which may be dead.
        cursor = self._cursor(connection)
        await cursor.execute(statements)
        results: list[Sequence[tuple[Any, ...]]] = [await cursor.fetchall()]
        while await cursor.nextset():
            results.append(await cursor.fetchall())
        return results

    async def _run(self, work: Callable[[Any], Awaitable[_T]]) -> _T:
        """Do `work` on a connection, and again while the server reports that it undid it all."""
        pool = self._pool
        if pool is None:
            raise ConfigurationError("the driver is not open")
        deadline, tries = asyncio.get_running_loop().time() + self._timeout, 0
        while True:
            try:
                # The pool wakes nobody when a broken connection comes back to it: wait before it.
                if self._slots.locked():
                    async with asyncio.timeout(self._timeout):
                        await self._slots.acquire()
                else:
                    await self._slots.acquire()  # at once
                try:
                    return await self._on_connection(pool, work)
                finally:
                    self._slots.release()
            except _FAILURES as error:
                if isinstance(error, TimeoutError):
                    await _drop_idle(pool)  # a firewall that forgot this connection has forgotten them, too
                late = asyncio.get_running_loop().time() > deadline
                if late or _code(error) not in _RETRIED:
                    raise unapplied(_translated(error), certain=_code(error) in _UNDONE) from error
            tries += 1
            await asyncio.sleep(random.uniform(0, min(0.002 * 2**tries, _LONGEST_PAUSE)))

    async def _on_connection(self, pool: Any, work: Callable[[Any], Awaitable[_T]]) -> _T:
        async with asyncio.timeout(self._timeout + _GRACE):
            try:
                connection = await pool.acquire()
            except (AttributeError, TypeError, ValueError) as error:  # port=, charset=, an option unknown
                message = f"mysql: {error}"
                raise ConfigurationError(message) from error
            except RuntimeError as error:  # it was closed meanwhile, by its owner if that is another
                message = f"mysql: {error}"
                raise UnavailableError(message) from error
            except _FAILURES as error:
                raise unapplied(_translated(error)) from error
            in_order = False
            try:
                if connection not in self._configured:
                    await self._query(connection, self._session)
                    self._configured.add(connection)
                result = await work(connection)
                in_order = True
            except _ERRORS as error:
                if not _broken(_code(error)):
                    await self._query(connection, "ROLLBACK")
                    in_order = True
                raise
            finally:
                if not in_order:
                    connection.close()
                pool.release(connection)  # not awaited: that would wake those who wait there, and nobody does
        return result

    async def _prepare(self) -> None:
        """Look at the server, warn of what it does not promise, and create the table if it is missing."""
        found: dict[str, str] = dict(await self._fetch(_SETTINGS))
        self._max_packet = int(found["max_allowed_packet"])
        log = found.get("log_bin") == "ON"
        if found.get("read_only") == "ON":
            raise ConfigurationError("mysql: this server is read-only: connect to the primary")
        if log and found.get("binlog_format") == "STATEMENT":
            raise ConfigurationError("mysql: READ COMMITTED needs binlog_format=ROW or MIXED on this server")
        if self._max_packet < _PACKET_BYTES:
            _log.warning("mysql: max_allowed_packet=%d: %s", self._max_packet, _PACKET_HINT)
        for setting in ("innodb_flush_log_at_trx_commit", *(["sync_binlog"] if log else [])):
            if found[setting] != "1":
                self.may_lose = True
                if self._durability == "power":
                    _log.warning("mysql: durability='power' needs %s=1; it is %s", setting, found[setting])
        rows = await self._fetch(_ENGINE.format(name=self._name))
        if not rows:
            await self._create_table()
        elif rows[0][0] in _NO_TRANSACTIONS:
            fix = f"run  ALTER TABLE {self._table} ENGINE=InnoDB"
            message = f"mysql: the table {self._name} is {rows[0][0]}, which has no transactions: {fix}"
            raise ConfigurationError(message)
        await self._fetch(_GET.format(table=self._table, keys=_keys([(b"", b"")])))  # the columns are there

    async def _create_table(self) -> None:
        if not self._create:
            message = (
                f"mysql: there is no table {self._name}, and create=False; somebody must run:\n{self.ddl()}"
            )
            raise ConfigurationError(message)
        try:
            await self._fetch(self.ddl())
        except PersistenceError as error:
            if _code(error.__cause__) not in _FORBIDDEN:
                raise
            message = f"{error}; somebody who has the right must run:\n{self.ddl()}"
            raise ConfigurationError(message) from error.__cause__


mysql_driver = MySQLDriver


def from_url(url: str) -> MySQLDriver:
    """Return the driver of ``mysql://user:password@host/database?table=…&namespace=…``."""
    split = split_url(url, _OPTIONS, others=True)
    return MySQLDriver(split.url, **split.options)


def _parts(url: str) -> dict[str, Any]:
    """Return the URL as options of the client's ``connect``."""
    parts = take_apart(url)
    said = {
        "host": parts.hostname,
        "port": parts.port,
        "user": parts.username and unquote(parts.username),
        "password": parts.password and unquote(parts.password),
        "db": unquote(parts.path[1:]),
    }
    return {**{name: value for name, value in said.items() if value}, **dict(parse_qsl(parts.query))}


def _tls(ssl: SSLContext | bool | None, authorities: str | None) -> SSLContext | None:
    if authorities is None:
        return create_default_context() if ssl is True else ssl or None
    if ssl not in (None, True):
        raise ConfigurationError("mysql: ssl_ca= is for the default context: leave ssl= out, or give True")
    try:
        return create_default_context(cafile=authorities)
    except (OSError, TypeError, ValueError) as error:
        message = f"mysql: ssl_ca={shown(authorities)}: {error}"
        raise ConfigurationError(message) from error


async def _make_pool(size: int, options: dict[str, Any]) -> Any:
    if client_library.__name__ == "asyncmy":
        return await client_library.create_pool(minsize=0, maxsize=size, **options)
    loop = asyncio.get_running_loop()
    connections: Any = client_library.Connection
    pools: Any = client_library.Pool

    class Connection(connections):  # type: ignore[misc]
        _writer = None  # looked for by its __del__, even where it was given options that there are not

        async def _request_authentication(self) -> None:
            # aiomysql would log in in the clear where the server, or whoever is in between, says that it
            # has no TLS, and even tell its password to who asks for it.
            if self._ssl_context and not self.server_capabilities & _TLS:
                raise ConfigurationError("mysql: this server has no TLS, which ssl= asks for")
            await super()._request_authentication()

    class Pool(pools):  # type: ignore[misc]
        async def _fill_free_pool(self, override_min: bool) -> None:
            await super()._fill_free_pool(False)
            if not override_min or self._free or self.size >= self.maxsize:
                return
            self._acquiring += 1
            try:
                connection = Connection(echo=self._echo, loop=loop, **self._conn_kwargs)
                await connection._connect()
                self._free.append(connection)
            finally:
                self._acquiring -= 1

    return Pool(minsize=0, maxsize=size, echo=False, pool_recycle=-1, loop=loop, **options)


async def _drop_idle(pool: Any) -> None:
    with suppress(*_FAILURES):  # such as a pool that is busy connecting: it has none then
        async with asyncio.timeout(_GRACE):
            await pool.clear()


def _cursor_of(pool: Any) -> Any:
    """Return the cursor's class of the library that `pool` is of."""
    for library in map(sys.modules.get, ("asyncmy", "aiomysql")):
        if library is not None and isinstance(pool, library.Pool):
            return library.cursors.Cursor
    raise ConfigurationError("mysql: client must be a pool of asyncmy or aiomysql")


def _hex(data: bytes) -> str:
    return f"x'{data.hex()}'"


def _keys(names: Iterable[_Name]) -> str:
    """Return names for ``(p, k) IN (…)``, sorted, as rows are locked in that order."""
    return ",".join(f"({_hex(p)},{_hex(k)})" for p, k in sorted(names))


def _rows(steps: Iterable[_Step], before: str = "", after: str = "") -> str:
    """Return the rows that Puts store, for ``VALUES``, in the order of their names."""
    return ",".join(
        f"(x'{p.hex()}',x'{k.hex()}',x'{op.value.hex()}',{before}{version:d}{after})"
        for (p, k), op, version, _ in sorted(steps, key=itemgetter(0))
        if isinstance(op, Put)
    )


def _range(p: bytes, first: bytes, last: bytes) -> str:
    return f"p = {_hex(p)} AND k >= {_hex(first)} AND k < {_hex(last)}"


def _end(end: str | None) -> bytes:
    return (_LAST_KEY if end is None else end).encode()


def _code(error: BaseException | None) -> int:
    """Return the number of a server's or client's error, 0 if it has none."""
    code = error.args[0] if isinstance(error, _ERRORS) and error.args else 0
    return code if isinstance(code, int) else 0


def _broken(code: int) -> bool:
    """Tell whether the connection, not only the statement, has come to its end."""
    return code < 1000 or 2000 <= code < 3000 or code in _BROKEN


def _translated(error: Exception) -> PersistenceError:
    code = _code(error)
    if (refused := untrusted(error, "mysql", "ssl_ca=")) is not None:
        return refused
    text = f"mysql: {code} {error.args[-1]}" if code else f"mysql: {str(error) or 'no answer in time'}"
    if code in _CORRUPT:
        return CorruptRecordError(text)
    if code in _NO_CLIENT_PLUGIN or not (_broken(code) or code in _BUSY):
        return ConfigurationError(text)
    return UnavailableError(text)
