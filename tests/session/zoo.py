"""Tiny checkpoints of model types of transformers, each built once a session. Treat the folders as read-only."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

ZooCheckpoint = Callable[[str], Path]


@pytest.fixture(scope="session")
def zoo_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> ZooCheckpoint:
    """Return the checkpoint folder of a name of the zoo."""
    from fixtures import zoo

    @cache
    def checkpoint(name: str) -> Path:
        return zoo.build(name, tmp_path_factory.mktemp("zoo") / name.replace(":", "-"))

    return checkpoint
