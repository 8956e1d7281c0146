"""Checkpoints: threads, branches, retention, named views; on every engine, and what they cost."""

from __future__ import annotations

import asyncio
import multiprocessing
import random
import sys
import uuid
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from engines import ENGINES
from faulty_driver import FaultyDriver, RecordingDriver, end_of_the_process
from hypothesis import given, settings
from hypothesis import strategies as st
from test_pieces import same, states

from persistence import (
    ConflictError,
    CorruptRecordError,
    InvalidKeyError,
    InvalidValueError,
    NotFoundError,
    OutcomeUnknownError,
    Persistence,
    UnavailableError,
    create_persistence,
    pieces,
    thread_reader,
    threads,
)
from persistence.checkpoints import NamedAgentCheckpoint
from persistence.driver import Entry, Key, Put
from persistence.drivers.memory import MemoryDriver
from persistence.ids import now_ms
from persistence.pieces import count, runs, subtract, union
from persistence.testing import MakeDriver

MIB = 1 << 20
SHARED = [name for name, engine in ENGINES.items() if engine.shared]


def message(i: int, size: int = 900) -> dict[str, Any]:
    return {"role": "user", "content": f"{i} ".ljust(size, "x"), "i": i}


def state(messages: int, first: int = 0) -> dict[str, Any]:
    return {"version": 2, "messages": [message(i) for i in range(first, messages)], "step": messages}


def large(mebibytes: int, seed: int = 0) -> dict[str, Any]:
    chance = random.Random(seed)
    return {"blobs": [chance.randbytes(50_000).hex() for _ in range(mebibytes * 10)]}


async def stored(p: Persistence, thread_id: str = "t") -> list[tuple[str, int]]:
    """Return the keys of a thread and the bytes of each entry."""
    found: list[tuple[str, int]] = []
    start, more = "", True
    while more:
        page = await p._store.coalescer.scan(
            p.checkpoints.threads.partition(thread_id), start, None, limit=1000
        )
        found += [(entry.key, len(entry.key) + len(entry.value)) for entry in page.entries]
        more = page.more
        start = f"{found[-1][0]}!" if found else ""
    return found


async def spare(p: Persistence, thread_id: str = "t") -> int:
    """Return how many pieces are stored that no checkpoint needs; fail if one is missing that one needs."""
    threads = p.checkpoints.threads
    partition = threads.partition(thread_id)
    head = await threads.live_head(thread_id)
    found = [] if head is None else await threads.listed(partition, head)
    needed = union(s for one in found if one.body for s in threads.spans(partition, one.body))
    keys = [key for key, _ in await stored(p, thread_id)]
    there = runs(int(key.removeprefix("piece/")) for key in keys if key.startswith("piece/"))
    assert subtract(needed, there) == []
    assert head is None or len(found) == head.k == len([key for key in keys if key.startswith("checkpoint/")])
    return count(subtract(there, needed))


def ids(found: list[Any]) -> list[str]:
    return [one.id for one in found]


# ---- a thread


async def test_a_state_comes_back_as_it_was_put(p: Persistence) -> None:
    given = {
        "version": 2,
        "when": datetime(2026, 1, 2, tzinfo=UTC),
        "rows": [(1, b"\0\xff")] * 300,
        "z": None,
        "a": {"": "\0"},
    }
    meta = await p.checkpoints.put("t", given, metadata={"a": 1}, labels=["x"], run_id="r")
    assert same(await p.checkpoints.get("t"), given)
    assert same(await p.checkpoints.get("t", meta.id), given)
    found = await p.checkpoints.read("t")
    assert found is not None
    assert found.meta == meta == await p.checkpoints.get_meta("t") == (await p.checkpoints.list("t"))[0]
    assert (meta.version, meta.metadata, meta.labels, meta.run_id, meta.parent_id, meta.seq) == (
        *(2, {"a": 1}, ("x",), "r", None, 1),
    )
    assert meta.size_bytes > 300 * 10
    assert 0 < meta.stored_bytes < meta.size_bytes + 1000


async def test_more_threads_than_are_remembered_can_be_put_and_read_at_once() -> None:
    async with create_persistence(MemoryDriver()) as p:
        names = [f"t{n}" for n in range(2_100)]
        await asyncio.gather(*(p.checkpoints.put(name, {"n": name}) for name in names))
        puts = [asyncio.ensure_future(p.checkpoints.put(name, {"n": name})) for name in names]
        found = await asyncio.gather(*(p.checkpoints.get(name) for name in names))
        assert [state["n"] for state in found] == names
        await asyncio.gather(*puts)


@pytest.mark.parametrize("given", [None, 0, False, "", [], {}, "x" * 30_000, b"x" * 30_000, (1,), {1: 2}])
async def test_any_value_is_a_state(p: Persistence, given: Any) -> None:
    meta = await p.checkpoints.put("t", given)
    found = await p.checkpoints.read("t", meta.id)
    assert found is not None
    assert same(found.state, given)


async def test_unknown_threads_and_ids_are_none(p: Persistence) -> None:
    assert await p.checkpoints.get("t") is None
    assert await p.checkpoints.list("t") == []
    assert await p.checkpoints.delete("t") == 0
    assert await p.checkpoints.get_thread("t") is None
    meta = await p.checkpoints.put("t", 1)
    assert await p.checkpoints.get("t", "unknown") is None
    assert await p.checkpoints.get("u", meta.id) is None
    assert await p.checkpoints.delete("t", "unknown") == 0
    assert await p.checkpoints.get("t") == 1


async def test_the_empty_text_is_an_ordinary_id(p: Persistence) -> None:
    await p.checkpoints.put("t", 1)
    await p.checkpoints.put("", 2)
    assert await p.checkpoints.get("t", "") is None
    assert await p.checkpoints.delete("t", "") == 0
    assert await p.checkpoints.list("t", before="") == []
    assert len(await p.checkpoints.list("t", after="")) == 1
    assert (await p.checkpoints.get("t"), await p.checkpoints.get("")) == (1, 2)
    with pytest.raises(NotFoundError):
        await p.checkpoints.put("t", 1, parent_id="")
    with pytest.raises(ConflictError):
        await p.checkpoints.put("t", 1, expected_latest="")


@pytest.mark.parametrize("thread", ["0", "null", "a/b", "a:b", "../x", "😀", "\0", "x" * 999, "{t}", "%"])
async def test_any_text_is_a_thread_id(p: Persistence, thread: str) -> None:
    await p.checkpoints.put(thread, thread)
    await p.checkpoints.put("other", 1)
    assert await p.checkpoints.get(thread) == thread
    assert thread in [one.thread_id for one in await p.checkpoints.list_threads()]
    assert await p.checkpoints.delete(thread) == 1
    assert [one.thread_id for one in await p.checkpoints.list_threads()] == ["other"]


async def test_bad_arguments_are_refused(p: Persistence) -> None:
    bad: list[tuple[type[Exception], dict[str, Any]]] = [
        (InvalidKeyError, {"thread_id": 5}),
        (InvalidKeyError, {"parent_id": 5}),
        (InvalidKeyError, {"run_id": 5}),
        (InvalidValueError, {"labels": "abc"}),
        (InvalidValueError, {"metadata": 5}),
        (InvalidValueError, {"metadata": {"x": "y" * 100_000}}),
        (InvalidValueError, {"max_checkpoints_per_thread": -1}),
        (InvalidValueError, {"max_checkpoints_per_thread": 1.5}),
        (InvalidValueError, {"now": float("nan")}),
        (InvalidValueError, {"now": "today"}),
        (InvalidValueError, {"expires_at": 2**63}),
        (InvalidValueError, {"snapshot": object()}),
    ]
    for error, arguments in bad:
        with pytest.raises(error):
            await p.checkpoints.put(**{"thread_id": "t", "snapshot": 1, **arguments})
    for limit in (1.5, "1", True):
        with pytest.raises(InvalidValueError):
            await p.checkpoints.list("t", limit=limit)  # type: ignore[arg-type]
    assert await p.checkpoints.list("t") == []


async def test_a_listing_is_paged_newest_first(p: Persistence) -> None:
    metas = [await p.checkpoints.put("t", state(i)) for i in range(12)]
    newest_first = ids(metas[::-1])
    assert ids(await p.checkpoints.list("t")) == newest_first
    assert await p.checkpoints.list("t", limit=0) == await p.checkpoints.list("t", limit=-1) == []
    pages, cursor = [], None
    while True:
        page = await p.checkpoints.list("t", limit=5, before=cursor)
        pages.append(ids(page))
        cursor = page.cursor
        if cursor is None:
            break
    assert pages == [newest_first[:5], newest_first[5:10], newest_first[10:]]
    assert ids(await p.checkpoints.list("t", after=metas[8].id)) == newest_first[:3]
    assert ids(await p.checkpoints.list("t", before=metas[2].id)) == newest_first[10:]
    between = await p.checkpoints.list("t", after=metas[2].id, before=metas[9].id, limit=3)
    assert ids(between) == ids(metas[8:5:-1])
    assert (await p.checkpoints.list("t", limit=12)).cursor is None
    assert (await p.checkpoints.list("t", limit=11)).cursor == metas[1].id


