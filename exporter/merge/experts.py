"""Updates of stacked experts: PEFT targets the stack of all experts, and most checkpoints store them one by one.

Source of the layout: PEFT's ParamWrapper, whose factors hold all experts: lora_A (r * experts, in) with the rank
inside the expert, lora_B (out, r * experts) with the expert inside the rank.
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

#: A parameter of the stack → the projections that it joins along its outputs, as checkpoints name them.
_SHARES: Final = {
    "gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")),
    "down_proj": (("down_proj",), ("w2",)),
}
#: How transformers 5 calls the block → how older checkpoints do. Source: transformers' conversion_mapping.
_BLOCKS: Final = ((".mlp.", ".mlp."), (".mlp.", ".block_sparse_moe."))

#: Every expert's tensor needs its part of the same two factors.
_HELD: Final = 4


def by_expert(checkpoint: Checkpoint, update: LowRank) -> dict[str, LowRank]:
    """Stored name → the part of the update that goes into it, for a stack that is stored expert by expert, else {}."""
    for new, old in _BLOCKS:
        module = update.module.replace(new, old)
        for words in _SHARES.get(update.parameter, ()):
            found: dict[str, LowRank] = {}
            number = 0
            while names := [stored_name(checkpoint, f"{module}.{number}.{word}", "weight") for word in words]:
                if None in names:
                    break
                for share, name in enumerate(names):
                    found[str(name)] = replace(update, expert=Expert(number, share, len(words)))
                number += 1
            if found:
                return {name: _counted(piece, number) for name, piece in found.items()}
    return {}


def _counted(piece: LowRank, experts: int) -> LowRank:
    assert piece.expert is not None
    return replace(piece, expert=replace(piece.expert, experts=experts))


def factor_shapes(update: LowRank) -> tuple[tuple[int, int], tuple[int, int]]:
    """Shapes of ``factors``; (0, 0) where the ranks do not divide among the experts."""
    (joined, inner), (outer, _) = update.down.spec.shape, update.up.spec.shape
    if update.expert is None:
        return (joined, inner), (outer, joined)
    rank, rest = divmod(joined, update.expert.experts)
    if rest or outer % update.expert.shares:
        return (0, 0), (0, 0)
    return (rank, inner), (outer // update.expert.shares, rank)


def factors(update: LowRank) -> tuple[Array, Array]:
    """(down (r, in), up (out, r)) float32: of the whole update, or of the expert and share that ``update`` names."""
    down, up = _wide(update.down), _wide(update.up)
    if (expert := update.expert) is None:
        return down, up
    down = down.reshape(expert.experts, -1, down.shape[1])[expert.number]
    up = up.reshape(len(up), -1, expert.experts)[:, :, expert.number]
    size = len(up) // expert.shares
    return down, up[expert.share * size : (expert.share + 1) * size]


def stacked_factors(update: LowRank, experts: int) -> tuple[Array, Array]:
    """(down (experts, r, in), up (experts, out, r)) float32."""
    down, up = _wide(update.down), _wide(update.up)
    down = down.reshape(experts, -1, down.shape[1])
    return down, np.moveaxis(up.reshape(len(up), -1, experts), 2, 0)


@lru_cache(maxsize=_HELD)
def _wide(tensor: FileTensor) -> Array:
    value = cast(read(tensor), "F32")
    value.flags.writeable = False
    return value
