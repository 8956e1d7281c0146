"""A writer that is killed at any moment loses nothing it had acknowledged, and leaves nothing half done."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import pytest

from persistence import Persistence, create_persistence

WRITER = Path(__file__).with_name("writer.py")
KILLS = 50


def killed_writer(url: str, run: str, after: int) -> list[list[Any]]:
    """Start a writer, kill it when it has acknowledged `after` writes, return all that it acknowledged."""
    with subprocess.Popen([sys.executable, WRITER, url, run], stdout=subprocess.PIPE) as writer:
        assert writer.stdout is not None
        lines = [writer.stdout.readline() for _ in range(after)]
        writer.send_signal(signal.SIGKILL)
        lines += writer.stdout.readlines()
    assert writer.returncode == -signal.SIGKILL
    return [json.loads(line) for line in lines if line.endswith(b"\n")]


async def check(p: Persistence, acknowledged: dict[str, dict[int, str]], names: dict[str, str]) -> None:
    for session, expected in acknowledged.items():
        stored = await p.sessions.read_messages(session)
        assert [message.seq for message in stored] == list(range(1, len(stored) + 1))
        tokens = {message.seq: message.message["token"] for message in stored}
        assert len(set(tokens.values())) == len(tokens)
        assert expected.items() <= tokens.items()
        batches = Counter(message.message.get("batch") for message in stored)
        del batches[None]
        assert set(batches.values()) == {3}
        assert await p.sessions.count_messages(session) == len(stored)
    listed = await p.images.find_all_images()
    for image_id, name in names.items():
        image = await p.images.find_image_by_id(image_id)
        assert image is not None
        assert image in listed
        assert image in await p.images.find_images_by_name(image.name)
        assert image in await p.images.find_images_by_container_id(image.container_id)
        if image.name == name:  # else a save that was not acknowledged has replaced it
            assert image.metadata is not None
            assert name in image.metadata


@pytest.mark.parametrize("scheme", ["file", "sqlite"])
async def test_a_writer_killed_at_random_loses_nothing_acknowledged(scheme: str, tmp_path: Path) -> None:
    url = f"file:///{tmp_path}/store" if scheme == "file" else f"sqlite:////{tmp_path}/store.db"
    chance = random.Random(scheme)
    acknowledged: dict[str, dict[int, str]] = defaultdict(dict)
    names: dict[str, str] = {}
    for run in range(KILLS):
        for what in killed_writer(url, str(run), after=chance.randrange(1, 60)):
            match what:
                case ["message", session, seq, token]:
                    assert seq not in acknowledged[session]
                    acknowledged[session][seq] = token
                case ["image", image_id, name]:
                    names[image_id] = name
        if run % 10 == 9:
            async with create_persistence(url) as p:
                await check(p, acknowledged, names)
    async with create_persistence(url) as p:
        report = await p.repair()
        assert report.corrupt == []
        await check(p, acknowledged, names)
        again = await p.repair()
        assert (again.hints_added, again.entries_emptied, again.deletes_finished) == (0, 0, 0)
