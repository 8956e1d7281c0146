"""What leaves the process is encrypted, comes back, and cannot be exchanged."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Sequence
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
from persistence.driver import Key, Put, Write
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


@pytest.mark.parametrize("change", ["moved", "flipped", "cut", "clear"])
async def test_a_changed_or_moved_value_is_corrupt(change: str) -> None:
    inner = memory_driver()
    driver = EncryptedDriver(inner, KEY)
    await driver.commit([Write("p", (Put("a", b"1"), Put("b", b"2")), 5)])
    (entry,) = await inner.get([Key("p", "a")])
    assert entry is not None
    value = {
        "moved": entry.value,
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


@pytest.mark.parametrize("keys", [(), (b"short",), ("x" * 32,), (KEY, b"")])
def test_a_bad_key_is_refused_and_not_shown(keys: tuple[bytes, ...]) -> None:
    with pytest.raises(ConfigurationError) as caught:
        encrypted(memory_driver(), *keys)
    assert "short" not in str(caught.value)


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
