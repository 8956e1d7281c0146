"""An SQLite connection in a thread of its own, and what SQLite's errors mean."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Final, TypeAlias, TypeVar, TypeVarTuple

from persistence.errors import ConfigurationError, CorruptRecordError, PersistenceError, UnavailableError
from persistence.options import unapplied

__all__ = ["ThreadedConnection"]

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

# By primary result code. Any other (cannot open, read only, no such column, …) is the set-up's fault.
_KINDS: Final[dict[int, type[PersistenceError]]] = {
    sqlite3.SQLITE_BUSY: UnavailableError,
    sqlite3.SQLITE_LOCKED: UnavailableError,
    sqlite3.SQLITE_PROTOCOL: UnavailableError,  # lost the race for the WAL's locks many times over
    sqlite3.SQLITE_FULL: UnavailableError,
    sqlite3.SQLITE_IOERR: UnavailableError,
    sqlite3.SQLITE_NOMEM: UnavailableError,
    sqlite3.SQLITE_CORRUPT: CorruptRecordError,
    sqlite3.SQLITE_NOTADB: CorruptRecordError,
}

_LOCKED: Final = (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)
"""A transaction ends so before its first change."""

_Calls: TypeAlias = "SimpleQueue[tuple[asyncio.Future[Any], Callable[[], Any]] | None]"


class ThreadedConnection:
    """An SQLite connection that lives in a thread. A ThreadPoolExecutor costs 20 µs a call more."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._calls: _Calls | None = None
        self._db: sqlite3.Connection | None = None

    async def open(self, connect: Callable[[], sqlite3.Connection]) -> None:
        """Start the thread and let it call `connect`, unless that was done."""
        if self._calls is None:
            self._calls = SimpleQueue()
            threading.Thread(
                target=_work, args=(self._calls,), name="persistence-sqlite", daemon=True
            ).start()
        await self._submit(self._calls, partial(self._open, connect))

    async def run(self, function: Callable[[sqlite3.Connection, *Ts], T], *args: *Ts) -> T:
        """Return what `function` does there, given the connection and `args`."""
        if self._calls is None or self._db is None:
            message = f"{self._path} is not open"
            raise ConfigurationError(message)
        return await self._submit(self._calls, partial(function, self._db, *args))

    async def close(self) -> None:
        """Close the connection and end the thread."""
        calls, self._calls = self._calls, None
        if calls is not None:
            try:
                await self._submit(calls, self._close)
            finally:
                calls.put(None)

    def _open(self, connect: Callable[[], sqlite3.Connection]) -> None:
        if self._db is None:
            self._db = connect()

    def _close(self) -> None:
        db, self._db = self._db, None
        if db is not None:
            db.close()

    async def _submit(self, calls: _Calls, call: Callable[[], T]) -> T:
        future: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        calls.put((future, call))
        try:
            return await future
        except sqlite3.Error as error:
            # Errors of the Python module itself carry no code.
            code = getattr(error, "sqlite_errorcode", 0) & 0xFF
            kind = _KINDS.get(code, ConfigurationError)
            if code == sqlite3.SQLITE_CANTOPEN and self._db is not None:
                kind = UnavailableError  # it could be opened once: descriptors have run out
            message = f"{self._path}: {error}"
            raise unapplied(kind(message), certain=code in _LOCKED) from error


def _work(calls: _Calls) -> None:
    for future, call in iter(calls.get, None):
        result = error = None
        try:
            result = call()
        except BaseException as raised:
            error = raised
        with suppress(RuntimeError):  # the loop was closed: nobody waits any more
            future.get_loop().call_soon_threadsafe(_settle, future, result, error)


def _settle(future: asyncio.Future[T], result: T, error: BaseException | None) -> None:
    if future.done():  # cancelled
        return
    if error is None:
        future.set_result(result)
    else:
        future.set_exception(error)
