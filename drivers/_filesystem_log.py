"""One partition's file, as the filesystem driver keeps it: what its lines are, and an index of them.

    {"sum":"5be1a0c3","format":1,"partition":"session/abc","id":"8d0c…"}
    {"sum":"90d1c2aa","version":77,"put":{"head":{"count":1}},"put64":{"blob":"AAE="},"delete":["old"]}

A line is one `Write`, appended by one write(2) and sealed by a CRC-32 of all
that follows it, so a Write is there whole or not at all. JSON values stand as
they are, others in base64. What a crash can leave at the end, a line without
its newline or with zeros for data, is skipped by readers and cut off by the
next writer; any other line that does not match its sum is corruption.

The index tells the version of each key and the place of its value in the file,
never the value itself. All here blocks; the driver says when it may, and locks.
"""

from __future__ import annotations

import errno
import os
import sys
import threading
import zlib
from base64 import b64decode, b64encode
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple, TypeAlias, TypeVar

import msgspec
from sortedcontainers import SortedList

from persistence.driver import ABSENT, Entry, Op
from persistence.errors import ConfigurationError, CorruptRecordError

try:
    import fcntl
except ImportError as error:
    raise ConfigurationError("the filesystem driver needs a POSIX system: it locks with flock(2)") from error

__all__ = ["NOWAIT", "Log", "Place", "Puts", "partition_of", "sync_folder"]

NOWAIT = getattr(os, "RWF_NOWAIT", 0)
"""Linux: fail rather than wait for the disk."""

_LOG_BYTES, _ENTRY_BYTES, _LINE_BYTES = 1500, 350, 65  # an index, one more key in it; a line around its value
_COMPACT_BYTES = 128 << 10  # smaller files are not compacted
_READ_BYTES = 1 << 20

_T = TypeVar("_T")


class Place(NamedTuple):
    """Where the file has a value, and whether in base64."""

    version: int
    offset: int
    length: int
    coded: bool


Puts: TypeAlias = "list[tuple[str, Place]]"


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


