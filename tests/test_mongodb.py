"""What is peculiar to MongoDB; test_driver.py has what all drivers promise."""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
import sys
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import pytest
from bson.int64 import Int64
from proxy import Proxy
from pymongo import AsyncMongoClient, MongoClient
from pymongo.monitoring import CommandListener, CommandStartedEvent

from persistence.driver import ABSENT, Check, Delete, Driver, Entry, Key, Put, Write
from persistence.drivers import mongodb
from persistence.drivers.mongodb import MongoDBDriver, from_url
from persistence.errors import ConfigurationError, CorruptRecordError, UnavailableError

Servers = Callable[..., Any]
SECRET = "s3cr:t/p@ss"


class Commands(CommandListener):
    """Notes the names of commands that go out."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def started(self, event: CommandStartedEvent) -> None:
        if event.command_name not in ("hello", "endSessions"):
            self.names.append(event.command_name)

    def succeeded(self, event: object) -> None:
        pass

    def failed(self, event: object) -> None:
        pass


@contextlib.asynccontextmanager
async def opened(url: str, **options: Any) -> AsyncIterator[MongoDBDriver]:
    driver = MongoDBDriver(url, **{"namespace": uuid.uuid4().hex, **options})
    await driver.open()
    try:
        yield driver
    finally:
        await driver.close()


def create(partition: str, key: str = "a", value: bytes = b"v", version: int = 1) -> Write:
    return Write(partition, (Put(key, value, ABSENT),), version)


async def test_an_entry_is_a_document(server: Servers) -> None:
    async with opened(server("mongodb").url, namespace="legible", collection="things") as driver:
        await driver.purge("p", "", None)
        await driver.commit([create("p", "k", b"{}", version=1 << 61)])
        with MongoClient[Any](server("mongodb").url) as client:
            found: dict[str, Any] | None = client.persistence.things.find_one({"p": "legible/p"})
        assert found == {"_id": "legible/p\0k", "p": "legible/p", "v": b"{}", "ver": Int64(1 << 61)}
        assert type(found["ver"]) is Int64


async def test_the_view_shows_names_and_values_and_survives_any_value(server: Servers) -> None:
    url, name = server("mongodb").url, f"things{uuid.uuid4().hex}"
    values = {"json": '{"text": "grüße"}'.encode(), "text": b"no json", "bytes": b"\xff\x00"}
    async with opened(url, namespace="app", collection=name) as driver:
        await driver.commit([Write("session/1", tuple(Put(k, v) for k, v in values.items()), 258)])
        arguments = driver.view_ddl().partition(".createView")[2]
    view, source, pipeline = json.loads(f"[{arguments[1:-1]}]")  # as mongosh reads it
    with MongoClient[Any](url) as client:
        try:
            client.persistence.command("create", view, viewOn=source, pipeline=pipeline)
            shown = {row["key"]: row for row in client.persistence[view].find()}
        finally:
            client.persistence.drop_collection(view)
            client.persistence.drop_collection(source)
    assert shown["json"] == {
        "namespace": "app",
        "partition": "session/1",
        "key": "json",
        "value": {"text": "grüße"},
        "bytes": 19,
        "version": 258,
    }
    assert [shown[key]["value"] for key in ("text", "bytes")] == [None, None]


async def test_commands_are_as_few_as_can_be(server: Servers) -> None:
    names = [f"p{number}" for number in range(8)]
    seen = Commands()
    async with opened(server("mongodb").url, event_listeners=[seen]) as driver:

        async def commands(call: Awaitable[Any], *expected: str) -> Any:
            seen.names.clear()
            result = await call
            assert sorted(seen.names) == sorted(expected)
            return result

        two = ("x", "y")
        assert await commands(driver.commit([create(name) for name in names]), "insert") == [True] * 8
        assert await commands(driver.commit([create(name) for name in names]), "insert") == [False] * 8
        puts = [Write(name, (Put("a", b"", 1),), 2) for name in names]
        assert await commands(driver.commit(puts), "update") == [True] * 8
        assert await commands(driver.commit(puts), "update") == [False] * 8
        check = Write(names[0], (Check("a", 2),), 3)
        assert await commands(driver.commit([check, puts[1], create("new")]), "insert", "update") == [
            True,
            False,
            True,
        ]
        many = [Write(name, (Put("a", b"", 2), *(Put(key, b"", ABSENT) for key in two)), 3) for name in names]
        assert await commands(driver.commit(many), "update", "commitTransaction") == [True] * 8
        removal = Write(names[0], (Delete("x", 3), Delete("y"), Put("a", b"", 3)), 4)
        assert await commands(driver.commit([removal]), "update", "delete", "commitTransaction") == [True]
        deletion = [Write(names[0], (Delete("a", 4),), 5), Write(names[1], (Delete("a"),), 5)]
        assert await commands(driver.commit(deletion), "delete", "delete") == [True, True]
        await commands(driver.get([Key(name, "a") for name in names]), "find")
        await commands(driver.scan(names[2], "", None, limit=2), "find")
        await commands(driver.scan(names[2], "", None, limit=100, reverse=True), "find")
        await commands(driver.partitions(None, 100), "find")
        await commands(driver.purge(names[2], "", None), "find", "delete")


async def test_more_than_one_answer_can_hold_is_read_whole(server: Servers) -> None:
    value = bytes(1 << 20)
    async with opened(server("mongodb").url) as driver:
        for n in range(20):
            assert await driver.commit([create(f"p{n}", value=value, version=n + 1)]) == [True]
        keys = [Key(f"p{n}", "a") for n in range(21)]
        found = await driver.get(keys)
        assert [entry and entry.version for entry in found] == [*range(1, 21), None]


async def test_an_url_names_the_database(server: Servers) -> None:
    url, name = server("mongodb").url, f"new-{uuid.uuid4().hex}"
    new = urlunsplit(urlsplit(url)._replace(path=f"/{name}"))
    async with opened(new) as driver:
        assert await driver.commit([create("p")]) == [True]
    with MongoClient[Any](url) as client:
        assert client[name].list_collection_names() == ["storage"]
        client.drop_database(name)


async def test_refused_members_of_a_transaction_are_sought_out_once(server: Servers) -> None:
    seen = Commands()
    names = [f"p{number}" for number in range(20)]
    async with opened(server("mongodb").url, event_listeners=[seen]) as driver:
        await driver.commit([create(name) for name in names])
        seen.names.clear()
        writes = [
            Write(name, (Put("a", b"", 1 + number % 3 // 2), Put("b", b"", ABSENT)), 2)
            for number, name in enumerate(names)
        ]
        assert await driver.commit(writes) == [number % 3 < 2 for number in range(20)]
        tried = ["update", "abortTransaction", "find", "update", "commitTransaction"]
        assert seen.names == tried


async def test_members_in_the_way_of_others_get_a_transaction_each(server: Servers) -> None:
    """Another transaction holds one partition; the Writes to all others go through meanwhile."""
    async with opened(server("mongodb").url) as driver:
        names = [f"p{number}" for number in range(4)]
        await driver.commit([create(name) for name in names])
        collection = driver._entries
        async with collection.database.client.start_session() as session:
            await session.start_transaction()
            held = {"_id": driver._id("p2", "a"), "p": driver._partition("p2")}
            await collection.update_one(held, {"$set": {"c": 1}}, session=session)
            writes = [Write(name, (Put("a", b"new", 1), Put("b", b"")), 2) for name in names]
            commit = asyncio.create_task(driver.commit(writes))
            others = [Key(name, "b") for name in ("p0", "p1", "p3")]
            for _ in range(500):
                if None not in await driver.get(others):
                    break
                await asyncio.sleep(0.01)
            assert await driver.get([Key("p2", "b"), *others]) == [None, *[Entry("b", b"", 2)] * 3]
            await session.abort_transaction()
        assert await commit == [True] * 4


_KILLED = """
import json, sys, time
from pymongo import MongoClient
from pymongo.driver_info import DriverInfo
url, collection, library, ids = sys.argv[1:]
client = MongoClient(url, driver=DriverInfo(library) if library else None)
session = client.start_session()
session.start_transaction()
for id in json.loads(ids):
    client.get_default_database()[collection].update_one(
        {"_id": id, "p": id.partition("\\0")[0]}, {"$set": {"c": 1}}, upsert=True, session=session
    )
