"""Numbers for pieces: what a list gains, put by put, gets numbers that follow each other.

Then the list is one run in every skeleton, though other parts of the state gain
pieces between. A list that has been seen to grow gets a *block* of numbers of
its own; everything else is numbered in one sequence.
"""

from __future__ import annotations

from collections.abc import Iterable
from operator import ne
from typing import Any, Final

from persistence.pieces import Cut, Span

__all__ = ["BLOCK", "BLOCKS", "Numbers", "place"]

BLOCKS: Final = 500_000_000_000
"""The first number that belongs to a block."""
BLOCK: Final = 100_000
"""How many numbers a block has."""

_OPEN_BLOCKS = 16
_GROWING = 4  # pieces that a list must have before it gets a block
_FRAGMENTS = 128  # runs from which on it pays to store pieces of a state anew, in one
_LONG_RUN = 16  # pieces; a run of so many stays as it is if it pays to store the others anew


class Numbers:
    """Gives out numbers."""

    def __init__(self, n: int, blocks: int, open: Iterable[Span]) -> None:
        self.n = n  # the last number of the sequence that all share
        self.blocks = blocks  # how many blocks were begun
        self.open = dict(open)  # those that still grow: block → its last number, the last used last

    def next(self) -> int:
        """Return the next number of the sequence that all share."""
        self.n += 1
        return self.n

    def after(self, last: int, pieces: int) -> int:
        """Return a number for what follows piece `last` in a list of `pieces`: `last` + 1 if that is free."""
        if last >= BLOCKS:
            block, place = divmod(last - BLOCKS, BLOCK)
            if self.open.get(block) == last and place + 1 < BLOCK:
                del self.open[block]
                self.open[block] = last + 1
                return last + 1
        elif last == self.n:
            return self.next()
        if pieces < _GROWING:
            return self.next()
        number = BLOCKS + self.blocks * BLOCK
        self.open[self.blocks] = number
        self.blocks += 1
        if len(self.open) > _OPEN_BLOCKS:
            del self.open[next(iter(self.open))]
        return number


def place(
    cut: Cut, known: dict[bytes, int], numbers: Numbers, *, in_pieces: bool
) -> tuple[list[int], list[int]]:
    """Return the number of each piece, and the indexes of those that are new.

    `in_pieces`: the skeleton has become large. If that is because the numbers
    form too many runs, the pieces of short runs get new ones, or if need be all.
    """
    before = numbers.n, numbers.blocks, list(numbers.open.items())
    placed, fresh = _numbered(cut, known, numbers)
    if in_pieces and (breaks := _breaks(placed)) > max(_FRAGMENTS, len(placed) // 8):
        for remain in _in_long_runs(cut, placed, known), {}:
            again = Numbers(*before)
            anew, all_fresh = _numbered(cut, remain, again)
            if _breaks(anew) < breaks // 2:
                numbers.n, numbers.blocks, numbers.open = again.n, again.blocks, again.open
                return anew, all_fresh
    return placed, fresh


def _in_long_runs(cut: Cut, placed: list[int], known: dict[bytes, int]) -> dict[bytes, int]:
    """Return those of the pieces `known` that are many in a run."""
    found: dict[bytes, int] = {}
    there = [text in known for text in cut.digests]  # a new piece may occur twice
    first = 0
    for at in range(1, len(placed) + 1):
        if at < len(placed) and placed[at] == placed[at - 1] + 1 and there[at] == there[first]:
            continue
        if at - first >= _LONG_RUN and there[first]:
            found.update(zip(cut.digests[first:at], placed[first:at], strict=True))
        first = at
    return found


def _breaks(numbers: list[int]) -> int:
    return sum(map(ne, numbers[1:], map((1).__add__, numbers)))


def _numbered(cut: Cut, known: dict[bytes, int], numbers: Numbers) -> tuple[list[int], list[int]]:
    placed: list[Any] = list(map(known.get, cut.digests))
    fresh: list[int] = []
    if None not in placed:
        return placed, fresh
    given: dict[bytes, int] = {}
    for node in cut.root.nodes():
        own = node.pieces()
        found = [placed[index] for index in own]
        if None not in found:
            continue
        old = len(found)  # of its pieces, those up to the last one that is known
        while old and found[old - 1] is None:
            old -= 1
        for at in range(found.index(None), len(own)):
            index = own[at]
            if placed[index] is not None:
                continue
            number = given.get(cut.digests[index])
            if number is None:
                number = numbers.after(placed[own[at - 1]], at) if old and at >= old else numbers.next()
                given[cut.digests[index]] = number
                fresh.append(index)
            placed[index] = number
    return placed, fresh
