"""Defines the four types of edits.

An edit is the change that an adapter makes to one module of the base model: new token rows, a low-rank update, a whole
tensor, or a change that PEFT computes. An edit contains the name of its module in PEFT, without PEFT's prefix
``base_model.model.``. The merge maps each module name to a stored tensor of the base model.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

import numpy as np

from exporter.errors import TensorMismatch
from exporter.sources.hf.safetensors import FileTensor
from exporter.sources.peft.types.changes import ByPeft
from exporter.tensors import FLOATS, Array, blocks, cast, same_values

if TYPE_CHECKING:
    from exporter.sources.peft.parts import Part


@dataclass(frozen=True, slots=True)
class TokenRows:
    """New values that replace some rows of the weight of ``module``.

    token_ids: the distinct ids of the replaced rows, in ascending order. rows: the new rows, with shape (number of
    token ids, hidden), in the dtype of the adapter file. untrained: ids of rows that were created by resizing the
    vocabulary and were not changed by training. Some untrained rows are padding that belongs to no token.
    """

    path: Path
    key: str
    module: str
    token_ids: tuple[int, ...]
    rows: Array
    untrained: frozenset[int] = frozenset()

    @property
    def keys(self) -> tuple[str, ...]:
        """Names of the adapter tensors from which the edit was built."""
        return (self.key,)


@dataclass(frozen=True, slots=True)
class LowRank:
    """A low-rank update, which changes the value W of ``parameter`` of ``module`` to W + scaling * up @ down.

    down, up: the factors, called lora_A and lora_B in PEFT, with the shapes (r, in) and (out, r), where r is the rank.
    For an embedding, ``down`` is lora_embedding_A with shape (r, vocabulary), and ``up`` is lora_embedding_B with shape
    (hidden, r). target_type: "linear" for a linear layer; "embedding" for an embedding, whose weight is stored as (in,
    out); "convolution" for a weight of shape (out, in, kernel …), whose ``down`` is flattened to (r, in * kernel); or
    "parameter" for a parameter in PEFT's target_parameters, whose update has the orientation of the stored tensor.
    fan_in_fan_out: PEFT's setting for a linear layer whose weight is stored as (in, out). magnitude: DoRA's magnitude
    vector with shape (out,), or None. bias: a vector that is scaled and added to the bias of the module, or None. part:
    the part of the parameter that one stored tensor contains, or None if the whole parameter is one stored tensor.
    transposed: whether the class of the module stores matrices as (in, out), or None if unknown.

    experts: number of experts for which the factors contain updates, which is 1 for a matrix. For a stack of experts,
    ``down`` has the shape (r * experts, in) with the rank as the inner index, and ``up`` has the shape (out, r *
    experts) with the expert as the inner index. Only the module's class determines whether the stack stores each expert
    as (out, in) or as (in, out). Source: PEFT's ParamWrapper.
    """

    path: Path
    module: str
    parameter: str
    target_type: Literal["linear", "embedding", "parameter", "convolution"]
    down: FileTensor
    up: FileTensor
    scaling: float
    fan_in_fan_out: bool = False
    magnitude: FileTensor | None = None
    bias: FileTensor | None = None
    part: Part | None = None
    transposed: bool | None = None
    experts: int = 1

    @property
    def key(self) -> str:
        """Name of the adapter tensor that error messages about the update show."""
        return self.down.spec.name

    @property
    def keys(self) -> tuple[str, ...]:
        """Names of the adapter tensors from which the edit was built."""
        tensors = (self.down, self.up, self.magnitude, self.bias)
        return tuple(tensor.spec.name for tensor in tensors if tensor is not None)

    @property
    def rank(self) -> int:
        """Rank of the low-rank update; for a stack of experts, the rank of the update of each expert."""
        return self.down.spec.shape[0] // self.experts


@dataclass(frozen=True, slots=True)
class FullModule:
    """A whole tensor of an adapter that replaces the tensor ``parameter`` of ``module``.

    in_place: whether training changed the base model's own tensor, for example by resizing the embedding or training a
    bias. If ``in_place`` is True, the replacement also changes all modules that are tied to the tensor. If ``in_place``
    is False, PEFT trained a copy of the tensor for ``modules_to_save``, and modules that are tied to the original
    tensor do not change.
    """

    path: Path
    key: str
    module: str
    parameter: str
    tensor: FileTensor
    in_place: bool

    @property
    def keys(self) -> tuple[str, ...]:
        """Names of the adapter tensors from which the edit was built."""
        return (self.key,)

    def equals(self, other: FullModule) -> bool:
        """Whether the tensors of two edits have equal values; the dtypes of the tensors may differ.

        Peak memory: one block of each of the two tensors.
        """
        return self is other or same_values(self.tensor, other.tensor)


#: Advice for tensors that are incomplete.
GATHER: Final = "tensors that were sharded in training must be gathered before they are saved"

#: A change that an adapter makes to one module of its base.
Edit = TokenRows | LowRank | FullModule | ByPeft


def require_floats(path: Path, tensor: FileTensor) -> None:
    """Raise TensorMismatch if the dtype of ``tensor`` is not one of the floating-point dtypes allowed for weights."""
    if tensor.spec.dtype not in FLOATS:
        expected = f"one of the dtypes {', '.join(sorted(FLOATS))}"
        raise TensorMismatch(path, tensor.spec.name, expected=expected, found=tensor.spec.dtype)


def require_gathered(path: Path, tensor: FileTensor, *, n_axes: int | None = None) -> None:
    """Raise TensorMismatch if ``tensor`` is empty or does not have ``n_axes`` axes (if ``n_axes`` is given)."""
    shape = tensor.spec.shape
    if 0 in shape or (n_axes is not None and len(shape) != n_axes):
        expected = "a tensor with values" if n_axes is None else f"a tensor with {n_axes} axes"
        hint = GATHER if is_shard(shape) else ""
        raise TensorMismatch(path, tensor.spec.name, expected=expected, found=f"shape {shape}", hint=hint)


def is_shard(shape: tuple[int, ...]) -> bool:
    """Whether the invalid shape ``shape`` indicates that a tensor is a shard that distributed training saved.

    DeepSpeed ZeRO-3 replaces the tensors of the model by empty tensors, and FSDP replaces them by flat vectors.
    """
    return 0 in shape or len(shape) == 1


def require_finite(path: Path, tensor: FileTensor) -> None:
    """Raise TensorMismatch if ``tensor`` contains NaN or Inf. To limit memory, the tensor is read block by block."""
    for start, block in blocks(tensor):
        row = first_not_finite(block)
        if row is not None:
            actual = f"NaN or Inf in row {start + row}"
            raise TensorMismatch(path, tensor.spec.name, expected="finite values", found=actual)


def first_not_finite(rows: Array) -> int | None:
    """Index of the first row that contains NaN or Inf, or None if all values are finite."""
    values = rows if rows.dtype == np.float64 else cast(rows, "F32")
    if np.isfinite(values).all():
        return None
    return int(np.flatnonzero(~np.isfinite(values).reshape(len(values), -1).all(axis=1))[0])
