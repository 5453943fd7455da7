from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from exporter.formats.onnx import choose, plan_onnx, write_onnx
from exporter.merge.model import MergedModel
from exporter.merge.plan import plan_merge
from exporter.sources.hf.checkpoint import Checkpoint
from exporter.sources.peft.adapter import Adapter

if TYPE_CHECKING:
    import torch

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
            from safetensors.torch import load_file, save_file

            weights = load_file(copy / "model.safetensors") | dict(tensors or {})
            kept = {name: value for name, value in weights.items() if name not in drop}
            save_file(kept, copy / "model.safetensors", {"format": "pt"})
        return copy

    return run


def random_ids(count: int, vocab: int, seed: int = 0) -> list[int]:
    return [int(token) for token in np.random.default_rng(seed).integers(0, vocab, count)]
