"""Types for the contents of an adapter: token rows, low-rank updates, and whole tensors.

Modules keep PEFT's names without PEFT's prefix. The merge maps the modules to the stored tensors of a base.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from exporter.errors import TensorMismatch
from exporter.sources.hf.safetensors import FileTensor
from exporter.tensors import FLOATS, Array, blocks, cast, same_values


@dataclass(frozen=True, slots=True)
class TokenRows:
    """Final values of some rows of the weight of ``module``.

    token_ids: distinct, ascending ids. rows: one row per id, with shape (k, hidden) and the stored dtype. untrained:
    ids of rows that resizing created and training left unchanged. An untrained row may be padding without a token.
    """

    path: Path
    key: str
    module: str
    token_ids: tuple[int, ...]
    rows: Array
    untrained: frozenset[int] = frozenset()

    @property
    def keys(self) -> tuple[str, ...]:
        """Names of the edit's tensors in the adapter file."""
        return (self.key,)


@dataclass(frozen=True, slots=True)
class Expert:
    """One expert in a stack of ``experts`` experts, and one of ``shares`` equal slices of the expert's outputs.

    A stack that joins the gate and up projections has two shares.
    """

    number: int
    share: int
    shares: int
    experts: int = 1


@dataclass(frozen=True, slots=True)
class LowRank:
    """An update of rank r to the ``parameter`` of ``module``: W becomes W + scaling * up @ down.

    down, up: factors with the shapes (r, in) and (out, r), PEFT's lora_A and lora_B. For an embedding, lora_embedding_A
    is (r, vocabulary), and lora_embedding_B is (hidden, r). target_type: "linear"; "embedding" for a weight stored as
    (in, out); or "parameter" for a tensor that is targeted by name and updated in its stored orientation.
    fan_in_fan_out: PEFT's term for a linear layer with a weight stored as (in, out). magnitude: DoRA's magnitude with
    shape (out,), or None. bias: a vector that is scaled and added to the bias of the module, or None. expert: the
    expert that the update applies to, set only if the factors contain a whole stack of experts.
    """

    path: Path
    module: str
    parameter: str
    target_type: Literal["linear", "embedding", "parameter"]
    down: FileTensor
    up: FileTensor
    scaling: float
    fan_in_fan_out: bool = False
    magnitude: FileTensor | None = None
    bias: FileTensor | None = None
    expert: Expert | None = None

    @property
    def key(self) -> str:
        """Name of the tensor that messages show for this update."""
        return self.down.spec.name

    @property
    def keys(self) -> tuple[str, ...]:
        """Names of the edit's tensors in the adapter file."""
        tensors = (self.down, self.up, self.magnitude, self.bias)
        return tuple(tensor.spec.name for tensor in tensors if tensor is not None)

    @property
    def rank(self) -> int:
        """The rank of the update."""
        return self.down.spec.shape[0]


@dataclass(frozen=True, slots=True)
class FullModule:
    """A whole tensor that replaces the ``parameter`` of ``module``.

    in_place: whether training changed the base's own tensor, such as a resized embedding or a trained bias. If True,
    modules that are tied to the tensor change too. If False, the tensor is a trained copy made by ``modules_to_save``,
    and modules that are tied to the original do not change.
    """

    path: Path
    key: str
    module: str
    parameter: str
    tensor: FileTensor
    in_place: bool

    @property
    def keys(self) -> tuple[str, ...]:
        """Names of the edit's tensors in the adapter file."""
        return (self.key,)

    def equals(self, other: FullModule) -> bool:
        """Whether both tensors have equal values, whatever their dtypes. Memory: one block of each tensor."""
        return self is other or same_values(self.tensor, other.tensor)


#: A change that an adapter makes to one module of its base.
Edit = TokenRows | LowRank | FullModule


def require_floats(path: Path, tensor: FileTensor) -> None:
    """Raises TensorMismatch if the dtype of ``tensor`` is not a floating-point dtype of weights."""
    if tensor.spec.dtype not in FLOATS:
        expected = f"a dtype of {', '.join(sorted(FLOATS))}"
        raise TensorMismatch(path, tensor.spec.name, expected=expected, found=tensor.spec.dtype)


def require_finite(path: Path, tensor: FileTensor) -> None:
    """Raises TensorMismatch if ``tensor`` contains NaN or Inf. Reads the tensor block by block."""
    for start, block in blocks(tensor):
        row = first_not_finite(block)
        if row is not None:
            actual = f"NaN or Inf in row {start + row}"
            raise TensorMismatch(path, tensor.spec.name, expected="finite values", found=actual)


def first_not_finite(rows: Array) -> int | None:
    """Index of the first row with NaN or Inf, or None."""
    values = rows if rows.dtype == np.float64 else cast(rows, "F32")
    if np.isfinite(values).all():
        return None
    return int(np.flatnonzero(~np.isfinite(values).reshape(len(values), -1).all(axis=1))[0])
