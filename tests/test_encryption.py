"""What leaves the process is encrypted, comes back, and cannot be exchanged."""

from __future__ import annotations

import asyncio
import secrets
import sqlite3
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import pytest

from persistence import (
    ConfigurationError,
    CorruptRecordError,
    LLMProviderRecord,
    SessionRecord,
    UnavailableError,
    create_persistence,
    filesystem_driver,
    memory_driver,
    sqlite_driver,
)
from persistence.driver import Entry, Key, Put, Write
from persistence.drivers.memory import MemoryDriver
from persistence.encryption import EncryptedDriver, encrypted
from persistence.store import ENCRYPTED, SEAL
from persistence.testing import DriverConformance, MakeDriver

KEY, NEW_KEY = secrets.token_bytes(32), secrets.token_bytes(32)


class TestEncryptedDriver(DriverConformance):
    @pytest.fixture
    def make_driver(self) -> MakeDriver:
        driver = encrypted(memory_driver(), KEY)
        return lambda: driver


def test_an_url_does_as_well_as_a_driver_and_nothing_else_does() -> None:
    assert repr(encrypted("memory://", KEY)) == repr(encrypted(memory_driver(), KEY))
    with pytest.raises(ConfigurationError):
        encrypted(object(), KEY)  # type: ignore[arg-type]


async def test_an_api_key_is_nowhere_in_the_store() -> None:
    inner = memory_driver()
    provider = LLMProviderRecord(
        id="p", container_id="c", name="n", vendor="v", protocol="openai", api_key="sk-secret"
    )
    async with create_persistence(encrypted(inner, KEY)) as p:
        await p.llm_providers.save_llm_provider(provider)
        assert await p.llm_providers.find_llm_provider_by_id("p") == provider
        names, _ = await inner.partitions(None, 100)
        for name in names:
            for entry in (await inner.scan(name, "", None, limit=100)).entries:
                assert b"sk-secret" not in entry.value
                assert b'"f":1' not in entry.value


async def test_a_new_key_in_front_reads_what_the_old_one_wrote() -> None:
    inner = memory_driver()
    async with create_persistence(encrypted(inner, KEY)) as p:
        await p.sessions.add_message("s", {"n": 1})
    async with create_persistence(encrypted(inner, NEW_KEY, KEY)) as p:
        await p.sessions.add_message("s", {"n": 2})
        assert await p.sessions.get_messages("s") == [{"n": 1}, {"n": 2}]
    async with create_persistence(encrypted(inner, NEW_KEY)) as p:
        with pytest.raises(CorruptRecordError, match="any of the keys"):
            await p.sessions.get_messages("s")


async def test_no_nonce_is_used_twice() -> None:
    inner = memory_driver()
    ops = tuple(Put(f"{n:03}", b"the same") for n in range(100))
    await EncryptedDriver(inner, KEY).commit([Write("p", ops, 5), Write("q", ops, 5)])
    entries = [entry for name in "pq" for entry in (await inner.scan(name, "", None, limit=100)).entries]
    assert len({entry.value[5:17] for entry in entries}) == 200


@pytest.mark.parametrize("change", ["moved", "moved far", "flipped", "cut", "clear"])
async def test_a_changed_or_moved_value_is_corrupt(change: str) -> None:
    inner = memory_driver()
    driver = EncryptedDriver(inner, KEY)
    await driver.commit([Write("p", (Put("a", b"1"), Put("b", b"2")), 5), Write("q", (Put("b", b"3"),), 5)])
    entry, far = await inner.get([Key("p", "a"), Key("q", "b")])
    assert entry is not None
    assert far is not None
    value = {
        "moved": entry.value,
        "moved far": far.value,  # to the same key of another partition
        "flipped": entry.value[:-1] + bytes([entry.value[-1] ^ 1]),
        "cut": entry.value[:-1],
        "clear": b"1",
    }[change]
    await inner.commit([Write("p", (Put("b", value),), 6)])
    (found,) = await driver.get([Key("p", "b")])
    assert found is not None
    assert found.value == ENCRYPTED  # no JSON: the core refuses it, and may delete it