async def test_a_listing_filters_by_metadata_label_and_run(p: Persistence) -> None:
    for i in range(10):
        await p.checkpoints.put(
            "t",
            i,
            metadata={"even": i % 2 == 0, "n": i, "tag": {"a": [i % 3]}},
            labels=["third"] if i % 3 == 0 else [],
            run_id=f"r{i // 5}",
        )

    async def found(**filters: Any) -> list[int]:
        return [meta.metadata["n"] for meta in await p.checkpoints.list("t", **filters)]

    assert await found(metadata={"even": True}) == [8, 6, 4, 2, 0]
    assert await found(metadata={"even": 1}) == []
    assert await found(metadata={"unknown": None}) == []
    assert await found(metadata={"tag": {"a": [1]}, "even": False}) == [7, 1]
    assert await found(metadata={"tag": {"a": [True]}}) == []
    assert await found(label="third", run_id="r1") == [9, 6]
    assert await found(metadata={"even": True}, limit=2) == [8, 6]


async def test_branches_of_a_list_that_grows_overwrite_nothing_of_each_other(p: Persistence) -> None:
    def of(step: int, *names: object) -> dict[str, Any]:
        return {"messages": [f"{name} " * 300 for name in names], "step": [f"{step} " * 3000]}

    states = [of(0, *range(10)), of(1, *range(11)), of(2, *range(12)), of(3, *range(11), "other")]
    metas = [await p.checkpoints.put("t", given) for given in states[:3]]
    metas.append(await p.checkpoints.put("t", states[3], parent_id=metas[1].id))
    assert [await p.checkpoints.get("t", meta.id) for meta in metas] == states


async def test_labels_can_be_changed(p: Persistence) -> None:
    first, second = [await p.checkpoints.put("t", i, labels=["old"]) for i in range(2)]
    await p.checkpoints.set_labels("t", first.id, ["good", "good"])
    await p.checkpoints.set_labels("t", second.id, [])
    assert [meta.labels for meta in await p.checkpoints.list("t")] == [(), ("good",)]
    latest = await p.checkpoints.get_meta("t")
    assert latest is not None
    assert latest.labels == ()
    assert (await p.checkpoints.put("t", 3)).parent_id == second.id
    with pytest.raises(NotFoundError):
        await p.checkpoints.set_labels("t", "unknown", [])


async def test_times_are_the_callers_and_order_is_the_stores(p: Persistence) -> None:
    moment = datetime(2026, 1, 2, tzinfo=UTC)
    times: list[Any] = [moment, 5, 1.75, lambda: 3.5, -7]
    metas = [await p.checkpoints.put("t", i, now=now) for i, now in enumerate(times)]
    assert [meta.created_at for meta in metas] == [1767312000000, 5, 1, 3, -7]
    assert await p.checkpoints.get("t") == 4
    assert ids(await p.checkpoints.list("t")) == ids(metas[::-1]) == sorted(ids(metas), reverse=True)
    assert all(uuid.UUID(meta.id).version == 7 for meta in metas)


async def test_ids_rise_and_the_latest_is_the_last_even_if_clocks_differ(make_driver: MakeDriver) -> None:
    # Two stores on one database (on memory: two objects on one driver), an hour apart.
    async with (
        create_persistence(make_driver(), clock=lambda: 1_800_000_000_000) as fast,
        create_persistence(make_driver(), clock=lambda: 1_799_996_400_000) as slow,
    ):
        metas = [await (fast, slow)[i % 2].checkpoints.put("t", i) for i in range(20)]
        assert ids(metas) == sorted(ids(metas))
        assert await fast.checkpoints.get("t") == await slow.checkpoints.get("t") == 19
        assert [meta.seq for meta in metas] == list(range(1, 21))


async def test_puts_in_one_millisecond_keep_their_order(make_driver: MakeDriver) -> None:
    async with create_persistence(make_driver(), clock=lambda: 1_800_000_000_000) as p:
        metas = [await p.checkpoints.put("t", i, max_checkpoints_per_thread=5) for i in range(60)]
        assert ids(metas) == sorted(ids(metas))
        assert ids(await p.checkpoints.list("t")) == ids(metas[:-6:-1])


# ---- the cap


@pytest.mark.parametrize("cap", [0, 1, 3])
async def test_the_cap_is_exact(p: Persistence, cap: int) -> None:
    for i in range(6):
        await p.checkpoints.put("t", state(i + 3, i), max_checkpoints_per_thread=cap)
        assert len(await p.checkpoints.list("t")) == min(cap, i + 1)
        assert await spare(p) == 0
    expected = [state(i + 3, i) for i in range(6)][::-1][:cap]
    assert [await p.checkpoints.get("t", meta.id) for meta in await p.checkpoints.list("t")] == expected
    assert await p.checkpoints.get("t") == (expected[0] if cap else None)


async def test_the_default_cap_is_a_hundred_and_none_is_none(p: Persistence) -> None:
    for i in range(103):
        await p.checkpoints.put("capped", i)
        await p.checkpoints.put("free", i, max_checkpoints_per_thread=None)
    assert len(await p.checkpoints.list("capped")) == 100
    assert len(await p.checkpoints.list("free")) == 103


async def test_a_lower_cap_removes_many_at_once(p: Persistence) -> None:
    for i in range(260):
        await p.checkpoints.put("t", [message(i), message(i + 1)], max_checkpoints_per_thread=None)
    await p.checkpoints.put("t", "last", max_checkpoints_per_thread=2)
    assert len(await p.checkpoints.list("t")) == 2
    assert await spare(p) == 0
    assert len(await stored(p)) < 10


async def test_the_cap_holds_under_concurrent_puts(make_driver: MakeDriver) -> None:
    opened = [await create_persistence(make_driver()) for _ in range(3)]
    metas = await asyncio.gather(
        *(
            opened[i % 3].checkpoints.put("t", state(i % 5 + 2, i % 5), max_checkpoints_per_thread=3)
            for i in range(16)
        )
    )
    found = await opened[0].checkpoints.list("t")
    assert len(found) == 3
    assert ids(found) == sorted(ids(metas), reverse=True)[:3]
    assert len({meta.id for meta in metas}) == len({meta.seq for meta in metas}) == 16
    assert await spare(opened[1]) == 0
    for p in opened:
        await p.close()


# ---- two who resume, branches, forks


async def test_of_two_who_resume_one_checkpoint_only_one_goes_on(make_driver: MakeDriver) -> None:
    opened = [await create_persistence(make_driver()) for _ in range(4)]
    start = await opened[0].checkpoints.put("t", 0)
    for p in opened:
        assert await p.checkpoints.get("t") == 0
    outcomes = await asyncio.gather(
        *(p.checkpoints.put("t", i, expected_latest=start.id) for i, p in enumerate(opened * 2)),
        return_exceptions=True,
    )
    winners = [one for one in outcomes if not isinstance(one, BaseException)]
    assert len(winners) == 1
    assert all(isinstance(one, ConflictError) for one in outcomes if one is not winners[0])
    assert len(await opened[0].checkpoints.list("t")) == 2
    for p in opened:
        await p.close()


async def test_expected_latest_0_means_that_there_must_be_none(p: Persistence) -> None:
    first = await p.checkpoints.put("t", 1, expected_latest=0)
    with pytest.raises(ConflictError):
        await p.checkpoints.put("t", 2, expected_latest=0)
    second = await p.checkpoints.put("t", 2, expected_latest=first.id)
    with pytest.raises(ConflictError):
        await p.checkpoints.put("t", 3, expected_latest=first.id)
    assert second.parent_id == first.id


async def test_a_writer_that_remembers_an_old_latest_looks_again_before_it_refuses(
    make_driver: MakeDriver,
) -> None:
    async with create_persistence(make_driver()) as a, create_persistence(make_driver()) as b:
        await a.checkpoints.put("t", 1)
        second = await b.checkpoints.put("t", 2)
        third = await a.checkpoints.put("t", 3, expected_latest=second.id)
        assert third.parent_id == second.id


async def test_branches_share_what_they_have_in_common(p: Persistence) -> None:
    base = state(40)
    first = await p.checkpoints.put("t", base)
    left = await p.checkpoints.put("t", {**base, "way": "left"})
    right = await p.checkpoints.put("t", {**base, "way": "right"}, parent_id=first.id)
    again = await p.checkpoints.put("t", {**base, "way": "left again"}, parent_id=left.id)
    assert [right.parent_id, again.parent_id] == [first.id, left.id]
    assert ids(await p.checkpoints.branches("t")) == [again.id, right.id]
    assert right.stored_bytes + again.stored_bytes < 2000
    assert (await p.checkpoints.get("t", right.id))["way"] == "right"
    with pytest.raises(NotFoundError):
        await p.checkpoints.put("t", 1, parent_id="unknown")


async def test_a_fork_costs_a_reference(p: Persistence) -> None:
    metas = [await p.checkpoints.put("t", state(40 + i)) for i in range(3)]
    fork = await p.checkpoints.fork("t", metas[0].id, labels=["branch"])
    assert fork.stored_bytes < 1000
    assert (fork.parent_id, fork.version, fork.size_bytes) == (metas[0].id, 2, metas[0].size_bytes)
    assert await p.checkpoints.get("t") == state(40)
    after = await p.checkpoints.put("t", state(41))
    assert after.parent_id == fork.id
    await p.checkpoints.prune("t", keep_last=2)
    assert await p.checkpoints.get("t", fork.id) == state(40)
    assert await spare(p) == 0
    with pytest.raises(NotFoundError):
        await p.checkpoints.fork("t", "unknown")
    with pytest.raises(NotFoundError):
        await p.checkpoints.fork("unknown")


