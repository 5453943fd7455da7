from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from exporter.cli.main import run as main
from exporter.formats.onnx import choose, plan_onnx, write_onnx
from exporter.merge.model import MergedModel
from exporter.merge.plan import plan_merge
from exporter.sources.adapter import Adapter
from exporter.sources.checkpoint import Checkpoint
from fixtures import adapters as stock
from fixtures import seq2seq

#: Rows that the adapters of encoder-decoders train.
T5_IDS = (300, 17, 5)

Write = Callable[..., Path]
Change = Callable[..., Path]


def merged(base: Path, *adapters: Path, dtype: str | None = "F32") -> MergedModel:
    return plan_merge(Checkpoint.open(base), [Adapter.open(path) for path in adapters]).model(dtype)


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """write(base, *adapters, quants=(…), dtype=…, ops=…): the ONNX folder of the merged model."""
    counter = iter(range(1000))

    def run(
        base: Path,
        *adapters: Path,
        quants: Sequence[str] = (),
        dtype: str | None = None,
        ops: str = "standard",
    ) -> Path:
        out = tmp_path / f"onnx-{next(counter)}"
        write_onnx(plan_onnx(merged(base, *adapters), choose(dtype, quants), ops=ops), out)
        return out

    return run


@pytest.fixture
def change(tmp_path: Path) -> Change:
    """change(base, tensors={…}, drop=(…), **config): a copy of a checkpoint with other settings and tensors."""
    counter = iter(range(1000))

    def run(
        base: Path, tensors: Mapping[str, torch.Tensor] | None = None, drop: tuple[str, ...] = (), **config: object
    ) -> Path:
        copy = Path(shutil.copytree(base, tmp_path / f"base-{next(counter)}"))
        settings = json.loads((copy / "config.json").read_text()) | config
        (copy / "config.json").write_text(json.dumps(settings))
        if tensors or drop:
            weights = load_file(copy / "model.safetensors") | dict(tensors or {})
            kept = {name: value for name, value in weights.items() if name not in drop}
            save_file(kept, copy / "model.safetensors", {"format": "pt"})
        return copy

    return run


@pytest.fixture(scope="session")
def t5_tied(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A T5 with one matrix for all, whose head is scaled, and rows for it, some of them new."""
    folder = tmp_path_factory.mktemp("t5-tied")
    base = seq2seq.build(folder / "base", "t5")
    return base, stock.stock_rows_new_tokens(base, folder / "adapter", ["<lamp>", "<ship>"], T5_IDS)


@pytest.fixture(scope="session")
def t5_exported(t5_tied: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The ONNX folder of ``t5_tied``, traced once a session. Treat it as read-only."""
    (base, adapter), out = t5_tied, Path(tmp_path_factory.mktemp("t5-exported") / "out")
    assert main(["merge", str(adapter), "--base", str(base), "--to", "onnx", "-o", str(out), "-q"]) == 0
    return out


def random_ids(count: int, vocab: int, seed: int = 0) -> list[int]:
    return [int(token) for token in np.random.default_rng(seed).integers(0, vocab, count)]
