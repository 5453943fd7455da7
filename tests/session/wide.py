"""Checkpoints with rows of 256 and adapters for them. Treat the folders as read-only."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.trained import NEW_TOKENS, TRAINED_IDS


@pytest.fixture(scope="session")
def wide_tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of 256, so that every quantisation of ggml fits."""

    from fixtures import tiny

    return tiny.build_llama(tmp_path_factory.mktemp("wide") / "tied", hidden=256)


@pytest.fixture(scope="session")
def wide_untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from fixtures import tiny

    return tiny.build_llama(tmp_path_factory.mktemp("wide") / "untied", hidden=256, tied=False)


@pytest.fixture(scope="session")
def wide_adapters(wide_tied: Path, wide_untied: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Rows of known tokens, and of known and new ones, for either base; of head and embedding where it is untied."""

    from fixtures import adapters

    folder, both = tmp_path_factory.mktemp("wide-adapters"), adapters.HEAD_AND_EMBEDDING
    make_new = adapters.stock_rows_new_tokens
    return {
        "tied-known": adapters.stock_rows(wide_tied, folder / "tk", TRAINED_IDS),
        "tied-new": make_new(wide_tied, folder / "tn", NEW_TOKENS, TRAINED_IDS[:1]),
        "untied-known": adapters.stock_rows(wide_untied, folder / "uk", TRAINED_IDS, targets=both),
        "untied-new": make_new(wide_untied, folder / "un", NEW_TOKENS, TRAINED_IDS[:1], targets=both),
    }
