"""What is peculiar to MySQL and MariaDB; test_driver.py has what all drivers promise."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import sys
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from importlib import import_module
from pathlib import Path
from ssl import create_default_context
from types import ModuleType
from typing import Any
from urllib.parse import quote, unquote, urlsplit

import pytest
import servers
from certificates import make_certificates
from proxy import Proxy

from persistence.driver import ABSENT, PAGE_BYTES, Check, Delete, Entry, Key, Put, Write
from persistence.drivers import mysql
from persistence.errors import ConfigurationError, PersistenceError, UnavailableError

Servers = Callable[..., Any]
DEADLINE = 10.0
CLIENTS = [name for name in ("aiomysql", "asyncmy") if importlib.util.find_spec(name)]


@pytest.fixture(scope="module", params=CLIENTS)
def on(request: pytest.FixtureRequest) -> ModuleType:
    """The driver's module, as it is where this client library is the one installed."""
    if mysql.client_library.__name__ == request.param:
        return mysql
    spec = importlib.util.spec_from_file_location(f"mysql_on_{request.param}", mysql.__file__)
    if spec is None or spec.loader is None:
        pytest.fail("the driver's file cannot be loaded twice")
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "asyncmy", None)
        spec.loader.exec_module(module)
    return module


@contextlib.asynccontextmanager
async def opened(on: ModuleType, url: str | None, **options: Any) -> AsyncIterator[Any]:
    driver = on.MySQLDriver(url, **{"namespace": uuid.uuid4().hex, **options})
    await driver.open()
    try:
        yield driver
    finally:
        await driver.close()


class Session:
    """A connection of the test's own."""

    def __init__(self, connection: Any) -> None:
        self._connection = connection

    async def ask(self, statement: str) -> Any:
        cursor = import_module(f"{mysql.client_library.__name__}.cursors").Cursor(self._connection)
        await cursor.execute(statement)
        return await cursor.fetchall()


@contextlib.asynccontextmanager
async def connected(url: str, *, root: bool = False) -> AsyncIterator[Session]:
    parts = urlsplit(url)
    account = ("root", "") if root else (parts.username, unquote(parts.password or ""))
    connection = await mysql.client_library.connect(
        host=parts.hostname,
        port=parts.port,
        user=account[0],
        password=account[1],
        db=parts.path[1:],
        charset="utf8mb4",
        autocommit=True,
    )
    try:
        session = Session(connection)
        await session.ask("SET sql_notes = 0")  # aiomysql makes a Python warning of each note
        yield session
    finally:
        connection.close()


@contextlib.asynccontextmanager
async def own_table(url: str) -> AsyncIterator[str]:
    """A name of a table that does not exist yet; whatever bears it afterwards is removed."""
    name = f"t{uuid.uuid4().hex}"
    try:
        yield name
    finally:
        async with connected(url) as session:
            await session.ask(f"DROP VIEW IF EXISTS {name}_view")
            await session.ask(f"DROP TABLE IF EXISTS {name}")


def create(partition: str, *keys: str, value: bytes = b"v", version: int = 1) -> Write:
    return Write(partition, tuple(Put(key, value, ABSENT) for key in keys or ("a",)), version)


async def eventually(call: Callable[[], Awaitable[Any]]) -> Any:
    """Repeat a call, as the core does, while the server does not answer."""
    for _ in range(200):
        with contextlib.suppress(UnavailableError):
            return await call()
        await asyncio.sleep(0.05)
    return await call()


async def until_somebody_waits_for_a_lock(session: Session) -> None:
    for _ in range(50):
        await asyncio.sleep(0.11)  # the server answers from a cache of 0.1 seconds, which reading keeps alive
        waits = "SELECT COUNT(*) FROM information_schema.innodb_trx WHERE trx_state = 'LOCK WAIT'"
        if (await session.ask(waits))[0][0]:
            return
    pytest.fail("nobody waits for a lock")


def told(error: BaseException | None) -> str:
    """Return all that a traceback would show of the messages."""
    return "" if error is None else f"{error} {error!r} {told(error.__cause__)} {told(error.__context__)}"


# What is stored, and how it looks in a client.


