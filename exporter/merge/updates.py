"""Brings low-rank updates into the orientation of their stored tensors.

PEFT's linear update is (out, in), as torch stores a linear layer. GPT-2's Conv1D stores (in, out). An embedding also
stores (in, out), with the token as input. The shapes decide the orientation. For a square matrix, the model type
decides.
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
from exporter.sources.peft.edits import LowRank, require_finite
from exporter.sources.peft.lora_config import PEFT_MERGE
from exporter.tensors import Array, blocks, cast, read

#: Model types with Conv1D for all linear layers but the head. Source: transformers' pytorch_utils.Conv1D and its users.
_CONV1D: Final = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")

#: Number of tensors with cached terms. The number is limited because the plan of a large model has hundreds of updates.
_CACHED_TENSORS: Final = 4


def is_transposed(checkpoint: Checkpoint, update: LowRank, shape: Sequence[int], name: str) -> bool:
    """Whether the stored tensor is (in, out) instead of (out, in).

    A stack of experts is (experts, out, in) or (experts, in, out). Raises TensorMismatch if the shapes do not fit.
    Raises NotExpressible for a stack of square matrices.
    """
    (_, inner), (outer, _) = factor_shapes(update)
    straight, transposed = tuple(shape[-2:]) == (outer, inner), tuple(shape[-2:]) == (inner, outer)
    stacked = len(shape) == 3 and update.target_type == "parameter"
    if len(shape) != 2 and not (stacked and update.down.spec.shape[0] % shape[0] == 0):
        straight = transposed = False
    if stacked and straight and transposed:
        raise NotExpressible(
            f"{update.path}: {update.key}",
            f"{name} is a stack of square matrices, so the shapes do not show which axis is the input",
            instead=PEFT_MERGE,
        )
    if update.target_type == "embedding":
        straight = False
    elif update.target_type == "parameter":
        transposed = transposed and stacked
    elif straight and transposed:
        transposed = checkpoint.config.get("model_type") in _CONV1D and name != checkpoint.tie.head
        straight = not transposed
    if straight == transposed:
        expected = f"factors for {name} of shape {tuple(shape)}"
        actual = f"{update.down.spec.shape} and {update.up.spec.shape}"
        hint = "the adapter was trained on a different base"
        raise TensorMismatch(update.path, update.key, expected=expected, found=actual, hint=hint)
    return transposed


def check_update(checkpoint: Checkpoint, update: LowRank, shape: Sequence[int], name: str) -> None:
    """Check that the factors fit the tensor, then that the values of the factors are finite.

    The shapes are checked first, because factors that fit are not larger than the base. Raises TensorMismatch,
    NotExpressible.
    """
    is_transposed(checkpoint, update, shape, name)
    factors = [update.down, update.up]
    if update.magnitude is not None:
        length = math.prod(update.magnitude.spec.shape)
        if length not in shape:
            expected = f"a magnitude for each row or column of {tuple(shape)}"
            raise TensorMismatch(update.path, update.magnitude.spec.name, expected=expected, found=length)
        factors.append(update.magnitude)
    for factor in factors:
        require_finite(update.path, factor)


@lru_cache(maxsize=_CACHED_TENSORS)
def terms(updates: tuple[tuple[LowRank, bool], ...], source: FileTensor) -> tuple[Term, ...]:
    """The updates of one tensor, ready to be added.

    updates: (update, whether the stored tensor is (in, out)). source: the tensor before the updates, which is read once
    for DoRA's norms over columns. Memory: the factors in float32. Raises TensorMismatch if a magnitude has the wrong
    length.
    """
    return tuple(_term(update, transposed, source) for update, transposed in updates)


def _term(update: LowRank, transposed: bool, source: FileTensor) -> Term:
    stacked = len(source.spec.shape) == 3
    down, up = stacked_factors(update, source.spec.n_rows) if stacked else factors(update)
    left, right = (down.swapaxes(-1, -2), up.swapaxes(-1, -2)) if transposed else (up, down)
    left = np.ascontiguousarray(left) * np.float32(update.scaling)
    right = np.ascontiguousarray(right)
    if update.magnitude is None:
        return Term(left, right)
    gain = cast(read(update.magnitude), "F32").reshape(-1)
    if len(gain) != (right.shape[1] if transposed else len(left)):
        expected = f"{right.shape[1] if transposed else len(left)} magnitudes"
        raise TensorMismatch(update.path, update.magnitude.spec.name, expected=expected, found=len(gain))
    if not transposed:
        return Term(left, right, gain)
    return Term(left, right, gain, by_row=False, norm=_column_norms(left, right, source))


def _column_norms(left: Array, right: Array, source: FileTensor) -> Array:
    """Norms of the columns of source + left @ right. Memory: one block."""
    total = np.zeros(right.shape[1], np.float64)
    for start, block in blocks(source, 1 << 20):
        value = cast(block, "F32") + left[start : start + len(block)] @ right
        total += np.einsum("ij,ij->j", value, value, dtype=np.float64)
    norms: Array = np.sqrt(total).astype(np.float32)
    return norms


def bias_of(updates: Sequence[LowRank]) -> Array:
    """The sum of the scaled LoRA biases in float32, which is added to a bias of the base."""
    total: Any = 0
    for update in updates:
        assert update.bias is not None
        total = total + cast(read(update.bias), "F32") * np.float32(update.scaling)
    added: Array = total
    return added
