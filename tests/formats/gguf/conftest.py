from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from exporter.formats.gguf import GgufLayout, plan_gguf, write_gguf
from exporter.merge.model import MergedModel
from exporter.merge.plan import plan_merge
from exporter.sources.adapter import Adapter
from exporter.sources.checkpoint import Checkpoint
from fixtures import adapters, tiny
from tests.conftest import NEW_TOKENS, TRAINED_IDS

Write = Callable[..., Path]


def merged(base: Path, *adapters: Path, dtype: str | None = None) -> MergedModel:
    return plan_merge(Checkpoint.open(base), [Adapter.open(path) for path in adapters]).model(dtype)


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """write(base, *adapters, ftype=…): the path of a GGUF of the merged model."""
    counter = iter(range(1000))

    def run(base: Path, *adapters: Path, ftype: str | None = None) -> Path:
        out = tmp_path / f"{next(counter)}.gguf"
        layout: GgufLayout = plan_gguf(merged(base, *adapters), ftype)
        write_gguf(layout, out)
        return out

    return run


@pytest.fixture(scope="session")
def wide_tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of 256, so that every quantisation of ggml fits."""
    return tiny.build_llama(tmp_path_factory.mktemp("wide") / "tied", hidden=256)


@pytest.fixture(scope="session")
def wide_untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.build_llama(tmp_path_factory.mktemp("wide") / "untied", hidden=256, tied=False)


@pytest.fixture(scope="session")
def wide_adapters(wide_tied: Path, wide_untied: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Rows of known tokens, and of known and new ones, for either base; of head and embedding where it is untied."""
    folder, both = tmp_path_factory.mktemp("wide-adapters"), adapters.HEAD_AND_EMBEDDING
    make_new = adapters.stock_rows_new_tokens
    return {
        "tied-known": adapters.stock_rows(wide_tied, folder / "tk", TRAINED_IDS),
        "tied-new": make_new(wide_tied, folder / "tn", NEW_TOKENS, TRAINED_IDS[:1]),
        "untied-known": adapters.stock_rows(wide_untied, folder / "uk", TRAINED_IDS, targets=both),
        "untied-new": make_new(wide_untied, folder / "un", NEW_TOKENS, TRAINED_IDS[:1], targets=both),
    }
