"""One table: ``p`` partition, ``k`` key, ``v`` value, ``ver`` version; primary key ``(p, k)``.

Names are ``bytea``, which sorts as bytes in every locale; ``p`` is ``namespace/partition``. Values are
``bytea`` too: jsonb holds neither NUL nor any bytes. `PostgreSQLDriver.view_ddl` shows all three legibly.

Every call is one statement in autocommit, so one round trip (two with ``statement_cache_size=0``); a `commit`
of several creates takes a second one if one of the keys is there, which the server's log shows as an error.
The only transaction is that of a Write which deletes, beside other ops, a key that is not there: 5 round
trips.
What would surprise:

* A `commit` first locks the rows it names, in the order of their keys, then decides write by write, then
  changes rows, all in one statement and on one snapshot (`_COMMIT`). A row that somebody inserts meanwhile
  is in the unique index, though not in the snapshot: a create that runs into one divides by zero, which
  undoes the whole statement, and it is sent anew.
* Connections are the driver's own, not a pool of asyncpg, which asks the server to reset the session after
  each use: that doubled the time of a `get`.
* All statements use plans made once a connection (``plan_cache_mode``), with the index whatever the
  statistics say; planning took longer than the work.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeAlias, TypeVar
from urllib.parse import parse_qsl

from persistence.driver import ABSENT, PAGE_BYTES, Delete, Entry, Key, Page, Put, Write
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
    check_files,
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
    import asyncpg
except ImportError as error:
    raise missing_client("postgresql", "asyncpg") from error

__all__ = ["PostgreSQLDriver", "from_url", "postgresql_driver"]

_GET_ONE = "SELECT p, v, ver FROM {table} WHERE p = $1 AND k = $2"
_GET_KEY = "SELECT p, v, ver FROM {table} WHERE p = ANY ($1::bytea[]) AND k = $2"
_GET = """
SELECT n, v, ver
FROM unnest($1::bytea[], $2::bytea[]) WITH ORDINALITY AS wanted(p, k, n) JOIN {table} USING (p, k)
"""

# One entry more than the page may have tells whether there are more, and so does one that comes without its
# value. That a value is too long for the page is known without reading it.
_SCAN = """
SELECT k, CASE WHEN sofar <= {page_bytes} THEN v END, ver FROM (
  SELECT k, v, ver, sum(octet_length(v)) OVER (ORDER BY k {order} ROWS UNBOUNDED PRECEDING) AS sofar
  FROM (
    SELECT k, v, ver FROM {table} WHERE p = $1 AND k >= $2 AND k < $3 ORDER BY k {order} LIMIT $4
  ) AS range
) AS page WHERE sofar - octet_length(v) <= {page_bytes} ORDER BY k {order}
"""

_CREATE_ONE = "INSERT INTO {table} (p, k, v, ver) VALUES ($1, $2, $3, $4) ON CONFLICT DO NOTHING"

_CREATE = """
INSERT INTO {table} (p, k, v, ver)
SELECT p, k, v, ver FROM unnest($1::bytea[], $2::bytea[], $3::bytea[], $4::bigint[]) AS op(p, k, v, ver)
ORDER BY p, k
"""
_CREATE_ABSENT = f"{_CREATE}ON CONFLICT DO NOTHING RETURNING p"

# An op: the number of its write, its key, the new value, the version to expect (NULL any, 0 absent, -1 any
# but present), the version it leaves behind (NULL the same, 0 absent). A write is refused while more of its
# ops must find a row than do, or if one finds a row that must be absent.
_COMMIT = """
WITH op AS (
  SELECT * FROM unnest($1::int[], $2::bytea[], $3::bytea[], $4::bytea[], $5::bigint[], $6::bigint[])
    AS op(w, p, k, v, expect, ver)
), held AS MATERIALIZED (
  SELECT op.w, op.expect, t.ver FROM op JOIN {table} AS t USING (p, k) ORDER BY t.p, t.k FOR UPDATE OF t
), refused AS MATERIALIZED (
  SELECT w FROM (
    SELECT w, 1 AS due FROM op WHERE expect <> 0
    UNION ALL
    SELECT w, CASE expect WHEN 0 THEN 1 ELSE -1 END FROM held WHERE expect IN (0, -1, ver)
  ) AS condition GROUP BY w HAVING sum(due) > 0
), gone AS (
  DELETE FROM {table} AS t USING op
  WHERE t.p = op.p AND t.k = op.k AND op.ver = 0 AND op.w NOT IN (SELECT w FROM refused)
), due AS (
  SELECT p, k, v, ver FROM op WHERE ver > 0 AND w NOT IN (SELECT w FROM refused)
), stored AS (
  INSERT INTO {table} AS t (p, k, v, ver) SELECT p, k, v, ver FROM due ORDER BY p, k
  ON CONFLICT (p, k) DO UPDATE SET v = excluded.v, ver = excluded.ver
    WHERE (excluded.p, excluded.k) NOT IN (SELECT p, k FROM op WHERE expect = 0)
  RETURNING 1
)
SELECT ARRAY(SELECT w FROM refused)
WHERE 1 / ((SELECT count(*) FROM stored) = (SELECT count(*) FROM due))::int = 1
"""

# Locks keys ($3) that may be absent: they are there afterwards, for this transaction. It first locks, in
# order as `_COMMIT` does, what is there of all keys of the Write ($2): else the two would deadlock.
_HOLD = """
WITH held AS MATERIALIZED (
  SELECT t.k FROM unnest($2::bytea[]) AS op(k) JOIN {table} AS t ON t.p = $1 AND t.k = op.k
  ORDER BY t.k FOR UPDATE OF t
)
INSERT INTO {table} AS t (p, k, v, ver)
SELECT $1, k, '', 1 FROM unnest($3::bytea[]) AS op(k) WHERE (SELECT count(*) FROM held) >= 0 ORDER BY k
ON CONFLICT (p, k) DO UPDATE SET ver = t.ver
"""

_PURGE = """
WITH step AS MATERIALIZED (SELECT k FROM {table} WHERE p = $1 AND k >= $2 AND k < $3 ORDER BY k LIMIT $4),
  gone AS (DELETE FROM {table} WHERE p = $1 AND k = ANY (ARRAY(SELECT k FROM step)))
