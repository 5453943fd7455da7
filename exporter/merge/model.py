"""Defines the merged model: a checkpoint plus adapters, with each tensor merged only when that tensor is read.

The names, dtypes and shapes of the merged tensors are known before any tensor data is read. The writers of the output
formats read tensors only through the merged model, not from adapters.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from exporter.errors import in_tensor
from exporter.io.parallel import TOUCHED_BYTES, Budget, in_order
from exporter.merge.ledger import Ledger
from exporter.merge.passes import Pass
from exporter.sources.hf.safetensors import FileTensor
from exporter.sources.hf.tie import Tie
from exporter.sources.hub.locate import ADAPTERS_DIGEST
from exporter.tensors import Array, ByteRange, LazyTensor, TensorSpec


@dataclass(frozen=True)
class MergedTensor:
    """A stored tensor that is transformed by merge passes when the tensor is read.

    Rows that no pass changes are copied as byte ranges of the input file. A pass is one step of the computation, such
    as adding a LoRA update. name: name of the merged tensor. source: the input of the first pass: a tensor of the base
    model or, if an adapter replaces the whole tensor, of the adapter.
    """

    name: str
    source: FileTensor
    passes: Sequence[Pass]
    budget: Budget = field(default_factory=Budget)

    @property
    def spec(self) -> TensorSpec:
        """Return the name, the dtype and the shape of the tensor after the last pass."""
        spec = replace(self.source.spec, name=self.name)
        for step in self.passes:
            spec = step.out_spec(spec)
        return spec

    def rows(self, start: int, stop: int) -> Array:
        """Return the merged rows [start, stop). Peak memory: a few copies of the rows.

        Raises BadInput, naming the tensor, if a merged value is invalid. If the merged tensor has more rows than the
        stored tensor, rows of zeros are appended before the first pass. The merge plan guarantees that a pass then sets
        the values of every appended row.
        """
        spec = self.source.spec
        value = self.source.rows(min(start, spec.n_rows), min(stop, spec.n_rows))
        if missing := (stop - start) - len(value):
            value = np.concatenate([value, np.zeros((missing, *spec.shape[1:]), value.dtype)])
        for step in self.passes:
            promised = step.out_spec(spec)
            with in_tensor(self.source.place.path, self.source.spec.name):
                value = step.apply(start, value)
            if value.nbytes != (stop - start) * promised.row_nbytes:
                raise AssertionError(f"{step!r:.80}: expected {promised}, found {value.dtype} {value.shape}")
            spec = promised
        return value

    def segments(self) -> Iterator[ByteRange | Array]:
        """Yield all rows in order: unchanged rows as byte ranges of the input file, and changed rows as arrays.

        Each array contains one block of rows, of about 512 KB.
        """
        spec, stored = self.spec, self.source.spec
        at = 0
        for start, stop in self._touched(spec.n_rows):
            if at < start:
                yield self._range(at, start)
            yield from self._blocks(start, stop, spec.row_nbytes)
            at = stop
        if at < spec.n_rows:
            assert spec.n_rows <= stored.n_rows, "a merge pass must set the values of every added row"
            yield self._range(at, spec.n_rows)

    def _blocks(self, start: int, stop: int, row_nbytes: int) -> Iterator[Array]:
        step = max(1, TOUCHED_BYTES // max(1, row_nbytes))
        if stop - start <= step:
            yield self.rows(start, stop)
            return
        starts = range(start, stop, step)
        yield from in_order((partial(self.rows, first, min(first + step, stop)) for first in starts), self.budget)

    def _range(self, start: int, stop: int) -> ByteRange:
        place, width = self.source.place, self.source.spec.row_nbytes
        return ByteRange(place.path, place.offset_bytes + start * width, (stop - start) * width)

    def _touched(self, n_rows: int) -> list[tuple[int, int]]:
        """Return ascending, disjoint ranges of the rows that at least one pass changes."""
        runs: list[tuple[int, int]] = []
        for start, stop in sorted(run for step in self.passes for run in step.touched(n_rows)):
            if runs and start <= runs[-1][1]:
                runs[-1] = (runs[-1][0], max(stop, runs[-1][1]))
            else:
                runs.append((start, stop))
        return runs


@dataclass(frozen=True)
class MergedModel:
    """The merged model, from which writers create the output formats.

    path: path of the base checkpoint, for error messages. config: content of config.json after merging. tie: whether
    and how embedding and head are tied after merging. tensors: all tensors to write, in the order of the base
    checkpoint's shards. shards: maps the name of each tensor to the file name of its shard. files: maps the name of
    each auxiliary file that is copied unchanged to the path of the file. templates: dict from name to text of each chat
    template that transformers uses. rewritten: contents of auxiliary files that are not copied, by file name, which
    replace files of the same name in ``files``. generation_config: content of
    generation_config.json after merging, or {} if the file does not exist. The map ``files`` does not contain
    generation_config.json if merging changes that file. origins: hub repositories and commits of the inputs.
    embedding_digest: a function that reads the base model's embedding and returns its SHA-256 digest. adapters_digest:
    a function that reads the adapters and returns the combined digest of all adapters.
    """

    path: Path
    config: Mapping[str, Any]
    tie: Tie
    tensors: Mapping[str, FileTensor | MergedTensor]
    shards: Mapping[str, str]
    files: Mapping[str, Path]
    templates: Mapping[str, str]
    rewritten: Mapping[str, bytes]
    generation_config: Mapping[str, Any]
    origins: Mapping[str, str]
    embedding_digest: Callable[[], str]
    adapters_digest: Callable[[], str]

    @cached_property
    def provenance(self) -> Mapping[str, str]:
        """Return the hub repositories and commits of the inputs, and the digests of the embedding and of the adapters.

        The first access to ``provenance`` reads the base model's embedding and the adapters, to compute the digests.
        """
        return self._provenance(self.embedding_digest(), self.adapters_digest())

    @property
    def provenance_shape(self) -> Mapping[str, str]:
        """Return ``provenance`` with zeros in place of the digests, to compute file sizes without reading a tensor."""
        blank = "0" * 2 * hashlib.sha256().digest_size
        return self._provenance(blank, blank)

    def _provenance(self, embedding: str, adapters: str) -> Mapping[str, str]:
        return {ADAPTERS_DIGEST: adapters, "base.embedding_sha256": embedding, **self.origins}

    @cached_property
    def specs(self) -> dict[str, TensorSpec]:
        """Return a dict that maps the name of every merged tensor to the tensor's name, dtype and shape.

        Reads no tensor.
        """
        return {name: tensor.spec for name, tensor in self.tensors.items()}

    def tensor(self, name: str) -> LazyTensor:
        """Return the merged tensor ``name``, which is the stored tensor itself if no pass changes the tensor."""
        return self.tensors[name]

    def where(self, name: str) -> Path:
        """Return the path of the input file that contains the tensor ``name`` before merging.

        The path of the input file is needed for error messages and for reading tensors in file order.
        """
        return self.place(name).path

    def place(self, name: str) -> ByteRange:
        """Return the byte range that contains the tensor ``name`` before merging, in an input file."""
        tensor = self.tensors[name]
        return (tensor.source if isinstance(tensor, MergedTensor) else tensor).place

    def ledger(self) -> Ledger:
        """Return a new ledger for checking that a writer writes every merged tensor exactly once."""
        return Ledger(self.path, self.tensors, what="writer")
