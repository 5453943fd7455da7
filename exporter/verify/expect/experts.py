"""Split a LoRA update of stacked mixture-of-experts weights into one update per expert.

The split is computed without the exporter's merge code. PEFT concatenates the LoRA factors of all experts of a stack.
Sources: the einsum "o r e, e r i -> e o i" in PEFT's ParamWrapper, and the names that transformers gives to expert
tensors on disk.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Final

import numpy as np

from exporter.sources.hf.safetensors import FileTensor
from exporter.sources.peft.edits import Expert, LowRank
from exporter.tensors import Array, read

#: Name of a projection on disk → (parameter of the stack, number of the projection's share, number of shares).
_PROJECTIONS: Final = {
    "gate_proj": ("gate_up_proj", 0, 2),
    "up_proj": ("gate_up_proj", 1, 2),
    "down_proj": ("down_proj", 0, 1),
    "w1": ("gate_up_proj", 0, 2),
    "w3": ("gate_up_proj", 1, 2),
    "w2": ("down_proj", 0, 1),
}
_EXPERT: Final = re.compile(r"layers\.(\d+)\.(?:mlp|block_sparse_moe)\.experts\.(\d+)\.(\w+)\.weight$")
_STACK: Final = re.compile(r"layers\.(\d+)\.mlp\.experts$")
_HELD: Final = 4


#: (layer, parameter of the stack) → (stored name, number of the expert, number of the share, number of shares).
Index = Mapping[tuple[str, str], list[tuple[str, int, int, int]]]


def index_experts(names: Iterable[str]) -> Index:
    """Map each stack of experts, given by layer and parameter, to the stored tensors of its experts."""
    index: dict[tuple[str, str], list[tuple[str, int, int, int]]] = {}
    for name in sorted(names):
        if (match := _EXPERT.search(name)) and match[3] in _PROJECTIONS:
            parameter, share, shares = _PROJECTIONS[match[3]]
            index.setdefault((match[1], parameter), []).append((name, int(match[2]), share, shares))
    return index


def expert_pieces(update: LowRank, index: Index) -> Iterator[tuple[str, LowRank]]:
    """Yield (tensor name, part of ``update`` for the tensor) for every expert that is stored as a separate tensor."""
    stack = _STACK.search(update.module)
    mine = index.get((stack[1], update.parameter), []) if stack else []
    experts = len({number for _, number, _, _ in mine})
    for name, number, share, shares in mine:
        yield name, replace(update, expert=Expert(number, share, shares, experts))


def wide_factors(update: LowRank) -> tuple[Array, Array]:
    """Return the LoRA factors (down, up) of ``update`` in float64.

    If ``update`` is for a single expert, only the factors of that expert are returned.
    """
    down, up = _wide(update.down), _wide(update.up)
    if update.expert is None:
        return down, up
    experts, number = update.expert.experts, update.expert.number
    rank = len(down) // experts
    down, up = down[number * rank : (number + 1) * rank], up[:, number::experts]
    return down, np.split(up, update.expert.shares)[update.expert.share]


def stacked_products(update: LowRank, shape: tuple[int, ...], ids: Sequence[int]) -> Array:
    """Return the LoRA products up @ down of the experts ``ids``, without the LoRA scaling.

    The returned array has the shape (n, *shape[1:]), and each product is transposed if ``shape`` is (experts, in, out)
    instead of (experts, out, in).
    """
    experts, outer = shape[0], update.up.spec.shape[0]
    out = []
    for number in ids:
        down, up = wide_factors(replace(update, expert=Expert(number, 0, 1, experts)))
        product = up @ down
        out.append(product if shape[1] == outer else product.T)
    return np.stack(out)


@lru_cache(maxsize=_HELD)
def _wide(tensor: FileTensor) -> Array:
    value: Array = read(tensor).astype(np.float64)
    value.flags.writeable = False
    return value
