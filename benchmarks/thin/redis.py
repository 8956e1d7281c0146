"""Redis through redis-py: a hash of values and a sorted set of their numbers, changed by small scripts.

A list (RPUSH, LRANGE) would be thinner, and would not do: an append that is
sent again after a lost reply is there twice, and no value can be replaced on a
condition. The same on a Cluster, where one session is one slot.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from typing import Any
from uuid import uuid4

from redis.asyncio import BlockingConnectionPool, Redis, RedisCluster

_APPEND = """
for i = 1, #ARGV, 2 do
  if redis.call('HSETNX', KEYS[1], ARGV[i], ARGV[i + 1]) == 0 then return i end
  redis.call('ZADD', KEYS[2], 0, ARGV[i])
end
return 0
"""
_LAST = """
local numbers = redis.call('ZREVRANGEBYLEX', KEYS[2], '+', '-', 'LIMIT', 0, ARGV[1])
return redis.call('HMGET', KEYS[1], unpack(numbers))
"""
_SWAP = """
for i = 3, #ARGV, 2 do
  if (redis.call('HGET', KEYS[1], ' ' .. ARGV[i]) or '1') ~= ARGV[1] then return 0 end
end
for i = 3, #ARGV, 2 do redis.call('HSET', KEYS[1], ARGV[i], ARGV[i + 1], ' ' .. ARGV[i], ARGV[2]) end
return 1
"""


class ThinRedis:
    """Keep values in hashes, through a pool of `size` connections, or on one where that is None.

    A Cluster's client has no pool that lets callers wait: there as many calls are made at once.
    """

    client = "redis-py"

    def __init__(self, url: str, size: int | None, *, cluster: bool = False) -> None:
        self._redis: Any
        self._turns: AbstractAsyncContextManager[Any] = nullcontext()
        self._prefix = f"thin-{uuid4().hex}"
        if cluster:
            self._redis = RedisCluster.from_url(url)
            self._turns = asyncio.Semaphore(size or 1)
        elif size is None:
            self._redis = Redis.from_url(url, single_connection_client=True)
        else:
            self._redis = Redis(connection_pool=BlockingConnectionPool.from_url(url, max_connections=size))

    async def open(self) -> None:
        await self._redis.initialize()
        self._append, self._last, self._swap = [
            await self._redis.script_load(script) for script in (_APPEND, _LAST, _SWAP)
        ]

    async def close(self) -> None:
        await self._redis.aclose()

    async def append(self, session: str, number: int, value: bytes) -> None:
        await self.extend(session, number, [value])

    async def extend(self, session: str, first: int, values: Sequence[bytes]) -> None:
        async with self._turns:
            if await self._redis.evalsha(self._append, 2, *self._keys(session), *_pairs(first, values)):
                raise KeyError(session)

    async def get(self, session: str, number: int) -> bytes:
        async with self._turns:
            value: bytes = await self._redis.hget(self._keys(session)[0], f"{number:012d}")
            return value

    async def last(self, session: str, count: int) -> list[bytes]:
        async with self._turns:
            values: list[bytes] = await self._redis.evalsha(self._last, 2, *self._keys(session), count)
            return values

    async def swap(self, session: str, values: Sequence[bytes], old: int, new: int) -> None:
        async with self._turns:
            name = self._keys(session)[0]
            if not await self._redis.evalsha(self._swap, 1, name, old, new, *_pairs(1, values)):
                raise RuntimeError(session)

    def _keys(self, session: str) -> tuple[str, str]:
        return f"{self._prefix}:{{{session}}}", f"{self._prefix}:{{{session}}}:keys"


def _pairs(first: int, values: Sequence[bytes]) -> list[str | bytes]:
    return [part for number, value in enumerate(values, first) for part in (f"{number:012d}", value)]
