"""Checkpoints with rows of 256 and adapters for them. Treat the folders as read-only."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.session.made import LLAMA, NEW_ROWS, ROWS, Make
from tests.support.trained import HEAD_AND_EMBEDDING, NEW_TOKENS, TRAINED_IDS


@pytest.fixture(scope="session")
def wide_tied(make: Make) -> Path:
    """Rows of 256, so that every quantisation of ggml fits."""
    return make(LLAMA, "tied", hidden=256)


@pytest.fixture(scope="session")
def wide_untied(make: Make) -> Path:
    return make(LLAMA, "untied", hidden=256, tied=False)


@pytest.fixture(scope="session")
def wide_adapters(wide_tied: Path, wide_untied: Path, make: Make) -> dict[str, Path]:
    """Rows of known tokens, and of known and new ones, for either base; of head and embedding where it is untied."""
    new, both = (NEW_TOKENS, TRAINED_IDS[:1]), HEAD_AND_EMBEDDING
    return {
        "tied-known": make(ROWS, "tk", TRAINED_IDS, base=wide_tied),
        "tied-new": make(NEW_ROWS, "tn", *new, base=wide_tied),
        "untied-known": make(ROWS, "uk", TRAINED_IDS, base=wide_untied, targets=both),
        "untied-new": make(NEW_ROWS, "un", *new, base=wide_untied, targets=both),
    }
