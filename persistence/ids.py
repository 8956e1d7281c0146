"""Times, and new ids: UUID version 7, strictly rising within a process.

RFC 9562, section 6.2, method 1 with a counter: 48 bits of Unix milliseconds,
12 bits that start at a random number below 2**11 and count up within a
millisecond, 62 random bits. When the counter is used up or the clock steps
back, the id runs on from the last one, a millisecond ahead if need be.
"""

from __future__ import annotations

import os
import random
import secrets
import threading
import time
import uuid
from collections.abc import Callable
from datetime import UTC, datetime, timedelta, tzinfo
from math import isfinite
from typing import Any

from persistence.errors import InvalidValueError, shown

__all__ = [
    "Clock",
    "IdFactory",
    "as_ms",
    "lifetime_ms",
    "new_id",
    "now_ms",
    "random_version",
    "shown_time",
    "steady_seconds",
]

_INT64 = 1 << 63
_LONGEST = 10**11  # seconds; some 3,000 years
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)

_MAX_MS = 0xFFFF_FFFF_FFFE  # one less than fits: the counter may carry

Clock = Callable[[], int]
"""Gives Unix time in milliseconds."""


def now_ms() -> int:
    """Return Unix time in milliseconds."""
    return time.time_ns() // 1_000_000


# Time asleep counts too where the system can tell it: what is remembered must
# not be taken for young because the machine was suspended.
if hasattr(time, "CLOCK_BOOTTIME"):

    def steady_seconds() -> float:
        """Return seconds by a clock that nobody sets."""
        return time.clock_gettime(time.CLOCK_BOOTTIME)

else:
    steady_seconds = time.monotonic


def as_ms(value: Any, what: str) -> int:
    """Return a time in Unix milliseconds: given as such, or as a datetime.

    Raises `InvalidValueError`, also for a datetime without a time zone, which
    could be meant to be local or in UTC.
    """
    if isinstance(value, datetime):
        if value.tzinfo is None:
            message = f"{what}={shown(value)}: say in which time zone, for instance datetime.now(UTC)"
            raise InvalidValueError(message)
        return (value - _EPOCH) // timedelta(milliseconds=1)
    if type(value) is bool or not (isinstance(value, int) or (isinstance(value, float) and isfinite(value))):
        message = f"{what}={shown(value)}: use Unix milliseconds, or a datetime"
        raise InvalidValueError(message)
    whole = int(value // 1)
    if not -_INT64 <= whole < _INT64:
        message = f"{what}={shown(value)}: use milliseconds within 64 bits"
        raise InvalidValueError(message)
    return whole


def lifetime_ms(seconds: float, what: str) -> int:
    """Return so many seconds, how long something stays, in milliseconds. Raises `InvalidValueError`."""
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 < seconds <= _LONGEST:
        message = f"{what}: use seconds, more than 0 and at most {_LONGEST:,}"
        raise InvalidValueError(message)
    return max(1, round(seconds * 1000))


def shown_time(milliseconds: int, zone: tzinfo | None = None) -> str:
    """Return a time as text, in a zone or the system's; just the number where no calendar has its year."""
    try:
        return f"{datetime.fromtimestamp(milliseconds / 1000, zone):%Y-%m-%d %H:%M:%S}"
    except (ValueError, OverflowError, OSError):
        return f"{milliseconds} ms"


class IdFactory:
    """Makes ids that rise, whatever the clock does. Safe for threads."""

    def __init__(self, clock: Clock = now_ms) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._last = 0  # milliseconds and counter of the last id, 60 bits

    def __call__(self) -> str:
        """Return a new id: 36 characters, lower case, sorting after every earlier one."""
        fresh = min(max(int(self._clock()), 0), _MAX_MS) << 12 | secrets.randbits(11)
        with self._lock:
            # Within a millisecond, and while the clock lags behind, count up;
            # an overflow carries into the milliseconds by itself.
            self._last = stamp = fresh if fresh >> 12 > self._last >> 12 else self._last + 1
        number = (stamp >> 12) << 80 | 7 << 76 | (stamp & 0xFFF) << 64 | 2 << 62 | secrets.randbits(62)
        return str(uuid.UUID(int=number))


new_id = IdFactory()
"""Makes the ids of this library: monotonic UUIDv7 as text."""


def random_version() -> int:
    """Return the version of a new Write: 62 random bits, never 0."""
    return _random.getrandbits(62) or 1


# Versions need not be hard to guess, only to meet: a generator of our own, seeded by the system,
# takes a tenth of the time that the system does. A forked child must not go on as its parent does.
_random = random.Random()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_random.seed)
