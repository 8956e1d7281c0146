"""A process that writes until it is killed, and prints what was acknowledged. Run by test_crash.py.

    python writer.py URL RUN NEXT

Each line it prints is JSON: the kind of write, and what the store answered;
"cutting" stands before an answer and says what is about to be asked for. NEXT
is the first message of session "once" whose answer no earlier run had.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from itertools import count
from typing import Any

from persistence import ImageRecord, Persistence, create_persistence

SESSIONS = 3


def acknowledge(*what: Any) -> None:
    os.write(1, json.dumps(what).encode() + b"\n")


async def append(p: Persistence, run: str, task: int) -> None:
    """Share a few sessions with other tasks; a third of the appends are batches of three."""
    for n in count():
        session, token = f"s{(task + n) % SESSIONS}", f"{run}-{task}-{n}"
        if n % 3 == 0:
            batch = [{"token": f"{token}-{part}", "batch": token} for part in range(3)]
            first, *_ = await p.sessions.add_messages(session, batch)
            for part in range(3):
                acknowledge("message", session, first + part, f"{token}-{part}")
        else:
            key = token if n % 3 == 1 else None
            seq = await p.sessions.add_message(session, {"token": token}, idempotency_key=key)
            acknowledge("message", session, seq, token)


async def go_on(p: Persistence, first: int) -> None:
    """Go on where the last answer was, as a client does that does not know what became of its last one."""
    for n in count(first):
        seq = await p.sessions.add_message("once", {"token": n}, idempotency_key=str(n))
        acknowledge("once", n, seq)


async def truncate(p: Persistence, run: str) -> None:
    """Add to a session of this run, and cut it back, in turn."""
    session, numbers = f"cut-{run}", list[int]()
    for n in count():
        numbers.append(await p.sessions.add_message(session, {"token": n}))
        acknowledge("added", session, n)
        if n % 5 == 4:
            kept = n % 3  # messages; none is a clear
            acknowledge("cutting", session, kept)
            if kept:
                await p.sessions.truncate_after_message(session, seq=numbers[kept - 1])
            else:
                await p.sessions.clear_messages(session)
            del numbers[kept:]
            acknowledge("cut", session, kept)


async def rename(p: Persistence, run: str) -> None:
    """Save images anew under other names and in other containers, one in eight with a long value."""
    for n in count():
        name = f"{run}-{n}"
        image = ImageRecord(image_id=f"i{n % 4}", container_id=f"c{n % 3}", session_id="s", name=name)
        image.custom_data = {"long": "x" * 1_100_000 if n % 8 == 7 else "", "name": name}
        await p.images.save_image(image)
        await p.images.update_metadata(image.image_id, {name: n})
        acknowledge("image", image.image_id, name)


async def main(url: str, run: str, first: str) -> None:
    async with create_persistence(url) as p:
        await asyncio.gather(
            *(append(p, run, task) for task in range(4)),
            go_on(p, int(first)),
            truncate(p, run),
            rename(p, run),
        )


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
