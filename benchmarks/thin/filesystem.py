"""Files: one for each value, written beside its place and renamed into it, in the default thread pool.

With durability "power" the file is synced before the rename and its folder
after it; without the latter the rename itself may be lost. Several files do not
change in one step.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from pathlib import Path

from persistence.options import Durability


class ThinFiles:
    """Keep each value in a file of its session's folder."""

    client = "tmp + rename"

    def __init__(self, folder: Path, durability: Durability) -> None:
        self._folder = folder
        self._power = durability == "power"

    async def open(self) -> None:
        self._folder.mkdir()

    async def close(self) -> None:
        """Leave the files: their folder is a temporary one."""

    async def append(self, session: str, number: int, value: bytes) -> None:
        await asyncio.to_thread(self._write, session, number, value)

    async def extend(self, session: str, first: int, values: Sequence[bytes]) -> None:
        def write() -> None:
            for number, value in enumerate(values, first):
                self._write(session, number, value)

        await asyncio.to_thread(write)

    async def get(self, session: str, number: int) -> bytes:
        return await asyncio.to_thread(self._place(session, number).read_bytes)

    async def last(self, session: str, count: int) -> list[bytes]:
        def read() -> list[bytes]:
            names = sorted(os.listdir(self._folder / session), reverse=True)[:count]
            return [(self._folder / session / name).read_bytes() for name in names]

        return await asyncio.to_thread(read)

    def _place(self, session: str, number: int) -> Path:
        return self._folder / session / f"{number:012d}"

    def _write(self, session: str, number: int, value: bytes) -> None:
        place = self._place(session, number)
        beside = place.with_suffix(".tmp")
        try:
            file = beside.open("xb")
        except FileNotFoundError:
            place.parent.mkdir(exist_ok=True)
            file = beside.open("xb")
        with file:
            file.write(value)
            if self._power:
                file.flush()
                os.fdatasync(file.fileno())
        beside.rename(place)
        if self._power:
            folder = os.open(place.parent, os.O_RDONLY)
            os.fsync(folder)
            os.close(folder)