async def test_the_view_shows_names_and_values_and_survives_any_value(
    on: ModuleType, server: Servers
) -> None:
    url = server("mysql").url
    values = {"json": b'{"text": "hello"}', "text": b"no json", "bytes": b"\xff\x00"}
    async with own_table(url) as table, opened(on, url, table=table, namespace="app") as driver:
        await driver.commit([Write("session/1", tuple(Put(k, v) for k, v in values.items()), 258)])
        async with connected(url) as session:
            await session.ask(driver.view_ddl())
            await session.ask("SET SESSION sql_mode = ''")

            rows = await session.ask(f"SELECT * FROM {table}_view WHERE key_name = 'json'")
            assert list(rows) == [("app", "session/1", "json", '{"text": "hello"}', 17, 258)]
            shown = await session.ask(f"SELECT COUNT(*), COUNT(value) FROM {table}_view")
            assert list(shown) == [(3, 1)]
            stored = await session.ask(f"SELECT p, k FROM {table} WHERE k = 'text'")
            assert list(stored) == [(b"app/session/1", b"text")]


# Round trips.


async def test_the_round_trips_of_each_call(on: ModuleType, server: Servers) -> None:
    shared = server("mysql")
    many = [f"p{n}" for n in range(64)]
    async with Proxy(shared.port) as proxy, opened(on, shared.url_at(proxy.port)) as driver:

        async def trips(call: Awaitable[Any]) -> int:
            before = proxy.round_trips
            await call
            return proxy.round_trips - before

        def puts(version: int, expect: int | None) -> list[Write]:
            return [Write(p, tuple(Put(k, b"v", expect) for k in "xyz"), version) for p in many]

        await driver.get([Key("p", "a")])
        assert await trips(driver.commit([create(p, "k") for p in many])) == 1
        assert await trips(driver.commit(puts(1, ABSENT))) == 1
        assert await trips(driver.commit(puts(2, 1))) == 2
        assert await trips(driver.commit(puts(3, 1))) == 2  # refused
        assert await trips(driver.commit(puts(4, None))) == 1
        assert await trips(driver.commit([Write(p, (Check("x", 4), Delete("k", 1)), 5) for p in many])) == 2
        assert await trips(driver.commit([Write("p2", (Delete("none"), Put("x", b"v")), 6)])) == 1
        some = (Put("x", b"w", 6), Put("new", b"w", ABSENT), Put("a", b"w"), Delete("z", 4), Check("y", 4))
        assert await trips(driver.commit([Write("p2", some, 7)])) == 1
        assert await trips(driver.commit([Write("p2", some[:2], 8)])) == 2  # refused
        assert await trips(driver.get([Key(p, k) for p in many for k in "xyz"])) == 1
        assert await trips(driver.get([Key(p, "x") for p in many])) == 1
        assert await trips(driver.scan("p1", "", None, limit=2)) == 1
        assert await trips(driver.scan("p1", "", None, limit=2, reverse=True)) == 1
        assert await trips(driver.partitions(None, 100)) == 1


async def test_a_page_that_bytes_end_takes_two_round_trips_and_sends_no_more_than_it_holds(
    on: ModuleType, server: Servers
) -> None:
    shared = server("mysql")
    async with Proxy(shared.port) as proxy, opened(on, shared.url_at(proxy.port)) as driver:
        for n in range(6):
            await driver.commit([Write("p", (Put(f"{n}", bytes([n]) * (1 << 20)),), 1)])
        for reverse, keys in (False, ["0", "1", "2", "3"]), (True, ["5", "4", "3", "2"]):
            trips, received = proxy.round_trips, proxy.replies
            page = await driver.scan("p", "", None, limit=100, reverse=reverse)

            assert [entry.key for entry in page.entries] == keys
            assert page.more
            assert proxy.round_trips - trips == 2
            assert proxy.replies - received < PAGE_BYTES + 10_000


async def test_purge_goes_in_steps(on: ModuleType, server: Servers) -> None:
    shared = server("mysql")
    async with Proxy(shared.port) as proxy, opened(on, shared.url_at(proxy.port)) as driver:
        await driver.commit([create("p", *(f"{n:04}" for n in range(1_000)))])
        before = proxy.round_trips
        await driver.purge("p", "", "0900")

        assert proxy.round_trips - before == 2 * 4
        assert [entry.key for entry in (await driver.scan("p", "", None, limit=1_000)).entries] == [
            f"{n:04}" for n in range(900, 1_000)
        ]