SELECT k FROM step ORDER BY k OFFSET $4 - 1
"""

# From one partition to the next by the index, however many entries lie between them.
_PARTITIONS = """
WITH RECURSIVE found(p, n) AS (
  (SELECT p, 1 FROM {table} WHERE p > $1 AND p < $2 ORDER BY p LIMIT 1)
  UNION ALL
  SELECT (SELECT t.p FROM {table} AS t WHERE t.p > found.p AND t.p < $2 ORDER BY t.p LIMIT 1), n + 1
  FROM found WHERE p IS NOT NULL AND n < $3
)
SELECT p FROM found WHERE p IS NOT NULL
"""

_TABLE = """\
CREATE TABLE IF NOT EXISTS {table} (
  p bytea NOT NULL,
  k bytea NOT NULL,
  v bytea NOT NULL,
  ver bigint NOT NULL,
  PRIMARY KEY (p, k)
);
"""

# The function is there because no cast of SQL forgives: a value may be no UTF-8, no JSON, or hold \\u0000.
_VIEW = """\
CREATE OR REPLACE FUNCTION {function}(v bytea) RETURNS jsonb LANGUAGE plpgsql IMMUTABLE STRICT AS $$
BEGIN
  RETURN convert_from(v, 'UTF8')::jsonb;
EXCEPTION WHEN others THEN
  RETURN NULL;
END $$;
CREATE OR REPLACE VIEW {view} AS
SELECT split_part(name, '/', 1) AS namespace, substr(name, strpos(name, '/') + 1) AS partition,
  convert_from(k, 'UTF8') AS key, {function}(v) AS value, octet_length(v) AS bytes, ver AS version
