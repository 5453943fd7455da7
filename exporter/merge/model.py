"""A checkpoint seen through passes: specs without reading, any tensor or row range already merged.

Writers consume this and know nothing of adapters.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from exporter.errors import BadInput
from exporter.merge.ledger import Ledger
from exporter.merge.passes import Pass
from exporter.sources.checkpoint import Checkpoint, Tie
from exporter.sources.safetensors import FileTensor
from exporter.tensors import BLOCK_BYTES, Array, ByteRange, LazyTensor, TensorSpec


@dataclass(frozen=True)
class MergedTensor:
    """A stored tensor behind one or more passes. Rows that no pass touches keep their place on disk."""

    source: FileTensor
    passes: Sequence[Pass]

    @property
    def spec(self) -> TensorSpec:
        """What the last pass promises."""
        spec = self.source.spec
        for one in self.passes:
            spec = one.out_spec(spec)
        return spec

    def rows(self, start: int, stop: int) -> Array:
        """Rows [start, stop), merged. Memory: two copies of these rows.

        Rows beyond the stored ones enter the passes as zeros; a pass must set every one of them (the plan sees to it).
        """
        spec = self.source.spec
        value = self.source.rows(min(start, spec.n_rows), min(stop, spec.n_rows))
        if missing := (stop - start) - len(value):
            value = np.concatenate([value, np.zeros((missing, *spec.shape[1:]), value.dtype)])
        for one in self.passes:
            promised = one.out_spec(spec)
            try:
                value = one.apply(start, value)
            except BadInput as exc:
                raise BadInput(f"{self.source.place.path}: {spec.name}: {exc}") from exc
            if value.nbytes != (stop - start) * promised.row_nbytes:
                raise AssertionError(f"{one!r:.80} promised {promised}, made {value.dtype} {value.shape}")
            spec = promised
        return value

    def segments(self) -> Iterator[ByteRange | Array]:
        """Byte ranges of untouched runs and arrays of touched ones, in order, each array at most a block."""
        spec, stored = self.spec, self.source.spec
        at = 0
        for start, stop in self._touched(spec.n_rows):
            if at < start:
                yield self._range(at, start)
            step = max(1, BLOCK_BYTES // max(1, spec.row_nbytes))
            for first in range(start, stop, step):
                yield self.rows(first, min(first + step, stop))
            at = stop
        if at < spec.n_rows:
            assert spec.n_rows <= stored.n_rows, "a grown row that no pass touches"
            yield self._range(at, spec.n_rows)

    def _range(self, start: int, stop: int) -> ByteRange:
        place, width = self.source.place, self.source.spec.row_nbytes
        return ByteRange(place.path, place.offset_bytes + start * width, (stop - start) * width)

    def _touched(self, n_rows: int) -> list[tuple[int, int]]:
        """The union of what the passes touch, ascending and disjoint."""
        runs: list[tuple[int, int]] = []
        for start, stop in sorted(run for one in self.passes for run in one.touched(n_rows)):
            if runs and start <= runs[-1][1]:
                runs[-1] = (runs[-1][0], max(stop, runs[-1][1]))
            else:
                runs.append((start, stop))
        return runs


@dataclass(frozen=True)
class MergedModel:
    """What every writer sees.

    config: the merged config.json. tie: which stored tensors are embedding and head. specs: every tensor to write,
    in the order of the checkpoint. files: tokenizer and side files by name. provenance: what went in, for metadata.
    """

    checkpoint: Checkpoint
    config: Mapping[str, Any]
    files: Mapping[str, Path]
    passes: Mapping[str, Sequence[Pass]]
    provenance: Mapping[str, str]

    @property
    def path(self) -> Path:
        """The base checkpoint's folder, for messages."""
        return self.checkpoint.path

    @property
    def tie(self) -> Tie:
        """The base's tying, which merging keeps."""
        return self.checkpoint.tie

    @property
    def specs(self) -> dict[str, TensorSpec]:
        """Name → spec after merging; nothing is read."""
        return {name: self.tensor(name).spec for name in self.checkpoint.tensors}

    def tensor(self, name: str) -> LazyTensor:
        """The merged tensor ``name``: the stored one itself if no pass concerns it."""
        source = self.checkpoint.tensors[name]
        passes = self.passes.get(name)
        return MergedTensor(source, passes) if passes else source

    def where(self, name: str) -> Path:
        """The file of the base that holds tensor ``name``, or the one it is made from: its shard, and for messages."""
        return self.checkpoint.tensors[name].place.path

    def ledger(self) -> Ledger:
        """A fresh account of the tensors that a writer has to write."""
        return Ledger(self.path, self.checkpoint.tensors, what="writer")
