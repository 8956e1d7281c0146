"""One table in one SQLite file, one row an entry; the processes of one machine may share the file.

The primary key is (p, k), where p is ``namespace/partition``. Names are ASCII,
so TEXT sorts them as the contract asks. The row ('', 'format') tells the
version of this layout. The file may hold other tables. To look at it:
``SELECT p, k, CAST(v AS TEXT) FROM persistence``.

The file is in WAL mode: reading waits for nobody, writing takes turns, and
SQLite keeps ``-wal`` and ``-shm`` beside it, which belong to it: copy a file in
use with ``VACUUM INTO``, never by itself. It must lie on a local disk, and must
not be moved or removed while it is open. It does not shrink: what `purge` frees
is overwritten with zeros, and used again. In ``-wal`` it may be legible until
the last process closes the file.

One connection writes and one reads, each in a thread of its own, through the
standard library. aiosqlite hops to its thread for every statement; here a call
is a function that runs in the thread, so a `commit` of any Writes is one hop,
one transaction and one fsync.

There are as few statements as can be, because the thread lets go of the
interpreter for each and waits to get it back.

The hop takes several times as long as a short read, which mostly finds its
pages in memory. So a third connection makes those in the event loop's own
thread. It never waits for a lock; when a read has taken 2 ms, because the disk
is slow or the values are large, the reader does it, and all others for a second.
"""

from __future__ import annotations

import asyncio
import os
import random
import sqlite3
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeVar, TypeVarTuple

from persistence.driver import ABSENT, PAGE_BYTES, Delete, Entry, Key, Op, Page, Put, Write
from persistence.drivers._sqlite_thread import ThreadedConnection
from persistence.errors import ConfigurationError
from persistence.options import (
    Durability,
    check_durability,
    check_identifier,
    check_namespace,
    check_seconds,
    flag,
    path_text,
    split_url,
)

__all__ = ["SQLiteDriver", "from_url", "sqlite_driver"]

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

_FORMAT: Final = b"1"
_PAST_ALL_KEYS: Final = "\x7f"

_SQL: Final = {
    # WITHOUT ROWID would keep the values in the tree of the keys: at 1 KB a file three times as large.
    "table": """CREATE TABLE IF NOT EXISTS "{t}" (
        p TEXT NOT NULL, k TEXT NOT NULL, v BLOB NOT NULL, ver INTEGER NOT NULL, PRIMARY KEY (p, k))""",
    "sign": """INSERT INTO "{t}" (p, k, v, ver) VALUES ('', 'format', ?, 1) ON CONFLICT DO NOTHING""",
    "format": """SELECT v FROM "{t}" WHERE p = '' AND k = 'format'""",
    # Cast, as somebody may have written a text or a number there: the core tells what is no value of ours.
    "get": """SELECT k, CAST(v AS BLOB), ver FROM "{t}" WHERE p = ? AND k = ?""",
    "scan": """SELECT k, CAST(v AS BLOB), ver FROM "{t}"
        WHERE p = ? AND k >= ? AND k < ? ORDER BY k LIMIT ?""",
    "scan down": """SELECT k, CAST(v AS BLOB), ver FROM "{t}"
        WHERE p = ? AND k >= ? AND k < ? ORDER BY k DESC LIMIT ?""",
    "create": """INSERT INTO "{t}" (p, k, v, ver) VALUES {rows}""",
    "put": """INSERT INTO "{t}" (p, k, v, ver) VALUES {rows}
        ON CONFLICT (p, k) DO UPDATE SET v = excluded.v, ver = excluded.ver""",
    "delete": """DELETE FROM "{t}" WHERE rowid IN (SELECT t.rowid
        FROM (VALUES {rows}) AS op CROSS JOIN "{t}" AS t ON t.p = op.column1 AND t.k = op.column2)""",
    # In one row, for the same reason.
    "versions": """SELECT group_concat(op.column1 || ' ' || t.ver)
        FROM (VALUES {rows}) AS op CROSS JOIN "{t}" AS t ON t.p = op.column2 AND t.k = op.column3""",
    "purge": """DELETE FROM "{t}" WHERE rowid IN (
        SELECT rowid FROM "{t}" WHERE p = ? AND k >= ? AND k < ? LIMIT 20)""",
    "next partition": """SELECT min(p) FROM "{t}" WHERE p > ? AND p < ?""",
}

_SHORT_READ: Final = 128
"""Entries that are read in the event loop's thread, at the most."""
_SHORT_SECONDS: Final = 0.002
_PAUSE_SECONDS: Final = 1.0
_FETCHED: Final = 8  # rows at a time: each may have a megabyte
_ROWS: Final = 200  # in one statement: with 4 parameters each they are within the limit of any SQLite, 999
_PURGE_STEP: Final = 0.02
"""Seconds that `purge` holds the write lock, and then leaves it to others."""

