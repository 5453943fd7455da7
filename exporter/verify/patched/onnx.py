"""Check a patched ONNX folder against the base folder, without using the code that patches ONNX models.

The base folder is read before the patch, because an in-place patch overwrites the base folder.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Final

import numpy as np
from onnx import ModelProto

from exporter.io.json_objects import read_object
from exporter.sources.hf.tie import HEADS
from exporter.sources.onnx.file import OnnxFile
from exporter.sources.peft.adapter import Adapter
from exporter.tensors import DTYPES, Array
from exporter.verify.patched.files import FilesBefore, check_files
from exporter.verify.patched.graph import GraphPair
from exporter.verify.patched.untouched import (
    Digests,
    all_rows,
    check_untouched,
    describe_range,
    differing,
    digests,
    sampled_rows,
)
from exporter.verify.report import Check
from exporter.verify.stored.artifact import decode, encode
from exporter.verify.stored.onnx_blocks import HALF_STEP, BlockStorage
from exporter.verify.values.computed import sample

#: Length of the sampled spans of inner tensors if a check compares only a sample of the bytes.
_SPAN_BYTES: Final = 4096
#: Largest distance of a copied row in units of its norm. Rounding to 4 bits moves a row by a tenth of its norm. Rows of
#: different matrices are 1.4 norms apart.
_SAME_WITHIN_NORMS: Final = 0.5


@dataclass(frozen=True)
class ModelBefore:
    """Data that are read from an ONNX model before the patch, for comparison with the patched model.

    rows: matrix → token id → trained row, before encoding in the matrix's type. untouched: initialiser → range → digest
    of the content in the range that the patch must not change. A range in ``untouched`` is a range of token ids for the
    embedding and the LM head, and a range of bytes for other initialisers.
    """

    file: OnnxFile
    graph: ModelProto
    rows: Mapping[str, Mapping[int, Array]]
    untouched: Mapping[str, Digests]

    @property
    def matrices(self) -> list[str]:
        """Return a list with the embedding matrix's name and, if the LM head is a separate matrix, the head's name."""
        return list(dict.fromkeys(str(name) for name in (self.file.embedding, self.file.head)))

    @property
    def parts(self) -> set[str]:
        """Return the names of all initialisers in which ``matrices`` are stored, including scales and zero points."""
        return {part.name for name in self.matrices for part in self.file.stored_tensors(name)}

    @property
    def tokens(self) -> int:
        """Number of tokens of the model before the patch."""
        return self.file.tokens(self.matrices[0])


@dataclass(frozen=True)
class Before:
    """Data that are read from an ONNX folder before the patch, for comparison with the patched folder.

    An instance of ``FolderBefore`` keeps the ONNX graphs in memory, including weights that are stored inside model
    files.
    """

    folder: Path
    models: Sequence[ModelBefore]
    files: FilesBefore
    adapters: Sequence[Adapter]
    every: bool

    @classmethod
    def read(cls, folder: Path, paths: Sequence[Path], adapters: Sequence[Adapter], *, every: bool) -> Before:
        """Read, before the patch, all data that the checks need after the patch, including files other than models.

        every: True to compute digests of all bytes, False to compute digests of a sample.
        """
        config = folder / "config.json"
        tied = read_object(config).get("tie_word_embeddings") if config.is_file() else None
        models = [_read_model(OnnxFile.open(path), adapters, tied, every=every) for path in paths]
        return cls(folder, models, FilesBefore.read(folder, _files(model.file for model in models)), adapters, every)

    @property
    def vocab(self) -> int:
        """Number of tokens of the models after the patch."""
        trained = (token_id + 1 for model in self.models for rows in model.rows.values() for token_id in rows)
        return max([*trained, *(model.tokens for model in self.models)])


def check_patched(folder: Path, before: Before) -> Iterator[Check]:
    """Compare the patched ONNX folder with the base folder and the adapters."""
    files = []
    for model in before.models:
        path = folder / model.file.path.relative_to(before.folder)
        prefix = f"{path.stem}: " if len(before.models) > 1 else ""
        files.append(OnnxFile.open(path))
        for check in _check_model(files[-1], model, before.vocab, every=before.every):
            yield replace(check, name=prefix + check.name)
    grown = before.vocab if before.vocab != before.models[0].tokens else None
    yield from check_files(folder, before.files, before.adapters, _files(files), vocab=grown)


def _files(models: Iterable[OnnxFile]) -> set[Path]:
    """Return the paths of all model files, and of all external data files of these models."""
    return {
        path
        for model in models
        for path in (model.path, *(tensor.place.path for tensor in model.initialisers.values() if tensor.place))
    }


def _read_model(file: OnnxFile, adapters: Sequence[Adapter], tied: object, *, every: bool) -> ModelBefore:
    model = ModelBefore(file, file.parse(), _rows(file, adapters, tied), {})
    untouched = {}
    for name, tensor in file.initialisers.items():
        if name in model.matrices:
            trained = model.rows.get(name, {}).keys()
            width = sum(part.nbytes for part in file.stored_tensors(name)) // model.tokens
            ranges = all_rows(model.tokens, width) if every else sampled_rows(model.tokens, trained)
            untouched[name] = digests(partial(file.token_bytes, name), ranges, trained)
        elif name not in model.parts and _is_raw(file, name):
            spans = all_rows(tensor.nbytes, 1) if every else _sampled_spans(tensor.nbytes)
            untouched[name] = digests(partial(file.raw, name), spans)
    return replace(model, untouched=untouched)


def _sampled_spans(nbytes: int) -> list[tuple[int, int]]:
    starts = {start // _SPAN_BYTES * _SPAN_BYTES for start in sample(max(1, nbytes))}
    return [(start, min(start + _SPAN_BYTES, nbytes)) for start in sorted(starts)]


def _is_raw(file: OnnxFile, name: str) -> bool:
    """Whether a tensor is stored as external data, outside the model file.

    Tensors that are stored inside the model file are part of the graph and are compared by the graph check.
    """
    return file.initialisers[name].place is not None


def _storage(file: OnnxFile, name: str) -> str:
    return str(BlockStorage.of(file, name)) if name in file.blocks else file.initialisers[name].dtype


def _rows(file: OnnxFile, adapters: Sequence[Adapter], tied: object) -> dict[str, dict[int, Array]]:
    embedding, head = str(file.embedding), str(file.head)
    duplicate = embedding == head or (tied is not False and _has_duplicate_head(file))
    by_matrix: dict[str, dict[int, Array]] = {}
    for adapter in adapters:
        adapter_rows: dict[str, dict[int, Array]] = {}
        for part in adapter.rows:
            name = head if part.module.rpartition(".")[2] in HEADS else embedding
            adapter_rows.setdefault(name, {}).update(zip(part.token_ids, part.rows, strict=True))
        if duplicate and head not in adapter_rows:
            adapter_rows[head] = adapter_rows[embedding]
        for name, rows in adapter_rows.items():
            by_matrix.setdefault(name, {}).update(rows)
    return by_matrix


def _values(file: OnnxFile, name: str, row: int) -> Array:
    raw = file.token_bytes(name, row, row + 1)
    if name not in file.scaled:
        row_values: Array = decode(raw, _storage(file, name))[0]
        return row_values
    scale, zero = _scale(file, name)
    numbers: Array = raw[0].view(DTYPES[file.initialisers[name].dtype]).astype(np.float64)
    return (numbers - zero) * scale


def _scale(file: OnnxFile, name: str) -> tuple[float, float]:
    """Return the scale and the zero point of an integer matrix with one scale for the whole matrix."""
    quantisation = file.scaled[name]
    zero = float(file.rows(quantisation.zero_point, 0, 1)[0]) if quantisation.zero_point else 0.0
    return float(file.rows(quantisation.scale, 0, 1)[0]), zero


def _has_duplicate_head(file: OnnxFile) -> bool:
    """Whether the model has a separate LM head with the same values as the embedding, possibly in a different type."""
    names = str(file.embedding), str(file.head)
    if len({file.tokens(name) for name in names}) > 1:
        return False
    for row in sample(file.tokens(names[0])):
        embedding, head = (_values(file, name, row) for name in names)
        norms = np.linalg.norm(embedding), np.linalg.norm(head)
        if embedding.shape != head.shape or np.linalg.norm(embedding - head) > _SAME_WITHIN_NORMS * max(norms):
            return False
    return True


def _check_model(file: OnnxFile, before: ModelBefore, vocab: int, *, every: bool) -> Iterator[Check]:
    graph = ModelProto()
    graph.CopyFrom(before.graph)
    wrong = GraphPair(graph, file.parse(), before.parts, (before.tokens, vocab)).difference()
    wrong = wrong and f"{wrong}: this graph field differs from the base"
    sizes = {name: file.tokens(name) for name in before.matrices if name in file.token_axis}
    if wrong is None and sizes != dict.fromkeys(before.matrices, vocab):
        wrong = f"expected {vocab} tokens in embedding and head, found {sizes}"
    detail = wrong or f"the graph, with {len(graph.graph.node)} nodes and {vocab} tokens, matches the base"
    yield Check(name="graph", passed=wrong is None, detail=detail)
    if wrong is not None:
        return  # the rows cannot be matched with the base's rows
    for name, rows in before.rows.items():
        yield _check_rows(file, name, rows)
    yield _check_untouched(file, before, every=every)


def _check_rows(file: OnnxFile, name: str, rows: Mapping[int, Array]) -> Check:
    """Check that every trained row in the patched model equals the adapter's row, encoded in the matrix's type."""
    storage = _storage(file, name)
    wrong = [token_id for token_id, row in rows.items() if not _holds(file, name, storage, token_id, row)]
    detail = f"{len(rows)} trained rows equal the adapter's rows, encoded in {storage}"
    if wrong:
        detail = (
            f"{name}: {len(wrong)} of {len(rows)} trained rows differ from the adapter; the first is token {wrong[0]}"
        )
    return Check(name=f"{name} rows", passed=not wrong, value=float(len(wrong)), limit=0.0, detail=detail)


def _holds(file: OnnxFile, name: str, storage: str, token_id: int, row: Array) -> bool:
    if name in file.scaled:
        step = abs(_scale(file, name)[0])
        return bool((np.abs(_values(file, name, token_id) - row.astype(np.float64)) <= step * HALF_STEP).all())
    raw = file.token_bytes(name, token_id, token_id + 1)
    if BlockStorage.is_name(storage):
        return bool(BlockStorage.parse(storage).holds(row[None], raw).all())
    return np.array_equal(raw, encode(row[None], storage))


def _check_untouched(file: OnnxFile, before: ModelBefore, *, every: bool) -> Check:
    wrong = []
    for name, kept in before.untouched.items():
        if name in before.matrices:
            changed = differing(partial(file.token_bytes, name), kept, before.rows.get(name, {}).keys())
            wrong += [f"{name}: {describe_range('token', *tokens)}" for tokens in changed]
        else:
            wrong += [f"{name}: {describe_range('byte', *span)}" for span in differing(partial(file.raw, name), kept)]
    count = sum(map(len, before.untouched.values()))
    return check_untouched(
        wrong,
        "all bytes outside the trained rows equal the base"
        if every
        else f"{count} sampled ranges outside the trained rows equal the base",
    )
