"""The one place that encodes and decodes what is stored.

Every stored value is a small JSON object, legible in any database tool: `f`,
the format version; `v`, what the user stored, as JSON; `t`, true where `v`
holds tags (see `persistence.codec`); `c` in place of `v` where the text is too
long for one entry and lies in chunks. What else an object holds, its user
(`persistence.collection`, `persistence.log`) says.

A long text is cut into entries ``chunk/<UUIDv7>/<number>`` of the same
partition, which are never overwritten: chunks first, the entry that refers to
them last. Chunks that nothing refers to are what `repair` looks for.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any, Final, TypeVar

import msgspec
from msgspec import UNSET, Raw, UnsetType

from persistence import codec
from persistence.coalescer import Coalescer
from persistence.driver import ABSENT, MAX_VALUE_BYTES, Entry, Key, Put
from persistence.errors import CorruptRecordError, InvalidValueError
from persistence.ids import Clock, IdFactory, now_ms
from persistence.keys import prefix_end

__all__ = [
    "CHUNK",
    "ENCRYPTED",
    "FORMAT",
    "MAX_BYTES",
    "SEAL",
    "Body",
    "Chunks",
    "MissingChunkError",
    "Store",
    "pack",
]

FORMAT: Final = 1
"""The version of the stored form. A higher one is refused, never guessed at."""

ENCRYPTED: Final = b"\x01"
"""What an encrypted value begins with; no JSON does."""

SEAL: Final = Key("encryption", "seal")
"""Where an encrypted store has a value that its keys alone open (`persistence.encryption`)."""

MAX_BYTES: Final = 101 << 20
"""The longest value, in bytes of JSON: a hundred megabytes of either kind, and what JSON adds to them."""

CHUNK: Final = "chunk/"
INLINE_BYTES: Final = MAX_VALUE_BYTES - 4096  # leaves room for the rest of the object

_UNDECRYPTED = "it is encrypted (persistence.encryption), and was not decrypted with any of the keys given"
_CHUNK_BYTES = 1_000_000
_CHUNKS_AT_ONCE = 4  # fit into one Write, and bound what a read holds beside the value


class Chunks(msgspec.Struct, array_like=True, frozen=True):
    """Where a long text lies: `count` chunks under `id`, `size` bytes, and their SHA-256."""

    id: str
    count: int
    size: int
    sha256: str


class Body(msgspec.Struct, kw_only=True, omit_defaults=True, gc=False):  # no cycle can lead through one
    """What all stored objects have in common."""

    f: int = msgspec.field(default_factory=lambda: FORMAT)  # a factory: always written
    t: bool = False
    v: Raw | UnsetType = UNSET
    c: Chunks | UnsetType = UNSET


class _Format(msgspec.Struct):
    f: int


class MissingChunkError(CorruptRecordError):
    """A chunk is gone: the entry was replaced meanwhile (read it again), or it is corrupt."""


B = TypeVar("B", bound=Body)

_encode = msgspec.json.Encoder().encode
_format = msgspec.json.Decoder(_Format)


def pack(body: Body) -> bytes:
    """Return the stored form of `body`."""
    return _encode(body)


class Store:
    """Values in and out of the entries of a driver."""

    def __init__(self, coalescer: Coalescer, clock: Clock, ids: IdFactory) -> None:
        self.coalescer = coalescer
        # One of the user's may be time.time() * 1000, which gives a float.
        self.clock: Clock = clock if clock is now_ms else lambda: int(clock())
        self.ids = ids

    async def fill(self, partition: str, body: Body, value: Any) -> int:
        """Put `value` into `body`; write its chunks first if it is long. Return how many bytes `body` holds.

        Raises `InvalidValueError` for what cannot be stored exactly or has more than `MAX_BYTES`.
        """
        text, body.t = codec.encode(value)
        if len(text) <= INLINE_BYTES:
            body.v = Raw(text)
            return len(text)
        body.c = await self._write_chunks(partition, text)
        return 0

    async def value(self, partition: str, key: str, body: Body) -> Any:
        """Return the value of `body`, as it was given to `fill`."""
        if isinstance(body.c, Chunks):
            return self._decoded(await self._read_chunks(partition, key, body.c), body.t, partition, key)
        return self.inline_value(partition, key, body)

    def inline_value(self, partition: str, key: str, body: Body) -> Any:
        """Return the value of a `body` that has no chunks."""
        if body.v is UNSET:
            message = "the stored object has no value"
            raise CorruptRecordError(message, partition=partition, key=key)
        return self._decoded(body.v, body.t, partition, key)

    def unpack(self, decoder: msgspec.json.Decoder[B], partition: str, entry: Entry) -> B:
        """Return the stored object of `entry`; raise `CorruptRecordError` if it is none of ours."""
        try:
            body = decoder.decode(entry.value)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            message = f"{_foreign(entry.value) or 'what is stored is no valid object'}: {error}"
            raise CorruptRecordError(message, partition=partition, key=entry.key) from error
        if body.f != FORMAT:
            message = _foreign(entry.value) or f"unknown format {body.f}"
            raise CorruptRecordError(message, partition=partition, key=entry.key)
        return body

    def check_decrypted(self, partition: str, entry: Entry) -> None:
        """Raise `CorruptRecordError` if `entry`, to be passed on as it is, could not be decrypted."""
        if entry.value.startswith(ENCRYPTED):
            raise CorruptRecordError(_UNDECRYPTED, partition=partition, key=entry.key)

    async def refill(self, partition: str, body: Body, value: Any) -> None:
        """Write the chunks anew of a `body`, if it has any, whose Write was refused.

        It may have been written, unanswered, and replaced or deleted since:
        then they are gone, or about to go.
        """
        if isinstance(body.c, Chunks):
            await self.drop_chunks(partition, [body.c])
            await self.fill(partition, body, value)

    async def drop_chunks(self, partition: str, dropped: Iterable[Chunks | UnsetType]) -> None:
        """Remove chunks that nothing refers to any more; a body without any has none to remove."""
        for chunks in dropped:
            if isinstance(chunks, Chunks):
                prefix = f"{CHUNK}{chunks.id}/"
                await self.coalescer.purge(partition, prefix, prefix_end(prefix))

    def _decoded(self, text: bytes | Raw, tagged: bool, partition: str, key: str) -> Any:
        try:
            return codec.decode(text, tagged)
        except (ValueError, msgspec.MsgspecError) as error:
            message = f"the stored value cannot be read: {error}"
            raise CorruptRecordError(message, partition=partition, key=key) from error

    async def _write_chunks(self, partition: str, text: bytes) -> Chunks:
        if len(text) > MAX_BYTES:
            message = f"the value has {len(text):,} bytes as JSON; the limit is {MAX_BYTES:,}"
            raise InvalidValueError(message, partition=partition)
        id = self.ids()
        count = -(-len(text) // _CHUNK_BYTES)
        for first in range(0, count, _CHUNKS_AT_ONCE):
            puts = [
                Put(_chunk_key(id, index), text[index * _CHUNK_BYTES : (index + 1) * _CHUNK_BYTES], ABSENT)
                for index in range(first, min(first + _CHUNKS_AT_ONCE, count))
            ]
            await self.coalescer.write(partition, puts)
        return Chunks(id, count, len(text), hashlib.sha256(text).hexdigest())

    async def _read_chunks(self, partition: str, key: str, chunks: Chunks) -> bytes:
        text = bytearray()
        for first in range(0, chunks.count, _CHUNKS_AT_ONCE):
            last = min(first + _CHUNKS_AT_ONCE, chunks.count)
            keys = [Key(partition, _chunk_key(chunks.id, index)) for index in range(first, last)]
            for entry in await self.coalescer.get(keys):
                if entry is None:
                    message = f"a chunk of {chunks.id} is missing"
                    raise MissingChunkError(message, partition=partition, key=key)
                text += entry.value
        if hashlib.sha256(text).hexdigest() != chunks.sha256:
            message = f"the chunks of {chunks.id} do not have the checksum that was stored with them"
            raise CorruptRecordError(message, partition=partition, key=key)
        return bytes(text)


def _chunk_key(id: str, index: int) -> str:
    return f"{CHUNK}{id}/{index:06d}"


def _foreign(text: bytes) -> str | None:
    if text.startswith(ENCRYPTED):
        return _UNDECRYPTED
    try:
        found = _format.decode(text).f
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None
    if found <= FORMAT:
        return None
    return f"stored in format {found} by a newer version of agent-persistence (this one reads {FORMAT})"
