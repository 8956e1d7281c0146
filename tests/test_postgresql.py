"""What is peculiar to PostgreSQL; test_driver.py has what all drivers promise."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import asyncpg
import pytest
import servers
from proxy import Proxy

from persistence import create_persistence
from persistence.driver import ABSENT, PAGE_BYTES, Check, Delete, Entry, Key, Put, Write
from persistence.drivers.postgresql import PostgreSQLDriver, from_url
from persistence.errors import ConfigurationError, UnavailableError

Servers = Callable[..., Any]
DEADLINE = 10.0


@contextlib.asynccontextmanager
async def opened(url: str, **options: Any) -> AsyncIterator[PostgreSQLDriver]:
    driver = PostgreSQLDriver(url, **{"namespace": uuid.uuid4().hex, **options})
    await driver.open()
    try:
        yield driver
    finally:
        await driver.close()


@contextlib.asynccontextmanager
async def connected(url: str) -> AsyncIterator[Any]:
    connection = await asyncpg.connect(url)
    try:
        yield connection
    finally:
        await connection.close()


@contextlib.asynccontextmanager
async def own_table(url: str) -> AsyncIterator[str]:
    """A name of a table that does not exist yet; whatever bears it afterwards is removed."""
    name = f"t{uuid.uuid4().hex}"
    try:
        yield name
    finally:
        async with connected(url) as connection:
            await connection.execute(f'DROP VIEW IF EXISTS "{name}_view"; DROP TABLE IF EXISTS "{name}"')
            await connection.execute(f'DROP FUNCTION IF EXISTS "{name}_json"')


def superuser(url: str) -> str:
    return url.replace("//persistence:", "//postgres:")


def create(partition: str, *keys: str, value: bytes = b"v", version: int = 1) -> Write:
    return Write(partition, tuple(Put(key, value, ABSENT) for key in keys or ("a",)), version)


async def eventually(call: Callable[[], Awaitable[Any]]) -> Any:
    """Repeat a call, as the core does, while the server does not answer."""
    for _ in range(200):
        with contextlib.suppress(UnavailableError):
            return await call()
        await asyncio.sleep(0.05)
    return await call()


async def until(connection: Any, query: str) -> None:
    """Wait until the query answers true."""
    for _ in range(1_000):
        if await connection.fetchval(query):
            return
        await asyncio.sleep(0.01)
    pytest.fail(f"still not true: {query}")


SOMEBODY_WAITS_FOR_A_LOCK = "SELECT count(*) > 0 FROM pg_locks WHERE NOT granted"


def told(error: BaseException | None) -> str:
    """Return all that a traceback would show of the messages."""
    return "" if error is None else f"{error} {error!r} {told(error.__cause__)} {told(error.__context__)}"


# What is stored, and how it looks in psql.


async def test_the_view_shows_names_and_values_and_survives_any_value(server: Servers) -> None:
    url = server("postgresql").url
    values = {"json": b'{"text": "hello"}', "nul": b'"\\u0000"', "text": b"no json", "bytes": b"\xff\x00"}
    async with (
        own_table(url) as table,
        opened(url, table=table, namespace="app") as driver,
        connected(url) as connection,
    ):
        await driver.commit([Write("session/1", tuple(Put(k, v) for k, v in values.items()), 258)])
        await connection.execute(driver.view_ddl())

        rows = await connection.fetch(f"SELECT * FROM {table}_view ORDER BY key")
        assert {(row["namespace"], row["partition"], row["version"]) for row in rows} == {
            ("app", "session/1", 258)
        }
        assert {row["key"]: row["value"] for row in rows} == {
            "json": '{"text": "hello"}', "nul": None, "text": None, "bytes": None
        }  # fmt: skip
        assert await connection.fetchval(f"SELECT p FROM {table} LIMIT 1") == b"app/session/1"


# Round trips.


async def test_each_call_is_one_round_trip(server: Servers) -> None:
    shared = server("postgresql")
    many = [f"p{n}" for n in range(64)]
    async with Proxy(shared.port) as proxy, opened(shared.url_at(proxy.port)) as driver:

        async def trips(call: Callable[[int], Awaitable[Any]]) -> int:
            await call(1)  # plans are made at the first call
            before = proxy.round_trips
            await call(2)
            return proxy.round_trips - before

        def puts(version: int, expect: int | None) -> list[Write]:
            return [Write(p, tuple(Put(k, b"v", expect) for k in "xyz"), version) for p in many]

        assert await trips(lambda n: driver.commit([create(p, f"k{n}", version=n) for p in many])) == 1
        assert await trips(lambda n: driver.commit([create(p, "k1") for p in many])) == 2  # refused
        assert await trips(lambda n: driver.commit(puts(n, (ABSENT, 1)[n - 1]))) == 1
        assert await trips(lambda n: driver.commit(puts(9, 8))) == 1  # refused
        assert (
            await trips(
                lambda n: driver.commit([Write(p, (Check("x", 2), Delete("k1", 1)), 3) for p in many])
            )
            == 1
        )
        assert await trips(lambda n: driver.get([Key(p, k) for p in many for k in "xyz"])) == 1
        assert await trips(lambda n: driver.get([Key(p, "x") for p in many])) == 1
        assert await trips(lambda n: driver.get([Key("p1", "x")])) == 1
        assert await trips(lambda n: driver.scan("p1", "", None, limit=2)) == 1
        assert await trips(lambda n: driver.scan("p1", "", None, limit=2, reverse=True)) == 1
        assert await trips(lambda n: driver.partitions(None, 100)) == 1
        assert await trips(lambda n: driver.purge("p1", "x", "y")) == 1
        blind = (Delete("none"), Put("x", b"v"))
        assert await trips(lambda n: driver.commit([Write("p2", blind, n)])) == 5


async def test_a_page_that_bytes_end_sends_no_more_than_it_holds(server: Servers) -> None:
    shared = server("postgresql")
    big = [Write("p", (Put(f"{n}", bytes([n]) * (1 << 20)),), 1) for n in range(6)]
    async with Proxy(shared.port) as proxy, opened(shared.url_at(proxy.port)) as driver:
        for write in big:
            await driver.commit([write])
        await driver.scan("none", "", None, limit=1)
        trips, received = proxy.round_trips, proxy.replies
        page = await driver.scan("p", "", None, limit=100)

        assert [entry.key for entry in page.entries] == ["0", "1", "2", "3"]
        assert page.more
        assert proxy.round_trips - trips == 1
        assert proxy.replies - received < PAGE_BYTES + 10_000


async def test_purge_goes_in_steps(server: Servers) -> None:
    shared = server("postgresql")
    async with Proxy(shared.port) as proxy, opened(shared.url_at(proxy.port)) as driver:
        await driver.purge("p", "", None)
        await driver.commit([create("p", *(f"{n:04}" for n in range(1_000)))])
        before = proxy.round_trips
        await driver.purge("p", "", "0900")

        assert proxy.round_trips - before == 4
        assert [entry.key for entry in (await driver.scan("p", "", None, limit=1_000)).entries] == [
            f"{n:04}" for n in range(900, 1_000)
        ]


async def test_every_plan_uses_the_index(server: Servers) -> None:
    url = server("postgresql").url
    async with own_table(url) as table, opened(url, table=table) as driver:
        for n in range(10):
            await driver.commit([create(f"p{n}", *(f"{k:04}" for k in range(1_000)))])
        p, k = driver._name("p1"), b"0001"
        op = [1], [p], [k], [b"v"], [1], [2]
        for statement, arguments in (
            (driver._get_one, (p, k)),
            (driver._get_key, ([p], k)),
            (driver._get, ([p], [k])),
            (driver._scan, (p, k, b"9", 10)),
            (driver._scan_back, (p, k, b"9", 10)),
            (driver._commit, op),
            (driver._purge, (p, k, b"9", 10)),
            (driver._partitions, (p, b"~", 10)),
        ):
            plan = "\n".join(row[0] for row in await driver._fetch(f"EXPLAIN {statement}", *arguments))
            assert f"{table}_pkey" in plan
            assert "Seq Scan" not in plan


# Options, URLs, errors.


def test_an_url_says_what_the_options_say() -> None:
    driver = from_url("postgresql://u:s3cr%2Ft@h/d?table=x&schema=y&pool_size=1&sslmode=require")
    assert repr(driver) == "postgresql_driver('postgresql://u:***@h/d', schema='y', table='x')"
    assert driver.lanes == 1
    assert '"y"."x"' in driver.ddl()
    assert 'CREATE SCHEMA IF NOT EXISTS "y"' in driver.ddl()


@pytest.mark.parametrize(
    "options",
    [
        {"table": 'a"b'},
        {"schema": ""},
        {"namespace": "a/b"},
        {"durability": "none"},
        {"pool_size": 0},
        {"timeout": 0},
    ],
)
def test_an_option_that_cannot_work_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError):
        PostgreSQLDriver("postgresql://h/d", **options)


@pytest.mark.parametrize("place", ["u:pa/ss@h:1/d", "u:pa?ss@h/d", "u:pa#ss@h/d", "u:12/ss@h/d"])
def test_an_url_that_is_not_encoded_is_not_shown(place: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        from_url(f"postgresql://{place}")
    assert "ss" not in told(caught.value).replace("password", "").replace("passwd", "")


@pytest.mark.parametrize("change", ["password", "database", "option", "keyword"])
async def test_what_is_wrong_with_the_connection_is_told_without_the_password(
    server: Servers, change: str
) -> None:
    secret = "n0t=it!"
    url = server("postgresql").url
    right = urlsplit(url)
    wrong = {
        "password": f"postgresql://persistence:{secret}@127.0.0.1:{right.port}/persistence",
        "database": url + f"_none?password={quote(servers.PASSWORD)}",
        "option": url + "?no_such_setting=1",
        "keyword": url,
    }[change]
    options: dict[str, Any] = {"no_such_keyword": 1} if change == "keyword" else {}
    driver = PostgreSQLDriver(wrong, **options)
    with pytest.raises(ConfigurationError) as caught:
        await driver.open()
    seen = told(caught.value) + repr(driver)
    assert secret not in seen
    assert servers.PASSWORD not in seen
    assert quote(servers.PASSWORD, safe="") not in seen


async def test_a_server_that_is_not_there_is_told_at_once() -> None:
    with pytest.raises(UnavailableError):
        await PostgreSQLDriver(f"postgresql://u:x@127.0.0.1:{servers.free_port()}/d").open()


# Creating the table.


async def test_without_create_the_missing_table_is_named_with_its_statement(server: Servers) -> None:
    url = server("postgresql").url
    async with own_table(url) as table, connected(url) as connection:
        driver = PostgreSQLDriver(url, table=table, create=False)
        with pytest.raises(ConfigurationError, match=table) as caught:
            await driver.open()
        assert driver.ddl() in str(caught.value)

        await connection.execute(driver.ddl())
        await driver.open()
        assert await driver.commit([create("p")]) == [True]
        await driver.close()


async def test_a_role_without_the_right_to_create_is_told_what_to_run(server: Servers) -> None:
    url = server("postgresql").url
    role = f"r{uuid.uuid4().hex}"
    theirs = url.replace("//persistence:", f"//{role}:")
    async with own_table(url) as table, connected(superuser(url)) as connection:
        await connection.execute(f"CREATE ROLE {role} LOGIN PASSWORD '{servers.PASSWORD}'")
        try:
            driver = PostgreSQLDriver(theirs, table=table)
            with pytest.raises(ConfigurationError) as caught:
                await driver.open()
            assert driver.ddl() in str(caught.value)

            await connection.execute(driver.ddl())
            with pytest.raises(ConfigurationError, match="permission denied"):
                await driver.open()
            await connection.execute(f"GRANT SELECT, INSERT, UPDATE, DELETE ON {table} TO {role}")
            await driver.open()
            assert await driver.commit([create("p")]) == [True]
            await driver.close()
        finally:
            await connection.execute(f"DROP TABLE IF EXISTS {table}; DROP ROLE {role}")


async def test_a_table_of_another_shape_is_refused(server: Servers) -> None:
    url = server("postgresql").url
    async with own_table(url) as table, connected(url) as connection:
        await connection.execute(f"CREATE TABLE {table} (p text, k text)")
        with pytest.raises(ConfigurationError):
            await PostgreSQLDriver(url, table=table).open()


OPEN = """
import asyncio, sys
from persistence.drivers.postgresql import PostgreSQLDriver
driver = PostgreSQLDriver(sys.argv[1], schema=sys.argv[2], table="t")
print("ready", flush=True)
sys.stdin.readline()
asyncio.run(driver.open())
"""


async def test_eight_processes_open_an_empty_database_at_once(server: Servers) -> None:
    url = server("postgresql").url
    schema = f"s{uuid.uuid4().hex}"
    pipe = asyncio.subprocess.PIPE
    children = [
        await asyncio.create_subprocess_exec(sys.executable, "-c", OPEN, url, schema, stdin=pipe, stdout=pipe)
        for _ in range(8)
    ]
    try:
        for child in children:
            assert child.stdout is not None
            assert await child.stdout.readline() == b"ready\n"
        await asyncio.gather(*(child.communicate(b"\n") for child in children))
        assert [child.returncode for child in children] == [0] * 8
    finally:
        async with connected(url) as connection:
            await connection.execute(f"DROP SCHEMA IF EXISTS {schema} CASCADE")


# Durability.


@pytest.mark.parametrize(("durability", "setting"), [("power", "on"), ("process", "off")])
async def test_durability_is_set_in_each_session(server: Servers, durability: str, setting: str) -> None:
    url = server("postgresql").url + "?synchronous_commit=" + ("off" if setting == "on" else "on")
    async with opened(url, durability=durability) as driver:
        assert (await driver._fetch("SHOW synchronous_commit"))[0][0] == setting


async def test_a_stronger_setting_of_the_server_stays(server: Servers) -> None:
    async with opened(server("postgresql").url + "?synchronous_commit=remote_apply") as driver:
        assert (await driver._fetch("SHOW synchronous_commit"))[0][0] == "remote_apply"


async def test_a_server_that_does_not_sync_is_told(
    own_server: Servers, caplog: pytest.LogCaptureFixture
) -> None:
    url = own_server("postgresql").url
    async with opened(url):
        assert not caplog.records
    async with connected(superuser(url)) as connection:
        await connection.execute("ALTER SYSTEM SET fsync = off")
        await connection.execute("SELECT pg_reload_conf()")
        await until(connection, "SELECT current_setting('fsync') = 'off'")
    async with opened(url, durability="process"):
        assert not caplog.records
    async with opened(url):
        assert [record.name for record in caplog.records] == ["persistence"]
        assert "fsync" in caplog.text


# Poolers, and clients passed in.


async def test_without_prepared_statements_sessions_are_left_alone(
    server: Servers, caplog: pytest.LogCaptureFixture
) -> None:
    url = server("postgresql").url + "?synchronous_commit=off"
    async with opened(url, statement_cache_size=0) as driver:
        assert "synchronous_commit = on" in caplog.text
        assert (await driver._fetch("SHOW synchronous_commit"))[0][0] == "off"
        assert (await driver._fetch("SHOW plan_cache_mode"))[0][0] == "auto"
        assert await driver.commit([create("p", "a", "b")]) == [True]
        assert await driver.commit([Write("p", (Delete("none"), Put("a", b"w", 1)), 2)]) == [True]
        assert await driver.get([Key("p", "a")]) == [Entry("a", b"w", 2)]


async def test_a_pooler_in_between_is_told(
    server: Servers, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    # A pooler answers for many backends, so the process it names is none of them.
    monkeypatch.setattr(asyncpg.Connection, "get_server_pid", lambda connection: 1)
    async with opened(server("postgresql").url) as driver:
        assert "statement_cache_size=0" in caplog.text
        assert (await driver._fetch("SHOW plan_cache_mode"))[0][0] == "auto"  # others share the session
    caplog.clear()
    async with opened(server("postgresql").url, statement_cache_size=0):
        assert not caplog.records


async def test_a_pool_passed_in_is_used_and_not_closed(server: Servers) -> None:
    url = server("postgresql").url
    async with asyncpg.create_pool(url, min_size=1, max_size=2) as pool:
        async with opened(url, client=pool) as driver:
            assert await driver.commit([create("p", "a", "b")]) == [True]
            assert len(await asyncio.gather(*(driver.get([Key("p", "a")]) for _ in range(8)))) == 8
        assert await pool.fetchval("SHOW plan_cache_mode") == "auto"
        assert await pool.fetchval("SELECT 1") == 1


async def test_a_connection_passed_in_is_used_by_one_call_at_a_time_and_not_closed(server: Servers) -> None:
    async with connected(server("postgresql").url) as connection:
        async with opened("", client=connection) as driver:
            assert await driver.commit([create("p", "a", "b")]) == [True]
            assert len(await asyncio.gather(*(driver.get([Key("p", "a")]) for _ in range(8)))) == 8
        assert await connection.fetchval("SELECT 1") == 1

        async with opened("", client=connection) as driver:
            await connection.close()
            with pytest.raises(UnavailableError):
                await driver.get([Key("p", "a")])


async def test_a_connection_passed_in_is_not_left_in_a_transaction_by_a_call_that_ran_out_of_time(
    server: Servers, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, url_at, namespace = server("postgresql").url, server("postgresql").url_at, uuid.uuid4().hex
    async with (
        Proxy(server("postgresql").port) as proxy,
        connected(url_at(proxy.port)) as connection,
        opened("", client=connection, timeout=0.5, namespace=namespace) as driver,
        opened(url, namespace=namespace) as other,
    ):
        assert await driver.commit([create("p")]) == [True]
        applied = driver._apply

        async def stalled(connection: Any, columns: Any) -> Any:
            if connection.is_in_transaction():
                proxy.stall()
            return await applied(connection, columns)

        monkeypatch.setattr(driver, "_apply", stalled)
        with pytest.raises(UnavailableError):
            await driver.commit([Write("p", (Put("a", b"new"), Delete("absent")), 2)])
        monkeypatch.undo()
        await proxy.resume()
        assert await eventually(lambda: driver.commit([create("q")])) == [True]
        assert await other.get([Key("q", "a")]) == [Entry("a", b"v", 1)]
        assert not connection.is_in_transaction()


# Races that the conformance suite cannot force.


async def test_a_create_that_loses_to_an_uncommitted_row_is_refused_whole(server: Servers) -> None:
    url = server("postgresql").url
    async with opened(url, namespace="race") as driver, connected(url) as other:
        await driver.purge("p", "", None)
        await driver.purge("q", "", None)
        async with other.transaction():
            await other.execute("INSERT INTO persistence VALUES ('race/p', 'b', 'theirs', 7)")
            ours = asyncio.create_task(driver.commit([create("p", "a", "b"), create("q", "a", "b")]))
            await until(other, SOMEBODY_WAITS_FOR_A_LOCK)

        assert await ours == [False, True]
        assert (await driver.scan("p", "", None, limit=9)).entries == [Entry("b", b"theirs", 7)]
        assert len((await driver.scan("q", "", None, limit=9)).entries) == 2


async def test_a_deadlock_is_resolved_within_the_driver(server: Servers) -> None:
    url = server("postgresql").url
    async with opened(url, namespace="deadlock") as driver, connected(superuser(url)) as other:
        await driver.purge("p", "", None)
        await driver.commit([create("p", "a", "b")])
        lock = "SELECT 1 FROM persistence WHERE p = 'deadlock/p' AND k = $1 FOR UPDATE"
        await other.execute("SET deadlock_timeout = '1min'")  # so that the driver is the victim
        async with other.transaction():
            await other.execute(lock, b"b")
            ours = asyncio.create_task(driver.commit([Write("p", (Put("a", b"w", 1), Put("b", b"w", 1)), 2)]))
            await until(other, SOMEBODY_WAITS_FOR_A_LOCK)
            await other.execute(lock, b"a")

        assert await ours == [True]
        assert await driver.get([Key("p", "a"), Key("p", "b")]) == [Entry("a", b"w", 2), Entry("b", b"w", 2)]


async def test_a_lock_held_too_long_ends_in_an_error_and_no_change(server: Servers) -> None:
    url = server("postgresql").url
    async with opened(url, namespace="locked", timeout=0.2) as driver, connected(url) as other:
        await driver.commit([Write("p", (Put("a", b"v"),), 1)])
        async with other.transaction():
            await other.execute("SELECT 1 FROM persistence WHERE p = 'locked/p' FOR UPDATE")
            with pytest.raises(UnavailableError) as caught:
                await driver.commit([Write("p", (Put("a", b"w"),), 2)])
        assert caught.value.unapplied
        assert await driver.get([Key("p", "a")]) == [Entry("a", b"v", 1)]


# Connections and servers that die.


async def test_connections_that_the_server_ended_are_replaced(server: Servers) -> None:
    url = server("postgresql").url
    name = uuid.uuid4().hex
    async with opened(f"{url}?application_name={name}") as driver, connected(url) as other:

        async def end_all() -> None:
            await other.fetch(
                "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE application_name = $1",
                name,
            )

        await driver.commit([create("p")])
        await asyncio.gather(*(driver.get([Key("p", "a")]) for _ in range(8)))
        await end_all()
        await asyncio.sleep(0)  # the loop reads the farewell
        assert await driver.get([Key("p", "a")]) == [Entry("a", b"v", 1)]

        async with other.transaction():
            await other.execute("LOCK persistence IN ACCESS EXCLUSIVE MODE")
            reading = asyncio.create_task(driver.get([Key("p", "a")]))
            await until(other, SOMEBODY_WAITS_FOR_A_LOCK)
            await end_all()
            with pytest.raises(UnavailableError):
                await reading
        assert await driver.get([Key("p", "a")]) == [Entry("a", b"v", 1)]


async def test_a_write_whose_reply_is_lost_is_unknown_and_not_sent_again(server: Servers) -> None:
    shared = server("postgresql")
    async with Proxy(shared.port) as proxy, opened(shared.url_at(proxy.port)) as driver:
        await driver.commit([create("p", "a", version=1)])
        sent = proxy.requests
        proxy.cut_after(replies=0)
        with pytest.raises(UnavailableError):
            await driver.commit([create("p", "b", version=2)])
        assert proxy.requests - sent < 500

        # It was applied; sent twice it would have been refused.
        assert await driver.get([Key("p", "b")]) == [Entry("b", b"v", 2)]


async def test_a_network_that_hangs_is_an_error_in_time_and_leaves_nothing_half_read(server: Servers) -> None:
    shared = server("postgresql")
    async with Proxy(shared.port) as proxy, opened(shared.url_at(proxy.port), timeout=0.1) as driver:
        await driver.commit([create("p", "a"), create("q", "b")])
        proxy.stall()
        async with asyncio.timeout(DEADLINE):
            results = await asyncio.gather(
                *(driver.get([Key("p", "a")]) for _ in range(6)), return_exceptions=True
            )
        assert {type(result) for result in results} == {UnavailableError}

        await proxy.resume()
        assert await driver.get([Key("q", "b")]) == [Entry("b", b"v", 1)]
        assert await driver.get([Key("p", "a")]) == [Entry("a", b"v", 1)]


async def test_a_connection_that_hangs_after_the_login_is_an_error_in_time(
    server: Servers, monkeypatch: pytest.MonkeyPatch
) -> None:
    connect = asyncpg.connect
    shared = server("postgresql")
    async with Proxy(shared.port) as proxy:

        async def log_in_and_hang(**options: Any) -> Any:
            connection = await connect(**options)
            proxy.stall()
            return connection

        monkeypatch.setattr(asyncpg, "connect", log_in_and_hang)
        driver = PostgreSQLDriver(shared.url_at(proxy.port), timeout=0.1)
        async with asyncio.timeout(DEADLINE):
            with pytest.raises(UnavailableError):
                await driver.open()


async def test_idle_connections_that_a_firewall_forgot_cost_one_time_out_and_not_one_each(
    server: Servers,
) -> None:
    shared = server("postgresql")
    async with Proxy(shared.port) as proxy, opened(shared.url_at(proxy.port), timeout=0.1) as driver:
        await asyncio.gather(*(driver.get([Key("p", "a")]) for _ in range(4)))
        assert proxy.connections > 2
        proxy.forget()
        with pytest.raises(UnavailableError):
            await driver.get([Key("p", "a")])
        assert await driver.get([Key("p", "a")]) == [None]


async def test_a_server_that_refuses_to_write_has_written_nothing(server: Servers) -> None:
    url = server("postgresql").url
    async with opened(f"{url}?default_transaction_read_only=on") as driver:
        with pytest.raises(UnavailableError, match="read-only") as caught:
            await driver.commit([create("p")])
    assert caught.value.unapplied


@pytest.mark.parametrize("fault", ["disk_full", "deadlock_detected"])
async def test_a_server_that_undoes_a_write_each_time_has_written_nothing(
    server: Servers, fault: str
) -> None:
    url = server("postgresql").url
    async with (
        own_table(url) as name,
        opened(url, table=name, timeout=0.2) as driver,
        connected(url) as other,
        asyncio.timeout(DEADLINE),
    ):
        await other.execute(
            f"CREATE FUNCTION {name}_json() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RAISE {fault}; END';"
            f"CREATE TRIGGER fault BEFORE INSERT ON {name} FOR EACH ROW EXECUTE FUNCTION {name}_json()"
        )
        with pytest.raises(UnavailableError, match=fault) as caught:
            await driver.commit([create("p")])
    assert caught.value.unapplied


async def test_a_connection_that_confuses_its_client_is_unavailable_and_replaced(
    server: Servers, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def lose(*_: Any) -> None:
        raise asyncpg.InternalClientError("got result for unknown protocol state 3")

    async with opened(server("postgresql").url) as driver:
        with monkeypatch.context() as patch:
            patch.setattr(asyncpg.Connection, "fetch", lose)
            with pytest.raises(UnavailableError, match="unknown protocol state") as caught:
                await driver.get([Key("p", "a")])
        assert not caught.value.unapplied
        assert await driver.get([Key("p", "a")]) == [None]


async def test_a_restart_of_the_server_costs_a_delay(own_server: Servers) -> None:
    own = own_server("postgresql")
    async with opened(own.url) as driver:
        assert await driver.commit([create("p")]) == [True]
        own.stop()
        with pytest.raises(UnavailableError):
            await driver.get([Key("p", "a")])
        own.start()
        assert await eventually(lambda: driver.get([Key("p", "a")])) == [Entry("a", b"v", 1)]
        assert await driver.commit([create("q")]) == [True]


async def test_what_a_restarted_server_has_lost_leaves_no_hole(own_server: Servers) -> None:
    own = own_server("postgresql")
    driver = PostgreSQLDriver(own.url, durability="process")
    async with create_persistence(driver) as p:
        assert driver.may_lose
        for of in range(3):
            for n in range(30):
                await p.sessions.add_message(f"s{of}", {"n": n})
            own.kill()
            own.start()
            last = await p.sessions.add_message(f"s{of}", {"n": 30})
            found = await p.sessions.get_messages(f"s{of}")
            assert found == [*({"n": n} for n in range(last - 1)), {"n": 30}]


async def test_a_server_with_a_standby_may_lose_what_that_has_not_got_yet(
    own_server: Servers, tmp_path: Path
) -> None:
    own = own_server("postgresql")
    async with opened(own.url) as driver:
        assert not driver.may_lose
    source = f"host=127.0.0.1 port={own.port} user=postgres password='{servers.PASSWORD}'"
    receive = own._bin() / "pg_receivewal"  # it asks for the log, as a standby does
    standby = await asyncio.create_subprocess_exec(receive, "-D", tmp_path, "-d", source, "--no-loop")
    try:

        async def followed() -> bool:
            async with opened(own.url) as driver:
                if not driver.may_lose:
                    raise UnavailableError("not yet")
                return driver.may_lose

        assert await eventually(followed)
    finally:
        standby.terminate()
        await standby.wait()


async def test_a_commit_under_cancellation_leaves_no_connection_behind(server: Servers) -> None:
    async with opened(server("postgresql").url, pool_size=1) as driver:
        for delay in (0, 0.0001, 0.0005, 0.001):
            task = asyncio.create_task(driver.commit([Write("p", (Put("a", b"v"), Put("b", b"v")), 1)]))
            await asyncio.sleep(delay)
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
            page = await driver.scan("p", "", None, limit=9)
            assert [entry.key for entry in page.entries] in ([], ["a", "b"])


async def test_deletes_of_absent_keys_among_other_ops_do_not_deadlock(server: Servers) -> None:
    url = server("postgresql").url
    deletes = (Put("a", b""), Delete("b"), Put("c", b""), Delete("absent"))
    puts = (Put("a", b""), Put("b", b""), Put("c", b""))
    async with opened(url, pool_size=8) as driver, asyncio.timeout(DEADLINE):

        async def write(ops: tuple[Put | Delete, ...]) -> None:
            for version in range(1, 40):
                assert await driver.commit([Write("p", ops, version)]) == [True]

        await asyncio.gather(*(write(ops) for ops in (deletes, puts) * 4))


async def test_deletes_and_puts_of_absent_keys_do_not_deadlock(server: Servers) -> None:
    shapes = ((Put("a", b""), Delete("b")), (Put("a", b""), Put("b", b"")), (Delete("a"), Delete("b")))
    async with opened(server("postgresql").url, pool_size=6) as driver, asyncio.timeout(DEADLINE):

        async def write(ops: tuple[Put | Delete, ...]) -> None:
            for version in range(1, 40):
                assert await driver.commit([Write("p", ops, version)]) == [True]

        await asyncio.gather(*(write(ops) for ops in shapes * 2))


async def test_a_connection_lost_in_a_transaction_is_told_as_such(server: Servers) -> None:
    async with (
        Proxy(server("postgresql").port) as proxy,
        opened(server("postgresql").url_at(proxy.port), pool_size=1) as driver,
    ):
        write = Write("p", (Put("a", b""), Delete("absent")), 1)
        assert await driver.commit([write]) == [True]
        sent = proxy.requests
        assert await driver.commit([write]) == [True]
        proxy.cut_after(requests=proxy.requests - sent - 20)  # at the COMMIT
        with pytest.raises(UnavailableError, match="connection was closed"):
            await driver.commit([write])


async def test_a_setting_that_no_session_can_change_is_an_error_of_configuration(server: Servers) -> None:
    with pytest.raises(ConfigurationError, match='"ssl" cannot be changed'):
        await from_url(f"{server('postgresql').url}?ssl=true").open()