FROM (SELECT convert_from(p, 'UTF8') AS name, k, v, ver FROM {table}) AS entry;
"""

_FOUND = """
SELECT to_regnamespace($1) IS NOT NULL AS schema, to_regclass($2) IS NOT NULL AS table,
  current_setting('synchronous_commit') AS synchronous_commit, current_setting('fsync') AS fsync,
  current_setting('full_page_writes') AS full_page_writes, pg_is_in_recovery() AS standby,
  EXISTS (SELECT FROM pg_stat_replication) AS followed, pg_backend_pid() AS pid
"""
# Nothing is set where a pooler is in between, whose process is not the one that answers: others share it.
_SESSION = """
SELECT set_config(name, value, false) FROM (VALUES
  ('statement_timeout', '{milliseconds}'), ('plan_cache_mode', 'force_generic_plan'), ('jit', 'off'),
  ('enable_seqscan', 'off'), ('enable_hashjoin', 'off'), ('enable_mergejoin', 'off'),
  ('synchronous_commit', '{commit}')
) AS wanted(name, value)
WHERE pg_backend_pid() = {pid} AND (name <> 'synchronous_commit' OR 'off' IN (value, current_setting(name)))
"""
_CREATING = 0x70657273  # any number, the same in all processes

_ONE = "INSERT 0 1"
_PRESENT = -1
_LAST_KEY = "\x7f"
_PURGE_STEP = 250
_LONGEST_PAUSE = 0.1  # seconds between two tries
_GRACE = 1.0  # seconds after which the server should have ended a statement by itself
_FAILURES = (
    asyncpg.PostgresError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,  # what asyncpg makes of a connection that is lost at a bad moment
    OSError,
)
_RETRIED = (asyncpg.DeadlockDetectedError, asyncpg.SerializationError, asyncpg.DivisionByZeroError)
_DOWN = (
    asyncpg.PostgresConnectionError,
    asyncpg.OperatorInterventionError,  # shutdown, crash, statement_timeout
    asyncpg.InsufficientResourcesError,
    asyncpg.LockNotAvailableError,  # lock_timeout
    asyncpg.ReadOnlySQLTransactionError,  # a primary that has become a standby
    asyncpg.IdleInTransactionSessionTimeoutError,
    *_RETRIED,
)
_UNDONE = (  # what the server says instead of doing it
    asyncpg.QueryCanceledError,  # statement_timeout
    asyncpg.InsufficientResourcesError,
    asyncpg.LockNotAvailableError,
    asyncpg.ReadOnlySQLTransactionError,
    *_RETRIED,
)
_FILES = ("sslrootcert", "sslcert", "sslkey", "sslcrl")
_OPTIONS: dict[str, Callable[[str], Any]] = {
    "namespace": str,
    "durability": str,
    "create": flag,
    "schema": str,
    "table": str,
    "pool_size": int,
    "timeout": float,
    "statement_cache_size": int,
}
_log = logging.getLogger("persistence")

_T = TypeVar("_T")
_Client: TypeAlias = "asyncpg.Connection | asyncpg.Pool"


class _Pool:
    """Connections that are opened when needed, thrown away when broken, and used as they come back.

    It has what is used of ``asyncpg.Pool``. With `given` it lends that one connection, and makes none.
    """

    def __init__(
        self,
        size: int,
        connect: Callable[[], Awaitable[asyncpg.Connection]],
        given: asyncpg.Connection | None,
    ) -> None:
        self._slots = asyncio.Semaphore(size)
        self._connect = connect
        self._idle = [] if given is None else [given]

    async def acquire(self, *, timeout: float) -> asyncpg.Connection:
        if self._slots.locked():
            async with asyncio.timeout(timeout):
                await self._slots.acquire()
        else:
            await self._slots.acquire()  # at once
        while self._idle:
            connection = self._idle.pop()
            if not connection.is_closed():
                return connection
        try:
            return await self._connect()
        except BaseException:
            self._slots.release()
            raise

    async def release(self, connection: asyncpg.Connection) -> None:
        self._slots.release()
        if not connection.is_closed():
            self._idle.append(connection)

    def drop_idle(self) -> None:
        while self._idle:
            self._idle.pop().terminate()

    async def close(self) -> None:
        goodbyes = (connection.close(timeout=_GRACE) for connection in self._idle)
        await asyncio.gather(*goodbyes, return_exceptions=True)  # the server may be gone


class PostgreSQLDriver:
    """Keep everything in one table of a PostgreSQL database (12 or later).

    `url` is ``postgresql://user:password@host:port/database``, with asyncpg's own options, such as
    ``sslmode=verify-full`` or ``target_session_attrs=primary``, in its query; `host`, `port`, `user`,
    `password` and `database` go before what it says, and the variables PGHOST, PGUSER, … fill the gaps.
    Further options, such as ``ssl=…``, go to ``asyncpg.connect`` as they are.

    `client` is used instead where given, and not closed: an ``asyncpg.Pool``, which costs the round trip of
    its reset at each call, or an ``asyncpg.Connection``, one call at a time. Its sessions stay as they are.

    `schema` and `table` name the table. `create` allows to create them where they are missing; with False, or
    without the right, `open` tells the statements to run (`ddl`). `pool_size` is how many connections there
    may be. `timeout` is how many seconds the server may work on a statement, waiting for locks included, and
    how long to wait for a connection.

    `durability` is asked for in each session. "power": ``synchronous_commit`` is on where the server's
    setting is off, and a commit is answered when it is on the server's disk; `open` warns where ``fsync`` or
    ``full_page_writes`` is off. "process": it is off, and a commit is safe from the end of this process, but
    the last moment (up to three times ``wal_writer_delay``, 0.6 s) is lost when the server or its machine
    fails. With a `client`, with ``statement_cache_size=0``, and behind a pooler, sessions are not touched:
    "process" then keeps what "power" does, and `open` warns where ``synchronous_commit`` is off.

    Behind PgBouncer, session pooling works where each process gets `pool_size` server connections,
    transaction pooling with ``statement_cache_size=0``; `open` tells. Statement pooling cannot work, and
    `open` refuses it.
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
        schema: str = "public",
        table: str = "persistence",
        namespace: str = "default",
        durability: Durability = "power",
        create: bool = True,
        pool_size: int = 4,
        timeout: float = 5.0,
        statement_cache_size: int = 100,
        client: _Client | None = None,
        **client_options: Any,
    ) -> None:
        check_address("postgresql", host, port, user, password, database)
        check_pool_size(pool_size)
        check_seconds("timeout", timeout)
        if type(statement_cache_size) is not int or statement_cache_size < 0:
            message = f"statement_cache_size={shown(statement_cache_size)}: use a whole number from 0 on"
            raise ConfigurationError(message)
        if url is not None:
            _check_verifying(url, client_options.get("ssl"))
        if not isinstance(client, asyncpg.Pool | asyncpg.Connection | None):
            raise ConfigurationError("postgresql: client must be an asyncpg.Pool or an asyncpg.Connection")
        self._schema = check_identifier(schema, "schema")
        self._table = check_identifier(table, "table")
        self._first = f"{check_namespace(namespace)}/"
        self._durability = check_durability(durability)
        self.may_lose = False  # found out by `open`
        self._create = create
        self._client = client
        self._pool_size = 1 if isinstance(client, asyncpg.Connection) else pool_size
        self._timeout = timeout
        self._url = url
        self._connect_options: dict[str, Any] = {
            "dsn": url,
            "host": host,
            "port": port,
            "user": user,
            "password": password,
            "database": database,
            "timeout": timeout,
            "statement_cache_size": statement_cache_size,
            **client_options,
        }
        own = client is None and statement_cache_size > 0
        commit = "on" if self._durability == "power" else "off"
        self._settings = {"milliseconds": int(timeout * 1000), "commit": commit} if own else None
        self._pool: _Pool | asyncpg.Pool | None = None
        self._in_doubt = False  # a call on the connection passed as client did not come to its end
        self._opening = asyncio.Lock()
        self.lanes = min(2, self._pool_size)

        names = {
            "table": f'"{schema}"."{table}"',
            "view": f'"{schema}"."{table}_view"',
            "function": f'"{schema}"."{table}_json"',
        }
        self._ddl = (f'CREATE SCHEMA IF NOT EXISTS "{schema}";\n', _TABLE.format(**names))
        self._view = _VIEW.format(**names)
        self._get_one = _GET_ONE.format(**names)
        self._get_key = _GET_KEY.format(**names)
        self._get = _GET.format(**names)
        self._scan = _SCAN.format(**names, order="", page_bytes=PAGE_BYTES)
        self._scan_back = _SCAN.format(**names, order="DESC", page_bytes=PAGE_BYTES)
        self._insert_one = _CREATE_ONE.format(**names)
        self._insert = _CREATE.format(**names)
        self._insert_absent = _CREATE_ABSENT.format(**names)
        self._commit = _COMMIT.format(**names)
        self._hold = _HOLD.format(**names)
        self._purge = _PURGE.format(**names)
        self._partitions = _PARTITIONS.format(**names)

    def __repr__(self) -> str:
        place = f"{masked_url(self._url)!r}, " if self._url else ""
        return f"postgresql_driver({place}schema={self._schema!r}, table={self._table!r})"

    def ddl(self) -> str:
        """Return the statements that create what this driver needs."""
        return self._ddl[1] if self._schema == "public" else "".join(self._ddl)

    def view_ddl(self) -> str:
        """Return the statements that create a view of the data, ``<table>_view``, with values as jsonb.

        A value that is no JSON, or that jsonb cannot hold, is NULL there. This driver does not use the view.
        """
        return self._view

    async def open(self) -> None:
        async with self._opening:
            if self._pool is not None:
                return
            await check_files("postgresql", self._url, {}, _FILES)
            if self._client is None or isinstance(self._client, asyncpg.Connection):
                self._pool = _Pool(self._pool_size, self._connect, self._client)
            else:
                self._pool = self._client
            try:
                await self._prepare()
            except BaseException:
                await self.close()
                raise

    async def close(self) -> None:
        pool, self._pool = self._pool, None
        if pool is not None and self._client is None:
            await pool.close()

    async def get(self, keys: Sequence[Key]) -> list[Entry | None]:
        p, k = [self._name(key.partition) for key in keys], [key.key for key in keys]
        if len({*k}) == 1:  # such as the records of many
            one, key = len(p) == 1, k[0].encode()
            statement, names = (self._get_one, p[0]) if one else (self._get_key, p)
            rows = await self._fetch(statement, names, key)
            entries = {name: Entry(k[0], value, version) for name, value, version in rows}
            return [entries.get(name) for name in p]
        found: list[Entry | None] = [None] * len(keys)
        for n, value, version in await self._fetch(self._get, p, [key.encode() for key in k]):
            found[n - 1] = Entry(keys[n - 1].key, value, version)
        return found

    async def scan(
        self, partition: str, start: str, end: str | None, *, limit: int, reverse: bool = False
    ) -> Page:
        statement = self._scan_back if reverse else self._scan
        rows = await self._fetch(statement, self._name(partition), start.encode(), _end(end), limit + 1)
        more = bool(rows) and (len(rows) > limit or rows[-1][1] is None)
        if more:
            rows.pop()
        return Page([Entry(key.decode(), value, version) for key, value, version in rows], more)

    async def commit(self, writes: Sequence[Write]) -> list[bool | None]:
        if not writes:
            return []
        names = [self._name(write.partition) for write in writes]
        creates = [(op.key.encode(), op.value) for write in writes if (op := _lone_create(write)) is not None]
        if len(creates) == len(writes) == 1:
            row = (names[0], *creates[0], writes[0].version)
            return [await self._run(lambda connection: connection.execute(self._insert_one, *row)) == _ONE]
        if len(creates) == len(writes):
            versions = [write.version for write in writes]
            columns = [names, *([*column] for column in zip(*creates, strict=True)), versions]
            created = await self._run(lambda connection: self._create_all(connection, columns))
            return [name in created for name in names]
        columns = _columns(names, writes)
        refused = set(await self._run(lambda connection: self._apply(connection, columns)))
        outcomes: list[bool | None] = [number not in refused for number in range(len(writes))]
        for number in refused:
            if _PRESENT in _expected(writes[number]):
                try:
                    outcomes[number] = await self._apply_holding(names[number], writes[number])
                except UnavailableError as error:
                    error.unapplied = False  # others of this call were sent
                    raise
        return outcomes

    async def purge(self, partition: str, start: str, end: str | None) -> None:
        name, first, last = self._name(partition), start.encode(), _end(end)
        # Each step starts where the one before ended: what that deleted is still in the index for a while.
        while rows := await self._fetch(self._purge, name, first, last, _PURGE_STEP):
            first = rows[0]["k"]

    async def partitions(self, cursor: str | None, limit: int) -> tuple[list[str], str | None]:
        first, last = self._name(cursor or ""), f"{self._first[:-1]}0".encode()
        rows = await self._fetch(self._partitions, first, last, limit)
        found = [row["p"].decode()[len(self._first) :] for row in rows]
        return found, found[-1] if len(found) == limit else None

    def _name(self, partition: str) -> bytes:
        return (self._first + partition).encode()

    async def _create_all(self, connection: Any, columns: Sequence[list[Any]]) -> set[bytes]:
        """Create as if all keys were absent, which they mostly are; return the partitions that succeed."""
        try:
            await connection.execute(self._insert, *columns)
        except asyncpg.UniqueViolationError:  # and nothing is inserted: one statement is whole
            return {row["p"] for row in await connection.fetch(self._insert_absent, *columns)}
        return {*columns[0]}

    async def _apply(self, connection: Any, columns: Sequence[list[Any]]) -> list[int]:
        refused: list[int] = await connection.fetchval(self._commit, *columns)
        return refused

    async def _apply_holding(self, name: bytes, write: Write) -> bool:
        """Apply a Write that deletes keys which may be absent.

        The other Writes lock every key they name: by its row, or by inserting it. A key that is absent and
        shall stay so has neither, and two Writes that cross there would each be half done.
        """
        keys = [op.key.encode() for op in write.ops]
        # Those it puts as well: else they would be inserted after the ones that it deletes, out of order.
        held = [op.key.encode() for op in write.ops if op.expect is None]

        async def work(connection: Any) -> bool:
            transaction = connection.transaction()
            await transaction.start()
            try:
                await connection.execute(self._hold, name, keys, held)
                refused = await self._apply(connection, _columns([name], [write]))
            except asyncpg.PostgresError:
                if not connection.is_closed():  # else what asyncpg says of the rollback hides why
                    await transaction.rollback()
                raise
            await (transaction.rollback() if refused else transaction.commit())
            return not refused

        return await self._run(work)

    async def _fetch(self, statement: str, *arguments: Any) -> list[Any]:
        return await self._run(lambda connection: connection.fetch(statement, *arguments))

    async def _run(self, work: Callable[[Any], Awaitable[_T]]) -> _T:
        """Do `work` on a connection, and again while the server reports that it undid it all."""
        pool = self._pool
        if pool is None:
            raise ConfigurationError("the driver is not open")
        deadline, tries = asyncio.get_running_loop().time() + self._timeout, 0
        while True:
            connection = None
            try:
                connection = await pool.acquire(timeout=self._timeout)
                try:
                    async with asyncio.timeout(self._timeout + _GRACE):
                        if self._in_doubt:  # a transaction of ours may be open there
                            await connection.execute("ROLLBACK")
                            self._in_doubt = False
                        return await work(connection)
                except asyncpg.ReadOnlySQLTransactionError:  # a primary no longer: ask for the way again
                    if connection is not self._client:
                        connection.terminate()
                    raise
                except asyncpg.PostgresError:
                    raise  # an answer of the server: the connection is in order
                except BaseException as error:
                    if connection is self._client:
                        self._in_doubt = True
                    else:
                        connection.terminate()
                        if isinstance(error, TimeoutError) and isinstance(pool, _Pool):
                            pool.drop_idle()  # a firewall that forgot this one has forgotten them, too
                    raise
                finally:
                    await pool.release(connection)
            except _FAILURES as error:
                late = asyncio.get_running_loop().time() > deadline
                if late or not isinstance(error, _RETRIED):
                    undone = connection is None or isinstance(error, _UNDONE)
                    raise unapplied(self._translated(error), certain=undone) from error
            tries += 1
            await asyncio.sleep(random.uniform(0, min(0.002 * 2**tries, _LONGEST_PAUSE)))

    async def _connect(self) -> asyncpg.Connection:
        if isinstance(self._client, asyncpg.Connection):
            raise UnavailableError("postgresql: the connection passed as client is closed")
        try:
            connection = await asyncpg.connect(**self._connect_options)
        except (TypeError, ValueError) as error:
            if isinstance(error, OSError):  # a certificate that is not accepted
                raise
            message = f"postgresql: {error}"
            raise ConfigurationError(message) from error
        try:
            if self._settings is not None:
                # A pooler answers the login by itself, and the first statement when a session is free.
                async with asyncio.timeout(self._timeout + _GRACE):
                    pid = connection.get_server_pid()
                    await connection.execute(_SESSION.format(**self._settings, pid=pid))
        except BaseException:
            connection.terminate()
            raise
        return connection

    async def _prepare(self) -> None:
        """Look at the server, warn of what it does not promise, and create the table if it is missing."""

        async def look(connection: Any) -> Any:
            return connection.get_server_pid(), await connection.fetchrow(
                _FOUND, f'"{self._schema}"', f'"{self._schema}"."{self._table}"'
            )

        pid, found = await self._run(look)
        if found["standby"]:
            raise ConfigurationError(
                "postgresql: this server is a standby and cannot write: connect to the primary,"
                " for one of several hosts with target_session_attrs=primary"
            )
        if pid != found["pid"]:
            await self._check_pooler()
        # With its machine, or by failing over to a standby that lags behind.
        self.may_lose = found["followed"] or "off" in (
            found["fsync"],
            found["full_page_writes"],
            found["synchronous_commit"],
        )
        if self._durability == "power":
            for setting in ("fsync", "full_page_writes", "synchronous_commit"):
                if found[setting] == "off":
                    hint = (
                        "ALTER ROLE … SET synchronous_commit = on" if setting[0] == "s" else f"{setting} = on"
                    )
                    _log.warning("postgresql: durability='power' needs %s on this server", hint)
        if not found["table"]:
            await self._create_table(found["schema"])
        await self._fetch(self._get, [], [])  # the columns are there, and the right to read

    async def _check_pooler(self) -> None:
        async def transaction(connection: Any) -> None:
            async with connection.transaction():
                await connection.fetchval("SELECT 1")

        try:
            await self._run(transaction)
        except UnavailableError as error:
            lost = error.__cause__  # and why is what it stems from
            if lost is None or not isinstance(lost.__cause__, asyncpg.ProtocolViolationError):
                raise
            raise ConfigurationError(
                "postgresql: the pooler in between refuses transactions: let it pool sessions or transactions"
            ) from error
        if self._settings is not None:
            _log.warning(
                "postgresql: a pooler is in between: unless it pools sessions, use statement_cache_size=0"
            )

    async def _create_table(self, schema_exists: bool) -> None:
        if not self._create:
            missing = f"there is no table {self._schema}.{self._table}, and create=False"
            message = f"postgresql: {missing}; somebody must run:\n{self.ddl()}"
            raise ConfigurationError(message)
        # IF NOT EXISTS fails when two do it at once, and CREATE SCHEMA wants a right even if there is one.
        schema = "" if schema_exists else self._ddl[0]
        # The table is to outlive a crash whatever `durability` says.
        begin = f"SELECT set_config('synchronous_commit', 'on', true), pg_advisory_xact_lock({_CREATING});"
        statements = f"{begin}\n{schema}{self._ddl[1]}"
        try:
            await self._run(lambda connection: connection.execute(statements))
        except PersistenceError as error:
            if not isinstance(error.__cause__, asyncpg.InsufficientPrivilegeError):
                raise
            message = f"{error}; somebody who has the right must run:\n{self.ddl()}"
            raise ConfigurationError(message) from error.__cause__

    def _translated(self, error: Exception) -> PersistenceError:
        if (refused := untrusted(error, "postgresql", "sslrootcert=")) is not None:
            return refused
        # The text alone: a server's error also has a detail, which may show what is stored.
        said = error.args[0] if isinstance(error, asyncpg.PostgresError) else error
        text = f"postgresql: {str(said) or 'no answer in time'}"
        if isinstance(error, (asyncpg.DataCorruptedError, asyncpg.IndexCorruptedError)):
            return CorruptRecordError(text)
        if isinstance(error, (asyncpg.InvalidSQLStatementNameError, asyncpg.DuplicatePreparedStatementError)):
            return ConfigurationError(f"{text}: behind a transaction pooler use statement_cache_size=0")
        if isinstance(error, _DOWN) or not isinstance(error, asyncpg.PostgresError):
            return UnavailableError(text)
        return ConfigurationError(text)


