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
  itself, so this driver speaks to connections and nodes directly, below that retry, with every client.
* Durability is the server's: see `RedisDriver`.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import re
import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeAlias, cast

from persistence.driver import ABSENT, PAGE_BYTES, Delete, Entry, Key, Page, Put, Write
from persistence.errors import ConfigurationError, CorruptRecordError, PersistenceError, UnavailableError
from persistence.options import (
    Durability,
    check_durability,
    check_files,
    check_namespace,
    check_pool_size,
    check_seconds,
    flag,
    masked_url,
    missing_client,
    split_url,
    unapplied,
    untrusted,
    url_or_address,
)

try:
    from hiredis import pack_command
    from redis import exceptions
    from redis.asyncio import ConnectionPool, Redis, RedisCluster
    from redis.asyncio.cluster import ClusterNode
    from redis.asyncio.connection import AbstractConnection
    from redis.asyncio.retry import Retry
    from redis.backoff import NoBackoff
    from redis.crc import key_slot
except ImportError as error:
    raise missing_client("redis", "redis[hiredis]") from error

__all__ = ["RedisDriver", "from_url", "redis_driver"]

# KEYS: the HASH of each key. ARGV: the keys.
_GET = """
local found = {}
for i = 1, #KEYS do
  local pair = redis.call('HMGET', KEYS[i], ARGV[i], ' ' .. ARGV[i])
  found[2 * i - 1], found[2 * i] = pair[1], pair[2]
end
return found
"""

# KEYS: HASH, ZSET. ARGV: Z[REV]RANGEBYLEX, its bounds, limit, bytes. It holds 50 values at most.
# Returned: more, the keys in one text, their versions in another (0 where something is missing), the values.
_SCAN = """
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
"""

# KEYS: HASH, ZSET of each Write. ARGV: of each Write its version and the number of its ops, then of each op
# the key, the version to expect ('' any, '-' none), what to do, the value.
_COMMIT = """
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
"""

# KEYS: HASH, ZSET. ARGV: bounds, how many at most. A thousand take the server about a millisecond.
_PURGE = """
local keys = redis.call('ZRANGEBYLEX', KEYS[2], ARGV[1], ARGV[2], 'LIMIT', 0, ARGV[3])
if #keys > 0 then
  redis.call('ZREM', KEYS[2], unpack(keys))
  redis.call('HDEL', KEYS[1], unpack(keys))
  for i, key in ipairs(keys) do keys[i] = ' ' .. key end
  redis.call('HDEL', KEYS[1], unpack(keys))
end
return #keys
"""

_TEXT_BY_SHA = {hashlib.sha1(text.encode()).hexdigest(): text for text in (_GET, _SCAN, _COMMIT, _PURGE)}
_GET_SHA, _SCAN_SHA, _COMMIT_SHA, _PURGE_SHA = _TEXT_BY_SHA

_VERSION_BYTES = 8
_PURGE_STEP = 1_000
_FIRST_KEY = "!"
_OLDEST = (6, 2)
_PREFIX = re.compile(r"[A-Za-z0-9_.:-]{1,63}")
_REDIRECT_DELAYS = (0.0, 0.0, 0.02, 0.1, 0.3)  # seconds; a slot on its way to another node takes a moment
_FILES = ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile")
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
_ASKING = pack_command(("ASKING",))
_NOT_RUN = (exceptions.NoScriptError, exceptions.AskError, exceptions.TryAgainError)  # AskError: MOVED too
_BROKEN = (exceptions.ConnectionError, exceptions.TimeoutError, exceptions.ReadOnlyError, OSError)
_REFUSALS = (exceptions.AuthenticationError, exceptions.NoPermissionError)
_FAILURES = (exceptions.RedisError, exceptions.RedisClusterException, OSError)
_MISTAKES = ("Cluster mode is not enabled", "DB index is out of range")
_SCAN_COUNT = 100
_SCANS = 100  # for one page of partitions
_log = logging.getLogger("persistence")

_Executor: TypeAlias = "Redis | ClusterNode"