_creating = threading.Lock()


class _SlowError(Exception):
    """A read in the event loop's thread takes too long."""


class SQLiteDriver:
    """Keep everything in the SQLite file `path`.

    `create` makes a missing file, for its owner's eyes only, and a missing
    table, but no folder. `busy_timeout` is how many seconds a call waits for
    others who write. `durability` "power" is SQLite's ``synchronous=FULL``,
    "process" is NORMAL.
    """

    lanes = 2  # one batch is made while the disk writes the other; with more, fewer would share an fsync

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        namespace: str = "default",
        durability: Durability = "power",
        create: bool = True,
        busy_timeout: float = 5.0,
        table: str = "persistence",
    ) -> None:
        self._namespace = check_namespace(namespace)
        self._durability = check_durability(durability)
        self._table = check_identifier(table, "table")
        text = "" if path == "" else path_text(path)
        if text in ("", ":memory:"):
            message = f"path={text!r}: the data need a file here; memory_driver keeps them in memory"
            raise ConfigurationError(message)
        check_seconds("busy_timeout", busy_timeout, least=0)
        self._path = Path(text)
        self._create = create
        self._busy_timeout = busy_timeout
        self._sql = {name: statement.format(t=table, rows="{rows}") for name, statement in _SQL.items()}
        self._writer = ThreadedConnection(self._path)
        self._reader = ThreadedConnection(self._path)
        self._here: sqlite3.Connection | None = None  # for short reads in the event loop's thread
        self._here_again = 0.0  # not before this time, by the monotonic clock
        self._here_until = 0.0  # and the one under way not after this

    def __repr__(self) -> str:
        return f"sqlite_driver({str(self._path)!r}, namespace={self._namespace!r})"

    def ddl(self) -> str:
        """Return the statements that create what this driver needs."""
        sign = self._sql["sign"].replace("?", f"x'{_FORMAT.hex()}'")
        return f"{self._sql['table']};\n{sign};"

    async def open(self) -> None:
        try:
            await self._writer.open(self._connect)
            await self._writer.run(self._prepare)
            await self._reader.open(self._connect)
            await self._reader.run(self._open_here)
        except BaseException:
            await self.close()
            raise

    async def close(self) -> None:
        here, self._here = self._here, None
        if here is not None:
            here.close()  # at once: only the last one to close has something to do
        await self._reader.close()
        await self._writer.close()

    async def get(self, keys: Sequence[Key]) -> list[Entry | None]:
        if len(keys) <= _SHORT_READ and (found := self._at_once(self._get, keys)) is not None:
            return found
        return await self._reader.run(self._get, keys)

    async def scan(
        self, partition: str, start: str, end: str | None, *, limit: int, reverse: bool = False
    ) -> Page:
        args = partition, start, end, limit, reverse
        if limit <= _SHORT_READ and (page := self._at_once(self._scan, *args)) is not None:
            return page
        return await self._reader.run(self._scan, *args)

    async def commit(self, writes: Sequence[Write]) -> list[bool | None]:
        return await self._writer.run(self._commit, writes)

    async def purge(self, partition: str, start: str, end: str | None) -> None:
        while await self._writer.run(self._purge, partition, start, end):  # noqa: ASYNC110 - it polls nothing
            await asyncio.sleep(_PURGE_STEP)

    async def partitions(self, cursor: str | None, limit: int) -> tuple[list[str], str | None]:
        names = await self._reader.run(self._partitions, cursor or "", limit)
        return names, names[-1] if len(names) == limit else None

    def _at_once(self, function: Callable[[sqlite3.Connection, *Ts], T], *args: *Ts) -> T | None:
        """Read in this thread; None where that is left to the reader."""
        start = time.monotonic()
        if self._here is None or start < self._here_again:
            return None
        self._here_until = start + _SHORT_SECONDS
        result = None
        with suppress(sqlite3.Error, _SlowError):  # the reader waits, or tells what is wrong
            result = function(self._here, *args)
        if (end := time.monotonic()) > self._here_until:
            self._here_again = end + _PAUSE_SECONDS
        return result

    def _check_time(self, db: sqlite3.Connection) -> None:
        if db is self._here and time.monotonic() > self._here_until:
            raise _SlowError

    # What the methods above do, each in the thread of its connection:

    def _get(self, db: sqlite3.Connection, keys: Sequence[Key]) -> list[Entry | None]:
        found: list[Entry | None] = []
        # One statement for all would be no faster; ``(p, k) IN (VALUES …)`` would even read the whole table.
        with db:
            if len(keys) > 1:
                db.execute("BEGIN")  # one snapshot for all
            for partition, key in keys:
                self._check_time(db)
                row = db.execute(self._sql["get"], (self._name(partition), key)).fetchone()
                found.append(None if row is None else Entry._make(row))
        return found

    def _scan(
        self, db: sqlite3.Connection, partition: str, start: str, end: str | None, limit: int, reverse: bool
    ) -> Page:
        entries: list[Entry] = []
        size = 0
        statement = self._sql["scan down" if reverse else "scan"]
        bounds = (self._name(partition), start, _PAST_ALL_KEYS if end is None else end)
        # SQLite looks for rows when they are asked for: a page that its size cuts short reads little further.
        with closing(db.execute(statement, (*bounds, limit + 1))) as rows:
            while found := rows.fetchmany(_FETCHED):
                self._check_time(db)
                entries += map(Entry._make, found)
                size += sum([len(key) + len(value) for key, value, _ in found])
                if size > PAGE_BYTES:
                    while size > PAGE_BYTES:
                        last = entries.pop()
                        size -= len(last.key) + len(last.value)
                    return Page(entries[:limit], True)
        return Page(entries[:limit], len(entries) > limit)

    def _commit(self, db: sqlite3.Connection, writes: Sequence[Write]) -> list[bool | None]:
        ops = [
            _Op(number, self._name(write.partition), op, write.version)
            for number, write in enumerate(writes)
            for op in write.ops
        ]
        # A lone statement is a transaction by itself. And a plain BEGIN would fail, not wait, if
        # another process wrote before its first change.
        if all(isinstance(op.op, Put) and op.op.expect == ABSENT for op in ops):
            with suppress(sqlite3.IntegrityError), db:  # it inserts nothing then: look what is there
                if len(ops) > _ROWS:
                    db.execute("BEGIN IMMEDIATE")
                self._execute(db, "create", _rows_of(ops))
                return [True] * len(writes)
        with db:
            db.execute("BEGIN IMMEDIATE")
            refused = self._refused(db, [op for op in ops if op.op.expect is not None])
            held = [op for op in ops if op.write not in refused]
            self._execute(db, "put", _rows_of(held))
            self._execute(db, "delete", [(op.name, op.op.key) for op in held if isinstance(op.op, Delete)])
        return [number not in refused for number in range(len(writes))]

    def _refused(self, db: sqlite3.Connection, ops: Sequence[_Op]) -> set[int]:
        """Return the numbers of the Writes of which an op expects what is not there."""
        there: dict[int, int] = {}
        for (found,) in self._execute(
            db, "versions", [(place, op.name, op.op.key) for place, op in enumerate(ops)]
        ):
            pairs = (pair.split() for pair in (found or "").split(","))
            there.update((int(place), int(version)) for place, version in filter(None, pairs))
        return {op.write for place, op in enumerate(ops) if there.get(place, ABSENT) != op.op.expect}

    def _execute(self, db: sqlite3.Connection, name: str, rows: Sequence[tuple[Any, ...]]) -> list[Any]:
        """Execute a statement for all rows at once; return what it gives."""
        found: list[Any] = []
        for at in range(0, len(rows), _ROWS):
            part = rows[at : at + _ROWS]
            row = f"({', '.join('?' * len(part[0]))})"
            statement = self._sql[name].replace("{rows}", ", ".join([row] * len(part)))
            found += db.execute(statement, [value for row in part for value in row]).fetchall()
        return found

    def _purge(self, db: sqlite3.Connection, partition: str, start: str, end: str | None) -> bool:
        """Remove what can be removed in the time of one step; tell whether there may be more."""
        bounds = (self._name(partition), start, _PAST_ALL_KEYS if end is None else end)
        with db:
            db.execute("BEGIN IMMEDIATE")
            deadline = time.monotonic() + _PURGE_STEP
            while db.execute(self._sql["purge"], bounds).rowcount:
                if time.monotonic() > deadline:
                    return True
        return False

    def _partitions(self, db: sqlite3.Connection, after: str, limit: int) -> list[str]:
        # Leaps from name to name in the index, however many entries each has. "0" comes right after "/".
        name, end = self._name(after), self._namespace + "0"
        names: list[str] = []
        while len(names) < limit:
            (name,) = db.execute(self._sql["next partition"], (name, end)).fetchone()
            if name is None:
                break
            names.append(name[len(self._namespace) + 1 :])
        return names

    def _name(self, partition: str) -> str:
        return f"{self._namespace}/{partition}"

    # Opening:

    def _connect(self, *, waiting: bool = True) -> sqlite3.Connection:
        try:
            self._path = self._path.absolute()  # from now on the same file, whatever the working folder
            is_folder, is_there = self._path.is_dir(), self._path.exists()
        except OSError as error:  # its folder may not be entered, its name is too long
            message = f"{self._path} cannot be opened: {error.strerror}"
            raise ConfigurationError(message) from error
        if is_folder:
            message = f"{self._path} is a folder; the data need a file in it"
            raise ConfigurationError(message)
        if self._create:
            _create_file(self._path)
        elif not is_there:
            message = f"there is no file {self._path}, and create=False"
            raise ConfigurationError(message)
        # mode=rw: SQLite would create the file with whatever rights the umask leaves.
        uri = f"{self._path.as_uri()}?mode=rw"
        timeout = self._busy_timeout if waiting else 0
        return sqlite3.connect(
            uri, uri=True, timeout=timeout, isolation_level=None, check_same_thread=waiting
        )

    def _open_here(self, _: sqlite3.Connection) -> None:
        if self._here is None:  # one at a time, in the reader's thread: nobody else opens it too
            self._here = self._connect(waiting=False)

    def _prepare(self, db: sqlite3.Connection) -> None:
        """Change nothing in a file that cannot be used; in any other make what is missing."""
        look_up = "SELECT 1 FROM sqlite_master WHERE name = ? COLLATE NOCASE"
        missing = db.execute(look_up, (self._table,)).fetchone() is None
        if missing and not self._create:
            message = f"{self._path} has no table {self._table!r}, and create=False forbids to make it"
            raise ConfigurationError(message)
        if not missing and (found := db.execute(self._sql["format"]).fetchone()) != (_FORMAT,):
            message = (
                f"{self._path}: table {self._table!r} has format {found}; this version knows {_FORMAT!r}"
            )
            raise ConfigurationError(message)
        self._switch_to_wal(db)
        power = self._durability == "power"
        db.execute(f"PRAGMA synchronous = {'FULL' if power else 'NORMAL'}")
        db.execute(f"PRAGMA fullfsync = {power:d}")  # macOS: fsync alone leaves the data in the drive's cache
        db.execute("PRAGMA secure_delete = ON")  # Debian's SQLite does it anyway, most others do not
        if missing:
            with db:
                db.execute("BEGIN IMMEDIATE")
                db.execute(self._sql["table"])
                db.execute(self._sql["sign"], (_FORMAT,))

    def _switch_to_wal(self, db: sqlite3.Connection) -> None:
        # Alone of all statements, this one may fail at once when another process is about to do the same.
        deadline = time.monotonic() + self._busy_timeout
        while True:
            try:
                (mode,) = db.execute("PRAGMA journal_mode = WAL").fetchone()
                break
            except sqlite3.OperationalError as error:
                if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                    raise
            time.sleep(random.uniform(0.001, 0.01))
        if mode != "wal":
            message = f"{self._path} cannot be in WAL mode where it lies: it needs a local disk"
            raise ConfigurationError(message)


