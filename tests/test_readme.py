"""The examples of the README run as they stand there."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

from test_services import TodoAgent

from persistence import Persistence, create_persistence, memory_driver

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def block(beginning: str) -> str:
    """Return the code block that holds the line `beginning`."""
    return next(part for part in README.split("```python\n")[1:] if beginning in part).split("```")[0]


def test_the_quick_start_keeps_a_conversation(tmp_path: Path) -> None:
    script = tmp_path / "quick_start.py"
    script.write_text(block("asyncio.run(main())"))
    for expected in (2, 4):
        result = subprocess.run(
            [sys.executable, script], cwd=tmp_path, capture_output=True, text=True, timeout=60
        )
        assert result.stdout.count("'role'") == expected, result.stderr
    assert (tmp_path / "agents.db").exists()


async def run(code: str, names: dict[str, Any]) -> None:
    body = textwrap.indent(code, "    ")
    exec(compile(f"async def example():\n{body}\n    return locals()", "README.md", "exec"), names)
    await names["example"]()


async def prepared(p: Persistence) -> None:
    await p.sessions.add_messages("s1", [{"role": "user"}, {"role": "assistant"}])  # the quick start


async def test_the_other_examples_run() -> None:
    async with create_persistence(memory_driver()) as p:
        await prepared(p)
        names = {"p": p, "state": {"messages": [1]}}
        await run(block('idempotency_key="turn-2"'), dict(names))
        await run(block("p.checkpoints.put").replace("state = await", "found = await"), dict(names))
        await run(block("service.attach(agent)"), {**names, "agent": TodoAgent()})
        await run(block("p.streams.append"), dict(names))
