"""Tracing an encoder and its decoder, as two graphs with the names that Optimum and transformers.js feed.

The decoder takes a cache for its own tokens and one for the encoder's. Of the encoder's states it projects exactly
those that are not in the cache yet: all of them at the first call, none at the others. So one graph without a branch
serves both, and holds each weight once.
Source: Optimum's ORTModelForSeq2SeqLM and transformers.js' seq2seq sessions, for names and calling order.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.convenience import replace_all_uses_with
from torch.export import Dim
from transformers import DynamicCache, EncoderDecoderCache

from exporter.formats.onnx.graph.inputs import BATCH, PAST, SEQUENCE, TOTAL
from exporter.formats.onnx.trace.graph import Dims, constant, save, traced

#: Says whether the cache that is given counts. Optimum knows a decoder for both kinds of calls by this input.
USES_CACHE: Final = "use_cache_branch"
_STATES: Final = "encoder_hidden_states"
_ENCODED: Final = "encoder_sequence_length"
_PAST_ENCODED: Final = "past_encoder_sequence_length"
#: What counts of a cache may be less than what is given, and what is projected less than the encoder's states: the
#: runtime plans memory by names, so these lengths have names of their own.
_CACHED, _CACHED_ENCODED, _FRESH = "cached_sequence_length", "cached_encoder_sequence_length", "fresh_sequence_length"

#: Lengths of the example that is traced; none is 0 or 1, which the exporter would take for constants.
_BATCH, _TOKENS, _BEFORE, _STATE_COUNT, _STATES_BEFORE = 2, 3, 5, 7, 11
_MOST: Final = 1 << 20
_END: Final = int(np.iinfo(np.int64).max)

#: A layer's keys and values of the decoder's own tokens, then of the encoder's.
Cache = Sequence[tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]]
_PARTS: Final = ("decoder.key", "decoder.value", "encoder.key", "encoder.value")


class Encoder(torch.nn.Module):
    """The encoder alone."""

    def __init__(self, model: Any) -> None:
        """``model``: as transformers loads it."""
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Its last hidden state, [B, encoder's tokens, H]."""
        states: torch.Tensor = self.model.get_encoder()(input_ids, attention_mask=attention_mask).last_hidden_state
        return states


class Decoder(torch.nn.Module):
    """The decoder and its head; the caches go in and out as tensors, and both of them grow by what is given."""

    def __init__(self, model: Any) -> None:
        """``model``: as transformers loads it."""
        super().__init__()
        self.model = model

    def forward(
        self, input_ids: torch.Tensor, encoder_attention_mask: torch.Tensor, fresh_states: torch.Tensor, past: Cache
    ) -> tuple[torch.Tensor, Cache]:
        """(logits, the new caches). fresh_states: of the encoder, those whose keys and values are not in ``past``."""
        own: Any = DynamicCache()
        encoded: Any = DynamicCache()
        for layer, (keys, values, encoded_keys, encoded_values) in enumerate(past):
            own.update(keys, values, layer)
            encoded.update(encoded_keys, encoded_values, layer)
        cache = EncoderDecoderCache(own, encoded)
        cache.is_updated = dict.fromkeys(range(len(past)), False)
        out = self.model(
            encoder_outputs=(fresh_states,),
            attention_mask=encoder_attention_mask,
            decoder_input_ids=input_ids,
            past_key_values=cache,
            use_cache=True,
        )
        pairs = zip(own.layers, encoded.layers, strict=True)
        return out.logits, [(one.keys, one.values, other.keys, other.values) for one, other in pairs]


def trace(model: Any, folder: Path, metadata: Mapping[str, str]) -> None:
    """Write ``encoder_model.onnx`` and ``decoder_model_merged.onnx`` into ``folder``, each with its weights."""
    save(_encoder(model), folder / "encoder_model.onnx", metadata)
    save(_decoder(model), folder / "decoder_model_merged.onnx", metadata)


def _encoder(model: Any) -> ir.Model:
    ids = torch.ones((_BATCH, _STATE_COUNT), dtype=torch.int64)
    lengths = {0: Dim(BATCH, max=_MOST), 1: Dim(_ENCODED, max=_MOST)}
    inputs: Dims = {"input_ids": (BATCH, _ENCODED), "attention_mask": (BATCH, _ENCODED)}
    shapes = dict.fromkeys(inputs, lengths)
    outputs: Dims = {"last_hidden_state": (BATCH, _ENCODED, None)}
    return traced(Encoder(model), (ids, torch.ones_like(ids)), shapes, inputs, outputs)


