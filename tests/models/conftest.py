"""The fixture of the tests that damage the generated data."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from exporter.models import facts
from exporter.models.data import FOLDER
from tests.support.damaged_data import Damage, DamageData


@pytest.fixture
def damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[DamageData]:
    """Return a function that damages one file of a copy of the data, which the engine then reads."""
    copy = tmp_path / "data"
    shutil.copytree(FOLDER, copy, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(facts, "FOLDER", copy)

    def forget() -> None:
        for cached in (facts._conversions, facts._classes, facts.type_facts):
            cached.cache_clear()

    def apply(name: str, change: Damage) -> None:
        path = copy / name
        content = json.loads(path.read_text())
        change(content)
        assert json.loads(path.read_text()) != content
        path.write_text(json.dumps(content))
        forget()

    forget()
    yield apply
    forget()
