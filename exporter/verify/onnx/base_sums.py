"""Find the expected sum of a base tensor and its updates for each matrix of an ONNX model.

ONNX export tools may rename and concatenate tensors, and a row with an update equals no row of the base, so an ONNX
matrix with updates cannot be identified by its name or rows. Each ONNX matrix is compared with the nearest of all
expected sums in the same layer. Updates are small, so the nearest sum is the sum that the ONNX matrix must equal. The
expected sums include sums of single tensors, of concatenated tensors and of transposed tensors.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import permutations

import numpy as np

from exporter.tensors import FLOATS, Array, cast
from exporter.verify.expect.reference import Reference
from exporter.verify.onnx.base_rows import TOGETHER, layer_of
from exporter.verify.stored.artifact import decode
from exporter.verify.tolerances import MERGED_ULPS, SUM_NEAR
from exporter.verify.values.computed import ulps
from exporter.verify.values.quantised_rows import sum_fault


@dataclass(frozen=True)
class Sum:
    """An expected sum of base and updates, in the shape of an ONNX matrix.

    names: the names of the base tensors that are concatenated in the sum.
    value: the base plus the updates, as a float64 array of shape (n, width).
    base: the base without the updates, as a float64 array of shape (n, width).
    """

    names: Sequence[str]
    value: Array
    base: Array


@dataclass
class BaseSums:
    """All expected sums of base tensors and adapter updates of one tuned model.

    Peak memory: the size of the expected sums of one layer.
    """

    reference: Reference
    _layer: tuple[str | None, list[Sum]] = (None, [])
    _names: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Select all 2-D tensors of the base except embedding and head."""
        tie, tensors = self.reference.checkpoint.tie, self.reference.tensors
        inner = (name for name in tensors if name not in tie.names)
        self._names = [name for name in inner if len(tensors[name].base.spec.shape) == 2]

    def find(self, name: str, value: Array) -> Sum | None:
        """Return the expected sum nearest to the float64 array ``value`` (n, width), or None if no sum is near enough.

        Only the sums of the layer with the number in ``name`` are searched.
        """
        best, nearest = None, SUM_NEAR
        for candidate in self._sums(layer_of(name)):
            for oriented in (candidate, Sum(candidate.names, candidate.value.T, candidate.base.T)):
                if oriented.base.shape == value.shape:
                    sides = [float(np.linalg.norm(value - side)) for side in (oriented.value, oriented.base)]
                    share = min(sides) / max(float(np.linalg.norm(oriented.base)), 1e-30)
                    best, nearest = (oriented, share) if share < nearest else (best, nearest)
        return best

    def fault(self, name: str, raw: Array, storage: str) -> str | None:
        """Compare a matrix in an ONNX model with its expected sum of base and updates, and describe the difference.

        Returns "" if the matrix equals an expected sum, and None if no expected sum is near the matrix or the matrix
        cannot be checked.

        raw: the bytes of the stored rows in the storage type ``storage``, of shape (n, bytes).
        """
        value = decode(raw, storage)
        nearest = self.find(name, value)
        if nearest is None:
            return None
        base_dtype = self.reference.tensors[nearest.names[0]].base.spec.dtype
        if storage not in FLOATS:
            return sum_fault(raw, nearest.value, nearest.base, storage, base_dtype)
        for dtype in dict.fromkeys((storage, base_dtype)):  # a tool may round the sum to the base's dtype first
            wrong = ~(ulps(value, nearest.value, dtype) <= MERGED_ULPS).all(axis=1)
            if not wrong.any():
                return ""
        return f"row {int(np.flatnonzero(wrong)[0])} differs from base plus adapter updates"

    def _sums(self, layer: str | None) -> list[Sum]:
        if self._layer[0] != layer or layer is None:
            self._layer = (layer, list(self._made(layer)))
        return self._layer[1]

    def _made(self, layer: str | None) -> Iterator[Sum]:
        """Yield all expected sums of base tensors and updates for the tensors of one layer.

        An expected sum is either a single matrix with updates, or two or three matrices of the same module,
        concatenated in any order. At least one matrix of a concatenation has updates.
        """
        tensors = self.reference.tensors
        modules: dict[str, list[str]] = {}
        for name in self._names:
            if layer is not None and layer_of(name) == layer:
                modules.setdefault(name.rpartition(".")[0].rpartition(".")[0], []).append(name)
        for names in modules.values():
            if not any(tensors[name].computed for name in names):
                continue
            sums = {name: self._one(name) for name in names}
            for chain in (chain for count in (1, *TOGETHER) for chain in permutations(names, count)):
                widths = {sums[name].base.shape[1] for name in chain}
                if len(widths) == 1 and any(tensors[name].computed for name in chain):
                    parts = [sums[name] for name in chain]
                    sides = [part.value for part in parts], [part.base for part in parts]
                    yield Sum(chain, np.concatenate(sides[0]), np.concatenate(sides[1]))

    def _one(self, name: str) -> Sum:
        want = self.reference.tensors[name]
        return Sum((name,), want.values(range(want.n_rows)), cast(want.base.rows(0, want.base.spec.n_rows), "F64"))
