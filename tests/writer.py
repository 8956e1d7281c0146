"""A process that writes until it is killed, and prints what was acknowledged. Run by test_crash.py.

    python writer.py URL RUN

Each line it prints is JSON: the kind of write, and what the store answered.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from typing import Any

from persistence import ImageRecord, Persistence, create_persistence

SESSIONS = 3


def acknowledge(*what: Any) -> None:
    os.write(1, json.dumps(what).encode() + b"\n")


async def append(p: Persistence, run: str, task: int) -> None:
    for n in range(100_000):
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


async def rename(p: Persistence, run: str) -> None:
    for n in range(100_000):
        name = f"{run}-{n}"
        image = ImageRecord(image_id=f"i{n % 4}", container_id=f"c{n % 3}", session_id="s", name=name)
        await p.images.save_image(image)
        await p.images.update_metadata(image.image_id, {name: n})
        acknowledge("image", image.image_id, name)


async def main(url: str, run: str) -> None:
    async with create_persistence(url) as p:
        await asyncio.gather(*(append(p, run, task) for task in range(4)), rename(p, run))


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2]))
