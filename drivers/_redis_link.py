"""How commands of the Redis driver reach their server, or the nodes of a Cluster.

redis-py sends a command again when a connection breaks. A conditional write that comes twice refuses itself,
so this speaks to connections and nodes directly, below that retry, with every client: a command is sent a
second time only where the reply says that it was not run.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeAlias, cast

from persistence.errors import ConfigurationError, CorruptRecordError, PersistenceError, UnavailableError
from persistence.options import check_files, masked_url, missing_client, unapplied, untrusted

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

__all__ = ["Command", "Link", "Node", "Script", "is_refusal", "translated"]

_FILES = ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile")
_REDIRECT_DELAYS = (0.0, 0.0, 0.02, 0.1, 0.3)  # seconds; a slot on its way to another node takes a moment
_ASKING = pack_command(("ASKING",))
_NOT_RUN = (exceptions.NoScriptError, exceptions.AskError, exceptions.TryAgainError)  # AskError: MOVED too
_BROKEN = (exceptions.ConnectionError, exceptions.TimeoutError, exceptions.ReadOnlyError, OSError)
_REFUSALS = (exceptions.AuthenticationError, exceptions.NoPermissionError)
_FAILURES = (exceptions.RedisError, exceptions.RedisClusterException, OSError)
# Said instead of running a command, or a script before its first change; Redis 6.2 quotes it in a text.
_UNDONE = (
    exceptions.OutOfMemoryError,
    exceptions.ReadOnlyError,
    exceptions.BusyLoadingError,
    exceptions.ClusterDownError,
)
_UNDONE_CODE = re.compile(r"\b(OOM|READONLY|NOREPLICAS|MISCONF|LOADING|CLUSTERDOWN)\b")
_REPLACED_CODE = re.compile(r"-READONLY|\bNOREPLICAS\b")
_NO_CLUSTER = "Cluster mode is not enabled"
_MISTAKES = (_NO_CLUSTER, "DB index is out of range")

Node: TypeAlias = "Redis | ClusterNode"


class Command(NamedTuple):
    """`words` to send to the node that has the Redis key `name`; `text` is that of the script they run."""

    name: str
    words: tuple[Any, ...]
    text: str = ""

    def with_text(self) -> Command:
        """Return this command for a server that does not know its script."""
        return Command(self.name, ("EVAL", self.text, *self.words[2:]))


class Script:
    """A Lua script, which servers know by its hash once they have seen it."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._sha = hashlib.sha1(text.encode()).hexdigest()

    def __call__(self, names: Sequence[str], words: Sequence[Any]) -> Command:
        """Return the command that runs it with these KEYS and ARGV."""
        return Command(names[0], ("EVALSHA", self._sha, len(names), *names, *words), self._text)


