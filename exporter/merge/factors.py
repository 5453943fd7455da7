"""Reads the factors of low-rank updates, and selects the parts of the factors that apply to one stored tensor."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Final

import numpy as np

from exporter.sources.hf.safetensors import FileTensor
from exporter.sources.peft.edits import LowRank
from exporter.tensors import Array, cast, read

if TYPE_CHECKING:
    from exporter.sources.peft.parts import Part

#: Number of factors kept in memory. The tensors of all experts read slices of the same two factors.
_CACHED_FACTORS: Final = 4


def factor_shapes(update: LowRank) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return the shapes of the factors (down, up) for a matrix, or for one expert's matrix in a stack of experts."""
    (joined, inner), (outer, _) = update.down.spec.shape, update.up.spec.shape
    rank = joined // update.experts
    return (rank, inner), (outer, rank)


def factors(update: LowRank, *, stacked: bool) -> tuple[Array, Array]:
    """Return the float32 factors (down (r, in), up (out, r)) of a matrix.

    stacked: whether the parameter is a stack of experts, for which the factors (down (experts, r, in), up (experts,
    out, r)) are returned. Source of the layout of stacked factors: PEFT's ParamWrapper.
    """
    down, up = _as_f32(update.down), _as_f32(update.up)
    if not stacked:
        return down, up
    down = down.reshape(update.experts, -1, down.shape[1])
    return down, np.moveaxis(up.reshape(len(up), -1, update.experts), 2, 0)


def cut(left: Array, right: Array, part: Part) -> tuple[Array, Array]:
    """Return the factors (left (rows, r), right (r, columns)) for the stored tensor that ``part`` describes.

    left, right: the factors of the whole parameter, in the parameter's orientation; for a stack of experts, with a
    leading axis. The returned factors are zero for rows and columns of the stored tensor that do not belong to the
    parameter. The returned factors have a leading axis for the experts if the stored tensor is a stack of experts.
    """
    expert = part.expert
    if expert is not None and left.ndim == 3:
        left, right = left[expert], right[expert]
    (rows, stored_rows), (columns, stored_columns) = part.positions(-2), part.positions(-1)
    left, right = left[..., rows, :], right[..., columns]
    if part.is_transposed:
        left, right = right.swapaxes(-1, -2), left.swapaxes(-1, -2)
        stored_rows, stored_columns = stored_columns, stored_rows
    n_rows, n_columns = part.stored_shape[-2:]
    whole_left = np.zeros((*left.shape[:-2], n_rows, left.shape[-1]), np.float32)
    whole_left[..., stored_rows, :] = left
    whole_right = np.zeros((*right.shape[:-1], n_columns), np.float32)
    whole_right[..., stored_columns] = right
    return whole_left, whole_right


@lru_cache(maxsize=_CACHED_FACTORS)
def _as_f32(tensor: FileTensor) -> Array:
    value = cast(read(tensor), "F32")
    value.flags.writeable = False
    return value
