"""Two Redis keys a partition, under one hash tag, so that a Redis Cluster keeps them on one node.

    agentx:{default/session/42}        HASH   key → the value; space and key → its version, 8 bytes
    agentx:{default/session/42}:keys   ZSET   the keys, all with score 0: Redis sorts them by their bytes

Redis 6.2 and later, Valkey, and their clusters; no modules. Round trips: 1 for every call, to all nodes at
once; `purge` of a part of a partition takes 1 for each 1,000 entries, and `partitions` 1 for each node, 1 for
a Cluster and 1 or more to look. What would surprise:

* Each Write is one step of a Lua script, which tests before it changes, since Redis has no rollback. One
  server runs all Writes of a `commit` in one script; on a Cluster a script may touch one slot only, so there
  each Write is a script, and those of a node leave in one packet.
* Lua numbers are doubles, in which neighbouring versions are equal: scripts compare 8 raw bytes. These have a
  field of their own because a script that tests a version would otherwise copy the whole value first.
* redis-py sends a command again when a connection breaks. A conditional write that comes twice refuses
  itself, so this driver goes below that retry, with every client: see `_redis_link`.
* Durability is the server's: see `RedisDriver`.
"""

from __future__ import annotations

import logging
import re
import struct
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from persistence.driver import ABSENT, PAGE_BYTES, Delete, Entry, Key, Page, Put, Write
from persistence.drivers._redis_link import Command, Link, Node, Script, is_refusal, translated
from persistence.errors import ConfigurationError, CorruptRecordError, shown
from persistence.options import (
    Durability,
    check_address,
    check_durability,
    check_namespace,
    check_pool_size,
    check_seconds,
    flag,
    masked_url,
    missing_client,
    split_url,
    url_or_address,
)

try:
    from redis import exceptions
    from redis.asyncio import Redis, RedisCluster
except ImportError as error:
    raise missing_client("redis", "redis[hiredis]") from error

__all__ = ["RedisDriver", "from_url", "redis_driver"]

# KEYS: the HASH of each key. ARGV: the keys.
_GET = Script("""
local found = {}
for i = 1, #KEYS do
  local pair = redis.call('HMGET', KEYS[i], ARGV[i], ' ' .. ARGV[i])
  found[2 * i - 1], found[2 * i] = pair[1], pair[2]
end
return found
""")

# KEYS: HASH, ZSET. ARGV: Z[REV]RANGEBYLEX, its bounds, limit, bytes. It holds 50 values at most.
# Returned: more, the keys in one text, their versions in another (0 where something is missing), the values.
_SCAN = Script("""
local from, limit, budget = ARGV[2], tonumber(ARGV[4]), tonumber(ARGV[5])
local names, versions, values, size, more = {}, {}, {}, 0, nil
while not more do
  local wanted = math.min(50, limit + 1 - #names)
  local keys = redis.call(ARGV[1], KEYS[2], from, ARGV[3], 'LIMIT', 0, wanted)
  local fields = {}
  for i, key in ipairs(keys) do fields[2 * i - 1], fields[2 * i] = key, ' ' .. key end
  local found = #keys > 0 and redis.call('HMGET', KEYS[1], unpack(fields)) or {}
  for i, key in ipairs(keys) do
    local value, version, n = found[2 * i - 1], found[2 * i], #names + 1
    size = size + #key + #(value or '')
    if n > 1 and (n > limit or size > budget) then more = 1; break end
    if not value or #(version or '') ~= 8 then version = ('\\0'):rep(8) end
    names[n], versions[n], values[n] = key, version, value
  end
  more = more or #keys < wanted and 0
  from = '(' .. (keys[#keys] or '')
end
return {more, table.concat(names, ' '), table.concat(versions), values}
""")

