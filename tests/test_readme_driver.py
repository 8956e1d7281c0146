"""The driver that README.md shows is short, complete, and keeps the contract."""

from __future__ import annotations

import re
import sys
from functools import partial
from importlib import import_module
from pathlib import Path

import pytest

from persistence.testing import MakeDriver, SharedDriverConformance

README = Path(__file__).parent.parent / "README.md"
MODULE = "readme_driver"


@pytest.fixture(scope="module")
def code() -> str:
    (block,) = re.findall(r"<!-- custom driver -->\n```python\n(.*?)```\n", README.read_text(), re.DOTALL)
    return str(block)


def test_the_driver_in_the_readme_has_at_most_60_lines(code: str) -> None:
    assert len(code.splitlines()) <= 60


class TestReadmeDriver(SharedDriverConformance):
    @pytest.fixture
    def make_driver(self, code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MakeDriver:
        # A real module, on a path that child processes inherit: they import the driver by its name.
        (tmp_path / f"{MODULE}.py").write_text(code)
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, MODULE, raising=False)
        return partial(import_module(MODULE).TinyDriver, tmp_path / "store.db")
