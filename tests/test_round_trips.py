"""How often a checkpoint goes to the server and back, counted on the wire."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any
from uuid import uuid4

import pytest
from proxy import Proxy
from servers import RedisCluster, Server

from persistence import Persistence, create_persistence
from persistence.driver import Driver
from persistence.drivers import mongodb, mysql, postgresql, redis

SERVERS: dict[str, Callable[[str], Driver]] = {
    "postgresql": postgresql.from_url,
    "mysql": mysql.from_url,
    "redis": redis.from_url,
    "redis_cluster": redis.from_url,
    "mongodb": mongodb.from_url,
}
LIMITS = {"warm put": 1, "cold put": 2, "latest": 1, "put after latest": 1, "older": 2}
CAP = 5


class Trips:
    """Counts round trips; those that are under way at once as one."""

    def __init__(self) -> None:
        self.made = 0

    async def of(self, call: Awaitable[Any]) -> int:
        """Return how many `call` takes."""
        before = self.made
        await call
        return self.made - before


class Counting(Proxy):
    """Counts in `trips`. It keeps replies back, so that what is asked for at once is seen to be."""

    def __init__(self, target: int, trips: Trips) -> None:
        super().__init__(target)
        self.latency = 0.005
        self._trips = trips
        self._begun: dict[Any, int] = {}

    def _count(self, link: Any, flow: Any, size: int) -> None:
        asking, answered = link.asking, self.round_trips
        super()._count(link, flow, size)
        if link.asking and not asking:
            self._begun[link] = self._trips.made + 1
        elif self.round_trips > answered:
            self._trips.made = max(self._trips.made, self._begun[link])


@asynccontextmanager
async def counted(server: Server, namespace: str) -> AsyncIterator[tuple[Driver, Trips]]:
    """Yield a driver behind a proxy, and the counter of its round trips."""
    trips = Trips()
    async with AsyncExitStack() as stack:
        if isinstance(server, RedisCluster):
            proxies = [await stack.enter_async_context(Counting(node.port, trips)) for node in server.nodes]
            ports = {node.port: proxy.port for node, proxy in zip(server.nodes, proxies, strict=True)}
            yield (
                redis.RedisDriver(
                    server.url,
                    cluster=True,
                    namespace=namespace,
                    address_remap=lambda address: (address[0], ports[address[1]]),
                ),
                trips,
            )
        else:
            proxy = await stack.enter_async_context(Counting(server.port, trips))
            # What pymongo asks by itself from time to time would be counted.
            quiet = "heartbeatFrequencyMS=600000&" if server.engine == "mongodb" else ""
            yield make(server, server.url_at(proxy.port), f"{quiet}namespace={namespace}"), trips


def make(server: Server, url: str, options: str) -> Driver:
    if server.engine == "redis_cluster":
        url = url.replace("redis:", "redis+cluster:")
    return SERVERS[server.engine](f"{url}{'&' if '?' in url else '?'}{options}")


@pytest.mark.parametrize("cap", [None, CAP])
@pytest.mark.parametrize("engine", SERVERS)
async def test_a_checkpoint_takes_the_round_trips_that_were_promised(
    engine: str,
    cap: int | None,
    server: Callable[[str], Server],
    conversations: list[dict[str, Any]],
) -> None:
    messages = conversations[0]["messages"]
    namespace = uuid4().hex
    made: dict[str, list[int]] = defaultdict(list)

    async def put(p: Persistence, thread: str, step: int) -> None:
        state = {"version": 2, "messages": messages[:step], "step": step}
        await p.checkpoints.put(thread, state, max_checkpoints_per_thread=cap)

    # A connection that is new, or sees a statement for the first time, takes some more: the least counts.
    rounds = range(6)
    older: dict[int, str] = {}
    shared = server(engine)
    async with create_persistence(make(shared, shared.url, f"namespace={namespace}")) as p:
        for n in rounds:
            for step in range(1, 2 * CAP):
                for kind in ("put", "latest", "older"):
                    await put(p, f"{kind} {n}", step)
            older[n] = (await p.checkpoints.list(f"older {n}"))[CAP - 1].id
    async with counted(shared, namespace) as (driver, trips), create_persistence(driver) as p:
        for n in rounds:
            made["cold put"].append(await trips.of(put(p, f"put {n}", 2 * CAP)))
            made["warm put"].append(await trips.of(put(p, f"put {n}", 2 * CAP + 1)))
            made["latest"].append(await trips.of(p.checkpoints.get(f"latest {n}")))
            made["put after latest"].append(await trips.of(put(p, f"latest {n}", 2 * CAP)))
            made["older"].append(await trips.of(p.checkpoints.get(f"older {n}", older[n])))
    least = {what: min(numbers) for what, numbers in made.items()}
    assert 0 not in least.values()
    limits = dict(LIMITS)
    if cap is not None:  # which checkpoints there are must be known where one has to go
        limits["cold put"] += 1
        limits["put after latest"] += 1
    if engine == "mongodb":  # to commit a transaction takes one more, and so does what the cap removes
        for what in ("warm put", "cold put", "put after latest"):
            limits[what] += 1 + (cap is not None)
    assert {what: count for what, count in least.items() if count > limits[what]} == {}
