"""An agent that holds conversations until it is killed. Run by test_resume.py.

    python agent.py URL <conversations.jsonl

It goes on with each where its latest checkpoint is, and stores a checkpoint
after each message. Each line it prints is JSON: "resumed" or "stored", the
conversation, how many messages it has, and the id of the checkpoint.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from typing import Any

from persistence import Persistence, create_persistence


def acknowledge(*what: Any) -> None:
    os.write(1, json.dumps(what).encode() + b"\n")


async def converse(p: Persistence, conversation: dict[str, Any]) -> None:
    thread = conversation["session_id"]
    found = await p.checkpoints.read(thread)
    state: dict[str, Any] = {"version": 2, "messages": [], "usage": {"bytes": 0}}
    latest: Any = 0
    if found is not None:
        state, latest = found.state, found.meta.id
    acknowledge("resumed", thread, len(state["messages"]), latest)
    for message in conversation["messages"][len(state["messages"]) :]:
        state["messages"].append(message)
        state["usage"]["bytes"] += len(json.dumps(message))
        meta = await p.checkpoints.put(thread, state, expected_latest=latest, max_checkpoints_per_thread=None)
        latest = meta.id
        acknowledge("stored", thread, len(state["messages"]), latest)


async def main(url: str, conversations: list[dict[str, Any]]) -> None:
    async with create_persistence(url) as p:
        await asyncio.gather(*(converse(p, conversation) for conversation in conversations))


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], [json.loads(line) for line in sys.stdin]))