# KEYS: HASH, ZSET of each Write. ARGV: of each Write its version and the number of its ops, then of each op
# the key, the version to expect ('' any, '-' none), what to do, the value.
_COMMIT = Script("""
local at, outcomes = 1, {}
for w = 1, #KEYS, 2 do
  local entries, order = KEYS[w], KEYS[w + 1]
  local version, first, last = ARGV[at], at + 2, at + 1 + 4 * ARGV[at + 1]
  local holds = true
  for i = first, last, 4 do
    local expect = ARGV[i + 1]
    if expect == '-' then
      holds = redis.call('HEXISTS', entries, ARGV[i]) == 0
    elseif expect ~= '' then
      holds = redis.call('HGET', entries, ' ' .. ARGV[i]) == expect
    end
    if not holds then break end
  end
  for i = first, holds and last or 0, 4 do
    if ARGV[i + 2] == 'put' then
      local added = redis.call('HSET', entries, ARGV[i], ARGV[i + 3], ' ' .. ARGV[i], version)
      if added > 0 then redis.call('ZADD', order, 0, ARGV[i]) end
    elseif ARGV[i + 2] == 'delete' then
      local removed = redis.call('HDEL', entries, ARGV[i], ' ' .. ARGV[i])
      if removed > 0 then redis.call('ZREM', order, ARGV[i]) end
    end
  end
  outcomes[#outcomes + 1] = holds and 1 or 0
  at = last + 1
end
return outcomes
""")

# KEYS: HASH, ZSET. ARGV: bounds, how many at most. A thousand take the server about a millisecond.
_PURGE = Script("""
local keys = redis.call('ZRANGEBYLEX', KEYS[2], ARGV[1], ARGV[2], 'LIMIT', 0, ARGV[3])
if #keys > 0 then
  redis.call('ZREM', KEYS[2], unpack(keys))
  redis.call('HDEL', KEYS[1], unpack(keys))
  for i, key in ipairs(keys) do keys[i] = ' ' .. key end
  redis.call('HDEL', KEYS[1], unpack(keys))
end
return #keys
""")

_VERSION_BYTES = 8
_PURGE_STEP = 1_000
_FIRST_KEY = "!"
_OLDEST = (6, 2)
_PREFIX = re.compile(r"[A-Za-z0-9_.:-]{1,63}")
_OPTIONS: dict[str, Callable[[str], Any]] = {
    "namespace": str,
    "durability": str,
    "create": flag,
    "prefix": str,
    "cluster": flag,
    "timeout": float,
    "connect_timeout": float,
    "pool_size": int,
}
_SCAN_COUNT = 100
_SCANS = 100  # for one page of partitions
_log = logging.getLogger("persistence")


