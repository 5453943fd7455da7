"""Quantised artifacts are judged against the same quantisation of the untuned base, which is made here.

Rows quantise independently of each other, so the artifact with the base's rows put back in place of the trained ones
*is* the base in the same quantisation, down to the quantiser that made it. Tensors with updates are quantised here, as
llama.cpp and ONNX Runtime do it without an importance matrix.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

import numpy as np

from exporter.errors import MissingDependency, NotExpressible, writing
from exporter.sources.gguf.split_files import GgufModel
from exporter.tensors import ByteRange
from exporter.verify.expect.reference import Reference
from exporter.verify.expect.tensors import Expected
from exporter.verify.gguf.hyperparameters import hyperparameters
from exporter.verify.gguf.layout import VOCABULARY, arrangement, map_tensors
from exporter.verify.stored.artifact import Artifact, StoredMatrix, decode, encode, open_artifacts

_ROWS_AT_ONCE: Final = 4096


def write_base(artifact: Artifact, reference: Reference, folder: Path) -> tuple[Path, list[str]]:
    """Copy ``artifact`` into ``folder``, a new one, with the base's values.

    Returns the copy's path, and which of the tensors that tuning changes could not be put back: the copy is then not
    the base. Rows of new tokens, which no base has, stay as they are.
    """
    for path in artifact.files:
        copy = folder / path.relative_to(artifact.path.parent)
        with writing(copy):
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)
    [made] = open_artifacts(folder / artifact.path.name)
    _put_back(made.embedding, reference.embedding)
    if made.encoder_embedding is not None:
        _put_back(made.encoder_embedding, reference.embedding)
    if made.head is not None:
        _put_back(made.head, reference.head)
    tie = reference.checkpoint.tie
    vocabulary = {tie.embedding, tie.head, *tie.copies}
    # A tied head is named among the tensors, too, though the checkpoint has none.
    inner = reference.checkpoint.tensors.keys() - vocabulary
    changed = {name for name in inner if reference.tensors[name].changed}
    if changed:
        changed -= set(_gguf(made.parts, reference) if made.parts else _onnx(made, reference))
    return made.path, sorted(changed)


def _put_back(matrix: StoredMatrix, want: Expected) -> None:
    """The trained rows, or all of them if the whole matrix is another one."""
    count = min(want.base.spec.n_rows, matrix.n_rows)
    whole = want.computed or want.full is not None
    ids = range(count) if whole else [row for row in sorted(want.rows) if row < count]
    step = _ROWS_AT_ONCE if whole else 1
    for start in range(0, len(ids), step):
        some = ids[start : start + step]
        rows = encode(want.base.rows(some[0], some[-1] + 1), matrix.kind)
        for token_id, raw in zip(some, rows, strict=True):
            _write(matrix.places(token_id), raw.tobytes())


def _write(places: Sequence[ByteRange], content: bytes) -> None:
    for place in places:
        with writing(place.path), place.path.open("r+b") as file:
            file.seek(place.offset_bytes)
            file.write(content[: place.nbytes])
        content = content[place.nbytes :]


def _gguf(parts: GgufModel, reference: Reference) -> Iterator[str]:
    """Put back the other tensors of a GGUF; yields the stored names of those that are the base's again."""
    config, arch = reference.checkpoint.text_config, str(parts.metadata.get("general.architecture"))
    layers = hyperparameters(config).get("block_count")
    try:
        wanted, _ = map_tensors(reference.checkpoint.tensors, arch, layers if isinstance(layers, int) else 1)
    except KeyError:
        return
    for name in sorted(parts.tensors.keys() & wanted.keys() - set(VOCABULARY)):
        tensor, arrange = parts.tensors[name], arrangement(arch, name, config)
        rows = tensor.n_rows // len(wanted[name])
        for number, stored in enumerate(wanted[name]):
            want = reference.tensors[stored]
            if not want.changed:
                continue
            base = want.base.rows(0, want.base.spec.n_rows)
            base = (arrange(base) if arrange else base).reshape(-1, tensor.shape[-1])
            try:
                raw = encode(base, tensor.type)
            except (MissingDependency, NotExpressible):
                continue  # such as a type that needs an importance matrix
            start = tensor.offset_bytes + number * rows * tensor.row_nbytes
            _write([ByteRange(parts.holder(name).path, start, raw.nbytes)], raw.tobytes())
            yield stored


def _onnx(made: Artifact, reference: Reference) -> Iterator[str]:
    """The same for the matrices of an ONNX model that hold sums."""
    from exporter.sources.onnx.file import OnnxFile  # parses protobuf: only ONNX waits for it
    from exporter.verify.onnx.base_sums import BaseSums
    from exporter.verify.onnx.matrices import matrices

    sums = BaseSums(reference)
    for path in (path for path in made.files if path.suffix == ".onnx"):
        for one in matrices(OnnxFile.open(path)):
            found, places = sums.find(one.name, decode(one.raw(), one.kind)), one.places()
            if found is not None and places is not None:
                content = encode(np.asarray(found.base, np.float32), one.kind)
                # A row's codes, scales and zero points stand side by side here, each in a tensor of its own there.
                _write(places, b"".join(part.tobytes() for part in one.split(content)))
                yield from found.names
