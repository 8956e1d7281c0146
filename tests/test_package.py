"""What is shipped is what is in the tree, documented, and nothing else."""

from __future__ import annotations

import inspect
import pkgutil
import tomllib
from importlib import import_module
from importlib.metadata import distribution
from pathlib import Path
from types import ModuleType

import pytest

import persistence

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
MODULES = [
    import_module(info.name)
    for info in pkgutil.walk_packages(persistence.__path__, "persistence.")
    if not info.name.endswith("__main__")
]


def test_packages_are_those_of_the_tree() -> None:
    folders = {path.parent.relative_to(ROOT) for path in ROOT.glob("persistence/**/*.py")}
    names = {".".join(folder.parts) for folder in folders if "__pycache__" not in folder.parts}
    assert names | {"persistence.drivers"} == set(PYPROJECT["tool"]["setuptools"]["packages"])


def test_the_installed_package_owns_one_name() -> None:
    files = distribution("agent-persistence").files or []
    tops = {
        file.parts[0] for file in files if file.parts[0] not in ("..",) and ".dist-info" not in file.parts[0]
    }
    assert {top for top in tops if not top.startswith("__editable__")} <= {"persistence", "__pycache__"}


def test_types_are_shipped() -> None:
    assert Path(persistence.__path__[0], "py.typed").is_file()


def test_each_driver_has_a_factory_an_extra_and_an_entry_point() -> None:
    extras = PYPROJECT["project"]["optional-dependencies"]
    entry_points = PYPROJECT["project"]["entry-points"]["persistence.drivers"]
    files = {path.stem for path in ROOT.glob("drivers/[!_]*.py")}
    assert {target.removeprefix("persistence.drivers.") for target in entry_points.values()} == {
        f"{file}:from_url" for file in files
    }
    assert files - {"memory", "filesystem"} <= set(extras)
    for file in files:
        assert callable(getattr(persistence, f"{file}_driver"))


def test_the_core_depends_on_two_packages() -> None:
    assert [name.split(">")[0] for name in PYPROJECT["project"]["dependencies"]] == [
        "msgspec",
        "sortedcontainers",
    ]


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_what_is_public_is_documented(module: ModuleType) -> None:
    assert module.__doc__
    for name in getattr(module, "__all__", ()):
        thing = getattr(module, name)
        if not inspect.isclass(thing) and not inspect.isfunction(thing):
            continue
        assert thing.__doc__, name
        # The methods of a driver are documented once, in the contract.
        if not inspect.isclass(thing) or hasattr(thing, "partitions"):
            continue
        for method, value in vars(thing).items():
            if inspect.isfunction(value) and not method.startswith(("_", "test_")):
                assert value.__doc__, f"{name}.{method}"
