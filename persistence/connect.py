"""`create_persistence`: from a driver or an URL to the repositories."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Generator
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from persistence.calls import Repository, public_change, within
from persistence.checkpoints import Checkpoints
from persistence.coalescer import Coalescer
from persistence.driver import Driver
from persistence.errors import ConfigurationError, InvalidValueError, PersistenceError, shown
from persistence.ids import Clock, IdFactory, now_ms
from persistence.options import masked_url
from persistence.repair import Repair, RepairReport
from persistence.repositories import Containers, Images, LLMProviders, Prototypes, Sessions
from persistence.store import ENCRYPTED, SEAL, Store
from persistence.streams import Streams

__all__ = ["Persistence", "create_persistence", "driver_from_url"]

_log = logging.getLogger("persistence")

_METHODS = ("open", "close", "get", "scan", "commit", "purge", "partitions")


class Persistence(Repository):
    """The repositories on one driver. Made by `create_persistence`; for one event loop, many tasks.

    What holds for every call of it and of its repositories: `timeout` is in
    seconds, None to wait as long as the driver does; times are Unix
    milliseconds. A listing is `Listing`: `limit` is how many at most (None:
    all), `cursor` that of the page before (None: from the beginning).

    Raises `InvalidKeyError` for an id or a cursor that cannot be used,
    `InvalidValueError` for any other argument, `CorruptRecordError` for what is
    stored and cannot be read, `UnavailableError` if nothing was changed when the
    store did not answer, `OutcomeUnknownError` if a write had been sent, and
    `ConfigurationError` after `close`, on another event loop or after a fork.
    What else a method raises, it says itself.
    """

    containers: Containers
    images: Images
    sessions: Sessions
    prototypes: Prototypes
    llm_providers: LLMProviders
    checkpoints: Checkpoints
    streams: Streams

    def __init__(self, driver: Driver, *, clock: Clock = now_ms) -> None:
        self._driver = driver
        self._coalescer = Coalescer(driver)
        store = Store(self._coalescer, clock, IdFactory(clock))
        super().__init__(store)
        self.sessions = Sessions(store)
        self.images = Images(store, self.sessions)
        self.prototypes = Prototypes(store)
        self.llm_providers = LLMProviders(store)
        self.checkpoints = Checkpoints(store)
        self.streams = Streams(store)
        self.containers = Containers(store, self.images, self.sessions, self.prototypes, self.llm_providers)

    def __repr__(self) -> str:
        return f"<Persistence on {self._driver!r}>"

    @public_change
    async def repair(
        self,
        *,
        dry_run: bool = False,
        tombstone_days: float = 7,
        progress: Callable[[int], None] | None = None,
        timeout: float | None = None,
    ) -> RepairReport:
        """Finish interrupted deletes, mend listings, remove what nobody needs; return what was done.

        Safe beside any number of writers, and to interrupt and repeat: nothing
        depends on it but space, and listings after a crash. It runs only when
        it is called; once a day is plenty. `dry_run` only counts.
        `tombstone_days`: how long a deleted id stays known as such, in days, 1 or
        more. `progress` is called with the number of partitions looked at so far.
        """
        if type(tombstone_days) not in (int, float) or not tombstone_days >= 1:
            message = f"tombstone_days={shown(tombstone_days)}: use 1 or more"
            raise InvalidValueError(message)
        if progress is not None and not callable(progress):
            message = f"progress={shown(progress)}: use a function that takes a number"
            raise InvalidValueError(message)
        repair = Repair(
            self._store,
            containers=self.containers,
            images=self.images,
            sessions=self.sessions,
            prototypes=self.prototypes,
            llm_providers=self.llm_providers,
            checkpoints=self.checkpoints,
            streams=self.streams,
            dry_run=dry_run,
            tombstone_days=tombstone_days,
            progress=progress,
        )
        return await repair.run()

    async def close(self, *, timeout: float | None = None) -> None:
        """Wait for the calls under way, then release the driver. Idempotent.

        When the time (`timeout`, in seconds) is up it goes on by itself, and `UnavailableError` or
        `OutcomeUnknownError` is raised; no call is taken any more.
        """
        closing = self._coalescer.close()
        await (closing if timeout is None else within(timeout, closing))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()


class _Opening:
    """What `create_persistence` returns: await it, or enter it with ``async with``."""

    def __init__(self, driver: Driver | str, clock: Clock) -> None:
        self._driver = driver
        self._clock = clock
        self._opened: Persistence | None = None

    if not TYPE_CHECKING:  # a checker finds that out by itself

        def __getattr__(self, name: str) -> Any:
            message = f"no {name!r} yet: write  p = await create_persistence(…), or  async with … as p"
            raise AttributeError(message)

    def __await__(self) -> Generator[Any, None, Persistence]:
        return self._open().__await__()

    async def __aenter__(self) -> Persistence:
        self._opened = await self._open()
        return self._opened

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._opened is not None:
            await self._opened.close()

    async def _open(self) -> Persistence:
        driver = self._driver
        if isinstance(driver, str):
            # In a thread: looking up an entry point reads the disk, and importing a client takes a while.
            driver = await asyncio.to_thread(driver_from_url, driver)
        persistence = Persistence(checked_driver(driver), clock=self._clock)
        await persistence._coalescer.open()
        try:
            [seal] = await persistence._coalescer.get([SEAL])
            if seal is not None and seal.value.startswith(ENCRYPTED):
                message = f"{driver!r} is encrypted: use persistence.encryption, or PERSISTENCE_KEYS"
                raise ConfigurationError(message)
        except BaseException:
            await persistence.close()
            raise
        return persistence


def create_persistence(driver: Driver | str | None = None, *, clock: Clock = now_ms) -> _Opening:
    """Open a store: ``p = await create_persistence(…)`` or ``async with create_persistence(…) as p``.

    `driver` is a driver (``memory_driver()``, or any object with the seven
    methods of `persistence.driver.Driver`), an URL such as
    ``sqlite:///agents.db``, or None for the URL in the environment variable
    PERSISTENCE_URL; without that, everything is kept in memory and lost with
    the process, which a warning says. `clock` gives Unix milliseconds.

    Raises `ConfigurationError` for what cannot work, and whatever opening the driver raises.
    """
    if not callable(clock):
        message = f"clock={shown(clock)}: use a function that returns Unix milliseconds"
        raise ConfigurationError(message)
    if driver is None:
        driver = os.environ.get("PERSISTENCE_URL")
        if not driver:
            _log.warning(
                "nothing will be kept: no driver was given and PERSISTENCE_URL is not set, "
                "so everything is in memory and lost when this process ends"
            )
            driver = "memory://"
    return _Opening(driver if isinstance(driver, str) else checked_driver(driver), clock)


def driver_from_url(url: str) -> Driver:
    """Return the driver for an URL, not opened.

    The scheme is the name of an entry point in the group
    ``persistence.drivers``: a callable that takes the URL. Raises
    `ConfigurationError` that names the part of the URL at fault.
    """
    from importlib.metadata import entry_points  # 10 ms that who passes a driver need not spend

    if not isinstance(url, str):
        message = f"an URL must be a text, not {type(url).__name__}"
        raise ConfigurationError(message)
    scheme, colon, _ = url.partition("://")
    points = {point.name: point for point in entry_points(group="persistence.drivers")}
    known = ", ".join(f"{name}://" for name in sorted(points))
    if not colon:
        message = f"{masked_url(url)!r} is no URL: begin it with one of {known}"
        raise ConfigurationError(message)
    point = points.get(scheme.lower())
    if point is None:
        shown = masked_url(url).partition("://")[0]  # "user:password@x" is no scheme
        message = f"no driver for {shown}:// URLs is installed; there are {known}"
        raise ConfigurationError(message)
    try:
        make = point.load()
    except (ImportError, AttributeError) as error:
        message = f"the driver of {scheme}:// URLs, {point.value}, cannot be imported: {error}"
        raise ConfigurationError(message) from error
    if not callable(make):
        message = f"the driver of {scheme}:// URLs, {point.value}, is no callable"
        raise ConfigurationError(message)
    try:
        driver: Driver = make(url)
    except PersistenceError:
        raise
    except (TypeError, ValueError) as error:
        message = f"{masked_url(url)!r} is no valid {scheme}:// URL: {error}"
        raise ConfigurationError(message) from error
    return driver


def checked_driver(driver: Driver) -> Driver:
    """Return `driver`; raise `ConfigurationError` if it is none."""
    if isinstance(driver, type):
        message = (
            f"{driver.__name__} is a class: give create_persistence a driver object, {driver.__name__}(…)"
        )
        raise ConfigurationError(message)
    missing = [name for name in _METHODS if not callable(getattr(driver, name, None))]
    if missing:
        message = f"{type(driver).__name__} is no driver: it has no {', '.join(missing)}()"
        raise ConfigurationError(message)
    return driver
