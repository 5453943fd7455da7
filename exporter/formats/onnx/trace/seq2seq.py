"""Trace an encoder-decoder into two ONNX graphs with the input names that Optimum and transformers.js expect.

The decoder graph has a KV cache for self-attention and a KV cache for cross-attention. The decoder computes
cross-attention keys and values only for encoder states that are not yet in the cache: for all states in the first call,
and for no states in later calls. One decoder graph, without an If node and with each weight stored once, therefore
serves the first call and all later calls. Source of input names and calling order: Optimum's ORTModelForSeq2SeqLM and
transformers.js' seq2seq sessions.
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

#: Name of the boolean input that enables the given cache. Optimum recognises a merged decoder by this input.
USES_CACHE: Final = "use_cache_branch"
_STATES: Final = "encoder_hidden_states"
_ENCODED: Final = "encoder_sequence_length"
_PAST_ENCODED: Final = "past_encoder_sequence_length"
#: Separate dimension names, because the runtime plans memory by dimension names: the used part of a cache may be
#: shorter than the given cache, and the number of projected states may be smaller than the number of encoder states.
_CACHED, _CACHED_ENCODED, _FRESH = "cached_sequence_length", "cached_encoder_sequence_length", "fresh_sequence_length"

#: Sizes of the traced example. No size is 0 or 1, because the exporter would treat 0 and 1 as constants.
_BATCH, _TOKENS, _BEFORE, _STATE_COUNT, _STATES_BEFORE = 2, 3, 5, 7, 11
_MOST: Final = 1 << 20
_END: Final = int(np.iinfo(np.int64).max)

#: A layer's keys and values: first for the decoder's tokens, then for the encoder's tokens.
Cache = Sequence[tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]]
_PARTS: Final = ("decoder.key", "decoder.value", "encoder.key", "encoder.value")


class Encoder(torch.nn.Module):
    """A torch module that runs only the encoder of an encoder-decoder model, for tracing."""

    def __init__(self, model: Any) -> None:
        """``model``: an encoder-decoder model loaded by transformers."""
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Run the encoder. Returns the encoder's last hidden state [B, encoder tokens, H]."""
        states: torch.Tensor = self.model.get_encoder()(input_ids, attention_mask=attention_mask).last_hidden_state
        return states


class Decoder(torch.nn.Module):
    """A torch module that runs the decoder and the LM head, for tracing. The KV caches are inputs and outputs."""

    def __init__(self, model: Any) -> None:
        """``model``: an encoder-decoder model loaded by transformers."""
        super().__init__()
        self.model = model

    def forward(
        self, input_ids: torch.Tensor, encoder_attention_mask: torch.Tensor, fresh_states: torch.Tensor, past: Cache
    ) -> tuple[torch.Tensor, Cache]:
        """Run the decoder. Returns (logits, extended KV caches).

        fresh_states: the encoder states whose keys and values are not yet in the KV cache ``past``.
        """
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
        return out.logits, [(own.keys, own.values, encoded.keys, encoded.values) for own, encoded in pairs]


def trace(model: Any, folder: Path, metadata: Mapping[str, str]) -> None:
    """Trace ``model``, and write the encoder and the decoder to ``folder``.

    The files are ``encoder_model.onnx`` and ``decoder_model_merged.onnx``, both with external data.
    """
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
    decoder = traced(Decoder(model), (ids, mask, states, past), shapes, inputs, outputs)
    _slice_inputs(decoder.graph)
    return decoder


def _example(model: Any) -> tuple[torch.Tensor, Cache]:
    """Make example inputs for tracing the decoder: (encoder states, KV caches)."""
    ids = torch.ones((1, 2), dtype=torch.int64)
    with torch.no_grad():
        out = model(input_ids=ids, decoder_input_ids=ids, use_cache=True)
    cache = out.past_key_values

    def tensors(layer: Any, length: int) -> Iterator[torch.Tensor]:
        for value in (layer.keys, layer.values):
            yield torch.zeros((_BATCH, value.shape[1], length, value.shape[3]))

    pairs = zip(cache.self_attention_cache.layers, cache.cross_attention_cache.layers, strict=True)
    past: Any = [(*tensors(own, _BEFORE), *tensors(encoded, _STATES_BEFORE)) for own, encoded in pairs]
    return torch.zeros((_BATCH, _STATE_COUNT, out.encoder_last_hidden_state.shape[-1])), past


def _slice_inputs(graph: ir.Graph) -> None:
    """Add Slice nodes that shorten unused KV caches to length 0 and remove encoder states that are already cached."""
    flag = ir.Value(name=USES_CACHE, shape=ir.Shape([1]), type=ir.TensorType(ir.DataType.BOOL))
    start, end = constant(graph, "cache.start", 0), constant(graph, "cache.end", _END)
    counting = ir.node("Where", [flag, end, start], name="cache.counting")
    nodes = [counting]
    inputs = {str(value.name): value for value in graph.inputs}
    for name, value in inputs.items():
        if name.startswith("past_key_values."):
            length = _PAST_ENCODED if "encoder" in name else PAST
            nodes.append(_sliced(graph, value, 2, start, counting.outputs[0], length))
    cached = next(node for node in nodes if node.name == "past_key_values.0.encoder.key.cut")
    count = ir.node("Shape", [cached.outputs[0]], {"start": 2, "end": 3}, name="encoder_hidden_states.cached")
    nodes += [count, _sliced(graph, inputs[_STATES], 1, count.outputs[0], end, _ENCODED)]
    for node in nodes:
        node.outputs[0].name = node.name
    graph.insert_before(graph[0], nodes)
    graph.inputs.append(flag)


def _sliced(graph: ir.Graph, value: ir.Value, axis: int, start: ir.Value, end: ir.Value, length: str) -> ir.Node:
    """Insert a node that slices the graph input ``value``, and let all other nodes read the slice.

    length: new name of the sliced dimension of the graph input.
    """
    axes = graph.initializers.get(f"axis.{axis}") or constant(graph, f"axis.{axis}", axis)
    node = ir.node("Slice", [value, start, end, axes], name=f"{value.name}.cut")
    (sliced,) = node.outputs
    replace_all_uses_with(value, sliced)
    node.replace_input_with(0, value)
    sliced.shape, sliced.type = value.shape, value.type
    assert value.shape is not None
    value.shape = ir.Shape([length if number == axis else dim for number, dim in enumerate(value.shape)])
    return node
