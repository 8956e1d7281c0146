"""A writer that is killed at any moment loses nothing it had acknowledged, and leaves nothing half done."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import pytest

from persistence import Persistence, create_persistence
from persistence.repair import RepairReport

WRITER = Path(__file__).with_name("writer.py")
KILLS = 50
WEEK_MS = 7 * 86_400_000


def killed_writer(url: str, run: int, first: int, after: int, pause: float) -> list[list[Any]]:
    """Start a writer, kill it `pause` seconds after `after` acknowledgements; return all it gave."""
    with subprocess.Popen(
        [sys.executable, WRITER, url, str(run), str(first)], stdout=subprocess.PIPE
    ) as writer:
        assert writer.stdout is not None
        lines = [writer.stdout.readline() for _ in range(after)]
        time.sleep(pause)
        writer.send_signal(signal.SIGKILL)
        lines += writer.stdout.readlines()
    assert writer.returncode == -signal.SIGKILL
    return [json.loads(line) for line in lines if line.endswith(b"\n")]


class Oracle:
    """What the store must hold, by what its writers said before they were killed."""

    def __init__(self) -> None:
        self.messages: dict[str, dict[int, str]] = defaultdict(dict)
        self.once: list[int] = []  # the number of each message
        self.cut: dict[str, list[int]] = defaultdict(list)  # what is visible
        self.or_else: dict[str, list[int]] = {}  # what is visible if the last request was done, unanswered
        self.names: dict[str, str] = {}

    def hear(self, said: list[Any]) -> None:
        match said:
            case ["message", session, seq, token]:
                assert seq not in self.messages[session]
                self.messages[session][seq] = token
            case ["once", n, seq]:
                assert n == len(self.once)
                self.once.append(seq)
            case ["added", session, n]:
                self.cut[session].append(n)
                self.or_else[session] = [*self.cut[session], n + 1]
            case ["cutting", session, kept]:
                self.or_else[session] = self.cut[session][:kept]
            case ["cut", session, kept]:
                next_one = self.cut[session][-1] + 1
                del self.cut[session][kept:]
                self.or_else[session] = [*self.cut[session], next_one]
            case ["image", image_id, name]:
                self.names[image_id] = name
            case _:
                raise AssertionError(said)

    async def check(self, p: Persistence) -> None:
        for session, expected in self.messages.items():
            await self._check_shared(p, session, expected)
        once = await p.sessions.read_messages("once")
        assert [message.seq for message in once] == list(range(1, len(once) + 1))
        assert [message.message["token"] for message in once] == list(range(len(once)))
        assert self.once == [message.seq for message in once][: len(self.once)]
        assert len(once) - len(self.once) in (0, 1)
        for session, visible in self.cut.items():
            tokens = [message["token"] for message in await p.sessions.get_messages(session)]
            assert tokens in (visible, self.or_else[session])
            assert await p.sessions.count_messages(session) == len(tokens)
        await self._check_images(p)

    async def _check_shared(self, p: Persistence, session: str, expected: dict[int, str]) -> None:
        stored = await p.sessions.read_messages(session)
        assert [message.seq for message in stored] == list(range(1, len(stored) + 1))
        tokens = {message.seq: message.message["token"] for message in stored}
        assert len(set(tokens.values())) == len(tokens)
        assert expected.items() <= tokens.items()
        batches = Counter(message.message.get("batch") for message in stored)
        del batches[None]
        assert set(batches.values()) == {3}
        assert await p.sessions.count_messages(session) == len(stored)

    async def _check_images(self, p: Persistence) -> None:
        records = {record.image_id: record for record in await p.images.find_all_images()}
        assert records.keys() >= self.names.keys()
        for record in records.values():
            assert record == await p.images.find_image_by_id(record.image_id)
            assert record.custom_data is not None
            assert record.custom_data["name"] == record.name
            assert await p.images.find_images_by_name(record.name) == [record]
        for container_id in ("c0", "c1", "c2"):
            listed = {record.image_id for record in await p.images.find_images_by_container_id(container_id)}
            assert listed == {id for id, record in records.items() if record.container_id == container_id}
        for image_id, name in self.names.items():
            record = records[image_id]
            if record.name == name:  # else a save that was not acknowledged has replaced it
                assert record.metadata is not None
                assert name in record.metadata


def findings(report: RepairReport) -> dict[str, Any]:
    """Return what a repair had to do."""
    found = {field: getattr(report, field) for field in report.__struct_fields__}
    for field in ("partitions", "orphans", "orphan_count"):  # images whose containers nobody made
        del found[field]
    return {field: value for field, value in found.items() if value}


@pytest.mark.parametrize("scheme", ["file", "sqlite"])
async def test_a_writer_killed_at_random_loses_nothing_acknowledged(scheme: str, tmp_path: Path) -> None:
    url = f"file:///{tmp_path}/store" if scheme == "file" else f"sqlite:////{tmp_path}/store.db"
    chance = random.Random(scheme)
    oracle = Oracle()
    for run in range(KILLS):
        after, pause = chance.randrange(1, 60), chance.uniform(0, 0.005)
        for said in killed_writer(url, run, len(oracle.once), after, pause):
            oracle.hear(said)
        if run % 10 == 9:
            async with create_persistence(url) as p:
                await oracle.check(p)
    assert len(oracle.once) > KILLS
    assert oracle.names
    async with create_persistence(url) as p:
        report = await p.repair()
        assert report.corrupt == []
        await oracle.check(p)
        assert findings(await p.repair()) == {}
    async with create_persistence(url, clock=lambda: time.time_ns() // 1_000_000 + WEEK_MS + 1) as p:
        await p.repair()
        assert findings(await p.repair()) == {}
        await oracle.check(p)