async def test_every_plan_uses_the_index(on: ModuleType, server: Servers) -> None:
    url = server("mysql").url
    async with own_table(url) as table, opened(on, url, table=table, namespace="n") as driver:
        for n in range(10):
            await driver.commit([create(f"p{n}", *(f"{k:04}" for k in range(1_000)))])
        names = {"table": table, "range": on._range(b"n/p1", b"0001", b"9"), "step": 100}
        keys = on._keys([(b"n/p1", b"0001"), (b"n/p2", b"0002")])
        scan = {
            **names,
            "p": on._hex(b"n/p1"),
            "order": "DESC",
            "limit": 9,
            "beyond": 10,
            "page_bytes": PAGE_BYTES,
        }
        for statement in (
            on._GET.format(table=table, keys=keys),
            on._GET_KEY.format(table=table, partitions="x'6e2f7031',x'6e2f7032'", k="x'30303031'"),
            on._LOCK.format(table=table, keys=keys),
            on._DELETE.format(table=table, keys=keys),
            on._SCAN.format(**scan, fits=on._ONE_FITS),
            on._SCAN.format(**scan, fits=on._ALL_FIT.format(**scan)),
            on._SCAN_CUT.format(**scan),
            on._PURGE_END.format(**names),
            on._PURGE.format(**names),
            on._PARTITIONS.format(table=table, first="x'6e2f'", last="x'6e30'", limit=9),
            on._GET_ONE.format(table=table, p=on._hex(b"n/p1"), k=on._hex(b"0001")),
            on._EXPECT.format(
                table=table,
                expected=" OR ".join(f"(p = x'6e2f7031' AND k = x'3030303{n}' AND ver = 1)" for n in (1, 2)),
            ),
        ):
            # id, select_type, table, of MySQL partitions, type, possible_keys, key, …
            rows = await driver._fetch(f"EXPLAIN FORMAT=TRADITIONAL {statement}")
            plan = [row[-9:] if len(row) == 12 else row[3:] for row in rows if row[2] in (table, "t")]
            assert plan
            assert {key for _, _, key, *_ in plan} <= {"PRIMARY", None}
            assert not [row for row in plan if row[0] == "ALL"]


# Options, URLs, errors.


def test_an_url_says_what_the_options_say() -> None:
    driver = mysql.from_url("mariadb://u:s3cr%2Ft@h:1/d?table=x&pool_size=1&unix_socket=/s")
    assert repr(driver) == "mysql_driver('mariadb://u:***@h:1/d', table='x')"
    assert driver.lanes == 1
    assert "`x`" in driver.ddl()
    options = driver._connect_options
    assert {name: options[name] for name in ("host", "port", "user", "password", "db", "unix_socket")} == {
        "host": "h", "port": 1, "user": "u", "password": "s3cr/t", "db": "d", "unix_socket": "/s",
    }  # fmt: skip


@pytest.mark.parametrize(
    "options",
    [{"table": "a`b"}, {"namespace": "a/b"}, {"durability": "none"}, {"pool_size": 0}, {"timeout": 0}],
)
def test_an_option_that_cannot_work_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError):
        mysql.MySQLDriver("mysql://h/d", **options)


def test_a_database_must_be_named() -> None:
    with pytest.raises(ConfigurationError, match="database"):
        mysql.from_url("mysql://h")