sqlite_driver = SQLiteDriver


def from_url(url: str) -> SQLiteDriver:
    """Return the driver of ``sqlite:///relative/path?…`` or ``sqlite:////absolute/path?…``."""
    split = split_url(
        url, {"namespace": str, "durability": str, "create": flag, "busy_timeout": float, "table": str}
    )
    if split.parts.netloc or split.parts.fragment:
        message = "sqlite:// URL: write sqlite:///relative/path or sqlite:////absolute/path, and %23 for '#'"
        raise ConfigurationError(message)
    return SQLiteDriver(split.path, **split.options)


class _Op(NamedTuple):
    write: int  # the number of its Write
    name: str
    op: Op
    version: int


def _rows_of(ops: Sequence[_Op]) -> list[tuple[str, str, bytes, int]]:
    """Return the rows that puts leave behind."""
    return [(op.name, op.op.key, op.op.value, op.version) for op in ops if isinstance(op.op, Put)]


def _create_file(path: Path) -> None:
    """Make an empty file that only its owner may read; SQLite gives the files beside it the same rights."""
    try:
        # Closing a file drops every lock that this process has on it (POSIX): nobody may take one in between.
        with _creating:
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    except FileExistsError:
        pass
    except FileNotFoundError as error:
        message = f"{path} cannot be created: there is no folder {path.parent}"
        raise ConfigurationError(message) from error
    except (OSError, ValueError) as error:
        message = f"{path} cannot be created: {error}"
        raise ConfigurationError(message) from error
