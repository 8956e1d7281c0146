"""How a test gets a driver of each engine. Not named `drivers`: that is the folder beside this one."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import NamedTuple
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

from servers import Server

from persistence.driver import Driver
from persistence.drivers.memory import MemoryDriver
from persistence.testing import MakeDriver


class Place(NamedTuple):
    """Where one test keeps its data."""

    folder: Path
    namespace: str
    server: Callable[[str], Server]
    """The fixture `server`: looks up the running server of an engine, starting it first if need be."""


class Engine(NamedTuple):
    """`make` returns a picklable factory: a child process builds the driver from it as well."""

    module: str
    make: Callable[[Place], MakeDriver]
    shared: bool = True
    """Whether separate driver objects, and so processes, share the data."""


def _memory(place: Place) -> MakeDriver:
    driver = MemoryDriver(namespace=place.namespace)
    return lambda: driver


def _filesystem(place: Place) -> MakeDriver:
    from persistence.drivers.filesystem import FilesystemDriver

    return partial(FilesystemDriver, place.folder / "store", namespace=place.namespace)


def _sqlite(place: Place) -> MakeDriver:
    from persistence.drivers.sqlite import SQLiteDriver

    return partial(SQLiteDriver, place.folder / "store.db", namespace=place.namespace)


def _on_server(module: str, engine: str = "", scheme: str = "") -> Engine:
    def make(place: Place) -> MakeDriver:
        parts = urlsplit(place.server(engine or module).url)
        query = urlencode([*parse_qsl(parts.query), ("namespace", place.namespace)])
        url = urlunsplit(parts._replace(scheme=scheme or parts.scheme, query=query))
        from_url: Callable[[str], Driver] = import_module(f"persistence.drivers.{module}").from_url
        return partial(from_url, url)

    return Engine(module, make)


ENGINES = {
    "memory": Engine("memory", _memory, shared=False),
    "filesystem": Engine("filesystem", _filesystem),
    "sqlite": Engine("sqlite", _sqlite),
    "postgresql": _on_server("postgresql"),
    "mysql": _on_server("mysql"),
    "redis": _on_server("redis"),
    "redis_cluster": _on_server("redis", "redis_cluster", "redis+cluster"),
    "mongodb": _on_server("mongodb"),
}
