"""Timing two ways of doing one thing against each other, and the table that comes of it.

The sides take turns, round by round, so that whatever else the machine does
meanwhile hits all of them. A round gives one ratio; the row shows the median
of the rounds, and the medians of each round's p50 and p99.
"""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Literal, NamedTuple, TypeAlias

__all__ = [
    "FULL",
    "QUICK",
    "Effort",
    "Goal",
    "NotMeasuredError",
    "Row",
    "Step",
    "Timing",
    "percentile",
    "race",
]

Step: TypeAlias = Callable[[int, int], Awaitable[object]]
"""Does one operation, given the number of its task and how many that task has done before."""


class NotMeasuredError(Exception):
    """What is to be measured, or compared with, is not to be had here."""


class Effort(NamedTuple):
    """How long to measure."""

    rounds: int
    alone: int  # operations of a lone task a round
    each: int  # operations of each of many tasks a round


FULL = Effort(rounds=11, alone=200, each=20)
QUICK = Effort(rounds=3, alone=40, each=5)


class Goal(NamedTuple):
    """What is to be reached.

    "cost": our time over the reference's at most `limit`; "speed": the
    reference's over ours at least `limit`; "value": our median at most `limit`.
    """

    kind: Literal["cost", "speed", "value"]
    limit: float


@dataclass
class Timing:
    """One side of a race: for each round its p50, its p99 and its time for one operation."""

    p50: list[float] = field(default_factory=list)
    p99: list[float] = field(default_factory=list)
    cost: list[float] = field(default_factory=list)

    def add(self, latencies: Sequence[float], cost: float) -> None:
        """Take in a round."""
        self.p50.append(percentile(latencies, 50))
        self.p99.append(percentile(latencies, 99))
        self.cost.append(cost)


@dataclass
class Row:
    """A line of the table: ours, what it was compared with, and how that went."""

    measure: str
    engine: str
    ours: Timing | None = None
    reference: str = ""
    theirs: Timing | None = None
    goal: Goal | None = None
    unit: str = "µs"
    note: str = ""  # why there are no figures

    @property
    def speed(self) -> float | None:
        """How many times as fast as the reference we are."""
        if self.ours is None or self.theirs is None:
            return None
        return median(b / a for a, b in zip(self.ours.cost, self.theirs.cost, strict=True))

    @property
    def met(self) -> bool | None:
        """Whether the goal is reached; None where there is none, or no figure."""
        if self.goal is None or self.ours is None:
            return None
        if self.goal.kind == "value":
            return median(self.ours.p50) <= self.goal.limit
        if self.speed is None:
            return None
        if self.goal.kind == "cost":
            return 1 / self.speed <= self.goal.limit
        return self.speed >= self.goal.limit


def percentile(samples: Sequence[float], percent: float) -> float:
    """Return the sample that `percent` of the samples do not exceed."""
    ordered = sorted(samples)
    return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))]


async def race(sides: Mapping[str, Step], *, tasks: int, effort: Effort) -> dict[str, Timing]:
    """Let the sides take turns, after one round that does not count.

    An operation's cost is its median time for a lone task, and the time of the
    whole round over the number of operations for many.
    """
    count = effort.alone if tasks == 1 else effort.each
    timings = {name: Timing() for name in sides}
    names = list(sides)
    for number in range(effort.rounds + 1):
        # Each goes first as often as the others: who follows whom matters to caches and disks.
        for name in names[number % len(names) :] + names[: number % len(names)]:
            latencies, wall = await _round(sides[name], tasks, range(number * count, (number + 1) * count))
            if number:
                cost = percentile(latencies, 50) if tasks == 1 else wall / len(latencies)
                timings[name].add(latencies, cost)
    return timings


async def _round(step: Step, tasks: int, numbers: range) -> tuple[list[float], float]:
    latencies: list[float] = []

    async def work(task: int) -> None:
        for number in numbers:
            start = time.perf_counter()
            await step(task, number)
            latencies.append(time.perf_counter() - start)

    gc.collect()
    start = time.perf_counter()
    if tasks == 1:
        await work(0)
    else:
        await asyncio.gather(*(work(task) for task in range(tasks)))
    return latencies, time.perf_counter() - start