async def test_what_cannot_be_decrypted_is_corrupt_and_can_be_deleted() -> None:
    inner = memory_driver()
    async with create_persistence(encrypted(inner, KEY)) as p:
        await p.sessions.save_session(SessionRecord(session_id="s", image_id="i", container_id="c"))
        await p.checkpoints.put("t", {"messages": [{"content": f"{n}" * 900} for n in range(9)]})
    async with create_persistence(encrypted(inner, NEW_KEY, KEY)):
        pass
    async with create_persistence(encrypted(inner, NEW_KEY)) as p:
        with pytest.raises(CorruptRecordError, match="not decrypted") as caught:
            await p.sessions.find_session_by_id("s")
        assert (caught.value.partition, caught.value.key) == ("session/s", "record")
        assert await p.sessions.delete_session("s")
        assert await p.sessions.find_session_by_id("s") is None


async def test_a_piece_that_cannot_be_decrypted_is_not_copied() -> None:
    inner = memory_driver()
    async with create_persistence(encrypted(inner, KEY)) as p:
        await p.checkpoints.put("t", {"messages": [{"content": f"{n}" * 900} for n in range(9)]})
        held = inner._partitions["thread/t"].entries
        key = max(key for key in held if key.startswith("piece/"))
        held[key] = held[key]._replace(value=held[key].value[:-1])
        with pytest.raises(CorruptRecordError, match="not decrypted"):
            await p.checkpoints.copy_thread("t", "u")


async def test_many_may_begin_an_encrypted_store_at_once(tmp_path: Path) -> None:
    async def begin() -> None:
        async with create_persistence(encrypted(filesystem_driver(tmp_path), KEY)) as p:
            await p.sessions.add_message("s", {})

    await asyncio.gather(*(begin() for _ in range(32)))


async def test_what_was_encrypted_before_there_were_seals_opens_with_its_key() -> None:
    inner = memory_driver()
    async with create_persistence(encrypted(inner, KEY)) as p:
        await p.sessions.add_message("s", {"n": 1})
    await inner.purge(*SEAL, None)
    with pytest.raises(ConfigurationError, match="none of the keys"):
        await create_persistence(encrypted(inner, NEW_KEY))
    async with create_persistence(encrypted(inner, KEY)) as p:
        assert await p.sessions.get_messages("s") == [{"n": 1}]
    assert await inner.get([SEAL]) != [None]


async def test_a_seal_that_could_not_be_written_is_told() -> None:
    class Lossy(MemoryDriver):
        async def commit(self, writes: Sequence[Write]) -> list[bool | None]:
            return [None] * len(writes)

    with pytest.raises(UnavailableError):
        await create_persistence(encrypted(Lossy(), KEY))


class _Slow(MemoryDriver):
    """Lets others go first, counts who has it open, and begins its partitions with an empty page."""

    def __init__(self) -> None:
        super().__init__()
        self.opened = self.commits = 0
        self.may_lose = False

    async def open(self) -> None:
        self.opened += 1

    async def close(self) -> None:
        self.opened -= 1

    async def get(self, keys: Sequence[Key]) -> list[Entry | None]:
        await asyncio.sleep(0)
        return await super().get(keys)

    async def commit(self, writes: Sequence[Write]) -> list[bool | None]:
        self.commits += 1
        await asyncio.sleep((self.commits - 1) / 100)
        return await super().commit(writes)

    async def partitions(self, cursor: str | None, limit: int) -> tuple[list[str], str | None]:
        return ([], "") if cursor is None else await super().partitions(cursor, limit)


async def test_of_two_who_begin_a_store_with_different_keys_one_is_refused() -> None:
    inner = _Slow()
    opened = [encrypted(inner, KEY), encrypted(inner, NEW_KEY)]
    outcomes = await asyncio.gather(*(driver.open() for driver in opened), return_exceptions=True)
    assert sorted(map(type, outcomes), key=repr) == [type(None), ConfigurationError]
    await opened[outcomes.index(None)].open()


async def test_a_store_that_is_refused_is_closed_again() -> None:
    inner = _Slow()
    await inner.commit([Write("p", (Put("a", b"clear"),), 5)])
    with pytest.raises(ConfigurationError, match="not encrypted"):
        await encrypted(inner, KEY).open()
    assert inner.opened == 0


