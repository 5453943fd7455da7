"""The inputs of a decoder's ONNX graph, and the names of the inputs' dimensions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import onnx_ir as ir

from exporter.families.spec import DecoderSpec

#: Dimension names that clients rely on. transformers.js uses the names to size the initial, empty cache.
BATCH: Final = "batch_size"
SEQUENCE: Final = "sequence_length"
PAST: Final = "past_sequence_length"
TOTAL: Final = "total_sequence_length"

KeyValue = tuple[ir.Value, ir.Value]


@dataclass(frozen=True)
class Inputs:
    """The inputs of a decoder's ONNX graph. ``past`` contains the KV cache as a (key, value) pair for each layer."""

    input_ids: ir.Value
    attention_mask: ir.Value
    position_ids: ir.Value
    past: Sequence[KeyValue]

    @property
    def values(self) -> list[ir.Value]:
        """All inputs of the graph, in the order in which the graph declares the inputs."""
        cache = [value for pair in self.past for value in pair]
        return [self.input_ids, self.attention_mask, self.position_ids, *cache]


def decoder_inputs(spec: DecoderSpec, floats: ir.DataType) -> Inputs:
    """Create the graph inputs for the decoder described by ``spec``, with a KV cache of dtype ``floats``."""

    def ids(name: str, length: str) -> ir.Value:
        return typed(ir.Value(name=name), ir.DataType.INT64, BATCH, length)

    def past(layer: int, part: str) -> ir.Value:
        return typed(ir.Value(name=f"past_key_values.{layer}.{part}"), floats, *cache_shape(spec, PAST))

    pairs = [(past(layer, "key"), past(layer, "value")) for layer in range(spec.layers)]
    return Inputs(ids("input_ids", SEQUENCE), ids("attention_mask", TOTAL), ids("position_ids", SEQUENCE), pairs)


def cache_shape(spec: DecoderSpec, length: str) -> list[int | str]:
    """Return the shape of a layer's cached keys or values: [B, key heads, length, head width]."""
    return [BATCH, spec.attention.kv_heads, length, spec.attention.head_dim]


def typed(value: ir.Value, dtype: ir.DataType, *shape: int | str | None) -> ir.Value:
    """Set the type of the graph value ``value`` to a tensor of ``dtype`` and ``shape``. Returns ``value``."""
    value.shape, value.type = ir.Shape(shape), ir.TensorType(dtype)
    return value