class _Command(NamedTuple):
    name: str  # the Redis key that says which node it goes to
    words: tuple[Any, ...]


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
    the last moment, with any setting: replication in Redis is asynchronous. Where reading CONFIG is
    forbidden, as on many managed services, `open` says that it cannot know.
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
        check_pool_size(pool_size)
        check_seconds("timeout", timeout)
        check_seconds("connect_timeout", connect_timeout)
        if not _PREFIX.fullmatch(prefix):
            message = f"prefix={prefix!r}: use 1 to 63 letters, digits or '_.:-'"
            raise ConfigurationError(message)
        if not isinstance(client, Redis | RedisCluster | None):
            message = "redis: client must be a redis.asyncio.Redis or a redis.asyncio.RedisCluster"
            raise ConfigurationError(message)
        scheme, colon, rest = url_or_address(url, "redis", host, port).partition(":")
        self._url = scheme.removesuffix("+cluster") + colon + rest
        self._as_cluster = (
            isinstance(client, RedisCluster) if client else cluster or scheme.endswith("+cluster")
        )
        self._prefix = f"{prefix}:{{{check_namespace(namespace)}/"
        self._durability = check_durability(durability)
        self._given = client
        self._client = client
        self._opened = False
        self._idle: list[AbstractConnection] = []  # taken from the pool of our own client, which is slow
        self._stale = False  # a node died or a slot moved: ask the Cluster who has what
        self._pool_size = pool_size
        self._timeout = timeout
        self._options: dict[str, Any] = {
            "socket_timeout": timeout,
            "socket_connect_timeout": connect_timeout,
            "socket_keepalive": True,
            "max_connections": pool_size,
            "retry": Retry(NoBackoff(), 0),  # the core retries, and knows what it may send twice
            "protocol": 2,  # with 3, redis-py 8 takes connections from its pool that the server has closed
            **({} if not database else {"db": database}),
            **({} if user is None else {"username": user}),
            **({} if password is None else {"password": password}),
            **client_options,
        }

    def __repr__(self) -> str:
        return "redis_driver(client=…)" if self._given else f"redis_driver({masked_url(self._url)!r})"

    async def open(self) -> None:
        if self._opened:
            return
        most = self._pool_size
        if isinstance(self._given, Redis):
            most = min(most, self._given.connection_pool.max_connections)
        self._turn = asyncio.Semaphore(most)
        try:
            await check_files("redis", self._url, self._options, _FILES)
            if self._client is None:
                self._client = self._connect()
            with _translated():
                if isinstance(self._client, RedisCluster):
                    await self._client.initialize()
                for node in self._nodes():
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
        client, self._client, self._opened = self._client, self._given, False
        self._idle.clear()
        if client is not None and client is not self._given:
            await client.aclose()

    async def get(self, keys: Sequence[Key]) -> list[Entry | None]:
        places: dict[str, list[int]] = {}
        for place, key in enumerate(keys):
            places.setdefault(key.partition, []).append(place)
        found: list[Entry | None] = [None] * len(keys)
        if len(places) < 2 or self._as_cluster:
            commands = []
            for partition, group in places.items():
                name = self._name(partition)
                fields = [field for place in group for field in (keys[place].key, f" {keys[place].key}")]
                commands.append(_Command(name, ("HMGET", name, *fields)))
        else:
            names = [self._name(key.partition) for key in keys]
            commands = [_script(_GET_SHA, names, [key.key for key in keys])]
            places = {"": list(range(len(keys)))}
        with _translated():
            replies = await self._read(commands)
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
        command = _script(_SCAN_SHA, self._names(partition), [*search, limit, PAGE_BYTES])
        with _translated():
            [(more, names, packed, values)] = await self._read([command])
        keys = names.decode().split(" ") if packed else []  # an empty key is one
        versions = struct.unpack(f">{len(keys)}Q", packed)
        if 0 in versions:
            raise _corrupt(Key(partition, keys[versions.index(0)]))
        return Page(list(map(Entry, keys, values, versions)), more == 1)

    async def commit(self, writes: Sequence[Write]) -> list[bool | None]:
        if not writes:
            return []
        batches = [[write] for write in writes] if self._as_cluster else [writes]
        outcomes: list[bool | None] = []
        with _translated():
            replies = await self._send([self._commit(batch) for batch in batches])
            failures = [reply for reply in replies if isinstance(reply, Exception)]
            if len(failures) == len(replies):
                raise failures[0]
        for failure in failures:
            _log.debug("redis: the outcome of a write is unknown: %s", failure)
        for reply in replies:
            outcomes += [None] if isinstance(reply, Exception) else map(bool, reply)
        return outcomes

    async def purge(self, partition: str, start: str, end: str | None) -> None:
        names = self._names(partition)
        with _translated():
            if start <= _FIRST_KEY and end is None:
                await self._read([_Command(names[0], ("UNLINK", *names))])
                return
            command = _script(_PURGE_SHA, names, [*_bounds(start, end), _PURGE_STEP])
            while await self._read([command]) == [_PURGE_STEP]:
                pass

    async def partitions(self, cursor: str | None, limit: int) -> tuple[list[str], str | None]:
        """List by SCAN, node after node: foreign Redis keys are passed by, but no register is needed.

        A cursor holds the next SCAN to send and the names left over from the last one. It starts again from
        the beginning, hence repeats, when a server restarted or the Cluster changed in between.
        """
        with _translated():
            await self._refresh()
            nodes = self._nodes()
            stamp = await self._stamp(nodes)
            if cursor is None or not cursor.startswith(f"{stamp} "):
                cursor = f"{stamp} 0 0"
            _, index, position, *names = cursor.split(" ")
            for _ in range(_SCANS):  # most may meet foreign keys alone
                if names or int(index) == len(nodes):
                    break
                node, pattern = nodes[int(index)], f"{self._prefix}*}}"
                count = max(limit, _SCAN_COUNT)
                following, raw = await self._ask(node, "SCAN", position, "MATCH", pattern, "COUNT", count)
                names = [_text(name)[len(self._prefix) : -1] for name in raw]
                index, position = str(int(index) + (following == 0)), str(following)
        rest = names[limit:]
        done = int(index) == len(nodes) and not rest
        return names[:limit], None if done else " ".join([stamp, index, position, *rest])

    def _connect(self) -> Redis | RedisCluster:
        try:
            if self._as_cluster:
                # Else the fifth MOVED would close all connections, with commits under way.
                return RedisCluster.from_url(self._url, reinitialize_steps=0, **self._options)
            return Redis.from_url(self._url, **self._options)
        except (TypeError, ValueError, exceptions.RedisError, exceptions.RedisClusterException):
            # Not even as the cause: it may quote a part of the password out of a malformed URL.
            message = f"redis: redis-py cannot use {masked_url(self._url)!r}, or one of the options given"
            raise ConfigurationError(message) from None

    def _nodes(self) -> list[_Executor]:
        client = self._connected
        if isinstance(client, RedisCluster):
            return [node for _, node in sorted((node.name, node) for node in client.get_primaries())]
        return [client]

    @property
    def _connected(self) -> Redis | RedisCluster:
        if self._client is None:
            message = "redis: the driver is not open"
            raise ConfigurationError(message)
        return self._client

    async def _inspect(self, node: _Executor) -> None:
        """Refuse a server that cannot work; warn of one that may lose data."""
        info = await self._ask(node, "INFO")
        if tuple(map(int, str(info["redis_version"]).split(".")[:2])) < _OLDEST:
            message = f"redis: the server has version {info['redis_version']}; 6.2 is the oldest that works"
            raise ConfigurationError(message)
        if "cluster" in (info.get("redis_mode"), info.get("server_mode")) and not self._as_cluster:
            message = "redis: the server is a node of a Cluster: use redis+cluster:// or cluster=True"
            raise ConfigurationError(message)
        policy = info.get("maxmemory_policy", "noeviction")
        if policy != "noeviction":
            _log.warning(
                "redis: maxmemory-policy is %s: the server may drop stored data; set it to noeviction", policy
            )
        try:
            save = (await self._ask(node, "CONFIG GET", "save"))["save"]
            fsync = (await self._ask(node, "CONFIG GET", "appendfsync"))["appendfsync"]
        except exceptions.ResponseError:
            _log.warning("redis: CONFIG is forbidden here: how durable writes are, its owner decides")
            return
        if not info["aof_enabled"] and not save:
            _log.warning(
                "redis: neither AOF nor RDB is on: a restart of the server loses everything;"
                " set appendonly yes and appendfsync always"
            )
        elif self._durability == "power" and not (info["aof_enabled"] and fsync == "always"):
            found = f"appendfsync {fsync}" if info["aof_enabled"] else "no AOF; set appendonly yes as well"
            _log.warning('redis: durability="power" needs appendfsync always; the server has %s', found)

    async def _stamp(self, nodes: Sequence[_Executor]) -> str:
        """Return what changes whenever the cursors of SCAN lose their meaning."""
        seen = [(await self._ask(node, "INFO", "server"))["run_id"] for node in nodes]
        if self._as_cluster:
            seen.append((await self._ask(nodes[0], "CLUSTER INFO"))["cluster_current_epoch"])
        return f"{zlib.crc32(' '.join(map(_text, seen)).encode()):08x}"

    async def _ask(self, node: _Executor, *words: Any) -> Any:
        """Send one of the commands whose replies redis-py puts in order: nothing that changes data."""
        async with self._turn:
            if isinstance(node, Redis):
                await self._return_idle(node.connection_pool)
            try:
                return await node.execute_command(*words)
            except exceptions.ConnectionError:
                self._stale = True
                raise

    async def _return_idle(self, pool: ConnectionPool) -> None:
        while self._idle:
            await pool.release(self._idle.pop())

    async def _read(self, commands: Sequence[_Command]) -> list[Any]:
        replies = await self._send(commands)
        for reply in replies:
            if isinstance(reply, Exception):
                raise reply
        return replies

    async def _send(self, commands: Sequence[_Command]) -> list[Any]:
        """Send each command once, together, and return replies; on a Cluster with errors among them."""
        client = self._connected
        async with self._turn:
            if isinstance(client, RedisCluster):
                return await self._spread(client, commands)
            return [await self._send_once(client, command.words) for command in commands]

    async def _send_once(self, client: Redis, words: tuple[Any, ...]) -> Any:
        pool: Any = client.connection_pool
        connection, connected = None, False
        try:
            connection = self._idle.pop() if self._idle else await pool.get_connection()
            await pool.ensure_connection(connection)
            connected = True
            [reply] = await _exchange(connection, [pack_command(words)], self._timeout)
            if isinstance(reply, exceptions.NoScriptError):
                [reply] = await _exchange(connection, [pack_command(_with_text(words))], self._timeout)
        except _FAILURES as error:
            raise unapplied(_as_ours(error), certain=not connected) from error
        finally:
            if connection is not None and self._given is None:
                self._idle.append(connection)
            elif connection is not None:
                await pool.release(connection)
        if _leads_nowhere(reply):
            # The other connections most likely died too, or lead to a server that is no longer the primary.
            await self._return_idle(pool)
            await pool.disconnect(inuse_connections=False)
        return reply

    async def _spread(self, client: RedisCluster, commands: Sequence[_Command]) -> list[Any]:
        """Send commands to their nodes, one packet a node; follow what was refused before it was run."""
        replies: list[Any] = [None] * len(commands)
        words = [command.words for command in commands]
        asked: dict[int, ClusterNode] = {}
        todo = list(range(len(commands)))
        for delay in _REDIRECT_DELAYS:
            if delay:
                await asyncio.sleep(delay)
            await self._refresh()
            queues: dict[tuple[ClusterNode, bool], list[int]] = {}
            for place in todo:
                node = asked.get(place) or _home(client, commands[place].name)
                queues.setdefault((node, place in asked), []).append(place)
            deliveries = [
                self._deliver(node, [words[place] for place in queue], asking)
                for (node, asking), queue in queues.items()
            ]
            # A lone one needs no task of its own.
            answers = [await deliveries[0]] if len(deliveries) == 1 else await asyncio.gather(*deliveries)
            for queue, answer in zip(queues.values(), answers, strict=True):
                for place, reply in zip(queue, answer, strict=True):
                    replies[place] = reply
            asked, todo = {}, [place for place in todo if isinstance(replies[place], _NOT_RUN)]
            for place in todo:
                reply = replies[place]
                if isinstance(reply, exceptions.NoScriptError):
                    words[place] = _with_text(words[place])
                elif isinstance(reply, exceptions.MovedError):
                    self._stale = True
                elif isinstance(reply, exceptions.AskError):
                    owner = client.get_node(reply.host, reply.port)
                    if owner is None:
                        self._stale = True
                    else:
                        asked[place] = owner
            if not todo:
                break
        return replies

    async def _deliver(self, node: ClusterNode, queue: Sequence[tuple[Any, ...]], asking: bool) -> list[Any]:
        packet = [pack_command(words) for words in queue]
        if asking:
            packet = [part for command in packet for part in (_ASKING, command)]
        connection = node.acquire_connection()
        try:
            replies = await _exchange(connection, packet, self._timeout)
        finally:
            node.release(connection)
        if _leads_nowhere(replies[-1]):
            self._stale = True
            await node.disconnect_free_connections()  # they most likely died too
        return replies[1::2] if asking else replies

    async def _refresh(self) -> None:
        """Learn anew which node has which slots, if that is in doubt; other nodes keep their connections."""
        if self._stale and isinstance(self._client, RedisCluster):
            self._stale = False
            try:
                # Nodes are asked one after the other: time for one that does not answer, and one that does.
                async with asyncio.timeout(1.5 * self._timeout):
                    await self._client.nodes_manager.initialize()
            except BaseException:
                self._stale = True
                raise

    def _name(self, partition: str) -> str:
        return f"{self._prefix}{partition}}}"

    def _names(self, partition: str) -> tuple[str, str]:
        name = self._name(partition)
        return name, f"{name}:keys"

    def _commit(self, writes: Sequence[Write]) -> _Command:
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
        return _script(_COMMIT_SHA, names, words)