@pytest.mark.parametrize("place", ["u:pa/ss@h:1/d", "u:pa?ss@h/d", "u:pa#ss@h/d", "u:12/ss@h/d"])
def test_an_url_that_is_not_encoded_is_not_shown(place: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        mysql.from_url(f"mysql://{place}")
    assert "ss" not in told(caught.value).replace("password", "")


@pytest.mark.parametrize("change", ["password", "database", "keyword"])
async def test_what_is_wrong_with_the_connection_is_told_without_the_password(
    on: ModuleType, server: Servers, change: str
) -> None:
    secret = "n0t=it!"
    url = server("mysql").url
    wrong = {
        "password": f"mysql://persistence:{secret}@127.0.0.1:{urlsplit(url).port}/persistence",
        "database": url + "_none",
        "keyword": url + "?no_such_keyword=1",
    }[change]
    driver = on.MySQLDriver(wrong)
    with pytest.raises(ConfigurationError) as caught:
        await driver.open()
    seen = told(caught.value) + repr(driver)
    assert secret not in seen
    assert servers.PASSWORD not in seen
    assert quote(servers.PASSWORD, safe="") not in seen


async def test_a_server_that_is_not_there_is_told_at_once(on: ModuleType) -> None:
    with pytest.raises(UnavailableError):
        await on.MySQLDriver(f"mysql://u:x@127.0.0.1:{servers.free_port()}/d").open()


# Creating the table.


async def test_without_create_the_missing_table_is_named_with_its_statement(
    on: ModuleType, server: Servers
) -> None:
    url = server("mysql").url
    async with own_table(url) as table, connected(url) as session:
        driver = on.MySQLDriver(url, table=table, create=False)
        with pytest.raises(ConfigurationError, match=table) as caught:
            await driver.open()
        assert driver.ddl() in str(caught.value)

        await session.ask(driver.ddl())
        await driver.open()
        assert await driver.commit([create("p")]) == [True]
        await driver.close()


async def test_an_account_without_the_right_to_create_is_told_what_to_run(
    on: ModuleType, server: Servers
) -> None:
    url = server("mysql").url
    user = f"u{uuid.uuid4().hex[:12]}"
    theirs = url.replace("//persistence:", f"//{user}:")
    async with own_table(url) as table, connected(url, root=True) as root:
        await root.ask(f"CREATE USER {user}@'%' IDENTIFIED BY '{servers.PASSWORD}'")
        await root.ask(f"GRANT INSERT ON persistence.* TO {user}@'%'")
        try:
            driver = on.MySQLDriver(theirs, table=table)
            with pytest.raises(ConfigurationError) as caught:
                await driver.open()
            assert driver.ddl() in str(caught.value)

            await root.ask(driver.ddl())
            await root.ask(f"GRANT SELECT, INSERT, UPDATE, DELETE ON persistence.{table} TO {user}@'%'")
            await driver.open()
            assert await driver.commit([create("p")]) == [True]
            await driver.close()
        finally:
            await root.ask(f"DROP USER {user}@'%'")


async def test_passwords_are_sent_as_the_server_knows_them(on: ModuleType, server: Servers) -> None:
    url = server("mysql").url
    for secret in ("pässwörd", "пароль"):
        user = f"u{uuid.uuid4().hex[:12]}"
        async with connected(url, root=True) as root:
            await root.ask(f"CREATE USER {user} IDENTIFIED BY '{secret}'")
            await root.ask(f"GRANT ALL ON persistence.* TO {user}")
        port = urlsplit(url).port
        async with opened(on, f"mysql://{user}:{quote(secret)}@127.0.0.1:{port}/persistence") as driver:
            assert await driver.commit([create("p")]) == [True]


async def test_what_is_no_pool_is_refused(on: ModuleType) -> None:
    with pytest.raises(ConfigurationError, match="asyncmy or aiomysql"):
        on.MySQLDriver(client=object())


async def test_a_table_without_transactions_is_refused(on: ModuleType, server: Servers) -> None:
    url = server("mysql").url
    async with own_table(url) as table, connected(url) as session:
        ddl = on.MySQLDriver(url, table=table).ddl().replace("1024", "600")  # as long as MyISAM's may be
        await session.ask(ddl.replace("InnoDB ROW_FORMAT=DYNAMIC", "MyISAM"))
        with pytest.raises(ConfigurationError, match="ENGINE=InnoDB"):
            await on.MySQLDriver(url, table=table).open()
        await session.ask(f"DROP TABLE {table}")
        await session.ask(f"CREATE TABLE {table} (p INT)")
        with pytest.raises(ConfigurationError):
            await on.MySQLDriver(url, table=table).open()


OPEN = """
import asyncio, sys
from persistence.drivers.mysql import MySQLDriver
driver = MySQLDriver(sys.argv[1], table=sys.argv[2])
async def main():
    await driver.open()
    await driver.close()
print("ready", flush=True)
sys.stdin.readline()
asyncio.run(main())
"""


async def test_eight_processes_open_an_empty_database_at_once(server: Servers) -> None:
    url = server("mysql").url
    async with own_table(url) as table:
        pipe = asyncio.subprocess.PIPE
        children = [
            await asyncio.create_subprocess_exec(
                sys.executable, "-c", OPEN, url, table, stdin=pipe, stdout=pipe
            )
            for _ in range(8)
        ]
        for child in children:
            if child.stdout is None or await child.stdout.readline() != b"ready\n":
                pytest.fail("a child did not start")
        await asyncio.gather(*(child.communicate(b"\n") for child in children))
        assert [child.returncode for child in children] == [0] * 8


# What the server must be set to.


async def test_sessions_have_the_settings_the_driver_relies_on(on: ModuleType, server: Servers) -> None:
    async with opened(on, server("mysql").url) as driver:
        strict = "FIND_IN_SET('STRICT_ALL_TABLES', @@sql_mode) > 0"
        ask = f"SELECT @@autocommit, @@innodb_lock_wait_timeout, {strict}"
        assert list(await driver._fetch(ask)) == [(1, 2, 1)]
        isolation = "SHOW VARIABLES WHERE Variable_name IN ('tx_isolation', 'transaction_isolation')"
        assert {value for _, value in await driver._fetch(isolation)} == {"READ-COMMITTED"}


async def test_a_server_that_cannot_keep_the_promise_is_told(
    on: ModuleType, own_server: Servers, caplog: pytest.LogCaptureFixture
) -> None:
    url = own_server("mysql").url
    async with opened(on, url):
        assert not caplog.records
    async with connected(url, root=True) as root:
        await root.ask("SET GLOBAL innodb_flush_log_at_trx_commit = 2")
        await root.ask("SET GLOBAL max_allowed_packet = 1048576")
    async with opened(on, url) as driver:
        assert {record.name for record in caplog.records} == {"persistence"}
        assert "innodb_flush_log_at_trx_commit=1" in caplog.text
        assert "max_allowed_packet=16777216" in caplog.text

        with pytest.raises(ConfigurationError, match="max_allowed_packet"):
            await driver.commit([Write("p", (Put("a", bytes(1 << 20)),), 1)])
        assert await driver.commit([create("p")]) == [True]
    caplog.clear()
    async with opened(on, url, durability="process"):
        assert "innodb" not in caplog.text


async def test_a_read_only_server_is_refused(on: ModuleType, own_server: Servers) -> None:
    url = own_server("mysql").url
    async with connected(url, root=True) as root:
        await root.ask("SET GLOBAL read_only = 1")
    with pytest.raises(ConfigurationError, match="read-only"):
        await on.MySQLDriver(url).open()


async def test_the_largest_write_fits_in_a_packet(on: ModuleType, server: Servers) -> None:
    async with opened(on, server("mysql").url) as driver:
        p, value = "p" * 255, bytes(3_000)
        ops = tuple(Put(f"{n:01024}", value) for n in range(1_000))
        assert await driver.commit([Write(p, ops, 1)]) == [True]
        assert await driver.commit([Write(p, tuple(op._replace(expect=1) for op in ops), 2)]) == [True]
        await driver.purge(p, "", None)


@pytest.mark.parametrize("library", CLIENTS)
async def test_a_pool_of_either_library_is_used_and_not_closed(library: str, server: Servers) -> None:
    parts = urlsplit(server("mysql").url)
    pool = await import_module(library).create_pool(
        minsize=1, maxsize=2, host=parts.hostname, port=parts.port, user=parts.username,
        password=unquote(parts.password or ""), db="persistence",
    )  # fmt: skip
    async with opened(mysql, None, client=pool) as driver:
        assert driver.lanes == 2
        assert await driver.commit([create("p", "a", "b")]) == [True]
        assert await driver.commit([create("p", "b", "c")]) == [False]
        assert len(await asyncio.gather(*(driver.get([Key("p", "a")]) for _ in range(8)))) == 8
    connection = await pool.acquire()
    await connection.ping()
    await pool.release(connection)
    pool.close()
    await pool.wait_closed()


# Races that the conformance suite cannot force.


async def test_a_create_that_loses_to_an_uncommitted_row_is_refused_whole(
    on: ModuleType, server: Servers
) -> None:
    url = server("mysql").url
    async with opened(on, url, namespace="race") as driver, connected(url, root=True) as other:
        await driver.purge("p", "", None)
        await driver.purge("q", "", None)
        await other.ask("BEGIN")
        await other.ask("INSERT INTO persistence VALUES ('race/p', 'b', 'theirs', 7)")
        ours = asyncio.create_task(driver.commit([create("p", "a", "b"), create("q", "a", "b")]))
        await until_somebody_waits_for_a_lock(other)
        await other.ask("COMMIT")

        assert await ours == [False, True]
        assert (await driver.scan("p", "", None, limit=9)).entries == [Entry("b", b"theirs", 7)]
        assert len((await driver.scan("q", "", None, limit=9)).entries) == 2


async def test_a_deadlock_is_resolved_within_the_driver(on: ModuleType, server: Servers) -> None:
    url = server("mysql").url
    async with opened(on, url, namespace="deadlock") as driver, connected(url, root=True) as other:
        await driver.purge("p", "", None)
        await driver.commit([create("p", "a", "b")])
        lock = "SELECT 1 FROM persistence WHERE p = 'deadlock/p' AND k = '{}' FOR UPDATE"
        await other.ask("BEGIN")
        # Who changed more is not the victim.
        rows = ",".join(f"('deadlock/other', '{n}', '', 1)" for n in range(100))
        await other.ask(f"INSERT INTO persistence VALUES {rows}")
        await other.ask(lock.format("b"))
        ours = asyncio.create_task(driver.commit([Write("p", (Put("a", b"w", 1), Put("b", b"w", 1)), 2)]))
        await until_somebody_waits_for_a_lock(other)
        await other.ask(lock.format("a"))
        await other.ask("ROLLBACK")

        assert await ours == [True]
        assert await driver.get([Key("p", "a"), Key("p", "b")]) == [Entry("a", b"w", 2), Entry("b", b"w", 2)]


async def test_a_lock_wait_that_times_out_changes_nothing_and_is_tried_again(
    on: ModuleType, server: Servers
) -> None:
    url = server("mysql").url
    async with opened(on, url, namespace="locked", timeout=2) as driver, connected(url) as other:
        await driver.purge("p", "", None)
        await driver.commit([create("p", "b")])
        await other.ask("BEGIN")
        await other.ask("SELECT 1 FROM persistence WHERE p = 'locked/p' FOR UPDATE")
        ours = asyncio.create_task(
            driver.commit([Write("p", (Put("a", b"w", ABSENT), Put("b", b"w", 1)), 2)])
        )
        await asyncio.sleep(1.5)  # the server's timeout, of 1 second, has come
        await other.ask("ROLLBACK")

        assert await ours == [True]
        assert len((await driver.scan("p", "", None, limit=9)).entries) == 2


async def test_of_what_one_packet_holds_nothing_is_there_when_a_lock_wait_ends_the_call(
    on: ModuleType, server: Servers
) -> None:
    url = server("mysql").url
    async with opened(on, url, namespace="packet", timeout=1) as driver, connected(url) as other:
        await driver.purge("p", "", None)
        await driver.commit([Write("q", (Put("a", b"v"),), 1)])
        await other.ask("BEGIN")
        await other.ask("SELECT 1 FROM persistence WHERE p = 'packet/q' AND k = 'a' FOR UPDATE")
        async with asyncio.timeout(DEADLINE):
            with pytest.raises(UnavailableError) as caught:
                await driver.commit([Write("p", (Put("a", b"w"),), 2), Write("q", (Delete("a"),), 3)])
        await other.ask("ROLLBACK")
        assert caught.value.unapplied
        assert await driver.get([Key("p", "a"), Key("q", "a")]) == [None, Entry("a", b"v", 1)]


async def test_a_key_that_is_absent_stays_so_while_it_is_deleted_with_another(
    on: ModuleType, server: Servers
) -> None:
    url = server("mysql").url
    async with opened(on, url, namespace="absent") as driver, connected(url, root=True) as other:
        await driver.purge("p", "", None)
        await driver.commit([create("p", "b")])
        await other.ask("BEGIN")
        await other.ask("SELECT 1 FROM persistence WHERE p = 'absent/p' AND k = 'b' FOR UPDATE")
        ours = asyncio.create_task(driver.commit([Write("p", (Delete("a"), Delete("b")), 2)]))
        await until_somebody_waits_for_a_lock(other)
        theirs = asyncio.create_task(driver.commit([create("p", "a", version=3)]))
        await asyncio.sleep(0.2)
        assert not theirs.done()
        await other.ask("ROLLBACK")
        assert await ours == await theirs == [True]
        assert await driver.get([Key("p", "a"), Key("p", "b")]) == [Entry("a", b"v", 3), None]


# Connections and servers that die.


async def test_connections_that_the_server_ended_are_replaced(on: ModuleType, server: Servers) -> None:
    url = server("mysql").url
    async with opened(on, url, namespace="killed", pool_size=1) as driver, connected(url, root=True) as root:
        await driver.purge("p", "", None)
        await driver.commit([create("p")])
        (own,) = await driver._fetch("SELECT CONNECTION_ID()")
        await root.ask(f"KILL {own[0]}")
        for _ in range(500):
            if not await root.ask(f"SELECT 1 FROM information_schema.processlist WHERE id = {own[0]}"):
                break
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.01)  # the loop reads the farewell
        assert await driver.get([Key("p", "a")]) == [Entry("a", b"v", 1)]

        (own,) = await driver._fetch("SELECT CONNECTION_ID()")
        await root.ask("BEGIN")
        await root.ask("SELECT 1 FROM persistence WHERE p = 'killed/p' FOR UPDATE")
        writing = asyncio.create_task(driver.commit([Write("p", (Put("a", b"w", 1),), 2)]))
        await until_somebody_waits_for_a_lock(root)
        await root.ask(f"KILL {own[0]}")
        with pytest.raises(UnavailableError):
            await writing
        await root.ask("ROLLBACK")
        assert await driver.get([Key("p", "a")]) == [Entry("a", b"v", 1)]


