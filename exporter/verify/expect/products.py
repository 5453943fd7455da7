"""Compute, in float64, the values that a low-rank update adds to rows of a stored tensor.

The products of LoRA factors are computed without the exporter's merge code. If a checkpoint stores a parameter as
several tensors or as part of a fused tensor, the product of the LoRA factors is distributed over the stored tensors.
PEFT stores the LoRA factors of all experts in a stack as one concatenated tensor per factor. The order of the
concatenated factors follows the einsum "o r e, e r i -> e o i" in PEFT's ParamWrapper.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Final

import numpy as np

from exporter.io.files import version_of
from exporter.sources.hf.safetensors import FileTensor
from exporter.sources.peft.edits import LowRank
from exporter.tensors import Array, read

_HELD: Final = 4


def change(update: LowRank, shape: tuple[int, ...], ids: Sequence[int]) -> Array:
    """Return what the update adds to the rows ``ids`` of a stored tensor of shape ``shape``, before the LoRA scaling.

    For elements of the stored tensor that do not belong to the updated parameter, the result is zero.
    """
    if len(shape) == 3:
        return np.stack([_matrix(update, number, shape, range(shape[1])) for number in ids])
    return _matrix(update, update.part.expert if update.part else None, shape, ids)


def _matrix(update: LowRank, expert: int | None, shape: tuple[int, ...], ids: Sequence[int]) -> Array:
    """Return what the update adds to the rows ``ids`` of one stored matrix, before the LoRA scaling.

    expert: the number of the expert in a stack of experts, or None. shape: the shape of the stored matrix, or, for an
    expert, the shape of the whole stack.
    """
    up, down = wide_factors(update, expert)
    transposed = stored_in_out(update, parameter_shape(update, shape))
    rows_of, columns_of = (down.T, up.T) if transposed else (up, down)
    part = update.part
    if part is None:
        return rows_of[list(ids)] @ columns_of
    row_axis, column_axis = (-1, -2) if part.is_transposed else (-2, -1)
    rows = _positions(part.positions(row_axis), shape[-2])
    columns = _positions(part.positions(column_axis), shape[-1])
    if part.is_transposed:
        rows_of, columns_of = columns_of.T, rows_of.T
    wanted = rows[list(ids)]
    out = np.zeros((len(wanted), shape[-1]))
    product = rows_of[wanted[wanted >= 0]] @ columns_of[:, columns[columns >= 0]]
    out[np.ix_(wanted >= 0, columns >= 0)] = product
    return out


def magnitudes(update: LowRank, shape: tuple[int, ...]) -> tuple[Array, bool]:
    """Return (DoRA magnitudes, by_column) for a stored matrix; by_column is False if there is one magnitude per row.

    The magnitude of a row or column that does not belong to the updated parameter is NaN.
    """
    assert update.magnitude is not None
    gain = _wide(update.magnitude).reshape(-1)
    transposed = stored_in_out(update, parameter_shape(update, shape))
    part = update.part
    if part is None:
        return gain, transposed
    by_column = transposed != part.is_transposed
    places = _positions(part.positions(-1 if transposed else -2), shape[-1 if by_column else -2])
    return np.where(places >= 0, gain[np.maximum(places, 0)], np.nan), by_column


def bias(update: LowRank, ids: Sequence[int]) -> Array:
    """Return what a LoRA bias adds to the elements ``ids`` of a stored bias vector, before the LoRA scaling."""
    assert update.bias is not None
    value = _wide(update.bias)
    if update.part is None:
        return value[list(ids)]
    places = _positions(update.part.positions(-1), update.part.stored_shape[0])[list(ids)]
    return np.where(places >= 0, value[np.maximum(places, 0)], 0.0)


def parameter_shape(update: LowRank, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of the updated parameter in transformers. shape: the shape of the tensor in the checkpoint."""
    return update.part.shape if update.part else shape


def stored_in_out(update: LowRank, shape: tuple[int, ...]) -> bool:
    """Whether the matrices in a parameter of shape ``shape`` have the shape (in, out) instead of (out, in).

    Whether a square matrix has the shape (in, out) is determined by the module class or, for an unknown class, by the
    adapter's ``fan_in_fan_out`` setting.
    """
    if update.target_type == "embedding":
        return True
    if update.target_type == "convolution":
        return False
    if update.target_type == "parameter" and len(shape) == 2:
        return False
    if shape[-2] == shape[-1]:
        return update.fan_in_fan_out if update.transposed is None else update.transposed
    return shape[-2] == update.down.spec.shape[1]


def wide_factors(update: LowRank, expert: int | None = None) -> tuple[Array, Array]:
    """Return the float64 LoRA factors (up, down) of a matrix, or of the matrix of ``expert`` in a stack of experts."""
    up, down = _wide(update.up), _wide(update.down)
    if expert is None or update.experts == 1:
        return up, down
    rank = len(down) // update.experts
    return up[:, expert :: update.experts], down[expert * rank : (expert + 1) * rank]


def _positions(places: tuple[Array, Array], length: int) -> Array:
    """Map the indices of a stored tensor's axis to indices of the parameter's axis, or to -1 outside the parameter."""
    at, stored = places
    out = np.full(length, -1)
    out[stored] = at
    return out


def _wide(tensor: FileTensor) -> Array:
    return _read_wide(tensor, version_of(tensor.place.path))


@lru_cache(maxsize=_HELD)
def _read_wide(tensor: FileTensor, version: tuple[int, ...]) -> Array:
    """Read ``tensor`` as float64. version: the version of the file; another version is read anew."""
    value: Array = read(tensor).astype(np.float64)
    value.flags.writeable = False
    return value
