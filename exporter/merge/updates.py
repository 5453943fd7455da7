"""Low-rank updates in the orientation of the tensors they go into.

PEFT's linear update is (out, in) as torch stores a linear layer; GPT-2's Conv1D stores (in, out), and so does an
embedding, whose input is the token. Which it is follows from the shapes, and where a matrix is square from the model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Final

import numpy as np

from exporter.errors import NotExpressible, TensorMismatch
from exporter.merge.experts import factor_shapes, factors, stacked_factors
from exporter.merge.passes import Term
from exporter.sources.hf.checkpoint import Checkpoint
from exporter.sources.hf.safetensors import FileTensor
from exporter.sources.peft.lora_config import PEFT_MERGE
from exporter.sources.peft.parts import LowRank, require_finite
from exporter.tensors import Array, blocks, cast, read

#: Model types whose linear layers but the head are Conv1D. Source: transformers' pytorch_utils.Conv1D and its users.
_CONV1D: Final = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")

#: A plan of a large model names hundreds of updates; the factors of a few are held at a time.
_HELD: Final = 4


def is_transposed(checkpoint: Checkpoint, part: LowRank, shape: Sequence[int], name: str) -> bool:
    """Whether the stored tensor is (in, out).

    A stack of experts is (experts, out, in) or (experts, in, out). Raises TensorMismatch for shapes that do not fit,
    NotExpressible for a stack of square matrices.
    """
    (_, inner), (outer, _) = factor_shapes(part)
    straight, turned = tuple(shape[-2:]) == (outer, inner), tuple(shape[-2:]) == (inner, outer)
    stacked = len(shape) == 3 and part.kind == "parameter"
    if len(shape) != 2 and not (stacked and part.down.spec.shape[0] % shape[0] == 0):
        straight = turned = False
    if stacked and straight and turned:
        raise NotExpressible(
            f"{part.path}: {part.key}",
            f"{name} is a stack of square matrices, and nothing says which of their sides is the input",
            instead=PEFT_MERGE,
        )
    if part.kind == "embedding":
        straight = False
    elif part.kind == "parameter":
        turned = turned and stacked
    elif straight and turned:
        turned = checkpoint.config.get("model_type") in _CONV1D and name != checkpoint.tie.head
        straight = not turned
    if straight == turned:
        expected = f"factors for {name} of shape {tuple(shape)}"
        found = f"{part.down.spec.shape} and {part.up.spec.shape}"
        hint = "the adapter was trained on another base"
        raise TensorMismatch(part.path, part.key, expected=expected, found=found, hint=hint)
    return turned


def check_update(checkpoint: Checkpoint, part: LowRank, shape: Sequence[int], name: str) -> None:
    """Factors must fit the tensor and hold finite values, judged in this order: what fits is no larger than the base.

    Raises TensorMismatch, NotExpressible.
    """
    is_transposed(checkpoint, part, shape, name)
    factors = [part.down, part.up]
    if part.magnitude is not None:
        length = math.prod(part.magnitude.spec.shape)
        if length not in shape:
            expected = f"a magnitude for each row or column of {tuple(shape)}"
            raise TensorMismatch(part.path, part.magnitude.spec.name, expected=expected, found=length)
        factors.append(part.magnitude)
    for factor in factors:
        require_finite(part.path, factor)


@lru_cache(maxsize=_HELD)
def terms(parts: tuple[tuple[LowRank, bool], ...], source: FileTensor) -> tuple[Term, ...]:
    """The updates of one tensor, ready to be added. parts: each with whether its tensor is (in, out).

    source: the tensor before the updates; DoRA's norms over columns need one pass over it. Memory: the factors in
    float32.
    """
    return tuple(_term(part, transposed, source) for part, transposed in parts)


def _term(part: LowRank, transposed: bool, source: FileTensor) -> Term:
    stacked = len(source.spec.shape) == 3
    down, up = stacked_factors(part, source.spec.n_rows) if stacked else factors(part)
    left, right = (down.swapaxes(-1, -2), up.swapaxes(-1, -2)) if transposed else (up, down)
    left = np.ascontiguousarray(left) * np.float32(part.scaling)
    right = np.ascontiguousarray(right)
    if part.magnitude is None:
        return Term(left, right)
    gain = cast(read(part.magnitude), "F32").reshape(-1)
    if len(gain) != (right.shape[1] if transposed else len(left)):
        expected = f"{right.shape[1] if transposed else len(left)} magnitudes"
        raise TensorMismatch(part.path, part.magnitude.spec.name, expected=expected, found=len(gain))
    if not transposed:
        return Term(left, right, gain)
    return Term(left, right, gain, by_row=False, norm=_column_norms(left, right, source))


def _column_norms(left: Array, right: Array, source: FileTensor) -> Array:
    """The norm of every column of source + left @ right. Memory: one block."""
    total = np.zeros(right.shape[1], np.float64)
    for start, block in blocks(source, 1 << 20):
        value = cast(block, "F32") + left[start : start + len(block)] @ right
        total += np.einsum("ij,ij->j", value, value, dtype=np.float64)
    norms: Array = np.sqrt(total).astype(np.float32)
    return norms


def bias_of(parts: Sequence[LowRank]) -> Array:
    """What LoRA biases add to a bias: their scaled sum, float32."""
    total: Any = 0
    for part in parts:
        assert part.bias is not None
        total = total + cast(read(part.bias), "F32") * np.float32(part.scaling)
    added: Array = total
    return added
