"""Real conversations whose agent is killed again and again: each goes on at its latest checkpoint."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
from test_checkpoints import spare

from persistence import create_persistence

AGENT = Path(__file__).with_name("agent.py")
CONVERSATIONS = 12


def killed_agent(url: str, conversations: Path, after: int, pause: float) -> tuple[list[list[Any]], bool]:
    """Start an agent, kill it `pause` seconds after `after` lines; return all, and if it had ended."""
    with (
        conversations.open("rb") as given,
        subprocess.Popen([sys.executable, AGENT, url], stdin=given, stdout=subprocess.PIPE) as agent,
    ):
        assert agent.stdout is not None
        lines = [agent.stdout.readline() for _ in range(after)]
        time.sleep(pause)
        agent.send_signal(signal.SIGKILL)
        lines += agent.stdout.readlines()
    assert agent.returncode in (0, -signal.SIGKILL)
    return [json.loads(line) for line in lines if line.endswith(b"\n")], agent.returncode == 0


class Heard:
    """What the agents said: the checkpoints of each conversation, by how many messages they have."""

    def __init__(self) -> None:
        self.stored: dict[str, dict[int, str]] = defaultdict(dict)
        self.resumed = 0

    def hear(self, said: list[Any]) -> None:
        what, thread, count, id = said
        stored = self.stored[thread]
        last = len(stored)
        if what == "stored":
            assert count == last + 1
            stored[count] = id
        elif count == last:
            assert id == stored.get(last, 0)
        else:
            assert count == last + 1  # it was stored, and its agent killed before it said so
            stored[count] = id
        self.resumed += what == "resumed" and count > 0


@pytest.mark.parametrize("scheme", ["file", "sqlite"])
async def test_conversations_survive_the_deaths_of_their_agent(
    scheme: str, tmp_path: Path, conversations: list[dict[str, Any]]
) -> None:
    url = f"file:///{tmp_path}/store" if scheme == "file" else f"sqlite:////{tmp_path}/store.db"
    given = conversations[:CONVERSATIONS]
    path = tmp_path / "conversations.jsonl"
    path.write_text("".join(json.dumps(conversation) + "\n" for conversation in given))
    chance = random.Random(scheme)
    heard = Heard()
    kills, ended = 0, False
    while not ended:
        after = CONVERSATIONS + chance.randrange(25)
        lines, ended = killed_agent(url, path, after, chance.uniform(0, 0.005))
        for said in lines:
            heard.hear(said)
        kills += not ended
    assert kills > 5
    assert heard.resumed > CONVERSATIONS
    async with create_persistence(url) as p:
        for conversation in given:
            thread, messages = conversation["session_id"], conversation["messages"]
            found = (await p.checkpoints.list(thread))[::-1]
            assert [meta.id for meta in found] == [heard.stored[thread][n + 1] for n in range(len(messages))]
            assert [meta.seq for meta in found] == list(range(1, len(messages) + 1))
            assert [meta.parent_id for meta in found] == [None, *(meta.id for meta in found[:-1])]
            for count, meta in enumerate(found, start=1):
                state = await p.checkpoints.get(thread, meta.id)
                assert state["messages"] == messages[:count]
            assert await p.checkpoints.get(thread) == state
            assert await spare(p, thread) == 0
        listed = await p.checkpoints.list_threads()
        assert {meta.thread_id for meta in listed} == {conversation["session_id"] for conversation in given}
        assert len(listed) == CONVERSATIONS
        report = await p.repair()
        assert (report.corrupt, report.pieces_removed, report.uploads_ended, report.hints_added) == (
            [],
            0,
            0,
            0,
        )
