"""Compute the rotary frequency divisors of the rope types that a GGUF stores as tensors (llama3 and longrope)."""

from __future__ import annotations

import math

import numpy as np

from exporter.errors import BadInput
from exporter.families.config import Settings
from exporter.families.spec import DecoderSpec, Rope
from exporter.tensors import Array


def rope_factors(spec: DecoderSpec) -> dict[str, Array]:
    """Return float32 arrays of rotary frequency divisors by tensor name, or {} if the rope type needs no divisors.

    Raises BadInput for parameters of the rope type llama3 that contradict each other.
    """
    scaling = (spec.rope.scaling if spec.rope else None) or {}
    if spec.rope and scaling.get("rope_type") == "llama3":
        return {"rope_freqs.weight": _llama3(spec.rope, Settings(scaling))}
    if scaling.get("rope_type") == "longrope":
        names = ("long", "short")
        return {f"rope_factors_{name}.weight": np.array(scaling[f"{name}_factor"], np.float32) for name in names}
    return {}


def _llama3(rope: Rope, numbers: Settings) -> Array:
    """Return the rotary frequency divisors of the rope type "llama3", as a float32 array of shape (dims / 2,).

    The divisor is 1 for rotary frequencies above an upper threshold, and ``factor`` for frequencies below a lower
    threshold; between the two thresholds, the divisor is interpolated. Source: the function apply_scaling in Meta's
    code for Llama 3.1.
    """
    factor, low = numbers.number("factor", 8.0), numbers.number("low_freq_factor", 1.0)
    high, context = numbers.number("high_freq_factor", 4.0), numbers.number("original_max_position_embeddings", 8192)
    if high <= low:
        raise BadInput(f"config.json: high_freq_factor: expected a value above low_freq_factor ({low}), found {high}")
    # Computed in float32 and in the converter's order of operations, so that the bytes equal the converter's bytes.
    steps = np.arange(0, rope.dims, 2, dtype=np.float32) / np.float32(rope.dims)
    freqs = np.float32(1) / np.power(np.float32(rope.theta), steps)
    waves = np.float32(2 * math.pi) / freqs
    smooth = (np.float32(context) / waves - np.float32(low)) / np.float32(high - low)
    blended = np.float32(1) / ((np.float32(1) - smooth) / np.float32(factor) + smooth)
    outer = np.where(waves > context / low, factor, blended)
    return np.where(waves < context / high, 1, outer).astype(np.float32)
