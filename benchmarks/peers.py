"""Other libraries that do the same job, installed into a folder of their own when asked for."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

from harness import NotMeasuredError

__all__ = ["Peer", "install"]

_PACKAGE = "openai-agents"


class Peer:
    """Sessions of the OpenAI Agents SDK in an SQLite file, at their defaults: WAL, synchronous FULL."""

    def __init__(self) -> None:
        self.name = f"SQLiteSession {version(_PACKAGE)}"
        self._make: Any = import_module("agents").SQLiteSession
        self._file = ""
        self._sessions: dict[str, Any] = {}

    def use(self, file: Path) -> None:
        """Keep everything in `file` from now on."""
        self._file = str(file)
        self._sessions.clear()

    async def append(self, session: str, messages: Sequence[dict[str, Any]]) -> None:
        """Add messages to a session."""
        await self._session(session).add_items(messages)

    async def last(self, session: str, count: int) -> list[Any]:
        """Return the last messages."""
        found: list[Any] = await self._session(session).get_items(limit=count)
        return found

    def close(self) -> None:
        """Give up the connections."""
        for session in self._sessions.values():
            session.close()
        self._sessions.clear()

    def _session(self, name: str) -> Any:
        if name not in self._sessions:
            self._sessions[name] = self._make(name, self._file)
        return self._sessions[name]


def install(folder: Path) -> Peer:
    """Install the package into `folder`, unless it is there, and import it from there."""
    if not (folder / "agents").exists():
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(folder), _PACKAGE]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["?"])[-1]
            message = f"pip cannot install {_PACKAGE}: {reason}"
            raise NotMeasuredError(message)
    sys.path.append(str(folder))  # behind ours: what both need is taken from this environment
    try:
        return Peer()
    except ImportError as error:
        message = f"{_PACKAGE} cannot be imported: {error}"
        raise NotMeasuredError(message) from error
