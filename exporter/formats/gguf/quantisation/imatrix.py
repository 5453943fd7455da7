"""Read importance matrices that llama-imatrix wrote, either in its GGUF format or in its legacy binary format.

Source for the two file formats, and for the computation of the importances: the importance matrix loader in llama.cpp's
llama-quantize.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from exporter.errors import UnreadableFile, reading
from exporter.sources.gguf.file import GgufFile
from exporter.sources.gguf.header import GgufArray
from exporter.sources.gguf.types import MAGIC
from exporter.tensors import Array

_SUMS: Final = ".in_sum2"
_COUNTS: Final = ".counts"
_INT: Final = struct.Struct("<i")
#: Names of the tensors with one row per token. Token rows are quantised without importances, so that a patch can
#: replace rows, and a verification can compare rows, without the file of the importance matrix. llama-imatrix measures
#: no importances of these tensors, except of output.weight with the option --process-output.
VOCABULARY: Final = frozenset({"token_embd.weight", "per_layer_token_embd.weight", "output.weight"})


@dataclass(frozen=True)
class Imatrix:
    """An importance matrix, which weights the columns of each tensor during quantisation.

    values: maps each tensor name to the importances of the tensor's columns, as a float32 array of length width, or
    experts * width for the stacked tensors of experts. datasets: the file names of the texts with which the importances
    were measured. chunks: the number of text chunks with which the importances were measured.
    """

    values: Mapping[str, Array]
    datasets: tuple[str, ...]
    chunks: int

    @property
    def used(self) -> dict[str, Array]:
        """The importances with which tensors are quantised: those of all tensors except the ``VOCABULARY``."""
        return {name: values for name, values in self.values.items() if name not in VOCABULARY}

    @property
    def unused(self) -> list[str]:
        """The names of the tensors of the ``VOCABULARY`` that have importances."""
        return sorted(self.values.keys() & VOCABULARY)


def read_imatrix(path: Path) -> Imatrix:
    """Read the file ``path``, an importance matrix in the GGUF format or the legacy format of llama-imatrix.

    Raises UnreadableFile if the file format is unknown or if an importance is not finite.
    """
    with reading(path), path.open("rb") as file:
        start = file.read(len(MAGIC))
    imatrix = _read_gguf(path) if start == MAGIC else _read_legacy(path)
    if not imatrix.values:
        raise UnreadableFile(path, "expected an importance matrix, found a file without entries")
    for name, values in imatrix.values.items():
        if not np.isfinite(values).all():
            raise UnreadableFile(path, f"{name}: expected finite importances, found NaN or Inf")
    return imatrix


def _read_gguf(path: Path) -> Imatrix:
    file = GgufFile.open(path)
    values: dict[str, Array] = {}
    for name in sorted(file.tensors):
        if not name.endswith(_SUMS):
            continue
        stem = name.removesuffix(_SUMS)
        pair = (file.tensors[name], file.tensors.get(stem + _COUNTS))
        if any(tensor is None or tensor.type != "F32" for tensor in pair):
            reason = f"{stem}: expected two F32 tensors (sums and counts), but a tensor is missing or has another type"
            raise UnreadableFile(path, reason)
        sums = file.dequantize_rows(name, 0, file.tensors[name].n_rows).reshape(-1)
        counts = file.dequantize_rows(stem + _COUNTS, 0, file.tensors[stem + _COUNTS].n_rows).reshape(-1)
        if sums.size % counts.size:
            raise UnreadableFile(
                path,
                f"{stem}: expected one count per expert, so that the number of sums is a multiple of {counts.size}, "
                f"found {sums.size} sums",
            )
        whole = np.round(counts).astype(np.float32)[:, None]
        experts = sums.reshape(counts.size, -1)
        # If no text was routed to an expert, all columns of the expert are equally important.
        with np.errstate(divide="ignore", invalid="ignore"):
            values[stem] = np.where(whole > 0, experts / whole, np.float32(1)).reshape(-1)
    datasets, chunks = file.metadata.get("imatrix.datasets"), file.metadata.get("imatrix.chunk_count", 0)
    if not isinstance(datasets, GgufArray) or type(chunks) is not int:
        reason = "expected the metadata keys imatrix.datasets and imatrix.chunk_count, but a key is missing or invalid"
        raise UnreadableFile(path, reason)
    return Imatrix(values, tuple(map(str, datasets.values())), chunks)


def _read_legacy(path: Path) -> Imatrix:
    with reading(path):
        data = path.read_bytes()
    values: dict[str, Array] = {}
    at = 0

    def number() -> int:
        nonlocal at
        (value,) = _INT.unpack_from(data, at)
        at += _INT.size
        return int(value)

    def take(nbytes: int) -> bytes:
        nonlocal at
        if not 0 <= nbytes <= len(data) - at:
            reason = (
                f"expected {nbytes} bytes at offset {at}, but the importance matrix is truncated or has another format"
            )
            raise UnreadableFile(path, reason)
        at += nbytes
        return data[at - nbytes : at]

    try:
        for _ in range(number()):
            name = take(number()).decode()
            calls, count = number(), number()
            sums = np.frombuffer(take(4 * count), "<f4")
            values[name] = sums / np.float32(calls) if calls > 0 else sums
        chunks = number() if at < len(data) else 0
        dataset = take(number()).decode() if at < len(data) else ""
    except (struct.error, UnicodeDecodeError) as exc:
        raise UnreadableFile(path, "expected an importance matrix, found another format or a truncated file") from exc
    return Imatrix(values, (dataset,) if dataset else (), chunks)
