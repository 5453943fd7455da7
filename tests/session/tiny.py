"""Tiny llama checkpoints and adapters for them. Treat the folders as read-only."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.session.made import LLAMA, NEW_ROWS, ROWS, Make
from tests.support.trained import HEAD_AND_EMBEDDING, NEW_TOKENS, TRAINED_IDS

if TYPE_CHECKING:
    from tests.merge.tuned import Bench


@pytest.fixture(scope="session")
def tiny_tied(make: Make) -> Path:
    return make(LLAMA, "tied")


@pytest.fixture(scope="session")
def tiny_untied(make: Make) -> Path:
    return make(LLAMA, "untied", tied=False)


@pytest.fixture(scope="session")
def tiny_padded(make: Make) -> Path:
    """Tied, with 8 rows that no token uses."""
    return make(LLAMA, "padded", padding_rows=8)


@pytest.fixture(scope="session")
def tiny_sharded(make: Make) -> Path:
    """Untied, in three weight files with an index."""
    return make(LLAMA, "sharded", tied=False, shards=3)


@pytest.fixture(scope="session")
def tiny_adapter(tiny_tied: Path, make: Make) -> Path:
    """Rows of three existing tokens, for ``tiny_tied``."""
    return make(ROWS, "rows", TRAINED_IDS, base=tiny_tied)


@pytest.fixture(scope="session")
def tiny_untied_adapter(tiny_untied: Path, make: Make) -> Path:
    """Rows of three existing tokens in the embedding only, for ``tiny_untied``."""
    return make(ROWS, "rows", TRAINED_IDS, base=tiny_untied)


@pytest.fixture(scope="session")
def tiny_both_adapter(tiny_untied: Path, make: Make) -> Path:
    """Different rows in the embedding and in the head, for ``tiny_untied``."""
    return make(ROWS, "both", TRAINED_IDS, base=tiny_untied, targets=HEAD_AND_EMBEDDING)


@pytest.fixture(scope="session")
def tiny_new_tokens_adapter(tiny_tied: Path, make: Make) -> Path:
    """Three new tokens, so the vocabulary grows, and one existing token, for ``tiny_tied``."""
    return make(NEW_ROWS, "new", NEW_TOKENS, TRAINED_IDS[:1], base=tiny_tied)


@pytest.fixture(scope="session")
def tiny_padded_adapter(tiny_padded: Path, make: Make) -> Path:
    """Three new tokens that fit the padding rows, for ``tiny_padded``."""
    return make(NEW_ROWS, "padded", NEW_TOKENS, base=tiny_padded)


@pytest.fixture(scope="session")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """Tiny models of four families in every tie layout, and every kind of adapter for them."""
    from tests.merge.tuned import Bench

    return Bench(tmp_path_factory.mktemp("matrix"))
