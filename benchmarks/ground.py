"""One engine made ready: our library on it, and the thinnest use of its client beside."""

from __future__ import annotations

import os
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, TypeAlias, TypeVar
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit
from uuid import uuid4

from goals import goal
from harness import Effort, NotMeasuredError, Row, Step, race
from peers import Peer
from thin import Thin

from persistence import Persistence, create_persistence
from persistence.coalescer import Coalescer
from persistence.driver import Driver
from persistence.options import Durability

__all__ = ["Ground", "prepare"]

T = TypeVar("T")
With: TypeAlias = Callable[[T, int, int], Awaitable[object]]
"""A `Step` that gets first what to do it with."""


@dataclass
class Ground:
    """What a measure works on."""

    engine: str  # as the table names it
    p: Persistence
    core: Coalescer  # on the same driver: the writes that no repository makes yet
    held: Thin
    pool: Thin  # of ten connections; for an embedded engine the same as `held`
    peer: Peer | None
    effort: Effort
    rows: list[Row] = field(default_factory=list)

    def client(self, tasks: int) -> Thin:
        """Return the client that races for so many tasks. What the one stores the other does not see."""
        return self.held if tasks == 1 else self.pool

    async def race(
        self, measure: str, tasks: int, ours: Step, thin: With[Thin], peer: With[Peer] | None = None
    ) -> None:
        """Measure, and add a row for each other side."""
        client = self.client(tasks)
        sides: dict[str, Step] = {"ours": ours, "client": partial(thin, client)}
        names = {"client": client.client}
        if self.held is not self.pool:
            names["client"] += ", 1 held" if tasks == 1 else ", pool of 10"
        if peer is not None and self.peer is not None:
            sides["peer"], names["peer"] = partial(peer, self.peer), self.peer.name
        timings = await race(sides, tasks=tasks, effort=self.effort)
        for kind, name in names.items():
            self.add(Row(measure, self.engine, timings["ours"], name, timings[kind]), kind)

    async def compare(self, measure: str, ours: Step, name: str, other: Step) -> None:
        """Measure one use of ours against another."""
        timings = await race({"ours": ours, "other": other}, tasks=1, effort=self.effort)
        self.add(Row(measure, self.engine, timings["ours"], name, timings["other"]), "ours")

    def add(self, row: Row, kind: str) -> None:
        """Add a row, with its goal if there is one."""
        row.goal = goal(row.measure, row.engine, kind)
        self.rows.append(row)


@asynccontextmanager
async def prepare(
    engine: str, durability: Durability, folder: Path, peer: Peer | None, effort: Effort
) -> AsyncIterator[Ground]:
    """Open everything on an empty store of `engine`."""
    name = engine
    apart = ExitStack()
    driver: Driver
    held: Thin
    pool: Thin
    if engine == "memory":
        from thin.memory import ThinMemory

        from persistence.drivers.memory import MemoryDriver

        driver = MemoryDriver()
        held = pool = ThinMemory()
    elif engine == "filesystem":
        from thin.filesystem import ThinFiles

        from persistence.drivers.filesystem import FilesystemDriver

        name = f"filesystem {durability}"
        driver = FilesystemDriver(folder / "ours", durability=durability)
        pool = held = ThinFiles(folder / "thin", durability)
    elif engine == "sqlite":
        from thin.sqlite import ThinSQLite

        from persistence.drivers.sqlite import SQLiteDriver

        name = f"sqlite {durability}"
        driver = SQLiteDriver(folder / "ours.db", durability=durability)
        pool = held = ThinSQLite(folder / "thin.db", durability)
        if peer is not None:
            peer.use(folder / "peer.db")
    else:
        ours, servers = _cores()
        with _on(servers):
            url = _server(engine)
        apart.enter_context(_on(ours))
        driver = _driver(engine, url)
        held, pool = _thin(engine, url, None), _thin(engine, url, 10)
    async with AsyncExitStack() as stack:
        stack.enter_context(apart)
        p = await stack.enter_async_context(create_persistence(driver))
        core = Coalescer(driver)
        await core.open()
        for thin in {held, pool}:
            await thin.open()
            stack.push_async_callback(thin.close)
        yield Ground(name, p, core, held, pool, peer if engine == "sqlite" else None, effort)


def _cores() -> tuple[set[int], set[int]]:
    """Return the cores for us and for the servers: none is shared, as between two machines.

    Otherwise a lone call takes one time or two and a half times that, as the
    scheduler happens to put the connection's process on our core or another.
    """
    if not hasattr(os, "sched_getaffinity"):
        return set(), set()
    first, *others = sorted(os.sched_getaffinity(0))
    return {first}, set(others)


@contextmanager
def _on(cores: set[int]) -> Iterator[None]:
    """Run on these cores, and start others there."""
    if not cores:
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def _server(engine: str) -> str:
    """Return the URL of a running server, which is started if need be."""
    tests = str(Path(__file__).parent.parent / "tests")
    if tests not in sys.path:
        sys.path.append(tests)
    servers: Any = import_module("servers")
    try:
        return str(servers.get(engine.removesuffix("_asyncmy")).url)
    except servers.NotAvailable as error:
        raise NotMeasuredError(error) from error


def _driver(engine: str, url: str) -> Driver:
    parts = urlsplit(url)
    scheme = "redis+cluster" if engine == "redis_cluster" else parts.scheme
    query = urlencode([*parse_qsl(parts.query), ("namespace", f"bench-{uuid4().hex}")])
    name = f"persistence.drivers.{engine.removesuffix('_cluster')}"
    module = _mysql(engine) if engine.startswith("mysql") else import_module(name)
    driver: Driver = module.from_url(urlunsplit(parts._replace(scheme=scheme, query=query)))
    return driver


def _mysql(engine: str) -> Any:
    """Import the driver, as it is where the one or the other client is installed."""
    name = "persistence.drivers.mysql"
    hidden = {} if engine == "mysql_asyncmy" else {"asyncmy": None}
    found = sys.modules.pop("asyncmy", None)
    sys.modules.pop(name, None)
    sys.modules.update(hidden)  # type: ignore[arg-type]  # None: it cannot be imported
    try:
        module = import_module(name)
    finally:
        for other in hidden:
            del sys.modules[other]
        if found is not None:
            sys.modules["asyncmy"] = found
    if engine == "mysql_asyncmy" and module.client_library.__name__ != "asyncmy":
        raise NotMeasuredError("asyncmy is not installed")
    return module


def _thin(engine: str, url: str, size: int | None) -> Thin:
    if engine == "postgresql":
        from thin.postgresql import ThinPostgreSQL

        return ThinPostgreSQL(url, size)
    if engine.startswith("mysql"):
        from thin.mysql import ThinMySQL

        return ThinMySQL(url, size, _mysql(engine).client_library)
    if engine == "mongodb":
        from thin.mongodb import ThinMongoDB

        return ThinMongoDB(url, size)
    from thin.redis import ThinRedis

    return ThinRedis(url, size, cluster=engine == "redis_cluster")
