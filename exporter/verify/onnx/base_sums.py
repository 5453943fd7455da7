"""Initialisers of an ONNX model that hold sums of base and updates, found among the tensors of their layer.

Tools have names and packings of their own, and no row of a sum is a row of the base. But sums are near to the base, so
that the nearest one is meant: a tensor, several behind each other, or either of them transposed.
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
    """What an initialiser holds, in its shape: (n, width) float64, ``base`` and, with updates, ``value``."""

    names: Sequence[str]
    value: Array
    base: Array


@dataclass
class BaseSums:
    """The tensors with updates of one reference; those of the layer that was asked for last stay in memory."""

    reference: Reference
    _layer: tuple[str | None, list[Sum]] = (None, [])
    _names: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Matrices beside the vocabulary."""
        tie, tensors = self.reference.checkpoint.tie, self.reference.tensors
        inner = (name for name in tensors if name not in (tie.embedding, tie.head, *tie.copies))
        self._names = [name for name in inner if len(tensors[name].base.spec.shape) == 2]

    def find(self, name: str, value: Array) -> Sum | None:
        """What ``value`` (n, width) float64 is meant to be; None if nothing in its layer is near."""
        best, nearest = None, SUM_NEAR
        for one in self._sums(layer_of(name)):
            for turned in (one, Sum(one.names, one.value.T, one.base.T)):
                if turned.base.shape == value.shape:
                    sides = [float(np.linalg.norm(value - side)) for side in (turned.value, turned.base)]
                    share = min(sides) / max(float(np.linalg.norm(turned.base)), 1e-30)
                    best, nearest = (turned, share) if share < nearest else (best, nearest)
        return best

    def judge(self, name: str, raw: Array, kind: str) -> str | None:
        """The empty text, None for what is not known, else what is wrong. raw: (n, bytes), as stored in ``kind``."""
        value = decode(raw, kind)
        found = self.find(name, value)
        if found is None:
            return None
        stored = self.reference.tensors[found.names[0]].base.spec.dtype
        if kind not in FLOATS:
            return sum_fault(raw, found.value, found.base, kind, stored)
        for dtype in dict.fromkeys((kind, stored)):  # it may have been merged in the base's dtype
            wrong = ~(ulps(value, found.value, dtype) <= MERGED_ULPS).all(axis=1)
            if not wrong.any():
                return ""
        return f"row {int(np.flatnonzero(wrong)[0])} is not base plus updates"

    def _sums(self, layer: str | None) -> list[Sum]:
        if self._layer[0] != layer or layer is None:
            self._layer = (layer, list(self._made(layer)))
        return self._layer[1]

    def _made(self, layer: str | None) -> Iterator[Sum]:
        """Every matrix of the layer with updates, and all orders of neighbours with some among them."""
        tensors = self.reference.tensors
        modules: dict[str, list[str]] = {}
        for name in self._names:
            if layer is not None and layer_of(name) == layer:
                modules.setdefault(name.rpartition(".")[0].rpartition(".")[0], []).append(name)
        for names in modules.values():
            if not any(tensors[name].computed for name in names):
                continue
            made = {name: self._one(name) for name in names}
            for chain in (chain for count in (1, *TOGETHER) for chain in permutations(names, count)):
                widths = {made[name].base.shape[1] for name in chain}
                if len(widths) == 1 and any(tensors[name].computed for name in chain):
                    parts = [made[name] for name in chain]
                    sides = [one.value for one in parts], [one.base for one in parts]
                    yield Sum(chain, np.concatenate(sides[0]), np.concatenate(sides[1]))

    def _one(self, name: str) -> Sum:
        want = self.reference.tensors[name]
        return Sum((name,), want.values(range(want.n_rows)), cast(want.base.rows(0, want.base.spec.n_rows), "F64"))
