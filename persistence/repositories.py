"""Containers, images, sessions, prototypes and LLM providers."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from collections.abc import Collection as AbstractCollection
from contextlib import suppress
from datetime import datetime
from functools import partial
from typing import Any

import msgspec

from persistence.calls import Repository, public, public_change
from persistence.coalescer import CALL, Tries, some_at_once
from persistence.collection import Collection, HintBody, Kind, Listing, Loaded, Place
from persistence.deadlines import Deadlines
from persistence.driver import ABSENT, Delete, Entry, Key, Op, Put
from persistence.errors import (
    ConflictError,
    CorruptRecordError,
    InvalidValueError,
    NotFoundError,
    OutcomeUnknownError,
    PersistenceError,
    UnavailableError,
    shown,
)
from persistence.ids import as_ms
from persistence.keys import MAX_NUMBER, encode_id
from persistence.log import APPEND_BYTES, APPEND_ENTRIES, COPIED, Item, Log, Span, Tail
from persistence.records import (
    ContainerRecord,
    ImageRecord,
    LLMProviderRecord,
    PrototypeRecord,
    SessionRecord,
)
from persistence.store import Store, pack

__all__ = [
    "Containers",
    "Deleted",
    "Images",
    "LLMProviders",
    "Prototypes",
    "Sessions",
    "StoredMessage",
]

_PAGE = 500
_PAGE_BYTES = 16 << 20  # one longer message is a page of its own

CONTAINERS = Kind("container", ContainerRecord, "container_id", lambda record: (Place("index/containers"),))
IMAGES = Kind(
    "image",
    ImageRecord,
    "image_id",
    lambda record: (
        Place("index/images"),
        _images_by_name(record.name),
        _in_container(record.container_id, "image/"),
    ),
)
SESSIONS = Kind(
    "session",
    SessionRecord,
    "session_id",
    lambda record: (
        Place("index/sessions"),
        _in_container(record.container_id, "session/"),
        _sessions_of_image(record.image_id),
    ),
    lambda record: record.expires_at,
)
PROTOTYPES = Kind(
    "prototype",
    PrototypeRecord,
    "prototype_id",
    lambda record: (Place("index/prototypes"), _in_container(record.container_id, "prototype/")),
)
LLM_PROVIDERS = Kind(
    "llm-provider",
    LLMProviderRecord,
    "id",
    lambda record: (Place("index/llm-providers"), _in_container(record.container_id, "llm-provider/")),
)


def _images_by_name(name: str) -> Place:
    return Place(f"index/images-by-name/{encode_id(name, 'name')}", "", name)


def _in_container(container_id: str, prefix: str) -> Place:
    return Place(f"container/{encode_id(container_id, 'container_id')}", prefix, container_id)


def _sessions_of_image(image_id: str) -> Place:
    return Place(f"image/{encode_id(image_id, 'image_id')}", "session/", image_id)


class Deleted(msgspec.Struct, frozen=True, kw_only=True):
    """What a delete removed, counted by kind. False where there was nothing to remove; `+` adds two."""

    containers: int = 0
    images: int = 0
    sessions: int = 0
    messages: int = 0
    prototypes: int = 0
    llm_providers: int = 0

    def __bool__(self) -> bool:
        return any(getattr(self, field) for field in self.__struct_fields__)

    def __add__(self, other: Deleted) -> Deleted:
        return Deleted(
            **{field: getattr(self, field) + getattr(other, field) for field in self.__struct_fields__}
        )


class StoredMessage(msgspec.Struct, frozen=True):
    """A message as it is stored: its number in the session, when it was added (ms), and itself."""

    seq: int
    created_at: int
    message: dict[str, Any]


class Sessions(Repository):
    """Sessions and their messages. What all calls have in common, `Persistence` says."""

    def __init__(self, store: Store) -> None:
        super().__init__(store)
        self.records = Collection(store, SESSIONS)
        self.log = Log(store, "message/", self._expires_at)
        self._deadlines = Deadlines(store)

    # ---- records

    @public_change
    async def save_session(
        self,
        record: SessionRecord | Mapping[str, Any],
        *,
        expected_version: int | None = None,
        timeout: float | None = None,
    ) -> int:
        """Create or replace a session; return the version of its record. Its messages stay.

        After a delete this starts the session anew, without messages. Whether
        image and container exist is not checked. Raises `ConflictError` if
        `expected_version` (0: there must be none) is not the present one.

        With `expires_at` (milliseconds) the session goes at that time: from
        then on it is not found, listed or read, and takes no messages; to save
        it starts it anew. `delete_expired` and `repair` free its space. A time
        that is given, or is sooner than before, takes a number as `clear_messages` does.
        """
        return await self._save(record, expected_version)

    @public
    async def find_session_by_id(
        self, session_id: str, *, timeout: float | None = None
    ) -> SessionRecord | None:
        """Return the session, None if there is none."""
        return await self.records.find(session_id)

    @public
    async def find_session_by_image_id(
        self, image_id: str, *, timeout: float | None = None
    ) -> SessionRecord | None:
        """Return the most recent session of an image (by `created_at`), None if there is none."""
        page = await self.records.page(_sessions_of_image(image_id), limit=1)
        return page[0] if page else None

    @public
    async def find_sessions_by_image_id(
        self,
        image_id: str,
        *,
        limit: int | None = None,
        cursor: str | None = None,
        timeout: float | None = None,
    ) -> Listing[SessionRecord]:
        """Return the sessions of an image, newest first."""
        return await self.records.page(_sessions_of_image(image_id), limit=limit, cursor=cursor)

    @public
    async def find_sessions_by_container_id(
        self,
        container_id: str,
        *,
        limit: int | None = None,
        cursor: str | None = None,
        timeout: float | None = None,
    ) -> Listing[SessionRecord]:
        """Return the sessions of a container, newest first."""
        return await self.records.page(_in_container(container_id, "session/"), limit=limit, cursor=cursor)

    @public
    async def find_all_sessions(
        self, *, limit: int | None = None, cursor: str | None = None, timeout: float | None = None
    ) -> Listing[SessionRecord]:
        """Return all sessions, newest first."""
        return await self.records.page(Place("index/sessions"), limit=limit, cursor=cursor)

    @public
    async def count_sessions(
        self,
        *,
        container_id: str | None = None,
        image_id: str | None = None,
        timeout: float | None = None,
    ) -> int:
        """Count the sessions: all, of a container, or of an image. Reads each record once."""
        if container_id is not None and image_id is not None:
            message = "give container_id= or image_id=, not both"
            raise InvalidValueError(message)
        place = Place("index/sessions")
        if container_id is not None:
            place = _in_container(container_id, "session/")
        elif image_id is not None:
            place = _sessions_of_image(image_id)
        return await self.records.count(place)

    @public
    async def session_exists(self, session_id: str, *, timeout: float | None = None) -> bool:
        """Tell whether the session has a record."""
        return await self.records.exists(session_id)

    @public_change
    async def delete_session(self, session_id: str, *, timeout: float | None = None) -> Deleted:
        """Delete a session with its messages; return what that removed, nothing if there is none.

        Gone at once, in one Write. A message that a slow writer adds later is
        refused with `NotFoundError`, until the session is saved again.
        """
        return await self._delete(session_id)

    @public_change
    async def set_expiry(
        self, session_id: str, expires_at: int | datetime | None, *, timeout: float | None = None
    ) -> SessionRecord:
        """Say when a session is to go (in milliseconds if a number), or with None that it stays.

        Returns its record; what that means, `save_session` says. Raises
        `NotFoundError` if there is no such session.
        """
        at = None if expires_at is None else as_ms(expires_at, "expires_at")

        def change(record: SessionRecord) -> None:
            record.expires_at = at

        missing = f"no session {shown(session_id)}; `save_session` makes one"
        return await self.records.update(session_id, change, missing=missing, save=self._save)

    @public_change
    async def delete_expired(self, *, timeout: float | None = None) -> Deleted:
        """Delete the sessions whose time has come, with their messages; return what that removed."""
        return await self._sweep()

    @public_change
    async def fork_session(
        self,
        session_id: str,
        *,
        new_session_id: str | None = None,
        through: int | None = None,
        image_id: str | None = None,
        container_id: str | None = None,
        timeout: float | None = None,
    ) -> SessionRecord:
        """Copy a session with its messages, all or those up to number `through`; return the copy.

        The copy numbers its messages from 1, names its source, and does not
        depend on it. It is of `image_id` and `container_id`, by default of those of its
        source. Its record comes last: without it, the fork did not
        happen; what was copied until it was interrupted, `repair` removes after
        an hour. Raises `NotFoundError` without a source, `ConflictError` if
        `new_session_id` was used before, be it by a fork that was interrupted,
        or if the source was truncated meanwhile.
        """
        return await self._fork(session_id, new_session_id, through, image_id, container_id)

    # ---- messages

    @public
    async def add_message(
        self,
        session_id: str,
        message: Mapping[str, Any],
        *,
        idempotency_key: str | None = None,
        expected_last: int | None = None,
        timeout: float | None = None,
    ) -> int:
        """Append a message; return its number. One round trip, whatever the session's length.

        The session need not have been saved, but a deleted one refuses
        (`NotFoundError`). A second call with the same `idempotency_key` adds
        nothing and returns the first number, even if that message was truncated
        since: an answer that is made anew needs a new key. Put no content into
        it: it stays, legibly, until `repair` forgets the deleted session.
        `expected_last` is the number of the last visible message, 0 for none;
        `ConflictError` if it is another.
        """
        partition = SESSIONS.partition(session_id)
        once = None if idempotency_key is None else encode_id(idempotency_key, "idempotency_key")
        item = await self._item(partition, message)
        return await self.log.append(
            partition, [item], once=once, expected_last=_number(expected_last, "expected_last")
        )

    @public
    async def add_messages(
        self,
        session_id: str,
        messages: Iterable[Mapping[str, Any]],
        *,
        idempotency_key: str | None = None,
        expected_last: int | None = None,
        timeout: float | None = None,
    ) -> list[int]:
        """Append messages in order; return their numbers. Of none, nothing is checked.

        Atomic up to 900 messages and 3 MiB. More go batch by batch; an error
        then has the count of those stored as its `stored`. The other arguments
        are those of `add_message`; `ConflictError` if the `idempotency_key` was
        used for another count of messages in one of the batches.
        """
        partition = SESSIONS.partition(session_id)
        once = None if idempotency_key is None else encode_id(idempotency_key, "idempotency_key")
        expected = _number(expected_last, "expected_last")
        if not isinstance(messages, Iterable):
            text = f"messages must be a list of mappings, not {type(messages).__name__}"
            raise InvalidValueError(text, partition=partition)
        numbers: list[int] = []
        batches = 0
        call = CALL.get()
        if call is not None:
            call.stored = 0
        try:
            async for batch in self._batches(partition, ((message, None) for message in messages)):
                part = once if once is None or not batches else f"{once}/{batches}"
                first = await self.log.append(partition, batch, once=part, expected_last=expected)
                numbers.extend(range(first, first + len(batch)))
                batches += 1
                if call is not None:
                    call.stored = len(numbers)
                if expected is not None:
                    expected = numbers[-1]
        except PersistenceError as error:
            error.stored = len(numbers)
            raise
        return numbers

    @public
    async def get_messages(
        self,
        session_id: str,
        *,
        last: int | None = None,
        after: int | None = None,
        before: int | None = None,
        limit: int | None = None,
        timeout: float | None = None,
    ) -> list[dict[str, Any]]:
        """Return the visible messages, oldest first, just as they were given.

        `last`: the last ones, that many. `after`, `before`: those behind or
        ahead of a number; `limit` keeps that many, the nearest to it. Without
        them: all, or the first `limit`. No session, no messages: an empty list.
        `CorruptRecordError` if one of them cannot be read.
        """
        return [item.value for item in await self._read(session_id, last, after, before, limit)]

    @public
    async def read_messages(
        self,
        session_id: str,
        *,
        last: int | None = None,
        after: int | None = None,
        before: int | None = None,
        limit: int | None = None,
        timeout: float | None = None,
    ) -> list[StoredMessage]:
        """Return what `get_messages`, with the same arguments, returns, each with its number and time."""
        items = await self._read(session_id, last, after, before, limit)
        return [StoredMessage(item.number, item.at, item.value) for item in items]

    @public
    async def count_messages(self, session_id: str, *, timeout: float | None = None) -> int:
        """Count the visible messages. Reads one entry."""
        tail = await self.log.tail(SESSIONS.partition(session_id))
        return 0 if self.log.gone(tail) else tail.visible

    @public_change
    async def clear_messages(
        self, session_id: str, *, expected_last: int | None = None, timeout: float | None = None
    ) -> int:
        """Remove all messages, at once; return how many. Numbers go on, they do not start again.

        0 where there is no session, or none that has messages. `expected_last`:
        as for `add_message`, so that nothing goes that the caller has not seen.
        """
        expected = _number(expected_last, "expected_last")
        return await self.log.cut(SESSIONS.partition(session_id), None, expected)

    @public_change
    async def truncate_after_message(
        self,
        session_id: str,
        message_id: str | None = None,
        *,
        seq: int | None = None,
        expected_last: int | None = None,
        timeout: float | None = None,
    ) -> int:
        """Remove the messages after one, not that one itself; return how many.

        The one is the last visible message whose ``id`` is `message_id`, or
        the visible message number `seq`, which needs no search. Raises
        `NotFoundError` if there is no such message. `expected_last`: as for
        `add_message`, so that nothing goes that the caller has not seen.
        """
        partition = SESSIONS.partition(session_id)
        expected = _number(expected_last, "expected_last")
        if (message_id is None) == (seq is None):
            message = "give either a message id or seq="
            raise InvalidValueError(message, partition=partition)
        if seq is None:
            seq = await self._find_message(partition, message_id)
        return await self.log.cut(partition, _number(seq, "seq"), expected)

    # ---- behind the calls

    async def _save(
        self,
        record: SessionRecord | Mapping[str, Any],
        expected_version: int | None = None,
        *,
        forked: bool = False,
    ) -> int:
        """Do what `save_session` does; `ConflictError` if it is `forked` and something of it was hidden."""

        replaced = 0

        async def write(current: Loaded[SessionRecord], put: Put) -> int | None:
            async def make(tail: Tail) -> tuple[Op, ...]:
                nonlocal replaced
                replaced = tail.marker if sooner and not tail.deleted else 0
                if forked and tail.marker:
                    message = "messages of it were removed while it was forked"
                    raise ConflictError(message, partition=partition)
                if tail.deleted:
                    return put, self.log.marker(tail, "restore", [], expires_at)
                if sooner:
                    spans = await self.log.spans(partition, tail)
                    return put, self.log.marker(tail, "cut", spans, expires_at)
                return (put,)

            before = None if current.record is None else current.record.expires_at
            sooner = expires_at is not None and (before is None or expires_at < before)
            if forked or sooner or (current.body is not None and current.record is None):
                return await self.log.edit(partition, make)
            return await self._store.coalescer.write(partition, [put])

        if isinstance(record, Mapping):
            record = SessionRecord.from_mapping(record)
        partition = SESSIONS.partition(getattr(record, "session_id", ""))
        expires_at = getattr(record, "expires_at", None)
        if expires_at is not None:
            if not isinstance(expires_at, int):
                message = f"expires_at={shown(expires_at)}: a record has Unix milliseconds"
                raise InvalidValueError(message)
            await self._deadlines.put(partition, as_ms(expires_at, "expires_at"))
        version = await self.records.save(
            record,
            expected_version=expected_version,
            write=write,
            expire=partial(self._delete, only=self.records.expired),
        )
        if replaced:
            with suppress(UnavailableError, OutcomeUnknownError):  # it is saved; `repair` does the rest
                await self.log.empty(partition, [(replaced, replaced)])
        return version

    async def _expires_at(self, partition: str) -> int | None:
        record = (await self.records.load_partition(partition)).record
        return 0 if record is None else record.expires_at

    async def _sweep(self) -> Deleted:
        """Do what `delete_expired` does."""
        removed = Deleted()

        async def expire(partition: str) -> Deleted:
            nonlocal removed
            gone = await self._expire(partition)
            removed += gone
            return gone

        await self._deadlines.sweep(SESSIONS.name, expire)
        return removed

    async def _expire(self, partition: str) -> Deleted:
        """Delete the session of `partition` if its time has come; return what that removed."""
        record = (await self.records.load_partition(partition)).record
        if record is None:
            return Deleted()
        return await self._delete(record.session_id, only=self.records.expired)

    async def _delete(
        self,
        session_id: str,
        *,
        only: Callable[[SessionRecord], bool] | None = None,
        unsaved: bool = False,
    ) -> Deleted:
        """Do what `delete_session` does; with `unsaved` just if there are messages and no record."""
        partition = SESSIONS.partition(session_id)
        removed: int | None = None  # unknown, if the last message cannot be read

        async def bury(current: Loaded[SessionRecord], put: Put) -> int | None:
            nonlocal removed
            if unsaved and current.there:
                return None

            async def make(tail: Tail) -> tuple[Op, ...] | None:
                nonlocal removed
                if not current.there and (tail.deleted or not tail.number):
                    return None
                removed = tail.visible
                return put, self.log.marker(tail, "delete", [])

            try:
                return await self.log.edit(partition, make)
            except CorruptRecordError:
                removed = None
                return await self.log.end_unread(partition, put)

        deleted = await self.records.delete(session_id, only=only, bury=bury)
        if deleted is None:
            return Deleted()
        emptied = await self.log.empty(partition, await self.log.hidden(partition), unread=MAX_NUMBER)
        return Deleted(sessions=int(deleted.there), messages=emptied if removed is None else removed)

    async def _fork(
        self,
        session_id: str,
        new_session_id: str | None,
        through: int | None,
        image_id: str | None,
        container_id: str | None,
    ) -> SessionRecord:
        source = await self.records.find(session_id)
        if source is None:
            message = f"no session {session_id!r:.80}; `save_session` makes one"
            raise NotFoundError(message, partition=SESSIONS.partition(session_id))
        new_id = _new_id("sess", self._store, new_session_id, "new_session_id")
        above, copies = await self._copy(session_id, new_id, through)
        now = self._store.clock()
        # Listed before its source, be it of the same millisecond or of a clock that is a little ahead.
        now = max(now, min(source.created_at + 1, now + 1_000))
        record = SessionRecord(
            session_id=new_id,
            image_id=source.image_id if image_id is None else image_id,
            container_id=source.container_id if container_id is None else container_id,
            parent_session_id=session_id,
            parent_seq=above,
            created_at=now,
            updated_at=now,
            extra=source.extra,
        )
        try:
            record.version = await self._save(record, ABSENT, forked=True)
        except ConflictError:  # it has become somebody else's session
            await self.log.take_back(SESSIONS.partition(new_id), copies)
            raise
        return record

    async def _copy(self, session_id: str, new_id: str, through: int | None) -> tuple[int, Span]:
        """Copy messages into a session that was never used; return the last one's number, and the copies'."""
        partition = SESSIONS.partition(new_id)
        used = f"the session id {new_id!r} was used before"
        if (await self.records.load(new_id)).version or (await self.log.tail(partition)).number:
            raise ConflictError(used, partition=partition)
        origin = SESSIONS.partition(session_id)
        begun = await self.log.tail(origin)
        last = begun.number if through is None else min(_number(through, "through") or 0, begun.number)
        once = COPIED + self._store.ids()  # tells `repair` what a fork that was killed has left
        above, copies = 0, (0, 0)
        try:
            while above < last:
                page = await self.log.read(origin, above=above, below=last + 1, limit=_PAGE, most=_PAGE_BYTES)
                end = await self.log.tail(origin)
                if self.log.gone(end):
                    message = f"session {session_id!r:.80} was deleted, or its time was up"
                    raise NotFoundError(message, partition=origin)
                if end.marker != begun.marker:
                    message = f"session {session_id!r:.80} was truncated while it was copied: fork it again"
                    raise ConflictError(message, partition=origin)
                if not page:
                    break
                async for batch in self._batches(partition, ((item.value, item.at) for item in page)):
                    stop = copies[1]
                    first = await self.log.append(partition, batch, once=f"{once}/{stop}", expected_last=stop)
                    copies = (copies[0] or first, first + len(batch) - 1)
                    if first != stop + 1:  # others have added some since we looked, and hidden them
                        raise ConflictError(used, partition=partition)
                above = page[-1].number
        except (ConflictError, NotFoundError):  # what others append there stays
            await self.log.take_back(partition, copies)
            raise
        return above, copies

    async def _batches(
        self, partition: str, messages: Iterable[tuple[Mapping[str, Any], int | None]]
    ) -> AsyncIterator[list[Item]]:
        """Make entries of messages and their times; yield as many at once as one append can add."""
        batch: list[Item] = []
        size = 0
        for message, at in messages:
            item = await self._item(partition, message, at)
            if batch and (len(batch) == APPEND_ENTRIES or size + item.size > APPEND_BYTES):
                yield batch
                batch, size = [], 0
            batch.append(item)
            size += item.size
        if batch:
            yield batch

    async def _item(self, partition: str, message: Mapping[str, Any], at: int | None = None) -> Item:
        if type(message) is not dict:
            if not isinstance(message, Mapping):
                text = f"a message must be a mapping, not {type(message).__name__}"
                raise InvalidValueError(text, partition=partition)
            message = dict(message)
        return await self.log.item(partition, message, at)

    async def _read(
        self, session_id: str, last: int | None, after: int | None, before: int | None, limit: int | None
    ) -> list[Any]:
        if sum(bound is not None for bound in (last, after, before)) > 1 or (
            last is not None and limit is not None
        ):
            message = "give one of last=, after= and before=; limit= goes with the latter two"
            raise InvalidValueError(message)
        return await self.log.read(
            SESSIONS.partition(session_id),
            above=_number(after, "after") or 0,
            below=_number(before, "before"),
            limit=_number(limit, "limit") if last is None else _number(last, "last"),
            newest=last is not None or before is not None,
        )

    async def _find_message(self, partition: str, message_id: str | None) -> int:
        below = None
        while page := await self.log.read(partition, below=below, limit=_PAGE, most=_PAGE_BYTES, newest=True):
            for item in reversed(page):
                if item.value.get("id") == message_id:
                    return int(item.number)
            below = page[0].number
        message = f"no visible message has the id {shown(message_id)}"
        raise NotFoundError(message, partition=partition)


class Images(Repository):
    """Images: configured agents. What all calls have in common, `Persistence` says."""

    def __init__(self, store: Store, sessions: Sessions) -> None:
        super().__init__(store)
        self.records = Collection(store, IMAGES)
        self._sessions = sessions

    @public_change
    async def save_image(
        self,
        record: ImageRecord | Mapping[str, Any],
        *,
        expected_version: int | None = None,
        timeout: float | None = None,
    ) -> int:
        """Create or replace an image; return its version.

        Raises `ConflictError` if `expected_version` (0: there must be none) is not the present one.
        """
        return await self.records.save(record, expected_version=expected_version)

    @public
    async def find_image_by_id(self, image_id: str, *, timeout: float | None = None) -> ImageRecord | None:
        """Return the image, None if there is none."""
        return await self.records.find(image_id)

    @public
    async def find_all_images(
        self, *, limit: int | None = None, cursor: str | None = None, timeout: float | None = None
    ) -> Listing[ImageRecord]:
        """Return all images, newest first."""
        return await self.records.page(Place("index/images"), limit=limit, cursor=cursor)

    @public
    async def find_images_by_name(
        self,
        name: str,
        *,
        limit: int | None = None,
        cursor: str | None = None,
        timeout: float | None = None,
    ) -> Listing[ImageRecord]:
        """Return the images with exactly this name, newest first."""
        return await self.records.page(_images_by_name(name), limit=limit, cursor=cursor)

    @public
    async def find_images_by_container_id(
        self,
        container_id: str,
        *,
        limit: int | None = None,
        cursor: str | None = None,
        timeout: float | None = None,
    ) -> Listing[ImageRecord]:
        """Return the images of a container, newest first."""
        return await self.records.page(_in_container(container_id, "image/"), limit=limit, cursor=cursor)

    @public
    async def count_images(
        self, *, name: str | None = None, container_id: str | None = None, timeout: float | None = None
    ) -> int:
        """Count the images: all, of a name, or of a container. Reads each record once."""
        if name is not None and container_id is not None:
            message = "give name= or container_id=, not both"
            raise InvalidValueError(message)
        place = Place("index/images")
        if name is not None:
            place = _images_by_name(name)
        elif container_id is not None:
            place = _in_container(container_id, "image/")
        return await self.records.count(place)

    @public
    async def image_exists(self, image_id: str, *, timeout: float | None = None) -> bool:
        """Tell whether there is such an image."""
        return await self.records.exists(image_id)

    @public_change
    async def update_metadata(
        self,
        image_id: str,
        metadata: Mapping[str, Any],
        *,
        remove: AbstractCollection[str] = (),
        timeout: float | None = None,
    ) -> ImageRecord:
        """Merge `metadata` into that of an image, drop the keys in `remove`, touch `updated_at`.

        Concurrent calls lose nothing of each other. Raises `NotFoundError` if there is no such image.
        """

        if not isinstance(metadata, Mapping):
            message = f"metadata must be a mapping, not {type(metadata).__name__}"
            raise InvalidValueError(message)
        if isinstance(remove, str | bytes) or not isinstance(remove, AbstractCollection):
            message = f"remove={shown(remove)}: use a list of keys"
            raise InvalidValueError(message)

        def change(record: ImageRecord) -> None:
            kept = {key: value for key, value in (record.metadata or {}).items() if key not in remove}
            record.metadata = {**kept, **metadata}
            record.updated_at = self._store.clock()

        encode_id(image_id, "image_id")  # told before it stands in a message
        return await self.records.update(image_id, change, missing=f"Image not found: {image_id}")

    @public_change
    async def delete_image(
        self, image_id: str, *, cascade: bool = True, timeout: float | None = None
    ) -> Deleted:
        """Delete an image and, with `cascade`, its sessions; return what that removed."""
        return await self._delete(image_id, cascade=cascade)

    @public_change
    async def fork_image(
        self,
        image_id: str,
        *,
        new_image_id: str | None = None,
        new_session_id: str | None = None,
        name: str | None = None,
        through: int | None = None,
        timeout: float | None = None,
    ) -> ImageRecord:
        """Copy an image with its session, as far as message number `through`; return the copy.

        The copy names its source as `parent_image_id`, and has its name unless `name` says
        otherwise; `new_image_id` and `new_session_id` are made if none are given. Its record comes last.
        Raises `NotFoundError` if there is no such image, `ConflictError` if a new id was used before.
        """
        source = await self.records.find(image_id)
        if source is None:
            message = f"Image not found: {image_id}"
            raise NotFoundError(message, partition=IMAGES.partition(image_id))
        fork_id = _new_id("img", self._store, new_image_id, "new_image_id")
        session_id = _new_id("sess", self._store, new_session_id, "new_session_id")
        if (await self.records.load(fork_id)).version:
            message = f"the image id {fork_id!r} was used before"
            raise ConflictError(message, partition=IMAGES.partition(fork_id))
        if await self._sessions.records.exists(source.session_id):
            await self._sessions._fork(source.session_id, session_id, through, fork_id, source.container_id)
        else:
            try:
                await self._sessions._copy(source.session_id, session_id, through)
            except NotFoundError as error:
                if error.partition != SESSIONS.partition(source.session_id):
                    raise
                # The source was deleted: there is nothing to copy.
        fields = source.to_mapping() | {
            "image_id": fork_id,
            "session_id": session_id,
            "parent_image_id": image_id,
            "created_at": self._store.clock(),
            "updated_at": self._store.clock(),
        }
        fork = ImageRecord.from_mapping(fields if name is None else fields | {"name": name})
        fork.version = await self.records.save(fork, expected_version=ABSENT)
        return fork

    async def _delete(
        self, image_id: str, *, cascade: bool, only: Callable[[ImageRecord], bool] | None = None
    ) -> Deleted:
        children = self._delete_children if cascade else None
        return await _delete_with(children, self.records, image_id, Deleted(images=1), only)

    async def _delete_children(self, partition: str, deleted: ImageRecord | None = None) -> Deleted:
        """Delete the sessions of the image of `partition` until none is left.

        The session that the `deleted` image names may have messages without being saved, and listed.
        """
        removed = Deleted()
        if deleted is not None:
            removed += await self._sessions._delete(deleted.session_id, unsaved=True)
        place = Place(partition, "session/")
        listed = self._sessions.records.listed_at(place)  # one that was moved meanwhile stays

        async def remove(session: SessionRecord) -> None:
            nonlocal removed
            gone = await self._sessions._delete(session.session_id, only=listed)
            removed += gone

        while page := await self._sessions.records.page(place, limit=_PAGE, expired=True):
            await some_at_once(remove, page)
        return removed


class Prototypes(Repository):
    """Prototypes: templates of images. What all calls have in common, `Persistence` says."""

    def __init__(self, store: Store) -> None:
        super().__init__(store)
        self.records = Collection(store, PROTOTYPES)

    @public_change
    async def save_prototype(
        self,
        record: PrototypeRecord | Mapping[str, Any],
        *,
        expected_version: int | None = None,
        timeout: float | None = None,
    ) -> int:
        """Create or replace a prototype; return its version. `expected_version`: see `Images.save_image`."""
        return await self.records.save(record, expected_version=expected_version)

    @public
    async def find_prototype_by_id(
        self, prototype_id: str, *, timeout: float | None = None
    ) -> PrototypeRecord | None:
        """Return the prototype, None if there is none."""
        return await self.records.find(prototype_id)

    @public
    async def find_all_prototypes(
        self, *, limit: int | None = None, cursor: str | None = None, timeout: float | None = None
    ) -> Listing[PrototypeRecord]:
        """Return all prototypes, newest first."""
        return await self.records.page(Place("index/prototypes"), limit=limit, cursor=cursor)

    @public
    async def find_prototypes_by_container_id(
        self,
        container_id: str,
        *,
        limit: int | None = None,
        cursor: str | None = None,
        timeout: float | None = None,
    ) -> Listing[PrototypeRecord]:
        """Return the prototypes of a container, newest first."""
        return await self.records.page(_in_container(container_id, "prototype/"), limit=limit, cursor=cursor)

    @public
    async def prototype_exists(self, prototype_id: str, *, timeout: float | None = None) -> bool:
        """Tell whether there is such a prototype."""
        return await self.records.exists(prototype_id)

    @public_change
    async def delete_prototype(self, prototype_id: str, *, timeout: float | None = None) -> Deleted:
        """Delete a prototype; return what that removed."""
        return await self._delete(prototype_id)

    async def _delete(
        self, prototype_id: str, *, only: Callable[[PrototypeRecord], bool] | None = None
    ) -> Deleted:
        deleted = await self.records.delete(prototype_id, only=only)
        return Deleted(prototypes=int(deleted is not None))


class LLMProviders(Repository):
    """Accounts at providers of language models; one of a container's may be its default.

    The default is one entry of the container, so there is never more than
    one, whoever sets it; `is_default` of a record that is read follows it.
    """

    def __init__(self, store: Store) -> None:
        super().__init__(store)
        self.records = Collection(store, LLM_PROVIDERS)

    @public_change
    async def save_llm_provider(
        self,
        record: LLMProviderRecord | Mapping[str, Any],
        *,
        expected_version: int | None = None,
        timeout: float | None = None,
    ) -> int:
        """Create or replace a provider; return its version. `is_default` makes it the default, or not.

        `expected_version`: see `Images.save_image`.
        """
        if isinstance(record, Mapping):
            record = LLMProviderRecord.from_mapping(record)
        version = await self.records.save(record, expected_version=expected_version)
        if record.is_default:
            await self._choose(record.container_id, record.id)
        else:
            await self._withdraw(await self._chosen(record.container_id, record.id))
        return version

    @public
    async def find_llm_provider_by_id(
        self, id: str, *, timeout: float | None = None
    ) -> LLMProviderRecord | None:
        """Return the provider, None if there is none."""
        found = await self._marked([await self.records.find(id)])
        return found[0] if found else None

    @public
    async def find_all_llm_providers(
        self, *, limit: int | None = None, cursor: str | None = None, timeout: float | None = None
    ) -> Listing[LLMProviderRecord]:
        """Return all providers, newest first."""
        page = await self.records.page(Place("index/llm-providers"), limit=limit, cursor=cursor)
        return Listing(await self._marked(page), cursor=page.cursor)

    @public
    async def find_llm_providers_by_container_id(
        self,
        container_id: str,
        *,
        limit: int | None = None,
        cursor: str | None = None,
        timeout: float | None = None,
    ) -> Listing[LLMProviderRecord]:
        """Return the providers of a container, newest first."""
        page = await self.records.page(
            _in_container(container_id, "llm-provider/"), limit=limit, cursor=cursor
        )
        return Listing(await self._marked(page), cursor=page.cursor)

    @public
    async def find_default_llm_provider(
        self, container_id: str, *, timeout: float | None = None
    ) -> LLMProviderRecord | None:
        """Return the default provider of a container, None if it has none."""
        encode_id(container_id, "container_id")  # told before it is looked up
        (id,) = (await self._defaults([container_id])).values()
        found = None if id is None else await self.records.find(id)
        if found is None or found.container_id != container_id:
            return None
        found.is_default = True
        return found

    @public_change
    async def set_default_llm_provider(self, id: str, *, timeout: float | None = None) -> None:
        """Make a provider the default of its container; raise `NotFoundError` if there is none."""
        found = await self.records.find(id)
        if found is None:
            message = f"no LLM provider {id!r}"
            raise NotFoundError(message, partition=LLM_PROVIDERS.partition(id))
        await self._choose(found.container_id, id)
        await self._touch(id)

    @public
    async def llm_provider_exists(self, id: str, *, timeout: float | None = None) -> bool:
        """Tell whether there is such a provider."""
        return await self.records.exists(id)

    @public_change
    async def delete_llm_provider(self, id: str, *, timeout: float | None = None) -> Deleted:
        """Delete a provider; return what that removed."""
        return await self._delete(id)

    async def _delete(self, id: str, *, only: Callable[[LLMProviderRecord], bool] | None = None) -> Deleted:
        # Read before the record goes, as hints are: who saves it again chooses anew, and that stays.
        chosen = None
        with suppress(CorruptRecordError):  # it may go; whose default it was, nobody knows
            found = await self.records.find(id)
            chosen = None if found is None else await self._chosen(found.container_id, id)
        deleted = await self.records.delete(id, only=only)
        if deleted is None:
            return Deleted()
        await self._withdraw(chosen)
        return Deleted(llm_providers=1)

    async def _marked(self, records: Sequence[LLMProviderRecord | None]) -> list[LLMProviderRecord]:
        found = [record for record in records if record is not None]
        defaults = await self._defaults([record.container_id for record in found])
        for record in found:
            record.is_default = defaults[record.container_id] == record.id
        return found

    async def _defaults(self, container_ids: Iterable[str]) -> dict[str, str | None]:
        containers = list(dict.fromkeys(container_ids))
        keys = [_default_key(container_id) for container_id in containers]
        entries = await self._store.coalescer.get(keys)
        return {
            container_id: None if entry is None else self._pointer(key, entry).id
            for container_id, key, entry in zip(containers, keys, entries, strict=True)
        }

    async def _choose(self, container_id: str, id: str) -> None:
        """Make `id` the default of a container."""
        key = _default_key(container_id)
        tries = Tries(key.partition)
        while True:
            (entry,) = await self._store.coalescer.get([key])
            pointer = HintBody(at=self._store.clock(), id=id, of=container_id)
            put = Put(key.key, pack(pointer), ABSENT if entry is None else entry.version)
            if await self._store.coalescer.write(key.partition, [put]):
                break
            await tries.another()
        if entry is not None:
            with suppress(CorruptRecordError):
                before = self._pointer(key, entry).id
                if before != id:
                    await self._touch(before)

    async def _touch(self, id: str) -> None:
        """Give a record another version: who has read it does not know whether it is the default now."""
        with suppress(CorruptRecordError, NotFoundError):
            await self.records.update(id, lambda record: None, missing="it is gone")

    async def _chosen(self, container_id: str, id: str) -> tuple[Key, int] | None:
        """Return the entry that makes `id` the default of a container, and its version."""
        key = _default_key(container_id)
        (entry,) = await self._store.coalescer.get([key])
        if entry is None or self._pointer(key, entry).id != id:
            return None
        return key, entry.version

    async def _withdraw(self, chosen: tuple[Key, int] | None) -> None:
        """Remove what `_chosen` has found. Refused: another has become the default since."""
        if chosen is not None:
            key, version = chosen
            await self._store.coalescer.write(key.partition, [Delete(key.key, version)], hint=True)

    def _pointer(self, key: Key, entry: Entry) -> HintBody:
        return self._store.unpack(self.records.hint_decoder, key.partition, entry)


def _default_key(container_id: str) -> Key:
    return Key(_in_container(container_id, "").partition, "default-llm-provider")


class Containers(Repository):
    """Containers, and what they hold. What all calls have in common, `Persistence` says."""

    def __init__(
        self,
        store: Store,
        images: Images,
        sessions: Sessions,
        prototypes: Prototypes,
        llm_providers: LLMProviders,
    ) -> None:
        super().__init__(store)
        self.records = Collection(store, CONTAINERS)
        self._images = images
        self._sessions = sessions
        self._prototypes = prototypes
        self._llm_providers = llm_providers

    @public_change
    async def save_container(
        self,
        record: ContainerRecord | Mapping[str, Any],
        *,
        expected_version: int | None = None,
        timeout: float | None = None,
    ) -> int:
        """Create or replace a container; return its version. `expected_version`: see `Images.save_image`."""
        return await self.records.save(record, expected_version=expected_version)

    @public
    async def find_container_by_id(
        self, container_id: str, *, timeout: float | None = None
    ) -> ContainerRecord | None:
        """Return the container, None if there is none."""
        return await self.records.find(container_id)

    @public
    async def find_all_containers(
        self, *, limit: int | None = None, cursor: str | None = None, timeout: float | None = None
    ) -> Listing[ContainerRecord]:
        """Return all containers, newest first."""
        return await self.records.page(Place("index/containers"), limit=limit, cursor=cursor)

    @public
    async def count_containers(self, *, timeout: float | None = None) -> int:
        """Count the containers. Reads each record once."""
        return await self.records.count(Place("index/containers"))

    @public
    async def container_exists(self, container_id: str, *, timeout: float | None = None) -> bool:
        """Tell whether there is such a container."""
        return await self.records.exists(container_id)

    @public_change
    async def delete_container(
        self, container_id: str, *, cascade: bool = True, timeout: float | None = None
    ) -> Deleted:
        """Delete a container and, with `cascade`, all that is in it; return what that removed.

        The container goes first, its content one by one; a session goes with
        the container that its own record names. Interrupted, `repair` goes on.
        """
        children = self._delete_children if cascade else None
        return await _delete_with(children, self.records, container_id, Deleted(containers=1))

    async def _delete_children(self, partition: str, deleted: ContainerRecord | None = None) -> Deleted:
        """Delete what is in the container of `partition` until nothing is left; what is moved away stays."""
        removed = Deleted()
        children: list[tuple[str, Any, Callable[..., Awaitable[Deleted]]]] = [
            ("image/", self._images, partial(self._images._delete, cascade=True)),
            ("session/", self._sessions, self._sessions._delete),
            ("prototype/", self._prototypes, self._prototypes._delete),
            ("llm-provider/", self._llm_providers, self._llm_providers._delete),
        ]
        for prefix, repository, delete in children:
            records: Collection[Any] = repository.records
            place = Place(partition, prefix)
            listed = records.listed_at(place)

            async def remove(id: str, delete: Any = delete, listed: Any = listed) -> None:
                nonlocal removed
                gone = await delete(id, only=listed)
                removed += gone

            while page := await records.page(place, limit=_PAGE, expired=True):
                await some_at_once(remove, map(records.kind.id_of, page))
        return removed


def _new_id(prefix: str, store: Store, given: str | None, what: str) -> str:
    """Return the id that is given, checked, or a new one."""
    if given is None:
        return f"{prefix}_{store.ids()}"
    encode_id(given, what)
    return given


async def _delete_with(
    delete_children: Callable[[str, Any], Awaitable[Deleted]] | None,
    records: Collection[Any],
    id: str,
    own: Deleted,
    only: Callable[[Any], bool] | None = None,
) -> Deleted:
    """Delete a record, which counts as `own`, and its children, even if it is not there (any more).

    With `only`: just if that is true of it.
    """
    deleted = await records.delete(id, cascade=delete_children is not None, only=only)
    if deleted is None and only is not None:
        return Deleted()
    removed = Deleted() if deleted is None else own
    if delete_children is not None:
        partition = records.kind.partition(id)
        removed += await delete_children(partition, None if deleted is None else deleted.record)
        if deleted is not None:
            await records.finish(partition, deleted.version)
    return removed


def _number(value: int | None, what: str) -> int | None:
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= MAX_NUMBER:
        message = f"{what}={shown(value)} is no number or count of messages: use a whole number from 0 on"
        raise InvalidValueError(message)
    return value
