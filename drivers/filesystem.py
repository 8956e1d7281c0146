"""Each partition is one append-only file of JSON lines, on a local disk, under POSIX.

    <path>/<namespace>/3f/session_abc-3f9c….jsonl

`_filesystem_log` has what is in a file, and the index of it that is kept in
memory; here is who opens, locks, syncs and forgets it.

Writers hold flock(2) on the file; readers hold nothing, and read on from where
they stopped when fstat(2) shows that the file has grown. A file whose greater
half, and more than 128 KiB, is garbage is written anew and takes the old one's
place, a file without entries is removed: the old one then has no link left (so
make no hard links to these files), and whoever has it open looks again. Until
then what was deleted or replaced is still legible in the file.

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
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import NamedTuple, TypeVar, TypeVarTuple
from urllib.parse import unquote

from persistence.driver import ABSENT, PAGE_BYTES, Delete, Entry, Key, Page, Put, Write
from persistence.drivers._filesystem_log import NOWAIT, Log, Puts, partition_of, sync_folder
from persistence.errors import ConfigurationError, PersistenceError, UnavailableError
from persistence.options import Durability, check_durability, check_namespace, flag, path_text, split_url

__all__ = ["FilesystemDriver", "filesystem_driver", "from_url"]

_BATCH = 64  # files locked at once
_OPEN_FILES = 256
_INDEX_BYTES = 64 << 20  # all indexes together, unless one alone is larger
_PURGE_KEYS = 5_000
_SYNC_THREADS = 16
_LOCK_SECONDS = 10.0

_logger = logging.getLogger("persistence.filesystem")
_T = TypeVar("_T")
_Ts = TypeVarTuple("_Ts")


class _Staged(NamedTuple):
    """A Write that stands in its locked file, or has removed it (`size` 0), and is not acknowledged yet."""

    number: int
    log: Log
    puts: Puts
    deletes: list[str]
    size: int


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
        self._path = Path(path_text(path))
        self._namespace = check_namespace(namespace)
        self._power = check_durability(durability) == "power"
        self._create = create
        self._folder = self._path / _folder_name(namespace)
        self._worker: ThreadPoolExecutor | None = None
        self._syncers: ThreadPoolExecutor | None = None
        # Only the worker changes these; the oldest is first.
        self._logs: OrderedDict[str, Log] = OrderedDict()
        self._opened: OrderedDict[Log, None] = OrderedDict()
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
            kind = ConfigurationError if error.errno == errno.ELOOP else UnavailableError  # it is a link
            raise kind(f"{self!r}: {error}") from error

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
                sync_folder(folder)

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

    def _look(self, partition: str, now: bool) -> Log | None:
        """Return the up-to-date log, its lock taken, or None where there is no file."""
        if now:
            log = self._logs.get(partition)
            if not NOWAIT or log is None or not log.lock.acquire(blocking=False):
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
            log.refresh(os.fstat(log.fd).st_size)
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
        if size is None:  # no file: the index is empty
            if not log.holds(write.ops):
                return False
            if not any(isinstance(op, Put) for op in write.ops):
                return True
            size = self._lock(log, before_waiting, create=True) or 0
        done = False
        try:
            log.make_ready(size, power=self._power)
            if not log.holds(write.ops):
                return False
            puts = [(op.key, op.value) for op in write.ops if isinstance(op, Put)]
            deletes = [op.key for op in write.ops if isinstance(op, Delete) and op.key in log.entries]
            if not puts and not deletes:
                return True
            if not puts and len(deletes) == len(log.entries):
                log.writing = True
                log.unlink()
                done = True
                return _Staged(number, log, [], deletes, 0)
            places, size = log.append(write.version, puts, deletes)
            done = True
            return _Staged(number, log, places, deletes, size)
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
            if log.is_mostly_garbage() and self._worker is not None:
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
                item.log.rewrite()
        except OSError as error:
            self._unsafe.add(item.log.partition)
            _logger.warning("%s: sync failed, and so did the repair: %s", item.log.path, error)
        finally:
            self._forget(item.log)

    def _mend(self, log: Log, before_waiting: Callable[[], None] | None = None) -> None:
        """Write the file anew, with all its lines, before anybody is told what they say."""
        if (size := self._lock(log, before_waiting)) is not None:
            try:
                log.make_ready(size, power=self._power)
                log.rewrite()
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
            log.unlink()
            if self._power:
                sync_folder(log.path.parent)
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
                partition = partition_of(self._folder / folder / name)
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
                log.compact(size, power=self._power)
            finally:
                self._unlock(log)
        except (OSError, PersistenceError) as error:
            _logger.warning("%s was not compacted: %s", log.path, error)

    def _log(self, partition: str) -> Log:
        log = self._logs.get(partition)
        if log is None:
            digest = sha256(partition.encode()).hexdigest()
            # Readable, yet no two names meet, not even where A is a; the true name stands in the header.
            readable = re.sub("[^a-z0-9]+", "_", partition.lower())[:60]
            return Log(partition, self._folder / digest[:2] / f"{readable}-{digest[:32]}.jsonl")
        log.used = True
        return log

    def _open_file(self, log: Log, *, create: bool = False) -> bool:
        """Open what the path names now, if anything; an index of another file is dropped."""
        log.close()
        folder = log.path.parent
        if create and folder not in self._made:
            with suppress(FileExistsError):
                folder.mkdir(0o700)
            if self._power:
                sync_folder(self._folder)
            self._made.add(folder)
        # A link may lead to a file that is none of ours: what ends in no newline would be cut off.
        flags = os.O_RDWR | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW | (os.O_CREAT if create else 0)
        try:
            fd = self._open_or_make_room(log.path, flags)
        except FileNotFoundError:
            self._forget(log)
            if create:
                raise
            return False
        log.take(fd)
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
        self, log: Log, before_waiting: Callable[[], None] | None = None, *, create: bool = False
    ) -> int | None:
        """Take the writers' lock of the file that the path names, return its size; None where there is none.

        Nobody waits here while holding another lock, so nobody waits in a circle.
        """
        deadline = 0.0
        while log.fd >= 0 or self._open_file(log, create=create):
            if not log.try_lock():
                if not deadline:
                    deadline = time.monotonic() + _LOCK_SECONDS
                    if before_waiting is not None:
                        before_waiting()
                elif time.monotonic() > deadline:
                    message = f"another process has locked {log.path} for {_LOCK_SECONDS:.0f} s"
                    raise UnavailableError(message, partition=log.partition)
                time.sleep(0.0005)
                continue
            status = os.fstat(log.fd)
            if status.st_nlink:
                return status.st_size
            log.close()
        return None

    def _unlock(self, log: Log) -> None:
        if log.fd >= 0:
            log.unlock()
            self._count(log)

    def _count(self, log: Log) -> None:
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

    def _forget(self, log: Log) -> None:
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


def _sync(item: _Staged) -> OSError | None:
    try:
        item.log.sync(removed=not item.size)
    except OSError as error:
        return error
    return None
