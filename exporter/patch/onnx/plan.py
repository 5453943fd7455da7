"""Plans the patch of a folder of ONNX models: new bytes in external data files, and new contents of small files."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from exporter.errors import BadInput, UnreadableFile
from exporter.io.json_objects import read_object
from exporter.patch.evidence import recorded_provenance
from exporter.patch.onnx.data import DataPatch, plan_data
from exporter.patch.onnx.files import merged_files, patched_files
from exporter.patch.onnx.graph import patched_model
from exporter.patch.onnx.initialiser import InitialiserPatch
from exporter.patch.onnx.refusal import refusal
from exporter.patch.onnx.tokens import new_tokens, vocab_size
from exporter.patch.onnx.vocab_matrix import VocabMatrix, repeats
from exporter.patch.rows import RowEdits, VocabTensors, collect_rows
from exporter.sources.journal import refuse_interrupted
from exporter.sources.onnx.file import OnnxFile
from exporter.sources.onnx.folder import is_encoder
from exporter.sources.peft.adapter import Adapter

#: The provenance recorded in a model → the provenance to record in the patched model.
Provenance = Callable[[Mapping[str, str]], Mapping[str, str]]


@dataclass(frozen=True)
class VocabModel:
    """An ONNX model of the folder and the model's vocabulary matrices.

    If the model stores a single matrix for embedding and LM head, ``head`` equals ``embedding``.
    """

    file: OnnxFile
    embedding: VocabMatrix
    head: VocabMatrix

    @property
    def matrices(self) -> dict[str, VocabMatrix]:
        """Name → vocabulary matrix."""
        return {matrix.name: matrix for matrix in (self.embedding, self.head)}

    def vocab_tensors(self, tied: object) -> VocabTensors:
        """Return the names of the vocabulary matrices. tied: value of ``tie_word_embeddings`` in config.json."""
        head = None if self.head.name == self.embedding.name else self.head.name
        widths = {name: matrix.hidden for name, matrix in self.matrices.items()}
        head_repeats = partial(repeats, self.embedding, self.head, tied=tied)
        return VocabTensors(self.file.path, "onnx", self.embedding.name, head, widths, head_repeats)


@dataclass(frozen=True)
class OnnxPatch:
    """The planned patch of a folder of ONNX models.

    rows: maps each model file to a dict that maps the name of each vocabulary matrix to the ids of the tokens whose
    rows change. data: the planned patches of external data files, by path. contents: the new contents of changed small
    files, by relative path; the content is None if the file is removed. new_tokens: the tokens that the patch adds to
    the folder's tokenizer, as a dict from token id to text.
    """

    folder: Path
    models: Sequence[VocabModel]
    rows: Mapping[Path, Mapping[str, Sequence[int]]]
    data: Mapping[Path, DataPatch]
    contents: Mapping[str, bytes | None]
    vocab: int
    new_tokens: Mapping[int, str]

    @property
    def names(self) -> list[str]:
        """Sorted relative paths of all files of the patched folder."""
        existing = {path.relative_to(self.folder).as_posix() for path in walk(self.folder)}
        removed = {name for name, content in self.contents.items() if content is None}
        return sorted((existing | self.contents.keys()) - removed)

    @property
    def nbytes(self) -> int:
        """Total size of the patched folder in bytes."""
        return sum(self._nbytes(name) for name in self.names)

    def _nbytes(self, name: str) -> int:
        content, data = self.contents.get(name), self.data.get(self.folder / name)
        if content is not None:
            return len(content)
        return data.nbytes if data else (self.folder / name).stat().st_size

    @property
    def moves_bytes(self) -> bool:
        """Whether tensors move to new offsets, or a model file that contains a vocabulary matrix is rewritten."""
        tensors = (tensor for model in self.models for matrix in model.matrices.values() for tensor in matrix.tensors)
        return any(data.moved for data in self.data.values()) or any(tensor.place is None for tensor in tensors)


def open_models(folder: Path) -> list[VocabModel]:
    """Return all ONNX models of the folder.

    Raises NotExpressible if a model is an encoder-decoder, or if the vocabulary matrices of a model are not found. A
    model that stayed unpatched would no longer match the other models of the folder.
    """
    refuse_interrupted(folder)
    paths = sorted((path for path in walk(folder) if path.suffix == ".onnx"), key=lambda path: (len(path.stem), path))
    if not paths:
        raise UnreadableFile(folder, "expected ONNX models in the folder or its subfolders, found no .onnx file")
    if any(map(is_encoder, paths)):
        reason = "an encoder-decoder cannot be patched, because encoder and decoder each contain the embedding"
        raise refusal(f"patch: {folder}", reason)
    models = []
    for path in paths:
        file = OnnxFile.open(path)
        if file.embedding is None or file.head is None:
            reason = (
                "the graph contains no recognisable embedding look-up by input_ids"
                if file.embedding is None
                else "the graph contains no recognisable matrix that computes the logits"
            )
            raise refusal(f"patch: {path}", reason)
        models.append(VocabModel(file, VocabMatrix.of(file, file.embedding), VocabMatrix.of(file, file.head)))
    return models


def walk(folder: Path) -> Iterator[Path]:
    """Yield all files below ``folder``, except files in hidden folders. Raises BadInput for a symlink to a folder."""
    for here, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in folders:
            if (Path(here) / name).is_symlink():
                raise BadInput(f"{Path(here) / name}: expected a folder, found a symbolic link to a folder")
        yield from (Path(here) / name for name in sorted(names))


def plan_rows(
    folder: Path, models: Sequence[VocabModel], adapters: Sequence[Adapter], provenance: Provenance
) -> OnnxPatch:
    """Plan the patch of a folder of ONNX models, and encode the new rows.

    Peak memory: one ONNX graph, plus all weights that are stored inside model files.

    Raises NotExpressible, BadInput or TensorMismatch if the adapters' rows or tokenizers do not fit the models.
    """
    path = folder / "config.json"
    config = read_object(path) if path.is_file() else {}
    edits = [collect_rows(model.vocab_tensors(config.get("tie_word_embeddings")), adapters) for model in models]
    n_rows = _n_rows(models)
    files = merged_files(folder, adapters)
    vocab = vocab_size(folder, edits, n_rows, files)
    for model, rows in zip(models, edits, strict=True):
        for name in model.matrices:
            rows.require_covered(model.file.path, name, n_rows, vocab)
    patches = [_initialiser_patches(model, rows, vocab) for model, rows in zip(models, edits, strict=True)]
    data = _plan_data(models, patches)
    contents: dict[str, bytes | None] = dict(patched_files(folder, adapters, vocab if vocab != n_rows else None))
    for model, initialisers in zip(models, patches, strict=True):
        if (content := _model_file(model, initialisers, data, provenance)) is not None:
            contents[model.file.path.relative_to(folder).as_posix()] = content
    token_ids = {
        model.file.path: {name: sorted(ids) for name, ids in rows.rows.items()}
        for model, rows in zip(models, edits, strict=True)
    }
    return OnnxPatch(folder, models, token_ids, data, contents, vocab, new_tokens(folder, files, n_rows, vocab))


def _model_file(
    model: VocabModel,
    patches: Mapping[str, InitialiserPatch],
    data: Mapping[Path, DataPatch],
    provenance: Provenance,
) -> bytes | None:
    """Return the new content of the ONNX model file, or None if the file does not change."""
    file = model.file
    places = {name: tensor.place.path for name, tensor in file.initialisers.items() if tensor.place}
    outside = {name: data[path] for name, path in places.items() if path in data}
    return patched_model(file, patches, outside, provenance(recorded_provenance(file.metadata)))


def _n_rows(models: Sequence[VocabModel]) -> int:
    """Return the number of rows of the vocabulary matrices, which must be equal in all models.

    Raises NotExpressible if the vocabulary matrices have different numbers of rows.
    """
    sizes = {matrix.n_tokens: matrix for model in models for matrix in model.matrices.values()}
    if len(sizes) > 1:
        actual = ", ".join(f"{count} in {matrix.name} of {matrix.file.path.name}" for count, matrix in sizes.items())
        raise refusal(
            f"patch: {models[0].file.path.parent}",
            f"expected the same number of tokens in all vocabulary matrices, found {actual}",
        )
    return next(iter(sizes))


def _initialiser_patches(model: VocabModel, edits: RowEdits, vocab: int) -> dict[str, InitialiserPatch]:
    patches = {}
    for name in edits.rows:
        matrix = model.matrices[name]
        token_ids, encoded = edits.encode(name, matrix.rounding, matrix.encode)
        for tensor, data in zip(matrix.tensors, encoded, strict=True):
            patches[tensor.name] = InitialiserPatch(tensor, matrix.token_axis, token_ids, data, matrix.n_tokens, vocab)
    return patches


def _plan_data(
    models: Sequence[VocabModel], patches: Sequence[Mapping[str, InitialiserPatch]]
) -> dict[Path, DataPatch]:
    """Plan the patches of external data files.

    Raises NotExpressible if two models share an external data file and the patch changes tensor offsets in the file.
    """
    plans: dict[Path, DataPatch] = {}
    for model, initialisers in zip(models, patches, strict=True):
        by_path: dict[Path, dict[str, InitialiserPatch]] = {}
        for name, patch in initialisers.items():
            if patch.tensor.place is not None:
                by_path.setdefault(patch.tensor.place.path, {})[name] = patch
        for path, own in by_path.items():
            tensors = [
                tensor
                for tensor in model.file.initialisers.values()
                if tensor.place is not None and tensor.place.path == path
            ]
            plan = plan_data(path, tensors, own)
            if (first := plans.get(path)) is not None:
                if plan.moved:
                    raise refusal(
                        f"patch: {path}",
                        "the vocabulary grows, but two models share this data file, so no tensor can be moved",
                    )
                plan = replace(plan, pieces=list(dict([*first.pieces, *plan.pieces]).items()))
            plans[path] = plan
    return plans
