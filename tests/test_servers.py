"""The tests' own tools: servers that can be killed, and a proxy that breaks connections."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import pytest
import servers
from proxy import Proxy

import persistence.drivers

HERE = Path(__file__).parent


# Servers.


async def postgresql_counts(url: str) -> int:
    import asyncpg

    client = await asyncpg.connect(url)
    try:
        await client.execute("CREATE TABLE IF NOT EXISTS visits (n int)")
        await client.execute("INSERT INTO visits VALUES (1)")
        return cast("int", await client.fetchval("SELECT count(*) FROM visits"))
    finally:
        await client.close()


async def mysql_counts(url: str) -> int:
    from urllib.parse import unquote, urlsplit

    import aiomysql

    parts = urlsplit(url)
    account = {"user": parts.username, "password": unquote(parts.password or ""), "db": parts.path[1:]}
    client = await aiomysql.connect(host=parts.hostname, port=parts.port, autocommit=True, **account)
    try:
        async with client.cursor() as cursor:
            await cursor.execute("SELECT count(*) FROM information_schema.tables WHERE table_name = 'visits'")
            if await cursor.fetchone() == (0,):
                await cursor.execute("CREATE TABLE visits (n int)")
            await cursor.execute("INSERT INTO visits VALUES (1)")
            await cursor.execute("SELECT count(*) FROM visits")
            (count,) = await cursor.fetchone()
            return cast("int", count)
    finally:
        client.close()


async def redis_counts(url: str) -> int:
    from redis.asyncio import Redis

    async with Redis.from_url(url) as client:
        return await client.incr("visits")


async def redis_cluster_counts(url: str) -> int:
    from redis.asyncio import RedisCluster

    async with RedisCluster.from_url(url) as client:
        counts = [await client.incr(f"visits{number}") for number in range(50)]  # spread over all nodes
        assert len(set(counts)) == 1
        return counts[0]


async def mongodb_counts(url: str) -> int:
    from pymongo import AsyncMongoClient

    client: AsyncMongoClient[dict[str, Any]] = AsyncMongoClient(url)
    async with client:
        visits = client["persistence"]["visits"]
        async with client.start_session() as session, await session.start_transaction():
            await visits.insert_one({"n": 1}, session=session)
        return await visits.count_documents({})


COUNTS = {
    "postgresql": postgresql_counts,
    "mysql": mysql_counts,
    "redis": redis_counts,
    "redis_cluster": redis_cluster_counts,
    "mongodb": mongodb_counts,
}


@pytest.mark.parametrize("engine", list(servers.ENGINES))
async def test_a_server_keeps_its_data_and_port_over_stop_kill_and_pause(
    engine: str, own_server: Callable[..., servers.Server]
) -> None:
    server, visit = own_server(engine), COUNTS[engine]
    url = server.url

    assert await visit(url) == 1
    server.restart()
    assert await visit(url) == 2
    server.kill()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", server.port), 5)
    server.start()
    assert await visit(url) == 3

    server.pause()
    late = asyncio.create_task(visit(url))
    done, _ = await asyncio.wait([late], timeout=0.3)
    assert not done
    server.resume()
    assert await late == 4


@pytest.mark.parametrize("engine", ["redis", "mongodb"])
async def test_a_server_with_a_password_wants_it(
    engine: str, own_server: Callable[..., servers.Server]
) -> None:
    url = own_server(engine, password=servers.PASSWORD).url

    assert await COUNTS[engine](url) == 1
    with pytest.raises(Exception, match=r"(?i)authentication failed|invalid username-password"):
        await COUNTS[engine](url.replace("%40", "%41"))


@pytest.mark.parametrize("engine", ["postgresql", "mysql", "redis", "mongodb"])
async def test_a_client_reaches_a_server_through_a_proxy(
    engine: str, own_server: Callable[..., servers.Server]
) -> None:
    server = own_server(engine)

    async with Proxy(server.port) as proxy:
        assert await COUNTS[engine](server.url_at(proxy.port)) == 1
        assert proxy.round_trips >= 1


def test_the_shared_server_of_an_engine_is_started_once(server: Callable[[str], servers.Server]) -> None:
    assert server("redis") is server("redis")


def test_a_server_that_exists_can_be_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(servers, "_shared", {})
    monkeypatch.setenv("PERSISTENCE_TEST_POSTGRESQL_URL", "postgresql://elsewhere/db")

    server = servers.get("postgresql")

    assert server.url == "postgresql://elsewhere/db"
    with pytest.raises(servers.NotAvailable, match="postgresql NOT TESTED"):
        server.kill()


@pytest.mark.parametrize("asked", ["port", "nodes", "command"])
def test_what_only_a_server_of_ours_has_is_told_of_one_that_exists(
    asked: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(servers, "_shared", {})
    monkeypatch.setenv("PERSISTENCE_TEST_REDIS_CLUSTER_URL", "redis://elsewhere")
    server = servers.get("redis_cluster")
    assert server.engine == "redis_cluster"
    with pytest.raises(servers.NotAvailable, match="redis_cluster NOT TESTED"):
        getattr(server, asked)("PING")


def test_a_server_that_cannot_start_shows_its_log(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(servers.Redis, "options", ["--no-such-option", "1"])

    with pytest.raises(RuntimeError, match="no-such-option"):
        servers.own("redis")


SCRIPT = """
import json, os, sys, threading
import servers
engines = sys.argv[1:]
print(json.dumps([[servers.own(engine).pid for engine in engines], str(servers._guard().folder)]), flush=True)
if os.fork() == 0:      # a child that lives on must not keep them alive either
    threading.Event().wait(60)
