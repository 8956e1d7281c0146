"""What all tests share: real servers, real conversations, and a guard against blocking the event loop."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import servers
from blockbuster import BlockBuster, BlockBusterFunction

import persistence

pytest_plugins = ["stores"]

HERE = Path(__file__).parent
INSTALLED = Path(persistence.__file__).parent
SERVERS_REQUIRED = (
    os.environ.get("CI", "").lower() not in ("", "0", "false")
    or os.environ.get("PERSISTENCE_TEST_REQUIRE") == "all"
)


def pytest_configure() -> None:
    # `make test` proves the wheel; the checkout's folder beside it must not stand in for it.
    if os.environ.get("PERSISTENCE_TEST_WHEEL") and Path(HERE.parent, "persistence") == INSTALLED:
        raise pytest.UsageError(f"the tests import {INSTALLED}, not the installed package")


def pytest_report_header() -> str:
    return f"persistence: {INSTALLED}"


def pytest_unconfigure() -> None:
    servers.close()


# A missing server is a skip for one who tries the library out, and a failure where the tests must prove it.


@contextmanager
def _skipped_where_servers_may_be_missing() -> Iterator[None]:
    try:
        yield
    except servers.NotAvailable as missing:
        if SERVERS_REQUIRED:
            raise
        pytest.skip(str(missing))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup() -> Generator[None, None, None]:
    with _skipped_where_servers_may_be_missing():
        yield


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Generator[None, None, None]:
    with _skipped_where_servers_may_be_missing():
        yield


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    # A skip nobody sees is a driver nobody tests.
    missing = {
        str(report.longrepr[2]).removeprefix("Skipped: ")
        for report in terminalreporter.stats.get("skipped", [])
        if isinstance(report.longrepr, tuple) and " NOT TESTED: " in str(report.longrepr[2])
    }
    if missing:
        terminalreporter.section("engines that were NOT tested", yellow=True)
        for line in sorted(missing):
            terminalreporter.line(line)


@pytest.fixture(scope="session")
def server() -> Callable[[str], servers.Server]:
    """Look up the shared server of an engine: ``server("redis").url``."""
    return servers.get


@pytest.fixture
def own_server() -> Iterator[Callable[..., servers.LocalServer | servers.RedisCluster]]:
    """Start a server for this test alone: ``own_server("redis", password="secret")``."""
    started: list[servers.LocalServer | servers.RedisCluster] = []

    def start(engine: str, **options: Any) -> servers.LocalServer | servers.RedisCluster:
        started.append(servers.own(engine, **options))
        return started[-1]

    yield start
    for one in started:
        one.kill()


@pytest.fixture(scope="session")
def conversations() -> list[dict[str, Any]]:
    """Conversations of an agent; ``PERSISTENCE_TEST_CONVERSATIONS`` may name a larger file of them."""
    path = Path(os.environ.get("PERSISTENCE_TEST_CONVERSATIONS") or HERE / "data" / "conversations.jsonl")
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


# Code of ours that blocks the event loop fails the test. What runs in a thread may block.


@pytest.fixture(scope="session")
def _blockbuster() -> BlockBuster:
    import persistence.drivers
    import persistence.testing

    ours, not_ours = [persistence, persistence.drivers], [persistence.testing]
    guard = BlockBuster(ours, excluded_modules=not_ours)
    # It leaves out what a log on disk is made of.
    for name in (
        "os.open",
        "os.pread",
        "os.pwrite",
        "os.fsync",
        "os.fdatasync",
        "os.ftruncate",
        "fcntl.flock",
    ):
        guard.functions[name] = BlockBusterFunction(
            None, name, scanned_modules=ours, excluded_modules=not_ours
        )
    # Short reads of SQLite are made where they are asked for, and moved away when they are slow.
    for name in guard.functions:
        if name.startswith("sqlite3."):
            guard.functions[name].can_block_in("drivers/sqlite.py", {"_at_once"})
    # What clients read from the disk when they connect, once, is not ours to change.
    for function in guard.functions.values():
        function.can_block_in("asyncpg/connect_utils.py", {"_parse_connect_arguments"})
        function.can_block_in("pymongo/pool_options.py", {"_metadata_env"})
        function.can_block_in("redis/utils.py", {"get_lib_version"})
    return guard


@pytest.fixture(autouse=True)
def _no_blocking(_blockbuster: BlockBuster) -> Iterator[None]:
    _blockbuster.activate()
    yield
    _blockbuster.deactivate()
