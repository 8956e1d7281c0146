"""The numbers of the pieces of a state: none means two pieces, and all that a state names are stored."""

from __future__ import annotations

from unittest.mock import patch

from hypothesis import given, settings
from hypothesis import strategies as st

from persistence import numbering
from persistence.numbering import Numbers, place
from persistence.pieces import Cut, Node

# A state is some lists of runs of pieces, all of them twice or once.
RUNS = st.tuples(st.integers(0, 99), st.integers(1, 9)).map(lambda run: list(range(run[0], sum(run))))
PIECES = st.lists(RUNS, max_size=8).map(lambda found: [piece for run in found for piece in run])
STATE = st.tuples(st.lists(PIECES, max_size=4), st.integers(1, 2)).map(lambda state: state[0] * state[1])
STATES = st.lists(st.tuples(STATE, st.booleans(), st.booleans()), min_size=2, max_size=12)


def cut_of(lists: list[list[int]]) -> Cut:
    root = Node("l")
    digests: list[bytes] = []
    for pieces in lists:
        node = Node("l")
        for piece in pieces:
            node.parts.append(len(digests))
            digests.append(b"%d" % piece)
        root.add(None, node)
    return Cut(root, [b""] * len(digests), digests, 0, {})


@settings(max_examples=200)
@given(STATES)
def test_every_number_of_a_state_is_that_of_its_piece(
    states: list[tuple[list[list[int]], bool, bool]],
) -> None:
    stored: dict[int, bytes] = {}
    known: dict[bytes, int] = {}
    numbers = Numbers(0, 0, [])
    # So small that what is seldom done with real states happens all the time.
    with patch.multiple(numbering, _FRAGMENTS=2, _LONG_RUN=3, _OPEN_BLOCKS=2, _GROWING=2, BLOCK=7):
        for lists, in_pieces, forgets in states:
            cut = cut_of(lists)
            placed, fresh = place(cut, known, numbers, in_pieces=in_pieces)
            for index in fresh:
                assert placed[index] not in stored
                stored[placed[index]] = cut.digests[index]
            assert [stored[number] for number in placed] == cut.digests
            known = {} if forgets else known
            known.update(zip(cut.digests, placed, strict=True))
            numbers = Numbers(numbers.n, numbers.blocks, numbers.open.items())
