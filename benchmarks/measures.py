"""What is measured on each engine: one function a measure."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Awaitable, Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import msgspec
from goals import EMBEDDED, SERVERS
from ground import Ground
from peers import Peer
from thin import Swapping, Thin

from persistence.driver import ABSENT, Op, Put

__all__ = ["MEASURES", "Measure"]

_TASKS = 64
_RECORDS = 1_000
_IMAGES, _CONTAINERS = 10_000, 100
_AT_ONCE = 500  # while preparing
_WORDS = "the agent looks up a flight, asks whether it may book, and waits for the user to say so; ".split()
_TEXTS = [" ".join((_WORDS[turn:] + _WORDS[:turn]) * 10)[:900] for turn in range(len(_WORDS))]

_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder().decode


def _message(task: int, number: int) -> dict[str, Any]:
    """Return a message of 1 KB, no two alike: an engine may skip a write that changes nothing."""
    role = "user" if number % 2 else "assistant"
    return {"id": f"{task}-{number}", "role": role, "content": _TEXTS[number % len(_TEXTS)]}


def _named(name: str, tasks: int) -> str:
    return name if tasks == 1 else f"{name}, {tasks} tasks"


async def _together(work: Iterable[Awaitable[object]]) -> None:
    """Await all of `work`, a part at a time."""
    todo = list(work)
    for first in range(0, len(todo), _AT_ONCE):
        await asyncio.gather(*todo[first : first + _AT_ONCE])


# ---- single operations, alone and many at once


async def append(at: Ground, tasks: int) -> None:
    """Append a message of 1 KB, each task to a session of its own."""

    async def ours(task: int, number: int) -> None:
        await at.p.sessions.add_message(f"append-{tasks}-{task}", _message(task, number))

    async def thin(client: Thin, task: int, number: int) -> None:
        await client.append(f"append-{tasks}-{task}", number, _encode(_message(task, number)))

    async def peer(library: Peer, task: int, number: int) -> None:
        await library.append(f"append-{tasks}-{task}", [_message(task, number)])

    await at.race(_named("append", tasks), tasks, ours, thin, peer)


async def stream(at: Ground, tasks: int) -> None:
    """Append a part of 30 bytes to an answer that is being made, each task to one of its own."""

    def part(number: int) -> dict[str, Any]:
        return {"type": "text", "text": f"word {number}"}

    async def ours(task: int, number: int) -> None:
        await at.p.streams.append(f"stream-{tasks}-{task}", number, part(number))

    async def thin(client: Thin, task: int, number: int) -> None:
        await client.append(f"stream-{tasks}-{task}", number, _encode(part(number)))

    await at.race(_named("stream a part", tasks), tasks, ours, thin)


async def get(at: Ground, tasks: int) -> None:
    """Get one record of a thousand by its id."""
    records = [
        {"session_id": f"session-{number}", "container_id": "container", "image_id": "image"}
        for number in range(_RECORDS)
    ]
    await _together(at.p.sessions.save_session(record) for record in records)
    await at.client(tasks).extend("sessions", 0, [_encode(record) for record in records])

    async def ours(task: int, number: int) -> None:
        await at.p.sessions.find_session_by_id(f"session-{(17 * task + number) % _RECORDS}")

    async def thin(client: Thin, task: int, number: int) -> None:
        _decode(await client.get("sessions", (17 * task + number) % _RECORDS))

    await at.race(_named("get", tasks), tasks, ours, thin)


def _three(number: int) -> list[bytes]:
    return [b'{"key":%d,"text":"%064d"}' % (key, number) for key in range(3)]


def _puts(number: int, version: int | None) -> list[Op]:
    return [Put(f"key/{key}", value, version) for key, value in enumerate(_three(number))]


async def conditional(at: Ground) -> None:
    """Replace three values if none has changed, and replace them whatever is there."""
    version = await at.core.write("swap/if", _puts(0, ABSENT))

    async def guarded(task: int, number: int) -> None:
        nonlocal version
        version = await at.core.write("swap/if", _puts(number, version))

    async def plain(task: int, number: int) -> None:
        await at.core.write("swap/always", _puts(number, None))

    await at.compare("3-key conditional", guarded, "unconditional", plain)


async def conditional_64(at: Ground) -> None:
    """Replace three values if none has changed, each task its own."""
    versions = [await at.core.write(f"swap/{task}", _puts(0, ABSENT)) for task in range(_TASKS)]
    for task in range(_TASKS):
        await at.pool.extend(f"swap-{task}", 1, _three(0))

    async def ours(task: int, number: int) -> None:
        versions[task] = await at.core.write(f"swap/{task}", _puts(number, versions[task]))

    async def thin(client: Thin, task: int, number: int) -> None:
        await cast("Swapping", client).swap(f"swap-{task}", _three(number), number + 1, number + 2)

    await at.race("3-key conditional, 64 tasks", _TASKS, ours, thin)


async def last(at: Ground, count: int, name: str) -> None:
    """Read the end of a session of 10,000 messages."""
    messages = [_message(0, number) for number in range(10_000)]
    await at.p.sessions.add_messages(name, messages)
    for first in range(0, len(messages), _AT_ONCE):
        part = messages[first : first + _AT_ONCE]
        await at.held.extend(name, first, [_encode(message) for message in part])
        if at.peer is not None:
            await at.peer.append(name, part)

    async def ours(task: int, number: int) -> None:
        await at.p.sessions.get_messages(name, last=count)

    async def thin(client: Thin, task: int, number: int) -> None:
        [_decode(value) for value in reversed(await client.last(name, count))]

    async def peer(library: Peer, task: int, number: int) -> None:
        await library.last(name, count)

    await at.race(name, 1, ours, thin, peer)


# ---- larger jobs


async def find_by_container(at: Ground) -> None:
    """Find the 100 images of a container among 10,000. Beside it: one range read that holds just these."""
    records = [
        {
            "image_id": f"image-{number}",
            "container_id": f"container-{number % _CONTAINERS}",
            "session_id": f"session-{number}",
            "name": f"assistant {number}",
            "created_at": number,
        }
        for number in range(_IMAGES)
    ]
    await _together(at.p.images.save_image(record) for record in records)
    for container in range(_CONTAINERS):
        values = [_encode(record) for record in records[container::_CONTAINERS]]
        await at.held.extend(f"container-{container}", 0, values)

    async def ours(task: int, number: int) -> None:
        await at.p.images.find_images_by_container_id(f"container-{number % _CONTAINERS}")

    async def thin(client: Thin, task: int, number: int) -> None:
        found = await client.last(f"container-{number % _CONTAINERS}", _IMAGES // _CONTAINERS)
        [_decode(value) for value in found]

    await at.race("find 100 of 10,000 images", 1, ours, thin)


async def import_conversations(at: Ground) -> None:
    """Store a real conversation, about 25 messages, in one call."""
    conversations = [item["messages"] for item in _conversations()]

    def messages(number: int) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = conversations[number % len(conversations)]
        return found

    async def ours(task: int, number: int) -> None:
        await at.p.sessions.add_messages(f"import-{number}", messages(number))

    async def thin(client: Thin, task: int, number: int) -> None:
        await client.extend(f"import-{number}", 0, [_encode(message) for message in messages(number)])

    async def peer(library: Peer, task: int, number: int) -> None:
        await library.append(f"import-{number}", messages(number))

    await at.race("import a conversation", 1, ours, thin, peer)


def _conversations() -> list[dict[str, Any]]:
    bundled = Path(__file__).parent.parent / "tests" / "data" / "conversations.jsonl"
    path = Path(os.environ.get("PERSISTENCE_TEST_CONVERSATIONS") or bundled)
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


async def append_to_long(at: Ground) -> None:
    """Append to a session of 10,000 messages, and to sessions of 100."""
    each = 50
    sessions = range((at.effort.rounds + 1) * at.effort.alone // each + 1)
    await at.p.sessions.add_messages("long", [_message(0, number) for number in range(10_000)])
    for session in sessions:
        await at.p.sessions.add_messages(f"short-{session}", [_message(0, number) for number in range(100)])

    async def to_long(task: int, number: int) -> None:
        await at.p.sessions.add_message("long", _message(task, number))

    async def to_short(task: int, number: int) -> None:
        await at.p.sessions.add_message(f"short-{number // each}", _message(task, number))

    await at.compare("append at 10,000", to_long, "append at 100", to_short)


class Measure(NamedTuple):
    """A measure and the engines that it is for."""

    name: str
    run: Callable[[Ground], Awaitable[None]]
    engines: tuple[str, ...] = EMBEDDED + SERVERS


MEASURES = (
    Measure("append", partial(append, tasks=1)),
    Measure("append, 64 tasks", partial(append, tasks=_TASKS)),
    Measure("stream a part", partial(stream, tasks=1)),
    Measure("stream a part, 64 tasks", partial(stream, tasks=_TASKS)),
    Measure("get", partial(get, tasks=1)),
    Measure("get, 64 tasks", partial(get, tasks=_TASKS)),
    Measure("3-key conditional", conditional, SERVERS),
    Measure("3-key conditional, 64 tasks", conditional_64, SERVERS),
    Measure("scan of 100", partial(last, count=100, name="scan of 100"), SERVERS),
    Measure("last 50 of 10,000", partial(last, count=50, name="last 50 of 10,000"), EMBEDDED),
    Measure("append at 10,000", append_to_long),
    Measure("find 100 of 10,000 images", find_by_container, EMBEDDED),
    Measure("import a conversation", import_conversations, EMBEDDED),
)