@pytest.mark.parametrize(
    "make",
    [lambda: "x" * 100_000_000, lambda: {"messages": ["x" * 100_000] * 1_000}, lambda: ["x" * MIB] * 100],
)
async def test_a_hundred_megabytes_may_be_put(make: Callable[[], Any]) -> None:
    async with create_persistence(MemoryDriver()) as p:
        await p.checkpoints.put("t", make())
        assert await p.checkpoints.get("t") == make()


async def test_a_fork_of_a_long_thread_removes_nothing(p: Persistence) -> None:
    metas = [await p.checkpoints.put("t", i, max_checkpoints_per_thread=None) for i in range(120)]
    await p.checkpoints.fork("t", metas[0].id)
    assert len(await p.checkpoints.list("t")) == 121
    assert await p.checkpoints.get("t", metas[0].id) == 0


async def test_a_page_is_asked_for_by_limit_before_and_after(p: Persistence) -> None:
    ids = [(await p.checkpoints.put("t", i)).id for i in range(6)]
    assert [meta.id for meta in await p.checkpoints.list("t", 2)] == ids[:-3:-1]
    assert [meta.id for meta in await p.checkpoints.list("t", 9, ids[4], ids[1])] == [ids[3], ids[2]]


@pytest.mark.parametrize("create", [dict, NamedAgentCheckpoint])
async def test_a_checkpoint_to_store_is_a_mapping_or_a_record(p: Persistence, create: Any) -> None:
    given = create(agent_id="a", session_id="s", agent_type="coder", name="n", state={"x": 1}, created_at=5)
    found = await p.checkpoints.retrieve_checkpoint(await p.checkpoints.store_checkpoint(given))
    assert found is not None
    assert (found.agent_id, found.state, found.created_at) == ("a", {"x": 1}, 5)


async def test_a_fork_into_a_thread_of_its_own_does_not_depend_on_its_source(p: Persistence) -> None:
    metas = [await p.checkpoints.put("t", state(5 + i)) for i in range(3)]
    fork = await p.checkpoints.fork("t", metas[1].id, new_thread_id="u")
    assert fork.thread_id == "u"
    assert fork.parent_id == metas[1].id
    await p.checkpoints.delete("t")
    assert await p.checkpoints.get("u") == state(6)
    await p.checkpoints.put("u", state(7))
    assert await spare(p, "u") == 0


async def test_a_copied_thread_is_whole_and_independent(p: Persistence) -> None:
    metas = [await p.checkpoints.put("t", state(5 + i), labels=[str(i)]) for i in range(8)]
    assert await p.checkpoints.copy_thread("t", "u") == 8
    assert [(meta.id, meta.labels, meta.parent_id, meta.seq) for meta in await p.checkpoints.list("u")] == [
        (meta.id, meta.labels, meta.parent_id, meta.seq) for meta in metas[::-1]
    ]
    await p.checkpoints.delete("t")
    for i, meta in enumerate(metas):
        assert await p.checkpoints.get("u", meta.id) == state(5 + i)
    added = await p.checkpoints.put("u", state(13))
    assert added.seq == 9
    assert added.stored_bytes < 2500
    assert await spare(p, "u") == 0
    with pytest.raises(ConflictError):
        await p.checkpoints.copy_thread("u", "t")
    with pytest.raises(NotFoundError):
        await p.checkpoints.copy_thread("t", "v")
    assert await p.checkpoints.copy_thread("u", "w", checkpoint_id=metas[2].id) == 1
    assert await p.checkpoints.get("w") == state(7)


async def test_a_difference_names_the_places(p: Persistence) -> None:
    a = await p.checkpoints.put("t", {"messages": [1, 2], "n": 1, "old": 0, "same": [1.0]})
    b = await p.checkpoints.put("t", {"messages": [1, 3, 4], "n": True, "same": [1.0], "new": None})
    changes = [(c.path, c.kind, c.before, c.after) for c in await p.checkpoints.diff("t", a.id, b.id)]
    assert changes == [
        (("messages", 1), "changed", 2, 3),
        (("messages", 2), "added", None, 4),
        (("n",), "changed", 1, True),
        (("old",), "removed", 0, None),
        (("new",), "added", None, None),
    ]
    assert await p.checkpoints.diff("t", a.id, a.id) == []
    with pytest.raises(NotFoundError):
        await p.checkpoints.diff("t", a.id, "unknown")


# ---- deleting, pruning, expiring


async def test_deleting_a_thread_removes_all_of_it(p: Persistence) -> None:
    metas = [await p.checkpoints.put("t", state(5 + i)) for i in range(4)]
    assert await p.checkpoints.delete("t") == 4
    assert await p.checkpoints.get("t") is None
    assert await p.checkpoints.get("t", metas[0].id) is None
    assert await p.checkpoints.list("t") == []
    assert await p.checkpoints.list_threads() == []
    assert [key for key, _ in await stored(p)] == ["head"]
    assert await p.checkpoints.delete("t") == 0


async def test_a_deleted_thread_refuses_its_past_and_begins_anew(make_driver: MakeDriver) -> None:
    async with create_persistence(make_driver()) as a, create_persistence(make_driver()) as b:
        old = await a.checkpoints.put("t", state(5))
        await b.checkpoints.delete("t")
        with pytest.raises(NotFoundError):
            await a.checkpoints.put("t", state(6), parent_id=old.id)
        with pytest.raises(ConflictError):
            await a.checkpoints.put("t", state(6), expected_latest=old.id)
        assert await b.checkpoints.get("t") is None
        new = await a.checkpoints.put("t", state(5))
        assert new.id > old.id
        assert new.parent_id is None
        assert ids(await b.checkpoints.list("t")) == [new.id]
        assert await b.checkpoints.get("t", old.id) is None
        assert await b.checkpoints.get("t") == state(5)
        assert await spare(b) == 0
        assert await b.checkpoints.count_threads() == 1


async def test_deleting_one_checkpoint_leaves_the_others(p: Persistence) -> None:
    metas = [await p.checkpoints.put("t", state(5 + i, i)) for i in range(4)]
    assert await p.checkpoints.delete("t", metas[3].id) == 1
    assert await p.checkpoints.get("t") == state(7, 2)
    assert await p.checkpoints.delete("t", metas[0].id) == 1
    assert ids(await p.checkpoints.list("t")) == ids(metas[2:0:-1])
    assert await spare(p) == 0
    assert (await p.checkpoints.put("t", state(9))).parent_id == metas[2].id
    for meta in await p.checkpoints.list("t"):
        await p.checkpoints.delete("t", meta.id)
    assert await p.checkpoints.list_threads() == []
    assert await p.checkpoints.get("t") is None
    await p.checkpoints.put("t", state(3))
    assert await p.checkpoints.get("t") == state(3)
    assert await spare(p) == 0