print("begun", flush=True)
time.sleep(60)
"""


async def killed_in_a_transaction(driver: MongoDBDriver, library: str, *keys: Key) -> None:
    """Leave a transaction open that has changed `keys`."""
    ids = json.dumps([driver._id(*key) for key in keys])
    command = (sys.executable, "-c", _KILLED, driver._url, driver._name, library, ids)
    process = await asyncio.create_subprocess_exec(*command, stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert await process.stdout.readline() == b"begun\n"
    process.kill()
    await process.wait()


async def test_what_a_killed_process_left_open_is_ended(own_server: Servers) -> None:
    machine = own_server("mongodb", password=SECRET)
    with MongoClient[Any](machine.url) as client:
        client.app.command("createUser", "app", pwd="app", roles=["readWrite"])
    url = f"mongodb://app:app@127.0.0.1:{machine.port}/app?replicaSet=rs0"
    async with opened(url) as driver:  # nobody special may do that
        await driver.commit([create("p"), create("q")])
        await killed_in_a_transaction(driver, "agent-persistence", Key("p", "a"), Key("q", "b"))
        two_keys = driver.commit([Write("p", (Put("a", b"new", 1), Put("b", b"")), 2)])
        one_key = driver.commit([create("q", "b")])
        assert [*await asyncio.gather(two_keys, one_key)] == [[True], [True]]


async def test_what_another_library_left_open_is_not_ended(
    server: Servers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mongodb, "_ABANDONED", 0.2)
    async with opened(server("mongodb").url, timeout=2.0) as driver:
        await driver.commit([create("p")])
        await killed_in_a_transaction(driver, "", Key("p", "a"))
        with pytest.raises(UnavailableError):
            await driver.commit([Write("p", (Put("a", b"new", 1), Put("b", b"")), 2)])
        await driver._entries.database.client.admin.command("killAllSessions", [])


async def test_checks_keep_two_writers_from_passing_each_other(server: Servers) -> None:
    """Each requires the other's key as it was: both applied would be write skew."""
    async with opened(server("mongodb").url) as first, opened(server("mongodb").url) as second:
        second._namespace = first._namespace
        for number in range(20):
            name = f"p{number}"
            await first.commit([Write(name, (Put("a", b""), Put("b", b"")), 1)])
            results = await asyncio.gather(
                first.commit([Write(name, (Check("a", 1), Put("b", b"", 1)), 2)]),
                second.commit([Write(name, (Check("b", 1), Put("a", b"", 1)), 3)]),
            )
            assert sorted(results) == [[False], [True]]