async def test_a_write_whose_reply_is_lost_is_unknown_and_not_sent_again(
    on: ModuleType, server: Servers
) -> None:
    shared = server("mysql")
    async with Proxy(shared.port) as proxy, opened(on, shared.url_at(proxy.port)) as driver:
        await driver.commit([create("p", "a", version=1)])
        sent = proxy.requests
        proxy.cut_after(replies=0)
        with pytest.raises(UnavailableError):
            await driver.commit([create("p", "b", version=2)])
        assert proxy.requests - sent < 500

        # It was applied; sent twice it would have been refused.
        assert await driver.get([Key("p", "b")]) == [Entry("b", b"v", 2)]


async def test_a_network_that_hangs_is_an_error_in_time_and_leaves_nothing_half_read(
    on: ModuleType, server: Servers
) -> None:
    shared = server("mysql")
    async with Proxy(shared.port) as proxy, opened(on, shared.url_at(proxy.port), timeout=1) as driver:
        await driver.commit([create("p", "a"), create("q", "b")])
        proxy.stall()
        async with asyncio.timeout(DEADLINE):
            calls = (driver.get([Key("p", "a")]) for _ in range(6))
            results = await asyncio.gather(*calls, return_exceptions=True)
        assert {type(result) for result in results} == {UnavailableError}

        await proxy.resume()
        assert await driver.get([Key("q", "b")]) == [Entry("b", b"v", 1)]
        assert await driver.get([Key("p", "a")]) == [Entry("a", b"v", 1)]


