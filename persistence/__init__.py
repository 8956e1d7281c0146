"""Persistence for AI agents: one interface, the same behaviour on every store.

async with create_persistence("sqlite:///agents.db") as p:
    await p.sessions.add_message("s1", {"role": "user", "content": "hello"})
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from persistence.checkpoints import Checkpoint, CheckpointMeta, ThreadMeta
from persistence.collection import Listing
from persistence.connect import Persistence, create_persistence
from persistence.errors import (
    ConfigurationError,
    ConflictError,
    CorruptRecordError,
    InvalidKeyError,
    InvalidValueError,
    NotFoundError,
    OutcomeUnknownError,
    PersistenceError,
    UnavailableError,
)
from persistence.ids import new_id
from persistence.records import (
    ContainerRecord,
    ImageRecord,
    LLMProviderRecord,
    PrototypeRecord,
    SessionRecord,
)
from persistence.repositories import Deleted, StoredMessage
from persistence.streams import StreamMeta

if TYPE_CHECKING:
    from persistence.drivers import filesystem_driver, memory_driver, sqlite_driver
    from persistence.drivers import mongodb_driver as mongodb_driver
    from persistence.drivers import mysql_driver as mysql_driver
    from persistence.drivers import postgresql_driver as postgresql_driver
    from persistence.drivers import redis_driver as redis_driver

__version__ = "0.1.0"


__all__ = [
    "Checkpoint",
    "CheckpointMeta",
    "ConfigurationError",
    "ConflictError",
    "ContainerRecord",
    "CorruptRecordError",
    "Deleted",
    "ImageRecord",
    "InvalidKeyError",
    "InvalidValueError",
    "LLMProviderRecord",
    "Listing",
    "NotFoundError",
    "OutcomeUnknownError",
    "Persistence",
    "PersistenceError",
    "PrototypeRecord",
    "SessionRecord",
    "StoredMessage",
    "StreamMeta",
    "ThreadMeta",
    "UnavailableError",
    "create_persistence",
    "filesystem_driver",
    "memory_driver",
    "new_id",
    "sqlite_driver",
]


def __getattr__(name: str) -> Any:
    # A driver's file, and with it its client library, is imported when it is asked for.
    if name.endswith("_driver"):
        from persistence import drivers

        if name in drivers.__all__:
            return getattr(drivers, name)
    message = f"module {__name__!r} has no attribute {name!r}"
    raise AttributeError(message)


def __dir__() -> list[str]:
    from persistence import drivers

    return sorted({*globals(), *drivers.__all__})