async def test_racing_puts_that_expect_nothing_all_succeed(server: Servers) -> None:
    async with opened(server("mongodb").url) as driver:
        for number in range(10):
            writes = [Write(f"p{number}", (Put("a", b""),), version) for version in range(1, 9)]
            results = await asyncio.gather(*(driver.commit([write]) for write in writes))
            assert results == [[True]] * 8


async def test_a_server_that_stands_alone_is_refused(own_server: Servers) -> None:
    machine = own_server("mongodb", replica_set=False)
    with pytest.raises(ConfigurationError, match=r"rs\.initiate\(\)"):
        await MongoDBDriver(machine.url).open()


async def test_a_collection_that_must_exist_is_asked_for_and_not_made(server: Servers) -> None:
    name = f"c{uuid.uuid4().hex}"
    driver = MongoDBDriver(server("mongodb").url, collection=name, create=False)
    with pytest.raises(ConfigurationError, match="createCollection"):
        await driver.open()
    async with opened(server("mongodb").url, collection=name):
        pass
    await driver.open()
    await driver.close()
    with MongoClient[Any](server("mongodb").url) as client:
        client.persistence.drop_collection(name)
    assert "shardCollection" in driver.ddl()
    hostile = MongoDBDriver("mongodb://h", collection='x");f("')
    assert '"x\\");f(\\""' in hostile.ddl()


@pytest.mark.parametrize("options", [{"collation": {"locale": "en"}}, {"capped": True, "size": 1 << 20}])
async def test_a_collection_that_sorts_otherwise_or_drops_what_is_old_is_refused(
    server: Servers, options: dict[str, Any]
) -> None:
    name = f"c{uuid.uuid4().hex}"
    with MongoClient[Any](server("mongodb").url) as client:
        client.persistence.create_collection(name, **options)
        try:
            with pytest.raises(ConfigurationError, match="plain collection"):
                await MongoDBDriver(server("mongodb").url, collection=name).open()
        finally:
            client.persistence.drop_collection(name)


