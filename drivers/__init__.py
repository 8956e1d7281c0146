"""The drivers, one file each. A driver's client library is imported with its file, not before.

A module that begins with ``_`` is the lower half of one, and not imported by anything else.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from persistence.drivers.filesystem import filesystem_driver
    from persistence.drivers.memory import memory_driver
    from persistence.drivers.mongodb import mongodb_driver
    from persistence.drivers.mysql import mysql_driver
    from persistence.drivers.postgresql import postgresql_driver
    from persistence.drivers.redis import redis_driver
    from persistence.drivers.sqlite import sqlite_driver

__all__ = [
    "filesystem_driver",
    "memory_driver",
    "mongodb_driver",
    "mysql_driver",
    "postgresql_driver",
    "redis_driver",
    "sqlite_driver",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        message = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(message)
    return getattr(import_module(f"{__name__}.{name.removesuffix('_driver')}"), name)
