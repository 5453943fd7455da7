"""Compute the effective weights of unmerged PEFT layers by running the layers on unit vectors in float64."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import torch

from exporter.peft_modules.layers import unmerged_layers
from exporter.peft_modules.results import open_inputs, serve

#: Number of unit vectors in a batch.
_BATCH: Final = 1024


@torch.no_grad()
def compute(checkpoint: Path, adapter: Path) -> Iterator[dict[str, Any]]:
    """For each module that PEFT adapts, yield a dict with the effective weight and, if any, bias as float64 tensors."""
    for change, layout, layer in unmerged_layers(*open_inputs(checkpoint, adapter)):
        layer.double()
        if layout == "vector":
            trained = {key.rpartition(".")[2]: key for key in change.tensors}
            (copy,) = (module for name, module in layer.named_modules() if name == "ln_tuning_layers.default")
            yield {name: getattr(copy, name).contiguous() for name in trained}
            continue
        base = layer.get_base_layer()
        bias = torch.zeros(()).double()
        if base.bias is not None:
            bias = layer(torch.zeros(1, _n_in(base.weight, layout)).double())[0]
        weight = torch.cat(list(_outputs(layer, base.weight, layout, bias)))
        parameters = {"weight": (weight.T if layout == "linear" else weight).contiguous()}
        yield parameters if base.bias is None else {**parameters, "bias": bias.contiguous()}


def _n_in(weight: torch.Tensor, layout: str) -> int:
    return weight.shape[1] if layout == "linear" else weight.shape[0]


def _outputs(layer: Any, weight: torch.Tensor, layout: str, bias: torch.Tensor) -> Iterator[torch.Tensor]:
    """Run ``layer`` on batches of unit vectors (for an embedding, token ids), and yield the outputs minus ``bias``."""
    count = _n_in(weight, layout)
    for start in range(0, count, _BATCH):
        numbers = torch.arange(start, min(start + _BATCH, count))
        inputs = numbers if layout == "embedding" else torch.nn.functional.one_hot(numbers, count).double()
        yield layer(inputs) - bias


if __name__ == "__main__":
    serve(compute)
