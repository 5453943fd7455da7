"""The rotary caches: cos and sin of position times frequency, for every position the model knows.

Computed step by step in float32, as transformers does: with everything in float64 the angle of position 8191 would
differ from transformers' by 5e-4, which is more than all other rounding of the export together. Only the cosine
itself is taken in float64, so that it is rounded once.
Source: transformers.modeling_rope_utils (default, linear, llama3).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from exporter.errors import BadInput, NotExpressible
from exporter.families.config import Settings
from exporter.families.spec import Rope
from exporter.tensors import BLOCK_BYTES

Float32 = npt.NDArray[np.float32]


def frequencies(rope: Rope, max_positions: int) -> Float32:
    """Radians a position, float32 (dims / 2,). Raises BadInput for a scaling table that makes no sense."""
    exponents = np.arange(0, rope.dims, 2, dtype=np.float32) / np.float32(rope.dims)
    # The power is rounded once, from float64: numpy's own float32 power is not always the nearest number.
    powers = np.power(np.float64(rope.theta), exponents.astype(np.float64)).astype(np.float32)
    plain: Float32 = np.float32(1.0) / powers
    if rope.scaling is None:
        return plain
    settings = Settings(rope.scaling)
    kind, factor = rope.scaling.get("rope_type"), np.float32(settings.number("factor"))
    if kind == "linear":
        return plain / factor
    if kind == "llama3":
        return _llama3(plain, settings, factor, max_positions)
    raise NotExpressible("onnx", f"rope type {kind!r} is not written by this version")


def _llama3(plain: Float32, settings: Settings, factor: np.float32, max_positions: int) -> Float32:
    """Long waves are slowed down by ``factor``, short ones are kept, those between are blended."""
    low, high = settings.number("low_freq_factor"), settings.number("high_freq_factor")
    if high <= low:
        raise BadInput(f"config.json: high_freq_factor: expected more than low_freq_factor ({low}), found {high}")
    context = settings.number("original_max_position_embeddings", float(max_positions))
    waves = np.float32(2 * math.pi) / plain
    smooth = (np.float32(context) / waves - np.float32(low)) / np.float32(high - low)
    slowed = np.where(waves > np.float32(context / low), plain / factor, plain)
    blended = (np.float32(1.0) - smooth) * slowed / factor + smooth * slowed
    between = (waves >= np.float32(context / high)) & (waves <= np.float32(context / low))
    return np.where(between, blended, slowed).astype(np.float32)


def cache(function: Callable[..., npt.NDArray[Any]], freqs: Float32, positions: int) -> Iterator[Float32]:
    """``function`` (np.cos or np.sin) of every angle, float32 (positions, dims / 2), in row blocks.

    Memory: four blocks of at most ``BLOCK_BYTES``, float64 counted.
    """
    step = max(1, BLOCK_BYTES // (8 * len(freqs)))
    for start in range(0, positions, step):
        numbers = np.arange(start, min(start + step, positions), dtype=np.float32)
        angles = numbers[:, None] * freqs
        yield function(angles.astype(np.float64)).astype(np.float32)
