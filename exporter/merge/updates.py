"""Converts low-rank updates to the orientation of the stored weights: (out, in) or (in, out).

PEFT's update of a linear layer has the shape (out, in), as torch stores the weight of a linear layer. In contrast, the
Conv1D layer of GPT-2 stores the weight as (in, out). An embedding also counts as (in, out), because the rows of an
embedding are indexed by the input token. To find the orientation of a weight, this module compares the weight's shape
with the shape of the update. A square weight has the same shape in both orientations; in this case, the model type
determines the orientation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Final

import numpy as np

from exporter.errors import NotExpressible, TensorMismatch
from exporter.io.files import version_of
from exporter.merge.factors import cut, factor_shapes, factors
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
    """Whether the parameter that ``update`` changes has the orientation (in, out) instead of (out, in).

    For a stack of experts, the two orientations are (experts, in, out) and (experts, out, in). shape: the shape of the
    stored tensor. Raises TensorMismatch if the shape of the update does not fit the shape of the parameter. Raises
    NotExpressible for a stack of square matrices if ttexport has no record of the orientation.
    """
    whole = tuple(update.part.shape if update.part else shape)
    if update.target_type == "convolution" and update.part is None and len(whole) > 2:
        whole = (whole[0], math.prod(whole[1:]))
    (_, inner), (outer, _) = factor_shapes(update)
    straight, transposed = whole[-2:] == (outer, inner), whole[-2:] == (inner, outer)
    stacked = len(whole) == 3 and update.target_type == "parameter"
    if len(whole) != 2 and not (stacked and update.experts == whole[0]):
        straight = transposed = False
    if stacked and straight and transposed:
        if update.transposed is None:
            raise NotExpressible(
                f"{update.path}: {update.key}",
                f"{name} is a stack of square matrices, so the shapes do not show which axis is the input",
                instead=PEFT_MERGE,
            )
        straight, transposed = not update.transposed, update.transposed
    if update.target_type == "embedding":
        straight = False
    elif update.target_type == "convolution":
        transposed = False
    elif update.target_type == "parameter":
        transposed = transposed and stacked
    elif straight and transposed:
        by_type = checkpoint.config.get("model_type") in _CONV1D and name != checkpoint.tie.head
        transposed = by_type if update.transposed is None else update.transposed
        straight = not transposed
    if straight == transposed:
        expected = f"LoRA factors that fit {name} of shape {whole}"
        actual = f"factors of shapes {update.down.spec.shape} and {update.up.spec.shape}"
        hint = "the adapter was trained on a different base"
        raise TensorMismatch(update.path, update.key, expected=expected, found=actual, hint=hint)
    return transposed


def check_update(checkpoint: Checkpoint, update: LowRank, shape: Sequence[int], name: str) -> None:
    """Check that the shapes of the LoRA factors fit the tensor and that the values of the factors are finite.

    The shapes are checked before the values are read, so that no factors larger than the base model are read into
    memory. Raises TensorMismatch or NotExpressible if a check fails.
    """
    is_transposed(checkpoint, update, shape, name)
    factors = [update.down, update.up]
    if update.magnitude is not None:
        length = math.prod(update.magnitude.spec.shape)
        whole = tuple(update.part.shape if update.part else shape)
        if length not in whole:
            expected = f"a DoRA magnitude for each row or column of a tensor of shape {whole}"
            raise TensorMismatch(update.path, update.magnitude.spec.name, expected=expected, found=length)
        factors.append(update.magnitude)
    for factor in factors:
        require_finite(update.path, factor)


def terms(updates: tuple[tuple[LowRank, bool], ...], source: FileTensor) -> tuple[Term, ...]:
    """Read the updates of one tensor and convert the updates to the orientation of the tensor.

    updates: pairs (update, whether the stored tensor has the orientation (in, out)). source: the stored tensor, which
    is read once if DoRA needs column norms. Peak memory: the size of the factors in float32. Raises TensorMismatch if
    the length of a DoRA magnitude vector does not fit the tensor.
    """
    paths = dict.fromkeys([source.place.path, *(update.down.place.path for update, _ in updates)])
    return _terms(updates, source, tuple(map(version_of, paths)))


@lru_cache(maxsize=_CACHED_TENSORS)
def _terms(
    updates: tuple[tuple[LowRank, bool], ...], source: FileTensor, versions: tuple[tuple[int, ...], ...]
) -> tuple[Term, ...]:
    """Return the terms of ``updates``. versions: the versions of the files; other versions are read anew."""
    return tuple(_term(update, transposed, source) for update, transposed in updates)


def _term(update: LowRank, transposed: bool, source: FileTensor) -> Term:
    shape = update.part.shape if update.part else source.spec.shape
    down, up = factors(update, stacked=len(shape) == 3 and update.target_type == "parameter")
    left, right = (down.swapaxes(-1, -2), up.swapaxes(-1, -2)) if transposed else (up, down)
    if update.part is not None:
        left, right = cut(left, right, update.part)
    left = np.ascontiguousarray(left) * np.float32(update.scaling)
    right = np.ascontiguousarray(right)
    if update.magnitude is None:
        return Term(left, right)
    by_row = transposed == (update.part is not None and update.part.is_transposed)
    gain = _gain(update, transposed, len(left) if by_row else right.shape[1])
    if by_row:
        return Term(left, right, gain)
    return Term(left, right, gain, by_row=False, norm=_column_norms(left, right, source))


def _gain(update: LowRank, transposed: bool, length: int) -> Array:
    """Return DoRA's magnitudes for all rows or columns of the stored tensor, with NaN for rows of other parameters."""
    assert update.magnitude is not None
    gain = cast(read(update.magnitude), "F32").reshape(-1)
    part = update.part
    wanted = part.shape[-1 if transposed else -2] if part else length
    if len(gain) != wanted:
        raise TensorMismatch(update.path, update.magnitude.spec.name, expected=f"{wanted} magnitudes", found=len(gain))
    if part is None:
        return gain
    at, stored = part.positions(-1 if transposed else -2)
    whole = np.full(length, np.nan, np.float32)
    whole[stored] = gain[at]
    return whole


def _column_norms(left: Array, right: Array, source: FileTensor) -> Array:
    """Return the column norms of the matrix source + left @ right. Peak memory: one block of rows."""
    total = np.zeros(right.shape[1], np.float64)
    for start, block in blocks(source, 1 << 20):
        value = cast(block, "F32") + left[start : start + len(block)] @ right
        total += np.einsum("ij,ij->j", value, value, dtype=np.float64)
    norms: Array = np.sqrt(total).astype(np.float32)
    return norms


def bias_of(updates: Sequence[LowRank]) -> Array:
    """Return the float64 sum of the scaled bias vectors of ``updates``, to add to a bias of the base model."""
    total: Any = 0
    for update in updates:
        assert update.bias is not None
        added = cast(read(update.bias), "F64") * update.scaling
        if update.part is not None:
            at, stored = update.part.positions(-1)
            whole = np.zeros(update.part.stored_shape)
            whole[stored] = added[at]
            added = whole
        total = total + added
    summed: Array = total
    return summed
