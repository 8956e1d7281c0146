"""The benchmarks: one table of ratios, each from one run, against the thinnest use of the same client.

    python benchmarks/run.py                                     # everything there is; takes a while
    python benchmarks/run.py --quick --engine memory,sqlite      # a first impression
    python benchmarks/run.py --only append --engine postgresql   # measures with "append" in their name
    python benchmarks/run.py --engine sqlite --peers             # with openai-agents, installed for this run

Servers are started by tests/servers.py, or named by PERSISTENCE_TEST_<ENGINE>_URL;
such a server keeps what our side wrote, under a namespace bench-….
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import sqlite3
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

from goals import EMBEDDED, SERVERS
from ground import prepare
from harness import FULL, QUICK, Effort, NotMeasuredError, Row, Timing
from measures import MEASURES, Measure
from peers import Peer, install
from process import idle_session, import_time

from persistence.errors import ConfigurationError
from persistence.options import Durability

_LIBRARIES = "agent-persistence msgspec aiosqlite asyncpg aiomysql asyncmy redis hiredis pymongo".split()
_UNITS = {"µs": 1e6, "ms": 1e3, "B": 1.0}
_HEADER = ("measure", "engine", "ours p50", "p99", "reference", "p50", "p99", "ratio", "goal", "met")
_SIDES = "<<>><>>><<"
_LEGEND = """\
Ratio: "× as fast" is the reference's time over ours, "× its time" ours over the reference's; of the medians
for a lone task, of the time of all for many. p50 and p99 are what one caller waits."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what the command line asks for; 1 if a goal was missed."""
    options = _options(arguments)
    effort = QUICK if options.quick else FULL
    measures = [measure for measure in MEASURES if options.only in measure.name]
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="persistence-bench-") as folder:
        # The whole process first: later this one is large, and the machine warm.
        if "memory" in options.engine:
            if options.only in "import persistence":
                rows.append(import_time(effort))
            if options.only in "idle session":
                rows.append(idle_session())
        peer: Peer | None = None
        if options.peers is not None and "sqlite" in options.engine:
            try:
                peer = install(Path(options.peers or folder, "peers"))
            except NotMeasuredError as error:
                rows.append(Row("all peers", "sqlite", note=f"not measured: {error}"))
        for engine in options.engine:
            for durability in _durabilities(engine):
                rows += asyncio.run(_measure(engine, durability, measures, Path(folder), peer, effort))
    _print(rows)
    if options.json:
        report = {"machine": _machine(), "rows": [_as_json(row) for row in rows]}
        Path(options.json).write_text(
            json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
        )
    return int(any(row.met is False for row in rows))


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    engines = (*EMBEDDED, *SERVERS)
    parser.add_argument("--engine", default=",".join(engines), metavar="NAME,…", help=", ".join(engines))
    parser.add_argument("--only", default="", metavar="TEXT", help="measures with TEXT in their name")
    parser.add_argument("--quick", action="store_true", help="fewer and shorter rounds")
    parser.add_argument("--json", metavar="FILE", help="write the figures of each round to FILE")
    parser.add_argument(
        "--peers", nargs="?", const="", metavar="FOLDER", help="other libraries too, kept in FOLDER if given"
    )
    options = parser.parse_args(arguments)
    options.engine = options.engine.split(",")
    if unknown := set(options.engine) - set(engines):
        parser.error(f"no engine {', '.join(unknown)}; there are {', '.join(engines)}")
    return options


def _durabilities(engine: str) -> tuple[Durability, ...]:
    return ("process", "power") if engine == "filesystem" else ("power",)


async def _measure(
    engine: str,
    durability: Durability,
    measures: Sequence[Measure],
    folder: Path,
    peer: Peer | None,
    effort: Effort,
) -> list[Row]:
    """Run the measures on one engine, each on an empty store."""
    rows: list[Row] = []
    for measure in measures:
        if engine not in measure.engines:
            continue
        print(f"{engine}: {measure.name} …", file=sys.stderr)
        with tempfile.TemporaryDirectory(dir=folder) as place:
            try:
                async with prepare(engine, durability, Path(place), peer, effort) as ground:
                    await measure.run(ground)
            except (NotMeasuredError, ImportError, ConfigurationError) as error:
                return [Row("everything", engine, note=f"not measured: {error}")]
            rows += ground.rows
    return rows


def _machine() -> list[str]:
    """Return what the figures depend on: machine, Python, libraries."""
    found = {}
    for name in _LIBRARIES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    state = f"load {os.getloadavg()[0]:.1f}, fsync {_fsync() * 1e6:.0f} µs"
    return [
        f"{_processor()}, {os.cpu_count()} cores, {state}, {platform.platform()}",
        f"{platform.python_implementation()} {platform.python_version()}, SQLite {sqlite3.sqlite_version}",
        ", ".join(f"{name} {number}" for name, number in found.items()),
    ]


def _fsync() -> float:
    """Return how long the disk takes to make 1 KB safe: the ratios of durability "power" hang on it."""
    times = []
    with tempfile.TemporaryFile(buffering=0) as file:
        for _ in range(50):
            file.write(os.urandom(1024))
            start = time.perf_counter()
            os.fsync(file.fileno())
            times.append(time.perf_counter() - start)
    return median(times)


def _processor() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(": ")[2]
    return platform.processor() or platform.machine()


def _print(rows: Sequence[Row]) -> None:
    print(*_machine(), sep="\n")
    table = [_cells(row) for row in rows]
    widths = [max(map(len, column)) for column in zip(_HEADER, *table, strict=True)]
    rule = ["-" * width for width in widths]
    for cells in (_HEADER, rule, *table):
        line = zip(cells, widths, _SIDES, strict=True)
        print("  ".join(f"{cell:{side}{width}}" for cell, width, side in line).rstrip())
    for row in rows:
        if row.note:
            print(f"{row.engine}, {row.measure}: {row.note}")
    print(_LEGEND)


def _cells(row: Row) -> tuple[str, ...]:
    met = {None: "", True: "yes", False: "NO"}[row.met]
    figures = (
        _p50(row, row.ours),
        _p99(row, row.ours),
        row.reference,
        _p50(row, row.theirs),
        _p99(row, row.theirs),
    )
    return row.measure, row.engine, *figures, _ratio(row), _goal(row), met


def _p50(row: Row, timing: Timing | None) -> str:
    return "" if timing is None else _amount(row, median(timing.p50))


def _p99(row: Row, timing: Timing | None) -> str:
    return "" if timing is None else _amount(row, median(timing.p99))


def _amount(row: Row, value: float) -> str:
    scaled = value * _UNITS[row.unit]
    return f"{scaled:,.{1 if scaled < 100 else 0}f} {row.unit}"


def _ratio(row: Row) -> str:
    if row.speed is None:
        return ""
    if row.goal is not None and row.goal.kind == "cost":
        return f"{1 / row.speed:.2f}× its time"
    return f"{row.speed:.{1 if row.speed > 3 else 2}f}× as fast"


def _goal(row: Row) -> str:
    if row.goal is None:
        return ""
    if row.goal.kind == "value":
        return f"≤ {_amount(row, row.goal.limit)}"
    return f"{'≤' if row.goal.kind == 'cost' else '≥'} {row.goal.limit:g}×"


def _as_json(row: Row) -> dict[str, Any]:
    return asdict(row) | {"goal": row.goal and row.goal._asdict(), "speed": row.speed, "met": row.met}


if __name__ == "__main__":
    sys.exit(main())
