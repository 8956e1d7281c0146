"""Each partition is one append-only file of JSON lines, on a local disk, under POSIX.

    <path>/<namespace>/3f/session_abc-3f9c….jsonl
    {"sum":"5be1a0c3","format":1,"partition":"session/abc","id":"8d0c…"}
    {"sum":"90d1c2aa","version":77,"put":{"head":{"count":1}},"put64":{"blob":"AAE="},"delete":["old"]}

A line is one `Write`, appended by one write(2) and sealed by a CRC-32 of all
that follows it, so a Write is there whole or not at all. JSON values stand as
they are, others in base64. What a crash can leave at the end, a line without
its newline or with zeros for data, is skipped by readers and cut off by the
next writer; any other line that does not match its sum is corruption.

Writers hold flock(2) on the file; readers hold nothing. They keep an index
(key → version and place of the value in the file, never the value itself) and
read on from where they stopped when fstat(2) shows that the file has grown. A
file whose greater half is garbage is written anew and takes the old one's
place, a file without entries is removed: the old one then has no link left
(so make no hard links to these files), and whoever has it open looks again.

What may surprise: the first use of a partition reads its whole file, and its
keys must fit in memory. A reader in another process may see a Write a moment
before fdatasync(2) has made it safe. After a power cut, a driver opened with
durability="process" may find a partition corrupt. NFS is not supported.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import re
import sys
import threading
import time
import zlib
from base64 import b64decode, b64encode
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import NamedTuple, TypeAlias, TypeVar, TypeVarTuple
from urllib.parse import unquote

import msgspec
from sortedcontainers import SortedList

from persistence.driver import ABSENT, PAGE_BYTES, Delete, Entry, Key, Op, Page, Put, Write
from persistence.errors import ConfigurationError, CorruptRecordError, PersistenceError, UnavailableError
from persistence.options import Durability, check_durability, check_namespace, flag, split_url

try:
    import fcntl
except ImportError as error:
    raise ConfigurationError("the filesystem driver needs a POSIX system: it locks with flock(2)") from error

__all__ = ["FilesystemDriver", "filesystem_driver", "from_url"]

_BATCH = 64  # files locked at once
_OPEN_FILES = 256
_INDEX_BYTES = 64 << 20  # all indexes together, unless one alone is larger
_LOG_BYTES, _ENTRY_BYTES, _LINE_BYTES = 1500, 350, 65  # an index, one more key in it; a line around its value
_COMPACT_BYTES = 128 << 10  # smaller files are not compacted
_READ_BYTES = 1 << 20
_PURGE_KEYS = 5_000
_SYNC_THREADS = 16
_LOCK_SECONDS = 10.0
_NOWAIT = getattr(os, "RWF_NOWAIT", 0)  # Linux: fail rather than wait for the disk

_logger = logging.getLogger("persistence.filesystem")
_T = TypeVar("_T")
_Ts = TypeVarTuple("_Ts")


class _Place(NamedTuple):
    version: int
    offset: int
    length: int
    coded: bool


_Puts: TypeAlias = "list[tuple[str, _Place]]"


class _Staged(NamedTuple):
    """A Write that stands in its locked file, or has removed it (`size` 0), and is not acknowledged yet."""

    number: int
    log: _Log
    puts: _Puts
    deletes: list[str]
    size: int


class _Header(msgspec.Struct):
    format: int
    partition: str
    id: str


class _Line(msgspec.Struct):
    version: int
    put: dict[str, msgspec.Raw] = {}
    put64: dict[str, msgspec.Raw] = {}
    delete: list[str] = []


_decode_any = msgspec.json.Decoder(msgspec.Raw).decode
_decode_header = msgspec.json.Decoder(_Header).decode
_decode_line = msgspec.json.Decoder(_Line).decode
_encode = msgspec.json.Encoder().encode


class _BadLineError(Exception):
    """A line that does not match its sum."""


class _Log:
    """What is known of one partition's file. The worker thread changes it, the loop's thread may look.

    `lock` guards `fd` and the index. While `writing` is set this driver holds
    the file's flock and the index is all that was ever acknowledged.
    """

    __slots__ = (
        *("counted", "end", "entries", "fd", "floor", "header", "key_bytes", "keys", "lock"),
        *("partition", "path", "settled", "used", "value_bytes", "writing"),
    )

    def __init__(self, partition: str, path: Path) -> None:
        self.partition = partition
        self.path = path
        self.lock = threading.Lock()
        self.fd = -1
        self.used = False  # since the last look for something to forget
        self.counted = 0  # bytes of the index in the driver's total
        self.clear()

    def clear(self) -> None:
        self.header = b""
        self.end = 0  # of the lines that are in the index
        self.entries: dict[str, _Place] = {}
        self.keys: SortedList[str] | None = None  # made by the first scan
        self.key_bytes = self.value_bytes = 0
        self.floor = _COMPACT_BYTES
        self.settled = False  # the folder was synced since this file came to be
        self.writing = False

    def close(self) -> None:
        with self.lock:
            if self.fd >= 0:
                os.close(self.fd)  # gives up the flock too
                self.fd = -1

    def is_current(self) -> bool:
        if self.fd < 0:
            return False
        status = os.fstat(self.fd)
        # Nobody else appends to a file that this driver holds, but without a link it has a successor.
        return (self.writing or status.st_size == self.end) and status.st_nlink > 0

    def sorted_keys(self) -> SortedList[str]:
        if self.keys is None:
            self.keys = SortedList(self.entries)
        return self.keys

    def read(self, key: str, *, now: bool) -> Entry | None:
        """Return the entry of `key`; with `now`, raise OSError rather than wait for the disk."""
        place = self.entries.get(key)
        if place is None:
            return None
        version, offset, length, coded = place
        if now:
            buffer = bytearray(length)
            if os.preadv(self.fd, [buffer], offset, _NOWAIT) < length:
                raise BlockingIOError
            value = bytes(buffer)
        elif len(value := os.pread(self.fd, length, offset)) < length:
            raise CorruptRecordError(f"{self.path.name} ends too early", partition=self.partition, key=key)
        return Entry(key, b64decode(value) if coded else value, version)

    def replay(self) -> None:
        """Take in the lines after `end`, up to what looks like a torn tail."""
        tail = b""
        while True:
            block = os.pread(self.fd, _READ_BYTES, self.end + len(tail))
            *lines, tail = (tail + block).split(b"\n")
            for number, line in enumerate(lines, 1):
                try:
                    if self.end:
                        change = _checked(line, _decode_line)
                        self.apply(_places(change, self.end), change.delete)
                    else:
                        self.take_header(line)
                except _BadLineError:
                    # A power cut may leave zeros where data were not yet written, at the very end.
                    last = number == len(lines) and not tail and len(block) < _READ_BYTES
                    if b"\0" in line and last:
                        return
                    raise
                self.end += len(line) + 1
            if len(block) < _READ_BYTES:
                return

    def take_header(self, line: bytes) -> None:
        if (named := _parse_header(line, self.path).partition) != self.partition:
            message = f"{self.path.name} holds another partition, {named!r}"
            raise CorruptRecordError(message, partition=self.partition)
        self.header = line

    def apply(self, puts: _Puts, deletes: list[str]) -> None:
        for key in deletes:
            if (place := self.entries.pop(key, None)) is not None:
                self.value_bytes -= place.length
                self.key_bytes -= len(key)
                if self.keys is not None:
                    self.keys.remove(key)
        for key, place in puts:
            if (old := self.entries.get(key)) is not None:
                self.value_bytes -= old.length
            else:
                self.key_bytes += len(key)
                if self.keys is not None:
                    self.keys.add(key)
            self.value_bytes += place.length
            self.entries[key] = place

    @property
    def weight(self) -> int:
        return _LOG_BYTES + len(self.entries) * _ENTRY_BYTES + self.key_bytes

    def wastes_more_than(self, floor: int) -> bool:
        live = self.value_bytes + self.key_bytes + len(self.entries) * _LINE_BYTES
        return self.end > max(2 * live, floor)


class FilesystemDriver:
    """Keep every partition in a file below the folder `path`, for any number of processes of this machine."""

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        namespace: str = "default",
        durability: Durability = "power",
        create: bool = True,
    ) -> None:
        if "\0" in os.fspath(path):
            message = f"path={path!r}: no folder has NUL in its name"
            raise ConfigurationError(message)
        self._path = Path(path)
        self._namespace = check_namespace(namespace)
        self._power = check_durability(durability) == "power"
        self._create = create
        self._folder = self._path / _folder_name(namespace)
        self._worker: ThreadPoolExecutor | None = None
        self._syncers: ThreadPoolExecutor | None = None
        # Only the worker changes these; the oldest is first.
        self._logs: OrderedDict[str, _Log] = OrderedDict()
        self._opened: OrderedDict[_Log, None] = OrderedDict()
        self._open_files = _OPEN_FILES
        self._index_bytes = 0
        self._made: set[Path] = set()
        self._unsafe: set[str] = set()  # partitions of which a sync failed, and its repair too

    def __repr__(self) -> str:
        return f"filesystem_driver({str(self._path)!r}, namespace={self._namespace!r})"

    async def open(self) -> None:
        if self._worker is None:
            self._worker = ThreadPoolExecutor(1, "persistence-files")
            self._syncers = ThreadPoolExecutor(_SYNC_THREADS, "persistence-sync")
        await self._run(self._prepare)

    async def close(self) -> None:
        if self._worker is None or self._syncers is None:
            return
        await self._run(self._forget_all)
        self._worker.shutdown(wait=False)
        self._syncers.shutdown(wait=False)
        self._worker = self._syncers = None

    async def get(self, keys: Sequence[Key]) -> list[Entry | None]:
        try:
            return self._get(keys, now=True)
        except OSError:  # it would have to wait
            return await self._run(self._get, keys)

    async def scan(
        self, partition: str, start: str, end: str | None, *, limit: int, reverse: bool = False
    ) -> Page:
        try:
            return self._scan(partition, start, end, limit, reverse, now=True)
        except OSError:
            return await self._run(self._scan, partition, start, end, limit, reverse)

    async def commit(self, writes: Sequence[Write]) -> list[bool | None]:
        return await self._run(self._commit, writes)

    async def purge(self, partition: str, start: str, end: str | None) -> None:
        if not start and end is None:
            await self._run(self._remove, partition)
            return
        while await self._run(self._purge_some, partition, start, end):
            pass

    async def partitions(self, cursor: str | None, limit: int) -> tuple[list[str], str | None]:
        return await self._run(self._partitions, cursor or "", limit)

    async def _run(self, job: Callable[[*_Ts], _T], *args: *_Ts) -> _T:
        if self._worker is None:  # the loop's default executor has many threads
            raise ConfigurationError(f"{self!r} is not open")
        try:
            return await asyncio.get_running_loop().run_in_executor(self._worker, job, *args)
        except (PermissionError, NotADirectoryError) as error:
            raise ConfigurationError(f"{self!r}: {error}") from error
        except OSError as error:
            raise UnavailableError(f"{self!r}: {error}") from error

    # Everything below blocks, so the worker runs it; with `now` it runs in the loop's thread and never does.

    def _prepare(self) -> None:
        # From now on the same folder, whatever the working folder.
        self._path, self._folder = self._path.absolute(), self._folder.absolute()
        if not self._create and not self._path.is_dir():
            raise ConfigurationError(f"the folder {self._path} is missing, and create=False")
        missing = [folder for folder in (self._folder, *self._folder.parents) if not folder.exists()]
        for folder in reversed(missing):
            with suppress(FileExistsError):  # another process was faster
                folder.mkdir(0o700)
        if not self._folder.is_dir():
            raise ConfigurationError(f"{self._folder} is not a folder")
        if self._power:
            for folder in {self._path, *(folder.parent for folder in missing)}:
                _sync_folder(folder)

    def _get(self, keys: Sequence[Key], now: bool = False) -> list[Entry | None]:
        found: list[Entry | None] = [None] * len(keys)
        wanted: dict[str, list[int]] = {}
        for number, key in enumerate(keys):
            wanted.setdefault(key.partition, []).append(number)
        for partition, numbers in wanted.items():
            log = self._look(partition, now)
            if log is None:
                continue
            try:
                for number in numbers:
                    found[number] = log.read(keys[number].key, now=now)
            finally:
                log.lock.release()
        return found

    def _scan(
        self, partition: str, start: str, end: str | None, limit: int, reverse: bool, now: bool = False
    ) -> Page:
        log = self._look(partition, now)
        if log is None:
            return Page([], False)
        try:
            if now and log.keys is None:
                raise BlockingIOError
            page: list[Entry] = []
            size = 0
            for key in log.sorted_keys().irange(start, end, (True, False), reverse=reverse):
                size += len(key) + log.entries[key].length
                if page and (len(page) == limit or size > PAGE_BYTES):
                    return Page(page, True)
                entry = log.read(key, now=now)
                if entry is not None:
                    page.append(entry)
            return Page(page, False)
        finally:
            log.lock.release()

    def _look(self, partition: str, now: bool) -> _Log | None:
        """Return the up-to-date log, its lock taken, or None where there is no file."""
        if now:
            log = self._logs.get(partition)
            if not _NOWAIT or log is None or not log.lock.acquire(blocking=False):
                raise BlockingIOError
            if not log.is_current():
                log.lock.release()
                raise BlockingIOError
            log.used = True
            return log
        self._make_room()
        log = self._log(partition)
        if partition in self._unsafe:
            self._mend(log)
        if not log.is_current():
            if (log.fd < 0 or not os.fstat(log.fd).st_nlink) and not self._open_file(log):
                return None
            self._refresh(log, os.fstat(log.fd).st_size)
            self._count(log)
        log.lock.acquire()
        return log

    def _commit(self, writes: Sequence[Write]) -> list[bool | None]:
        outcomes: list[bool | None] = [None] * len(writes)
        failures: list[Exception] = []
        staged: list[_Staged] = []

        def settle() -> None:
            self._settle(staged, outcomes, failures)
            staged.clear()

        try:
            for number, write in enumerate(writes):
                try:
                    outcome = self._stage(number, write, before_waiting=settle)
                except (OSError, PersistenceError) as error:
                    failures.append(error)
                    continue
                if isinstance(outcome, bool):
                    outcomes[number] = outcome
                else:
                    staged.append(outcome)
                    if len(staged) == _BATCH:
                        settle()
            settle()
        finally:
            for item in staged:
                self._forget(item.log)
        if len(failures) == len(writes) > 0:
            raise failures[0]
        for failure in failures:
            _logger.warning("%r: one write of %d failed: %s", self, len(writes), failure)
        return outcomes

    def _stage(self, number: int, write: Write, before_waiting: Callable[[], None]) -> _Staged | bool:
        """Write the line. The outcome is known at once where nothing changes; else the file stays locked."""
        self._make_room()
        log = self._log(write.partition)
        if write.partition in self._unsafe:
            self._mend(log, before_waiting)
        size = self._lock(log, before_waiting)
        if size is None:
            if not all(_holds(op, {}) for op in write.ops):
                return False
            if not any(isinstance(op, Put) for op in write.ops):
                return True
            size = self._lock(log, before_waiting, create=True) or 0
        done = False
        try:
            self._refresh(log, size, repair=True)
            if not all(_holds(op, log.entries) for op in write.ops):
                return False
            puts = [(op.key, op.value) for op in write.ops if isinstance(op, Put)]
            deletes = [op.key for op in write.ops if isinstance(op, Delete) and op.key in log.entries]
            if not puts and not deletes:
                return True
            if not puts and len(deletes) == len(log.entries):
                log.writing = True
                _unlink(log.path)
                done = True
                return _Staged(number, log, [], deletes, 0)
            line = _line(write.version, puts, deletes)
            places = _places(_decode_line(line), log.end)
            log.writing = True
            self._append(log, line)
            done = True
            return _Staged(number, log, places, deletes, len(line))
        finally:
            if not done:
                log.writing = False
                self._unlock(log)

    def _settle(self, staged: list[_Staged], outcomes: list[bool | None], failures: list[Exception]) -> None:
        """Make the staged Writes safe, then show them to this driver's readers, and unlock."""
        for item, failure in zip(staged, self._sync_all(staged), strict=True):
            log = item.log
            if failure is not None:
                failures.append(failure)
                self._give_up(item)
                continue
            outcomes[item.number] = True
            if not item.size:
                self._forget(log)
                continue
            with log.lock:
                log.apply(item.puts, item.deletes)
                log.end += item.size
                log.writing = False
            self._unlock(log)
            if log.wastes_more_than(log.floor) and self._worker is not None:
                log.floor = 2 * log.end  # not again before it has doubled, should this fail
                self._worker.submit(self._compact, log.partition)

    def _sync_all(self, staged: list[_Staged]) -> Iterable[OSError | None]:
        if not self._power:
            return [None] * len(staged)
        if len(staged) == 1 or self._syncers is None:
            return [_sync(item) for item in staged]
        return self._syncers.map(_sync, staged)

    def _give_up(self, item: _Staged) -> None:
        """A line whose sync failed may be seen now and lost later: put a file without it in this one's place.

        Cutting it off will not do. A reader who has seen it would take the next line of its length for it.
        """
        try:
            if item.size:
                self._rewrite(item.log)
        except OSError as error:
            self._unsafe.add(item.log.partition)
            _logger.warning("%s: sync failed, and so did the repair: %s", item.log.path, error)
        finally:
            self._forget(item.log)

    def _mend(self, log: _Log, before_waiting: Callable[[], None] | None = None) -> None:
        """Write the file anew, with all its lines, before anybody is told what they say."""
        if (size := self._lock(log, before_waiting)) is not None:
            try:
                self._refresh(log, size, repair=True)
                self._rewrite(log)
            finally:
                self._forget(log)
        self._unsafe.discard(log.partition)

    def _purge_some(self, partition: str, start: str, end: str | None) -> bool:
        log = self._look(partition, now=False)
        if log is None:
            return False
        keys = list(islice(log.sorted_keys().irange(start, end, (True, False)), _PURGE_KEYS))
        log.lock.release()
        if keys:
            self._commit([Write(partition, tuple(Delete(key) for key in keys), ABSENT)])
        return len(keys) == _PURGE_KEYS

    def _remove(self, partition: str) -> None:
        log = self._log(partition)
        if self._lock(log) is None:
            return
        try:
            _unlink(log.path)
            if self._power:
                _sync_folder(log.path.parent)
        finally:
            self._forget(log)

    def _partitions(self, cursor: str, limit: int) -> tuple[list[str], str | None]:
        after_folder, _, after_name = cursor.partition("/")
        found: list[str] = []
        for folder in (f"{number:02x}" for number in range(256)):
            if folder < after_folder:
                continue
            try:
                found_names = set(os.listdir(self._folder / folder))
                # On tmpfs one listing may miss a file that is replaced meanwhile.
                while more := set(os.listdir(self._folder / folder)) - found_names:
                    found_names |= more
            except FileNotFoundError:
                continue
            for name in sorted(found_names):
                if not name.endswith(".jsonl") or (folder == after_folder and name <= after_name):
                    continue
                partition = _partition_of(self._folder / folder / name)
                if partition is not None:
                    found.append(partition)
                    if len(found) == limit:
                        return found, f"{folder}/{name}"
        return found, None

    def _compact(self, partition: str) -> None:
        log = self._log(partition)
        try:
            size = self._lock(log)
            if size is None:
                return
            try:
                with log.lock:  # read all of it anew: what is damaged must not get a good sum
                    floor = log.floor
                    log.clear()
                    log.floor = floor
                self._refresh(log, size, repair=True)
                if log.wastes_more_than(_COMPACT_BYTES):  # no other process was faster
                    self._rewrite(log)
            finally:
                self._unlock(log)
        except (OSError, PersistenceError) as error:
            _logger.warning("%s was not compacted: %s", log.path, error)

    def _rewrite(self, log: _Log) -> None:
        """Put a file with what the index holds, and nothing else, in the place of the locked one."""
        if not log.entries:
            _unlink(log.path)
            _sync_folder(log.path.parent)
            return
        log.writing = True
        aside = log.path.with_suffix(".new")  # nobody else's: it is written under the lock
        try:
            with open(os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
                file.write(_header(log.partition))
                for key in log.entries:
                    entry = log.read(key, now=False)
                    if entry is not None:
                        file.write(_line(entry.version, [(key, entry.value)], []))
                file.flush()
                _sync_file(file.fileno())
            os.replace(aside, log.path)
        except BaseException:
            aside.unlink(missing_ok=True)  # only here: once replaced, the name is the next writer's
            raise
        finally:
            log.writing = False
        _sync_folder(log.path.parent)

    def _log(self, partition: str) -> _Log:
        log = self._logs.get(partition)
        if log is None:
            digest = sha256(partition.encode()).hexdigest()
            # Readable, yet no two names meet, not even where A is a; the true name stands in the header.
            readable = re.sub("[^a-z0-9]+", "_", partition.lower())[:60]
            return _Log(partition, self._folder / digest[:2] / f"{readable}-{digest[:32]}.jsonl")
        log.used = True
        return log

    def _open_file(self, log: _Log, *, create: bool = False) -> bool:
        """Open what the path names now, if anything; an index of another file is dropped."""
        log.close()
        folder = log.path.parent
        if create and folder not in self._made:
            with suppress(FileExistsError):
                folder.mkdir(0o700)
            if self._power:
                _sync_folder(self._folder)
            self._made.add(folder)
        flags = os.O_RDWR | os.O_APPEND | os.O_CLOEXEC | (os.O_CREAT if create else 0)
        try:
            fd = self._open_or_make_room(log.path, flags)
        except FileNotFoundError:
            self._forget(log)
            if create:
                raise
            return False
        with log.lock:
            header = log.header
            try:
                same = bool(header) and os.pread(fd, len(header), 0) == header
            except OSError:
                os.close(fd)
                raise
            if not same:
                log.clear()
            log.fd = fd
        self._logs[log.partition] = log
        self._opened[log] = None
        return True

    def _open_or_make_room(self, path: Path, flags: int) -> int:
        self._open_files = min(self._open_files + 1, _OPEN_FILES)
        try:
            return os.open(path, flags, 0o600)
        except OSError as error:
            if error.errno not in (errno.EMFILE, errno.ENFILE) or not self._opened:
                raise
        self._open_files = max(len(self._opened) // 2, 1)  # this process has less to spare for now
        self._make_room()
        return os.open(path, flags, 0o600)

    def _lock(
        self, log: _Log, before_waiting: Callable[[], None] | None = None, *, create: bool = False
    ) -> int | None:
        """Take the writers' lock of the file that the path names, return its size; None where there is none.

        Nobody waits here while holding another lock, so nobody waits in a circle.
        """
        deadline = 0.0
        while log.fd >= 0 or self._open_file(log, create=create):
            try:
                fcntl.flock(log.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if not deadline:
                    deadline = time.monotonic() + _LOCK_SECONDS
                    if before_waiting is not None:
                        before_waiting()
                elif time.monotonic() > deadline:
                    message = f"another process has locked {log.path} for {_LOCK_SECONDS:.0f} s"
                    raise UnavailableError(message, partition=log.partition) from None
                time.sleep(0.0005)
                continue
            status = os.fstat(log.fd)
            if status.st_nlink:
                return status.st_size
            log.close()
        return None

    def _unlock(self, log: _Log) -> None:
        if log.fd >= 0:
            fcntl.flock(log.fd, fcntl.LOCK_UN)
            self._count(log)

    def _refresh(self, log: _Log, size: int, *, repair: bool = False) -> None:
        """Read what was appended. `repair`, under the lock, makes the file end where its good lines end."""
        if size != log.end:
            with log.lock:
                try:
                    log.replay()
                except _BadLineError:
                    self._reread(log)
        if not repair:
            return
        if size > log.end:
            os.ftruncate(log.fd, log.end)
            if self._power:  # or the next line could come to stand on the remains of this one
                _sync_file(log.fd)
        if not log.end:
            header = _header(log.partition)
            self._append(log, header)
            log.take_header(header[:-1])
            log.end = len(header)

    def _reread(self, log: _Log) -> None:
        """Tell corruption from a tail that a writer cut off and wrote over while it was being read."""
        try:
            log.replay()
        except _BadLineError:
            message = f"{log.path} is damaged at byte {log.end}"
            raise CorruptRecordError(message, partition=log.partition) from None

    def _append(self, log: _Log, line: bytes) -> None:
        try:
            if os.write(log.fd, line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            os.ftruncate(log.fd, log.end)
            raise

    def _count(self, log: _Log) -> None:
        if log.partition in self._logs:
            self._index_bytes += log.weight - log.counted
            log.counted = log.weight

    def _make_room(self) -> None:
        """Close files and forget indexes beyond the bounds: the oldest, but used ones get a second chance."""
        for _ in range(2 * len(self._opened)):
            if len(self._opened) < self._open_files:
                break
            log, _ = self._opened.popitem(last=False)
            if log.writing or (log.used and log.fd >= 0):
                log.used = False
                self._opened[log] = None
            else:
                log.close()
        for _ in range(2 * len(self._logs)):
            if self._index_bytes <= _INDEX_BYTES:
                break
            partition, log = self._logs.popitem(last=False)
            self._logs[partition] = log
            if log.used or log.writing:
                log.used = False
            else:
                self._forget(log)

    def _forget(self, log: _Log) -> None:
        if self._logs.get(log.partition) is log:
            del self._logs[log.partition]
            self._index_bytes -= log.counted
        log.close()
        with log.lock:
            log.clear()
            log.counted = 0

    def _forget_all(self) -> None:
        for log in list(self._logs.values()):
            self._forget(log)
        self._opened.clear()
        self._made.clear()


filesystem_driver = FilesystemDriver


def from_url(url: str) -> FilesystemDriver:
    """Return the driver of ``file:///folder?namespace=…&durability=…``; the path is absolute."""
    parts, options, _ = split_url(url, {"namespace": str, "durability": str, "create": flag})
    if parts.netloc not in ("", "localhost") or not parts.path.startswith("/") or parts.fragment:
        raise ConfigurationError("a file:// URL is file:///folder: three slashes, and %23 for #")
    return FilesystemDriver(unquote(parts.path, errors="strict"), **options)


def _folder_name(namespace: str) -> str:
    """Return a name that stays apart from the others where A is a; no namespace holds a dot."""
    lowered = namespace.lower()
    return lowered if lowered == namespace else f"{lowered}.{sha256(namespace.encode()).hexdigest()[:16]}"


def _partition_of(path: Path) -> str | None:
    """Return the partition of a file; None where that is gone, or its first Write was never completed."""
    again = False
    while True:
        try:
            with open(path, "rb") as file:
                header, first = file.readline(), file.readline()
        except FileNotFoundError:
            return None
        if not header or not first.endswith(b"\n"):
            return None
        try:
            return _parse_header(header[:-1], path).partition
        except _BadLineError:
            if again:
                raise CorruptRecordError(f"{path} is damaged at byte 0") from None
            again = True  # it may have grown, or been cut off and written over, between the two reads


def _sealed(body: bytes) -> bytes:
    rest = b'",%b}' % body
    return b'{"sum":"%08x%b\n' % (zlib.crc32(rest), rest)


def _header(partition: str) -> bytes:
    body = b'"format":1,"partition":%b,"id":"%b"' % (_encode(partition), os.urandom(8).hex().encode())
    return _sealed(body)


def _line(version: int, puts: Iterable[tuple[str, bytes]], deletes: list[str]) -> bytes:
    plain: list[bytes] = []
    coded: list[bytes] = []
    for key, value in puts:
        if _is_plain_json(value):
            plain.append(b"%b:%b" % (_encode(key), value))
        else:
            coded.append(b'%b:"%b"' % (_encode(key), b64encode(value)))
    parts = [b'"version":%d' % version]
    if plain:
        parts.append(b'"put":{%b}' % b",".join(plain))
    if coded:
        parts.append(b'"put64":{%b}' % b",".join(coded))
    if deletes:
        parts.append(b'"delete":%b' % _encode(deletes))
    return _sealed(b",".join(parts))


def _is_plain_json(value: bytes) -> bool:
    """Whether a line can carry the value as it is, and give it back byte for byte."""
    if b"\n" in value:
        return False
    try:
        value.decode()
        if bytes(_decode_any(value)) != value:  # spaces around it
            return False
        # Unlike count(), replace() skips from hit to hit, and stops.
        if 2 * len(value) - len(value.replace(b"[", b"", 64)) - len(value.replace(b"{", b"", 64)) >= 64:
            _decode_any(b"[" * 64 + value + b"]" * 64)  # nested so deep that a line could not be parsed?
    except (ValueError, RecursionError):
        return False
    return True


def _parse_header(line: bytes, path: Path) -> _Header:
    header = _checked(line, _decode_header)
    if header.format != 1:
        message = f"{path} has format {header.format}, made by a later release"
        raise CorruptRecordError(message, partition=header.partition)
    return header


def _places(line: _Line, offset: int) -> _Puts:
    """Return where a line at `offset` has its values; they can be counted, for lines have one form only."""
    version = line.version
    offset += len(b'{"sum":"12345678","version":%d' % version)
    puts: _Puts = []
    for name, values, quotes in ((b"put", line.put, 0), (b"put64", line.put64, 1)):
        if values:
            offset += len(name) + len(b',"":{')
        for key, raw in values.items():
            offset += len(_encode(key)) + len(b":")
            length = len(memoryview(raw))
            place = _Place(version, offset + quotes, length - 2 * quotes, bool(quotes))
            puts.append((key, place))
            offset += length + len(b",")  # or the bracket at the end
    return puts


def _checked(line: bytes, decode: Callable[[bytes], _T]) -> _T:
    if line[:8] != b'{"sum":"' or line[8:16] != b"%08x" % zlib.crc32(line[16:]):
        raise _BadLineError
    try:
        return decode(line)
    except msgspec.DecodeError as error:
        raise _BadLineError from error


def _sync(item: _Staged) -> OSError | None:
    """Make a staged Write safe from a power cut, and the file's name too where nobody may have done so."""
    log = item.log
    try:
        if item.size:
            _sync_file(log.fd)
        if not item.size or not log.settled:
            _sync_folder(log.path.parent)
            log.settled = True
    except OSError as error:
        return error
    return None


def _unlink(path: Path) -> None:
    """Remove a locked file, and what a compaction that was killed has left beside it."""
    path.with_suffix(".new").unlink(missing_ok=True)  # first: once the file is gone, the name is another's
    os.unlink(path)


def _sync_file(fd: int) -> None:
    if sys.platform == "darwin":
        fcntl.fcntl(fd, fcntl.F_FULLFSYNC)  # fsync alone leaves the data in the disk's cache
    else:
        os.fdatasync(fd)


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _holds(op: Op, entries: dict[str, _Place]) -> bool:
    if op.expect is None:
        return True
    place = entries.get(op.key)
    return op.expect == (ABSENT if place is None else place.version)
