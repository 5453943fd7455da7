"""Script that loads a checkpoint, traces the model, and writes ONNX files with external data.

The model is traced with the eager attention of transformers, because every transformers model supports eager attention.
With eager attention, the scores of fully masked rows stay finite, and the graph contains only standard ONNX operators.
"""

from __future__ import annotations

import inspect
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch
import transformers
from torch.export import Dim
from transformers import DynamicCache

from exporter.formats.onnx.graph.inputs import BATCH, PAST, SEQUENCE, TOTAL
from exporter.formats.onnx.trace import seq2seq as tracing_seq2seq
from exporter.formats.onnx.trace.graph import Dims, save, traced

#: Sizes of the traced example. No size is 0 or 1, because the exporter would treat 0 and 1 as constants.
_EXAMPLE_BATCH, _EXAMPLE_TOKENS, _EXAMPLE_PAST = 2, 3, 5
_MOST: Final = 1 << 20

Cache = Sequence[tuple[torch.Tensor, torch.Tensor]]


class Decoder(torch.nn.Module):
    """A causal language model whose forward pass accepts and returns the KV cache as plain tensors."""

    def __init__(self, model: Any) -> None:
        """``model``: a causal language model loaded by transformers."""
        super().__init__()
        self.model = model
        self.takes_positions = "position_ids" in inspect.signature(model.forward).parameters

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, position_ids: torch.Tensor, past: Cache
    ) -> tuple[torch.Tensor, Cache]:
        """Run the model on new tokens. Returns (logits, KV cache extended by the new tokens)."""
        cache = DynamicCache()
        for layer, (keys, values) in enumerate(past):
            cache.update(keys, values, layer)
        positions = {"position_ids": position_ids} if self.takes_positions else {}
        out = self.model(
            input_ids=input_ids, attention_mask=attention_mask, past_key_values=cache, use_cache=True, **positions
        )
        return out.logits, [(layer.keys, layer.values) for layer in out.past_key_values.layers]


def trace(checkpoint: Path, folder: Path, metadata: Mapping[str, str]) -> None:
    """Trace the model in ``checkpoint``, and write ONNX files with weights and ``metadata`` to ``folder``."""
    config = transformers.AutoConfig.from_pretrained(checkpoint, local_files_only=True, trust_remote_code=False)
    seq2seq = bool(config.is_encoder_decoder)
    auto: Any = transformers.AutoModelForSeq2SeqLM if seq2seq else transformers.AutoModelForCausalLM
    model = auto.from_pretrained(
        checkpoint,
        dtype=torch.float32,
        attn_implementation="eager",
        local_files_only=True,
        trust_remote_code=False,
    ).eval()
    (tracing_seq2seq.trace if seq2seq else _trace_decoder)(model, folder, metadata)


def _trace_decoder(model: Any, folder: Path, metadata: Mapping[str, str]) -> None:
    past = _example_cache(model)
    ids = torch.ones((_EXAMPLE_BATCH, _EXAMPLE_TOKENS), dtype=torch.int64)
    mask = torch.ones((_EXAMPLE_BATCH, _EXAMPLE_PAST + _EXAMPLE_TOKENS), dtype=torch.int64)
    positions = torch.arange(_EXAMPLE_PAST, _EXAMPLE_PAST + _EXAMPLE_TOKENS).expand(_EXAMPLE_BATCH, -1)
    batch, tokens, before = Dim(BATCH, max=_MOST), Dim(SEQUENCE, max=_MOST), Dim(PAST, max=_MOST)
    layer = ({0: batch, 2: before}, {0: batch, 2: before})
    shapes = {
        "input_ids": {0: batch, 1: tokens},
        "attention_mask": {0: batch, 1: Dim.DYNAMIC},
        "position_ids": {0: batch, 1: tokens},
        "past": [layer for _ in past],
    }
    names = [f"{number}.{part}" for number in range(len(past)) for part in ("key", "value")]
    inputs: Dims = {
        "input_ids": (BATCH, SEQUENCE),
        "attention_mask": (BATCH, TOTAL),
        "position_ids": (BATCH, SEQUENCE),
        **{f"past_key_values.{name}": (BATCH, None, PAST, None) for name in names},
    }
    outputs: Dims = {
        "logits": (BATCH, SEQUENCE, None),
        **{f"present.{name}": (BATCH, None, TOTAL, None) for name in names},
    }
    graph = traced(Decoder(model), (ids, mask, positions, past), shapes, inputs, outputs)
    save(graph, folder / "model.onnx", metadata)


def _example_cache(model: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Make an example KV cache for tracing, whose tensors have the shapes of the model's KV cache."""
    with torch.no_grad():
        cache = model(input_ids=torch.ones((1, 2), dtype=torch.int64), use_cache=True).past_key_values

    def example(value: torch.Tensor) -> torch.Tensor:
        return torch.zeros((_EXAMPLE_BATCH, value.shape[1], _EXAMPLE_PAST, value.shape[3]))

    return [(example(layer.keys), example(layer.values)) for layer in cache.layers]


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    trace(Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3]))