async def test_idle_connections_that_a_firewall_forgot_cost_one_time_out_and_not_one_each(
    on: ModuleType, server: Servers
) -> None:
    shared = server("mysql")
    async with Proxy(shared.port) as proxy, opened(on, shared.url_at(proxy.port), timeout=1) as driver:
        await asyncio.gather(*(driver.get([Key("p", "a")]) for _ in range(4)))
        assert proxy.connections > 2
        proxy.forget()
        with pytest.raises(UnavailableError):
            await driver.get([Key("p", "a")])
        assert await driver.get([Key("p", "a")]) == [None]


async def test_a_limit_of_rows_that_the_server_sets_by_default_hides_no_entry(
    on: ModuleType, own_server: Servers
) -> None:
    own = own_server("mysql")
    async with connected(own.url, root=True) as root:
        await root.ask("SET GLOBAL sql_select_limit = 3")
    async with opened(on, own.url) as driver:
        keys = [Key(f"p{n}", "a") for n in range(9)]
        assert all(await driver.commit([Write(p, (Put(k, b"v", ABSENT),), 1) for p, k in keys]))
        assert await driver.get(keys) == [Entry("a", b"v", 1)] * 9


async def test_a_restart_of_the_server_costs_a_delay(on: ModuleType, own_server: Servers) -> None:
    own = own_server("mysql")
    async with opened(on, own.url) as driver:
        assert await driver.commit([create("p")]) == [True]
        own.stop()
        with pytest.raises(UnavailableError):
            await driver.get([Key("p", "a")])
        own.start()
        assert await eventually(lambda: driver.get([Key("p", "a")])) == [Entry("a", b"v", 1)]
        assert await driver.commit([create("q")]) == [True]


