"""From a folder of ONNX models and row adapters to what changes in it: bytes of data files, and small files whole."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

from exporter.errors import BadInput, NotExpressible, UnreadableFile, in_tensor
from exporter.io.json_objects import read_object
from exporter.patch.onnx.data import DataPatch, plan_data
from exporter.patch.onnx.evidence import recorded_provenance, repeats
from exporter.patch.onnx.files import merged_files, patched_files
from exporter.patch.onnx.graph import patched_model
from exporter.patch.onnx.matrix import Matrix
from exporter.patch.onnx.part import PartPatch
from exporter.patch.onnx.vocab import new_tokens, require_agreement
from exporter.patch.rows import Matrices, Wanted, gather, rounded
from exporter.sources.journal import refuse_interrupted
from exporter.sources.onnx.file import OnnxFile
from exporter.sources.onnx.folder import is_encoder
from exporter.sources.peft.adapter import Adapter

_INSTEAD: Final = "ttexport merge ADAPTER --to onnx writes the folder anew"

#: Recorded provenance of a model → what it says after the patch.
Provenance = Callable[[Mapping[str, str]], Mapping[str, str]]


@dataclass(frozen=True)
class Model:
    """One model file of the folder and its vocabulary matrices; a tied one is twice the same."""

    file: OnnxFile
    embedding: Matrix
    head: Matrix

    @property
    def matrices(self) -> dict[str, Matrix]:
        """By name."""
        return {one.name: one for one in (self.embedding, self.head)}


@dataclass(frozen=True)
class OnnxPatch:
    """The whole patch. rows: model file → matrix → token ids. data: data files that change.

    contents: path below the folder → new content of a small file, None for one that goes. new: texts of tokens that
    are new to the folder by id.
    """

    folder: Path
    models: Sequence[Model]
    rows: Mapping[Path, Mapping[str, Sequence[int]]]
    data: Mapping[Path, DataPatch]
    contents: Mapping[str, bytes | None]
    vocab: int
    new: Mapping[int, str]

    @property
    def names(self) -> list[str]:
        """Every file of the patched folder, by its path below it, in order."""
        held = {path.relative_to(self.folder).as_posix() for path in walk(self.folder)}
        gone = {name for name, content in self.contents.items() if content is None}
        return sorted((held | self.contents.keys()) - gone)

    @property
    def nbytes(self) -> int:
        """Bytes of the patched folder."""
        return sum(self._nbytes(name) for name in self.names)

    def _nbytes(self, name: str) -> int:
        content, data = self.contents.get(name), self.data.get(self.folder / name)
        if content is not None:
            return len(content)
        return data.nbytes if data else (self.folder / name).stat().st_size

    @property
    def moves_bytes(self) -> bool:
        """Whether weights that stay get another place, or lie with new rows in a model file that is written anew."""
        parts = (part for model in self.models for one in model.matrices.values() for part in one.parts)
        return any(one.moved for one in self.data.values()) or any(part.place is None for part in parts)


def open_models(folder: Path) -> list[Model]:
    """Every model of the folder.

    Raises NotExpressible for one that is not recognised, as it would go stale, and for an encoder-decoder.
    """
    refuse_interrupted(folder)
    paths = sorted((path for path in walk(folder) if path.suffix == ".onnx"), key=lambda path: (len(path.stem), path))
    if not paths:
        raise UnreadableFile(folder, "expected ONNX models in it or in onnx/, found none")
    if any(map(is_encoder, paths)):
        reason = "the models of an encoder-decoder, where encoder and decoder each hold the embedding, are not patched"
        raise NotExpressible(f"patch: {folder}", reason, instead=_INSTEAD)
    models = []
    for path in paths:
        file = OnnxFile.open(path)
        if file.embedding is None or file.head is None:
            missing = "no look-up by input_ids" if file.embedding is None else "no matrix in front of the logits"
            raise NotExpressible(f"patch: {path}", f"{missing} is recognised in the graph", instead=_INSTEAD)
        models.append(Model(file, Matrix.of(file, file.embedding), Matrix.of(file, file.head)))
    return models


def walk(folder: Path) -> Iterator[Path]:
    """Every file below ``folder`` that is part of it: not what tools keep in hidden folders. Raises BadInput."""
    for here, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in folders:
            if (Path(here) / name).is_symlink():
                raise BadInput(f"{Path(here) / name}: expected a folder, found a link to one")
        yield from (Path(here) / name for name in sorted(names))


def plan_rows(folder: Path, models: Sequence[Model], adapters: Sequence[Adapter], provenance: Provenance) -> OnnxPatch:
    """Decide what changes and encode the new rows. Memory: a graph, and the weights inside model files.

    Raises NotExpressible, BadInput, TensorMismatch.
    """
    config = folder / "config.json"
    told = read_object(config) if config.is_file() else {}
    wanted = [gather(_matrices(one, told.get("tie_word_embeddings")), adapters) for one in models]
    old = _vocab(models)
    files = merged_files(folder, adapters)
    vocab = require_agreement(folder, wanted, old, files)
    for model, rows in zip(models, wanted, strict=True):
        for name in model.matrices:
            rows.require_covered(model.file.path, name, old, vocab)
    patches = [_part_patches(model, rows, vocab) for model, rows in zip(models, wanted, strict=True)]
    data = _plan_data(models, patches)
    contents: dict[str, bytes | None] = dict(patched_files(folder, adapters, vocab if vocab != old else None))
    for model, parts in zip(models, patches, strict=True):
        if (content := _model_file(model, parts, data, provenance)) is not None:
            contents[model.file.path.relative_to(folder).as_posix()] = content
    token_ids = {
        model.file.path: {name: sorted(ids) for name, ids in rows.rows.items()}
        for model, rows in zip(models, wanted, strict=True)
    }
    return OnnxPatch(folder, models, token_ids, data, contents, vocab, new_tokens(folder, files, old, vocab))


def _model_file(
    model: Model, parts: Mapping[str, PartPatch], data: Mapping[Path, DataPatch], provenance: Provenance
) -> bytes | None:
    """The new content of the model file, None if it stays."""
    file = model.file
    places = {name: one.place.path for name, one in file.initialisers.items() if one.place}
    outside = {name: data[path] for name, path in places.items() if path in data}
    return patched_model(file, parts, outside, provenance(recorded_provenance(file)), model.head.name)


def _matrices(model: Model, tied: object) -> Matrices:
    head = None if model.head.name == model.embedding.name else model.head.name
    widths = {name: one.hidden for name, one in model.matrices.items()}
    asks = partial(repeats, model.embedding, model.head, tied=tied)
    return Matrices(model.file.path, "onnx", model.embedding.name, head, widths, asks)


def _vocab(models: Sequence[Model]) -> int:
    sizes = {one.n_tokens: one for model in models for one in model.matrices.values()}
    if len(sizes) > 1:
        found = ", ".join(f"{count} in {one.name} of {one.file.path.name}" for count, one in sizes.items())
        raise NotExpressible(f"patch: {models[0].file.path.parent}", f"numbers of tokens: {found}", instead=_INSTEAD)
    return next(iter(sizes))


def _part_patches(model: Model, wanted: Wanted, vocab: int) -> dict[str, PartPatch]:
    patches = {}
    for name in wanted.rows:
        matrix, part = model.matrices[name], wanted.where[name]
        ids, rows = rounded(wanted, name, "F32" if matrix.form or matrix.scaled else matrix.parts[0].dtype)
        with in_tensor(part.path, part.key):
            encoded = matrix.encode(rows)
        for tensor, data in zip(matrix.parts, encoded, strict=True):
            patches[tensor.name] = PartPatch(tensor, matrix.axis, ids, data, matrix.n_tokens, vocab)
    return patches


def _plan_data(models: Sequence[Model], patches: Sequence[Mapping[str, PartPatch]]) -> dict[Path, DataPatch]:
    """Of every data file that changes. Two models may share one while nothing in it moves."""
    found: dict[Path, DataPatch] = {}
    for model, parts in zip(models, patches, strict=True):
        by_path: dict[Path, dict[str, PartPatch]] = {}
        for name, one in parts.items():
            if one.tensor.place is not None:
                by_path.setdefault(one.tensor.place.path, {})[name] = one
        for path, own in by_path.items():
            tensors = [one for one in model.file.initialisers.values() if one.place and one.place.path == path]
            plan = plan_data(path, tensors, own)
            first = found.get(path)
            if first is not None:
                if plan.moved:
                    reason = "two models share it, and the vocabulary grows"
                    raise NotExpressible(f"patch: {path}", reason, instead=_INSTEAD)
                pieces = dict([*first.pieces, *plan.pieces])
                plan = DataPatch(path, plan.segments, list(pieces.items()), plan.nbytes, plan.offsets, moved=False)
            found[path] = plan
    return found
