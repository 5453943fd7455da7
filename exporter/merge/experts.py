"""Splits updates of stacked experts into updates of single experts.

A PEFT update targets the stack of all experts, but most checkpoints store each expert in separate tensors. The LoRA
factors cover all experts of the stack: lora_A is (r * experts, in) with the rank as the inner index, and lora_B is
(out, r * experts) with the expert as the inner index. The layout of the factors is defined by PEFT's ParamWrapper.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Final

import numpy as np

from exporter.merge.names import stored_name
from exporter.sources.hf.checkpoint import Checkpoint
from exporter.sources.hf.safetensors import FileTensor
from exporter.sources.peft.edits import Expert, LowRank
from exporter.tensors import Array, cast, read

#: Parameter of the stack → names, in checkpoints, of the projections that the parameter joins along the outputs.
_SHARES: Final = {
    "gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")),
    "down_proj": (("down_proj",), ("w2",)),
}
#: (name of the block in transformers 5, name in older checkpoints). Source: transformers' conversion_mapping.
_BLOCKS: Final = ((".mlp.", ".mlp."), (".mlp.", ".block_sparse_moe."))

#: Number of factors kept in memory. The tensors of all experts read slices of the same two factors.
_CACHED_FACTORS: Final = 4


def by_expert(checkpoint: Checkpoint, update: LowRank) -> dict[str, LowRank]:
    """Map the tensor name of each expert to its part of ``update``, or return {} if experts are stored stacked."""
    for new, old in _BLOCKS:
        module = update.module.replace(new, old)
        for projections in _SHARES.get(update.parameter, ()):
            parts: dict[str, LowRank] = {}
            number = 0
            while names := [stored_name(checkpoint, f"{module}.{number}.{name}", "weight") for name in projections]:
                if None in names:
                    break
                for share, name in enumerate(names):
                    parts[str(name)] = replace(update, expert=Expert(number, share, len(projections)))
                number += 1
            if parts:
                return {name: _counted(part, number) for name, part in parts.items()}
    return {}


def _counted(part: LowRank, experts: int) -> LowRank:
    assert part.expert is not None
    return replace(part, expert=replace(part.expert, experts=experts))


def factor_shapes(update: LowRank) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return the shapes of the two ``factors``, or (0, 0) twice if the number of experts does not divide the rank."""
    (joined, inner), (outer, _) = update.down.spec.shape, update.up.spec.shape
    if update.expert is None:
        return (joined, inner), (outer, joined)
    rank, rest = divmod(joined, update.expert.experts)
    if rest or outer % update.expert.shares:
        return (0, 0), (0, 0)
    return (rank, inner), (outer // update.expert.shares, rank)


def factors(update: LowRank) -> tuple[Array, Array]:
    """Return the float32 factors (down (r, in), up (out, r)) of ``update``.

    If ``update.expert`` is set, only the part of the factors for that expert is returned.
    """
    down, up = _as_f32(update.down), _as_f32(update.up)
    if (expert := update.expert) is None:
        return down, up
    down = down.reshape(expert.experts, -1, down.shape[1])[expert.number]
    up = up.reshape(len(up), -1, expert.experts)[:, :, expert.number]
    size = len(up) // expert.shares
    return down, up[expert.share * size : (expert.share + 1) * size]


def stacked_factors(update: LowRank, experts: int) -> tuple[Array, Array]:
    """Return the float32 factors of a stack of experts: (down (experts, r, in), up (experts, out, r))."""
    down, up = _as_f32(update.down), _as_f32(update.up)
    down = down.reshape(experts, -1, down.shape[1])
    return down, np.moveaxis(up.reshape(len(up), -1, experts), 2, 0)


@lru_cache(maxsize=_CACHED_FACTORS)
def _as_f32(tensor: FileTensor) -> Array:
    value = cast(read(tensor), "F32")
    value.flags.writeable = False
    return value
