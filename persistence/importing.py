"""Conversations, one a line of JSON, into a store. What the store has decides what is still to be done.

So an import that was interrupted anywhere is resumed by running it again, and
nobody keeps a note of how far it came. A line is compared with the messages
that its session has, and the rest is appended with ``expected_last=``: whoever
else appends to the session meanwhile, nothing is doubled.

``python -m persistence.importing`` imports standard input, message by message,
into the store that PERSISTENCE_URL names, and prints each number of messages
when the store has acknowledged it: the process that ``persistence demo`` kills.
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
import sys
import threading
from collections.abc import AsyncIterable, Callable
from contextlib import closing, suppress
from dataclasses import dataclass
from functools import partial
from queue import SimpleQueue
from typing import Any, BinaryIO, Final, NamedTuple, Self

from persistence.coalescer import Room, backoff
from persistence.codec import encode
from persistence.connect import Persistence, create_persistence
from persistence.driver import Driver
from persistence.errors import (
    ConfigurationError,
    ConflictError,
    CorruptRecordError,
    InvalidKeyError,
    InvalidValueError,
    NotFoundError,
    PersistenceError,
)
from persistence.records import ContainerRecord, ImageRecord, SessionRecord

__all__ = ["Conversation", "Importer", "LineError", "Lines", "keyed", "read_conversation", "standard_input"]

_AT_ONCE: Final = 16  # conversations
_HELD_BYTES: Final = 64 << 20  # of lines; one more may be begun below that
_BATCH: Final = 500
_TRIES: Final = 20

# What concerns one conversation; any other error concerns the store, and ends the import.
_ONE_LINE: Final = (ConflictError, CorruptRecordError, InvalidKeyError, InvalidValueError, NotFoundError)


class LineError(Exception):
    """A line that cannot be imported. Nothing of it was stored."""


class Conversation(NamedTuple):
    """What a line holds: the record of its session, those fields of it that the line gives, the messages."""

    record: SessionRecord
    given: dict[str, Any]
    messages: list[dict[str, Any]]


def read_conversation(
    line: bytes, *, image_id: str = "imported", container_id: str = "imported"
) -> Conversation:
    """Return what `line` holds; `image_id` and `container_id` are for a line without them.

    Raises `LineError` if anything in it could not be stored.
    """
    try:
        given = json.loads(line.decode("utf-8-sig"))  # of bytes, json guesses: UTF-16 as well, and wrongly
    except json.JSONDecodeError as error:
        message = f"no JSON: {error.msg} at column {error.colno}"
        raise LineError(message) from error
    except (ValueError, RecursionError) as error:
        message = f"no JSON that can be read: {error}"
        raise LineError(message) from error
    if not isinstance(given, dict):
        message = 'no JSON object: use {"session_id": …, "messages": […]}'
        raise LineError(message)
    messages = given.pop("messages", None)
    if not isinstance(messages, list):
        message = "'messages' is no list" if messages is not None else "there are no 'messages'"
        raise LineError(message)
    place = "the fields beside the messages"
    try:
        record = SessionRecord.from_mapping({"image_id": image_id, "container_id": container_id} | given)
        encode(given)
        for number, message in enumerate(messages, 1):
            place = f"message {number}"
            if not isinstance(message, dict):
                text = "it is no JSON object"
                raise InvalidValueError(text)
            encode(message)
    except InvalidValueError as error:
        text = f"{place}: {error}"
        raise LineError(text) from error
    return Conversation(record, given, messages)


@dataclass(slots=True)
class Importer:
    """An import into `p`, and what it has done so far.

    `on_problem` is called with the number of a line that could not be imported
    and the reason; `on_line` with the size of each line that is done with;
    `on_stored`, after each append, with the session and how many messages of its
    line are now known to be stored.
    """

    p: Persistence
    image_id: str = "imported"
    container_id: str = "imported"
    batch: int = _BATCH
    on_problem: Callable[[int, str], None] = lambda number, reason: None
    on_line: Callable[[int], None] = lambda size: None
    on_stored: Callable[[str, int], None] = lambda session_id, count: None

    added: int = 0
    """Sessions of which nothing was there."""
    completed: int = 0
    """Sessions of which a part was there."""
    unchanged: int = 0
    """Sessions of which everything was there."""
    messages: int = 0
    """Messages appended."""
    bad: int = 0
    """Lines that could not be imported."""

    _has_home: bool = False

    async def run(self, lines: AsyncIterable[bytes]) -> None:
        """Import `lines`, some at once. Raises the error that made it impossible to go on."""
        places = asyncio.Semaphore(_AT_ONCE)
        room = Room(_HELD_BYTES)
        latest: dict[str, asyncio.Task[None]] = {}  # the last line of each session that is under way

        async def one(number: int, conversation: Conversation, earlier: asyncio.Task[None] | None) -> None:
            if earlier is not None:
                await asyncio.wait([earlier])
            try:
                await self._import(conversation)
            except (*_ONE_LINE, LineError) as error:
                self._problem(number, error)

        def done(session_id: str, size: int, task: asyncio.Task[None]) -> None:
            if latest.get(session_id) is task:
                del latest[session_id]
            places.release()
            room.give(size)
            self.on_line(size)

        try:
            async with asyncio.TaskGroup() as group:
                number = 0
                async for line in lines:
                    number += 1
                    conversation = self._read(number, line)
                    if conversation is None:
                        self.on_line(len(line))
                        continue
                    await places.acquire()
                    await room.take(len(line))
                    session_id, size = conversation.record.session_id, len(line)
                    task = group.create_task(one(number, conversation, latest.get(session_id)))
                    latest[session_id] = task
                    task.add_done_callback(partial(done, session_id, size))
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None

    def _read(self, number: int, line: bytes) -> Conversation | None:
        if not line.strip():
            return None
        try:
            return read_conversation(line, image_id=self.image_id, container_id=self.container_id)
        except LineError as error:
            self._problem(number, error)
            return None

    def _problem(self, number: int, error: Exception) -> None:
        self.bad += 1
        self.on_problem(number, str(error))

    async def _import(self, conversation: Conversation) -> None:
        for attempt in range(_TRIES):
            try:
                await self._catch_up(conversation)
            except ConflictError:
                if attempt == _TRIES - 1:
                    raise
                await backoff(attempt)  # somebody appends to this session now: see what it has become
            else:
                return

    async def _catch_up(self, conversation: Conversation) -> None:
        sessions = self.p.sessions
        session_id = conversation.record.session_id
        record, (stored, last) = await asyncio.gather(
            sessions.find_session_by_id(session_id), self._compare(conversation)
        )
        if record is None:
            until = conversation.record.expires_at
            if until is not None and until <= self.p._store.clock():
                text = "its expires_at is over: nobody could read it; leave that out to keep it"
                raise LineError(text)
            await self._give_home(conversation.given)
            # First of all, so that an import that stops here has not hidden anything from the listings.
            await sessions.save_session(conversation.record, expected_version=0)
        else:
            _check_same(record, conversation.given)
        total = len(conversation.messages)
        for start in range(stored, total, self.batch):
            part = conversation.messages[start : start + self.batch]
            numbers = await sessions.add_messages(session_id, part, expected_last=last)
            last = numbers[-1]
            self.messages += len(part)
            self.on_stored(session_id, start + len(part))
        if record is None and not stored:
            self.added += 1
        elif record is None or stored < total:
            self.completed += 1
        else:
            self.unchanged += 1

    async def _give_home(self, given: dict[str, Any]) -> None:
        """Make the image and the container of lines that name none, so that `repair` finds no orphans."""
        if self._has_home or {"image_id", "container_id"} <= given.keys():
            return
        self._has_home = True
        container = ContainerRecord(container_id=self.container_id)
        image = ImageRecord(
            image_id=self.image_id, container_id=self.container_id, session_id="", name=self.image_id
        )
        with suppress(ConflictError):
            await self.p.containers.save_container(container, expected_version=0)
        with suppress(ConflictError):
            await self.p.images.save_image(image, expected_version=0)

    async def _compare(self, conversation: Conversation) -> tuple[int, int]:
        """Return how many messages of the line are stored, and the number of the last one stored."""
        wanted = conversation.messages
        count = last = 0
        while count < len(wanted):
            page = await self.p.sessions.read_messages(
                conversation.record.session_id, after=last, limit=min(_BATCH, len(wanted) - count)
            )
            for stored, message in zip(page, wanted[count:], strict=False):
                count += 1
                if not _same(stored.message, message):
                    text = f"conflict: message {count} of this session is another one in the store"
                    raise LineError(text)
                last = stored.seq
            if not page:
                break
        return count, last


def _check_same(record: SessionRecord, given: dict[str, Any]) -> None:
    stored = record.to_mapping()
    for name, value in given.items():
        # updated_at: somebody has worked on the session since, which is no contradiction.
        if name != "updated_at" and not _same(stored.get(name), value):
            text = f"conflict: {name!r} of this session is another one in the store"
            raise LineError(text)


def _same(stored: Any, given: Any) -> bool:
    """As JSON: the order of members does not count, 1 and 1.0 and true are three values, NaN is NaN."""
    try:
        return json.dumps(stored, sort_keys=True) == json.dumps(given, sort_keys=True)
    except (TypeError, RecursionError):  # what is stored came from no JSON
        return False


class Lines:
    """The lines of `source`, one after the other; `close` closes it.

    They are read in a thread that nobody waits for: Ctrl-C works while it waits for a line.
    """

    def __init__(self, source: BinaryIO) -> None:
        self._wanted: SimpleQueue[asyncio.Future[bytes] | None] = SimpleQueue()
        threading.Thread(target=_read, args=(source, self._wanted), daemon=True).start()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> bytes:
        future: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self._wanted.put(future)
        line = await future
        if not line:
            raise StopAsyncIteration
        return line

    def close(self) -> None:
        """Close the source once the line being read has come."""
        self._wanted.put(None)


def standard_input() -> BinaryIO:
    """Return the standard input, to be read in a thread.

    It is not sys.stdin: Python ends badly while a thread waits for that.
    """
    return open(0, "rb", closefd=False)


def _read(source: BinaryIO, wanted: SimpleQueue[asyncio.Future[bytes] | None]) -> None:
    def settle(future: asyncio.Future[bytes], line: bytes, error: OSError | None) -> None:
        if future.done():  # cancelled
            return
        if error is None:
            future.set_result(line)
        else:
            future.set_exception(error)

    with source:
        while (future := wanted.get()) is not None:
            line, error = b"", None
            try:
                line = source.readline()
            except OSError as caught:
                error = caught
            with suppress(RuntimeError):  # the loop was closed while we waited for the line
                future.get_loop().call_soon_threadsafe(settle, future, line, error)


async def keyed(url: str) -> Driver | str:
    """Return what to open: the store itself, or where keys are given what it holds encrypted."""
    keys = os.environ.get("PERSISTENCE_KEYS")
    if not keys:
        return url
    try:
        decoded = [base64.b64decode(key, validate=True) for key in keys.split(",")]
    except ValueError:
        message = "PERSISTENCE_KEYS: write keys of 32 bytes in base64, separated by commas"
        raise ConfigurationError(message) from None

    def make() -> Driver:
        from persistence.encryption import encrypted

        return encrypted(url, *decoded)

    return await asyncio.to_thread(make)  # importing reads the disk


async def _acknowledge() -> None:
    def stored(session_id: str, count: int) -> None:
        print(json.dumps([session_id, count]), flush=True)

    with closing(Lines(standard_input())) as lines:
        async with create_persistence(await keyed(os.environ["PERSISTENCE_URL"])) as p:
            await Importer(p, batch=1, on_stored=stored).run(lines)


if __name__ == "__main__":
    try:
        asyncio.run(_acknowledge())
    except PersistenceError as failure:
        sys.exit(str(failure))