async def test_a_commit_under_cancellation_is_whole_or_absent(on: ModuleType, server: Servers) -> None:
    async with opened(on, server("mysql").url, pool_size=1) as driver:
        for delay in (0, 0.0001, 0.0005, 0.001):
            write = Write("p", (Put("a", b"v"), Put("b", b"v"), Delete("none")), 1)
            task = asyncio.create_task(driver.commit([write]))
            await asyncio.sleep(delay)
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
            page = await driver.scan("p", "", None, limit=9)
            assert [entry.key for entry in page.entries] in ([], ["a", "b"])


async def test_tls_is_used_where_it_is_asked_for_or_there_is_no_connection(
    on: ModuleType, server: Servers, own_server: Servers, tmp_path: Path
) -> None:
    ours = make_certificates(tmp_path)
    secured = own_server("mysql", tls=ours).url
    async with opened(on, secured, ssl=create_default_context(cafile=str(ours.authority))) as driver:
        (_, cipher), *_ = await driver._fetch("SHOW SESSION STATUS LIKE 'Ssl_cipher'")
        assert cipher
    with pytest.raises(ConfigurationError, match="not trusted"):
        await on.MySQLDriver(secured, ssl=True).open()
    with pytest.raises(PersistenceError, match=r"TLS|SSL|not trusted"):  # aiomysql would go on in the clear
        await on.MySQLDriver(server("mysql").url, ssl_ca=str(ours.authority)).open()
    with pytest.raises(ConfigurationError, match="ssl_ca"):
        on.MySQLDriver(secured, ssl=False, ssl_ca=str(ours.authority))