def _decoder(model: Any) -> ir.Model:
    states, past = _example(model)
    ids = torch.ones((_BATCH, _TOKENS), dtype=torch.int64)
    mask = torch.ones((_BATCH, _STATES_BEFORE + _STATE_COUNT), dtype=torch.int64)
    batch, tokens, fresh, cached, encoded = (
        Dim(name, max=_MOST) for name in (BATCH, SEQUENCE, _FRESH, _CACHED, _CACHED_ENCODED)
    )
    own, other = {0: batch, 2: cached}, {0: batch, 2: encoded}
    shapes = {
        "input_ids": {0: batch, 1: tokens},
        "encoder_attention_mask": {0: batch, 1: Dim.DYNAMIC},
        "fresh_states": {0: batch, 1: fresh},
        "past": [(own, own, other, other) for _ in past],
    }
    names = [f"{layer}.{part}" for layer in range(len(past)) for part in _PARTS]
    inputs: Dims = {
        "input_ids": (BATCH, SEQUENCE),
        "encoder_attention_mask": (BATCH, _ENCODED),
        _STATES: (BATCH, _FRESH, None),
        **{f"past_key_values.{name}": (BATCH, None, None, None) for name in names},
    }
    outputs: Dims = {
        "logits": (BATCH, SEQUENCE, None),
        **{f"present.{name}": (BATCH, None, _ENCODED if "encoder" in name else TOTAL, None) for name in names},
    }
    made = traced(Decoder(model), (ids, mask, states, past), shapes, inputs, outputs)
    _use_what_counts(made.graph)
    return made


def _example(model: Any) -> tuple[torch.Tensor, Cache]:
    """(states of the encoder, caches), of the shapes that the model itself makes."""
    ids = torch.ones((1, 2), dtype=torch.int64)
    with torch.no_grad():
        out = model(input_ids=ids, decoder_input_ids=ids, use_cache=True)
    cache = out.past_key_values

    def tensors(layer: Any, length: int) -> Iterator[torch.Tensor]:
        for value in (layer.keys, layer.values):
            yield torch.zeros((_BATCH, value.shape[1], length, value.shape[3]))

    pairs = zip(cache.self_attention_cache.layers, cache.cross_attention_cache.layers, strict=True)
    past: Any = [(*tensors(one, _BEFORE), *tensors(other, _STATES_BEFORE)) for one, other in pairs]
    return torch.zeros((_BATCH, _STATE_COUNT, out.encoder_last_hidden_state.shape[-1])), past


def _use_what_counts(graph: ir.Graph) -> None:
    """Cut a cache that does not count down to nothing, and the encoder's states to those that are not cached."""
    flag = ir.Value(name=USES_CACHE, shape=ir.Shape([1]), type=ir.TensorType(ir.DataType.BOOL))
    start, end = constant(graph, "cache.start", 0), constant(graph, "cache.end", _END)
    counting = ir.node("Where", [flag, end, start], name="cache.counting")
    made = [counting]
    inputs = {str(value.name): value for value in graph.inputs}
    for name, value in inputs.items():
        if name.startswith("past_key_values."):
            length = _PAST_ENCODED if "encoder" in name else PAST
            made.append(_cut(graph, value, 2, start, counting.outputs[0], length))
    cached = next(node for node in made if node.name == "past_key_values.0.encoder.key.cut")
    count = ir.node("Shape", [cached.outputs[0]], {"start": 2, "end": 3}, name="encoder_hidden_states.cached")
    made += [count, _cut(graph, inputs[_STATES], 1, count.outputs[0], end, _ENCODED)]
    for node in made:
        node.outputs[0].name = node.name
    graph.insert_before(graph[0], made)
    graph.inputs.append(flag)


def _cut(graph: ir.Graph, value: ir.Value, axis: int, start: ir.Value, end: ir.Value, length: str) -> ir.Node:
    """A node that gives what was traced as ``value`` from the input of that name, which is ``length`` long."""
    axes = graph.initializers.get(f"axis.{axis}") or constant(graph, f"axis.{axis}", axis)
    node = ir.node("Slice", [value, start, end, axes], name=f"{value.name}.cut")
    (cut,) = node.outputs
    replace_all_uses_with(value, cut)
    node.replace_input_with(0, value)
    cut.shape, cut.type = value.shape, value.type
    assert value.shape is not None
    value.shape = ir.Shape([length if place == axis else one for place, one in enumerate(value.shape)])
    return node
