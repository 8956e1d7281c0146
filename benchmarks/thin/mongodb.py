"""MongoDB through pymongo: one command an operation, a transaction for several documents.

Every write waits for the majority and its journal, as in our driver.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from uuid import uuid4

from pymongo import AsyncMongoClient, UpdateOne, WriteConcern


class ThinMongoDB:
    """Keep values in a collection, through a pool of `size` connections, or on one where that is None."""

    client = "pymongo"

    def __init__(self, url: str, size: int | None) -> None:
        self._mongo: AsyncMongoClient[dict[str, Any]] = AsyncMongoClient(url, maxPoolSize=size or 1)

    async def open(self) -> None:
        database = self._mongo.get_default_database("thin")
        name = f"thin_{uuid4().hex}"
        await database.create_collection(name)
        self._values = database.get_collection(name, write_concern=WriteConcern("majority", j=True))

    async def close(self) -> None:
        await self._values.drop()
        await self._mongo.close()

    async def append(self, session: str, number: int, value: bytes) -> None:
        await self._values.insert_one({"_id": f"{session}/{number:012d}", "v": value, "ver": 1})

    async def extend(self, session: str, first: int, values: Sequence[bytes]) -> None:
        documents = [
            {"_id": f"{session}/{n:012d}", "v": value, "ver": 1} for n, value in enumerate(values, first)
        ]
        async with self._mongo.start_session() as mongo, await mongo.start_transaction():
            await self._values.insert_many(documents, session=mongo)

    async def get(self, session: str, number: int) -> bytes:
        document = await self._values.find_one({"_id": f"{session}/{number:012d}"})
        if document is None:
            raise KeyError(number)
        return bytes(document["v"])

    async def last(self, session: str, count: int) -> list[bytes]:
        wanted = {"_id": {"$gte": f"{session}/", "$lt": f"{session}0"}}
        found = self._values.find(wanted, sort=[("_id", -1)], limit=count, batch_size=count)
        return [document["v"] for document in await found.to_list()]

    async def swap(self, session: str, values: Sequence[bytes], old: int, new: int) -> None:
        updates = [
            UpdateOne({"_id": f"{session}/{n:012d}", "ver": old}, {"$set": {"v": value, "ver": new}})
            for n, value in enumerate(values, 1)
        ]
        async with self._mongo.start_session() as mongo, await mongo.start_transaction():
            result = await self._values.bulk_write(updates, session=mongo)
            if result.matched_count != len(values):
                raise RuntimeError(result.matched_count)
