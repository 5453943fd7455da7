"""Quantised artifacts are judged against the same quantisation of the untuned base, which is made here.

Rows quantise independently of each other, so the artifact with the base's rows put back in place of the trained ones
*is* the base in the same quantisation, down to the quantiser that made it.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

from exporter.errors import writing
from exporter.sources.gguf import GgufFile
from exporter.tensors import Array
from exporter.verify.artifact import encode
from exporter.verify.reference import Reference


def write_base(artifact: Path, reference: Reference, copy: Path) -> None:
    """Write ``copy``: ``artifact`` with the base's rows. Rows of new tokens, which no base has, stay as they are."""
    with writing(copy):
        shutil.copyfile(artifact, copy)
    tie = reference.checkpoint.tie
    _put_back(copy, "token_embd.weight", reference, tie.embedding, reference.embedding_rows)
    if not tie.tied:
        _put_back(copy, "output.weight", reference, str(tie.head), reference.head_rows)


def _put_back(copy: Path, name: str, reference: Reference, source: str, rows: Mapping[int, Array]) -> None:
    tensor = GgufFile.open(copy).tensors[name]
    with writing(copy), copy.open("r+b") as file:
        for token_id in sorted(rows):
            if token_id < reference.base_vocab:
                value = reference.checkpoint.tensors[source].rows(token_id, token_id + 1)
                file.seek(tensor.offset_bytes + token_id * tensor.row_nbytes)
                file.write(encode(value, tensor.type).tobytes())
