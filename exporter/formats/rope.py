"""Parameters of rotary embeddings that are stored in both GGUF and ONNX files."""

from __future__ import annotations

import math

from exporter.families.config import Settings
from exporter.families.spec import Rope


def longrope_magnitude(rope: Rope, max_positions: int) -> float:
    """The factor by which longrope multiplies cosines and sines.

    The factor is ``attention_factor`` if given, else computed from the ratio of the extended to the original context.

    Source: transformers.modeling_rope_utils.
    """
    settings = Settings({name: value for name, value in (rope.scaling or {}).items() if value is not None})
    original = rope.original_positions or max_positions
    growth = settings.number("factor", max_positions / original)
    computed = math.sqrt(1 + math.log(growth) / math.log(original)) if growth > 1 else 1.0
    return settings.number("attention_factor", computed)
