"""What an adapter holds, typed: rows of tokens, low-rank updates, whole tensors.

Modules are named as PEFT names them, without its prefix; which stored tensor of a base that is, the merge decides.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from exporter.errors import TensorMismatch
from exporter.sources.hf.safetensors import FileTensor
from exporter.tensors import FLOATS, Array, blocks, cast


@dataclass(frozen=True, slots=True)
class TokenRows:
    """Final values of some rows of ``module``'s weight.

    ``token_ids`` are distinct and ascending; ``rows`` has one row an id, shape (k, hidden), dtype as stored.
    ``untrained``: those of them whose rows resizing made. They may be padding, which no token has.
    """

    path: Path
    key: str
    module: str
    token_ids: tuple[int, ...]
    rows: Array
    untrained: frozenset[int] = frozenset()

    @property
    def keys(self) -> tuple[str, ...]:
        """The tensors of the file that it is made of."""
        return (self.key,)


@dataclass(frozen=True, slots=True)
class Expert:
    """One expert of a stack, and which of ``shares`` equal parts of its outputs (gate and up are joined there)."""

    number: int
    share: int
    shares: int
    experts: int = 1


@dataclass(frozen=True, slots=True)
class LowRank:
    """An update of rank r to ``module``'s ``parameter``: W becomes W + scaling * up @ down.

    down: (r, in), up: (out, r), as PEFT's lora_A and lora_B (lora_embedding_A is (r, vocabulary), lora_embedding_B
    (hidden, r)). target_type: "linear"; "embedding", whose weight is stored as (in, out); "parameter", for a tensor
    targeted by name and updated in its stored orientation. fan_in_fan_out: PEFT's word for a linear layer whose
    weight is stored as (in, out). magnitude: DoRA's (out,), or None. bias: added to the module's bias, scaled, or None.
    expert: set where the factors hold a whole stack, and one matrix of it is meant.
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
        """The tensor that names the update in messages."""
        return self.down.spec.name

    @property
    def keys(self) -> tuple[str, ...]:
        """The tensors of the file that it is made of."""
        return tuple(one.spec.name for one in (self.down, self.up, self.magnitude, self.bias) if one is not None)

    @property
    def rank(self) -> int:
        """The r of the update."""
        return self.down.spec.shape[0]


@dataclass(frozen=True, slots=True)
class FullModule:
    """A whole tensor in place of ``module``'s ``parameter``.

    in_place: the base's own tensor was changed (a resized embedding, a trained bias), so whatever shares it follows.
    Else it is a trained copy, as ``modules_to_save`` makes it, and a module that was tied to the original is not.
    """

    path: Path
    key: str
    module: str
    parameter: str
    tensor: FileTensor
    in_place: bool

    @property
    def keys(self) -> tuple[str, ...]:
        """The tensors of the file that it is made of."""
        return (self.key,)


Edit = TokenRows | LowRank | FullModule


def require_floats(path: Path, tensor: FileTensor) -> None:
    """Raises TensorMismatch for a dtype in which no weights are trained."""
    if tensor.spec.dtype not in FLOATS:
        expected = f"a dtype of {', '.join(sorted(FLOATS))}"
        raise TensorMismatch(path, tensor.spec.name, expected=expected, found=tensor.spec.dtype)


def require_finite(path: Path, tensor: FileTensor) -> None:
    """Raises TensorMismatch for NaN or Inf anywhere. Reads the tensor, a block at a time."""
    for start, block in blocks(tensor):
        wrong = first_not_finite(block)
        if wrong is not None:
            found = f"NaN or Inf in row {start + wrong}"
            raise TensorMismatch(path, tensor.spec.name, expected="finite values", found=found)


def first_not_finite(rows: Array) -> int | None:
    """Index of the first row that holds NaN or Inf, or None."""
    values = rows if rows.dtype == np.float64 else cast(rows, "F32")
    if np.isfinite(values).all():
        return None
    return int(np.flatnonzero(~np.isfinite(values).reshape(len(values), -1).all(axis=1))[0])
