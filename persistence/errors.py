"""Every error of this library, by what the caller does next.

PersistenceError
├── ConflictError         somebody else wrote first: read again, then decide
├── NotFoundError         the thing named does not exist, or was deleted
├── InvalidKeyError       an id, cursor or name that cannot be used: mend the call
├── InvalidValueError     a value that cannot be stored as given: mend the value
├── CorruptRecordError    what is stored cannot be read back; nothing was changed
├── UnavailableError      the store did not answer; nothing was changed, call again later
├── OutcomeUnknownError   the store did not answer; the change may or may not be there
└── ConfigurationError    an option, an URL, a missing extra, a misuse of the object

No message holds a password, a token or a stored value.
"""

from __future__ import annotations

__all__ = [
    "ConfigurationError",
    "ConflictError",
    "CorruptRecordError",
    "InvalidKeyError",
    "InvalidValueError",
    "NotFoundError",
    "OutcomeUnknownError",
    "PersistenceError",
    "UnavailableError",
    "shown",
]


class PersistenceError(Exception):
    """Base of the family. `partition` and `key` name the entry at fault where there is one.

    `stored` is set by calls that store a list batch by batch: how many of its
    items, from the first on, are known to be stored.
    """

    # Here too: a driver's own class may have an __init__ that does not call this one.
    partition: str | None = None
    key: str | None = None
    stored: int | None = None

    def __init__(
        self,
        message: str,
        *,
        partition: str | None = None,
        key: str | None = None,
        stored: int | None = None,
    ) -> None:
        super().__init__(message)
        self.partition = partition
        self.key = key
        self.stored = stored

    def __str__(self) -> str:
        message = super().__str__()
        if self.partition is not None:
            place = self.partition if self.key is None else f"{self.partition} · {self.key}"
            message = f"{message} [{place}]"
        if self.stored is not None:
            message = f"{message} ({self.stored} stored)"
        return message


class ConflictError(PersistenceError):
    """Somebody else wrote first: the expected version or number is no longer the present one."""


class NotFoundError(PersistenceError):
    """The thing named does not exist, or was deleted."""


class InvalidKeyError(PersistenceError):
    """An id, a cursor or a name that cannot be used."""


class InvalidValueError(PersistenceError):
    """A value that cannot be stored exactly: wrong type, out of range, too large."""


class CorruptRecordError(PersistenceError):
    """Stored bytes that cannot be read back. They are left as they are."""


class UnavailableError(PersistenceError):
    """The store did not answer in time; nothing was changed. The same call may work later.

    `unapplied` is for drivers: set on what a `commit` raises, it says that none
    of its Writes can have been applied.
    """

    unapplied: bool = False


class OutcomeUnknownError(PersistenceError):
    """The store did not answer in time; the change may have been made or not."""


class ConfigurationError(PersistenceError):
    """An option, an URL or an environment that cannot work, or an object used where it must not be."""


def shown(value: object) -> str:
    """Return a value that was refused as a message names it: its repr, 80 characters at most."""
    try:
        return f"{value!r:.80}"
    except Exception:  # a number has more digits than Python shows, or a repr of the caller's fails
        return f"a value of type {type(value).__name__}"
