"""Reads the two factors (``down`` and ``up``) of LoRA updates, and cuts the factors to fit a stored tensor."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Final

import numpy as np

from exporter.io.files import version_of
from exporter.sources.hf.safetensors import FileTensor
from exporter.sources.peft.edits import LowRank
from exporter.tensors import Array, cast, read

if TYPE_CHECKING:
    from exporter.sources.peft.parts import Part

#: Number of factors kept in memory. The tensors of all experts read slices of the same two factors.
_CACHED_FACTORS: Final = 4


def factor_shapes(update: LowRank) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return the shapes of the factors ``down`` and ``up``; for a stack of experts, the shapes for a single expert."""
    (joined, inner), (outer, _) = update.down.spec.shape, update.up.spec.shape
    rank = joined // update.experts
    return (rank, inner), (outer, rank)


def factors(update: LowRank, *, stacked: bool) -> tuple[Array, Array]:
    """Return the float32 factors of a matrix: ``down`` with shape (rank, in) and ``up`` with shape (out, rank).

    stacked: whether the parameter is a stack of experts. For a stack of experts, the shapes are (experts, rank, in) and
    (experts, out, rank). Source for the layout of stacked factors: PEFT's class ParamWrapper.
    """
    down, up = _as_f32(update.down), _as_f32(update.up)
    if not stacked:
        return down, up
    down = down.reshape(update.experts, -1, down.shape[1])
    return down, np.moveaxis(up.reshape(len(up), -1, update.experts), 2, 0)


def cut(left: Array, right: Array, part: Part) -> tuple[Array, Array]:
    """Return the factors (left, right) for the stored tensor that ``part`` describes; the update is left @ right.

    left: the left factor of the whole parameter, (rows, rank) or (experts, rows, rank). right: the right factor of the
    whole parameter, (rank, columns) or (experts, rank, columns). The stored tensor may also contain rows and columns of
    other parameters; for these rows and columns, the returned factors are zero. If the stored tensor is a stack of
    experts, the first axis of the returned factors is the expert.
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


def _as_f32(tensor: FileTensor) -> Array:
    return _read_as_f32(tensor, version_of(tensor.place.path))


@lru_cache(maxsize=_CACHED_FACTORS)
def _read_as_f32(tensor: FileTensor, version: tuple[int, ...]) -> Array:
    """Read ``tensor`` as float32. version: the version of the file; another version is read anew."""
    value = cast(read(tensor), "F32")
    value.flags.writeable = False
    return value