class Link:
    """A client of redis-py, made by `open` unless it is `given`, and how this library speaks through it."""

    def __init__(
        self,
        url: str,
        given: Redis | RedisCluster | None,
        *,
        as_cluster: bool,
        pool_size: int,
        timeout: float,
        options: dict[str, Any],
    ) -> None:
        self.as_cluster = as_cluster
        self._url = url
        self._given = given
        self._client = given
        self._idle: list[AbstractConnection] = []  # taken from the pool of our own client, which is slow
        self._stale = False  # a node died or a slot moved: ask the Cluster who has what
        self._pool_size = pool_size
        self._timeout = timeout
        self._options = {
            "socket_keepalive": True,
            "max_connections": pool_size,
            "retry": Retry(NoBackoff(), 0),  # the core retries, and knows what it may send twice
            "protocol": 2,  # with 3, redis-py 8 takes connections from its pool that the server has closed
            **options,
        }

    async def open(self) -> None:
        """Make the client, and learn what nodes there are."""
        most = self._pool_size
        if isinstance(self._given, Redis):
            most = min(most, self._given.connection_pool.max_connections)
        self._turn = asyncio.Semaphore(most)
        await check_files("redis", self._url, self._options, _FILES)
        if self._client is None:
            self._client = self._connect()
        if isinstance(self._client, RedisCluster):
            with translated():
                await self._client.initialize()

    async def close(self) -> None:
        """Close the client, unless it was given."""
        client, self._client = self._client, self._given
        self._idle.clear()
        if client is not None and client is not self._given:
            await client.aclose()

    def nodes(self) -> list[Node]:
        """Return all that hold data, in the same order while they are the same."""
        client = self._connected
        if isinstance(client, RedisCluster):
            return [node for _, node in sorted((node.name, node) for node in client.get_primaries())]
        return [client]

    async def ask(self, node: Node, *words: Any) -> Any:
        """Send one of the commands whose replies redis-py puts in order: nothing that changes data."""
        async with self._turn:
            if isinstance(node, Redis):
                await self._return_idle(node.connection_pool)
            try:
                return await node.execute_command(*words)
            except exceptions.ConnectionError:
                self._stale = True
                raise

    async def read(self, commands: Sequence[Command]) -> list[Any]:
        """Send commands that may fail as one: return their replies, or raise the first error."""
        replies = await self.send(commands)
        for reply in replies:
            if isinstance(reply, Exception):
                raise reply
        return replies

    async def send(self, commands: Sequence[Command]) -> list[Any]:
        """Send each command once, together, and return replies; on a Cluster with errors among them."""
        client = self._connected
        async with self._turn:
            if isinstance(client, RedisCluster):
                return await self._spread(client, commands)
            return [await self._send_once(client, command) for command in commands]

    async def refresh(self) -> None:
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

    def _connect(self) -> Redis | RedisCluster:
        try:
            if self.as_cluster:
                # Else the fifth MOVED would close all connections, with commits under way.
                return RedisCluster.from_url(self._url, reinitialize_steps=0, **self._options)
            return Redis.from_url(self._url, **self._options)
        except (TypeError, ValueError, exceptions.RedisError, exceptions.RedisClusterException):
            # Not even as the cause: it may quote a part of the password out of a malformed URL.
            message = f"redis: redis-py cannot use {masked_url(self._url)!r}, or one of the options given"
            raise ConfigurationError(message) from None

    @property
    def _connected(self) -> Redis | RedisCluster:
        if self._client is None:
            message = "redis: the driver is not open"
            raise ConfigurationError(message)
        return self._client

    async def _return_idle(self, pool: ConnectionPool) -> None:
        while self._idle:
            await pool.release(self._idle.pop())

    async def _send_once(self, client: Redis, command: Command) -> Any:
        pool: Any = client.connection_pool
        connection, connected = None, False
        try:
            connection = self._idle.pop() if self._idle else await pool.get_connection()
            await pool.ensure_connection(connection)
            connected = True
            [reply] = await _exchange(connection, [pack_command(command.words)], self._timeout)
            if isinstance(reply, exceptions.NoScriptError):
                words = command.with_text().words
                [reply] = await _exchange(connection, [pack_command(words)], self._timeout)
        except _FAILURES as error:
            ours = _as_ours(error)
            raise ours if connected else unapplied(ours) from error
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

    async def _spread(self, client: RedisCluster, commands: Sequence[Command]) -> list[Any]:
        """Send commands to their nodes, one packet a node; follow what was refused before it was run."""
        replies: list[Any] = [None] * len(commands)
        commands = [*commands]
        asked: dict[int, ClusterNode] = {}
        todo = list(range(len(commands)))
        for delay in _REDIRECT_DELAYS:
            if delay:
                await asyncio.sleep(delay)
            await self.refresh()
            queues: dict[tuple[ClusterNode, bool], list[int]] = {}
            for place in todo:
                node = asked.get(place) or _home(client, commands[place].name)
                queues.setdefault((node, place in asked), []).append(place)
            deliveries = [
                self._deliver(node, [commands[place] for place in queue], asking)
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
                    commands[place] = commands[place].with_text()
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

    async def _deliver(self, node: ClusterNode, queue: Sequence[Command], asking: bool) -> list[Any]:
        packet = [pack_command(command.words) for command in queue]
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
        # What it says of one command holds for no other: a server that was loading may have run the next.
        unread = exceptions.ConnectionError(f"no answer, after: {failure}")
        replies += [failure, *[unread] * len(packet)][: len(packet) - len(replies)]
        await connection.disconnect()  # it may hold replies that nobody will read
    finally:
        connection.socket_timeout = limit
    return replies


def _leads_nowhere(reply: Any) -> bool:
    """Tell whether the connection is lost, or leads to a server that may be no longer the primary."""
    # Whom his replicas have left may have been replaced. Redis 6.2 wraps the errors that a script meets.
    return isinstance(reply, _BROKEN) or (
        isinstance(reply, Exception) and bool(_REPLACED_CODE.search(str(reply)))
    )


def _home(client: RedisCluster, name: str) -> ClusterNode:
    """Return what `client.get_node_from_key` does, in a third of the time."""
    owners = client.nodes_manager.slots_cache.get(key_slot(name.encode()))
    return owners[0] if owners else cast("ClusterNode", client.get_node_from_key(name))


@contextmanager
def translated() -> Iterator[None]:
    """Raise what redis-py raises as an error of ours."""
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
    if str(root).startswith(_NO_CLUSTER):
        message += "; for a single server use redis:// or rediss://"
    if isinstance(root, _REFUSALS) or str(root).startswith(_MISTAKES):
        return ConfigurationError(message)
    if "WRONGTYPE" in str(root):  # somebody has put something else in the place of ours
        return CorruptRecordError(message)
    return unapplied(UnavailableError(message), certain=is_refusal(root))


def is_refusal(error: BaseException) -> bool:
    """Tell whether the server says that it did not do what it was asked."""
    if isinstance(error, _UNDONE):
        return True
    return isinstance(error, exceptions.ResponseError) and bool(_UNDONE_CODE.search(str(error)))
