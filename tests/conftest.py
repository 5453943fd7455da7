"""Session fixtures: every slow build happens once a worker. Treat the returned folders as read-only."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # no warning when a test starts another process
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
# A worker a core: more threads would only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from fixtures import adapters, tiny
from fixtures import smollm2 as smollm2_fixture

if TYPE_CHECKING:
    from tests.merge.tuned import Bench

# Existing ids whose rows the stock adapters train: a special token, two learned ones, not in ascending order.
TRAINED_IDS = (300, 17, 2)
NEW_TOKENS = ("<lamp>", "<ship>", "<fog>")
# SmolLM2: <|im_end|>, a digit, a common and a rare word piece.
SMOLLM2_IDS = (2, 33, 1042, 40001)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Workers of pytest-xdist begin with what takes longest, so that none is left alone with it at the end."""
    if not hasattr(config, "workerinput"):
        return
    sizes = Counter(item.path for item in items)
    marked = {mark: {item.path for item in items if item.get_closest_marker(mark)} for mark in ("smollm2", "slow")}
    items.sort(key=lambda item: (*(item.path not in paths for paths in marked.values()), -sizes[item.path]))


@pytest.fixture(scope="session")
def tiny_tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.build_llama(tmp_path_factory.mktemp("tiny") / "tied")


@pytest.fixture(scope="session")
def tiny_untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.build_llama(tmp_path_factory.mktemp("tiny") / "untied", tied=False)


@pytest.fixture(scope="session")
def tiny_padded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tied, with 8 rows that no token uses."""
    return tiny.build_llama(tmp_path_factory.mktemp("tiny") / "padded", padding_rows=8)


@pytest.fixture(scope="session")
def tiny_sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Untied, in three weight files with an index."""
    return tiny.build_llama(tmp_path_factory.mktemp("tiny") / "sharded", tied=False, shards=3)


@pytest.fixture(scope="session")
def tiny_adapter(tiny_tied: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of three existing tokens, for ``tiny_tied``."""
    return adapters.stock_rows(tiny_tied, tmp_path_factory.mktemp("adapter") / "rows", TRAINED_IDS)


@pytest.fixture(scope="session")
def tiny_untied_adapter(tiny_untied: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of three existing tokens in the embedding only, for ``tiny_untied``."""
    return adapters.stock_rows(tiny_untied, tmp_path_factory.mktemp("adapter") / "rows", TRAINED_IDS)


@pytest.fixture(scope="session")
def tiny_both_adapter(tiny_untied: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Different rows in the embedding and in the head, for ``tiny_untied``."""
    return adapters.stock_rows(
        tiny_untied, tmp_path_factory.mktemp("adapter") / "both", TRAINED_IDS, targets=adapters.HEAD_AND_EMBEDDING
    )


@pytest.fixture(scope="session")
def tiny_new_tokens_adapter(tiny_tied: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three new tokens, so the vocabulary grows, and one existing token, for ``tiny_tied``."""
    return adapters.stock_rows_new_tokens(
        tiny_tied, tmp_path_factory.mktemp("adapter") / "new", NEW_TOKENS, TRAINED_IDS[:1]
    )


@pytest.fixture(scope="session")
def tiny_padded_adapter(tiny_padded: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three new tokens that fit the padding rows, for ``tiny_padded``."""
    return adapters.stock_rows_new_tokens(tiny_padded, tmp_path_factory.mktemp("adapter") / "padded", NEW_TOKENS)


@pytest.fixture(scope="session")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """Tiny models of four families in every tie layout, and every kind of adapter for them."""
    from tests.merge.tuned import Bench

    return Bench(tmp_path_factory.mktemp("matrix"))


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct, from the user's cache; fetched and converted when absent."""
    return smollm2_fixture.checkpoint()


@pytest.fixture(scope="session")
def smollm2_adapter(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four perturbed rows for SmolLM2."""
    return adapters.stock_rows(smollm2, tmp_path_factory.mktemp("adapter") / "smollm2", SMOLLM2_IDS)
