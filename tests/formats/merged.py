"""Merged checkpoints, read again from disk."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from exporter.sources.hf.checkpoint import Checkpoint

Merge = Callable[..., Path]


def files(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def raw(folder: Path) -> dict[str, bytes]:
    """Tensor name → stored bytes."""
    places = {name: tensor.place for name, tensor in Checkpoint.open(folder).tensors.items()}
    return {name: place.path.read_bytes()[place.offset_bytes :][: place.nbytes] for name, place in places.items()}


def loaded(folder: Path, **options: object) -> Any:
    """The model, loaded by transformers; every stored tensor must be used, and none may be missing."""
    from transformers import AutoModelForCausalLM

    result: Any = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
    model, report = result
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        assert not report.get(problem), (problem, report[problem])
    return model.eval()
