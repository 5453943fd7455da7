"""Converts low-rank updates to the orientation of the stored tensors.

PEFT's update of a linear layer has the shape (out, in), as torch stores the weight of a linear layer. GPT-2's Conv1D
stores the weight as (in, out). An embedding also stores the weight as (in, out), where the token is the input. The
orientation of a weight is determined by comparing the shapes of the weight and of the update. The orientation of a
square weight is determined by the model type.
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
    """Whether the stored tensor has the orientation (in, out), not (out, in).

    A stack of experts has the shape (experts, out, in) or (experts, in, out). Raises TensorMismatch if the shape of the
    update does not fit the shape of the tensor. Raises NotExpressible for a stack of square matrices, whose orientation
    is ambiguous.
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
        expected = f"LoRA factors that fit {name} of shape {tuple(shape)}"
        actual = f"factors of shapes {update.down.spec.shape} and {update.up.spec.shape}"
        hint = "the adapter was trained on a different base"
        raise TensorMismatch(update.path, update.key, expected=expected, found=actual, hint=hint)
    return transposed


def check_update(checkpoint: Checkpoint, update: LowRank, shape: Sequence[int], name: str) -> None:
    """Check that the shapes of the LoRA factors fit the tensor and that the values of the factors are finite.

    The shapes are checked before the values are read, because factors whose shapes fit are not larger than the base
    model. Raises TensorMismatch, NotExpressible.
    """
    is_transposed(checkpoint, update, shape, name)
    factors = [update.down, update.up]
    if update.magnitude is not None:
        length = math.prod(update.magnitude.spec.shape)
        if length not in shape:
            expected = f"a DoRA magnitude for each row or column of a tensor of shape {tuple(shape)}"
            raise TensorMismatch(update.path, update.magnitude.spec.name, expected=expected, found=length)
        factors.append(update.magnitude)
    for factor in factors:
        require_finite(update.path, factor)


@lru_cache(maxsize=_CACHED_TENSORS)
def terms(updates: tuple[tuple[LowRank, bool], ...], source: FileTensor) -> tuple[Term, ...]:
    """Read the updates of one tensor and convert the updates to the orientation of the tensor.

    updates: pairs (update, whether the stored tensor has the orientation (in, out)). source: the tensor before the
    updates, which is read once if DoRA needs the norms of columns. Peak memory: the factors in float32. Raises
    TensorMismatch if the length of a DoRA magnitude vector does not fit the tensor.
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
    """Return the norms of the columns of source + left @ right. Peak memory: one block."""
    total = np.zeros(right.shape[1], np.float64)
    for start, block in blocks(source, 1 << 20):
        value = cast(block, "F32") + left[start : start + len(block)] @ right
        total += np.einsum("ij,ij->j", value, value, dtype=np.float64)
    norms: Array = np.sqrt(total).astype(np.float32)
    return norms


def bias_of(updates: Sequence[LowRank]) -> Array:
    """Return the float32 sum of the scaled LoRA biases, which is to be added to a bias of the base model."""
    total: Any = 0
    for update in updates:
        assert update.bias is not None
        total = total + cast(read(update.bias), "F32") * np.float32(update.scaling)
    added: Array = total
    return added