async def test_pruning_by_each_condition(p: Persistence) -> None:
    async def fill() -> list[Any]:
        await p.checkpoints.delete("t")
        return [
            await p.checkpoints.put(
                "t", state(3 + i, i), now=1000 * i, run_id=f"r{i % 2}", labels=["a"] if i < 3 else []
            )
            for i in range(6)
        ]

    async def left() -> list[int]:
        return [meta.created_at // 1000 for meta in await p.checkpoints.list("t")]

    for arguments, expected in [
        ({"keep_last": 2}, [5, 4]),
        ({"keep_last": 0}, []),
        ({"older_than": 3000}, [5, 4, 3]),
        ({"older_than": datetime.fromtimestamp(3, UTC)}, [5, 4, 3]),
        ({"older_than": timedelta(days=1)}, []),
        ({"run_id": "r0"}, [5, 3, 1]),
        ({"label": "a"}, [5, 4, 3]),
        ({"keep_last": 5, "run_id": "r0"}, [5, 4, 3, 2, 1]),
    ]:
        await fill()
        dry = await p.checkpoints.prune(dry_run=True, **arguments)  # type: ignore[arg-type]
        assert await left() == [5, 4, 3, 2, 1, 0]
        done = await p.checkpoints.prune("t", **arguments)  # type: ignore[arg-type]
        assert await left() == expected
        assert done == dry
        assert done.checkpoints == 6 - len(expected)
        assert await spare(p) == 0
        assert not await p.checkpoints.prune("t", **arguments)  # type: ignore[arg-type]
    with pytest.raises(InvalidValueError):
        await p.checkpoints.prune()


async def test_pruning_all_threads(p: Persistence) -> None:
    for thread in "abc":
        for i in range(4):
            await p.checkpoints.put(thread, state(2 + i, i))
    done = await p.checkpoints.prune(keep_last=1)
    assert (done.threads, done.checkpoints) == (3, 9)
    assert [one.checkpoints for one in await p.checkpoints.list_threads()] == [1, 1, 1]
    for thread in "abc":
        assert await spare(p, thread) == 0


async def test_threads_are_listed_and_counted(p: Persistence) -> None:
    for i in range(7):
        await p.checkpoints.put(f"t{i}", i)
    await p.checkpoints.put("t0", 8)
    assert await p.checkpoints.count_threads() == 7
    found: list[Any] = []
    cursor = None
    while True:
        page = await p.checkpoints.list_threads(limit=3, cursor=cursor)
        found += page
        cursor = page.cursor
        if cursor is None:
            break
    assert sorted(one.thread_id for one in found) == [f"t{i}" for i in range(7)]
    assert [one.created_at for one in found] == sorted((o.created_at for o in found), reverse=True)
    (first,) = [one for one in found if one.thread_id == "t0"]
    assert first == await p.checkpoints.get_thread("t0")
    assert first.checkpoints == 2
    assert first.updated_at >= first.created_at


async def test_an_expired_thread_is_not_there(make_driver: MakeDriver) -> None:
    now = 1_800_000_000_000
    async with create_persistence(make_driver(), clock=lambda: now) as p:
        meta = await p.checkpoints.put("t", state(5), expires_at=now + 1000)
        await p.checkpoints.put("t", state(6))
        await p.checkpoints.put("stays", 1)
        await p.checkpoints.put("never", 1, expires_at=now + 1000)
        await p.checkpoints.set_expiry("never", None)
        assert await p.checkpoints.delete_expired() == 0
        now += 1000
        assert await p.checkpoints.get("t") is None
        assert await p.checkpoints.get("t", meta.id) is None
        assert await p.checkpoints.list("t") == []
        with pytest.raises(NotFoundError):
            await p.checkpoints.put("t", 1, parent_id=meta.id)
        assert await p.checkpoints.count_threads() == 2
        with pytest.raises(NotFoundError):
            await p.checkpoints.set_expiry("t", None)
        assert await p.checkpoints.delete_expired() == 2
        assert [key for key, _ in await stored(p)] == ["head"]
        assert await p.checkpoints.delete_expired() == 0
        await p.checkpoints.put("t", state(1))
        assert await p.checkpoints.get("t") == state(1)


# ---- large states


async def test_a_state_too_large_for_one_write_comes_back(p: Persistence) -> None:
    given = large(9)
    meta = await p.checkpoints.put("t", given)
    assert await p.checkpoints.get("t") == given
    given["blobs"][40] = "changed"
    changed = await p.checkpoints.put("t", given)
    assert changed.stored_bytes < meta.stored_bytes / 20
    assert await p.checkpoints.get("t", changed.id) == given
    assert await spare(p) == 0
    assert await p.checkpoints.delete("t") == 2
    assert [key for key, _ in await stored(p)] == ["head"]


async def test_many_small_pieces_are_uploaded_too(p: Persistence) -> None:
    given = state(2600)
    await p.checkpoints.put("t", given)
    assert await p.checkpoints.get("t") == given
    await p.checkpoints.put("t", 1, max_checkpoints_per_thread=1)
    assert await spare(p) == 0


async def test_a_large_put_goes_on_beside_small_ones(p: Persistence) -> None:
    await p.checkpoints.put("t", 0)
    async with create_persistence(p._driver) as other:
        task = asyncio.create_task(other.checkpoints.put("t", large(8), max_checkpoints_per_thread=None))
        for i in range(10):
            await p.checkpoints.put("t", i, max_checkpoints_per_thread=None)
            await asyncio.sleep(0.002)
        meta = await task
        assert await p.checkpoints.get("t", meta.id) == large(8)
        assert len(await p.checkpoints.list("t")) == 12
        assert await spare(p) == 0
        # `p` closes the driver that both use
        await p._coalescer.start(asyncio.sleep(0))


async def test_a_delete_ends_a_large_put_that_names_its_parent() -> None:
    memory = MemoryDriver()

    class Slow(RecordingDriver):
        async def apply(self, writes: Any) -> Any:
            if any(op.key.startswith("piece/") for write in writes for op in write.ops):
                await asyncio.sleep(0.01)
            return await super().apply(writes)

    async with create_persistence(Slow(memory)) as a, create_persistence(RecordingDriver(memory)) as b:
        first = await a.checkpoints.put("t", 0)
        task = asyncio.create_task(a.checkpoints.put("t", large(12), parent_id=first.id))
        await asyncio.sleep(0.015)
        await b.checkpoints.delete("t")
        with pytest.raises(NotFoundError):
            await task
        await asyncio.gather(*a._coalescer._tasks)  # what the failed put left is removed behind it
        assert [key for key, _ in await stored(b)] == ["head"]


class Stuttering(RecordingDriver):
    """Takes its time for each Write of pieces, and stops before the third until it may go on."""

    def __init__(self, inner: MemoryDriver) -> None:
        super().__init__(inner)
        self.third, self.may_go_on = asyncio.Event(), asyncio.Event()
        self.writes = 0

    async def apply(self, writes: Any) -> Any:
        if any(op.key.startswith("piece/") for write in writes for op in write.ops):
            self.writes += 1
            if self.writes == 3:
                self.third.set()
                await self.may_go_on.wait()
            await asyncio.sleep(0.02)
        return await super().apply(writes)


@pytest.mark.parametrize("goes_on", [True, False])
async def test_repair_ends_large_puts_that_do_not_go_on(
    goes_on: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("persistence.thread_repair._UPLOAD_PAUSE", 0.1)
    memory = MemoryDriver()
    driver = Stuttering(memory)
    if goes_on:
        driver.may_go_on.set()
    async with create_persistence(driver) as a, create_persistence(RecordingDriver(memory)) as b:
        await a.checkpoints.put("t", 0)
        task = asyncio.create_task(a.checkpoints.put("t", large(40)))
        await driver.third.wait()
        assert (await b.repair(dry_run=True)).uploads_ended == (0 if goes_on else 1)
        report = await b.repair()
        if goes_on:
            assert (report.uploads_ended, report.pieces_removed) == (0, 0)
        else:
            assert report.uploads_ended == 1
            assert await spare(b) == 0
            driver.may_go_on.set()
        await task  # if it was ended it was alive after all, and begins again
        assert await b.checkpoints.get("t") == large(40)
        assert await spare(b) == 0


# ---- corrupt data


async def test_a_corrupt_checkpoint_is_named_and_hides_no_other(p: Persistence) -> None:
    metas = [await p.checkpoints.put("t", state(5 + i, i)) for i in range(3)]
    partition = p.checkpoints.threads.partition("t")
    key = f"checkpoint/{metas[1].id}"
    await p._store.coalescer.write(partition, [Put(key, b'{"f":1,"id"')], hint=True)
    with pytest.raises(CorruptRecordError, match=metas[1].id):
        await p.checkpoints.get("t", metas[1].id)
    found = await p.checkpoints.list("t")
    assert ids(found) == ids(metas[::-1])
    assert [meta.corrupt is not None for meta in found] == [False, True, False]
    assert await p.checkpoints.get("t") == state(7, 2)
    assert await p.checkpoints.get("t", metas[0].id) == state(5, 0)
    await p.checkpoints.put("t", state(9, 3), max_checkpoints_per_thread=3)  # trims the first, no piece of it
    assert await p.checkpoints.get("t", metas[2].id) == state(7, 2)
    report = await p.repair()
    assert report.corrupt_count == 1
    assert metas[1].id in report.corrupt[0]
    assert await p.checkpoints.delete("t", metas[1].id) == 1
    await p.repair()
    assert await spare(p) == 0


@pytest.mark.parametrize("damage", [b"garbage", b'{"f":1,"v":5}', b'{"f":1,"t":true,"v":[{"$x":1}]}', None])
async def test_a_corrupt_piece_makes_its_checkpoints_unreadable_and_no_other(
    make_driver: MakeDriver, damage: bytes | None
) -> None:
    async with create_persistence(make_driver()) as p:
        first = await p.checkpoints.put("t", [message(1), message(2)])
        second = await p.checkpoints.put("t", [message(1), message(3)])
        partition, key = p.checkpoints.threads.partition("t"), "piece/000000000003"
        if damage is None:
            await p._store.coalescer.purge(partition, key, f"{key}!")
        else:
            await p._store.coalescer.write(partition, [Put(key, damage)], hint=True)
    async with create_persistence(make_driver()) as p:  # who wrote the pieces remembers them
        with pytest.raises(CorruptRecordError, match=rf"{second.id}|000000000003"):
            await p.checkpoints.get("t")
        assert await p.checkpoints.get("t", first.id) == [message(1), message(2)]
        assert len(await p.checkpoints.list("t")) == 2
        if damage is None:
            assert (await p.repair()).corrupt_count == 1


async def test_a_thread_whose_head_cannot_be_read_can_be_deleted(make_driver: MakeDriver) -> None:
    driver = make_driver()
    async with create_persistence(driver) as p, create_persistence(driver) as q:
        metas = [await p.checkpoints.put("t", state(40 + i, i)) for i in range(5)]
        partition = p.checkpoints.threads.partition("t")
        garbage = [Put("head", b"{"), Put("pending/of-one-killed", b'{"f":1}')]
        await p._store.coalescer.write(partition, garbage, hint=True)
        for call in (q.checkpoints.get("t"), q.checkpoints.put("t", {}), q.checkpoints.list("t")):
            with pytest.raises(CorruptRecordError, match="head"):
                await call
        assert await q.checkpoints.delete("t") == 5
        assert await q.checkpoints.get("t") is None
        assert await q.checkpoints.delete("t") == 0
        with pytest.raises(ConflictError):
            await p.checkpoints.put("t", {}, expected_latest=metas[-1].id)
        assert await spare(q) == 0
        assert await q._store.coalescer.names(partition, "piece/") == []
        assert await q._store.coalescer.names(partition, "pending/") == []
        meta = await p.checkpoints.put("t", state(3, 9))
        assert meta.seq == metas[-1].seq + 1  # no number is used twice
        assert ids(await q.checkpoints.list("t")) == [meta.id]
        assert await q.checkpoints.get("t") == state(3, 9)
        assert (await q.repair()).corrupt_count == 0


# ---- named checkpoints


def named(agent: str = "a", **fields: Any) -> dict[str, Any]:
    return {
        "agent_id": agent,
        "session_id": "s",
        "agent_type": "coder",
        "name": "step",
        "state": {"x": 1},
        **fields,
    }


async def test_a_named_checkpoint_comes_back(p: Persistence) -> None:
    given = named(name="a\nlong name " * 3000, state=state(5), created_at=7, config={"a": [1]}, id="ignored")
    id = await p.checkpoints.store_checkpoint(given)
    found = await p.checkpoints.retrieve_checkpoint(id)
    assert found is not None
    assert (found.id, found.agent_id, found.session_id, found.agent_type) == (id, "a", "s", "coder")
    assert (found.name, found.state, found.created_at) == (given["name"], given["state"], 7)
    assert found.extra == {"config": {"a": [1]}}
    again = await p.checkpoints.store_checkpoint(found)
    assert again != id
    assert len(await p.checkpoints.list_checkpoints()) == 2
    for unknown in ("", " 7 ", "7", id[:-1], f"{id}x", "x" * 36 + ":a"):
        assert await p.checkpoints.retrieve_checkpoint(unknown) is None
    with pytest.raises(InvalidValueError):
        await p.checkpoints.store_checkpoint({"agent_id": "a"})
    with pytest.raises(InvalidValueError):
        await p.checkpoints.store_checkpoint({**given, "agent_type": 5})


async def test_named_checkpoints_are_listed_filtered_and_paged(p: Persistence) -> None:
    stored = [
        await p.checkpoints.store_checkpoint(
            named(
                f"a{i % 3}", session_id=f"s{i % 2}", agent_type=f"t{i % 2}", name=f"n{i}", created_at=i // 2
            )
        )
        for i in range(12)
    ]
    newest = sorted(range(12), key=lambda i: (i // 2, stored[i]), reverse=True)

    async def found(**filters: Any) -> list[int]:
        return [int(item.name[1:]) for item in await p.checkpoints.list_checkpoints(**filters)]

    assert await found() == newest
    assert await found(order_dir="ASC") == newest[::-1]
    assert await found(agent_id="a1") == [i for i in newest if i % 3 == 1]
    assert await found(session_id="s1") == [i for i in newest if i % 2 == 1]
    assert await found(agent_id="a1", session_id="s1", agent_type="t1") == [
        i for i in newest if i % 3 == 1 and i % 2 == 1
    ]
    assert await found(name="n7") == [7]
    assert await found(before=3, after=0) == [i for i in newest if 0 < i // 2 < 3]
    assert await found(order_by="id") == list(range(12))[::-1]
    assert await found(order_by="id", order_dir="ASC", limit=3) == [0, 1, 2]
    assert await found(limit=0) == []
    for order in ({}, {"order_dir": "ASC"}, {"order_by": "id"}, {"order_by": "id", "order_dir": "ASC"}):
        pages: list[int] = []
        cursor = None
        while True:
            page = await p.checkpoints.list_checkpoints(limit=5, cursor=cursor, **order)  # type: ignore[arg-type]
            pages += [int(item.name[1:]) for item in page]
            cursor = page.cursor
            if cursor is None:
                break
        assert pages == await found(**order)
    with pytest.raises(InvalidValueError):
        await p.checkpoints.list_checkpoints(order_by="name")  # type: ignore[arg-type]


async def test_named_checkpoints_can_be_deleted_and_capped(p: Persistence) -> None:
    stored = [
        await p.checkpoints.store_checkpoint(named(state=state(i + 1)), max_checkpoints_per_agent=3)
        for i in range(5)
    ]
    assert [item.id for item in await p.checkpoints.list_checkpoints(agent_id="a", order_by="id")] == (
        stored[:1:-1]
    )
    assert await p.checkpoints.delete_checkpoint(stored[3]) is True
    assert await p.checkpoints.delete_checkpoint(stored[3]) is False
    assert await p.checkpoints.retrieve_checkpoint(stored[3]) is None
    assert {item.id for item in await p.checkpoints.list_checkpoints()} == {stored[2], stored[4]}
    assert await p.checkpoints.delete_agent_checkpoints("a") == 2
    assert await p.checkpoints.list_checkpoints() == []
    page = await p._store.coalescer.scan("index/named-checkpoints", "", None, limit=10)
    assert page.entries == []


async def test_threads_agents_and_applications_are_apart(p: Persistence) -> None:
    await p.checkpoints.put("x", 1)
    await p.checkpoints.store_checkpoint(named("x"))
    await p.checkpoints.store_app_checkpoint(
        {"session_id": "x", "hostname": "h", "working_directory": "/", "state": {}}
    )
    await p.checkpoints.delete("x")
    assert len(await p.checkpoints.list_checkpoints()) == len(await p.checkpoints.list_app_checkpoints()) == 1


async def test_the_latest_checkpoint_of_an_application(p: Persistence) -> None:
    assert await p.checkpoints.retrieve_latest_app_checkpoint() is None
    stored = [
        await p.checkpoints.store_app_checkpoint(
            {
                "session_id": f"s{i % 2}",
                "hostname": f"h{i % 2}",
                "working_directory": f"/{i}",
                "state": {"i": i},
                "created_at": at,
                "project": "p",
            }
        )
        for i, at in enumerate([5, 30, 20, 10])
    ]
    latest = await p.checkpoints.retrieve_latest_app_checkpoint()
    assert latest is not None
    assert (latest.id, latest.state, latest.extra) == (stored[1], {"i": 1}, {"project": "p"})
    of_host = await p.checkpoints.retrieve_latest_app_checkpoint(hostname="h0")
    assert of_host is not None
    assert of_host.id == stored[2]
    of_folder = await p.checkpoints.retrieve_latest_app_checkpoint(working_directory="/3")
    assert of_folder is not None
    assert of_folder.id == stored[3]
    listed = [item.created_at for item in await p.checkpoints.list_app_checkpoints(session_id="s1")]
    assert listed == [30, 10]
    assert await p.checkpoints.delete_app_checkpoint(stored[1])
    assert await p.checkpoints.retrieve_app_checkpoint(stored[1]) is None
    latest = await p.checkpoints.retrieve_latest_app_checkpoint()
    assert latest is not None
    assert latest.id == stored[2]


# ---- repair


async def test_repair_mends_the_listings(make_driver: MakeDriver) -> None:
    later = now_ms() + 4_000_000
    async with create_persistence(make_driver(), clock=lambda: later) as p:
        await p.checkpoints.put("t", 1)
        id = await p.checkpoints.store_checkpoint(named())
        coalescer = p._store.coalescer
        listings = ["index/threads", "index/named-checkpoints", "index/named-checkpoints-by-agent/a"]
        kept = {name: (await coalescer.scan(name, "", None, limit=9)).entries for name in listings}
        for name in listings:
            await coalescer.purge(name, "", None)
        assert await p.checkpoints.list_threads() == []
        assert (await p.repair(dry_run=True)).hints_added == 3
        assert (await p.repair()).hints_added == 3
        assert [one.thread_id for one in await p.checkpoints.list_threads()] == ["t"]
        assert [item.id for item in await p.checkpoints.list_checkpoints(agent_id="a")] == [id]
        await p.checkpoints.delete("t")
        await p.checkpoints.delete_checkpoint(id)
        for name, entries in kept.items():
            await coalescer.write(name, [Put(entry.key, entry.value) for entry in entries], hint=True)
        assert await p.checkpoints.list_threads() == []
        assert await p.checkpoints.list_checkpoints() == []
    later += 4_000_000
    async with create_persistence(make_driver(), clock=lambda: later) as p:
        assert (await p.repair()).hints_removed == 4  # those, and the agent, who has none left
        assert (await p.repair()).hints_removed == 0


async def test_repair_forgets_what_was_deleted_long_ago_and_frees_what_has_expired(
    make_driver: MakeDriver,
) -> None:
    now = 1_800_000_000_000
    async with create_persistence(make_driver(), clock=lambda: now) as p:
        old = await p.checkpoints.put("t", state(4))
        await p.checkpoints.put("u", state(4), expires_at=now + 1)
        await p.checkpoints.delete("t")
        now += 6 * 86_400_000
        report = await p.repair()
        assert (report.threads_expired, report.tombstones_removed) == (1, 0)
        assert [key for key, _ in await stored(p)] == ["head"]
        now += 2 * 86_400_000
        assert (await p.repair()).tombstones_removed == 1
        assert await stored(p) == []
        # The numbers begin anew, and nobody takes what he remembers for what is there.
        async with create_persistence(make_driver(), clock=lambda: now) as other:
            assert (await other.checkpoints.put("t", [message(7), message(8)])).id > old.id
            await p.checkpoints.put("t", [message(0), message(7), message(8)])
            assert await other.checkpoints.get("t") == [message(0), message(7), message(8)]
            assert await spare(p) == 0


# ---- real conversations


async def test_a_conversation_is_run_killed_and_resumed(
    make_driver: MakeDriver, conversations: list[dict[str, Any]]
) -> None:
    messages = conversations[0]["messages"]
    done = 0
    while done < len(messages):
        # Another process after every fourth message.
        async with create_persistence(make_driver()) as p:
            resumed = await p.checkpoints.read("airline")
            start: dict[str, Any] = {"version": 2, "messages": [], "step": 0}
            snapshot = start if resumed is None else resumed.state
            assert snapshot["messages"] == messages[:done]
            for message in messages[done : done + 4]:
                snapshot["messages"].append(message)
                snapshot["step"] += 1
                latest = (await p.checkpoints.list("airline", limit=1))[:1]
                await p.checkpoints.put("airline", snapshot, expected_latest=latest[0].id if latest else 0)
            done = len(snapshot["messages"])
    async with create_persistence(make_driver()) as p:
        assert (await p.checkpoints.get("airline"))["messages"] == messages
        found = await p.checkpoints.list("airline")
        for meta in found:
            older = await p.checkpoints.get("airline", meta.id)
            assert older["messages"] == messages[: older["step"]]
        assert await spare(p, "airline") == 0


# ---- cost


@pytest.fixture
def driver() -> RecordingDriver:
    return RecordingDriver()


def written(driver: RecordingDriver) -> int:
    return sum(
        len(op.key) + len(op.value)
        for writes in driver.commits
        for write in writes
        for op in write.ops
        if isinstance(op, Put)
    )


@pytest.mark.parametrize("growth", ["a list", "two lists", "by id"])
async def test_a_thousand_steps_cost_what_each_added(driver: RecordingDriver, growth: str) -> None:
    grown: dict[str, Any] = {"version": 2, "messages": [], "steps": [], "usage": {"tokens": 0}}
    if growth == "by id":
        grown["messages"] = {}
    async with create_persistence(driver) as p:
        for i in range(1000):
            if growth == "by id":
                grown["messages"][f"msg_{i}"] = message(i, 950)
            else:
                grown["messages"].append(message(i, 950))
            if growth == "two lists":
                grown["steps"].append({"index": i, "text": f"{i}" * 100})
            grown["usage"]["tokens"] += 7
            driver.forget()
            await p.checkpoints.put("t", grown, max_checkpoints_per_thread=None)
            if i:
                assert driver.calls == ["commit"]
                assert written(driver) <= 8192
        driver.forget()
        assert await p.checkpoints.get("t") == grown
        assert len(driver.phases()) <= 2
        size = (await p.checkpoints.list("t", limit=1))[0].size_bytes
        assert sum(bytes for _, bytes in await stored(p)) <= 3 * size
        driver.forget()
        unchanged = await p.checkpoints.put("t", grown, max_checkpoints_per_thread=None)
        assert unchanged.stored_bytes < 600
        assert written(driver) < 2000
        older = (await p.checkpoints.list("t", limit=1, before=unchanged.id))[0].id
        driver.forget()
        await p.checkpoints.get("t", older)
        assert len(driver.phases()) <= 3
    driver = RecordingDriver(driver.memory)
    async with create_persistence(driver) as p:
        await p.checkpoints.put("t", grown, max_checkpoints_per_thread=None)
        assert len(driver.phases()) <= 3
    assert driver.broken == []


async def test_a_cold_put_at_the_cap_takes_three_round_trips() -> None:
    memory = MemoryDriver()
    async with create_persistence(RecordingDriver(memory)) as p:
        for i in range(10):
            await p.checkpoints.put("t", state(9 + i, i), max_checkpoints_per_thread=5)
    driver = RecordingDriver(memory)
    async with create_persistence(driver) as p:
        driver.forget()
        await p.checkpoints.put("t", state(21, 12), max_checkpoints_per_thread=5)
        assert driver.calls == ["scan", "scan", "commit"]
        driver.forget()
        await p.checkpoints.put("t", state(22, 13), max_checkpoints_per_thread=5)
        assert driver.calls == ["commit"]
        driver.forget()
        await p.checkpoints.get("t")
        assert driver.calls == ["get"]
        assert await spare(p) == 0


async def test_who_has_read_the_latest_puts_the_next_in_one_round_trip() -> None:
    memory = MemoryDriver()
    async with create_persistence(RecordingDriver(memory)) as other:
        await other.checkpoints.put("t", state(9))
        driver = RecordingDriver(memory)
        async with create_persistence(driver) as p:
            driver.forget()
            assert await p.checkpoints.get("t") == state(9)
            await p.checkpoints.put("t", state(10))
            assert driver.calls == ["scan", "commit"]
            assert written(driver) < 3_000
            await other.checkpoints.put("t", state(11))
            await p.checkpoints.get("t")
            driver.forget()
            await p.checkpoints.put("t", state(12))
            assert driver.calls == ["commit"]
            assert written(driver) < 3_000
            assert await spare(p) == 0
        assert await other.checkpoints.get("t") == state(12)


async def test_a_first_put_that_expires_takes_three_round_trips(driver: RecordingDriver) -> None:
    async with create_persistence(driver) as p:
        driver.forget()
        await p.checkpoints.put("t", 1, expires_at=now_ms() + 10_000)
        assert driver.calls == ["scan", "commit", "commit"]


async def test_a_put_at_the_cap_looks_at_as_much_however_high_the_cap_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    looked_at = 0

    def counted(spans: Iterable[pieces.Span]) -> list[pieces.Span]:
        nonlocal looked_at
        found = list(spans)
        looked_at += len(found)
        return union(found)

    monkeypatch.setattr(pieces, "union", counted)
    monkeypatch.setattr(threads, "union", counted)
    made = []
    for cap in (10, 100):
        chance = random.Random(3)
        given = state(60)
        async with create_persistence(MemoryDriver()) as p:
            for i in range(cap + 20):
                given["messages"][chance.randrange(60)] = message(1000 + i)
                looked_at = 0
                await p.checkpoints.put("t", given, max_checkpoints_per_thread=cap)
            made.append(looked_at)
            assert await spare(p) == 0
    assert made[1] < 2 * made[0]


async def test_what_is_remembered_of_checkpoints_is_within_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    def size(value: Any) -> int:
        return sys.getsizeof(value) + (sum(map(size, value)) if isinstance(value, list | tuple) else 0)

    bound = 1 << 20
    monkeypatch.setattr(thread_reader, "_WARM_BYTES", bound)
    given = state(20)
    async with create_persistence(MemoryDriver()) as p:
        for i in range(2_000):
            given["messages"][i * 7 % 20] = message(i)
            await p.checkpoints.put(f"t{i % 40}", given, max_checkpoints_per_thread=50)
            checkpoint = {**named(), "agent_id": f"a{i % 40}", "state": 1}
            await p.checkpoints.store_checkpoint(checkpoint, max_checkpoints_per_agent=50)
        for kind in (p.checkpoints.threads, p.checkpoints.agents):
            assert sum(size(warm.kept) for warm in kind._warm.values() if warm.kept) < bound


async def test_to_remove_checkpoints_reads_each_of_them_once(driver: RecordingDriver) -> None:
    async with create_persistence(driver) as p:
        for i in range(700):
            meta = await p.checkpoints.put("t", i, max_checkpoints_per_thread=None)
        driver.forget()
        assert await p.checkpoints.delete("t", meta.id) == 1
        assert driver.calls == ["get", "scan", "commit"]
        driver.forget()
        assert (await p.checkpoints.prune("t", keep_last=10)).checkpoints == 689
        assert driver.calls == ["get", "scan", *["commit"] * 4]
        assert [one.seq for one in await p.checkpoints.list("t")] == list(range(699, 689, -1))


async def test_pruning_all_threads_reads_no_further_where_there_are_few_enough(
    driver: RecordingDriver,
) -> None:
    async with create_persistence(driver) as p:
        for i in range(100):
            await p.checkpoints.put(f"t{i}", i)
        driver.forget()
        assert not await p.checkpoints.prune(keep_last=1)
        assert driver.calls == ["scan", "get"]


async def test_many_pieces_here_and_there_are_removed_by_few_calls(driver: RecordingDriver) -> None:
    chance = random.Random(7)
    given = state(150)
    async with create_persistence(driver) as p:
        for i in range(120):
            for j in range(5):
                given["messages"][chance.randrange(150)] = message(1000 + 5 * i + j)
            await p.checkpoints.put("t", given, max_checkpoints_per_thread=None)
        driver.forget()
        assert (await p.checkpoints.prune("t", keep_last=10)).pieces > 300
        assert len(driver.calls) < 20
        assert await p.checkpoints.get("t") == given
        assert await spare(p) == 0


async def test_one_checkpoint_is_copied_without_a_look_at_the_others(driver: RecordingDriver) -> None:
    async with create_persistence(driver) as p:
        for i in range(30):
            meta = await p.checkpoints.put("t", i)
        driver.forget()
        await p.checkpoints.copy_thread("t", "copy", checkpoint_id=meta.id)
        await p.checkpoints.fork("t", meta.id, new_thread_id="branch")
        assert "scan" not in driver.calls
        assert await p.checkpoints.get("copy") == await p.checkpoints.get("branch") == 29
        with pytest.raises(NotFoundError, match="no checkpoint"):
            await p.checkpoints.copy_thread("t", "none", checkpoint_id=str(uuid.uuid4()))


async def test_a_short_listing_reads_little_and_each_head_once() -> None:
    class Keys(RecordingDriver):
        keys = 0

        async def get(self, keys: Sequence[Key]) -> list[Entry | None]:
            self.keys += len(keys)
            return await super().get(keys)

    driver = Keys()
    async with create_persistence(driver) as p:
        for i in range(120):
            await p.checkpoints.store_checkpoint({**named(), "name": f"n{i}", "created_at": i})
        driver.keys = 0
        found = await p.checkpoints.list_checkpoints(limit=1)
        assert [item.name for item in found] == ["n119"]
        assert driver.keys == 3  # the head, this one, and the next
        driver.keys = 0
        assert len(await p.checkpoints.list_checkpoints()) == 120
        assert driver.keys == 122  # in two pages


async def test_repair_asks_for_what_listings_name_by_the_page(driver: RecordingDriver) -> None:
    later = now_ms() + 4_000_000
    async with create_persistence(driver) as p:
        for i in range(100):
            await p.checkpoints.store_checkpoint({**named(), "name": f"n{i}", "state": i})
            await p.checkpoints.put(f"t{i}", i)
    driver = RecordingDriver(driver.memory)
    async with create_persistence(driver, clock=lambda: later) as p:
        driver.forget()
        assert (await p.repair(dry_run=True)).hints_removed == 0
        assert driver.calls.count("get") < 40


async def test_what_has_expired_is_deleted_many_at_once(driver: RecordingDriver) -> None:
    at = now_ms()
    async with create_persistence(driver) as p:
        for i in range(64):
            await p.checkpoints.put(f"t{i}", i, expires_at=at + 100_000)
    driver = RecordingDriver(driver.memory)
    async with create_persistence(driver, clock=lambda: at + 200_000) as p:
        driver.forget()
        assert await p.checkpoints.delete_expired() == 64
        assert driver.calls.count("commit") < 64
        assert driver.calls.count("get") < 64


async def test_what_another_has_removed_is_not_taken_to_be_there_still() -> None:
    driver = RecordingDriver()
    texts = [f"{i} " * 400 for i in range(3)]
    async with create_persistence(driver) as p, create_persistence(RecordingDriver(driver.memory)) as other:
        await p.checkpoints.put("t", texts, max_checkpoints_per_thread=1)
        await other.checkpoints.put("t", texts[:2], max_checkpoints_per_thread=1)
        assert await p.checkpoints.get("t") == texts[:2]
        await p.checkpoints.put("t", texts, max_checkpoints_per_thread=1)
        assert await other.checkpoints.get("t") == texts
        assert await spare(p) == 0


async def test_states_that_take_turns_are_stored_once(driver: RecordingDriver) -> None:
    first, second = state(60), {"version": 2, "documents": [message(i) for i in range(900, 960)]}
    async with create_persistence(driver) as p:
        for _ in range(2):
            for given in first, second:
                meta = await p.checkpoints.put("t", given, max_checkpoints_per_thread=3)
        for given in [first, second] * 5:
            meta = await p.checkpoints.put("t", given, max_checkpoints_per_thread=3)
            assert meta.stored_bytes < 600
            assert await p.checkpoints.get("t") == given
        assert await spare(p) == 0
        for _ in range(3):
            await p.checkpoints.put("t", second, max_checkpoints_per_thread=3)
        assert await spare(p) == 0
        await p.checkpoints.put("t", first, max_checkpoints_per_thread=3)  # nothing of it was there any more
        assert await p.checkpoints.get("t") == first
        assert await spare(p) == 0


async def test_a_message_that_is_finished_one_step_later_costs_no_rewriting_of_the_others(
    driver: RecordingDriver,
) -> None:
    grown: dict[str, Any] = {"version": 2, "messages": []}
    async with create_persistence(driver) as p:
        for i in range(1000):
            if i:
                grown["messages"][-1] |= {"status": "done"}
            grown["messages"].append({**message(i), "status": "pending"})
            meta = await p.checkpoints.put("t", grown, max_checkpoints_per_thread=None)
            assert i < 9 or meta.stored_bytes < 200 * 1024
        assert await p.checkpoints.get("t") == grown
        assert await spare(p) == 0
        assert sum(bytes for _, bytes in await stored(p)) <= 5 * meta.size_bytes


async def test_a_state_changed_here_and_there_does_not_fall_to_pieces(driver: RecordingDriver) -> None:
    chance = random.Random(7)
    given = state(600)
    async with create_persistence(driver) as p:
        for i in range(400):
            given["messages"][chance.randrange(600)] = message(1000 + i)
            meta = await p.checkpoints.put("t", given, max_checkpoints_per_thread=5)
            head = await p.checkpoints.threads.live_head("t")
            assert head is not None
            assert head.l is not None
            assert len(bytes(head.l.s)) < 8000
        assert await p.checkpoints.get("t", meta.id) == given
        assert await spare(p) == 0


async def test_what_is_new_and_there_twice_is_stored_even_if_short_runs_are_stored_anew() -> None:
    chance = random.Random(7)
    given = state(600)
    memory = MemoryDriver()
    async with create_persistence(memory) as p, create_persistence(memory) as other:
        for i in range(30):
            for j in range(20):
                given["messages"][chance.randrange(300)] = message(2000 + 20 * i + j)
            given["window"] = [message(10_000 + 100 * i + j) for j in range(100)]
            given["sent"] = given["window"]
            await p.checkpoints.put("t", given)
            assert await other.checkpoints.get("t") == given  # not what the writer remembers
        assert await spare(p) == 0


# ---- crashes and faults


class Mortal(RecordingDriver):
    """Dies at its commit or purge number `lives`: applied or not, the answer never comes."""

    def __init__(self, memory: MemoryDriver, lives: int, *, applied: bool) -> None:
        super().__init__(memory)
        self.lives = lives
        self.applied = applied

    async def apply(self, writes: Any) -> Any:
        self.lives -= 1
        if self.lives < 0:
            if self.lives == -1 and self.applied:
                await super().apply(writes)
            await end_of_the_process()
        return await super().apply(writes)

    async def purge(self, partition: str, start: str, end: str | None) -> None:
        self.lives -= 1
        if self.lives < 0:
            await end_of_the_process()
        await super().purge(partition, start, end)


async def _life(p: Persistence, done: list[str]) -> None:
    for i in range(3):
        await p.checkpoints.put("t", state(4 + i, i), max_checkpoints_per_thread=None)
        done.append(f"put {i}")
    await p.checkpoints.put("t", large(7), max_checkpoints_per_thread=None)
    done.append("large")
    await p.checkpoints.put("t", state(650), max_checkpoints_per_thread=2)
    done.append("trimmed")
    await p.checkpoints.prune("t", keep_last=1)
    done.append("pruned")
    await p.checkpoints.copy_thread("t", "u")
    done.append("copied")
    await p.checkpoints.delete("t")
    done.append("deleted")
    await p.checkpoints.put("t", state(3))
    done.append("anew")


@pytest.mark.parametrize("applied", [True, False])
async def test_killed_anywhere_and_repaired_nothing_leaks_and_nothing_is_lost(
    applied: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("persistence.thread_repair._UPLOAD_PAUSE", 0.01)  # hundreds of times
    expected = {
        "put 0": state(4, 0),
        "put 1": state(5, 1),
        "put 2": state(6, 2),
        "large": large(7),
        "trimmed": state(650),
        "pruned": state(650),
        "copied": state(650),
        "deleted": None,
        "anew": state(3),
    }
    steps = list(expected)
    now = 1_800_000_000_000
    lives = 0
    finished = False
    while not finished:
        memory = MemoryDriver()
        done: list[str] = []
        p = await create_persistence(Mortal(memory, lives, applied=applied), clock=lambda: now)
        try:
            await _life(p, done)
            finished = True
        except asyncio.CancelledError:
            pass
        except (UnavailableError, OutcomeUnknownError):
            pass
        async with create_persistence(memory, clock=lambda: now + 4_000_000) as after:
            at = len(done)
            allowed = [expected[step] for step in steps[max(0, at - 1) : at + 1]] or [None]
            if not at:
                allowed.append(None)
            assert await after.checkpoints.get("t") in allowed
            await after.repair()
            assert await after.checkpoints.get("t") in allowed
            for thread in "tu":
                assert await spare(after, thread) == 0
                assert not [key for key, _ in await stored(after, thread) if key.startswith("pending/")]
            for meta in await after.checkpoints.list("t"):
                assert await after.checkpoints.get("t", meta.id) is not None
            again = await after.repair(dry_run=True)
            assert (again.pieces_removed, again.uploads_ended, again.hints_added) == (0, 0, 0)
            listed = [one.thread_id for one in await after.checkpoints.list_threads()]
            assert ("t" in listed) == (await after.checkpoints.get("t") is not None)
            await after.checkpoints.put("t", state(5))
            assert await after.checkpoints.get("t") == state(5)
        lives += 1
    assert lives > 15


@pytest.mark.parametrize("applied", [True, False])
async def test_a_fork_into_a_thread_of_its_own_is_there_whole_or_not_at_all(applied: bool) -> None:
    for lives in range(1, 9):
        memory = MemoryDriver()
        async with create_persistence(memory) as p:
            source = (await p.checkpoints.put("t", state(30))).id
        dying = await create_persistence(Mortal(memory, lives, applied=applied))
        with suppress(asyncio.CancelledError, UnavailableError, OutcomeUnknownError):
            await dying.checkpoints.fork("t", source, new_thread_id="u", labels=["branch"])
        async with create_persistence(memory) as p:
            found = await p.checkpoints.list("u")
            assert [meta.labels for meta in found] in ([], [("branch",), ()])
            assert not found or await p.checkpoints.get("u") == state(30)


@pytest.mark.parametrize("seed", range(6))
async def test_writers_on_a_faulty_store_keep_the_cap_and_leak_nothing(seed: int) -> None:
    memory = MemoryDriver()
    drivers = [FaultyDriver(memory, seed=seed * 10 + i, rate=0.05) for i in range(2)]
    opened = [await create_persistence(driver) for driver in drivers]

    async def work(p: Persistence, chance: random.Random) -> None:
        for _ in range(12):
            try:
                match chance.randrange(9):
                    case 6 | 7 | 8:  # what is put next goes by what was read
                        kept = await p.checkpoints.get("t")
                        assert kept is None or kept == state(kept["step"], kept["step"] - 4)
                    case 0:
                        await p.checkpoints.delete("t")
                    case 1:
                        await p.checkpoints.prune("t", keep_last=2)
                    case 2:
                        await p.checkpoints.fork("t", max_checkpoints_per_thread=4)
                    case _:
                        at = chance.randrange(9)
                        await p.checkpoints.put("t", state(at + 4, at), max_checkpoints_per_thread=4)
            except (NotFoundError, UnavailableError, OutcomeUnknownError):
                pass

    await asyncio.gather(*(work(p, random.Random(seed * 7 + i)) for i, p in enumerate(opened * 2)))
    for driver in drivers:
        await driver.settle()
    p = opened[0]
    found = await p.checkpoints.list("t")
    assert len(found) <= 4
    for meta in found:
        kept = await p.checkpoints.get("t", meta.id)
        assert kept == state(kept["step"], kept["step"] - 4)
    await p.repair()
    assert await spare(p) == 0
    for p in opened:
        await p.close()
    assert [driver.broken for driver in drivers] == [[], []]


# ---- several processes


def _puts(make: MakeDriver, seed: int) -> None:
    async def run() -> None:
        async with create_persistence(make()) as p:
            for i in range(15):
                at = seed + i
                await p.checkpoints.put("t", state(at + 4, at), max_checkpoints_per_thread=5)
                if seed == 0 and i % 5 == 4:
                    await p.checkpoints.prune("t", keep_last=2)

    asyncio.run(run())


def _resume(make: MakeDriver, start: str, won: Any) -> None:
    async def run() -> None:
        async with create_persistence(make()) as p:
            try:
                await p.checkpoints.put("t", 1, expected_latest=start)
            except ConflictError:
                return
            won.release()

    asyncio.run(run())


async def _in_processes(target: Callable[..., None], arguments: list[tuple[Any, ...]]) -> None:
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=target, args=each) for each in arguments]
    for process in processes:
        process.start()
    for process in processes:
        await asyncio.to_thread(process.join)
        assert process.exitcode == 0


@pytest.mark.parametrize("make_driver", SHARED, indirect=True)
async def test_processes_keep_the_cap_and_leak_nothing(make_driver: MakeDriver) -> None:
    await _in_processes(_puts, [(make_driver, seed) for seed in range(3)])
    async with create_persistence(make_driver()) as p:
        found = await p.checkpoints.list("t")
        assert len(found) <= 5
        for meta in found:
            kept = await p.checkpoints.get("t", meta.id)
            assert kept == state(kept["step"], kept["step"] - 4)
        assert await spare(p) == 0


@pytest.mark.parametrize("make_driver", SHARED, indirect=True)
async def test_of_processes_that_resume_one_checkpoint_only_one_goes_on(make_driver: MakeDriver) -> None:
    async with create_persistence(make_driver()) as p:
        start = await p.checkpoints.put("t", 0)
    won = multiprocessing.get_context("spawn").Semaphore(0)
    await _in_processes(_resume, [(make_driver, start.id, won)] * 3)
    assert won.acquire(timeout=1)
    assert not won.acquire(block=False)


def _endless(make: MakeDriver, acknowledged: Any) -> None:
    async def run() -> None:
        async with create_persistence(make()) as p:
            for i in range(1000):
                given = large(5, seed=i) if i % 4 == 3 else state(i + 30, i)
                await p.checkpoints.put("t", {"i": i, "state": given}, max_checkpoints_per_thread=3)
                acknowledged.send(i)
                if i % 3 == 2:
                    await p.checkpoints.prune("t", keep_last=1)

    asyncio.run(run())


@pytest.mark.parametrize("acknowledgements", [1, 3, 4, 7])
@pytest.mark.parametrize("make_driver", SHARED, indirect=True)
async def test_a_process_killed_in_the_middle_loses_nothing_and_repair_leaves_no_trace(
    make_driver: MakeDriver, acknowledgements: int
) -> None:
    context = multiprocessing.get_context("spawn")
    receiving, sending = context.Pipe(duplex=False)
    process = context.Process(target=_endless, args=(make_driver, sending))
    process.start()
    last = -1
    while last < acknowledgements:
        last = await asyncio.to_thread(receiving.recv)
    process.kill()
    await asyncio.to_thread(process.join)
    async with create_persistence(make_driver()) as p:
        await p.repair()
        found = await p.checkpoints.list("t")
        assert 1 <= len(found) <= 3
        states = [await p.checkpoints.get("t", meta.id) for meta in found]
        assert states[0]["i"] >= last
        assert states[0] == await p.checkpoints.get("t")
        assert await spare(p) == 0
        assert {key.partition("/")[0] for key, _ in await stored(p)} <= {"head", "checkpoint", "piece"}
        await p.checkpoints.put("t", state(3))
        assert await p.checkpoints.get("t") == state(3)


# ---- against a model

_steps = st.lists(
    st.one_of(
        st.tuples(st.just("put"), states, st.sampled_from([None, 1, 2, 4])),
        st.tuples(st.just("branch"), states, st.integers(0, 9)),
        st.tuples(st.just("fork"), st.integers(0, 9), st.sampled_from([None, 3])),
        st.tuples(st.just("delete"), st.integers(0, 9), st.none()),
        st.tuples(st.just("prune"), st.integers(0, 3), st.none()),
        st.tuples(st.just("delete all"), st.none(), st.none()),
        st.tuples(st.just("cold"), st.none(), st.none()),
    ),
    max_size=14,
)


@settings(max_examples=60, deadline=None)
@given(_steps)
def test_it_behaves_like_a_list_of_states(steps: list[tuple[str, Any, Any]]) -> None:
    async def run() -> None:
        memory = MemoryDriver()
        p = await create_persistence(memory)
        model: dict[str, Any] = {}
        for what, first, second in steps:
            c = p.checkpoints
            some = list(model)[first % len(model)] if model and isinstance(first, int) else None
            match what:
                case "put":
                    meta = await c.put("t", first, max_checkpoints_per_thread=second)
                    model[meta.id] = first
                    model = dict(list(model.items())[-second if second else 0 :])
                case "branch" if model:
                    parent = list(model)[second % len(model)]
                    meta = await c.put("t", first, parent_id=parent, max_checkpoints_per_thread=None)
                    assert meta.parent_id == parent
                    model[meta.id] = first
                case "fork" if some is not None:
                    meta = await c.fork("t", some, max_checkpoints_per_thread=second)
                    model[meta.id] = model[some]
                    model = dict(list(model.items())[-second if second else 0 :])
                case "delete" if some is not None:
                    assert await c.delete("t", some) == 1
                    del model[some]
                case "prune":
                    done = await c.prune("t", keep_last=first)
                    assert done.checkpoints == max(0, len(model) - first)
                    model = dict(list(model.items())[len(model) - first :]) if first < len(model) else model
                case "delete all":
                    assert await c.delete("t") == len(model)
                    model = {}
                case "cold":
                    await p.close()
                    p = await create_persistence(memory)
            assert ids(await p.checkpoints.list("t")) == list(model)[::-1]
            assert await spare(p) == 0
        for id, expected in model.items():
            assert same(await p.checkpoints.get("t", id), expected)
        if model:
            assert same(await p.checkpoints.get("t"), list(model.values())[-1])
        await p.close()

    asyncio.run(run())
