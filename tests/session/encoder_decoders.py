"""An encoder-decoder, traced once a session. Treat the folders as read-only."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.trained import T5_IDS


@pytest.fixture(scope="session")
def t5_tied(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A T5 with one matrix for all, whose head is scaled, and rows for it, some of them new."""

    from fixtures import adapters as stock
    from fixtures.models import seq2seq

    folder = tmp_path_factory.mktemp("t5-tied")
    base = seq2seq.build(folder / "base", "t5")
    return base, stock.stock_rows_new_tokens(base, folder / "adapter", ["<lamp>", "<ship>"], T5_IDS)


@pytest.fixture(scope="session")
def t5_exported(t5_tied: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The ONNX folder of ``t5_tied``, traced once a session. Treat it as read-only."""

    from exporter.cli.main import run as main

    (base, adapter), out = t5_tied, Path(tmp_path_factory.mktemp("t5-exported") / "out")
    assert main(["merge", str(adapter), "--base", str(base), "--to", "onnx", "-o", str(out), "-q"]) == 0
    return out
