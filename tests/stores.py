"""Fixtures of the tests that run on every engine: a store of one's own, opened."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from pathlib import Path
from uuid import uuid4

import pytest
import pytest_asyncio
from engines import ENGINES, Place
from servers import Server

from persistence import Persistence, create_persistence
from persistence.testing import MakeDriver


@pytest.fixture(params=list(ENGINES))
def make_driver(
    request: pytest.FixtureRequest, tmp_path: Path, server: Callable[[str], Server]
) -> MakeDriver:
    """Make a driver on a store that belongs to this test; on memory always the same one."""
    return ENGINES[request.param].make(Place(tmp_path, f"test-{uuid4().hex}", server))


@pytest_asyncio.fixture
async def p(make_driver: MakeDriver) -> AsyncIterator[Persistence]:
    """The repositories on each engine."""
    async with create_persistence(make_driver()) as opened:
        yield opened