postgresql_driver = PostgreSQLDriver


def from_url(url: str) -> PostgreSQLDriver:
    """Return the driver of ``postgresql://user:password@host/database?table=…&namespace=…``."""
    split = split_url(url, _OPTIONS, others=True)
    return PostgreSQLDriver(split.url, **split.options)


def _check_verifying(url: str, mode: Any) -> None:
    """Refuse an authority that nobody would ask: asyncpg leaves it out unless `ssl` or `sslmode` verifies."""
    options = dict(parse_qsl(take_apart(url).query))
    if mode is None:  # `ssl` wins over the URL
        mode = options.get("sslmode") or os.environ.get("PGSSLMODE", "prefer")
    if "sslrootcert" in options and mode in (False, "disable", "allow", "prefer"):
        message = f"postgresql: with sslmode={mode} sslrootcert= is not looked at: add sslmode=verify-full"
        raise ConfigurationError(message)


def _end(end: str | None) -> bytes:
    return (_LAST_KEY if end is None else end).encode()


def _lone_create(write: Write) -> Put | None:
    if len(write.ops) != 1:
        return None
    op = write.ops[0]
    return op if isinstance(op, Put) and op.expect == ABSENT else None


def _expected(write: Write) -> list[int | None]:
    """Return what `_COMMIT` shall expect of each op: of a Delete among others that the key can be locked."""
    return [
        _PRESENT if isinstance(op, Delete) and op.expect is None and len(write.ops) > 1 else op.expect
        for op in write.ops
    ]


def _columns(names: Sequence[bytes], writes: Sequence[Write]) -> list[list[Any]]:
    """Return the parameters of `_COMMIT`."""
    rows: list[tuple[Any, ...]] = []
    for number, (name, write) in enumerate(zip(names, writes, strict=True)):
        for op, expect in zip(write.ops, _expected(write), strict=True):
            value = op.value if isinstance(op, Put) else None
            left = write.version if isinstance(op, Put) else ABSENT if isinstance(op, Delete) else None
            rows.append((number, name, op.key.encode(), value, expect, left))
    return [[*column] for column in zip(*rows, strict=True)]
