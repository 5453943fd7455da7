"""Compute the rotary caches: the cosines and sines of (position * frequency) for all positions of the context.

Rotary angles are computed in float32 by the same operations as in transformers. If angles were computed in float64, the
angle of position 8191 would differ by 5e-4 from transformers' angle, which is more than all other rounding errors of
the export together. Only the cosines and sines of the angles are computed in float64, so that each cosine and sine is
rounded only once.
Source: transformers.modeling_rope_utils (default, linear, llama3, yarn, longrope).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np

from exporter.errors import BadInput, NotExpressible
from exporter.families.config import Settings
from exporter.families.spec import Rope
from exporter.formats.rope import longrope_magnitude
from exporter.tensors import BLOCK_BYTES, Array, Float32

#: Module paths of the caches: for most layers, for sliding-window layers, for texts beyond the original context.
MAIN: Final = "rotary_emb"
LOCAL: Final = "rotary_emb_local"
LONG: Final = "rotary_emb_long"


@dataclass(frozen=True)
class Table:
    """The frequencies of a rotary cache, from which the cosines and sines are computed.

    freqs: rotary frequencies in radians per position, an array of shape (dims / 2,). magnitude: factor by which cosines
    and sines are multiplied.
    """

    name: str
    freqs: Float32
    magnitude: float = 1.0


def tables(rope: Rope, max_positions: int) -> list[Table]:
    """Return the rotary caches required by ``rope``. Raises BadInput if the rope scaling settings are inconsistent."""
    out = [_main(rope, max_positions)]
    if rope.local_theta is not None:
        out.append(Table(LOCAL, _plain(rope.dims, rope.local_theta)))
    if rope.scaling is not None and rope.scaling.get("rope_type") == "longrope":
        out.append(replace(out[0], name=LONG, freqs=_by_factors(rope, "long_factor")))
    return out


def _main(rope: Rope, max_positions: int) -> Table:
    plain = _plain(rope.dims, rope.theta)
    if rope.scaling is None:
        return Table(MAIN, plain)
    settings = Settings(rope.scaling)
    rope_type = rope.scaling.get("rope_type")
    context = rope.original_positions or max_positions
    if rope_type == "longrope":
        return Table(MAIN, _by_factors(rope, "short_factor"), longrope_magnitude(rope, max_positions))
    factor = settings.number("factor")
    if rope_type == "linear":
        return Table(MAIN, plain / np.float32(factor))
    if rope_type == "llama3":
        context = settings.integer("original_max_position_embeddings", context)
        return Table(MAIN, _llama3(plain, settings, np.float32(factor), context))
    if rope_type == "yarn":
        return Table(MAIN, _yarn(rope, settings, factor, context), _yarn_magnitude(settings, factor))
    raise NotExpressible("onnx", f"the ONNX writer does not support rope type {rope_type!r}")


def _powers(dims: int, theta: float) -> Float32:
    """Return theta to the power of 2i / dims for i = 0, …, dims / 2 - 1, each rounded to float32 only once.

    The powers are computed in float64, because numpy's float32 power is not always correctly rounded.
    """
    exponents = np.arange(0, dims, 2, dtype=np.float32) / np.float32(dims)
    powers: Float32 = np.power(np.float64(theta), exponents.astype(np.float64)).astype(np.float32)
    return powers


def _plain(dims: int, theta: float) -> Float32:
    plain: Float32 = np.float32(1.0) / _powers(dims, theta)
    return plain


def _by_factors(rope: Rope, key: str) -> Float32:
    factors = np.array((rope.scaling or {})[key], np.float32)
    freqs: Float32 = np.float32(1.0) / (factors * _powers(rope.dims, rope.theta))
    return freqs


def _llama3(plain: Float32, settings: Settings, factor: np.float32, context: int) -> Float32:
    """Scale the rotary frequencies for rope type llama3.

    Low frequencies are divided by ``factor``, high frequencies stay unchanged, and frequencies in between are
    interpolated.
    """
    low, high = settings.number("low_freq_factor"), settings.number("high_freq_factor")
    if high <= low:
        raise BadInput(f"config.json: high_freq_factor: expected a value above low_freq_factor ({low}), found {high}")
    waves = np.float32(2 * math.pi) / plain
    smooth = (np.float32(context) / waves - np.float32(low)) / np.float32(high - low)
    slowed = np.where(waves > np.float32(context / low), plain / factor, plain)
    blended = (np.float32(1.0) - smooth) * slowed / factor + smooth * slowed
    between = (waves >= np.float32(context / high)) & (waves <= np.float32(context / low))
    return np.where(between, blended, slowed).astype(np.float32)


def _yarn(rope: Rope, settings: Settings, factor: float, context: int) -> Float32:
    """Scale the rotary frequencies for rope type yarn.

    Low frequencies are divided by ``factor``, high frequencies stay unchanged, and frequencies in between are
    interpolated. Source: YaRN (Peng et al. 2023), section 3.2.
    """
    powers = _powers(rope.dims, rope.theta)

    def dimension(turns: float) -> float:
        return rope.dims * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low = dimension(settings.number("beta_fast", 32.0))
    high = dimension(settings.number("beta_slow", 1.0))
    if settings.flag("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.dims - 1)
    high += 0.001 * (low == high)
    ramp = np.clip((np.arange(rope.dims // 2, dtype=np.float32) - np.float32(low)) / np.float32(high - low), 0, 1)
    kept = np.float32(1.0) - ramp.astype(np.float32)
    slowed, plain = np.float32(1.0) / (np.float32(factor) * powers), np.float32(1.0) / powers
    freqs: Float32 = slowed * (np.float32(1.0) - kept) + plain * kept
    return freqs


def _yarn_magnitude(settings: Settings, factor: float) -> float:
    table: Mapping[str, Any] = settings.table
    if table.get("attention_factor") is not None:
        return settings.number("attention_factor")

    def magnitude(scale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0

    if table.get("mscale") and table.get("mscale_all_dim"):
        return magnitude(settings.number("mscale")) / magnitude(settings.number("mscale_all_dim"))
    return magnitude(1.0)


def cache(function: Callable[..., Array], table: Table, positions: int) -> Iterator[Float32]:
    """Yield the cosines or sines of all rotary angles as float32 blocks of shape (positions in the block, dims / 2).

    Peak memory: four blocks of at most ``BLOCK_BYTES`` each, including blocks in float64.
    """
    step = max(1, BLOCK_BYTES // (8 * len(table.freqs)))
    for start in range(0, positions, step):
        numbers = np.arange(start, min(start + step, positions), dtype=np.float32)
        angles = numbers[:, None] * table.freqs
        yield function(angles.astype(np.float64)).astype(np.float32) * np.float32(table.magnitude)