async def test_a_wrong_password_is_an_error_of_configuration_and_stays_secret(own_server: Servers) -> None:
    machine = own_server("mongodb", password=SECRET)
    async with opened(machine.url) as driver:
        assert "s3cr" not in repr(driver)
    account = {"host": "127.0.0.1", "port": machine.port, "replicaSet": "rs0"}
    driver = MongoDBDriver(user="persistence", password=SECRET, **account)
    await driver.open()
    await driver.close()
    for driver in (
        MongoDBDriver(machine.url.replace("s3cr", "s3crX")),
        MongoDBDriver(user="persistence", password=SECRET + "X", **account),
        MongoDBDriver(**account),
    ):
        with pytest.raises(ConfigurationError) as caught:
            await driver.open()
        assert "s3cr" not in f"{caught.value!r} {driver!r} {caught.value.__cause__!r}"


@pytest.mark.parametrize(
    "url",
    [
        "mongodb://user:s3cr:t@127.0.0.1",
        "mongodb://user:s3cr/et@127.0.0.1",
        "http://user:s3cret@127.0.0.1",
    ],
)
async def test_a_malformed_url_is_an_error_of_configuration_and_stays_secret(url: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        await MongoDBDriver(url).open()
    assert "s3cr" not in repr(caught.value)
    assert caught.value.__cause__ is None


@pytest.mark.parametrize("mark", ["&", ";"])
def test_what_an_url_says_is_not_said_again(mark: str) -> None:
    driver = MongoDBDriver(f"mongodb://h/?replicaSet=rs0{mark}maxPoolSize=3", pool_size=4)
    assert driver._connect().options.pool_options.max_pool_size == 3


async def test_an_url_says_all_that_the_options_say(server: Servers) -> None:
    address = f"mongodb://127.0.0.1:{server('mongodb').port}"
    driver = from_url(
        f"{address}/other?replicaSet=rs0&namespace=url&collection=c1&maxPoolSize=3&appName=tester"
    )
    await driver.open()
    try:
        await driver.commit([create("p")])
        client = driver._entries.database.client
        assert client.options.pool_options.max_pool_size == 3
        assert await client.other.c1.find_one({"_id": "url/p\0a"}) is not None
        await client.drop_database("other")
    finally:
        await driver.close()
    with pytest.raises(ConfigurationError, match="create"):
        from_url("mongodb://127.0.0.1/?create=perhaps")


async def test_a_client_that_was_passed_in_is_used_and_stays_open(server: Servers) -> None:
    async with AsyncMongoClient[Any](server("mongodb").url) as client:
        driver = MongoDBDriver(client=client, namespace=uuid.uuid4().hex)
        for _ in range(2):
            await driver.open()
            await driver.commit([Write("p", (Put("a", b"\xff\x00"),), 7)])
            assert await driver.get([Key("p", "a")]) == [Entry("a", b"\xff\x00", 7)]
            await driver.close()
        assert await client.admin.command("ping")


async def test_a_document_without_its_version_is_not_read_as_anything(server: Servers) -> None:
    async with opened(server("mongodb").url) as driver:
        await driver.commit([create("p")])
        await driver._entries.update_one({"_id": driver._id("p", "a")}, {"$unset": {"ver": 1}})
        with pytest.raises(CorruptRecordError):
            await driver.get([Key("p", "a")])
        with pytest.raises(CorruptRecordError):
            await driver.scan("p", "", None, limit=1)


async def test_no_error_shows_a_stored_value(server: Servers) -> None:
    async with opened(server("mongodb").url) as driver:
        await driver.commit([create("p", value=b"s3cret")])
        # A validator stands for whatever the server may refuse.
        name = driver._name
        database = driver._entries.database
        await database.command("collMod", name, validator={"never": {"$exists": True}})
        try:
            outcomes = await driver.commit([create("q", value=b"s3cret")])
            assert outcomes == [None]
            with pytest.raises(UnavailableError) as caught:
                await driver.commit([Write("q", (Put("a", b"s3cret"), Put("b", b"s3cret")), 1)])
            assert "s3cret" not in f"{caught.value!r} {caught.value.__cause__!r}"
        finally:
            await database.command("collMod", name, validator={})


@pytest.mark.parametrize("ops", [1, 2])
async def test_a_write_whose_reply_is_lost_is_applied_once(server: Servers, ops: int) -> None:
    """The client asks again with the same transaction number, and is told what became of the first."""
    async with Proxy(server("mongodb").port) as proxy, opened(server("mongodb").url_at(proxy.port)) as driver:
        await driver.commit([create("p", version=1)])
        for number in range(5):
            puts = (Put("a", b"", 1 + number), *(Put("b", b"") for _ in range(ops - 1)))
            proxy.cut_after(replies=0)
            assert await driver.commit([Write("p", puts, 2 + number)]) == [True]


async def test_connections_that_have_long_been_idle_are_not_trusted(
    server: Servers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mongodb, "_IDLE_MS", 20)
    shared = server("mongodb")
    async with Proxy(shared.port) as proxy, opened(shared.url_at(proxy.port)) as driver:
        await asyncio.gather(*(driver.get([Key("p", "a")]) for _ in range(4)))
        assert proxy.connections > 4
        proxy.forget()  # as a firewall does
        await asyncio.sleep(0.05)
        async with asyncio.timeout(1):
            assert await driver.get([Key("p", "a")]) == [None]


async def test_the_same_driver_works_after_the_server_was_killed(own_server: Servers) -> None:
    machine = own_server("mongodb")
    async with opened(machine.url, connect_timeout=0.5, timeout=3) as driver:
        assert await driver.commit([create("p"), Write("q", (Put("a", b""), Put("b", b"")), 1)]) == [True] * 2
        machine.kill()
        with pytest.raises(UnavailableError):
            await driver.get([Key("p", "a")])
        with pytest.raises(UnavailableError):
            await driver.commit([create("r")])
        machine.start()
        for _ in range(100):
            with contextlib.suppress(UnavailableError):
                assert await driver.get([Key("p", "a")]) == [Entry("a", b"v", 1)]
                break
        assert await driver.commit([create("r"), create("p")]) == [True, False]


async def test_a_server_that_hangs_is_given_up_in_time(server: Servers) -> None:
    url = server("mongodb").url_at
    async with Proxy(server("mongodb").port) as proxy, opened(url(proxy.port), timeout=1.0) as driver:
        await driver.commit([create("p")])
        proxy.stall()
        with pytest.raises(UnavailableError):
            await driver.get([Key("p", "a")])
        with pytest.raises(UnavailableError):
            await driver.commit([Write("p", (Put("a", b""), Put("b", b"")), 2)])
        await proxy.resume()


async def test_a_partition_larger_than_a_step_is_purged(server: Servers) -> None:
    async with opened(server("mongodb").url) as driver:
        for part in range(11):
            puts = tuple(Put(f"{part:02}/{number:03}", b"") for number in range(1_000))
            await driver.commit([Write("p", puts, 1)])
        await driver.purge("p", "", "10/990")
        assert len((await driver.scan("p", "", None, limit=100)).entries) == 10
        await driver.purge("p", "", None)
        assert await driver.partitions(None, 10) == ([], None)


async def test_more_is_told_where_names_fill_an_answer(server: Servers) -> None:
    async with opened(server("mongodb").url) as driver:
        for part in range(30):
            puts = tuple(Put(f"{part:02}/{number:03}".ljust(108, "k"), b"") for number in range(1_000))
            assert await driver.commit([Write("p" * 200, puts, part + 1)]) == [True]
        page = await driver.scan("p" * 200, "", None, limit=50_000)
        assert page.more
        rest = await driver.scan("p" * 200, f"{page.entries[-1].key}!", None, limit=1_000)
        assert rest.entries[0].key > page.entries[-1].key
        await driver.purge("p" * 200, "", None)


async def test_partitions_pass_by_a_large_one(server: Servers) -> None:
    seen = Commands()
    async with opened(server("mongodb").url, event_listeners=[seen]) as driver:
        await driver.commit([Write("large", tuple(Put(f"{n:03}", b"") for n in range(900)), 1), create("z")])
        seen.names.clear()
        assert await driver.partitions(None, 2) == (["large"], "large")
        assert await driver.partitions("large", 2) == (["z"], None)
        assert seen.names == ["find", "find"]


def test_it_is_a_driver() -> None:
    assert isinstance(MongoDBDriver(), Driver)


async def test_a_name_that_no_collection_can_have_is_an_error_of_configuration(server: Servers) -> None:
    driver = MongoDBDriver(server("mongodb").url, collection="system.mine")
    with pytest.raises(ConfigurationError, match="system"):
        await driver.open()


@pytest.mark.parametrize("value", [5, None])
async def test_a_value_of_another_type_is_corruption_beside_a_key_that_is_absent(
    server: Servers, value: int | None
) -> None:
    partition = f"p{uuid.uuid4().hex}"
    async with opened(server("mongodb").url) as driver:
        await driver.commit([create(partition)])
        await driver._entries.update_one({"_id": driver._id(partition, "a")}, {"$set": {"v": value}})
        with pytest.raises(CorruptRecordError):
            await driver.get([Key(partition, "a"), Key(partition, "b")])