threading.Event().wait(60)
"""


def test_nothing_outlives_a_killed_run() -> None:
    if os.environ.get("PERSISTENCE_TEST_SERVERS") == "none":
        raise servers.NotAvailable("redis", "PERSISTENCE_TEST_SERVERS=none asks for a run without servers")
    with subprocess.Popen(
        [sys.executable, "-c", SCRIPT, "redis", "postgresql"],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(HERE)},
        start_new_session=True,
    ) as run:
        assert run.stdout is not None
        pids, folder = json.loads(run.stdout.readline())
        everything = [pid for first in pids for pid in servers.family(first)]
        assert all(map(servers.alive, pids))
        assert len(everything) > len(pids)  # PostgreSQL has children (some of which end by themselves)
        # The guard sees that its parent is gone, although the fork holds the pipe to it.
        children = [pid for pid in servers.family(run.pid)[1:] if pid not in everything]
        run.kill()
        try:
            servers.wait_until(lambda: not any(map(servers.alive, everything)), lambda: "a server lives on")
            servers.wait_until(lambda: not Path(folder).exists(), lambda: "the folder is still there")
        finally:
            servers.send(children, signal.SIGKILL)


RUN = """
import pytest, servers

@pytest.mark.parametrize("engine", ["redis", "mongodb"])
def test_a_server(engine): servers.get(engine)

@pytest.fixture
def started(server): return server("mysql")

def test_a_fixture(started): pass
def test_no_server(): pass
"""


@pytest.mark.parametrize(
    ("settings", "passed", "skipped", "failed"),
    [({}, 1, 3, 0), ({"CI": "1"}, 1, 0, 3), ({"PERSISTENCE_TEST_REQUIRE": "all"}, 1, 0, 3)],
)
def test_a_missing_server_is_a_loud_skip_and_in_ci_a_failure(
    tmp_path: Path, settings: dict[str, str], passed: int, skipped: int, failed: int
) -> None:
    (tmp_path / "conftest.py").write_text((HERE / "conftest.py").read_text())
    (tmp_path / "test_it.py").write_text(RUN)
    inherited = {
        name: value for name, value in os.environ.items() if name not in ("CI", "PERSISTENCE_TEST_REQUIRE")
    }

    run = subprocess.run(
        [
            sys.executable,
            "-P",
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            "--rootdir",
            tmp_path,
            tmp_path,
        ],
        env={**inherited, "PYTHONPATH": str(HERE), "PERSISTENCE_TEST_SERVERS": "none", **settings},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )

    last = run.stdout.splitlines()[-1]
    assert f"{passed} passed" in last, run.stdout + run.stderr
    assert ("skipped" in last) == bool(skipped)
    assert ("failed" in last or "error" in last) == bool(failed)
    if skipped:
        assert f"{skipped} skipped" in last
        assert "engines that were NOT tested" in run.stdout
        for engine in ("redis", "mongodb", "mysql"):
            assert f"\n{engine} NOT TESTED: " in run.stdout


# The guard against blocking calls.


async def call_from_our_code(statement: str) -> None:
    """Run a statement as if it stood in a driver."""
    path = Path(persistence.drivers.__path__[0]) / "made_up.py"
    code = compile(f"import fcntl, os, time\nasync def call():\n    {statement}\n", path, "exec")
    names: dict[str, Any] = {}
    exec(code, names)
    await names["call"]()


@pytest.mark.parametrize(
    "statement", ["time.sleep(0)", "with open(os.devnull) as f: f.read()", "os.fdatasync(0)", "os.listdir()"]
)
async def test_code_of_ours_must_not_block_the_event_loop(statement: str) -> None:
    with pytest.raises(Exception, match="Blocking call to"):
        await call_from_our_code(statement)


async def test_code_of_ours_may_block_a_thread_and_tests_may_block() -> None:
    time.sleep(0)  # noqa: ASYNC251
    await asyncio.to_thread(asyncio.run, asyncio.to_thread(time.sleep, 0))


# The proxy.


@pytest.fixture
async def echo() -> AsyncIterator[int]:
    """A server that sends back each line it gets, in upper case; its port."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while line := await reader.readline():
                received.append(line)
                writer.write(line.upper())
        writer.close()

    received.clear()
    listener = await asyncio.start_server(serve, "127.0.0.1", 0)
    yield listener.sockets[0].getsockname()[1]
    listener.close()


received: list[bytes] = []


