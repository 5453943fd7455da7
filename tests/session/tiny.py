"""Tiny llama checkpoints and adapters for them. Treat the folders as read-only.

What builds them imports torch, so it is imported by the fixture that needs it.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.trained import NEW_TOKENS, TRAINED_IDS

if TYPE_CHECKING:
    from tests.merge.tuned import Bench


@pytest.fixture(scope="session")
def tiny_tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from fixtures import tiny

    return tiny.build_llama(tmp_path_factory.mktemp("tiny") / "tied")


@pytest.fixture(scope="session")
def tiny_untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from fixtures import tiny

    return tiny.build_llama(tmp_path_factory.mktemp("tiny") / "untied", tied=False)


@pytest.fixture(scope="session")
def tiny_padded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tied, with 8 rows that no token uses."""

    from fixtures import tiny

    return tiny.build_llama(tmp_path_factory.mktemp("tiny") / "padded", padding_rows=8)


@pytest.fixture(scope="session")
def tiny_sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Untied, in three weight files with an index."""

    from fixtures import tiny

    return tiny.build_llama(tmp_path_factory.mktemp("tiny") / "sharded", tied=False, shards=3)


@pytest.fixture(scope="session")
def tiny_adapter(tiny_tied: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of three existing tokens, for ``tiny_tied``."""

    from fixtures import adapters

    return adapters.stock_rows(tiny_tied, tmp_path_factory.mktemp("adapter") / "rows", TRAINED_IDS)


@pytest.fixture(scope="session")
def tiny_untied_adapter(tiny_untied: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of three existing tokens in the embedding only, for ``tiny_untied``."""

    from fixtures import adapters

    return adapters.stock_rows(tiny_untied, tmp_path_factory.mktemp("adapter") / "rows", TRAINED_IDS)


@pytest.fixture(scope="session")
def tiny_both_adapter(tiny_untied: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Different rows in the embedding and in the head, for ``tiny_untied``."""

    from fixtures import adapters

    return adapters.stock_rows(
        tiny_untied, tmp_path_factory.mktemp("adapter") / "both", TRAINED_IDS, targets=adapters.HEAD_AND_EMBEDDING
    )


@pytest.fixture(scope="session")
def tiny_new_tokens_adapter(tiny_tied: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three new tokens, so the vocabulary grows, and one existing token, for ``tiny_tied``."""

    from fixtures import adapters

    return adapters.stock_rows_new_tokens(
        tiny_tied, tmp_path_factory.mktemp("adapter") / "new", NEW_TOKENS, TRAINED_IDS[:1]
    )


@pytest.fixture(scope="session")
def tiny_padded_adapter(tiny_padded: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three new tokens that fit the padding rows, for ``tiny_padded``."""

    from fixtures import adapters

    return adapters.stock_rows_new_tokens(tiny_padded, tmp_path_factory.mktemp("adapter") / "padded", NEW_TOKENS)


@pytest.fixture(scope="session")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """Tiny models of four families in every tie layout, and every kind of adapter for them."""
    from tests.merge.tuned import Bench

    return Bench(tmp_path_factory.mktemp("matrix"))
