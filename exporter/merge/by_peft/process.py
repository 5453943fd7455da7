"""Runs in a separate process, in which PEFT merges an adapter into the base's weights, one module at a time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from exporter.peft_modules.layers import unmerged_layers
from exporter.peft_modules.results import open_inputs, serve


@torch.no_grad()
def compute(checkpoint: Path, adapter: Path) -> Iterator[dict[str, Any]]:
    """Yield the merged weight and bias of each module as float64; ttexport later rounds each value once.

    Raises ValueError if a merged value is not finite.
    """
    for change, _, layer in unmerged_layers(*open_inputs(checkpoint, adapter)):
        layer.double()
        base = layer.get_base_layer()
        before = None if base.bias is None else base.bias.clone()
        layer.merge(safe_merge=True)
        base = layer.get_base_layer()
        parameters = {"weight": base.weight.contiguous()}
        if base.bias is not None and before is not None:
            if not change.bias and not torch.equal(before, base.bias):
                raise ValueError(f"{change.module}: expected a merge that keeps the bias, found a changed bias")
            parameters["bias"] = base.bias.contiguous()
        yield parameters


if __name__ == "__main__":
    serve(compute)
