"""What every public call does before and after its work: life checks and the timeout."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar, cast

from persistence.coalescer import CALL, Call, Coalescer
from persistence.errors import InvalidValueError, OutcomeUnknownError, UnavailableError, shown
from persistence.store import Store

__all__ = ["Repository", "public", "public_change", "within"]

F = TypeVar("F", bound=Callable[..., Coroutine[Any, Any, Any]])
T = TypeVar("T")

_FOR_EVER = 1e9  # seconds, some 30 years: event loops fail with much larger numbers


class Repository:
    """Base of the objects whose methods users call."""

    def __init__(self, store: Store) -> None:
        self._store = store


def public(method: F) -> F:
    """Make a public call of a `Repository` method, which has a keyword ``timeout`` (seconds) and ignores it.

    The call is refused where the persistence is closed, or is used on another
    event loop or after a fork. When the time is up it raises
    `UnavailableError` if no write had been sent, else `OutcomeUnknownError`.
    What writes more than once is a `public_change`.
    """

    @functools.wraps(method)
    async def call(self: Repository, *args: Any, **kwargs: Any) -> Any:
        coalescer = self._store.coalescer
        coalescer.enter()
        try:
            if kwargs.get("timeout") is None:
                return await method(self, *args, **kwargs)
            return await within(kwargs["timeout"], method(self, *args, **kwargs), coalescer)
        finally:
            coalescer.leave()

    return cast("F", call)


def public_change(method: F) -> F:
    """Do what `public` does for a method that writes more than once.

    An `UnavailableError` says that nothing was changed. So what fails after
    one of its writes was applied is an `OutcomeUnknownError`.
    """

    once = public(method)

    @functools.wraps(method)
    async def call(self: Repository, *args: Any, **kwargs: Any) -> Any:
        state = Call()
        token = CALL.set(state)
        try:
            return await once(self, *args, **kwargs)
        except UnavailableError as error:
            if not state.changed or error.stored is not None:
                raise
            message = f"{error.args[0]}; a part of the change was made"
            raise OutcomeUnknownError(message, partition=error.partition, key=error.key) from error
        finally:
            CALL.reset(token)

    return cast("F", call)


async def within(timeout: float, work: Awaitable[T], coalescer: Coalescer | None = None) -> T:
    """Await `work` for so many seconds; raise as `public` calls do when the time is up.

    What the driver raised meanwhile, which the coalescer knows, is told too.
    """
    if isinstance(timeout, bool) or not isinstance(timeout, int | float) or not timeout >= 0:
        if isinstance(work, Coroutine):
            work.close()
        message = f"timeout={shown(timeout)}: use seconds, 0 or more, or None to wait"
        raise InvalidValueError(message)
    call = CALL.get() or Call()
    token = CALL.set(call)
    since = asyncio.get_running_loop().time()
    try:
        async with asyncio.timeout(min(timeout, _FOR_EVER)) as limit:
            return await work
    except TimeoutError as error:
        if not limit.expired():
            raise
        at, fault = coalescer.fault if coalescer is not None else (since, "")
        why = f" ({fault})" if fault and at >= since else ""
        if call.sent:
            message = f"no answer within {timeout} s: the change may have been made or not{why}"
            raise OutcomeUnknownError(message, stored=call.stored) from error
        message = f"no answer within {timeout} s; nothing was changed{why}"
        raise UnavailableError(message, stored=call.stored) from error
    finally:
        CALL.reset(token)