def test_what_an_encrypted_store_may_lose_is_what_its_driver_may() -> None:
    inner = _Slow()
    driver = encrypted(inner, KEY)
    assert not driver.may_lose
    inner.may_lose = True  # found out when it opens
    assert driver.may_lose
    assert not encrypted(memory_driver(), KEY).may_lose


@pytest.mark.parametrize("keys", [(), (b"short",), ("x" * 32,), (KEY, b"")])
def test_a_bad_key_is_refused_and_not_shown(keys: tuple[bytes, ...]) -> None:
    with pytest.raises(ConfigurationError) as caught:
        encrypted(memory_driver(), *keys)
    assert "short" not in str(caught.value)


async def test_a_store_that_cannot_be_opened_without_keys_is_closed_again() -> None:
    class Counting(MemoryDriver):
        closed = 0

        async def close(self) -> None:
            self.closed += 1

    driver = Counting()
    async with create_persistence(encrypted(driver, b"k" * 32)):
        assert driver.closed == 0
    assert driver.closed == 1
    with pytest.raises(ConfigurationError, match="is encrypted"):
        await create_persistence(driver)
    assert driver.closed == 2


async def test_a_process_with_another_key_or_none_writes_nothing(tmp_path: Path) -> None:
    path, key = tmp_path / "store.db", b"k" * 32
    async with create_persistence(encrypted(sqlite_driver(path), key)) as p:
        await p.sessions.save_session(SessionRecord(session_id="s", image_id="i", container_id="c"))
    with pytest.raises(ConfigurationError, match="none of the keys"):
        await create_persistence(encrypted(sqlite_driver(path), b"x" * 32))
    with pytest.raises(ConfigurationError, match="is encrypted"):
        await create_persistence(sqlite_driver(path))
    for keys in ([b"n" * 32, key], [b"n" * 32]):  # rotated
        async with create_persistence(encrypted(sqlite_driver(path), *keys)) as p:
            await p.sessions.save_session(SessionRecord(session_id="s", image_id="i", container_id="c"))


async def test_keys_do_not_encrypt_a_store_that_was_begun_without(tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    async with create_persistence(sqlite_driver(path)) as p:
        await p.sessions.add_message("s", {"role": "user"})
    with pytest.raises(ConfigurationError, match="not encrypted"):
        await create_persistence(encrypted(sqlite_driver(path), b"k" * 32))
    async with create_persistence(sqlite_driver(path)) as p:
        assert await p.sessions.get_messages("s") == [{"role": "user"}]


async def test_a_checkpoint_that_was_tampered_with_hides_no_other() -> None:
    memory = memory_driver()
    async with create_persistence(encrypted(memory, b"k" * 32)) as p:
        metas = [await p.checkpoints.put("t", {"n": n}) for n in range(4)]
        held = memory._partitions["thread/t"].entries
        key = min(key for key in held if key.startswith("checkpoint/"))
        held[key] = held[key]._replace(value=held[key].value[:-1] + b"\0")
    async with create_persistence(encrypted(memory, b"k" * 32)) as p:
        assert len(await p.checkpoints.list("t")) == 4
        assert await p.checkpoints.delete("t", metas[0].id) == 1


@pytest.mark.parametrize("shared", [False, True])
async def test_a_key_for_each_namespace_keeps_their_entries_apart(tmp_path: Path, shared: bool) -> None:
    path = tmp_path / "x.db"
    keys = {"a": KEY, "b": KEY if shared else NEW_KEY}

    def of(namespace: str) -> EncryptedDriver:
        return encrypted(sqlite_driver(path, namespace=namespace), keys[namespace])

    for namespace in keys:
        async with create_persistence(of(namespace)) as p:
            await p.sessions.add_message("s", {"of": namespace})
    with closing(sqlite3.connect(path)) as db, db:
        db.execute("DELETE FROM persistence WHERE p = 'b/session/s'")
        db.execute("UPDATE persistence SET p = 'b/session/s' WHERE p = 'a/session/s'")
    async with create_persistence(of("b")) as p:
        if shared:  # as the documentation says
            assert await p.sessions.get_messages("s") == [{"of": "a"}]
        else:
            with pytest.raises(CorruptRecordError):
                await p.sessions.get_messages("s")
