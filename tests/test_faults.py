"""Servers killed, paused and cut off under load: nothing acknowledged is lost, nothing is doubled."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aiomysql
import asyncpg
import pytest
import servers
from engines import ENGINES, Place
from proxy import Proxy

from persistence import (
    ImageRecord,
    Persistence,
    PersistenceError,
    UnavailableError,
    create_persistence,
)

LOCAL = {"memory", "filesystem", "sqlite"}
REMOTE = [name for name in ENGINES if name not in LOCAL]
SINGLE = [name for name in REMOTE if name != "redis_cluster"]
WRITERS = 32
SESSIONS = 8
PATIENCE = 45.0  # seconds in which every call must have ended: its retries and its driver's time-outs

OwnServer = Callable[..., Any]


class Load:
    """Writers that note what was acknowledged, what certainly was not, and what nobody knows."""

    def __init__(self, p: Persistence) -> None:
        self.p = p
        self.acknowledged: dict[tuple[str, int], str] = {}
        self.unknown: set[str] = set()
        self.slowest = 0.0
        self.stop = False

    async def write(self, number: int) -> None:
        session = f"s{number % SESSIONS}"
        n = 0
        while not self.stop:
            n += 1
            token = f"{number}-{n}"
            started = time.monotonic()
            try:
                seq = await self.p.sessions.add_message(session, {"token": token})
            except UnavailableError:
                pass  # certainly not
            except PersistenceError:
                self.unknown.add(token)
            else:
                assert (session, seq) not in self.acknowledged
                self.acknowledged[session, seq] = token
            self.slowest = max(self.slowest, time.monotonic() - started)
            if n % 5 == 0:
                try:
                    await self.p.images.save_image(
                        ImageRecord(image_id=f"i{number}", container_id="c", session_id="s", name=f"n{n % 2}")
                    )
                except PersistenceError:
                    continue

    async def goes_on(self) -> None:
        """Wait until as many more writes were acknowledged as there are writers."""
        wanted = len(self.acknowledged) + WRITERS
        deadline = time.monotonic() + PATIENCE
        while len(self.acknowledged) < wanted:
            assert time.monotonic() < deadline, "the driver does not work again"
            await asyncio.sleep(0.01)

    async def check(self) -> None:
        """Compare what is stored with what was acknowledged, through the same driver object."""
        found: dict[tuple[str, int], str] = {}
        for number in range(SESSIONS):
            session = f"s{number}"
            stored = await self.p.sessions.read_messages(session)
            assert [message.seq for message in stored] == list(range(1, len(stored) + 1))
            found |= {(session, message.seq): message.message["token"] for message in stored}
        assert self.acknowledged.items() <= found.items()
        tokens = list(found.values())
        assert len(set(tokens)) == len(tokens)
        assert set(tokens) - set(self.acknowledged.values()) <= self.unknown
        for record in await self.p.images.find_all_images():
            assert record in await self.p.images.find_images_by_name(record.name)
        await self.p.sessions.add_message("after", {"n": 1})
        assert await self.p.sessions.get_messages("after", last=1) == [{"n": 1}]
        assert self.slowest < PATIENCE


async def under_load(p: Persistence, trouble: Callable[[Load], Any]) -> Load:
    load = Load(p)
    writers = [asyncio.create_task(load.write(number)) for number in range(WRITERS)]
    await load.goes_on()
    await trouble(load)
    await load.goes_on()
    load.stop = True
    await asyncio.wait_for(asyncio.gather(*writers), PATIENCE)
    await load.check()
    return load


def place(engine: str, server: Any, tmp_path: Path) -> Any:
    return ENGINES[engine].make(Place(tmp_path, "faults", lambda _: server))()


@pytest.mark.parametrize("engine", REMOTE)
async def test_a_server_killed_three_times_under_32_writers(
    engine: str, own_server: OwnServer, tmp_path: Path
) -> None:
    server = await asyncio.to_thread(own_server, engine)

    async def kill(load: Load) -> None:
        chance = random.Random(engine)
        for _ in range(3):
            victim = chance.choice(server.nodes) if engine == "redis_cluster" else server
            await asyncio.to_thread(victim.kill)
            await asyncio.sleep(chance.uniform(0, 0.3))
            await asyncio.to_thread(victim.start)
            await load.goes_on()

    async with create_persistence(await asyncio.to_thread(place, engine, server, tmp_path)) as p:
        await under_load(p, kill)


@pytest.mark.parametrize("engine", SINGLE)
async def test_connections_cut_in_the_middle_of_requests_and_replies(engine: str, tmp_path: Path) -> None:
    server = await asyncio.to_thread(servers.get, engine)
    async with Proxy(server.port) as proxy:

        class Behind:
            url = server.url_at(proxy.port)

        async def cut(load: Load) -> None:
            chance = random.Random(engine)
            for number in range(12):
                after = chance.randrange(1, 4_000)
                proxy.cut_after(**{("requests", "replies")[number % 2]: after})
                await asyncio.sleep(0.1)
                proxy.cut()
                await proxy.resume()

        async with create_persistence(await asyncio.to_thread(place, engine, Behind, tmp_path)) as p:
            await under_load(p, cut)


@pytest.mark.parametrize("engine", SINGLE)
async def test_what_cannot_be_sent_to_a_dead_server_is_unavailable_and_not_unknown(
    engine: str, own_server: OwnServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("persistence.coalescer.RETRY_SECONDS", 1.0)
    server = await asyncio.to_thread(own_server, engine)
    async with create_persistence(await asyncio.to_thread(place, engine, server, tmp_path)) as p:
        assert await p.sessions.add_message("s", {"n": 1}) == 1
        await asyncio.to_thread(server.kill)
        await asyncio.sleep(1.5)  # the clients look at their connections, some once a second
        with pytest.raises(UnavailableError, match="nothing was written"):
            await p.sessions.add_message("s", {"n": 2})
        await asyncio.to_thread(server.start)
        assert await until_it_answers(lambda: p.sessions.add_message("s", {"n": 3})) == 2


async def until_it_answers(call: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            return await call()
        except UnavailableError:
            assert time.monotonic() < deadline, "the driver does not work again"


@pytest.mark.parametrize("engine", REMOTE)
async def test_a_server_paused_beyond_the_time_out(
    engine: str, own_server: OwnServer, tmp_path: Path
) -> None:
    server = await asyncio.to_thread(own_server, engine)

    async def pause(load: Load) -> None:
        await asyncio.to_thread(server.pause)
        await asyncio.sleep(12)  # longer than the time-out of any driver
        await asyncio.to_thread(server.resume)

    async with create_persistence(await asyncio.to_thread(place, engine, server, tmp_path)) as p:
        await under_load(p, pause)


async def test_one_dead_node_of_a_cluster_stops_its_own_partitions_alone(
    own_server: OwnServer, tmp_path: Path
) -> None:
    server = await asyncio.to_thread(own_server, "redis_cluster")
    async with create_persistence(await asyncio.to_thread(place, "redis_cluster", server, tmp_path)) as p:
        names = [f"s{n}" for n in range(60)]
        await asyncio.gather(*(p.sessions.add_message(name, {"n": 1}) for name in names))
        assert all(node.command("DBSIZE") > 0 for node in server.nodes)
        await asyncio.to_thread(server.nodes[0].kill)
        results = await asyncio.gather(
            *(p.sessions.add_message(name, {"n": 2}, timeout=5) for name in names), return_exceptions=True
        )
        worked = [name for name, result in zip(names, results, strict=True) if isinstance(result, int)]
        failed = [result for result in results if not isinstance(result, int)]
        assert len(worked) >= 20
        assert failed
        assert all(isinstance(result, PersistenceError) for result in failed)
        await asyncio.to_thread(server.nodes[0].start)
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            try:
                await asyncio.gather(*(p.sessions.add_message(name, {"n": 3}) for name in names))
                break
            except PersistenceError:
                await asyncio.sleep(0.2)
        for name in names:
            stored = [message["n"] for message in await p.sessions.get_messages(name)]
            assert stored[0] == 1
            assert stored[-1] == 3
            assert stored.count(2) <= 1
            assert name not in worked or 2 in stored


async def _demote(engine: str, old: Any, new: Any) -> None:
    if engine == "redis":
        old.command("REPLICAOF", "127.0.0.1", new.port)
    elif engine == "mysql":
        connection = await aiomysql.connect(host="127.0.0.1", port=old.port, user="root", autocommit=True)
        async with connection.cursor() as cursor:
            await cursor.execute("SET GLOBAL read_only = 1")
        connection.close()
    else:
        connection = await asyncpg.connect(old.url.replace("//persistence:", "//postgres:"))
        await connection.execute("ALTER SYSTEM SET default_transaction_read_only = on")
        await connection.execute("SELECT pg_reload_conf()")
        await connection.close()


@pytest.mark.parametrize("engine", ["postgresql", "mysql", "redis"])
async def test_a_primary_that_has_become_a_replica_is_left_for_the_new_one(
    engine: str, own_server: OwnServer
) -> None:
    """The address leads to the new primary; connections that are there, to the old one."""
    old, new = own_server(engine), own_server(engine)
    async with create_persistence(new.url):
        pass  # it has the table, as a replica would
    async with Proxy(old.port) as proxy, create_persistence(old.url_at(proxy.port)) as p:
        await p.sessions.add_message("before", {"n": 1})
        proxy.target = new.port
        await _demote(engine, old, new)
        assert await p.sessions.add_message("after", {"n": 1}) == 1
    async with create_persistence(new.url) as p:
        assert await p.sessions.count_messages("after") == 1
