"""What is peculiar to Redis and Redis Cluster; test_driver.py has what all drivers promise."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, cast

import pytest
import redis
import servers
from proxy import Proxy
from redis import exceptions
from redis.asyncio import Redis, RedisCluster

from persistence import create_persistence
from persistence.driver import ABSENT, Check, Delete, Driver, Entry, Key, Put, Write
from persistence.drivers._redis_link import _exchange, is_refusal
from persistence.drivers.redis import RedisDriver, from_url
from persistence.errors import ConfigurationError, ConflictError, CorruptRecordError, UnavailableError

Servers = Callable[..., Any]
SECRET = "s3cr:t/p@ss"


@contextlib.asynccontextmanager
async def opened(url: str, **options: Any) -> AsyncIterator[RedisDriver]:
    driver = RedisDriver(url, **{"namespace": uuid.uuid4().hex, **options})
    await driver.open()
    try:
        yield driver
    finally:
        await driver.close()


def create(partition: str, key: str = "a", value: bytes = b"v", version: int = 1) -> Write:
    return Write(partition, (Put(key, value, ABSENT),), version)


async def listed(driver: RedisDriver, limit: int = 1_000) -> set[str]:
    found: set[str] = set()
    page, cursor = await driver.partitions(None, limit)
    while cursor is not None:
        assert len(page) <= limit
        found.update(page)
        page, cursor = await driver.partitions(cursor, limit)
    return found.union(page)


def partitions_on(driver: RedisDriver, client: RedisCluster, node: servers.Redis, count: int) -> list[str]:
    """Return partitions whose entries lie on `node`."""
    found = []
    for number in range(10_000):
        home = client.get_node_from_key(f"{driver._prefix}{number}}}")
        if home is not None and home.port == node.port:
            found.append(str(number))
        if len(found) == count:
            break
    return found


async def eventually(call: Callable[[], Awaitable[Any]]) -> Any:
    """Repeat a call, as the core does, while the server does not answer."""
    for _ in range(200):
        with contextlib.suppress(UnavailableError):
            return await call()
        await asyncio.sleep(0.05)
    return await call()


async def test_an_entry_is_legible_in_redis_cli(server: Servers) -> None:
    async with opened(server("redis").url, prefix="app:1", namespace="legible") as driver:
        await driver.purge("session/1", "", None)
        await driver.commit([create("session/1", "m/1", b'{"text":"hello"}', version=258)])

        command = server("redis").command
        assert command("HGET", "app:1:{legible/session/1}", "m/1") == b'{"text":"hello"}'
        assert command("HGET", "app:1:{legible/session/1}", " m/1") == (258).to_bytes(8, "big")
        assert command("ZRANGE", "app:1:{legible/session/1}:keys", 0, -1) == [b"m/1"]

        await driver.commit([Write("session/1", (Delete("m/1"),), 1)])
        assert command("EXISTS", "app:1:{legible/session/1}", "app:1:{legible/session/1}:keys") == 0


async def test_every_call_is_one_round_trip(server: Servers) -> None:
    names = [f"session/{number}" for number in range(20)]
    async with Proxy(server("redis").port) as proxy, opened(server("redis").url_at(proxy.port)) as driver:
        calls: dict[str, Callable[[], Awaitable[Any]]] = {
            "create": lambda: driver.commit([create(name) for name in names]),
            "refuse": lambda: driver.commit([create(name) for name in names]),
            "conditional": lambda: driver.commit(
                [Write(name, (Put("a", b"", 1), Put("b", b"", ABSENT), Put("c", b"")), 2) for name in names]
            ),
            "check": lambda: driver.commit([Write(names[0], (Check("a", 2), Delete("c", 2)), 3)]),
            "get one": lambda: driver.get([Key(names[0], "a")]),
            "get of one partition": lambda: driver.get([Key(names[0], "a"), Key(names[0], "b")]),
            "get of many": lambda: driver.get([Key(name, "a") for name in names]),
            "scan": lambda: driver.scan(names[0], "", None, limit=1),
            "long scan": lambda: driver.scan(names[0], "", None, limit=1_000, reverse=True),
            "purge": lambda: driver.purge(names[0], "", None),
            "purge of a part": lambda: driver.purge(names[1], "b", "c"),
        }
        for call in calls.values():  # now the server has the scripts
            await call()
        for name, call in calls.items():
            before = proxy.round_trips
            await call()
            assert proxy.round_trips - before == 1, name
        assert proxy.connections == 1


@pytest.mark.parametrize("engine", ["redis", "redis_cluster"])
async def test_scripts_that_the_server_forgot_are_sent_again(server: Servers, engine: str) -> None:
    machine = server(engine)
    nodes = machine.nodes if engine == "redis_cluster" else [machine]
    async with opened(machine.url, cluster=engine == "redis_cluster") as driver:
        names = [f"p{number}" for number in range(12)]
        for node in nodes:
            node.command("SCRIPT FLUSH")
        assert await driver.commit([create(name) for name in names]) == [True] * 12
        for node in nodes:
            node.command("SCRIPT FLUSH")
        assert await driver.get([Key(name, "a") for name in names]) == [Entry("a", b"v", 1)] * 12
        assert (await driver.scan("p1", "", None, limit=5)).entries == [Entry("a", b"v", 1)]
        await driver.purge("p1", "a", "b")
        assert await driver.get([Key("p1", "a")]) == [None]


async def test_neighbouring_versions_are_different(server: Servers) -> None:
    high = (1 << 62) - 1
    async with opened(server("redis").url) as driver:
        await driver.commit([create("p", version=high)])
        assert await driver.commit([Write("p", (Put("a", b"", high - 1),), 5)]) == [False]
        assert await driver.commit([Write("p", (Put("a", b"", high),), 5)]) == [True]


async def test_a_partition_larger_than_a_step_is_purged(server: Servers) -> None:
    async with opened(server("redis").url) as driver:
        for part in range(3):
            puts = tuple(Put(f"{part}/{number:03}", b"") for number in range(1_000))
            await driver.commit([Write("p", puts, 1)])
        await driver.purge("p", "", "2/990")
        assert len((await driver.scan("p", "", None, limit=100)).entries) == 10
        await driver.purge("p", "", None)
        assert await listed(driver) == set()


async def test_an_entry_without_its_version_is_not_read_as_anything(server: Servers) -> None:
    async with opened(server("redis").url, namespace="broken") as driver:
        await driver.commit([create("p", "a"), create("q", "a"), create("r", "a")])
        server("redis").command("HDEL", "agentx:{broken/p}", " a")
        server("redis").command("HDEL", "agentx:{broken/q}", "a")
        server("redis").command("HSET", "agentx:{broken/r}", " a", "1")
        for name in "pqr":
            with pytest.raises(CorruptRecordError, match="a"):
                await driver.get([Key(name, "a")])
            with pytest.raises(CorruptRecordError, match="a"):
                await driver.scan(name, "", None, limit=1)
            await driver.purge(name, "", None)


@pytest.mark.parametrize("limit", [1, 3, 1_000])
async def test_partitions_pass_by_what_is_foreign(server: Servers, limit: int) -> None:
    namespace = uuid.uuid4().hex
    names = {f"p{number}" for number in range(40)}
    async with (
        opened(server("redis").url, namespace=namespace) as driver,
        opened(server("redis").url, namespace=namespace + "x") as other,
        opened(server("redis").url, namespace=namespace, prefix="other") as another,
    ):
        await driver.commit([create(name) for name in names])
        await other.commit([create("foreign")])
        await another.commit([create("foreign")])
        server("redis").command("SET", f"{namespace}:plain", "foreign")
        assert await listed(driver, limit) == names


async def test_a_listing_starts_again_when_the_server_restarted(own_server: Servers) -> None:
    machine = own_server("redis")
    async with opened(machine.url) as driver:
        await driver.commit([create(f"p{number}") for number in range(50)])
        first, cursor = await driver.partitions(None, 20)
        machine.restart()  # its hash tables are now in another order
        rest: list[str] = []
        while cursor is not None:
            page, cursor = await eventually(lambda cursor=cursor: driver.partitions(cursor, 20))  # type: ignore[misc]
            rest += page
        assert set(rest) == {f"p{number}" for number in range(50)} > set(first)


async def test_what_a_restarted_server_has_lost_leaves_no_hole(own_server: Servers) -> None:
    machine = own_server("redis")
    machine.command("CONFIG", "SET", "appendfsync", "everysec")
    async with create_persistence(machine.url) as p:
        for n in range(6):
            await p.sessions.add_message("s", {"n": n})
            await p.streams.append("x", n, n)
            if n == 2:
                machine.command("CONFIG", "SET", "appendonly", "no")
        machine.kill()
        machine.start()
        assert await p.sessions.add_message("s", {"n": 6}) == 4
        assert await p.sessions.get_messages("s") == [{"n": n} for n in (0, 1, 2, 6)]
        with pytest.raises(ConflictError, match="the next index is 3"):
            await p.streams.append("x", 6, 6)
        assert await p.streams.get_parts("x") == [0, 1, 2]


async def test_a_wrong_password_is_an_error_of_configuration_and_stays_secret(own_server: Servers) -> None:
    machine = own_server("redis", password=SECRET)
    async with opened(machine.url) as driver:
        assert "s3cr" not in repr(driver)
    async with opened(f"redis://127.0.0.1:{machine.port}", password=SECRET):
        pass
    for driver in (
        RedisDriver(machine.url.replace("s3cr", "s3crX")),
        RedisDriver(host="127.0.0.1", port=machine.port, user="default", password=SECRET + "X"),
        RedisDriver(host="127.0.0.1", port=machine.port),
    ):
        with pytest.raises(ConfigurationError) as caught:
            await driver.open()
        assert "s3cr" not in f"{caught.value!r} {driver!r} {caught.value.__cause__!r}"


@pytest.mark.parametrize(
    "url",
    [
        "redis://:s3cr/et@127.0.0.1",  # the slash ends the host, and "s3cr" is no port
        "http://:s3cret@127.0.0.1",
        "redis://:s3cret@127.0.0.1?socket_timeout=soon",
        "redis+cluster://:s3cret@127.0.0.1/1",
    ],
)
async def test_a_malformed_url_is_an_error_of_configuration_and_stays_secret(url: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        await RedisDriver(url).open()
    assert "s3cr" not in repr(caught.value)
    assert caught.value.__cause__ is None


async def test_an_unknown_option_is_an_error_of_configuration(server: Servers) -> None:
    with pytest.raises(ConfigurationError, match="socket_timeouts"):
        await RedisDriver(server("redis").url, socket_timeouts=3).open()
    for option in ("credential_provider", "encoding", "retry"):
        with pytest.raises(ConfigurationError):
            await from_url(f"{server('redis').url}?{option}=x").open()
    with pytest.raises(ConfigurationError, match="prefix"):
        RedisDriver(prefix="{}")
    with pytest.raises(ConfigurationError, match="timeout='soon'"):
        from_url("redis://127.0.0.1?timeout=soon")
    with pytest.raises(ConfigurationError, match="DB"):
        await RedisDriver(server("redis").url + "/99999").open()


async def test_an_url_says_all_that_the_options_say(server: Servers) -> None:
    driver = from_url(f"{server('redis').url}/3?namespace=url&prefix=pre&pool_size=2&client_name=tester")
    await driver.open()
    try:
        await driver.commit([create("p")])
        assert await _client(driver).exists("pre:{url/p}")
        assert (await _client(driver).client_info())["db"] == 3
        assert (await _client(driver).client_info())["name"] == "tester"
        await driver.purge("p", "", None)
    finally:
        await driver.close()


async def test_the_database_can_be_named_by_a_keyword_with_and_without_an_url(server: Servers) -> None:
    url = server("redis").url
    address: dict[str, Any] = {"host": "127.0.0.1", "port": int(url.rpartition(":")[2])}
    for where, options in ((None, address), (url, dict[str, Any]())):
        driver = RedisDriver(where, database=3, **options)
        await driver.open()
        try:
            assert (await _client(driver).client_info())["db"] == 3
        finally:
            await driver.close()


async def test_open_warns_of_a_server_that_may_lose_data(
    own_server: Servers, caplog: pytest.LogCaptureFixture
) -> None:
    machine = own_server("redis")

    async def warnings(durability: str = "power", *, may_lose: bool = True, **url: Any) -> str:
        caplog.clear()
        async with opened(url.get("url", machine.url), durability=durability) as driver:
            assert driver.may_lose is may_lose
        assert {record.levelno for record in caplog.records} <= {logging.WARNING}
        assert {record.name for record in caplog.records} <= {"persistence"}
        return caplog.text

    assert not await warnings(may_lose=False)
    machine.command("CONFIG", "SET", "appendfsync", "everysec")
    assert "needs appendfsync always; the server has appendfsync everysec" in await warnings()
    assert not await warnings("process")
    machine.command("CONFIG", "SET", "appendonly", "no")
    assert "set appendonly yes and appendfsync always" in await warnings("process")
    machine.command("CONFIG", "SET", "save", "60 1")
    for fsync in ("everysec", "always"):
        machine.command("CONFIG", "SET", "appendfsync", fsync)
        assert "the server has no AOF; set appendonly yes as well" in await warnings()
        assert not await warnings("process")
    machine.command("CONFIG", "SET", "maxmemory-policy", "allkeys-lru")
    said = await warnings("process")
    assert "maxmemory-policy is allkeys-lru" in said
    assert "set it to noeviction" in said

    machine.command("CONFIG", "SET", "appendonly", "yes")  # whoever may ask knows that nothing is lost
    machine.command("ACL", "SETUSER", "tenant", "on", ">secret", "~*", "+@all", "-config")
    assert "CONFIG is forbidden" in await warnings(url=f"redis://tenant:secret@127.0.0.1:{machine.port}")


async def test_open_warns_of_replicas_that_would_replace_a_primary_which_goes_on_taking_writes(
    own_server: Servers, caplog: pytest.LogCaptureFixture
) -> None:
    primary, replica = own_server("redis"), own_server("redis")
    replica.command("REPLICAOF", "127.0.0.1", primary.port)

    for _ in range(100):
        if primary.command("INFO", "replication")["connected_slaves"]:
            break
        await asyncio.sleep(0.1)
    for least, durability, warned in (0, "power", True), (0, "process", False), (1, "power", False):
        primary.command("CONFIG", "SET", "min-replicas-to-write", least)
        caplog.clear()
        async with opened(primary.url, durability=durability) as driver:
            assert ("set min-replicas-to-write 1" in caplog.text) is warned
            assert driver.may_lose  # by failing over


async def test_a_server_that_its_replicas_have_left_is_asked_for_anew(own_server: Servers) -> None:
    replaced, primary = own_server("redis"), own_server("redis")
    async with Proxy(replaced.port) as proxy, opened(replaced.url_at(proxy.port)) as driver:
        await driver.commit([create("p")])
        proxy.target = primary.port  # what Sentinel says from now on
        replaced.command("CONFIG", "SET", "min-replicas-to-write", 1)
        with pytest.raises(UnavailableError, match="NOREPLICAS"):
            await driver.commit([create("q")])
        assert await driver.commit([create("q")]) == [True]


async def test_a_user_without_rights_is_an_error_of_configuration(own_server: Servers) -> None:
    machine = own_server("redis")
    machine.command("ACL", "SETUSER", "reader", "on", ">secret", "~*", "+@read", "+info", "+config|get")
    async with opened(f"redis://reader:secret@127.0.0.1:{machine.port}") as driver:
        with pytest.raises(ConfigurationError, match="permissions"):
            await driver.commit([create("p")])


async def test_one_server_and_a_cluster_are_not_taken_for_each_other(server: Servers) -> None:
    with pytest.raises(ConfigurationError, match="redis\\+cluster"):
        await RedisDriver(server("redis_cluster").url).open()
    with pytest.raises(ConfigurationError, match="Cluster mode is not enabled"):
        await RedisDriver(server("redis").url, cluster=True).open()


@pytest.mark.parametrize("decode", [False, True])
async def test_a_client_that_was_passed_in_is_used_and_stays_open(server: Servers, decode: bool) -> None:
    namespace = uuid.uuid4().hex
    async with Redis.from_url(server("redis").url, decode_responses=decode) as client:
        driver = RedisDriver(client=client, namespace=namespace)
        for _ in range(2):
            await driver.open()
            await driver.commit([Write("p", (Put("a", b"\xff\x00"),), 7)])
            assert await driver.get([Key("p", "a")]) == [Entry("a", b"\xff\x00", 7)]
            assert (await driver.scan("p", "", None, limit=1)).entries == [Entry("a", b"\xff\x00", 7)]
            assert await listed(driver) == {"p"}
            await driver.close()
        assert await client.ping()


async def test_a_cluster_client_that_was_passed_in_is_used_and_stays_open(server: Servers) -> None:
    async with RedisCluster.from_url(server("redis_cluster").url) as client:
        driver = RedisDriver(client=client, namespace=uuid.uuid4().hex)
        await driver.open()
        assert await driver.commit([create(f"p{number}") for number in range(9)]) == [True] * 9
        await driver.close()
        assert await client.ping()


@pytest.mark.parametrize("given", [False, True])
async def test_a_write_whose_reply_is_lost_is_not_sent_again(server: Servers, given: bool) -> None:
    """A second copy would refuse itself, and an applied write would be reported as refused."""
    async with Proxy(server("redis").port) as proxy, contextlib.AsyncExitStack() as stack:
        url = server("redis").url_at(proxy.port)
        # With a client's own settings redis-py tries eleven times.
        client = await stack.enter_async_context(Redis.from_url(url)) if given else None
        driver = RedisDriver(url, client=client, namespace=uuid.uuid4().hex)
        await driver.open()
        stack.push_async_callback(driver.close)
        await driver.commit([create("p")])
        proxy.cut_after(replies=0)
        with pytest.raises(UnavailableError) as caught:
            await driver.commit([create("p", "b", version=9)])
        assert isinstance(caught.value.__cause__, redis.ConnectionError)
        assert await driver.get([Key("p", "b")]) == [Entry("b", b"v", 9)]


async def test_a_reply_cut_in_the_middle_does_not_reach_another_caller(server: Servers) -> None:
    async with Proxy(server("redis").port) as proxy, opened(server("redis").url_at(proxy.port)) as driver:
        await driver.commit([create("p", value=b"x" * 50_000), create("q", value=b"y")])
        proxy.cut_after(replies=20_000)
        with pytest.raises(UnavailableError):
            await driver.get([Key("p", "a")])
        assert await driver.get([Key("q", "a")]) == [Entry("a", b"y", 1)]


async def test_a_server_that_hangs_is_given_up_in_time(server: Servers) -> None:
    url = server("redis").url_at
    async with Proxy(server("redis").port) as proxy, opened(url(proxy.port), timeout=1) as driver:
        await driver.commit([create("p")])
        proxy.stall()
        with pytest.raises(UnavailableError):
            await driver.get([Key("p", "a")])
        await proxy.resume()
        assert await driver.get([Key("p", "a")]) == [Entry("a", b"v", 1)]


async def test_a_client_without_a_time_out_is_given_up_in_time_too(server: Servers) -> None:
    async with (
        Proxy(server("redis").port) as proxy,
        Redis(port=proxy.port, socket_timeout=None) as client,
        opened("", client=client, timeout=0.3) as driver,
    ):
        await driver.commit([create("p")])
        proxy.stall()
        with pytest.raises(UnavailableError, match="no answer in time"):
            await asyncio.wait_for(driver.get([Key("p", "a")]), 10)
        await proxy.resume()


async def test_a_client_of_few_connections_makes_calls_wait(server: Servers) -> None:
    async with (
        Redis(port=server("redis").port, max_connections=2) as client,
        opened("", client=client) as driver,
    ):
        assert await asyncio.gather(*(driver.get([Key("p", "a")]) for _ in range(20))) == [[None]] * 20


async def test_an_empty_key_is_scanned_like_any_other(server: Servers) -> None:
    async with opened(server("redis").url) as driver:
        await driver.commit([Write("p", (Put("", b"x"), Put("a", b"y")), 1), create("q", "")])
        assert (await driver.scan("p", "", None, limit=9)).entries == [
            Entry("", b"x", 1),
            Entry("a", b"y", 1),
        ]
        assert (await driver.scan("q", "", None, limit=9)).entries == [Entry("", b"v", 1)]


async def test_the_same_driver_works_after_the_server_was_killed(own_server: Servers) -> None:
    machine = own_server("redis")
    async with opened(machine.url) as driver:
        assert await driver.commit([create("p")]) == [True]
        await asyncio.gather(*(driver.scan("p", "", None, limit=1) for _ in range(5)))  # more connections
        machine.kill()
        with pytest.raises(UnavailableError):
            await driver.get([Key("p", "a")])
        with pytest.raises(UnavailableError):
            await driver.commit([create("q")])
        machine.start()
        # Not one of the connections that died with the server is used again.
        pages = await asyncio.gather(*(driver.scan("p", "", None, limit=1) for _ in range(5)))
        assert [page.entries for page in pages] == [[Entry("a", b"v", 1)]] * 5
        assert await driver.commit([create("q")]) == [True]


async def test_no_more_connections_are_made_than_the_pool_may_hold(server: Servers) -> None:
    async with (
        Proxy(server("redis").port) as proxy,
        opened(server("redis").url_at(proxy.port), pool_size=3) as driver,
    ):
        await asyncio.gather(*(driver.scan(f"p{number}", "", None, limit=1) for number in range(100)))
        assert await listed(driver) == set()
        assert proxy.connections == 3


async def test_a_cluster_has_entries_on_every_node(server: Servers) -> None:
    machine = server("redis_cluster")
    names = [f"session/{number}" for number in range(60)]
    async with opened(machine.url, cluster=True) as driver:
        assert await driver.commit([create(name) for name in names]) == [True] * 60
        assert await driver.commit([create(name) for name in names[:30]]) == [False] * 30
        assert await driver.get([Key(name, "a") for name in names]) == [Entry("a", b"v", 1)] * 60
        for node in machine.nodes:
            held = cast("list[bytes]", node.command("KEYS", f"{driver._prefix}*"))
            assert len(held) >= 20
        assert await listed(driver, 7) == set(names)


async def test_what_a_dead_node_has_is_unknown_and_all_else_is_true(own_server: Servers) -> None:
    machine = own_server("redis_cluster")
    for node in machine.nodes:
        node.command("CONFIG", "SET", "cluster-require-full-coverage", "no")
    async with (
        RedisCluster.from_url(machine.url) as client,
        opened(machine.url, cluster=True) as driver,
    ):
        homes = [partitions_on(driver, client, node, 4) for node in machine.nodes]
        names = [name for home in homes for name in home]
        assert await driver.commit([create(name) for name in names]) == [True] * 12

        machine.nodes[1].kill()
        writes = [
            Write(name, (Put("a", b"new", 1 if number % 2 else 5),), 2) for number, name in enumerate(names)
        ]
        outcomes = await driver.commit(writes)
        assert outcomes == [*[False, True] * 2, *[None] * 4, *[False, True] * 2]
        with pytest.raises(UnavailableError):
            await driver.get([Key(homes[1][0], "a")])
        assert await driver.get([Key(homes[0][1], "a")]) == [Entry("a", b"new", 2)]
        assert await driver.commit([create(homes[2][0], "b")]) == [True]
        with pytest.raises(UnavailableError):
            await driver.commit([create(homes[1][0], "b")])

        machine.nodes[1].start()
        again = await eventually(lambda: driver.get([Key(name, "a") for name in homes[1]]))
        assert again == [Entry("a", b"v", 1)] * 4
        assert await driver.commit([create(homes[1][0], "b")]) == [True]


async def test_a_node_that_hangs_delays_no_other_for_longer_than_the_timeout(server: Servers) -> None:
    machine = server("redis_cluster")
    async with (
        RedisCluster.from_url(machine.url) as client,
        opened(machine.url, cluster=True, timeout=0.3) as driver,
    ):
        names = [partitions_on(driver, client, node, 1)[0] for node in machine.nodes]
        machine.nodes[2].pause()
        try:
            assert await driver.commit([create(name) for name in names]) == [True, True, None]
        finally:
            machine.nodes[2].resume()
        entries = await eventually(lambda: driver.get([Key(name, "a") for name in names]))
        assert entries[:2] == [Entry("a", b"v", 1)] * 2  # the third may have come through or not


async def test_a_slot_that_moves_is_followed(own_server: Servers) -> None:
    machine = own_server("redis_cluster")
    source, target, _ = machine.nodes
    async with (
        RedisCluster.from_url(machine.url) as client,
        opened(machine.url, cluster=True) as driver,
    ):
        name = partitions_on(driver, client, source, 1)[0]
        full = f"{driver._prefix}{name}}}"
        slot = client.keyslot(full)
        assert await driver.commit([create(name)]) == [True]

        ids = {node: cast("bytes", node.command("CLUSTER", "MYID")).decode() for node in (source, target)}
        target.command("CLUSTER", "SETSLOT", slot, "IMPORTING", ids[source])
        source.command("CLUSTER", "SETSLOT", slot, "MIGRATING", ids[target])
        source.command("MIGRATE", "127.0.0.1", target.port, "", 0, 5_000, "KEYS", full, f"{full}:keys")
        # The source has the slot, the target what is in it: ASK.
        assert await driver.get([Key(name, "a")]) == [Entry("a", b"v", 1)]
        assert await driver.commit([create(name), create("elsewhere")]) == [False, True]
        assert await driver.commit([Write(name, (Put("a", b"asked", 1),), 2)]) == [True]

        for node in machine.nodes:
            node.command("CLUSTER", "SETSLOT", slot, "NODE", ids[target])
        # The client still believes in the source: MOVED.
        assert await driver.commit([Write(name, (Put("a", b"moved", 2),), 3)]) == [True]
        assert await driver.get([Key(name, "a")]) == [Entry("a", b"moved", 3)]


def test_it_is_a_driver() -> None:
    assert isinstance(RedisDriver(), Driver)


def _client(driver: RedisDriver) -> Redis:
    return cast("Redis", driver._link._client)


async def test_a_server_that_is_loading_refuses_the_command_it_says_so_of_and_no_other() -> None:
    class Loading:
        socket_timeout = 1

        async def connect(self) -> None: ...

        closed = False

        async def disconnect(self) -> None:
            self.closed = True

        async def send_packed_command(self, packet: object) -> None: ...

        async def read_response(self, *, disable_decoding: bool) -> bytes:
            raise exceptions.BusyLoadingError("LOADING Redis is loading the dataset in memory")

    connection = Loading()
    replies = await _exchange(cast("Any", connection), [b"first", b"second", b"third"], 1)
    assert [is_refusal(reply) for reply in replies] == [True, False, False]
    assert connection.closed


@pytest.mark.parametrize(
    ("text", "undone"),
    [
        ("NOREPLICAS Not enough good replicas to write.", True),
        ("ERR Error running script: @user_script: 9: -READONLY You can't write against a read only", True),
        ("ERR user_script:9: Wrong number of args calling Redis command from script", False),
    ],
)
def test_only_what_the_server_says_before_the_first_change_is_a_refusal(text: str, undone: bool) -> None:
    assert is_refusal(exceptions.ResponseError(text)) is undone


@pytest.mark.parametrize("member", [b"\xff", b"a b"])
async def test_a_member_that_is_no_key_of_ours_is_corruption(server: Servers, member: bytes) -> None:
    partition = f"p{uuid.uuid4().hex}"
    async with opened(server("redis").url) as driver:
        await driver.commit([create(partition)])
        client = Redis.from_url(server("redis").url)
        await client.zadd(driver._names(partition)[1], {member: 0})
        await client.aclose()
        with pytest.raises(CorruptRecordError):
            await driver.scan(partition, "", None, limit=9)


async def test_a_foreign_key_that_is_no_text_does_not_end_the_listing(server: Servers) -> None:
    namespace = f"n{uuid.uuid4().hex}"
    async with opened(server("redis").url, namespace=namespace) as driver:
        await driver.commit([create("p")])
        client = Redis.from_url(server("redis").url)
        await client.set(f"agentx:{{{namespace}/".encode() + b"\xff}", "x")
        await client.aclose()
        assert "p" in await listed(driver)


async def test_a_key_of_another_type_is_corruption_and_no_fault_of_others(server: Servers) -> None:
    namespace = f"n{uuid.uuid4().hex}"
    async with create_persistence(RedisDriver(server("redis").url, namespace=namespace)) as p:
        for session in "ab":
            await p.sessions.add_message(session, {"n": 1})
        client = Redis.from_url(server("redis").url)
        await client.delete(f"agentx:{{{namespace}/session/a}}")
        await client.set(f"agentx:{{{namespace}/session/a}}", "x")
        await client.aclose()
        adding: list[Any] = [p.sessions.add_message(of, {"n": 2}) for of in "ab"]
        reading: list[Any] = [p.sessions.get_messages(of) for of in "ab"]
        for calls, expected in (adding, 2), (reading, [{"n": 1}, {"n": 2}]):
            fault, answer = await asyncio.gather(*calls, return_exceptions=True)
            assert isinstance(fault, CorruptRecordError)
            assert fault.partition == "session/a"
            assert answer == expected
        report = await p.repair()
        assert report.corrupt
        assert all("[session/a]" in fault for fault in report.corrupt)
