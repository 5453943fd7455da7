"""Compute the parameter of rotary embeddings that GGUF writers and ONNX writers need."""

from __future__ import annotations

import math

from exporter.families.config import Settings
from exporter.families.spec import Rope


def longrope_magnitude(rope: Rope, max_positions: int) -> float:
    """Return the factor by which longrope multiplies cosines and sines.

    The longrope factor is the config's ``attention_factor`` if given, and is otherwise computed from the ratio of the
    extended context length to the original context length.

    Source: transformers.modeling_rope_utils.
    """
    settings = Settings({name: value for name, value in (rope.scaling or {}).items() if value is not None})
    original = rope.original_positions or max_positions
    growth = settings.number("factor", max_positions / original)
    computed = math.sqrt(1 + math.log(growth) / math.log(original)) if growth > 1 else 1.0
    return settings.number("attention_factor", computed)
