"""From a driver or an URL to the repositories, and every way to get it wrong."""

from __future__ import annotations

import asyncio
import logging
import os
import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
from pymongo import MongoClient

import persistence
import persistence.drivers
from persistence import (
    ConfigurationError,
    Persistence,
    UnavailableError,
    create_persistence,
    memory_driver,
    sqlite_driver,
)
from persistence.connect import driver_from_url
from persistence.drivers.memory import MemoryDriver

HIDE_MODULE = """
import sys
class Hide:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == {hidden!r}:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Hide())
"""


def run(tmp_path: Path, script: str, *, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run a script in a folder where no checkout stands in for the installed package."""
    file = tmp_path / "script.py"
    file.write_text(script)
    env = os.environ | {"PYTHONPATH": str(path)} if path else os.environ
    return subprocess.run(
        [sys.executable, str(file)], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60
    )


async def test_a_driver_object_is_opened_and_closed() -> None:
    p = await create_persistence(memory_driver())
    await p.sessions.add_message("s", {"n": 1})
    await p.close()
    await p.close()
    with pytest.raises(ConfigurationError, match="closed"):
        await p.sessions.add_message("s", {"n": 2})
    async with create_persistence(memory_driver()) as q, q:
        assert isinstance(q, Persistence)


async def test_what_cannot_be_opened_is_closed_and_what_is_given_up_too() -> None:
    class Slow(MemoryDriver):
        def __init__(self, error: Exception | None) -> None:
            super().__init__()
            self.error = error
            self.opened = self.closed = 0

        async def open(self) -> None:
            await asyncio.sleep(0.01)
            self.opened += 1
            if self.error is not None:
                raise self.error

        async def close(self) -> None:
            self.closed += 1

    failing = Slow(UnavailableError("away"))
    with pytest.raises(UnavailableError):
        await create_persistence(failing)
    assert (failing.opened, failing.closed) == (1, 1)
    slow = Slow(None)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0):
            await create_persistence(slow)
    await asyncio.sleep(0.05)
    assert (slow.opened, slow.closed) == (1, 1)


@pytest.mark.parametrize(
    ("url", "file"),
    [("sqlite:///agents.db", "agents.db"), ("sqlite:////{tmp}/a%20b.db", "a b.db"), ("file:///{tmp}/d", "d")],
)
async def test_urls_lead_to_files(
    url: str, file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    url = url.format(tmp=str(tmp_path)[1:])
    async with create_persistence(url) as p:
        await p.sessions.add_message("s", {"n": 1})
    assert (tmp_path / file).exists()
    async with create_persistence(f"{url}?durability=process&create=no") as p:
        assert await p.sessions.get_messages("s") == [{"n": 1}]
    async with create_persistence(f"{url}?namespace=other") as p:
        assert await p.sessions.get_messages("s") == []


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("agents.db", ["agents.db", "sqlite://", "postgresql://"]),
        ("", ["is no URL", "memory://"]),
        ("oracle://x", ["oracle://", "memory://"]),
        ("sqlite:///x.db?durabilty=power", ["durabilty", "durability"]),
        ("sqlite:///x.db?durability=maybe", ["durability", "'power'"]),
        ("sqlite:///x.db?create=maybe", ["create", "maybe"]),
        ("sqlite:///x.db?namespace=a&namespace=b", ["namespace", "twice"]),
        ("sqlite:///x.db?namespace=a/b", ["namespace", "letters"]),
        ("sqlite://x.db", ["sqlite:///"]),
        ("sqlite:///", ["memory"]),
        ("memory://?path=x", ["path", "namespace"]),
        ("postgresql://u:secret@h:port/d", ["postgresql", "percent-encode"]),
        ("redis://u:secret@h/zero?db=x", []),
    ],
)
async def test_a_bad_url_names_the_part_and_what_there_is(url: str, words: list[str]) -> None:
    with pytest.raises(ConfigurationError) as caught:
        await create_persistence(url)
    for word in words:
        assert word in str(caught.value)
    assert "secret" not in str(caught.value)


async def test_what_is_no_driver_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"MemoryDriver\(…\)"):
        create_persistence(type(memory_driver()))  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="open, close, get"):
        create_persistence(object())  # type: ignore[arg-type]


async def test_the_environment_names_the_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PERSISTENCE_URL", f"sqlite:////{tmp_path}/env.db")
    async with create_persistence() as p:
        await p.sessions.add_message("s", {})
    assert (tmp_path / "env.db").exists()


async def test_without_any_store_one_warning_says_that_nothing_is_kept(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("PERSISTENCE_URL", raising=False)
    async with create_persistence() as p:
        await p.sessions.add_message("s", {})
    (record,) = caplog.records
    assert (record.name, record.levelno) == ("persistence", logging.WARNING)
    assert "nothing will be kept" in record.message


def test_another_event_loop_is_refused(tmp_path: Path) -> None:
    async def opened() -> Persistence:
        return await create_persistence(sqlite_driver(tmp_path / "x.db"))

    runner = asyncio.Runner()
    p = runner.run(opened())
    with pytest.raises(ConfigurationError, match="another event loop"):
        asyncio.run(p.sessions.add_message("s", {}))
    runner.run(p.close())
    runner.close()


def test_a_forked_child_is_refused(tmp_path: Path) -> None:
    script = """
import asyncio, os, persistence
async def main():
    async with persistence.create_persistence(persistence.memory_driver()) as p:
        await p.sessions.add_message("s", {})
        child = os.fork()
        if child == 0:
            try:
                await p.sessions.add_message("s", {})
            except persistence.ConfigurationError as error:
                os._exit(7 if "fork" in str(error) else 8)
            os._exit(9)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
asyncio.run(main())
"""
    result = run(tmp_path, script)
    assert result.returncode == 0, result.stderr


def test_a_third_party_plugs_in_by_being_installed(tmp_path: Path) -> None:
    (tmp_path / "site" / "tiny-1.dist-info").mkdir(parents=True)
    (tmp_path / "site" / "tiny-1.dist-info" / "METADATA").write_text("Name: tiny\nVersion: 1\n")
    (tmp_path / "site" / "tiny-1.dist-info" / "entry_points.txt").write_text(
        "[persistence.drivers]\ntiny = tiny:from_url\n"
    )
    (tmp_path / "site" / "tiny.py").write_text(
        "from persistence import memory_driver\n"
        "def from_url(url):\n"
        "    print(url)\n"
        "    return memory_driver()\n"
    )
    script = """
import asyncio, persistence
async def main():
    async with persistence.create_persistence("tiny://host/x?y=1") as p:
        await p.sessions.add_message("s", {})
asyncio.run(main())
"""
    result = run(tmp_path, script, path=tmp_path / "site")
    assert result.stdout == "tiny://host/x?y=1\n", result.stderr


@pytest.mark.parametrize(
    ("value", "fault"),
    [
        ("no_such_module:from_url", "cannot be imported: .*no_such_module"),
        ("os:no_such_function", "cannot be imported: .*no_such_function"),
        ("os", "is no callable"),
    ],
)
def test_a_third_partys_driver_that_cannot_be_imported_is_named(
    monkeypatch: pytest.MonkeyPatch, value: str, fault: str
) -> None:
    point = EntryPoint("tiny", value, "persistence.drivers")
    monkeypatch.setattr("importlib.metadata.entry_points", lambda group: [point])
    with pytest.raises(ConfigurationError, match=f"tiny:// URLs, {value}, {fault}"):
        driver_from_url("tiny://x")


def test_what_was_forgotten_to_be_awaited_is_told() -> None:
    with pytest.raises(AttributeError, match="await create_persistence"):
        create_persistence("memory://").sessions  # type: ignore[attr-defined]  # noqa: B018


def test_everything_can_be_imported_where_no_client_library_is() -> None:
    code = """
import sys
for name in ("aiomysql", "asyncmy", "asyncpg", "pymongo", "redis"):
    sys.modules[name] = None
from persistence import *
sqlite_driver
import persistence
assert "postgresql_driver" in dir(persistence)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_importing_brings_no_client_library_along(tmp_path: Path) -> None:
    script = """
import sys, persistence
heavy = {"aiosqlite", "redis", "pymongo", "aiomysql", "asyncmy", "asyncpg", "typer", "rich", "pytest",
         "hypothesis", "cryptography", "sqlite3", "drivers"}
print(sorted(heavy & set(sys.modules)))
"""
    assert run(tmp_path, script).stdout == "[]\n"


@pytest.mark.parametrize(
    ("hidden", "url", "extra"),
    [
        ("redis", "redis://localhost", "redis"),
        ("pymongo", "mongodb://localhost", "mongodb"),
        ("asyncpg", "postgresql://localhost", "postgresql"),
    ],
)
def test_a_missing_client_gives_the_exact_pip_command(
    hidden: str, url: str, extra: str, tmp_path: Path
) -> None:
    script = f"""{HIDE_MODULE.format(hidden=hidden)}
import asyncio, persistence
async def main():
    await persistence.create_persistence({url!r})
asyncio.run(main())
"""
    result = run(tmp_path, script)
    assert f"ConfigurationError: the {extra} driver needs the package" in result.stderr
    assert f"pip install 'agent-persistence[{extra}]'" in result.stderr


@pytest.mark.parametrize("name", ["postgresql", "mysql", "redis", "mongodb"])
def test_what_is_no_client_of_the_right_kind_is_told_at_once(name: str) -> None:
    driver = getattr(persistence.drivers, f"{name}_driver")
    wrong: object = MongoClient(connect=False) if name == "mongodb" else object()  # one that does not await
    with pytest.raises(ConfigurationError, match="client must be"):
        driver(client=wrong)
    with pytest.raises(ConfigurationError, match="client=…"):
        driver(wrong)


@pytest.mark.parametrize("name", ["redis", "mongodb"])
def test_an_address_beside_an_url_is_refused(name: str) -> None:
    driver = getattr(persistence.drivers, f"{name}_driver")
    for address in ({"host": "elsewhere"}, {"port": 1}):
        with pytest.raises(ConfigurationError, match="without an URL"):
            driver(f"{name}://localhost", **address)
    assert repr(driver(host="::1", port=1)).startswith(f"{name}_driver('{name}://[::1]:1'")


def test_all_names_exist() -> None:
    for name in persistence.__all__:
        assert getattr(persistence, name).__doc__
    with pytest.raises(AttributeError):
        _ = persistence.nothing
