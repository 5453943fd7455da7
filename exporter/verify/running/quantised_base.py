"""Copy an artifact and replace the tuned values by the untuned base's values, quantised in the same way.

In all supported quantisation types, each row is quantised independently of all other rows. Because rows are quantised
independently, an artifact whose trained rows are replaced by the base's quantised rows equals the base quantised by the
artifact's quantiser. Tuned tensors without trained rows are replaced by the base's tensors, which the verification
quantises as llama.cpp and ONNX Runtime do without an importance matrix.
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
from exporter.verify.expect.expected import Expected
from exporter.verify.expect.reference import Reference
from exporter.verify.gguf.hyperparameters import hyperparameters
from exporter.verify.gguf.layout import VOCABULARY, arrangement, map_tensors
from exporter.verify.stored.artifact import Artifact, StoredMatrix, decode, encode, open_artifacts

_ROWS_AT_ONCE: Final = 4096


def write_base(artifact: Artifact, reference: Reference, folder: Path) -> tuple[Path, list[str]]:
    """Copy ``artifact`` into the new folder ``folder``, and replace the copy's tuned values by the base's values.

    Returns the path of the copy and the names of the tuned tensors that could not be replaced. If any tuned tensor
    could not be replaced, the copy does not equal the quantised base. The rows of new tokens are not replaced, because
    the base has no rows for new tokens. Raises OutputError if the copy cannot be written.
    """
    for path in artifact.files:
        copy = folder / path.relative_to(artifact.path.parent)
        with writing(copy):
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)
    [copied] = open_artifacts(folder / artifact.path.name)
    _put_back(copied.embedding, reference.embedding)
    if copied.encoder_embedding is not None:
        _put_back(copied.encoder_embedding, reference.embedding)
    if copied.head is not None:
        _put_back(copied.head, reference.head)
    tie = reference.checkpoint.tie
    vocabulary = set(tie.names)
    # The reference lists a tied head as a tensor, although the checkpoint stores no head.
    inner = reference.checkpoint.tensors.keys() - vocabulary
    changed = {name for name in inner if reference.tensors[name].changed}
    if changed:
        changed -= set(_gguf(copied.gguf, reference) if copied.gguf else _onnx(copied, reference))
    return copied.path, sorted(changed)


def _put_back(matrix: StoredMatrix, want: Expected) -> None:
    """Write the untuned base's rows to ``matrix`` in place of all rows that tuning changed."""
    count = min(want.base.spec.n_rows, matrix.n_rows)
    whole = want.computed or want.full is not None
    ids = range(count) if whole else [row for row in sorted(want.rows) if row < count]
    step = _ROWS_AT_ONCE if whole else 1
    for start in range(0, len(ids), step):
        some = ids[start : start + step]
        rows = encode(want.base.rows(some[0], some[-1] + 1), matrix.storage)
        for token_id, raw in zip(some, rows, strict=True):
            _write(matrix.places(token_id), raw.tobytes())


def _write(byte_ranges: Sequence[ByteRange], content: bytes) -> None:
    for byte_range in byte_ranges:
        with writing(byte_range.path), byte_range.path.open("r+b") as file:
            file.seek(byte_range.offset_bytes)
            file.write(content[: byte_range.nbytes])
        content = content[byte_range.nbytes :]


def _gguf(gguf: GgufModel, reference: Reference) -> Iterator[str]:
    """Replace the tuned inner tensors of a GGUF file by the untuned base's tensors.

    Yields the checkpoint name of each replaced tensor.
    """
    config, arch = reference.checkpoint.text_config, str(gguf.metadata.get("general.architecture"))
    layers = hyperparameters(config).get("block_count")
    try:
        wanted, _ = map_tensors(reference.checkpoint.tensors, arch, layers if isinstance(layers, int) else 1)
    except KeyError:
        return
    for name in sorted(gguf.tensors.keys() & wanted.keys() - set(VOCABULARY)):
        tensor, arrange = gguf.tensors[name], arrangement(arch, name, config)
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
                continue  # for example, the type needs an importance matrix
            start = tensor.offset_bytes + number * rows * tensor.row_nbytes
            _write([ByteRange(gguf.holder(name).path, start, raw.nbytes)], raw.tobytes())
            yield stored


def _onnx(copied: Artifact, reference: Reference) -> Iterator[str]:
    """Replace the merged inner tensors of an ONNX model by the untuned base's tensors.

    Yields the checkpoint name of each replaced tensor.
    """
    from exporter.sources.onnx.file import OnnxFile  # loads protobuf, which only ONNX needs
    from exporter.verify.onnx.base_sums import BaseSums
    from exporter.verify.onnx.matrices import matrices

    sums = BaseSums(reference)
    for path in (path for path in copied.files if path.suffix == ".onnx"):
        for matrix in matrices(OnnxFile.open(path)):
            expected_sum, places = sums.find(matrix.name, decode(matrix.raw(), matrix.storage)), matrix.places()
            if expected_sum is not None and places is not None:
                content = encode(np.asarray(expected_sum.base, np.float32), matrix.storage)
                # A row of ``content`` contains codes, scales and zero points. The file has separate tensors for the
                # three parts.
                _write(places, b"".join(part.tobytes() for part in matrix.split(content)))
                yield from expected_sum.names
