"""What a whole process costs: memory of idle sessions, and the import. Each in processes of their own.

python benchmarks/process.py idle 100000    # prints bytes for each session
"""

from __future__ import annotations

import asyncio
import gc
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from goals import goal
from harness import Effort, Row, Timing, percentile

__all__ = ["idle_session", "import_time"]

_SESSIONS = 100_000
_IMPORT = """
import asyncio, time
start = time.perf_counter()
import persistence
print(time.perf_counter() - start)
"""


def idle_session() -> Row:
    """Bytes of memory for each of 100,000 sessions, saved, with one short message, on the memory driver."""
    row = Row("idle session", "memory", unit="B", goal=goal("idle session", "memory", "none"))
    if not Path("/proc/self/statm").exists():
        row.note = "this system has no /proc"
        return row
    size = float(_run(__file__, "idle", str(_SESSIONS)))
    row.ours = Timing([size], [size], [size])
    return row


def import_time(effort: Effort) -> Row:
    """Seconds that `import persistence` takes after `import asyncio`, all being compiled already."""
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {"PYTHONPYCACHEPREFIX": folder, "PYTHONDONTWRITEBYTECODE": ""}
        _run("-c", _IMPORT, env=environment)
        times = [float(_run("-c", _IMPORT, env=environment)) for _ in range(2 * effort.rounds)]
    ours = Timing()
    ours.add(times, percentile(times, 50))
    return Row("import persistence", "", ours, unit="ms", goal=goal("import persistence", "", "none"))


def _run(*arguments: str, env: Mapping[str, str] | None = None) -> str:
    command = [sys.executable, *arguments]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=env).stdout


async def _idle(count: int) -> float:
    from persistence import create_persistence
    from persistence.drivers.memory import memory_driver

    async with create_persistence(memory_driver()) as p:

        async def make(numbers: range) -> None:
            for number in numbers:
                id = f"session-{number:06d}"
                record = {"session_id": id, "container_id": "container", "image_id": f"image-{number % 1000}"}
                await p.sessions.save_session(record)
                await p.sessions.add_message(id, {"role": "user", "content": f"Hello, I am number {number}"})

        await make(range(1_000))  # what is needed once
        before = _resident()
        await make(range(1_000, count + 1_000))
        return (_resident() - before) / count


def _resident() -> int:
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    print(asyncio.run(_idle(int(sys.argv[2]))))
