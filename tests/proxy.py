"""A TCP proxy in the test's own event loop, between a client and a server, that fails on demand.

async with Proxy(server.port) as proxy:
    driver = make_driver(server.url_at(proxy.port))
    ...
    proxy.cut_after(replies=10)
"""

from __future__ import annotations

import asyncio
import math
from types import TracebackType
from typing import Self

from servers import free_port

CHUNK = 1 << 16


class _Flow:
    """One direction: what went through, and how much more may."""

    def __init__(self) -> None:
        self.bytes = 0
        self.budget: float = math.inf


class _Link:
    """A client's connection and the one to the server that goes with it."""

    def __init__(self, *writers: asyncio.StreamWriter) -> None:
        self.writers = writers
        self.asking = False
        self.forgotten = False
        for writer in writers:
            writer.transport.set_write_buffer_limits(0)  # so that drain() waits until all is sent

    def abort(self) -> None:
        for writer in self.writers:
            writer.transport.abort()


class Proxy:
    """Forwards each connection to `port` on 127.0.0.1 to the server at `target`.

    All faults concern all connections. `requests` and `replies` are the two
    directions, in bytes; `round_trips` counts the replies that answered
    something, a reply being all that comes until the client speaks again.
    `latency` is how many seconds a reply is kept back. New connections go to
    another server when `target` is changed.
    """

    def __init__(self, target: int) -> None:
        self.port = free_port()
        self.connections = 0
        self.round_trips = 0
        self.latency = 0.0
        self.target = target
        self._requests, self._replies = _Flow(), _Flow()
        self._links: set[_Link] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._listener: asyncio.Server | None = None
        self._flowing = asyncio.Event()
        self._flowing.set()

    @property
    def requests(self) -> int:
        """Bytes that went to the server."""
        return self._requests.bytes

    @property
    def replies(self) -> int:
        """Bytes that came back from it."""
        return self._replies.bytes

    async def __aenter__(self) -> Self:
        await self.resume()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.refuse()
        self.cut()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def cut(self) -> None:
        """Break all connections now; what is under way is lost. New ones work."""
        for link in self._links:
            link.abort()

    def cut_after(self, *, requests: float = math.inf, replies: float = math.inf) -> None:
        """Let so many more bytes through in a direction; the byte that follows them breaks all connections.

        The bytes let through do arrive. Once it broke, new connections work. A
        cut that was set before and has not come is forgotten.
        """
        self._requests.budget, self._replies.budget = requests, replies

    def stall(self) -> None:
        """Pass nothing on, in neither direction. Connections, new ones too, stay open and hang."""
        self._flowing.clear()

    def forget(self) -> None:
        """Pass nothing more on over the connections that are there, as a firewall does; new ones work."""
        for link in self._links:
            link.forgotten = True

    def refuse(self) -> None:
        """Refuse new connections. Those that are there go on."""
        if self._listener:
            self._listener.close()
            self._listener = None

    async def resume(self) -> None:
        """Work again: take connections, pass on what waits, forget a cut that has not come."""
        self.cut_after()
        self._flowing.set()
        if self._listener is None:
            self._listener = await asyncio.start_server(self._accept, "127.0.0.1", self.port)

    def _accept(self, from_client: asyncio.StreamReader, to_client: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(self._serve(from_client, to_client))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, from_client: asyncio.StreamReader, to_client: asyncio.StreamWriter) -> None:
        try:
            from_server, to_server = await asyncio.open_connection("127.0.0.1", self.target)
        except OSError:
            to_client.transport.abort()
            return
        link = _Link(to_client, to_server)
        self._links.add(link)
        self.connections += 1
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._pump(link, from_client, to_server, self._requests))
                group.create_task(self._pump(link, from_server, to_client, self._replies))
        finally:
            self._links.remove(link)
            link.abort()

    async def _pump(
        self, link: _Link, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, flow: _Flow
    ) -> None:
        try:
            while chunk := await reader.read(CHUNK):
                if self.latency and flow is self._replies:
                    await asyncio.sleep(self.latency)
                await self._flowing.wait()
                if link.forgotten:
                    continue
                if writer.is_closing():  # cut while it was stalled
                    return
                passed = chunk[: int(min(flow.budget, len(chunk)))]
                self._count(link, flow, len(passed))
                writer.write(passed)
                await writer.drain()
                if len(passed) < len(chunk):
                    self.cut_after()
                    self.cut()
                    return
            await self._flowing.wait()
            writer.write_eof()
        except OSError:  # the other side is gone, or the connection was cut
            link.abort()

    def _count(self, link: _Link, flow: _Flow, size: int) -> None:
        flow.bytes += size
        flow.budget -= size
        if flow is self._requests:
            link.asking = True
        elif link.asking:
            link.asking = False
            self.round_trips += 1