redis_driver = RedisDriver


def from_url(url: str) -> RedisDriver:
    """Return the driver of ``redis://host:port/db?namespace=…``; options it does not know go to redis-py."""
    split = split_url(url, _OPTIONS, others=True)
    if split.path and not split.path.isdigit():
        message = f"redis: {split.path!r} is no number of a database: use redis://host:port/0"
        raise ConfigurationError(message)
    return RedisDriver(split.url, **split.options)


async def _exchange(connection: AbstractConnection, packet: Sequence[bytes], timeout: float) -> list[Any]:
    """Send commands together, and return their replies with errors among them."""
    replies: list[Any] = []
    limit = connection.socket_timeout
    try:
        await connection.connect()  # type: ignore[no-untyped-call]
        # One alarm for all; redis-py sets one to send, which takes a task of its own, and one for each reply.
        connection.socket_timeout = None
        async with asyncio.timeout(timeout if limit is None else limit):  # a client given may have none
            await connection.send_packed_command(packet)
            for _ in packet:
                try:
                    replies.append(await connection.read_response(disable_decoding=True))
                except exceptions.ResponseError as refusal:
                    replies.append(refusal)
    except (exceptions.RedisError, OSError) as failure:
        replies += [failure] * (len(packet) - len(replies))
        await connection.disconnect()  # it may hold replies that nobody will read
    finally:
        connection.socket_timeout = limit
    return replies


