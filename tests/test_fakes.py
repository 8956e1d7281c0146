"""A first answer in a second for one who has no servers: two drivers on imitations of their engines.

They prove little. That the drivers keep the contract, test_driver.py shows on real servers, and nothing in a
driver is there for an imitation's sake. Where one cannot run what a driver sends, the test is left out:

* fakeredis runs the scripts of the driver in a real Lua. It has no INFO and no CONFIG, which are answered
  here, no Cluster, and no connection that could break.
* mongomock has no sessions, hence no transactions, hence no Write of several ops; it ignores hints, read and
  write concerns and the size of batches. It inserts what MongoDB refuses with error 66, on which conditional
  updates rest: `Bulk` refuses it here. So that these are refused is known only from a real server.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, TypeAlias

import mongomock
import pytest
from fakeredis import FakeAsyncRedis, FakeServer
from mongomock.collection import BulkOperationBuilder
from pymongo.errors import WriteError

from persistence.driver import ABSENT, Check, Delete, Driver, Entry, Key, Op, Put, Write
from persistence.drivers.mongodb import MongoDBDriver
from persistence.drivers.redis import RedisDriver

MakeDriver: TypeAlias = Callable[..., Awaitable[Driver]]
HIGH = (1 << 62) - 1


class FakeRedis(FakeAsyncRedis):
    """Answers what `open` and `partitions` ask of the server."""

    async def execute_command(self, *words: Any, **options: Any) -> Any:
        match words:
            case ("INFO", *_):
                return {"redis_version": "7.0.0", "run_id": "0", "aof_enabled": 1}
            case ("CONFIG GET", name):
                return {name: "always"}
        return await super().execute_command(*words, **options)  # type: ignore[no-untyped-call]


class FakeMongoClient:
    """As much of `AsyncMongoClient` as the driver uses for Writes of one op."""

    def __init__(self) -> None:
        self._client: Any = mongomock.MongoClient()
        self.admin = self

    async def command(self, _: str) -> dict[str, Any]:
        return {"maxWireVersion": 13, "setName": "fake"}

    def __getitem__(self, name: str) -> FakeDatabase:
        return FakeDatabase(self._client[name])


class FakeDatabase:
    def __init__(self, database: Any) -> None:
        self._database = database

    async def list_collections(self, filter: dict[str, Any]) -> FakeCursor:
        names = self._database.list_collection_names(filter)
        return FakeCursor({"name": name, "type": "collection", "options": {}} for name in names)

    async def create_collection(self, name: str, **_: Any) -> None:
        self._database.create_collection(name)

    def get_collection(self, name: str, *_: Any) -> FakeCollection:
        return FakeCollection(self, self._database[name])

    async def command(self, command: dict[str, Any]) -> dict[str, Any]:
        """Do what the methods of mongomock do, which knows no commands."""
        if "find" in command:
            found = self._database[command["find"]].find(
                command["filter"],
                command.get("projection"),
                sort=list(command.get("sort", {}).items()) or None,
                skip=command.get("skip", 0),
                limit=command["limit"],
            )
            return {"cursor": {"firstBatch": list(found)}}
        errors = []
        for index, document in enumerate(command["documents"]):
            try:
                self._database[command["insert"]].insert_one(document)
            except mongomock.DuplicateKeyError:
                errors.append({"index": index, "code": 11000})
        return {"writeErrors": errors}


class FakeCollection:
    def __init__(self, database: FakeDatabase, collection: Any) -> None:
        self.database = database
        self._collection = collection

    async def bulk_write(self, requests: Sequence[Any], *, ordered: bool) -> None:
        bulk: Any = Bulk(self._collection, ordered)  # type: ignore[no-untyped-call]
        for request in requests:
            request._add_to_bulk(bulk)
        bulk.execute()

    async def delete_one(self, where: dict[str, Any]) -> Any:
        return self._collection.delete_one(where)

    async def delete_many(self, where: dict[str, Any]) -> None:
        self._collection.delete_many(where)


class Bulk(BulkOperationBuilder):
    """Takes `sort`, which pymongo passes these days; refuses an upsert whose `_id` is not its filter's."""

    def add_update(self, selector: Any, doc: Any, *args: Any, sort: Any = None, **options: Any) -> None:
        super().add_update(selector, doc, *args, **options)  # type: ignore[no-untyped-call]
        if "_id" in doc.get("$setOnInsert", ()):
            update = self.executors[-1]

            def exec_update() -> Any:
                if self.collection.find_one(selector) is None:
                    raise WriteError("the immutable field '_id' was altered", 66)
                return update()

            self.executors[-1] = exec_update