class Log:
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
        """Forget what the file holds."""
        self.header = b""
        self.end = 0  # of the lines that are in the index
        self.entries: dict[str, Place] = {}
        self.keys: SortedList[str] | None = None  # made by the first scan
        self.key_bytes = self.value_bytes = 0
        self.floor = _COMPACT_BYTES
        self.settled = False  # the folder was synced since this file came to be
        self.writing = False

    def take(self, fd: int) -> None:
        """Use `fd`, what the path names now; an index of another file is dropped."""
        with self.lock:
            header = self.header
            try:
                same = bool(header) and os.pread(fd, len(header), 0) == header
            except OSError:
                os.close(fd)
                raise
            if not same:
                self.clear()
            self.fd = fd

    def close(self) -> None:
        """Close the file, which gives up the flock too."""
        with self.lock:
            if self.fd >= 0:
                os.close(self.fd)
                self.fd = -1

    # Reading.

    def is_current(self) -> bool:
        """Whether the index is all that the path's file holds."""
        if self.fd < 0:
            return False
        status = os.fstat(self.fd)
        # Nobody else appends to a file that this driver holds, but without a link it has a successor.
        return (self.writing or status.st_size == self.end) and status.st_nlink > 0

    def sorted_keys(self) -> SortedList[str]:
        """Return the keys, sorted from the first call on."""
        if self.keys is None:
            self.keys = SortedList(self.entries)
        return self.keys

    def holds(self, ops: Iterable[Op]) -> bool:
        """Whether all that `ops` expect is so."""
        return all(_holds(op, self.entries) for op in ops)

    def read(self, key: str, *, now: bool) -> Entry | None:
        """Return the entry of `key`; with `now`, raise OSError rather than wait for the disk."""
        place = self.entries.get(key)
        if place is None:
            return None
        version, offset, length, coded = place
        if now:
            buffer = bytearray(length)
            if os.preadv(self.fd, [buffer], offset, NOWAIT) < length:
                raise BlockingIOError
            value = bytes(buffer)
        elif len(value := os.pread(self.fd, length, offset)) < length:
            raise CorruptRecordError(f"{self.path.name} ends too early", partition=self.partition, key=key)
        return Entry(key, b64decode(value) if coded else value, version)

    def refresh(self, size: int) -> None:
        """Read what was appended to the file, which is `size` long now."""
        if size != self.end:
            with self.lock:
                try:
                    self._replay()
                except _BadLineError:
                    self._replay_again()

    def _replay(self) -> None:
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
                        self._take_header(line)
                except _BadLineError:
                    # A power cut may leave zeros where data were not yet written, at the very end.
                    last = number == len(lines) and not tail and len(block) < _READ_BYTES
                    if b"\0" in line and last:
                        return
                    raise
                self.end += len(line) + 1
            if len(block) < _READ_BYTES:
                return

    def _replay_again(self) -> None:
        """Tell corruption from a tail that a writer cut off and wrote over while it was being read."""
        try:
            self._replay()
        except _BadLineError:
            message = f"{self.path} is damaged at byte {self.end}"
            raise CorruptRecordError(message, partition=self.partition) from None

    def _take_header(self, line: bytes) -> None:
        if (named := _parse_header(line, self.path).partition) != self.partition:
            message = f"{self.path.name} holds another partition, {named!r}"
            raise CorruptRecordError(message, partition=self.partition)
        self.header = line

    def apply(self, puts: Puts, deletes: Sequence[str]) -> None:
        """Change the index as a line changes the file."""
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
        """About how many bytes of memory the index takes."""
        return _LOG_BYTES + len(self.entries) * _ENTRY_BYTES + self.key_bytes

    # Writing, under the writers' lock of the file.

    def try_lock(self) -> bool:
        """Take the writers' lock, unless somebody else holds it."""
        try:
            fcntl.flock(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def unlock(self) -> None:
        """Give up the writers' lock."""
        fcntl.flock(self.fd, fcntl.LOCK_UN)

    def make_ready(self, size: int, *, power: bool) -> None:
        """Read the file, which is `size` long, and make it end where its good lines end."""
        self.refresh(size)
        if size > self.end:
            os.ftruncate(self.fd, self.end)
            if power:  # or the next line could come to stand on the remains of this one
                _sync_file(self.fd)
        if not self.end:
            header = _header(self.partition)
            self._append(header)
            self._take_header(header[:-1])
            self.end = len(header)

    def append(
        self, version: int, puts: Iterable[tuple[str, bytes]], deletes: Sequence[str]
    ) -> tuple[Puts, int]:
        """Append a line; return the places of its values and its length. The index is yet to be changed."""
        line = _line(version, puts, deletes)
        places = _places(_decode_line(line), self.end)
        self.writing = True
        self._append(line)
        return places, len(line)

    def _append(self, line: bytes) -> None:
        try:
            if os.write(self.fd, line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            os.ftruncate(self.fd, self.end)
            raise

    def unlink(self) -> None:
        """Remove the file, and what a compaction that was killed has left beside it."""
        # This first: once the file is gone, the name is another's.
        self.path.with_suffix(".new").unlink(missing_ok=True)
        os.unlink(self.path)

    def sync(self, *, removed: bool) -> None:
        """Make the last change safe from a power cut, and the file's name where nobody may have done so."""
        if not removed:
            _sync_file(self.fd)
        if removed or not self.settled:
            sync_folder(self.path.parent)
            self.settled = True

    def is_mostly_garbage(self) -> bool:
        """Whether the file is large enough, and so much of it garbage, that it should be compacted."""
        return self._wastes_more_than(self.floor)

    def compact(self, size: int, *, power: bool) -> None:
        """Write the file anew, unless another process was faster."""
        with self.lock:  # read all of it anew: what is damaged must not get a good sum
            floor = self.floor
            self.clear()
            self.floor = floor
        self.make_ready(size, power=power)
        if self._wastes_more_than(_COMPACT_BYTES):
            self.rewrite()

    def rewrite(self) -> None:
        """Put a file with what the index holds, and nothing else, in the place of this one."""
        if not self.entries:
            self.unlink()
            sync_folder(self.path.parent)
            return
        self.writing = True
        aside = self.path.with_suffix(".new")  # nobody else's: it is written under the lock
        try:
            aside.unlink(missing_ok=True)  # of one who was killed; or a link, which would be followed
            with open(os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                file.write(_header(self.partition))
                for key in self.entries:
                    entry = self.read(key, now=False)
                    if entry is not None:
                        file.write(_line(entry.version, [(key, entry.value)], []))
                file.flush()
                _sync_file(file.fileno())
            os.replace(aside, self.path)
        except BaseException:
            aside.unlink(missing_ok=True)  # only here: once replaced, the name is the next writer's
            raise
        finally:
            self.writing = False
        sync_folder(self.path.parent)

    def _wastes_more_than(self, floor: int) -> bool:
        live = self.value_bytes + self.key_bytes + len(self.entries) * _LINE_BYTES
        return self.end > max(2 * live, floor)


def partition_of(path: Path) -> str | None:
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


def _line(version: int, puts: Iterable[tuple[str, bytes]], deletes: Sequence[str]) -> bytes:
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


def _places(line: _Line, offset: int) -> Puts:
    """Return where a line at `offset` has its values; they can be counted, for lines have one form only."""
    version = line.version
    offset += len(b'{"sum":"12345678","version":%d' % version)
    puts: Puts = []
    for name, values, quotes in ((b"put", line.put, 0), (b"put64", line.put64, 1)):
        if values:
            offset += len(name) + len(b',"":{')
        for key, raw in values.items():
            offset += len(_encode(key)) + len(b":")
            length = len(memoryview(raw))
            place = Place(version, offset + quotes, length - 2 * quotes, bool(quotes))
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


def _sync_file(fd: int) -> None:
    if sys.platform == "darwin":
        fcntl.fcntl(fd, fcntl.F_FULLFSYNC)  # fsync alone leaves the data in the disk's cache
    else:
        os.fdatasync(fd)


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` safe from a power cut."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _holds(op: Op, entries: dict[str, Place]) -> bool:
    if op.expect is None:
        return True
    place = entries.get(op.key)
    return op.expect == (ABSENT if place is None else place.version)
