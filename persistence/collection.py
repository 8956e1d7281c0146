"""Records by id, with listings: what all repositories have in common.

A record is the entry ``record`` of its own partition, ``<kind>/<id>``. Its
listings are *hints*: small entries elsewhere that sort newest first. The
record is the truth. A hint is put before the record and removed after it, so a
crash leaves at most a hint too many; readers fetch the records and drop what
does not match. No step needs two partitions to change at once.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any, Generic, NamedTuple, TypeVar
from weakref import WeakValueDictionary

import msgspec
from msgspec import UNSET, UnsetType

from persistence.coalescer import RETRY_SECONDS, Tries
from persistence.driver import ABSENT, MAX_GET_KEYS, Delete, Entry, Key, Op, Put
from persistence.errors import (
    ConflictError,
    CorruptRecordError,
    InvalidKeyError,
    InvalidValueError,
    NotFoundError,
    OutcomeUnknownError,
    UnavailableError,
    shown,
)
from persistence.keys import after, encode_id, newest_first, prefix_end
from persistence.records import Record
from persistence.store import FORMAT, Body, MissingChunkError, Store, pack

__all__ = [
    "RECORD",
    "Collection",
    "HintBody",
    "Kind",
    "Listing",
    "Loaded",
    "Place",
    "RecordBody",
    "check_cursor",
    "next_page",
]

RECORD = "record"

_CURSOR = re.compile(r"[0-9]{20}/[!-z|~]{1,200}")
_INT64 = 1 << 63

T = TypeVar("T")
R = TypeVar("R", bound=Record)


class Listing(list[T]):
    """A page of results, a list. `cursor` asks for the next page; None: there is none."""

    def __init__(self, items: Iterable[T] = (), *, cursor: str | None = None) -> None:
        super().__init__(items)
        self.cursor = cursor


def check_cursor(cursor: str | None) -> None:
    """Raise `InvalidKeyError` for what no page of a listing has given."""
    if cursor is not None and (not isinstance(cursor, str) or not _CURSOR.fullmatch(cursor)):
        message = f"cursor={shown(cursor)}: use the cursor of an earlier page"
        raise InvalidKeyError(message)


def next_page(limit: int | None, found: int, read: int) -> int:
    """Return how many entries of a listing to read next, having `read` some and `found` fewer of use.

    One more than is missing, and as many again as were read in vain: thousands
    that have expired may come first.
    """
    return MAX_GET_KEYS if limit is None else min(limit - found + 1 + (read - found), MAX_GET_KEYS)


class RecordBody(Body):
    """A record, or the tombstone of one: when it was deleted, and whether its children still have to go."""

    deleted: int | None = None
    cascade: bool = False


class HintBody(Body):
    """An entry of a listing: when it was put, whose it is, and the text it is listed under."""

    at: int
    id: str
    of: str = ""


class Place(NamedTuple):
    """Where records are listed: a partition, a prefix of its keys, and the text it stands for."""

    partition: str
    prefix: str = ""
    of: str = ""


@dataclass(frozen=True, slots=True)
class Kind(Generic[R]):
    """A kind of record: its name (its partitions begin with it), type, id and listings; when one expires."""

    name: str
    type: type[R]
    id_field: str
    places: Callable[[R], Sequence[Place]]
    expires_at: Callable[[R], int | None] | None = None

    def partition(self, id: str) -> str:
        """Return the partition of the record `id`."""
        return f"{self.name}/{encode_id(id, self.id_field)}"

    def id_of(self, record: R) -> str:
        """Return the id of `record`."""
        id: str = getattr(record, self.id_field)
        return id

    def hints(self, record: R) -> dict[Key, Place]:
        """Return the keys under which `record` is listed."""
        tail = f"{newest_first(record.created_at)}/{encode_id(self.id_of(record), self.id_field)}"
        return {Key(place.partition, place.prefix + tail): place for place in self.places(record)}


@dataclass(frozen=True, slots=True)
class Loaded(Generic[R]):
    """What lies under the key of a record: a record, a tombstone, nothing, or what cannot be read."""

    record: R | None
    body: RecordBody | None
    version: int
    fault: CorruptRecordError | None = None

    @property
    def there(self) -> bool:
        """Whether there is a record, readable or not."""
        return self.record is not None or self.fault is not None


class _Turn:
    """Those of this process who change a record, one by one."""

    def __init__(self) -> None:
        self._lock = asyncio.Lock()
        self._fault: str | None = None  # why the last one had no answer of the store

    @asynccontextmanager
    async def taken(self, partition: str) -> AsyncIterator[None]:
        """Wait for the turn; where the store answers nobody, not as long as all before one together."""
        loop = asyncio.get_running_loop()
        asked = loop.time()
        async with self._lock:
            if self._fault is not None and loop.time() - asked >= RETRY_SECONDS:
                raise UnavailableError(self._fault, partition=partition)
            self._fault = None
            try:
                yield
            except (UnavailableError, OutcomeUnknownError) as error:
                self._fault = f"an earlier change of it failed: {error}"
                raise


class Collection(Generic[R]):
    """The records of one kind."""

    def __init__(self, store: Store, kind: Kind[R]) -> None:
        self.store = store
        self.kind = kind
        self._records = msgspec.json.Decoder(RecordBody)
        self._plain = _plain_decoder(kind.type)
        self.hint_decoder = msgspec.json.Decoder(HintBody)
        self._turns: WeakValueDictionary[str, _Turn] = WeakValueDictionary()  # of who changes it

    # ---- one record

    async def find(self, id: str) -> R | None:
        """Return the record, None if there is none or it has expired."""
        key = Key(self.kind.partition(id), RECORD)
        (entry,) = await self.store.coalescer.ask((key,))
        return None if entry is None else await self._record(key.partition, entry)

    async def find_many(self, ids: Sequence[str], *, expired: bool = False) -> list[R | None]:
        """Return the record of each id: one round trip for up to 256; with `expired` also of those over."""
        keys = [Key(self.kind.partition(id), RECORD) for id in ids]
        entries = await self.store.coalescer.get(keys)
        return [
            None if entry is None else await self._record(key.partition, entry, expired=expired)
            for key, entry in zip(keys, entries, strict=True)
        ]

    async def exists(self, id: str) -> bool:
        """Tell whether there is a record."""
        if self.kind.expires_at is not None:
            return await self.find(id) is not None
        body = await self.load_body(self.kind.partition(id))
        return body is not None and body.deleted is None

    def expired(self, record: R) -> bool:
        """Tell whether the time of a record has come: only what deletes it still sees it."""
        at = None if self.kind.expires_at is None else self.kind.expires_at(record)
        return at is not None and at <= self.store.clock()

    async def load(self, id: str) -> Loaded[R]:
        """Return what lies under the key of the record."""
        return await self.load_partition(self.kind.partition(id))

    async def load_partition(self, partition: str) -> Loaded[R]:
        """Return what lies under the key of the record of `partition`."""
        found = await self._load_what_is_there(partition)
        if found.fault is not None:
            raise found.fault
        return found

    async def load_body(self, partition: str) -> RecordBody | None:
        """Return the stored object of the record of `partition`, or of its tombstone, without its value."""
        (entry,) = await self.store.coalescer.get([Key(partition, RECORD)])
        return None if entry is None else self._unpack(partition, entry)

    async def save(
        self,
        record: R | Mapping[str, Any],
        *,
        expected_version: int | None = None,
        write: Callable[[Loaded[R], Put], Awaitable[int | None]] | None = None,
        expire: Callable[[str], Awaitable[object]] | None = None,
    ) -> int:
        """Create or replace a record; return its version. Two round trips, more if its listings change.

        `write` writes the given Put over what there is, with whatever belongs to
        it, and returns the version or `ABSENT`; by default it is just put.
        `expire` deletes the expired record of that id, which makes way.
        """
        if expected_version is not None and type(expected_version) is not int:
            message = (
                f"expected_version={shown(expected_version)}: use the version of a record, or 0 for none"
            )
            raise InvalidValueError(message)
        record = self._checked(record)
        partition = self.kind.partition(self.kind.id_of(record))
        if expected_version is not None:
            return await self._save(record, partition, expected_version, write, expire)
        async with self._turn(partition).taken(partition):  # of many at once all but one would be refused
            return await self._save(record, partition, None, write, expire)

    async def _save(
        self,
        record: R,
        partition: str,
        expected_version: int | None,
        write: Callable[[Loaded[R], Put], Awaitable[int | None]] | None,
        expire: Callable[[str], Awaitable[object]] | None,
    ) -> int:
        hints = self.kind.hints(record)
        body = RecordBody()
        await self.store.fill(partition, body, record.to_mapping())
        # The hints may go out before the record is known, all but those that
        # the record does not have yet (below).
        current, _ = await asyncio.gather(
            self.load(self.kind.id_of(record)), self.put_hints(self.kind.id_of(record), hints)
        )
        tries = Tries(partition)
        while True:
            if expire is not None and current.record is not None and self.expired(current.record):
                await expire(self.kind.id_of(record))
                current = await self.load(self.kind.id_of(record))
            live = current.version if current.record is not None else ABSENT
            if expected_version is not None and expected_version != live:
                await self._drop_chunks(partition, body)
                message = f"the version is {live}, not {shown(expected_version)}"
                raise ConflictError(message, partition=partition)
            old = {} if current.record is None else self.kind.hints(current.record)
            gone = [key for key in old if key not in hints]
            new = {key: place for key, place in hints.items() if key not in old}
            if new and current.body is not None:
                # Whoever took this record out of a listing removes the hint only
                # under the version that it had before he changed the record. We
                # have read what he made of it, so a hint put now has another
                # version, and stays.
                await self.put_hints(self.kind.id_of(record), new)
            removals = await self._removals(gone)
            put = Put(RECORD, pack(body), current.version)
            version: int | None
            if write is not None:
                version = await write(current, put)
            else:
                version = await self.store.coalescer.write(partition, [put])
            if version:
                await self._remove_hints(removals)
                await self._drop_chunks(partition, current.body)
                return version
            await tries.another()
            await self.store.refill(partition, body, record.to_mapping())
            current = await self.load(self.kind.id_of(record))

    async def update(
        self,
        id: str,
        change: Callable[[R], None],
        *,
        missing: str,
        save: Callable[..., Awaitable[int]] | None = None,
    ) -> R:
        """Read, change and save a record until nobody interferes; return it as saved.

        `save` is called as `self.save` is, which is the default.
        """
        partition = self.kind.partition(id)
        async with self._turn(partition).taken(partition):
            tries = Tries(partition)
            while True:
                record = await self.find(id)
                if record is None:
                    raise NotFoundError(missing, partition=partition)
                change(record)
                try:
                    record.version = await (save or self.save)(record, expected_version=record.version)
                except ConflictError:
                    await tries.another()
                else:
                    return record

    def _turn(self, partition: str) -> _Turn:
        turn = self._turns.get(partition)
        if turn is None:
            turn = self._turns[partition] = _Turn()
        return turn

    async def delete(
        self,
        id: str,
        *,
        cascade: bool = False,
        only: Callable[[R], bool] | None = None,
        bury: Callable[[Loaded[R], Put], Any] | None = None,
    ) -> Loaded[R] | None:
        """Replace a record by a tombstone; return what it was, None if there was nothing.

        `cascade` is noted in the tombstone until `finish` is called, so that
        `repair` can go on after a crash. `bury` writes the given Put, with more
        if it likes, and returns the version, `ABSENT` if refused, or None if
        there is nothing to delete; without it the Put is written over a record.
        `only` must be true of the record. A record that cannot be read is
        deleted too, as its listings would fail for ever; with `only` it raises.
        """
        partition = self.kind.partition(id)
        tries = Tries(partition)
        while True:
            current = await self._load_what_is_there(partition)
            if only is not None:
                if current.fault is not None:
                    raise current.fault
                if current.record is None or not only(current.record):
                    return None
            removals = await self._removals([] if current.record is None else self.kind.hints(current.record))
            tombstone = RecordBody(deleted=self.store.clock(), cascade=cascade)
            put = Put(RECORD, pack(tombstone), current.version)
            version: int | None
            if bury is not None:
                version = await bury(current, put)
            elif current.there:
                version = await self.store.coalescer.write(partition, [put])
            else:
                version = None
            if version is None:
                return None
            if version:
                await self._remove_hints(removals)
                await self._drop_chunks(partition, current.body)
                return replace(current, version=version)
            await tries.another()

    async def finish(self, partition: str, version: int) -> None:
        """Note in the tombstone of `version` that the children are gone."""
        body = RecordBody(deleted=self.store.clock())
        # Refused: it was saved again meanwhile, which is no business of ours.
        await self.store.coalescer.write(partition, [Put(RECORD, pack(body), version)])

    # ---- listings

    async def page(
        self, place: Place, *, limit: int | None = None, cursor: str | None = None, expired: bool = False
    ) -> Listing[R]:
        """Return the records listed at `place`, newest first, ties by id; with `expired`, those over too."""
        if limit is not None and (not isinstance(limit, int) or isinstance(limit, bool) or limit < 0):
            message = f"limit={shown(limit)}: use a whole number from 0 on, or None for all"
            raise InvalidValueError(message)
        check_cursor(cursor)
        start = place.prefix if cursor is None else after(place.prefix + cursor)
        end = prefix_end(place.prefix) if place.prefix else None
        found: Listing[R] = Listing(cursor=cursor)
        read = 0
        while limit is None or len(found) < limit:
            wanted = next_page(limit, len(found), read)
            page = await self.store.coalescer.scan(place.partition, start, end, limit=wanted)
            read += len(page.entries)
            hints = [self.store.unpack(self.hint_decoder, place.partition, entry) for entry in page.entries]
            records = await self.find_many([hint.id for hint in hints], expired=expired)
            for index, (entry, record) in enumerate(zip(page.entries, records, strict=True)):
                if record is not None and Key(place.partition, entry.key) in self.kind.hints(record):
                    found.append(record)
                    found.cursor = entry.key[len(place.prefix) :]
                    if len(found) == limit:
                        if index == len(page.entries) - 1 and not page.more:
                            found.cursor = None
                        return found
            if not page.more:
                found.cursor = None
                break
            start = after(page.entries[-1].key)
        return found

    def listed_at(self, place: Place) -> Callable[[R], bool]:
        """Return what tells whether a record belongs to the listing `place`."""
        return lambda record: any(found[:2] == place[:2] for found in self.kind.places(record))

    async def count(self, place: Place) -> int:
        """Return how many records are listed at `place`. Reads all of them, a page at a time."""
        count, cursor = 0, None
        while True:
            page = await self.page(place, limit=MAX_GET_KEYS - 1, cursor=cursor)
            count += len(page)
            cursor = page.cursor
            if cursor is None:
                return count

    async def put_hints(self, id: str, hints: Mapping[Key, Place]) -> None:
        """Put entries of listings: one driver call, whatever the partitions."""
        at = self.store.clock()
        by_partition: dict[str, list[Op]] = {}
        for key, place in hints.items():
            put = Put(key.key, pack(HintBody(at=at, id=id, of=place.of)))
            by_partition.setdefault(key.partition, []).append(put)
        await asyncio.gather(
            *(
                self.store.coalescer.write(partition, ops, hint=True)
                for partition, ops in by_partition.items()
            )
        )

    async def _removals(self, keys: Iterable[Key]) -> list[tuple[Key, Entry]]:
        keys = list(keys)
        entries = await self.store.coalescer.get(keys)
        return [(key, entry) for key, entry in zip(keys, entries, strict=True) if entry is not None]

    async def _remove_hints(self, removals: Sequence[tuple[Key, Entry]]) -> None:
        # Refused: somebody has put the hint again since; it is his.
        await asyncio.gather(
            *(
                self.store.coalescer.write(key.partition, [Delete(key.key, entry.version)], hint=True)
                for key, entry in removals
            )
        )

    # ---- encoding

    def _checked(self, record: R | Mapping[str, Any]) -> R:
        if isinstance(record, Mapping):
            record = self.kind.type.from_mapping(record)
        elif isinstance(record, self.kind.type):
            record = self.kind.type.from_mapping(record.to_mapping())
        else:
            message = f"a {self.kind.type.__name__} is needed, not {type(record).__name__}"
            raise InvalidValueError(message)
        for field in ("created_at", "updated_at", "expires_at"):
            if not -_INT64 <= (getattr(record, field, 0) or 0) < _INT64:
                message = f"{field}={shown(getattr(record, field))}: use milliseconds within 64 bits"
                raise InvalidValueError(message)
        return record

    async def _record(self, partition: str, entry: Entry, *, expired: bool = False) -> R | None:
        try:
            body = self._plain.decode(entry.value)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            pass  # told apart below, as is whatever else is out of the ordinary
        else:
            record = body.v
            if (
                type(record) is self.kind.type
                and not (record.extra or record.version or body.t)
                and body.f == FORMAT
            ):
                record.version = entry.version
                return None if self.kind.expires_at and not expired and self.expired(record) else record
        found = (await self._loaded(partition, entry)).record
        return None if found is None or (not expired and self.expired(found)) else found

    async def _load_what_is_there(self, partition: str) -> Loaded[R]:
        (entry,) = await self.store.coalescer.get([Key(partition, RECORD)])
        if entry is None:
            return Loaded(None, None, ABSENT)
        try:
            return await self._loaded(partition, entry)
        except CorruptRecordError as error:
            return Loaded(None, None, entry.version, error)

    async def _loaded(self, partition: str, entry: Entry) -> Loaded[R]:
        body = self._unpack(partition, entry)
        if body.deleted is not None:
            return Loaded(None, body, entry.version)
        try:
            fields = await self.store.value(partition, RECORD, body)
        except MissingChunkError:
            (again,) = await self.store.coalescer.get([Key(partition, RECORD)])
            if again is None or again.version == entry.version:
                raise
            return await self._loaded(partition, again)
        try:
            record = self.kind.type.from_mapping(fields)
        except (InvalidValueError, AttributeError, TypeError) as error:
            message = f"what is stored is no {self.kind.type.__name__}: {error}"
            raise CorruptRecordError(message, partition=partition, key=RECORD) from error
        record.version = entry.version
        return Loaded(record, body, entry.version)

    def _unpack(self, partition: str, entry: Entry) -> RecordBody:
        return self.store.unpack(self._records, partition, entry)

    async def _drop_chunks(self, partition: str, body: RecordBody | None) -> None:
        if body is not None:
            await self.store.drop_chunks(partition, [body.c])


def _plain_decoder(record: type[R]) -> msgspec.json.Decoder[Any]:
    """Return a decoder of stored records of this type, all in one go. It refuses unknown fields."""
    return msgspec.json.Decoder(
        msgspec.defstruct("_Plain", [("v", record | UnsetType, UNSET)], bases=(RecordBody,))
    )