async def test_who_says_that_he_has_no_tls_is_not_told_the_password(on: ModuleType) -> None:
    heard: list[bytes] = []

    async def lie(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        greeting = b"\x0a8.0.30\0\1\0\0\0" + b"a" * 8 + b"\0\x08\xa2\x21\2\0\x08\0\x15"  # all but CLIENT_SSL
        greeting += bytes(10) + b"b" * 12 + b"\0mysql_clear_password\0"
        writer.write(len(greeting).to_bytes(3, "little") + b"\0" + greeting)
        heard.append(await reader.read(1000))
        writer.close()

    async with await asyncio.start_server(lie, "127.0.0.1", 0) as listening:
        port = listening.sockets[0].getsockname()[1]
        with pytest.raises(PersistenceError):
            await on.MySQLDriver(f"mysql://me:secret@127.0.0.1:{port}/db", ssl=True, timeout=1).open()
        listening.close()
        await asyncio.sleep(0.05)
    assert b"secret" not in b"".join(heard)


async def test_a_server_that_hangs_is_told_as_such(on: ModuleType, server: Servers) -> None:
    async with (
        Proxy(server("mysql").port) as proxy,
        opened(on, server("mysql").url_at(proxy.port), timeout=1) as driver,
    ):
        proxy.stall()
        with pytest.raises(UnavailableError, match="no answer in time"):
            await driver.get([Key("p", "a")])
        await proxy.resume()


async def test_an_option_of_the_pool_that_is_no_such_value_is_an_error_of_configuration(
    on: ModuleType, server: Servers
) -> None:
    for option in ("minsize", "pool_recycle"):
        with pytest.raises(ConfigurationError):
            await on.from_url(f"{server('mysql').url}?{option}=x").open()


async def test_a_pool_that_its_owner_closed_is_told_as_such(on: ModuleType, server: Servers) -> None:
    parts = urlsplit(server("mysql").url)
    pool = await on.client_library.create_pool(
        minsize=0, host=parts.hostname, port=parts.port, user=parts.username,
        password=unquote(parts.password or ""), db=parts.path[1:], client_flag=1 << 16,
    )  # fmt: skip
    async with opened(on, None, client=pool) as driver:
        pool.close()
        await pool.wait_closed()
        with pytest.raises(UnavailableError, match="closing pool"):
            await driver.get([Key("p", "a")])