class Client:
    """A client that asks and hears."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    @classmethod
    async def connect(cls, port: int) -> Client:
        return cls(*await asyncio.open_connection("127.0.0.1", port))

    async def ask(self, line: bytes) -> bytes:
        self.writer.write(line)
        return await self.reader.readline()

    async def rest(self) -> bytes:
        """Return what still comes before the connection ends, in whatever way."""
        text = b""
        with suppress(ConnectionResetError):
            while byte := await self.reader.read(1):
                text += byte
        self.writer.close()
        return text

    async def hears_nothing(self) -> bool:
        with suppress(TimeoutError):
            async with asyncio.timeout(0.05):
                await self.reader.read(1)
                return False
        return True


async def test_the_proxy_passes_bytes_and_counts(echo: int) -> None:
    async with Proxy(echo) as proxy:
        client = await Client.connect(proxy.port)
        assert await client.ask(b"one\n") == b"ONE\n"
        assert await client.ask(b"two\n") == b"TWO\n"
        big = b"x" * 50_000 + b"\n"
        assert await client.ask(big) == big.upper()

        assert (proxy.connections, proxy.round_trips) == (1, 3)
        assert (proxy.requests, proxy.replies) == (50_009, 50_009)

        client.writer.write_eof()
        assert await client.rest() == b""


async def test_cut_breaks_all_connections_and_takes_new_ones(echo: int) -> None:
    async with Proxy(echo) as proxy:
        clients = [await Client.connect(proxy.port) for _ in range(3)]
        for client in clients:
            assert await client.ask(b"a\n") == b"A\n"
        proxy.cut()
        assert [await client.rest() for client in clients] == [b""] * 3

        client = await Client.connect(proxy.port)
        assert await client.ask(b"b\n") == b"B\n"
        client.writer.close()


@pytest.mark.parametrize("size", range(6))
async def test_a_reply_can_be_cut_at_every_byte(echo: int, size: int) -> None:
    async with Proxy(echo) as proxy:
        bystander, client = await Client.connect(proxy.port), await Client.connect(proxy.port)
        assert await bystander.ask(b"a\n") == b"A\n"
        proxy.cut_after(replies=size)
        client.writer.write(b"hello\n")

        assert await client.rest() == b"HELLO\n"[:size]
        assert await bystander.rest() == b""
        assert received == [b"a\n", b"hello\n"]  # it did arrive

        again = await Client.connect(proxy.port)
        assert await again.ask(b"hello\n") == b"HELLO\n"
        again.writer.close()


@pytest.mark.parametrize("size", range(6))
async def test_a_request_can_be_cut_at_every_byte(echo: int, size: int) -> None:
    async with Proxy(echo) as proxy:
        client = await Client.connect(proxy.port)
        assert await client.ask(b"a\n") == b"A\n"
        proxy.cut_after(requests=size)
        client.writer.write(b"hello\n")

        assert await client.rest() == b""
        assert b"hello\n" not in received
        assert proxy.requests == 2 + size


async def test_a_cut_waits_for_the_byte_that_is_one_too_many(echo: int) -> None:
    async with Proxy(echo) as proxy:
        client = await Client.connect(proxy.port)
        proxy.cut_after(replies=4)
        assert await client.ask(b"one\n") == b"ONE\n"
        client.writer.write(b"two\n")
        assert await client.rest() == b""


async def test_stall_holds_everything_back_until_resume(echo: int) -> None:
    async with Proxy(echo) as proxy:
        client = await Client.connect(proxy.port)
        assert await client.ask(b"a\n") == b"A\n"
        proxy.stall()
        client.writer.write(b"b\n")
        late = await Client.connect(proxy.port)
        late.writer.write(b"c\n")
        assert await client.hears_nothing()
        assert await late.hears_nothing()
        assert received == [b"a\n"]

        await proxy.resume()
        assert await client.reader.readline() == b"B\n"
        assert await late.reader.readline() == b"C\n"
        for each in (client, late):
            each.writer.close()


async def test_what_a_cut_caught_in_a_stall_never_arrives(echo: int) -> None:
    async with Proxy(echo) as proxy:
        client = await Client.connect(proxy.port)
        assert await client.ask(b"a\n") == b"A\n"
        proxy.stall()
        client.writer.write(b"b\n")
        assert await client.hears_nothing()
        proxy.cut()
        await proxy.resume()

        assert await client.rest() == b""
        assert received == [b"a\n"]


async def test_refuse_keeps_what_is_connected_and_takes_nobody_else(echo: int) -> None:
    async with Proxy(echo) as proxy:
        client = await Client.connect(proxy.port)
        assert await client.ask(b"a\n") == b"A\n"
        proxy.refuse()
        with pytest.raises(ConnectionRefusedError):
            await Client.connect(proxy.port)
        assert await client.ask(b"b\n") == b"B\n"

        await proxy.resume()
        late = await Client.connect(proxy.port)
        assert await late.ask(b"c\n") == b"C\n"
        for each in (client, late):
            each.writer.close()


async def test_without_a_server_behind_it_the_proxy_ends_the_connection() -> None:
    async with Proxy(servers.free_port()) as proxy:
        client = await Client.connect(proxy.port)
        assert await client.rest() == b""
