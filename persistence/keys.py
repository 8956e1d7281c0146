"""Names: any text that a user can type becomes a legal part of a partition or key, and never meets another.

Letters, digits and ``_ . : @ + -`` stand for themselves, every other byte of
the UTF-8 form is written ``%2F``, the empty text is ``%``. A form longer than
200 characters becomes its first 135, ``~`` and its SHA-256; ``~`` is found in
no other form, and the true id stands in the record.
"""

from __future__ import annotations

import functools
import hashlib
import re
from urllib.parse import quote

from persistence.errors import CorruptRecordError, InvalidKeyError

__all__ = [
    "MAX_ID_BYTES",
    "MAX_NUMBER",
    "after",
    "encode_id",
    "key_number",
    "newest_first",
    "number_key",
    "prefix_end",
]

MAX_ID_BYTES = 1 << 16
"""The longest id, in bytes of UTF-8."""
MAX_NUMBER = 10**12 - 1
"""The greatest number in a key: all have twelve digits, so that they sort."""

_MAX_ENCODED = 200
_PLAIN = re.compile(r"[A-Za-z0-9_.:@+-]{1,200}")


def encode_id(id: str, what: str = "id") -> str:
    """Return the form of `id` that stands in partitions and keys, 1 to 200 characters.

    Raises `InvalidKeyError` for anything but a text, for a text that is no
    valid Unicode, and for one of more than `MAX_ID_BYTES`.
    """
    if not isinstance(id, str):
        message = f"{what} must be a text, not {type(id).__name__}"
        raise InvalidKeyError(message)
    if _PLAIN.fullmatch(id):
        return str.__str__(id)  # a member of a `str, Enum` would show itself as "Color.RED"
    if len(id) <= _MAX_ENCODED:
        return _quoted(id, what)
    return _quoted.__wrapped__(id, what)


@functools.lru_cache(4096)  # names with spaces, say, come again and again
def _quoted(id: str, what: str) -> str:
    try:
        raw = id.encode()
    except UnicodeEncodeError as error:
        message = f"{what} holds half a surrogate pair at character {error.start}: no valid Unicode"
        raise InvalidKeyError(message) from error
    if len(raw) > MAX_ID_BYTES:
        message = f"{what} has {len(raw):,} bytes; the limit is {MAX_ID_BYTES:,}"
        raise InvalidKeyError(message)
    encoded = quote(raw, safe=":@+").replace("~", "%7E") or "%"
    if len(encoded) > _MAX_ENCODED:
        return f"{encoded[: _MAX_ENCODED - 65]}~{hashlib.sha256(raw).hexdigest()}"
    return encoded


def number_key(prefix: str, number: int) -> str:
    """Return the key of entry `number` of a sequence: the keys sort as the numbers do."""
    return f"{prefix}{number:012d}"


def key_number(partition: str, prefix: str, key: str) -> int:
    """Return the number that `number_key` put after `prefix`; raise `CorruptRecordError` if there is none."""
    try:
        return int(key[len(prefix) :])
    except ValueError as error:
        message = "the key ends in no number"
        raise CorruptRecordError(message, partition=partition, key=key) from error


def newest_first(created_at: int) -> str:
    """Return 20 digits that sort the later time (signed 64-bit milliseconds) first."""
    return f"{(1 << 63) - 1 - created_at:020d}"


def prefix_end(prefix: str) -> str:
    """Return the first text after all that start with `prefix`, which ends in a slash."""
    return f"{prefix[:-1]}0"  # "0" follows "/"


def after(key: str) -> str:
    """Return the first text that sorts after `key`: "!" is the smallest character of a key."""
    return f"{key}!"
