"""States and threads of unusual shape: very deep, very scattered, of very long values and names."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import suppress
from decimal import Decimal
from typing import Any

import pytest

from persistence import (
    InvalidKeyError,
    InvalidValueError,
    NotFoundError,
    Persistence,
    create_persistence,
    memory_driver,
)
from persistence.compat import AgentCheckpointStorage, Checkpointer
from persistence.pieces import covered

PIECES = 15_000


async def frames_down(levels: int, call: Callable[[], Awaitable[Any]]) -> Any:
    return await (frames_down(levels - 1, call) if levels else call())


@pytest.mark.parametrize("depth", range(380, 500, 15))
async def test_a_deep_state_leaves_its_thread_readable_from_a_deeper_stack(depth: int) -> None:
    memory = memory_driver()
    async with create_persistence(memory) as p, create_persistence(memory) as q:
        first = await p.checkpoints.put("t", {"precious": 1})
        state: Any = [f"{'y' * 600}{number}" for number in range(3_000)]
        for _ in range(depth):
            state = [state]
        with suppress(InvalidValueError):  # it may be refused, but not harm the others
            await p.checkpoints.put("t", state)

        assert await frames_down(50, lambda: q.checkpoints.get("t", first.id)) == {"precious": 1}
        await frames_down(50, lambda: q.checkpoints.get("t"))
        assert await frames_down(50, lambda: q.checkpoints.delete("t")) >= 1


async def test_a_listing_filters_by_metadata_as_deep_as_can_be_stored() -> None:
    deep: dict[str, Any] = {}
    for _ in range(498):
        deep = {"in": deep}
    async with create_persistence(memory_driver()) as p:
        await p.checkpoints.put("t", 1, metadata=deep)
        found = await frames_down(50, lambda: p.checkpoints.list("t", metadata=deep))
        assert len(found) == 1


def test_a_number_is_found_in_spans_or_not() -> None:
    spans = [(1, 2), (4, 6), (9, 9)]
    assert [number for number in range(12) if covered(number, spans)] == [1, 2, 4, 5, 6, 9]
    assert not covered(5, [])


async def scattered(p: Persistence) -> tuple[str, list[str]]:
    """Put ten states labelled "base", and after each one that shares every second piece with it."""
    bases = []
    for number in range(10):
        state = [f"{number}-{item:06}{'x' * 248}" for item in range(PIECES)]
        bases.append(((await p.checkpoints.put("t", state, labels=["base"])).id, state))
    for id, state in bases:
        await p.checkpoints.put("t", "tiny")
        state[::2] = [f"new{item}" for item in state[::2]]
        last = (await p.checkpoints.put("t", state, parent_id=id)).id
    return last, state


async def test_checkpoints_of_scattered_pieces_can_be_pruned_and_copied() -> None:
    async with create_persistence(memory_driver()) as p:
        last, state = await scattered(p)
        expected = await p.checkpoints.prune("t", label="base", dry_run=True)
        assert expected.checkpoints == 10
        assert await p.checkpoints.prune("t", label="base") == expected
        assert await p.checkpoints.copy_thread("t", "u") == 20
        assert await p.checkpoints.get("u", last) == state


async def test_checkpoints_of_scattered_pieces_make_way_for_others_at_a_cap() -> None:
    async with create_persistence(memory_driver()) as p:
        last, state = await scattered(p)
        await p.checkpoints.put("t", "x", max_checkpoints_per_thread=21)
        assert len(await p.checkpoints.list("t")) == 21
        assert await p.checkpoints.get("t", last) == state
        while (await p.repair()).pieces_removed:
            pass
        assert await p.checkpoints.get("t", last) == state


@pytest.mark.parametrize(
    "state",
    [
        [Decimal("7" * 600_000), Decimal("8" * 600_000)],
        [Decimal(f"{number}{'7' * 15_000}") for number in range(400)],
        {str(number): Decimal(f"{number}{'7' * 60_000}") for number in range(100)},
    ],
    ids=["two", "list", "dict"],
)
async def test_numbers_may_have_very_many_digits(state: Any) -> None:
    async with create_persistence(memory_driver()) as p:
        await p.checkpoints.put("t", state)
        assert await p.checkpoints.get("t") == state


async def test_a_named_checkpoint_is_found_by_its_id_however_long_that_of_its_agent_is() -> None:
    async with create_persistence(memory_driver()) as p:
        given = {"agent_id": "x" * 65_530, "session_id": "", "agent_type": "", "name": "", "state": 1}
        id = await p.checkpoints.store_checkpoint(given)
        found = await p.checkpoints.retrieve_checkpoint(id)
        assert found is not None
        assert found.state == 1
        assert await p.checkpoints.delete_checkpoint(id)
        assert await p.checkpoints.retrieve_checkpoint("") is None


@pytest.mark.parametrize("bad", [5, None, "\ud800"])
async def test_what_is_no_id_of_a_named_checkpoint_is_refused(bad: Any) -> None:
    async with create_persistence(memory_driver()) as p:
        with pytest.raises(InvalidKeyError):
            await p.checkpoints.retrieve_checkpoint(bad)


async def test_what_is_no_label_and_no_checkpoint_is_named() -> None:
    async with create_persistence(memory_driver()) as p:
        with pytest.raises(InvalidKeyError):
            await p.checkpoints.put("t", 1, labels=[[1]])  # type: ignore[list-item]
        await p.checkpoints.put("t", 1)
        with pytest.raises(NotFoundError, match="no checkpoint ''"):
            await p.checkpoints.fork("t", "")


@pytest.mark.parametrize(
    "name",
    [
        "workingDirectory",
        "projectDirectory",
        "workspaceDirectory",
        "project_directory",
        "workspace_directory",
    ],
)
async def test_all_spellings_of_the_directory_are_one(name: str) -> None:
    async with AgentCheckpointStorage(memory_driver(), "") as storage:
        given = {"sessionId": "s", "hostname": "h", name: "/p", "state": 1, "createdAt": 3}
        found = await storage.retrieve_app_checkpoint(await storage.store_app_checkpoint(given))
        assert found is not None
        assert found.working_directory == "/p"


@pytest.mark.parametrize("bad", [5, [1], {5: 1}, {"orderBy": 5}])
async def test_options_that_are_none_are_refused(bad: Any) -> None:
    async with AgentCheckpointStorage(memory_driver(), "") as storage:
        with pytest.raises(InvalidValueError):
            await storage.list_agent_checkpoints(bad)


async def test_an_option_that_a_checkpointer_does_not_know_is_not_ignored() -> None:
    async with create_persistence(memory_driver()) as p:
        with pytest.raises(InvalidValueError, match="before"):
            await Checkpointer(p).list("t", {"before": "x"})


@pytest.mark.parametrize("expected", [5, [], False, 0.0])
async def test_what_cannot_be_the_latest_is_no_conflict(expected: Any) -> None:
    async with create_persistence(memory_driver()) as p:
        with pytest.raises(InvalidValueError, match="expected_latest"):
            await p.checkpoints.put("t", 1, expected_latest=expected)


@pytest.mark.parametrize(
    ("method", "arguments"),
    [
        ("list", {"thread_id": "t", "label": 5}),
        ("list", {"thread_id": "t", "run_id": 5}),
        ("prune", {"label": ["a"]}),
        ("list_checkpoints", {"name": 5}),
        ("list_app_checkpoints", {"hostname": 5}),
        ("copy_thread", {"thread_id": "t", "new_thread_id": "u", "checkpoint_id": 5}),
    ],
    ids=str,
)
async def test_a_filter_that_can_match_nothing_is_refused(method: str, arguments: dict[str, Any]) -> None:
    async with create_persistence(memory_driver()) as p:
        await p.checkpoints.put("t", 1)
        with pytest.raises(InvalidKeyError, match="must be a text"):
            await getattr(p.checkpoints, method)(**arguments)


@pytest.mark.parametrize("metadata", [0, [], [1], ""])
async def test_metadata_are_a_mapping(metadata: Any) -> None:
    async with create_persistence(memory_driver()) as p:
        with pytest.raises(InvalidValueError, match="metadata"):
            await p.checkpoints.put("t", 1, metadata=metadata)
        with pytest.raises(InvalidValueError, match="metadata"):
            await p.checkpoints.list("t", metadata=metadata)