class RedisDriver:
    """Keep everything in a Redis or Valkey server, or in a Cluster of them.

    `url` is ``redis://user:password@host:port/db``, ``rediss://`` for TLS, and either with ``+cluster``
    (``redis+cluster://``) for a Cluster, of which it names any node. Without it `host`, `port`, `database`
    (a number), `user`, `password` and `cluster` say the same. `client` is used instead where given, and not
    closed: a ``redis.asyncio.Redis`` (for Sentinel: what ``Sentinel.master_for`` returns) or a
    ``RedisCluster``.

    `prefix` begins the name of every Redis key. `create` is there because every driver has it: Redis has
    nothing to create. `timeout` is how many seconds a reply may take, `connect_timeout` a connection,
    `pool_size` how many connections there may be (to each node). Further options, such as
    ``ssl_ca_certs=…``, go to redis-py as they are.

    `durability` cannot change what the server does; `open` compares and warns on the logger "persistence".
    "power" needs ``appendfsync always``; with ``everysec`` about a second of acknowledged writes is lost with
    the machine. "process" says that the end of this process loses nothing, which is so with any setting; what
    a restart of the server loses depends on its AOF and RDB. Failing over to a replica may lose the writes of
    the last moment, with any setting: replication in Redis is asynchronous. With Sentinel it may lose those
    of ten seconds and more, which a replaced primary goes on taking; with ``min-replicas-to-write 1`` only
    until its replicas have left it.
    Where reading CONFIG is forbidden, as on many managed services, `open` says that it cannot know.
    """

    lanes = 2

    def __init__(
        self,
        url: str | None = None,
        *,
        client: Redis | RedisCluster | None = None,
        host: str | None = None,
        port: int | None = None,
        database: int | None = None,
        user: str | None = None,
        password: str | None = None,
        cluster: bool = False,
        prefix: str = "agentx",
        namespace: str = "default",
        durability: Durability = "power",
        create: bool = True,
        timeout: float = 5.0,
        connect_timeout: float = 5.0,
        pool_size: int = 10,
        **client_options: Any,
    ) -> None:
        check_address("redis", host, port, user, password, None)
        if database is not None and (type(database) is not int or database < 0):
            message = f"redis: database={shown(database)}: use a whole number from 0 on"
            raise ConfigurationError(message)
        check_pool_size(pool_size)
        check_seconds("timeout", timeout)
        check_seconds("connect_timeout", connect_timeout)
        if not isinstance(prefix, str) or not _PREFIX.fullmatch(prefix):
            message = f"prefix={shown(prefix)}: use 1 to 63 letters, digits or '_.:-'"
            raise ConfigurationError(message)
        if not isinstance(client, Redis | RedisCluster | None):
            message = "redis: client must be a redis.asyncio.Redis or a redis.asyncio.RedisCluster"
            raise ConfigurationError(message)
        scheme, colon, rest = url_or_address(url, "redis", host, port).partition(":")
        self._url = scheme.removesuffix("+cluster") + colon + rest
        as_cluster = isinstance(client, RedisCluster) if client else cluster or scheme.endswith("+cluster")
        if client is None and not scheme.lower().startswith("rediss"):
            _check_no_tls(self._url, client_options)
        self._prefix = f"{prefix}:{{{check_namespace(namespace)}/"
        self._durability = check_durability(durability)
        self._given = client
        self._opened = False
        self.may_lose = False  # found out by `open`
        options = {
            "socket_timeout": timeout,
            "socket_connect_timeout": connect_timeout,
            **({} if not database else {"db": database}),
            **({} if user is None else {"username": user}),
            **({} if password is None else {"password": password}),
            **client_options,
        }
        self._link = Link(
            self._url,
            client,
            as_cluster=as_cluster,
            pool_size=pool_size,
            timeout=timeout,
            options=options,
        )

    def __repr__(self) -> str:
        return "redis_driver(client=…)" if self._given else f"redis_driver({masked_url(self._url)!r})"

    async def open(self) -> None:
        if self._opened:
            return
        try:
            await self._link.open()
            with translated():
                for node in self._link.nodes():
                    await self._inspect(node)
        except (TypeError, AttributeError, LookupError) as error:  # redis-py finds out only when it connects
            await self.close()
            message = f"redis: {error}"
            raise ConfigurationError(message) from error
        except BaseException:
            await self.close()
            raise
        self._opened = True

    async def close(self) -> None:
        self._opened = False
        await self._link.close()

    async def get(self, keys: Sequence[Key]) -> list[Entry | None]:
        places: dict[str, list[int]] = {}
        for place, key in enumerate(keys):
            places.setdefault(key.partition, []).append(place)
        found: list[Entry | None] = [None] * len(keys)
        if len(places) < 2 or self._link.as_cluster:
            commands = []
            for partition, group in places.items():
                name = self._name(partition)
                fields = [field for place in group for field in (keys[place].key, f" {keys[place].key}")]
                commands.append(Command(name, ("HMGET", name, *fields)))
        else:
            names = [self._name(key.partition) for key in keys]
            commands = [_GET(names, [key.key for key in keys])]
            places = {"": list(range(len(keys)))}
        with translated():
            replies = await self._link.read(commands)
        for group, reply in zip(places.values(), replies, strict=True):
            for place, value, version in zip(group, reply[::2], reply[1::2], strict=True):
                if value is not None and version is not None and len(version) == _VERSION_BYTES:
                    found[place] = Entry(keys[place].key, value, int.from_bytes(version, "big"))
                elif value is not None or version is not None:
                    raise _corrupt(keys[place])
        return found

    async def scan(
        self, partition: str, start: str, end: str | None, *, limit: int, reverse: bool = False
    ) -> Page:
        first, last = _bounds(start, end)
        search = ("ZREVRANGEBYLEX", last, first) if reverse else ("ZRANGEBYLEX", first, last)
        command = _SCAN(self._names(partition), [*search, limit, PAGE_BYTES])
        with translated():
            [(more, names, packed, values)] = await self._link.read([command])
        keys = names.decode("ascii", "backslashreplace").split(" ") if packed else []  # an empty key is one
        if len(keys) * _VERSION_BYTES != len(packed):
            raise _corrupt(Key(partition, next((key for key in keys if key), "")))
        versions = struct.unpack(f">{len(keys)}Q", packed)
        if 0 in versions:
            raise _corrupt(Key(partition, keys[versions.index(0)]))
        return Page(list(map(Entry, keys, values, versions)), more == 1)

    async def commit(self, writes: Sequence[Write]) -> list[bool | None]:
        if not writes:
            return []
        batches = [[write] for write in writes] if self._link.as_cluster else [writes]
        outcomes: list[bool | None] = []
        with translated():
            replies = await self._link.send([self._commit(batch) for batch in batches])
            failures = [reply for reply in replies if isinstance(reply, Exception)]
            if len(failures) == len(replies):
                raise next((failure for failure in failures if not is_refusal(failure)), failures[0])
        for failure in failures:
            _log.debug("redis: the outcome of a write is unknown: %s", failure)
        for reply in replies:
            outcomes += [None] if isinstance(reply, Exception) else map(bool, reply)
        return outcomes

    async def purge(self, partition: str, start: str, end: str | None) -> None:
        names = self._names(partition)
        with translated():
            if start <= _FIRST_KEY and end is None:
                await self._link.read([Command(names[0], ("UNLINK", *names))])
                return
            command = _PURGE(names, [*_bounds(start, end), _PURGE_STEP])
            while await self._link.read([command]) == [_PURGE_STEP]:
                pass

    async def partitions(self, cursor: str | None, limit: int) -> tuple[list[str], str | None]:
        """List by SCAN, node after node: foreign Redis keys are passed by, but no register is needed.

        A cursor holds the next SCAN to send and the names left over from the last one. It starts again from
        the beginning, hence repeats, when a server restarted or the Cluster changed in between.
        """
        with translated():
            await self._link.refresh()
            nodes = self._link.nodes()
            stamp = await self._stamp(nodes)
            if cursor is None or not cursor.startswith(f"{stamp} "):
                cursor = f"{stamp} 0 0"
            _, index, position, *names = cursor.split(" ")
            for _ in range(_SCANS):  # most may meet foreign keys alone
                if names or int(index) == len(nodes):
                    break
                node, pattern = nodes[int(index)], f"{self._prefix}*}}"
                count = max(limit, _SCAN_COUNT)
                following, raw = await self._link.ask(
                    node, "SCAN", position, "MATCH", pattern, "COUNT", count
                )
                names = [_text(name)[len(self._prefix) : -1] for name in raw]
                index, position = str(int(index) + (following == 0)), str(following)
        rest = names[limit:]
        done = int(index) == len(nodes) and not rest
        return names[:limit], None if done else " ".join([stamp, index, position, *rest])

    async def _inspect(self, node: Node) -> None:
        """Refuse a server that cannot work; warn of one that may lose data."""
        info = await self._link.ask(node, "INFO")
        if tuple(map(int, str(info["redis_version"]).split(".")[:2])) < _OLDEST:
            message = f"redis: the server has version {info['redis_version']}; 6.2 is the oldest that works"
            raise ConfigurationError(message)
        if "cluster" in (info.get("redis_mode"), info.get("server_mode")) and not self._link.as_cluster:
            message = "redis: the server is a node of a Cluster: use redis+cluster:// or cluster=True"
            raise ConfigurationError(message)
        policy = info.get("maxmemory_policy", "noeviction")
        if policy != "noeviction":
            _log.warning(
                "redis: maxmemory-policy is %s: the server may drop stored data; set it to noeviction", policy
            )
        try:
            save = (await self._link.ask(node, "CONFIG GET", "save"))["save"]
            fsync = (await self._link.ask(node, "CONFIG GET", "appendfsync"))["appendfsync"]
            least = await self._link.ask(node, "CONFIG GET", "min-replicas-to-write")
        except exceptions.ResponseError:
            _log.warning("redis: CONFIG is forbidden here: how durable writes are, its owner decides")
            self.may_lose = True
            return
        if not info["aof_enabled"] or fsync != "always" or info.get("connected_slaves"):
            self.may_lose = True  # with a restart, or by failing over
        alone = self._link.as_cluster or not info.get("connected_slaves")  # a Cluster's stops by itself
        if self._durability == "power" and not alone and least.get("min-replicas-to-write") == "0":
            _log.warning(
                "redis: the server has replicas: once one has replaced it, it may go on taking writes, which"
                " are lost then; set min-replicas-to-write 1"
            )
        if not info["aof_enabled"] and not save:
            _log.warning(
                "redis: neither AOF nor RDB is on: a restart of the server loses everything;"
                " set appendonly yes and appendfsync always"
            )
        elif self._durability == "power" and not (info["aof_enabled"] and fsync == "always"):
            found = f"appendfsync {fsync}" if info["aof_enabled"] else "no AOF; set appendonly yes as well"
            _log.warning('redis: durability="power" needs appendfsync always; the server has %s', found)

    async def _stamp(self, nodes: Sequence[Node]) -> str:
        """Return what changes whenever the cursors of SCAN lose their meaning."""
        seen = [(await self._link.ask(node, "INFO", "server"))["run_id"] for node in nodes]
        if self._link.as_cluster:
            seen.append((await self._link.ask(nodes[0], "CLUSTER INFO"))["cluster_current_epoch"])
        return f"{zlib.crc32(' '.join(map(_text, seen)).encode()):08x}"

    def _name(self, partition: str) -> str:
        return f"{self._prefix}{partition}}}"

    def _names(self, partition: str) -> tuple[str, str]:
        name = self._name(partition)
        return name, f"{name}:keys"

    def _commit(self, writes: Sequence[Write]) -> Command:
        names: list[str] = []
        words: list[Any] = []
        for write in writes:
            names += self._names(write.partition)
            words += (_version(write.version), len(write.ops))
            for op in write.ops:
                expect = b"" if op.expect is None else b"-" if op.expect == ABSENT else _version(op.expect)
                if isinstance(op, Put):
                    words += (op.key, expect, b"put", op.value)
                else:
                    words += (op.key, expect, b"delete" if isinstance(op, Delete) else b"check", b"")
        return _COMMIT(names, words)


