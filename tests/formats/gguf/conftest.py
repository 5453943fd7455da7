from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from exporter.formats.gguf import GgufLayout, plan_gguf, write_gguf
from exporter.merge.model import MergedModel
from exporter.merge.plan import plan_merge
from exporter.sources.hf.checkpoint import Checkpoint
from exporter.sources.peft.adapter import Adapter

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