class FakeCursor:
    def __init__(self, documents: Any) -> None:
        self._documents = iter(documents)

    async def to_list(self) -> list[Any]:
        return list(self._documents)

    async def __aenter__(self) -> FakeCursor:
        return self

    async def __aexit__(self, *_: object) -> None:
        pass

    def __aiter__(self) -> FakeCursor:
        return self

    async def __anext__(self) -> Any:
        try:
            return next(self._documents)
        except StopIteration:
            raise StopAsyncIteration from None


@pytest.fixture
async def make_redis() -> AsyncIterator[MakeDriver]:
    # Made here, since it reads a file, which no call of a driver may.
    async with FakeRedis(server=FakeServer()) as client:

        async def make(**options: Any) -> Driver:
            driver = RedisDriver(client=client, **options)
            await driver.open()
            return driver

        yield make


@pytest.fixture
def make_mongodb() -> MakeDriver:
    client: Any = FakeMongoClient()

    async def make(**options: Any) -> Driver:
        driver = MongoDBDriver(client=client, **options)
        await driver.open()
        return driver

    return make


@pytest.fixture(params=["redis", "mongodb"])
def make_driver(request: pytest.FixtureRequest) -> MakeDriver:
    make: MakeDriver = request.getfixturevalue(f"make_{request.param}")
    return make


@pytest.fixture
async def driver(make_driver: MakeDriver) -> Driver:
    return await make_driver()


async def put(driver: Driver, partition: str, *keys: str) -> list[Entry]:
    entries = [Entry(key, key.encode() * 2, 10 + place) for place, key in enumerate(keys)]
    for key, value, version in entries:
        assert await driver.commit([Write(partition, (Put(key, value, ABSENT),), version)]) == [True]
    return entries


async def keys(driver: Driver, partition: str) -> list[str]:
    return [entry.key for entry in (await driver.scan(partition, "", None, limit=100)).entries]


async def listed(driver: Driver) -> set[str]:
    found: set[str] = set()
    page, cursor = await driver.partitions(None, 2)
    while cursor is not None:
        assert len(page) <= 2
        found.update(page)
        page, cursor = await driver.partitions(cursor, 2)
    return found.union(page)


async def test_get_answers_in_the_order_of_its_keys(driver: Driver) -> None:
    [a, b] = await put(driver, "p", "a", "b")
    [other] = await put(driver, "q", "b")
    wanted = [Key("p", "b"), Key("p", "none"), Key("p", "a"), Key("p", "b")]
    assert await driver.get(wanted) == [b, None, a, b]
    assert await driver.get([Key("q", "b"), Key("none", "a"), Key("p", "a")]) == [other, None, a]


async def test_scan_pages_in_both_directions(driver: Driver) -> None:
    [upper, a, aa, b, c] = await put(driver, "p", "B", "a", "aa", "b", "c")
    await put(driver, "p/", "a")
    assert await driver.scan("p", "a", "c", limit=2) == ([a, aa], True)
    assert await driver.scan("p", "aa!", "c", limit=2) == ([b], False)
    assert await driver.scan("p", "a", "c", limit=2, reverse=True) == ([b, aa], True)
    assert await driver.scan("p", "a", "aa", limit=2, reverse=True) == ([a], False)
    assert await driver.scan("p", "", None, limit=5) == ([upper, a, aa, b, c], False)
    assert await driver.scan("p", "c", "a", limit=5) == ([], False)


async def test_a_key_is_created_once(driver: Driver) -> None:
    [entry] = await put(driver, "p", "a")
    assert await driver.commit([Write("p", (Put("a", b"late", ABSENT),), 3)]) == [False]
    assert await driver.get([Key("p", "a")]) == [entry]


