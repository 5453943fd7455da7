"""The quick tier: tests that import no package that runs models, found by what their files and fixtures import.

A test is quick if its file, the fixtures that it requests and the test itself import no heavy package and start no
process, and if it has no marker of costly tests. ``--quick`` collects these tests alone, and does not even import the
files of others; ``-m quick`` and ``-m "not quick"`` choose among all. In a run with --quick a heavy import is an error,
in processes, too: the tier is what it says.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Final

import pytest

from tests.tiers.guard import sitecustomize
from tests.tiers.imports import heavy_file, heavy_function

#: Markers of tests that are never quick.
_COSTLY: Final = ("models", "slow", "smollm2", "converter", "node", "browser")

#: Fixtures that start processes when they are used: to make what is then kept, and never in a run with --quick.
_FREE: Final = ("tests.session.made", "tests.session.warm")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="tests that import no package that runs models, and no other")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--quick"):
        loaded = [name for name in sitecustomize.HEAVY if name in sys.modules]
        assert not loaded, f"--quick: {loaded} imported before the first test"
        sitecustomize.install()


@pytest.fixture(scope="session")
def models() -> None:
    """Requested by fixtures that run models, as tests that do have the marker of this name."""


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave out the files whose import is heavy: collecting one would import it."""
    if config.getoption("--quick") and collection_path.suffix == ".py" and heavy_file(collection_path):
        return True
    return None


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark the quick tests where someone asks for them, before ``-m`` is applied."""
    only = config.getoption("--quick")
    if not only and "quick" not in str(config.getoption("markexpr")):
        return
    quick = {item for item in items if is_quick(item)}
    for item in quick:
        item.add_marker("quick")
    if only:
        config.hook.pytest_deselected(items=[item for item in items if item not in quick])
        items[:] = [item for item in items if item in quick]


def is_quick(item: pytest.Item) -> bool:
    if not isinstance(item, pytest.Function) or "models" in item.fixturenames:
        return False
    if any(item.get_closest_marker(name) for name in _COSTLY):
        return False
    fixtures = [fixture.func for fixtures in item._fixtureinfo.name2fixturedefs.values() for fixture in fixtures]
    functions = [item.function, *(fixture for fixture in fixtures if fixture.__module__ not in _FREE)]
    return not heavy_file(item.path) and not any(map(heavy_function, functions))