redis_driver = RedisDriver


def from_url(url: str) -> RedisDriver:
    """Return the driver of ``redis://host:port/db?namespace=…``; options it does not know go to redis-py."""
    split = split_url(url, _OPTIONS, others=True)
    if split.path and not split.path.isdigit():
        message = f"redis: {split.path!r} is no number of a database: use redis://host:port/0"
        raise ConfigurationError(message)
    return RedisDriver(split.url, **split.options)


def _check_no_tls(url: str, options: Mapping[str, Any]) -> None:
    """Refuse options of TLS where there is none: a RedisCluster would say all in the clear."""
    given = {**dict(parse_qsl(urlsplit(url).query)), **options}
    if "ssl" not in given and (names := [name for name in given if name.startswith("ssl_")]):
        message = f"redis: {names[0]}= is for TLS: use rediss:// or rediss+cluster://"
        raise ConfigurationError(message)


def _bounds(start: str, end: str | None) -> tuple[str, str]:
    return f"[{start}", "+" if end is None else f"({end}"


def _version(number: int) -> bytes:
    return number.to_bytes(_VERSION_BYTES, "big")


def _corrupt(key: Key) -> CorruptRecordError:
    message = "redis: the entry has no value or no version"
    return CorruptRecordError(message, partition=key.partition, key=key.key)


def _text(name: str | bytes | int) -> str:
    return name.decode(errors="backslashreplace") if isinstance(name, bytes) else str(name)
