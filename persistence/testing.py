"""The conformance suite: what `persistence.driver` promises, as tests that any driver can run.

Subclass it in a test file of your own and say how your driver is made::

    class TestMyDriver(SharedDriverConformance):
        @pytest.fixture
        def make_driver(self, tmp_path):
            return functools.partial(MyDriver, str(tmp_path / "store"))

`make_driver` returns a new, unopened driver on the same store each time it is
called. The store belongs to one test and is empty at first. A driver whose
data live in the object itself (memory) subclasses `DriverConformance` and
returns the same object each time. Drivers on storage that processes share
subclass `SharedDriverConformance`: there `make_driver` must be picklable, as a
`functools.partial` of an importable class is.

Besides tables of cases the suite holds three searches. Random calls are
compared with the memory driver. Many tasks, several driver objects and several
processes race on few keys, and what each of them read and wrote must fit one
order in time (`check_history`). Readers look at keys that change together.

The suite needs pytest and hypothesis, no plugin, and runs its own event loops.
`BrokenDriver` must fail it: run that when in doubt whether a run means anything.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import random
import reprlib
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import AsyncExitStack
from functools import partial
from graphlib import CycleError, TopologicalSorter
from itertools import count, groupby, pairwise, product
from multiprocessing.synchronize import Event
from operator import attrgetter
from threading import Barrier, BrokenBarrierError
from typing import Any, Final, NamedTuple, NoReturn, TypeAlias, TypeVar

from persistence.driver import (
    ABSENT,
    MAX_GET_KEYS,
    MAX_KEY_CHARS,
    MAX_PARTITION_CHARS,
    MAX_VALUE_BYTES,
    MAX_WRITE_BYTES,
    MAX_WRITE_OPS,
    PAGE_BYTES,
    Check,
    Delete,
    Driver,
    Entry,
    Key,
    Op,
    Page,
    Put,
    Write,
)
from persistence.drivers.memory import MemoryDriver
from persistence.errors import ConfigurationError, UnavailableError

try:
    from hypothesis import HealthCheck, Phase, settings
    from hypothesis import strategies as st
    from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test
except ImportError as error:
    raise ConfigurationError(
        "persistence.testing needs pytest and hypothesis: run  pip install pytest hypothesis"
    ) from error

__all__ = [
    "Action",
    "BrokenDriver",
    "DriverConformance",
    "MakeDriver",
    "SharedDriverConformance",
    "check_history",
    "work",
]

MakeDriver: TypeAlias = Callable[[], Driver]
T = TypeVar("T")


class DriverConformance:
    """Every promise that one process can see broken. The attributes below may be set by a subclass."""

    seconds = 60.0
    """A test that takes longer than this hangs."""
    examples = 40
    """Runs of the comparison with the memory driver."""
    steps = 20
    """Calls in one such run, at most."""
    shrink = False
    """Whether to look for the shortest run that shows a difference, which takes a while."""
    objects = 3
    """Driver objects that race on one store."""
    tasks = 4
    """Racing tasks on each of these objects."""
    rounds = 30
    """Reads followed by a commit, in each racing task."""
    seed = 0
    """Where the racing tasks' random choices start."""

    def test_open_and_close_may_be_repeated_and_keep_the_data(self, make_driver: MakeDriver) -> None:
        async def scenario() -> None:
            drivers = [make_driver() for _ in range(4)]
            await _together(*(driver.open() for driver in drivers * 2))
            await drivers[0].open()
            stored = await _put(drivers[0], "p", {"k": b"kept"})
            await drivers[0].close()
            for driver in drivers[1:] if drivers[1] is not drivers[0] else ():
                _same(await driver.get([Key("p", "k")]), stored, "get after another driver object was closed")
            for driver in drivers * 2:
                await driver.close()
            reopened = make_driver()
            await reopened.open()
            _same(await reopened.get([Key("p", "k")]), stored, "get after close and open")
            await reopened.close()

        self._run(scenario())

    def test_get_answers_in_the_order_asked(self, make_driver: MakeDriver) -> None:
        async def scenario(driver: Driver) -> None:
            a, b = await _put(driver, "p", {"a": b"1", "b": b"2"})
            (other,) = await _put(driver, "q", {"a": b"3"})
            table: list[tuple[list[Key], list[Entry | None]]] = [
                ([], []),
                ([Key("p", "b"), Key("q", "a"), Key("p", "a")], [b, other, a]),
                ([Key("p", "a"), Key("p", "b"), Key("p", "a")], [a, b, a]),
                ([Key("p", "c"), Key("none", "a"), Key("q", "b"), Key("p", "a")], [None, None, None, a]),
                ([Key("p", "A"), Key("P", "a"), Key("p/a", "a"), Key("p", "aa")], [None] * 4),
            ]
            for keys, found in table:
                _same(await driver.get(keys), found, f"get {keys}")
                _same(await driver.get(tuple(keys)), found, f"get {keys} as a tuple")
            many = [Key("pq"[n % 2], "abc"[n % 3]) for n in range(MAX_GET_KEYS)]
            known = {("p", "a"): a, ("p", "b"): b, ("q", "a"): other}
            _same(await driver.get(many), [known.get(key) for key in many], "get of the most keys")

        self._with_driver(make_driver, scenario)

    def test_a_write_is_applied_whole_or_refused_whole(self, make_driver: MakeDriver) -> None:
        """Each op, expectation and state; alone, and before or after ops that nothing refuses."""

        async def scenario(driver: Driver) -> None:
            for together, (shape, before, after) in product((False, True), _COMPANIONS):
                names = {f"{shape}/{together}/{number}": case for number, case in enumerate(_CASES)}
                held: dict[str, list[Entry]] = {}
                writes = []
                for name, case in names.items():
                    values = {"m": b"old", "x": b"x"} if case.stored else {"x": b"x"}
                    held[name] = await _put(driver, name, values)
                    op = case.op(held[name][0].version)
                    writes.append(Write(name, (*before, op, *after), next(_versions)))
                if together:
                    outcomes = await driver.commit(writes)
                else:
                    outcomes = [(await driver.commit((write,)))[0] for write in writes]
                for write, outcome, (name, case) in zip(writes, outcomes, names.items(), strict=True):
                    what = f"{write.ops} where 'm' {'is' if case.stored else 'is not'} stored"
                    _same(outcome, case.applied, f"outcome of {what}")
                    left = {entry.key: entry for entry in held[name]}
                    for op in write.ops if case.applied else ():
                        if isinstance(op, Put):
                            left[op.key] = Entry(op.key, op.value, write.version)
                        elif isinstance(op, Delete):
                            left.pop(op.key, None)
                    if all(op.expect is None for op in write.ops):
                        _same(await driver.commit([write]), [True], f"the same Write again: {what}")
                    wanted = [left[key] for key in sorted(left)]
                    _same(await _everything(driver, name), wanted, f"what is left after {what}")
            _same(await driver.commit([]), [], "commit of nothing")

        self._with_driver(make_driver, scenario)

    def test_versions_are_compared_in_all_62_bits(self, make_driver: MakeDriver) -> None:
        async def scenario(driver: Driver) -> None:
            for version in (1, 2**31, 2**32 + 1, 2**53 + 1, 2**62 - 2, 2**62 - 1):
                name = f"version/{version}"
                _same(await driver.commit([Write(name, (Put("k", b""),), version)]), [True], "put")
                entry = Entry("k", b"", version)
                _same(await driver.get([Key(name, "k")]), [entry], "get")
                _same(await _everything(driver, name), [entry], "scan")
                for bit in (0, 1, 8, 31, 32, 52, 61):
                    other = version ^ (1 << bit)
                    if other == ABSENT:
                        continue
                    ops: list[Op] = [Put("k", b"lost", other), Delete("k", other), Check("k", other)]
                    for op in ops:
                        write = Write(name, (op, Put("new", b"")), next(_versions))
                        _same(await driver.commit([write]), [False], f"{op} where {version} is stored")
                write = Write(name, (Check("k", version), Put("new", b"")), next(_versions))
                _same(await driver.commit([write]), [True], f"{write} where {version} is stored")
                for last, applied in ((write.version, True), (write.version ^ 1, False)):
                    checks = Write(name, (Check("k", version), Check("new", last)), next(_versions))
                    _same(await driver.commit([checks]), [applied], "a Write of Checks alone")

        self._with_driver(make_driver, scenario)

    def test_many_writes_and_many_ops_in_one_commit(self, make_driver: MakeDriver) -> None:
        async def scenario(driver: Driver) -> None:
            names = [f"many/{n}" for n in range(300)]

            async def compete(what: str, losers: int, ops: Callable[[str], tuple[Op, ...]]) -> None:
                """Every `losers`-th Write is made to fail by somebody who was there before."""
                held = {name: await _everything(driver, name) for name in names[::losers]}
                writes = [Write(name, ops(name), next(_versions)) for name in names]
                wanted = [n % losers != 0 for n in range(len(names))]
                _same(await driver.commit(writes), wanted, what)
                for name, entries in held.items():
                    _same(await _everything(driver, name), entries, f"{name}, a loser of: {what}")

            await driver.commit([Write(name, (Put("a", b"first"),), next(_versions)) for name in names[::7]])
            await compete("creates", 7, lambda name: (Put("a", b"created", ABSENT),))

            async def versions() -> dict[str, int]:
                found = await driver.get([Key(name, "a") for name in names[:MAX_GET_KEYS]])
                found += await driver.get([Key(name, "a") for name in names[MAX_GET_KEYS:]])
                return {name: entry.version for name, entry in zip(names, found, strict=True) if entry}

            old = await versions()
            _same(sorted(old), sorted(names), "what the creates left")
            await driver.commit([Write(name, (Put("a", b"2"),), next(_versions)) for name in names[::5]])
            await compete("replacements", 5, lambda name: (Put("a", b"3", old[name]),))
            old = await versions()
            await driver.commit([Write(name, (Put("a", b"4"),), next(_versions)) for name in names[::6]])
            await compete("checks", 6, lambda name: (Put("b", b""), Check("a", old[name]), Delete("c")))
            old = await versions()
            await driver.commit([Write(name, (Put("a", b"5"),), next(_versions)) for name in names[::4]])
            await compete("deletes", 4, lambda name: (Delete("a", old[name]),))
            _same(sorted(await versions()), sorted(names[::4]), "what the deletes left")

            most = [
                Write(f"most/{n}", (Put("a", b"%04d" % n * 1000, ABSENT),), next(_versions))
                for n in range(MAX_WRITE_OPS)
            ]
            _same(await driver.commit(most), [True] * len(most), "1,000 Writes")
            for n in range(0, len(most), 250):
                part = [Key(write.partition, "a") for write in most[n : n + 250]]
                stored = [Entry("a", b"%04d" % m * 1000, most[m].version) for m in range(n, n + 250)]
                _same(await driver.get(part), stored, "what 1,000 Writes left")

            share = bytes(range(256)) * (MAX_WRITE_BYTES // 4 // 256)
            largest = Write("largest", tuple(Put(key, share[1:]) for key in "abcd"), next(_versions))
            _same(await driver.commit([largest]), [True], "the largest Write")
            stored = [Entry(key, share[1:], largest.version) for key in "abcd"]
            _same(await _everything(driver, "largest"), stored, "the largest Write")
            apart = [Write(name, (Put("k", share[1:], ABSENT),), next(_versions)) for name in "abcd"]
            _same(await driver.commit(apart), [True] * 4, "the largest commit")

            keys = [f"{n:04}" for n in range(MAX_WRITE_OPS)]
            random.Random(self.seed).shuffle(keys)
            create = Write(
                "wide", tuple(Put(key, key.encode() * 1000, ABSENT) for key in keys), next(_versions)
            )
            _same(
                await driver.commit([create, Write("by", (Put("a", b""),), 1)]), [True, True], "1,000 creates"
            )
            wanted = [Entry(key, key.encode() * 1000, create.version) for key in sorted(keys)]
            _same(await _everything(driver, "wide"), wanted, "1,000 creates")
            mixed: list[Op] = [Put(key, b"new", create.version) for key in keys[:400]]
            mixed += [Delete(key, create.version) for key in keys[400:700]]
            mixed += [Check(key, create.version) for key in keys[700:]]
            refused = Write("wide", (*mixed[:-1], Check(keys[-1], create.version ^ 1)), next(_versions))
            _same(await driver.commit([refused]), [False], "1,000 ops, the last refused")
            _same(await _everything(driver, "wide"), wanted, "1,000 ops, the last refused")
            change = Write("wide", tuple(mixed), next(_versions))
            _same(await driver.commit([change]), [True], "1,000 mixed ops")
            left = {entry.key: entry for entry in wanted if entry.key not in keys[400:700]}
            left |= {key: Entry(key, b"new", change.version) for key in keys[:400]}
            _same(await _everything(driver, "wide"), [left[key] for key in sorted(left)], "1,000 mixed ops")

        self._with_driver(make_driver, scenario)

    def test_values_come_back_byte_for_byte(self, make_driver: MakeDriver) -> None:
        async def scenario(driver: Driver) -> None:
            values = {f"{n:02}": value for n, value in enumerate(_VALUES)}
            stored = await _put(driver, "values", values)
            _same(await driver.get([Key("values", key) for key in values]), stored, "get")
            _same(await _everything(driver, "values"), stored, "scan")
            large = random.Random(self.seed).randbytes(MAX_VALUE_BYTES)
            for value in (large, b'"' * MAX_VALUE_BYTES, bytes(MAX_VALUE_BYTES), b"", large[::-1]):
                (entry,) = await _put(driver, "large", {"k": value})
                _same(await driver.get([Key("large", "k")]), [entry], "get of the largest value")
                _same(await _everything(driver, "large"), [entry], "scan of the largest value")

        self._with_driver(make_driver, scenario)

    def test_names_are_taken_as_they_are(self, make_driver: MakeDriver) -> None:
        async def scenario(driver: Driver) -> None:
            longest = "k" * (MAX_KEY_CHARS - 1)
            keys = sorted({*_NAMES, longest, longest + "!", longest + "K", longest + "k", longest + "~"})
            stored = await _put(driver, "keys", {key: key.encode() for key in reversed(keys)})
            stored.reverse()
            _same(await driver.get([Key("keys", key) for key in keys]), stored, "get of odd keys")
            _same(await _everything(driver, "keys"), stored, "scan of odd keys")
            _same(await _everything(driver, "keys", reverse=True), stored[::-1], "reverse scan of odd keys")
            for entry in stored:
                # No key lies between a key and the same key with the least sign behind it.
                page = await driver.scan("keys", entry.key, entry.key + "!", limit=2)
                _same(page, Page([entry], False), f"scan of the key {entry.key} alone")
            for entry, after in pairwise(stored):
                if len(entry.key) == MAX_KEY_CHARS:
                    page = await driver.scan("keys", entry.key + "!", after.key + "!", limit=2)
                    _same(page, Page([after], False), "scan from behind the longest key")

            longest = "p" * (MAX_PARTITION_CHARS - 1)
            names = sorted({*_NAMES, longest, longest + "!", longest + "P", longest + "p", longest + "~"})
            writes = [Write(name, (Put("k", name.encode(), ABSENT),), next(_versions)) for name in names]
            _same(await driver.commit(writes), [True] * len(writes), "creates in odd partitions")
            for write in writes:
                wanted = [Entry("k", write.partition.encode(), write.version)]
                _same(await _everything(driver, write.partition), wanted, f"partition {write.partition}")
            for limit in (1, 50):
                _same(await _partitions(driver, limit), {*names, "keys"}, f"odd partitions by {limit}")

            both = await _put(driver, longest + "~", {"k" * MAX_KEY_CHARS: b"", "~" * MAX_KEY_CHARS: b""})
            found = await driver.get([Key(longest + "~", entry.key) for entry in both])
            _same(found, both, "the longest key in the longest partition")
            deletes = [Delete(key) for key in keys[::2]]
            _same(await driver.commit([Write("keys", (*deletes,), next(_versions))]), [True], "odd deletes")
            _same(await _everything(driver, "keys"), stored[1::2], "what deletes of odd keys left")
            gone = [Write(name, (Delete("k"),), next(_versions)) for name in names[::4]]
            _same(await driver.commit(gone), [True] * len(gone), "deletes in odd partitions")
            for name in names[2::4]:
                await driver.purge(name, "", None)
            left = {*names[1::2], longest + "~", "keys"}
            _same(await _partitions(driver, 50), left, "partitions after deletes and purges of odd ones")

        self._with_driver(make_driver, scenario)

    def test_scan_returns_exactly_the_range(self, make_driver: MakeDriver) -> None:
        async def scenario(driver: Driver) -> None:
            keys = ["A", "B", "a", "a/b", "a/c", "a0", "b"]
            stored = await _put(driver, "p", dict.fromkeys(keys, b"v"))
            await _put(driver, "o", {"a": b"another partition"})
            await _put(driver, "p!", {"a": b"another partition"})
            bounds = ["!", "A", "A!", "B", "a", "a/", "a/b", "a0", "b", "b!"]
            for start, end, reverse in product(bounds, ["", *bounds, None], (False, True)):
                whole = [e for e in stored if start <= e.key and (end is None or e.key < end)]
                if reverse:
                    whole.reverse()
                for limit in (1, 3):
                    page = await driver.scan("p", start, end, limit=limit, reverse=reverse)
                    wanted = Page(whole[:limit], len(whole) > limit)
                    _same(page, wanted, f"scan {start!r} to {end!r}, {limit=}, {reverse=}")
                paged = await _everything(driver, "p", start, end, limit=2, reverse=reverse)
                _same(paged, whole, f"pages of {start!r} to {end!r}, {reverse=}")
            _same(await driver.scan("p", "", None, limit=7), Page(stored, False), "scan from the empty text")
            _same(await driver.scan("none", "!", None, limit=1), Page([], False), "scan of no partition")
            await _put(driver, "big", {f"{n:04}": b"v" for n in range(1000)})
            await _put(driver, "big", {f"{n:04}": b"v" for n in range(1000, 1700)})
            for limit, reverse in product((1, 999, 1000, 1699, 1700, 1701), (False, True)):
                got = await driver.scan("big", "", None, limit=limit, reverse=reverse)
                _same(len(got.entries), min(limit, 1700), f"entries for {limit=}")
                _same(got.more, limit < 1700, f"more for {limit=}")

        self._with_driver(make_driver, scenario)

    def test_a_page_of_large_values_ends_early(self, make_driver: MakeDriver) -> None:
        async def scenario(driver: Driver) -> None:
            stored: list[Entry] = []
            for n in range(4):
                stored += await _put(driver, "p", {f"{n}{m}": bytes(MAX_VALUE_BYTES) for m in range(2)})
            for reverse in (False, True):
                wanted = stored[::-1] if reverse else stored
                page = await driver.scan("p", "!", None, limit=1000, reverse=reverse)
                size = sum(len(entry.value) for entry in page.entries)
                _expect(size <= PAGE_BYTES + MAX_VALUE_BYTES, f"a page holds {size} bytes")
                _same(await _everything(driver, "p", limit=1000, reverse=reverse), wanted, "all pages")
                one = await driver.scan("p", "!", None, limit=1, reverse=reverse)
                _same(one, Page(wanted[:1], True), "a page of one entry")
                rest = await driver.scan("p", "30", None, limit=2, reverse=reverse)
                _same(rest, Page(wanted[:2] if reverse else wanted[-2:], False), "a page that just fits")
            for n in (3, 4):
                few = await _everything(driver, "p", "", stored[n].key)
                _same(few, stored[:n], f"{n} large entries")
            names = [Key("p", entry.key) for entry in stored]
            _same(await driver.get(names), stored, "get of many large values")

        self._with_driver(make_driver, scenario)

    def test_purge_removes_the_range_and_nothing_else(self, make_driver: MakeDriver) -> None:
        async def scenario(driver: Driver) -> None:
            keys = ["A", "a", "a/b", "a/c", "a0", "b"]
            neighbours = {
                name: await _put(driver, name, {"a": b""}) for name in ("purge", "purge/1!", "Purge/1")
            }
            bounds = ["", "!", "A", "a", "a/", "a/c", "b", "b!"]
            for number, (start, end) in enumerate(product(bounds, [*bounds, None])):
                name = f"purge/{number}"
                stored = await _put(driver, name, dict.fromkeys(keys, b"v"))
                left = [e for e in stored if e.key < start or (end is not None and e.key >= end)]
                for _ in range(2):
                    await driver.purge(name, start, end)
                    _same(await _everything(driver, name), left, f"purge {start!r} to {end!r}")
                await driver.purge(name, "", None)
            await driver.purge("none", "", None)
            for n in range(3):
                await _put(driver, "big", {f"{n}{m:03}": b"v" for m in range(900)})
            await driver.purge("big", "0001", "2899")
            _same([e.key for e in await _everything(driver, "big")], ["0000", "2899"], "a large purge")
            await driver.purge("big", "", None)
            _same(await _everything(driver, "big"), [], "a whole partition purged")
            again = Write("big", (Put("0000", b"", ABSENT),), next(_versions))
            _same(await driver.commit([again]), [True], "create after purge")
            for name, entries in neighbours.items():
                _same(await _everything(driver, name), entries, f"{name}, beside the purged partitions")
            _same(await _partitions(driver, 3), {"big", *neighbours}, "partitions after purge")

        self._with_driver(make_driver, scenario)

    def test_partitions_lists_those_that_hold_entries(self, make_driver: MakeDriver) -> None:
        async def scenario(driver: Driver) -> None:
            _same(await _partitions(driver, 10), set(), "partitions of an empty store")
            names = {f"{kind}/{n}" for kind in ("a", "A", "session") for n in range(8)}
            for name in sorted(names):
                await _put(driver, name, {"a": b"", "b": b""})
            for limit in (1, 2, 7, 23, 24, 25, 1000):
                _same(await _partitions(driver, limit), names, f"partitions by {limit}")

            for kind, how in (("session", "Delete"), ("A", "purge")):
                for name in [f"{kind}/{n}" for n in range(0, 8, 2)]:
                    if how == "purge":
                        await driver.purge(name, "!", None)
                    else:
                        gone = Write(name, (Delete("a"), Delete("b")), next(_versions))
                        _same(await driver.commit([gone]), [True], "delete of all entries")
                    names.remove(name)
                _same(await _partitions(driver, 5), names, f"partitions after {how}")

            absent = next(_versions)
            histories: dict[str, tuple[bool, list[tuple[Op, ...]]]] = {
                "overwritten, then emptied": (False, [(Put("a", b"1"),), (Put("a", b"2"),), (Delete("a"),)]),
                "a missing key deleted": (True, [(Put("a", b""),), (Delete("x"), Delete("y"))]),
                "one of two deleted": (True, [(Put("a", b""), Put("b", b"")), (Delete("a"),)]),
                "emptied, then filled": (True, [(Put("a", b""),), (Delete("a"),), (Put("a", b""),)]),
                "only deletes": (False, [(Delete("a"), Delete("b"))]),
                "only a refused Write": (False, [(Put("a", b""), Put("b", b"", absent))]),
            }
            for number, (what, (listed, writes)) in enumerate(histories.items()):
                for ops in writes:
                    await driver.commit([Write(f"history/{number}", ops, next(_versions))])
                now = await _partitions(driver, 100)
                _same(f"history/{number}" in now, listed, f"whether a partition is listed after: {what}")
                names.update([f"history/{number}"] if listed else [])
            await _put(driver, "!", {f"{n:03}": b"" for n in range(1000)})
            names.add("!")
            await driver.purge("history/1", "b", None)
            _same(await _partitions(driver, 5), names, "partitions, one of them large, one purged in part")

            for n in range(12):
                await _put(driver, f"0/{n}", {"a": b""})
            seen: set[str] = set()
            cursor = None
            for n in range(_PATIENCE):
                found, cursor = await driver.partitions(cursor, 3)
                seen.update(found)
                if cursor is None:
                    break
                await _put(driver, f"b/{n}", {"a": b""})
                for name in (f"0/{n}", *(name for name in found if name.startswith("0/"))):
                    await driver.purge(name, "", None)
                await driver.partitions(None, 3)  # another listing begins meanwhile
            _expect(cursor is None, "the cursor of partitions never ends")
            _expect(names <= seen, f"missed while others came and went: {names - seen}")

        self._with_driver(make_driver, scenario)

    def test_driver_objects_see_each_others_writes_at_once(self, make_driver: MakeDriver) -> None:
        async def scenario(*drivers: Driver) -> None:
            version = ABSENT
            for n in range(self.rounds):
                writer, reader, rival = (drivers[(n + shift) % 3] for shift in range(3))
                key, name = f"b{n:03}", f"purged/{n}"
                for driver in (reader, drivers[-1]):  # nothing of what they see now may be kept
                    _same(await driver.get([Key("p", key)]), [None], f"get before Write {n}")
                    await driver.scan("p", "a", None, limit=1000)
                    await driver.partitions(None, 1000)
                write = Write("p", (Put("a", b"%d" % n, version), Put(key, b"", ABSENT)), next(_versions))
                _same(await writer.commit([write]), [True], f"Write {n}")
                entry = Entry("a", b"%d" % n, write.version)
                for driver in (reader, drivers[-1]):  # the last one never writes
                    _same(await driver.get([Key("p", "a")]), [entry], f"get after Write {n}")
                    _same(
                        await driver.get([Key("p", key)]),
                        [Entry(key, b"", write.version)],
                        "get of a new key",
                    )
                    page = await driver.scan("p", "a", None, limit=1000)
                    _same(len(page.entries), n + 2, f"scan after Write {n}")
                late = Write("p", (Put("a", b"lost", version),), next(_versions))
                _same(await rival.commit([late]), [False], "a Write that comes late")
                version = write.version
                await _put(writer, name, {"a": b""})
                for driver in (reader, drivers[-1]):
                    _expect(name in await _partitions(driver, 1000), "partitions of another driver object")
                await rival.purge(name, "", None)
                for driver in (reader, drivers[-1]):
                    _same(await driver.scan(name, "", None, limit=1), Page([], False), "scan after purge")
                    _expect(name not in await _partitions(driver, 1000), "partitions after purge by another")

        self._with_driver(make_driver, scenario, objects=4)

    def test_a_write_is_seen_whole_or_not_at_all(self, make_driver: MakeDriver) -> None:
        """Writers set or remove all keys of a partition at once; a reader must never see a mixture."""
        keys = [f"{n:02}" for n in range(12)]

        async def flip(driver: Driver, number: int) -> None:
            for n in range(self.rounds):
                version = next(_versions)
                value = b"%d" % version
                ops: list[Op] = [Delete(key) if n % 3 == 2 else Put(key, value) for key in keys]
                # Two writers that lock in opposite orders must still both get through.
                ops = ops[::-1] if number % 2 else ops
                _same(await driver.commit([Write("p", tuple(ops), version)]), [True], "unconditional Write")
                await asyncio.sleep(0)
                refused = Check(keys[-1], next(_versions))
                lost = Write("p", (*[Put(key, b"lost") for key in keys[:6]], refused), next(_versions))
                _same(await driver.commit([lost]), [False], "refused Write")

        async def look(driver: Driver, writers: asyncio.Task[Any]) -> None:
            how = 0
            while not writers.done():
                how += 1
                await _seen_whole(driver, "p", keys, how)
                await asyncio.sleep(0)

        async def scenario(*drivers: Driver) -> None:
            writers = asyncio.ensure_future(_together(*(flip(d, n) for n, d in enumerate(drivers[:2]))))
            await _together(*(look(driver, writers) for driver in drivers))
            await writers

        self._with_driver(make_driver, scenario, objects=max(2, self.objects))

    def test_random_calls_answer_as_the_memory_driver_does(self, make_driver: MakeDriver) -> None:
        run_state_machine_as_test(
            _model(make_driver, self.seconds),
            settings=settings(
                max_examples=self.examples,
                stateful_step_count=self.steps,
                deadline=None,
                derandomize=True,
                database=None,
                phases=[Phase.generate, Phase.shrink] if self.shrink else [Phase.generate],
                suppress_health_check=list(HealthCheck),
            ),
        )

    def test_racing_writes_fit_one_order(self, make_driver: MakeDriver) -> None:
        async def scenario(*drivers: Driver) -> None:
            history = await _race(drivers, self.seed, self.tasks, self.rounds)
            await _check_race(history, drivers[0])

        self._with_driver(make_driver, scenario, objects=self.objects)

    def test_writes_that_cross_are_not_half_done(self, make_driver: MakeDriver) -> None:
        """Each puts what the other deletes: whichever comes first, one key is left."""

        async def scenario(one: Driver, other: Driver) -> None:
            for n in range(10):
                name, (left, right) = f"cross/{n}", ("a", "b")
                await asyncio.gather(
                    one.commit([Write(name, (Put(left, b""), Delete(right)), next(_versions))]),
                    other.commit([Write(name, (Put(right, b""), Delete(left)), next(_versions))]),
                )
                stored = await _everything(one, name)
                _expect(len(stored) == 1, f"of two Writes that cross, {len(stored)} keys are left")

        self._with_driver(make_driver, scenario, objects=2)

    def test_racing_appends_get_each_number_once(self, make_driver: MakeDriver) -> None:
        """A log's tail is one key that is not there yet; who loses it takes the next number."""
        logs = [f"log/{n}" for n in range(5)]

        async def append(driver: Driver, chance: random.Random) -> dict[Key, bytes]:
            done: dict[Key, bytes] = {}
            following = dict.fromkeys(logs, 0)
            for _ in range(self.rounds):
                names = chance.sample(logs, chance.randint(1, len(logs)))
                values = {name: chance.randbytes(8) for name in names}
                writes = [
                    Write(name, (Put(f"{following[name]:09}", value, ABSENT),), next(_versions))
                    for name, value in values.items()
                ]
                await asyncio.sleep(0)
                if following[names[0]] % 5 == 4:  # what lies behind the log is removed while others append
                    await driver.purge(names[0], "x", None)
                for write, outcome in zip(writes, await driver.commit(writes), strict=True):
                    name, (op, *_) = write.partition, write.ops
                    if outcome:
                        done[Key(name, op.key)] = values[name]
                    elif outcome is False:
                        page = await driver.scan(name, "", "x", limit=1, reverse=True)
                        last = page.entries[0].key if page.entries else ""
                        _expect(last >= op.key, f"{op.key} in {name} was refused, but {last!r} is the last")
                    following[name] = int(op.key) + 1
            return done

        async def scenario(*drivers: Driver) -> None:
            appenders = enumerate([*drivers] * self.tasks)
            parts = await _together(*(append(d, random.Random(f"{self.seed} {n}")) for n, d in appenders))
            done = {key: value for part in parts for key, value in part.items()}
            _same(len(done), sum(map(len, parts)), "numbers won, all different")
            found = {Key(n, e.key): e.value for n in logs for e in await _everything(drivers[-1], n)}
            _same(found, done, "what the logs hold")

        self._with_driver(make_driver, scenario, objects=self.objects)

    def _with_driver(
        self, make_driver: MakeDriver, scenario: Callable[..., Awaitable[None]], *, objects: int = 1
    ) -> None:
        async def main() -> None:
            async with AsyncExitStack() as stack:
                await scenario(*[await _opened(make_driver, stack) for _ in range(objects)])

        self._run(main())

    def _run(self, call: Coroutine[Any, Any, None]) -> None:
        async def main() -> None:
            async with asyncio.timeout(self.seconds):
                await call

        with _runner() as runner:
            runner.run(main())


class SharedDriverConformance(DriverConformance):
    """The suite for drivers on storage that several processes share; `make_driver` must be picklable."""

    processes = 3

    def test_racing_processes_fit_one_order(self, make_driver: MakeDriver) -> None:
        """They also open the empty store all at once."""
        context = multiprocessing.get_context("spawn")
        gate = context.Barrier(self.processes)
        with ProcessPoolExecutor(
            self.processes, mp_context=context, initializer=_await_gate_at, initargs=(gate,)
        ) as pool:
            children = [
                pool.submit(
                    _race_in_child, make_driver, self.seed + n, self.objects, self.rounds, self.seconds
                )
                for n in range(self.processes)
            ]
            # One that fails breaks the gate for the others: what it says comes first.
            errors = [error for child in children if (error := child.exception()) is not None]
            for error in sorted(errors, key=lambda error: isinstance(error, BrokenBarrierError)):
                raise error
            history = [action for child in children for action in child.result()]

        async def scenario(driver: Driver) -> None:
            await _check_race(history, driver)

        self._with_driver(make_driver, scenario)

    def test_a_process_that_is_killed_leaves_no_half_write(self, make_driver: MakeDriver) -> None:
        """Nor does another process see one while they are written."""
        context = multiprocessing.get_context("spawn")
        names = ["killed/0", "killed/1"]
        busy = [context.Event() for _ in names]
        children = [
            context.Process(target=_flip_in_child, args=(make_driver, *each))
            for each in zip(names, busy, strict=True)
        ]

        async def scenario(driver: Driver) -> None:
            for child in children:
                child.start()
            begun: set[str] = set()
            how = 0
            end = time.monotonic() + self.seconds
            while time.monotonic() < end or len(begun) < len(names):
                how += 1
                _expect(all(child.is_alive() for child in children), "a process that only writes has failed")
                for name in names:
                    if await _seen_whole(driver, name, _FLIPPED, how) and name not in begun:
                        begun.add(name)
                        end = time.monotonic() + 0.5
                await asyncio.sleep(0)
            for child, event in zip(children, busy, strict=True):
                for _ in range(2):
                    begin = time.monotonic()
                    event.clear()
                    event.wait(self.seconds)
                # Half of that time is a commit, and now one begins: kill in its midst.
                await asyncio.sleep((time.monotonic() - begin) / 4)
                child.kill()
                child.join()
            for name in names:
                for how in range(2):
                    await _seen_whole(driver, name, _FLIPPED, how)

        try:
            self._with_driver(make_driver, scenario)
        finally:
            for child in children:
                if child.pid is not None:
                    child.kill()
                    child.join()


class BrokenDriver(MemoryDriver):
    """A driver with the classic mistake: read, decide, then write. The suite must fail it."""

    async def commit(self, writes: Sequence[Write]) -> list[bool | None]:
        outcomes: list[bool | None] = []
        for write in writes:
            found = await self.get([Key(write.partition, op.key) for op in write.ops])
            versions = [ABSENT if entry is None else entry.version for entry in found]
            await asyncio.sleep(0)  # here another task may change what was read
            pairs = list(zip(write.ops, versions, strict=True))
            holds = all(op.expect in (None, version) for op, version in pairs)
            if holds:
                ops = [op._replace(expect=None) for op in write.ops if not isinstance(op, Check)]
                await super().commit([write._replace(ops=tuple(ops))])
            outcomes.append(holds)
        return outcomes


# Histories: what racing callers saw, and whether one order in time explains it.


class Action(NamedTuple):
    """What one call did to one partition: a Write, or the part of a `get` or `scan` there.

    `reads` holds the version of each key that was seen or expected; `writes`
    that of each key it changed, `ABSENT` where it deleted. `version` is the
    Write's own, `ABSENT` for a read. `outcome` is that of `commit`, True for a
    read. `begin` and `end` are `time.monotonic_ns`, one clock for all processes.
    """

    partition: str
    reads: dict[str, int]
    writes: dict[str, int]
    version: int
    outcome: bool | None
    begin: int
    end: int


def check_history(history: Iterable[Action], final: Iterable[Action]) -> None:
    """Raise AssertionError unless each partition's actions fit one order.

    In it every acknowledged Write stands before all calls that began later.

    Every Write expects a version of each key it changes, so each key's
    versions form a chain that is known, not guessed. The partitions were empty
    at first; `final` reads all their keys after everything else has ended. A
    Write of unknown outcome counts as applied if anything shows its version.
    """
    latest = {action.partition: action for action in final}
    by_partition = attrgetter("partition")
    for name, actions in groupby(sorted(history, key=by_partition), by_partition):
        _check_partition(list(actions), latest[name])


def _check_partition(actions: list[Action], final: Action) -> None:
    done = [action for action in actions if action.outcome] + [final]
    doubtful = [action for action in actions if action.outcome is None]
    shown: list[Action] = done
    while shown:
        versions = {version for action in done for version in action.reads.values()}
        shown = [action for action in doubtful if action.version in versions]
        doubtful = [action for action in doubtful if action.version not in versions]
        done += shown

    writer: dict[tuple[str, int], int] = {}
    replacer: dict[tuple[str, int], int] = {}
    creators: defaultdict[str, list[int]] = defaultdict(list)
    for number, action in enumerate(done):
        for key, left in action.writes.items():
            expected = action.reads[key]
            if left != ABSENT:
                writer[key, left] = number
            if expected == ABSENT:
                creators[key].append(number)
            rival = replacer.setdefault((key, expected), number)
            if expected != ABSENT and rival != number:
                _fail(f"two Writes replaced one version of {key!r}", [done[rival], action])

    deletes = [key for a in (*done, *doubtful) for key, left in a.writes.items() if left == ABSENT]
    for key, numbers in creators.items():
        if len(numbers) > deletes.count(key) + 1:
            _fail(f"{key!r} was created more often than it was absent", [done[n] for n in numbers])

    # Which absence of a key that was ever deleted a reader saw cannot be told: it gives no edge.
    def ambiguous(key: str, version: int) -> bool:
        return version == ABSENT and key in deletes

    graph: defaultdict[int, set[int]] = defaultdict(set)  # action → those that must come before it
    for number, action in enumerate(done):
        for key, version in action.reads.items():
            if ambiguous(key, version):
                continue
            if version != ABSENT:
                if (key, version) not in writer:
                    _fail(f"{key!r} has version {version}, which no applied Write stored", [action])
                graph[number].add(writer[key, version])
            if (key, version) in replacer and (next_writer := replacer[key, version]) != number:
                graph[next_writer].add(number)

    # A Write acknowledged before another call began comes first. Reads give no such edge: the contract
    # lets a Write be seen before it is acknowledged. Moments are negative numbers, each after the one before.
    events = [(action.begin, False, number) for number, action in enumerate(done)]
    events += [
        (action.end, True, number) for number, action in enumerate(done) if action.outcome and action.writes
    ]
    moment = -1
    for _, ended, number in sorted(events):
        if ended:
            moment -= 1
            graph[moment] |= {moment + 1, number}
        else:
            graph[number].add(moment)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        _fail("no order explains these", [done[number] for number in error.args[1][:-1] if number >= 0])

    doubted = {(key, action.reads[key]) for action in doubtful for key in action.writes}
    for (key, version), number in writer.items():
        if (key, version) not in replacer and (key, version) not in doubted and final.reads[key] != version:
            _fail(f"version {version} of {key!r} was never replaced, and is lost", [done[number], final])

    def held_throughout(action: Action, key: str, version: int) -> bool:
        if ambiguous(key, version) or (key, version) in doubted:
            return False
        if version != ABSENT:
            if (key, version) not in writer:
                return False
            origin = done[writer[key, version]]
            if origin.outcome is None or origin.end >= action.begin:
                return False
        return (key, version) not in replacer or done[replacer[key, version]].begin > action.end

    for action in actions:
        if action.outcome is False and all(held_throughout(action, *read) for read in action.reads.items()):
            _fail("a Write was refused though every version it expects was there", [action])


_LASTING: Final = ("a", "b", "c", "d")
_MORTAL: Final = ("x", "y")  # these are deleted now and then


def _partitions_of(prefix: str) -> list[str]:
    return [f"{prefix}/1", f"{prefix}/2"]


async def work(
    driver: Driver,
    prefix: str,
    chance: random.Random,
    versions: Iterator[int],
    rounds: int,
    meet: Callable[[], Awaitable[object]],
) -> list[Action]:
    """Race: read some keys, then commit Writes that expect what was read; return what happened.

    `meet` is awaited between read and commit in every other round: a barrier
    there makes all workers decide on the same state.
    """
    history: list[Action] = []
    for number in range(rounds):
        names = chance.sample(_partitions_of(prefix), chance.randint(1, 2))
        looked = await _look(driver, names, scan=chance.random() < 0.3)
        history += looked
        await (asyncio.sleep(0) if number % 2 else meet())
        writes = [_random_write(chance, seen, next(versions)) for seen in looked]
        begin = time.monotonic_ns()
        try:
            outcomes = await driver.commit(writes)
        except UnavailableError:
            outcomes = [None] * len(writes)
        end = time.monotonic_ns()
        for write, outcome in zip(writes, outcomes, strict=True):
            reads = {op.key: op.expect for op in write.ops if op.expect is not None}
            left = {
                op.key: write.version if isinstance(op, Put) else ABSENT
                for op in write.ops
                if not isinstance(op, Check)
            }
            history.append(Action(write.partition, reads, left, write.version, outcome, begin, end))
    return history


async def _look(driver: Driver, names: Sequence[str], *, scan: bool = False) -> list[Action]:
    """Read all keys of these partitions."""
    history = []
    keys = (*_LASTING, *_MORTAL)
    begin = time.monotonic_ns()
    if scan:
        pages = [await driver.scan(name, "", None, limit=100) for name in names]
        found = [(name, entry) for name, page in zip(names, pages, strict=True) for entry in page.entries]
    else:
        asked = [Key(name, key) for name in names for key in keys]
        got = zip(asked, await driver.get(asked), strict=True)
        found = [(key.partition, entry) for key, entry in got if entry is not None]
    end = time.monotonic_ns()
    for name in names:
        entries = [entry for partition, entry in found if partition == name]
        for entry in entries:
            _same(entry.value, _mark(name, entry.key, entry.version), f"value of {name} · {entry.key}")
        reads = dict.fromkeys(keys, ABSENT) | {entry.key: entry.version for entry in entries}
        history.append(Action(name, reads, {}, ABSENT, True, begin, end))
    return history


def _random_write(chance: random.Random, seen: Action, version: int) -> Write:
    """A Write of one to four ops, at least one of them a Put."""
    ops: list[Op] = []
    for key in chance.sample(sorted(seen.reads), chance.randint(2, 4)):
        held = seen.reads[key]
        put = Put(key, _mark(seen.partition, key, version), held)
        if not ops or held == ABSENT:
            ops.append(put)
        elif key in _MORTAL:
            ops.append(Delete(key, held))
        else:
            ops.append(chance.choice((put, Check(key, held))))
    chance.shuffle(ops)
    return Write(seen.partition, tuple(ops), version)


def _mark(partition: str, key: str, version: int) -> bytes:
    return f"{partition} {key} {version}".encode()


async def _race(
    drivers: Sequence[Driver], seed: int, tasks: int, rounds: int, gate: Callable[[], object] = lambda: None
) -> list[Action]:
    """`gate` is called by one worker while the others wait: other processes may wait there too."""
    meeting = asyncio.Barrier(tasks * len(drivers))

    async def meet() -> None:
        if await meeting.wait() == 0:
            gate()
        await meeting.wait()

    workers = []
    for number, driver in enumerate([*drivers] * tasks):
        chance = random.Random(f"{seed} {number}")
        versions = count(2**61 + (seed << 40) + (number << 20))
        workers.append(work(driver, "race", chance, versions, rounds, meet))
    return [action for part in await _together(*workers) for action in part]


async def _check_race(history: list[Action], driver: Driver) -> None:
    # At the first meeting many have seen the same empty store: some must win and some must lose.
    for outcome in (True, False):
        _expect(any(a.version and a.outcome is outcome for a in history), f"no Write has outcome {outcome}")
    check_history(history, await _look(driver, _partitions_of("race")))


_gate: Barrier | None = None


def _await_gate_at(gate: Barrier) -> None:
    global _gate
    _gate = gate


def _race_in_child(
    make_driver: MakeDriver, seed: int, objects: int, rounds: int, seconds: float
) -> list[Action]:
    async def main(meet: Callable[[], object]) -> list[Action]:
        async with asyncio.timeout(seconds), AsyncExitStack() as stack:
            drivers = [await _opened(make_driver, stack) for _ in range(objects)]
            history = await _race(drivers, seed, 1, rounds, meet)
            meet()
            return history + await _contend(drivers[0], seed)

    gate = _gate
    if gate is None:
        raise BrokenBarrierError
    try:
        gate.wait(seconds)
        return asyncio.run(main(partial(gate.wait, seconds)))
    except BaseException:
        gate.abort()
        raise


async def _contend(driver: Driver, seed: int) -> list[Action]:
    """Race on two keys without pause: it shows a gap of microseconds between test and change."""
    chance, versions = random.Random(seed), count(2**60 + (seed << 40))
    history: list[Action] = []
    name, end = _partitions_of("race")[0], time.monotonic() + 0.6
    while time.monotonic() < end:
        looked = await _look(driver, [name])
        await asyncio.sleep(0.001 if chance.random() < 0.3 else 0)
        looked += await _look(driver, [name])  # others have written since: what was read must not be kept
        seen = looked[-1]
        one, other = chance.sample(_LASTING[:2], 2)
        version, held = next(versions), seen.reads[other]
        mark = _mark(name, one, version)
        ops: list[Op] = [Put(one, mark, seen.reads[one])]
        ops += [Check(other, held)] if held != ABSENT else []
        begin = time.monotonic_ns()
        (outcome,) = await driver.commit([Write(name, (*ops,), version)])
        reads = {op.key: op.expect for op in ops if op.expect is not None}
        history += looked
        history.append(Action(name, reads, {one: version}, version, outcome, begin, time.monotonic_ns()))
    return history


_FLIPPED: Final = [f"{n:03}" for n in range(100)]


def _flip_in_child(make_driver: MakeDriver, name: str, busy: Event) -> None:
    """Overwrite all keys at once, for ever."""

    async def main() -> None:
        async with AsyncExitStack() as stack:
            driver = await _opened(make_driver, stack)
            for version in count(2**61):
                ops = tuple(Put(key, b"%d" % version) for key in _FLIPPED)
                begin = time.monotonic()
                busy.set()
                await driver.commit([Write(name, ops, version)])
                await asyncio.sleep(time.monotonic() - begin)  # who reads gets his turn

    asyncio.run(main())


# Random calls, compared with the memory driver.

_FEW_KEYS: Final = ("!", "A", "a", "a/b", "a0", "b", "~")
_FEW_PARTITIONS: Final = ("p", "P", "p/q")
_bounds = st.sampled_from(["", "!!", "B", "a!", "a/", "c", *_FEW_KEYS])
_choices = st.tuples(
    st.sampled_from(["put", "create", "replace", "replace", "remove", "delete", "check", "check"]),
    st.sampled_from([True] * 7 + [False]),  # whether the version it expects is the one that is there
    st.binary(max_size=3),
)


def _model(make_driver: MakeDriver, seconds: float) -> type[RuleBasedStateMachine]:
    example = count()

    class Model(RuleBasedStateMachine):
        def __init__(self) -> None:
            super().__init__()
            self.prefix = f"model/{next(example)}/"  # the examples share a store
            self.memory = MemoryDriver()
            self.stack = AsyncExitStack()
            self.loop = _runner()

        @initialize()
        def open(self) -> None:
            self.driver = self.wait(_opened(make_driver, self.stack))

        def teardown(self) -> None:
            self.wait(self.stack.aclose())
            self.loop.close()

        def wait(self, call: Awaitable[T]) -> T:
            async def main() -> T:
                async with asyncio.timeout(seconds):
                    return await call

            return self.loop.run(main())

        async def both(self, call: Callable[[Driver], Awaitable[T]], what: str) -> T:
            wanted = await call(self.memory)
            _same(await call(self.driver), wanted, what)
            return wanted

        @rule(
            batch=st.dictionaries(
                st.sampled_from(_FEW_PARTITIONS),
                st.dictionaries(st.sampled_from(_FEW_KEYS), _choices, min_size=1),
                min_size=1,
            )
        )
        def commit(self, batch: dict[str, dict[str, tuple[str, bool, bytes]]]) -> None:
            self.wait(self.compare_commit(batch))

        async def compare_commit(self, batch: dict[str, dict[str, tuple[str, bool, bytes]]]) -> None:
            writes = []
            for short, choices in batch.items():
                name = self.prefix + short
                found = await self.memory.get([Key(name, key) for key in choices])
                ops = [
                    _chosen_op(key, kind, right, value, held)
                    for (key, (kind, right, value)), held in zip(choices.items(), found, strict=True)
                ]
                writes.append(Write(name, tuple(ops), next(_versions)))
            await self.both(lambda driver: driver.commit(writes), f"commit {writes}")
            for write in writes:
                what = f"{write.partition} after {writes}"
                await self.both(lambda driver: _everything(driver, write.partition), what)  # noqa: B023

        @rule(
            keys=st.lists(st.tuples(st.sampled_from(_FEW_PARTITIONS), st.sampled_from(_FEW_KEYS)), max_size=6)
        )
        def get(self, keys: list[tuple[str, str]]) -> None:
            asked = [Key(self.prefix + short, key) for short, key in keys]
            self.wait(self.both(lambda driver: driver.get(asked), f"get {asked}"))

        @rule(
            short=st.sampled_from(_FEW_PARTITIONS),
            start=_bounds,
            end=st.none() | _bounds,
            limit=st.integers(1, 4),
            reverse=st.booleans(),
        )
        def scan(self, short: str, start: str, end: str | None, limit: int, reverse: bool) -> None:
            name = self.prefix + short
            what = f"scan {name} {start!r} to {end!r}, {limit=}, {reverse=}"
            call = self.both(lambda driver: driver.scan(name, start, end, limit=limit, reverse=reverse), what)
            self.wait(call)

        @rule(short=st.sampled_from(_FEW_PARTITIONS), start=_bounds, end=st.none() | _bounds)
        def purge(self, short: str, start: str, end: str | None) -> None:
            name = self.prefix + short
            self.wait(self.both(lambda driver: driver.purge(name, start, end), "purge"))
            what = f"{name} after purge {start!r} to {end!r}"
            self.wait(self.both(lambda driver: _everything(driver, name), what))

    return Model


def _chosen_op(key: str, kind: str, right: bool, value: bytes, held: Entry | None) -> Op:
    if kind == "put":
        return Put(key, value)
    if kind == "remove":
        return Delete(key)
    if kind == "create" or held is None:
        # Something that expects a version would always be refused where nothing is.
        return Put(key, value, ABSENT) if right or kind == "create" else Check(key, next(_versions))
    expect = held.version if right else held.version ^ 1
    if kind == "replace":
        return Put(key, value, expect)
    return Delete(key, expect) if kind == "delete" else Check(key, expect)


# The cases of the tables.

_versions: Final = count(2**62 - 3, -1)  # neighbours that are equal as doubles


class _Case(NamedTuple):
    """An op on the key "m", made from the version that is there if `stored`, and whether it may pass."""

    stored: bool
    op: Callable[[int], Op]
    applied: bool


_CASES: Final = (
    _Case(False, lambda held: Put("m", b"new"), True),
    _Case(False, lambda held: Put("m", b"new", ABSENT), True),
    _Case(False, lambda held: Put("m", b"new", held), False),
    _Case(True, lambda held: Put("m", b"new"), True),
    _Case(True, lambda held: Put("m", b"new", ABSENT), False),
    _Case(True, lambda held: Put("m", b"new", held), True),
    _Case(True, lambda held: Put("m", b"new", held ^ 1), False),
    _Case(False, lambda held: Delete("m"), True),
    _Case(False, lambda held: Delete("m", held), False),
    _Case(True, lambda held: Delete("m"), True),
    _Case(True, lambda held: Delete("m", held), True),
    _Case(True, lambda held: Delete("m", held ^ 1), False),
    _Case(False, lambda held: Check("m", held), False),
    _Case(True, lambda held: Check("m", held), True),
    _Case(True, lambda held: Check("m", held ^ 1), False),
)
_COMPANIONS: Final[tuple[tuple[str, tuple[Op, ...], tuple[Op, ...]], ...]] = (
    ("alone", (), ()),
    ("first", (), (Put("a", b"a", ABSENT), Put("x", b"x2"), Delete("y"))),
    ("last", (Put("z", b"z"), Delete("x"), Put("b", b"b", ABSENT)), ()),
    ("deletes", (Delete("x"), Delete("y")), ()),
)
_SIGNS: Final = "".join(chr(code) for code in range(0x21, 0x7F) if chr(code) not in "{}")
_ODD_NAMES: Final = r"""
. .. ... a. .a a..b ../a ./a /a // a/ a//b a/b a/b/c aa aA Aa AA a! a~ ab a0 ss SS
a% %a a_ _a %% a* *a* a? [a-z] [!a] ^a a|b (a) a.* \% \\ \0 %00 $1 $a %s :a @a &amp; <a>
'a' '' a'b "" a`b ';DROP/**/TABLE/**/x;-- 1=1 -- /* */ _id $set a.b a.$ __proto__
0 00 -0 1 01 10 2 1.0 1e1 0x1 +1 null NULL None true nan CON nul aux.txt a:b a;b
"""
_NAMES: Final = (*_SIGNS, _SIGNS, _SIGNS[::-1], *_ODD_NAMES.split())
_VALUES: Final = (
    b"",
    bytes(range(256)),
    b"\0",
    b"\xff\xfe\xfa",
    b"\xc3\x28",
    b"\xed\xa0\x80",
    b" ",
    b"\n",
    b"a\r\nb\n",
    b"null",
    b" null",
    b"1.0",
    b"1e400",
    b"NaN",
    b'"text"',
    b'"\\ud800"',
    b'"\\u0000"',
    b'{"a": 1,\n "b": [1, 2]}\n',
    b'{"a":1,"a":2}',
    b'{"b":1,"a":123456789012345678901234567890}',
    "\ufeff{}".encode(),
    '{"é":"😀"}'.encode(),
    b"eyJhIjoxfQ==",
    b"\\x6162",
    b"%s?:1{}",
)
_PATIENCE: Final = 1000
"""Pages after which a listing that makes no progress is given up."""


# Small parts.


class _Strict:
    """A driver whose every answer is held to what must be true of any answer."""

    def __init__(self, driver: Driver) -> None:
        self._driver = driver

    async def open(self) -> None:
        await self._driver.open()

    async def close(self) -> None:
        await self._driver.close()

    async def get(self, keys: Sequence[Key]) -> list[Entry | None]:
        found = _own(await self._driver.get(keys))
        _expect(type(found) is list and len(found) == len(keys), "get returns a list, one item a key")
        for key, entry in zip(keys, found, strict=True):
            if entry is not None:
                _check_entry(entry)
                _same(entry.key, key.key, "key of the entry")
        return found

    async def scan(
        self, partition: str, start: str, end: str | None, *, limit: int, reverse: bool = False
    ) -> Page:
        page = await self._driver.scan(partition, start, end, limit=limit, reverse=reverse)
        what = f"scan {partition} {start!r} to {end!r}, {limit=}, {reverse=}"
        _expect(type(page) is Page and type(page.entries) is list, f"{what} returns a Page with a list")
        _expect(type(page.more) is bool, f"{what} returns {page.more!r} as more")
        page = page._replace(entries=_own(page.entries))
        for entry in page.entries:
            _check_entry(entry)
            inside = start <= entry.key and (end is None or entry.key < end)
            _expect(inside, f"{what} returns {entry.key!r}")
        keys = [entry.key for entry in page.entries]
        _same(keys, sorted(set(keys), reverse=reverse), f"order of {what}")
        _expect(len(keys) <= limit, f"{what} returns {len(keys)} entries")
        if page.more and len(keys) < limit:
            size = sum(len(entry.key) + len(entry.value) for entry in page.entries)
            _expect(size >= PAGE_BYTES // 2, f"{what} ends early with {len(keys)} entries of {size} bytes")
        return page

    async def commit(self, writes: Sequence[Write]) -> list[bool | None]:
        outcomes = await self._driver.commit(writes)
        _expect(
            type(outcomes) is list and len(outcomes) == len(writes), "commit returns a list, one item a Write"
        )
        _expect(all(type(o) in (bool, type(None)) for o in outcomes), f"commit returns {outcomes}")
        return outcomes

    async def purge(self, partition: str, start: str, end: str | None) -> None:
        await self._driver.purge(partition, start, end)

    async def partitions(self, cursor: str | None, limit: int) -> tuple[list[str], str | None]:
        names, following = await self._driver.partitions(cursor, limit)
        _expect(
            type(names) is list and all(type(name) is str for name in names), f"partitions returns {names}"
        )
        _expect(following is None or type(following) is str, f"partitions returns {following!r} as cursor")
        _expect(len(names) <= limit, f"partitions returns {len(names)} names for {limit=}")
        return names, following


def _own(answer: list[T]) -> list[T]:
    """Return a copy and spoil the original: a driver must not give out a list that it keeps."""
    if type(answer) is not list:
        return answer
    copy = answer[:]
    answer.clear()
    return copy


def _check_entry(entry: Entry) -> None:
    kinds = (type(entry), type(entry.key), type(entry.value), type(entry.version))
    _same(kinds, (Entry, str, bytes, int), "types of an entry and its parts")


async def _opened(make_driver: MakeDriver, stack: AsyncExitStack) -> Driver:
    driver = make_driver()
    _expect(isinstance(driver, Driver), f"{driver!r} lacks a method of the contract")
    stack.push_async_callback(driver.close)
    await driver.open()
    return _Strict(driver)


async def _put(driver: Driver, partition: str, values: dict[str, bytes]) -> list[Entry]:
    """Store these and return the entries, in the order of `values`."""
    write = Write(partition, tuple(Put(key, value) for key, value in values.items()), next(_versions))
    _same(await driver.commit([write]), [True], f"unconditional Write to {partition}")
    return [Entry(key, value, write.version) for key, value in values.items()]


async def _everything(
    driver: Driver,
    partition: str,
    start: str = "",
    end: str | None = None,
    *,
    limit: int = 1000,
    reverse: bool = False,
) -> list[Entry]:
    """Read a range page by page."""
    entries: list[Entry] = []
    while True:
        page = await driver.scan(partition, start, end, limit=limit, reverse=reverse)
        _expect(bool(page.entries) or not page.more, "an empty page says that there is more")
        _expect(bool(page.entries) or not entries, "a page says that there is more, and nothing follows")
        entries += page.entries
        if not page.more:
            return entries
        if reverse:
            end = entries[-1].key
        else:
            start = entries[-1].key + "!"


async def _seen_whole(driver: Driver, name: str, keys: Sequence[str], how: int) -> bool:
    """Read keys that each Write changes all at once, each time another way; tell whether they are there."""
    if how % 2:
        found = [entry for entry in await driver.get([Key(name, key) for key in keys]) if entry]
    else:
        found = (await driver.scan(name, "", None, limit=1000, reverse=how % 4 == 0)).entries
    _expect(len(found) in (0, len(keys)), f"{len(found)} of {len(keys)} keys are seen")
    _expect(len({entry.version for entry in found}) <= 1, "two Writes are seen as one")
    _expect(all(e.value == b"%d" % e.version for e in found), "a value has another's version")
    return bool(found)


async def _partitions(driver: Driver, limit: int) -> set[str]:
    found: set[str] = set()
    cursor = None
    for _ in range(_PATIENCE):
        names, cursor = await driver.partitions(cursor, limit)
        found.update(names)
        if cursor is None:
            break
    _expect(cursor is None, "the cursor of partitions never ends")
    return found


def _runner() -> asyncio.Runner:
    """Return one that leaves the thread's current event loop as it is: it may be another plugin's."""
    return asyncio.Runner(loop_factory=asyncio.new_event_loop)


async def _together(*calls: Coroutine[Any, Any, T]) -> list[T]:
    """Run all at once; the first to fail ends the others and is what is raised."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(call) for call in calls]
    except BaseExceptionGroup as failures:
        raise failures.exceptions[0] from None
    return [task.result() for task in tasks]


_shortened = reprlib.Repr()
_shortened.maxlist = _shortened.maxtuple = _shortened.maxset = 12
_shortened.maxstring = _shortened.maxother = 300


def _same(got: object, wanted: object, what: str) -> None:
    __tracebackhide__ = True
    if got == wanted:
        return
    if isinstance(got, set) and isinstance(wanted, set):
        lacks, extra = sorted(wanted - got), sorted(got - wanted)
        _fail(
            f"{what}: lacks {_shortened.repr(lacks)}, holds {_shortened.repr(extra)} that should not be there"
        )
    if type(got) is list and type(wanted) is list and max(len(got), len(wanted)) > 1:
        pairs = enumerate(zip(got, wanted, strict=False))
        at = next((n for n, (one, other) in pairs if one != other), min(len(got), len(wanted)))
        what = f"{what}: {len(got)} items, {len(wanted)} wanted, from item {at} on"
        got, wanted = got[at : at + 2], wanted[at : at + 2]
    _fail(f"{what}: got {_shortened.repr(got)} instead of {_shortened.repr(wanted)}")


def _expect(holds: bool, what: str) -> None:
    __tracebackhide__ = True
    if not holds:
        _fail(what)


def _fail(what: str, actions: Sequence[Action] = ()) -> NoReturn:
    """Raise rather than `assert`: a run under ``python -O`` must not pass for nothing."""
    __tracebackhide__ = True
    if len(what) > 1500:
        what = f"{what[:750]} … {what[-750:]}"
    raise AssertionError("\n  ".join([what, *map(str, actions)]))
