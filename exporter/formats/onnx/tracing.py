"""The tracing process: a checkpoint in, ``model.onnx`` and its data out. The only module here that knows torch.

Attention runs in its eager form, which every model of transformers has: fully hidden rows are finite there, and the
operators that come out are the plain ones.
"""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import onnx_ir as ir
import torch
import transformers
from torch.export import Dim
from transformers import DynamicCache

from exporter.formats.onnx.decoder import OPSET
from exporter.formats.onnx.parts import BATCH, PAST, SEQUENCE, TOTAL

#: Positions of the example that is traced; none is 0 or 1, which the exporter would take for constants.
_EXAMPLE_BATCH, _EXAMPLE_TOKENS, _EXAMPLE_PAST = 2, 3, 5
_MOST: Final = 1 << 20

Cache = Sequence[tuple[torch.Tensor, torch.Tensor]]


class Decoder(torch.nn.Module):
    """A causal language model whose cache goes in and out as tensors."""

    def __init__(self, model: Any) -> None:
        """``model``: as transformers loads it."""
        super().__init__()
        self.model = model
        self.positioned = "position_ids" in inspect.signature(model.forward).parameters

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, position_ids: torch.Tensor, past: Cache
    ) -> tuple[torch.Tensor, Cache]:
        """(logits, the new cache)."""
        cache = DynamicCache()
        for layer, (keys, values) in enumerate(past):
            cache.update(keys, values, layer)
        positions = {"position_ids": position_ids} if self.positioned else {}
        out = self.model(
            input_ids=input_ids, attention_mask=attention_mask, past_key_values=cache, use_cache=True, **positions
        )
        return out.logits, [(layer.keys, layer.values) for layer in out.past_key_values.layers]


def trace(checkpoint: Path, target: Path, data: str) -> None:
    """Write ``target`` and, beside it, ``data`` with the weights."""
    loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
        checkpoint,
        dtype=torch.float32,
        attn_implementation="eager",
        local_files_only=True,
        trust_remote_code=False,
    )
    model = loaded.eval()
    past = _example_cache(model)
    ids = torch.ones((_EXAMPLE_BATCH, _EXAMPLE_TOKENS), dtype=torch.int64)
    mask = torch.ones((_EXAMPLE_BATCH, _EXAMPLE_PAST + _EXAMPLE_TOKENS), dtype=torch.int64)
    positions = torch.arange(_EXAMPLE_PAST, _EXAMPLE_PAST + _EXAMPLE_TOKENS).expand(_EXAMPLE_BATCH, -1)
    batch, tokens, before = Dim(BATCH, max=_MOST), Dim(SEQUENCE, max=_MOST), Dim(PAST, max=_MOST)
    layer = ({0: batch, 2: before}, {0: batch, 2: before})
    names = [f"{number}.{part}" for number in range(len(past)) for part in ("key", "value")]
    program = torch.onnx.export(
        Decoder(model),
        (ids, mask, positions, past),
        dynamo=True,
        opset_version=OPSET,
        dynamic_shapes={
            "input_ids": {0: batch, 1: tokens},
            "attention_mask": {0: batch, 1: Dim.DYNAMIC},
            "position_ids": {0: batch, 1: tokens},
            "past": [layer for _ in past],
        },
        input_names=["input_ids", "attention_mask", "position_ids", *(f"past_key_values.{name}" for name in names)],
        output_names=["logits", *(f"present.{name}" for name in names)],
        verbose=False,
    )
    assert program is not None
    program.optimize()
    traced = program.model
    _name_dims(traced)
    _strip(traced)
    ir.save(traced, target, external_data=data)


def _example_cache(model: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """A cache of the shapes that the model itself makes."""
    with torch.no_grad():
        made = model(input_ids=torch.ones((1, 2), dtype=torch.int64), use_cache=True).past_key_values

    def example(value: torch.Tensor) -> torch.Tensor:
        return torch.zeros((_EXAMPLE_BATCH, value.shape[1], _EXAMPLE_PAST, value.shape[3]))

    return [(example(layer.keys), example(layer.values)) for layer in made.layers]


def _name_dims(model: ir.Model) -> None:
    """The names by which clients resolve dimensions; the tracer makes up its own for sums."""
    for value in model.graph.inputs:
        if value.name == "attention_mask":
            value.shape = ir.Shape([BATCH, TOTAL])
    for value in model.graph.outputs:
        assert value.shape is not None
        _, *dims = value.shape
        if value.name == "logits":
            value.shape = ir.Shape([BATCH, SEQUENCE, dims[1]])
        else:
            value.shape = ir.Shape([BATCH, dims[0], TOTAL, dims[2]])


def _strip(model: ir.Model) -> None:
    """Where nodes came from is of no use to a reader of the file, and names the machine that traced them."""
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.metadata_props.clear()


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    trace(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