def _leads_nowhere(reply: Any) -> bool:
    """Tell whether the connection is lost, or leads to a server that is no longer the primary."""
    # Redis 6.2 wraps the errors that a script meets.
    return isinstance(reply, _BROKEN) or (isinstance(reply, Exception) and "-READONLY" in str(reply))


def _home(client: RedisCluster, name: str) -> ClusterNode:
    """Return what `client.get_node_from_key` does, in a third of the time."""
    owners = client.nodes_manager.slots_cache.get(key_slot(name.encode()))
    return owners[0] if owners else cast("ClusterNode", client.get_node_from_key(name))


def _script(sha: str, names: Sequence[str], words: Sequence[Any]) -> _Command:
    return _Command(names[0], ("EVALSHA", sha, len(names), *names, *words))


def _with_text(words: tuple[Any, ...]) -> tuple[Any, ...]:
    return ("EVAL", _TEXT_BY_SHA[words[1]], *words[2:])


def _bounds(start: str, end: str | None) -> tuple[str, str]:
    return f"[{start}", "+" if end is None else f"({end}"


def _version(number: int) -> bytes:
    return number.to_bytes(_VERSION_BYTES, "big")


def _corrupt(key: Key) -> CorruptRecordError:
    message = "redis: the entry has no value or no version"
    return CorruptRecordError(message, partition=key.partition, key=key.key)


def _text(name: str | bytes | int) -> str:
    return name.decode() if isinstance(name, bytes) else str(name)


@contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except _FAILURES as error:
        raise _as_ours(error) from error


def _as_ours(error: Exception) -> PersistenceError:
    # Where no node of a Cluster would do, the last one's reason stands behind it.
    root = error.__cause__ or error if isinstance(error, exceptions.RedisClusterException) else error
    if (refused := untrusted(root, "redis", "ssl_ca_certs=")) is not None:
        return refused
    message = f"redis: {str(root) or 'no answer in time'}"
    if isinstance(root, _REFUSALS) or str(root).startswith(_MISTAKES):
        return ConfigurationError(message)
    return UnavailableError(message)
