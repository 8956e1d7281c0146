"""Checkpoints against langgraph-checkpoint-sqlite and -postgres, each at its defaults.

    python benchmarks/checkpoints.py                                # both; takes a few minutes
    python benchmarks/checkpoints.py --quick --engine sqlite
    python benchmarks/checkpoints.py --peers FOLDER                 # keep what pip installs
    python benchmarks/checkpoints.py --conversations FILE.jsonl     # others than those of the tests

Three kinds of states: real conversations, a checkpoint a message; one thread
that gains a message of 1 KB a step; and states of 10 KB, of which each step
changes one message of ten. Both sides store every checkpoint and keep them
all. They take turns; a figure is the median of the rounds.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from persistence import Persistence, create_persistence

_ROOT = Path(__file__).resolve().parent.parent
_PEERS = {"sqlite": "langgraph-checkpoint-sqlite", "postgresql": "langgraph-checkpoint-postgres"}
_PACKAGES = (*_PEERS.values(), "psycopg[binary]")
_GOALS = {
    "conversations: put, alone": 1.3,
    "1,000 steps: put, alone": 1.3,
    "1,000 steps: bytes on disk": 20.0,
    "1,000 steps: latest, 1 MB": 1 / 1.5,
    "10 KB: put, alone": 1.3,
    "10 KB: put, 64 threads at once": 12.0,
    "10 KB: latest": 5.0,
}

State = dict[str, Any]


class Ours:
    """This library."""

    def __init__(self, persistence: Persistence, measure: Callable[[], Awaitable[int]]) -> None:
        self._checkpoints = persistence.checkpoints
        self.bytes_on_disk = measure

    async def put(self, thread: str, step: int, state: State) -> None:
        await self._checkpoints.put(thread, state, max_checkpoints_per_thread=None)

    async def latest(self, thread: str) -> State:
        found: State = await self._checkpoints.get(thread)
        return found

    async def newest(self, thread: str, count: int) -> int:
        return len(await self._checkpoints.list(thread, limit=count))


class Theirs:
    """A saver of LangGraph, called as its graphs call it: a channel for each member of the state."""

    def __init__(self, saver: Any, measure: Callable[[], Awaitable[int]]) -> None:
        self._saver = saver
        self._ids: dict[str, str] = {}
        self._uuid6 = import_module("langgraph.checkpoint.base.id").uuid6
        self.bytes_on_disk = measure

    async def put(self, thread: str, step: int, state: State) -> None:
        versions = dict.fromkeys(state, f"{step:032}.0")
        checkpoint = {
            "v": 4,
            "id": str(self._uuid6(clock_seq=step)),
            "ts": "2026-01-01T00:00:00+00:00",
            "channel_values": state,
            "channel_versions": versions,
            "versions_seen": {},
            "updated_channels": list(state),
        }
        config = self._config(thread)
        if thread in self._ids:
            config["configurable"]["checkpoint_id"] = self._ids[thread]
        await self._saver.aput(config, checkpoint, {"source": "loop", "step": step}, versions)
        self._ids[thread] = checkpoint["id"]  # type: ignore[assignment]

    async def latest(self, thread: str) -> State:
        found = await self._saver.aget_tuple(self._config(thread))
        state: State = found.checkpoint["channel_values"]
        return state

    async def newest(self, thread: str, count: int) -> int:
        return len([one async for one in self._saver.alist(self._config(thread), limit=count)])

    def _config(self, thread: str) -> dict[str, dict[str, str]]:
        return {"configurable": {"thread_id": thread, "checkpoint_ns": ""}}


Side = Ours | Theirs


# ---- the two sides on an empty store


@asynccontextmanager
async def _sqlite(folder: Path) -> AsyncIterator[tuple[Side, Side]]:
    from persistence.drivers.sqlite import SQLiteDriver

    def on_disk(name: str) -> Callable[[], Awaitable[int]]:
        async def measure() -> int:
            # The WAL is scratch space; what is in it goes into the file.
            await asyncio.to_thread(_empty_wal, folder / name)
            return (folder / name).stat().st_size

        return measure

    saver = import_module("langgraph.checkpoint.sqlite.aio").AsyncSqliteSaver
    async with (
        create_persistence(SQLiteDriver(folder / "ours.db")) as ours,
        saver.from_conn_string(str(folder / "theirs.db")) as theirs,
    ):
        await theirs.setup()
        yield Ours(ours, on_disk("ours.db")), Theirs(theirs, on_disk("theirs.db"))


def _empty_wal(file: Path) -> None:
    import sqlite3

    connection = sqlite3.connect(file)
    connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    connection.close()


@asynccontextmanager
async def _postgresql(folder: Path) -> AsyncIterator[tuple[Side, Side]]:
    import asyncpg

    from persistence.drivers.postgresql import PostgreSQLDriver

    sys.path.append(str(_ROOT / "tests"))
    url = import_module("servers").get("postgresql").url
    names = [f"bench_{uuid.uuid4().hex[:12]}" for _ in range(2)]
    admin = await asyncpg.connect(url)
    for name in names:
        await admin.execute(f"CREATE SCHEMA {name}")

    def on_disk(schema: str) -> Callable[[], Awaitable[int]]:
        async def measure() -> int:
            tables = "SELECT c.oid, c.relname FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace"
            found = await admin.fetch(f"{tables} WHERE n.nspname = $1 AND c.relkind = 'r'", schema)
            for table in found:
                await admin.execute(f'VACUUM "{schema}"."{table["relname"]}"')
            sizes = [await admin.fetchval("SELECT pg_total_relation_size($1::oid)", t["oid"]) for t in found]
            return sum(sizes)

        return measure

    saver = import_module("langgraph.checkpoint.postgres.aio").AsyncPostgresSaver
    there = urlsplit(url)
    path = urlunsplit(there._replace(query=f"options=-csearch_path%3D{names[1]}"))
    try:
        async with AsyncExitStack() as stack:
            driver = PostgreSQLDriver(url, schema=names[0])
            ours = await stack.enter_async_context(create_persistence(driver))
            theirs = await stack.enter_async_context(saver.from_conn_string(path))
            await theirs.setup()
            yield Ours(ours, on_disk(names[0])), Theirs(theirs, on_disk(names[1]))
    finally:
        for name in names:
            await admin.execute(f"DROP SCHEMA {name} CASCADE")
        await admin.close()


_ENGINES = {"sqlite": _sqlite, "postgresql": _postgresql}


# ---- what is measured: name → seconds, or bytes, of one side


async def _conversations(side: Side, conversations: Sequence[State]) -> dict[str, float]:
    puts = 0
    seconds = 0.0
    for conversation in conversations:
        state: State = {"messages": [], "step": 0}
        for message in conversation["messages"]:
            state["messages"].append(message)
            state["step"] += 1
            start = time.perf_counter()
            await side.put(conversation["session_id"], state["step"], state)
            seconds += time.perf_counter() - start
            puts += 1
        found = await side.latest(conversation["session_id"])
        if found["messages"] != conversation["messages"]:
            raise AssertionError("what came back is not what was put")
    return {
        "conversations: put, alone": seconds / puts,
        "conversations: bytes on disk": await side.bytes_on_disk(),
    }


async def _thousand(side: Side, steps: int) -> dict[str, float]:
    state: State = {"messages": [], "step": 0}
    times = []
    for step in range(steps):
        state["messages"].append(_message(step))
        state["step"] = step
        times.append(await _seconds(partial(side.put, "thousand", step, state)))
    latest = [await _seconds(lambda: side.latest("thousand")) for _ in range(15)]
    listed = [await _seconds(lambda: side.newest("thousand", 20)) for _ in range(5)]
    return {
        "1,000 steps: put, alone": sum(times) / steps,
        "1,000 steps: the last 50 puts": median(times[-50:]),
        "1,000 steps: latest, 1 MB": median(latest),
        "1,000 steps: list of 20": median(listed),
        "1,000 steps: bytes on disk": await side.bytes_on_disk(),
    }


async def _ten_kilobytes(side: Side, rounds: int) -> dict[str, float]:
    state: State = {"messages": [_message(i) for i in range(10)], "step": 0}
    alone = []
    for step in range(rounds):
        state["messages"][step % 10] = _message(step + 1000)
        state["step"] = step
        alone.append(await _seconds(partial(side.put, "alone", step, state)))

    states: list[State] = [
        {"messages": [_message(i + thread) for i in range(10)], "step": 0} for thread in range(64)
    ]
    new = [_message(step + 1000) for step in range(64 + 12)]

    async def work(thread: int, rounds: int, first: int) -> None:
        state = states[thread]
        for step in range(first, first + rounds):
            state["messages"][step % 10] = new[step + thread]
            state["step"] = step
            await side.put(f"thread-{thread}", step, state)

    await asyncio.gather(*(work(thread, 1, 1) for thread in range(64)))
    start = time.perf_counter()
    await asyncio.gather(*(work(thread, 10, 2) for thread in range(64)))
    at_once = (time.perf_counter() - start) / 640
    latest = [await _seconds(lambda: side.latest("alone")) for _ in range(rounds)]
    listed = [await _seconds(lambda: side.newest("alone", 20)) for _ in range(5)]
    return {
        "10 KB: put, alone": median(alone),
        "10 KB: put, 64 threads at once": at_once,
        "10 KB: latest": median(latest),
        "10 KB: list of 20": median(listed),
        "10 KB: bytes on disk": await side.bytes_on_disk(),
    }


_WORDS = [uuid.uuid5(uuid.NAMESPACE_URL, str(n)).hex[: 2 + n % 9] for n in range(5000)]


def _message(i: int) -> State:
    words = random.Random(i).choices(_WORDS, k=200)
    return {"role": "user" if i % 2 else "assistant", "content": " ".join(words)[:940], "id": f"msg-{i:08}"}


async def _seconds(call: Callable[[], Awaitable[object]]) -> float:
    start = time.perf_counter()
    await call()
    return time.perf_counter() - start


# ---- the table


async def _measure(engine: str, conversations: Sequence[State], quick: bool) -> dict[str, list[list[float]]]:
    figures: dict[str, list[list[float]]] = {}
    work: list[Callable[[Side], Awaitable[dict[str, float]]]] = [
        lambda side: _conversations(side, conversations[: 4 if quick else 20]),
        lambda side: _thousand(side, 1000),
        lambda side: _ten_kilobytes(side, 50 if quick else 200),
    ]
    for round in range(1 if quick else 3):
        for each in work:
            with tempfile.TemporaryDirectory(prefix="persistence-bench-") as folder:
                async with _ENGINES[engine](Path(folder)) as sides:
                    order = (0, 1) if round % 2 == 0 else (1, 0)
                    for index in order:
                        for name, figure in (await each(sides[index])).items():
                            figures.setdefault(name, [[], []])[index].append(figure)
    return figures


def _print(engine: str, figures: dict[str, list[list[float]]]) -> bool:
    peer = f"{_PEERS[engine]} {version(_PEERS[engine])}"
    print(f"\n{engine}, against {peer}\n{'':36}{'ours':>12}{'theirs':>12}{'ratio':>8}{'goal':>7}")
    met = True
    for name, (ours, theirs) in figures.items():
        a, b = median(ours), median(theirs)
        goal = _GOALS.get(name)
        reached = goal is None or b / a >= goal
        met = met and reached
        shown = [f"{x / 1e6:.2f} MB" if "bytes" in name else f"{x * 1e6:,.0f} µs" for x in (a, b)]
        said = "" if goal is None else f"{goal:.2f}"
        mark = "" if reached else "  missed"
        print(f"{name:36}{shown[0]:>12}{shown[1]:>12}{b / a:>8.2f}{said:>7}{mark}")
    return met


def _install(folder: Path) -> None:
    if not (folder / "langgraph").exists():
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(folder), *_PACKAGES]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["?"])[-1]
            raise SystemExit(f"pip cannot install {', '.join(_PACKAGES)}: {reason}")
    sys.path.append(str(folder))


def main() -> int:
    """Measure, print, and return 1 if a goal was missed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--engine", default="sqlite,postgresql", metavar="NAME,…")
    parser.add_argument("--quick", action="store_true", help="one short round")
    parser.add_argument("--peers", metavar="FOLDER", help="where the peers are kept")
    parser.add_argument("--conversations", type=Path, default=_ROOT / "tests/data/conversations.jsonl")
    options = parser.parse_args()
    lines = options.conversations.read_text(encoding="utf-8").splitlines()
    conversations = [json.loads(line) for line in lines]
    met = True
    with tempfile.TemporaryDirectory(prefix="persistence-bench-") as folder:
        _install(Path(options.peers or folder))
        for engine in options.engine.split(","):
            met = _print(engine, asyncio.run(_measure(engine, conversations, options.quick))) and met
    return int(not met)


if __name__ == "__main__":
    raise SystemExit(main())