OLD, NEW = Entry("a", b"old", HIGH), Entry("a", b"new", 7)


@pytest.mark.parametrize(
    ("op", "outcome", "left"),
    [
        (Put("a", b"new", HIGH), True, [NEW]),
        (Put("a", b"new", HIGH - 1), False, [OLD]),
        (Put("a", b"new"), True, [NEW]),
        (Delete("a", HIGH), True, []),
        (Delete("a", HIGH - 1), False, [OLD]),
        (Delete("a"), True, []),
        (Check("a", HIGH), True, [OLD]),
        (Check("a", HIGH - 1), False, [OLD]),
        (Put("b", b"new", HIGH), False, [OLD]),
        (Put("b", b"new"), True, [OLD, Entry("b", b"new", 7)]),
        (Delete("b", HIGH), False, [OLD]),
        (Delete("b"), True, [OLD]),
        (Check("b", HIGH), False, [OLD]),
    ],
)
async def test_an_op_depends_on_the_version(driver: Driver, op: Op, outcome: bool, left: list[Entry]) -> None:
    await driver.commit([Write("p", (Put("a", b"old", ABSENT),), HIGH)])
    assert await driver.commit([Write("p", (op,), 7)]) == [outcome]
    assert await driver.get([Key("p", "a"), Key("p", "b")]) == [*left, None, None][:2]
    assert await driver.scan("p", "", None, limit=3) == (left, False)


async def test_each_write_of_a_commit_has_its_own_outcome(driver: Driver) -> None:
    for partition in ("p1", "p2", "p3", "p4"):
        await put(driver, partition, "a")
    ops: dict[str, Op] = {
        "p1": Put("a", b"", 10),
        "p2": Put("a", b"", 11),
        "p3": Put("a", b"", ABSENT),
        "p4": Delete("a", 11),
        "p5": Put("a", b"", ABSENT),
        "p6": Put("a", b"", 10),
    }
    outcomes = await driver.commit([Write(partition, (op,), 20) for partition, op in ops.items()])
    assert outcomes == [True, False, False, False, True, False]
    found = await driver.get([Key(partition, "a") for partition in ops])
    assert [entry and entry.version for entry in found] == [20, 10, 10, 10, 20, None]


async def test_purge_removes_the_range_and_nothing_else(driver: Driver) -> None:
    await put(driver, "p", "a", "b", "bb", "c")
    await put(driver, "p2", "b")
    await driver.purge("p", "b", "c")
    assert await keys(driver, "p") == ["a", "c"]
    await driver.purge("p", "", None)
    assert await keys(driver, "p") == []
    assert await keys(driver, "p2") == ["b"]


async def test_partitions_of_one_namespace_are_listed_page_by_page(make_driver: MakeDriver) -> None:
    driver, other = await make_driver(), await make_driver(namespace="other")
    for partition in ("p1", "p2", "p3", "p4", "p5"):
        await put(driver, partition, "a", "b")
    await put(other, "p6", "a")
    await driver.purge("p4", "", None)
    assert await listed(driver) == {"p1", "p2", "p3", "p5"}
    assert await listed(other) == {"p6"}


async def test_redis_applies_several_ops_whole_or_not_at_all(make_redis: MakeDriver) -> None:
    driver = await make_redis()
    await put(driver, "p", "a", "b", "c")  # versions 10, 11, 12
    refused = Write("p", (Put("a", b"x"), Delete("b"), Put("d", b"", ABSENT), Check("c", 10)), 20)
    assert await driver.commit([refused]) == [False]
    assert await keys(driver, "p") == ["a", "b", "c"]
    applied = Write("p", (Put("a", b"x"), Delete("b"), Put("d", b"", ABSENT), Check("c", 12)), 20)
    assert await driver.commit([applied, Write("q", refused.ops, 30)]) == [True, False]
    page = await driver.scan("p", "", None, limit=9)
    assert page.entries == [Entry("a", b"x", 20), Entry("c", b"cc", 12), Entry("d", b"", 20)]
