"""Typed contents of an adapter: token rows, low-rank updates, whole tensors.

Modules keep PEFT's names, without its prefix; the merge maps them to the stored tensors of a base.
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
    """Final values of some rows of ``module``'s weight.

    ``token_ids`` are distinct and ascending; ``rows`` has one row an id, shape (k, hidden), dtype as stored.
    ``untrained``: ids of rows that were created by resizing and not trained. They may be padding, which has no token.
    """

    path: Path
    key: str
    module: str
    token_ids: tuple[int, ...]
    rows: Array
    untrained: frozenset[int] = frozenset()

    @property
    def keys(self) -> tuple[str, ...]:
        """Names of its tensors in the file."""
        return (self.key,)


@dataclass(frozen=True, slots=True)
class Expert:
    """One expert of a stack of ``experts``, and one of ``shares`` equal slices of its outputs.

    A stack that joins gate and up has two shares.
    """

    number: int
    share: int
    shares: int
    experts: int = 1


@dataclass(frozen=True, slots=True)
class LowRank:
    """An update of rank r to ``module``'s ``parameter``: W becomes W + scaling * up @ down.

    down: (r, in), up: (out, r), as PEFT's lora_A and lora_B (lora_embedding_A is (r, vocabulary), lora_embedding_B
    (hidden, r)). target_type: "linear"; "embedding", with a weight stored as (in, out); "parameter", for a tensor
    targeted by name and updated in its stored orientation. fan_in_fan_out: PEFT's term for a linear layer with
    a weight stored as (in, out). magnitude: DoRA's (out,), or None. bias: added to the module's bias, scaled, or None.
    expert: set if the factors hold a whole stack and the update concerns one matrix of it.
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
        """The tensor that messages name."""
        return self.down.spec.name

    @property
    def keys(self) -> tuple[str, ...]:
        """Names of its tensors in the file."""
        tensors = (self.down, self.up, self.magnitude, self.bias)
        return tuple(tensor.spec.name for tensor in tensors if tensor is not None)

    @property
    def rank(self) -> int:
        """The r of the update."""
        return self.down.spec.shape[0]


@dataclass(frozen=True, slots=True)
class FullModule:
    """A whole tensor that replaces ``module``'s ``parameter``.

    in_place: True if the base's own tensor was changed (a resized embedding, a trained bias), so that tied modules
    change with it. False for a trained copy, as ``modules_to_save`` makes it: modules tied to the original do not
    change.
    """

    path: Path
    key: str
    module: str
    parameter: str
    tensor: FileTensor
    in_place: bool

    @property
    def keys(self) -> tuple[str, ...]:
        """Names of its tensors in the file."""
        return (self.key,)

    def equals(self, other: FullModule) -> bool:
        """Whether both hold the same values, whatever their dtypes. Memory: a block of each."""
        return self is other or same_values(self.tensor, other.tensor)


#: What an adapter does to one module of its base.
Edit = TokenRows | LowRank | FullModule


def require_floats(path: Path, tensor: FileTensor) -> None:
    """Raises TensorMismatch for a dtype in which no weights are trained."""
    if tensor.spec.dtype not in FLOATS:
        expected = f"a dtype of {', '.join(sorted(FLOATS))}"
        raise TensorMismatch(path, tensor.spec.name, expected=expected, found=tensor.spec.dtype)


def require_finite(path: Path, tensor: FileTensor) -> None:
    """Raises TensorMismatch for NaN or Inf anywhere. Reads the tensor block by block."""
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
