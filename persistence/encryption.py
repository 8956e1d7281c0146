"""A driver around a driver: values are encrypted before they leave the process (extra `encryption`).

AES-256-GCM of the `cryptography` package, with a random 96-bit nonce a value.
A value is bound to its partition and key, so that nobody who can write to the
store can pass one entry off as another; that he puts an old value back in its
own place is not noticed. It is not bound to its store or namespace: those that
share a key can be given each other's values, so each tenant needs its own.
Partitions and keys stay as they are, and with them the ids and names in them,
times, sizes and versions.

Stored: one byte 1, four bytes that tell the key (the beginning of its
SHA-256), the nonce, the ciphertext with its tag. With random nonces one key is
good for about 2**32 values (NIST SP 800-38D, 8.3): rotate it before that.

A store is encrypted from its beginning or not at all: one entry, the *seal*,
tells who opens it with other keys, or with none, before anything is written.

The command reads keys, in base64 and separated by commas, from the environment
variable PERSISTENCE_KEYS.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from typing import Final

from persistence.connect import checked_driver, driver_from_url
from persistence.driver import ABSENT, Driver, Entry, Key, Op, Page, Put, Write
from persistence.errors import ConfigurationError, CorruptRecordError, UnavailableError
from persistence.ids import random_version
from persistence.options import missing_client
from persistence.store import ENCRYPTED, SEAL

try:
    from cryptography.exceptions import InvalidTag
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM
except ImportError as error:
    raise missing_client("encryption", "cryptography") from error

__all__ = ["EncryptedDriver", "encrypted"]

KEY_BYTES: Final = 32

_HEAD = 5
_NONCE = 12


class EncryptedDriver:
    """The driver `driver`, or the one that an URL names, its values encrypted.

    `keys` are 32 random bytes each (``secrets.token_bytes(32)``): the first
    encrypts, all decrypt. To rotate, give all processes the old key and the
    new one first, then the new one and the old. A value is encrypted anew when
    it is written: keep the old key as long as anything written with it is there.
    """

    def __init__(self, driver: Driver | str, *keys: bytes) -> None:
        if not keys or not all(isinstance(key, bytes) and len(key) == KEY_BYTES for key in keys):
            message = f"encrypted() needs one or more keys of {KEY_BYTES} bytes"
            raise ConfigurationError(message)
        self._driver = driver_from_url(driver) if isinstance(driver, str) else checked_driver(driver)
        self._ciphers = {_name(key): AESGCM(key) for key in keys}
        self._head = ENCRYPTED + _name(keys[0])
        self._cipher = self._ciphers[_name(keys[0])]
        self.lanes: int = getattr(self._driver, "lanes", 1)
        self.any_loop: bool = getattr(self._driver, "any_loop", False)

    @property
    def may_lose(self) -> bool:
        """See `Driver`."""
        return getattr(self._driver, "may_lose", False)

    def __repr__(self) -> str:
        return f"encrypted({self._driver!r})"

    async def open(self) -> None:
        await self._driver.open()
        try:
            await self._check_keys()
        except BaseException:
            await self._driver.close()
            raise

    async def _check_keys(self) -> None:
        """Refuse a store that was begun with other keys, or with none; an empty one becomes ours."""
        name = self._head[1:].hex().encode()
        try:
            found = await self._seal()
            if found is None:
                await self._check_first_value()
            if found is None or found.value != name:  # new, or the keys are being rotated
                expect = ABSENT if found is None else found.version
                await self.commit([Write(SEAL.partition, (Put(SEAL.key, name, expect),), random_version())])
                if await self._seal() is None:  # there may be another's, with a key of his own
                    message = f"{self._driver!r}: the seal of the store could not be written"
                    raise UnavailableError(message)
        except CorruptRecordError as error:
            message = f"{self._driver!r} is encrypted, and with none of the keys given"
            raise ConfigurationError(message) from error

    async def _seal(self) -> Entry | None:
        [entry] = await self._driver.get([SEAL])
        return None if entry is None else self._decrypted(SEAL.partition, entry)

    async def _check_first_value(self) -> None:
        # There may be one: the seal, put meanwhile, or what was encrypted before there were seals.
        names, cursor = await self._driver.partitions(None, 1)
        while not names and cursor is not None:
            names, cursor = await self._driver.partitions(cursor, 1)
        for name in names:
            for entry in (await self._driver.scan(name, "", None, limit=1)).entries:
                if not entry.value.startswith(ENCRYPTED):
                    message = (
                        f"{self._driver!r} holds values that are not encrypted: begin with an empty store"
                    )
                    raise ConfigurationError(message)
                self._decrypted(name, entry)

    async def close(self) -> None:
        await self._driver.close()

    async def get(self, keys: Sequence[Key]) -> list[Entry | None]:
        entries = await self._driver.get(keys)
        return [
            None if entry is None else self._shown(key.partition, entry)
            for key, entry in zip(keys, entries, strict=True)
        ]

    async def scan(
        self, partition: str, start: str, end: str | None, *, limit: int, reverse: bool = False
    ) -> Page:
        page = await self._driver.scan(partition, start, end, limit=limit, reverse=reverse)
        return Page([self._shown(partition, entry) for entry in page.entries], page.more)

    async def commit(self, writes: Sequence[Write]) -> list[bool | None]:
        return await self._driver.commit(
            [
                write._replace(ops=tuple(self._encrypted(write.partition, op) for op in write.ops))
                for write in writes
            ]
        )

    async def purge(self, partition: str, start: str, end: str | None) -> None:
        await self._driver.purge(partition, start, end)

    async def partitions(self, cursor: str | None, limit: int) -> tuple[list[str], str | None]:
        names, cursor = await self._driver.partitions(cursor, limit)
        return [name for name in names if name != SEAL.partition], cursor

    def _encrypted(self, partition: str, op: Op) -> Op:
        if not isinstance(op, Put):
            return op
        nonce = os.urandom(_NONCE)
        sealed = self._cipher.encrypt(nonce, op.value, _place(partition, op.key))
        return op._replace(value=self._head + nonce + sealed)

    def _shown(self, partition: str, entry: Entry) -> Entry:
        try:
            return self._decrypted(partition, entry)
        except CorruptRecordError:  # must not hide the others: the core finds that this is no JSON
            return entry._replace(value=ENCRYPTED)

    def _decrypted(self, partition: str, entry: Entry) -> Entry:
        value = entry.value
        cipher = self._ciphers.get(value[1:_HEAD])
        if cipher is None or not value.startswith(ENCRYPTED):
            message = "not encrypted with any of the keys given"
            raise CorruptRecordError(message, partition=partition, key=entry.key)
        nonce, sealed = value[_HEAD : _HEAD + _NONCE], value[_HEAD + _NONCE :]
        try:
            return entry._replace(value=cipher.decrypt(nonce, sealed, _place(partition, entry.key)))
        except (InvalidTag, ValueError) as error:
            message = "the encrypted value was changed, or belongs elsewhere"
            raise CorruptRecordError(message, partition=partition, key=entry.key) from error


encrypted = EncryptedDriver


def _name(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()[:4]


def _place(partition: str, key: str) -> bytes:
    return f"{partition} {key}".encode()  # neither holds a blank
