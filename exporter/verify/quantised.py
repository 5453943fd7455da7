"""Quantised artifacts are judged against the same quantisation of the untuned base, which is made here.

Rows quantise independently of each other, so the artifact with the base's rows put back in place of the trained ones
*is* the base in the same quantisation, down to the quantiser that made it.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from exporter.errors import writing
from exporter.sources.gguf import GgufFile
from exporter.verify.artifact import encode
from exporter.verify.expected import Expected
from exporter.verify.reference import Reference


def write_base(artifact: Path, reference: Reference, copy: Path) -> None:
    """Write ``copy``: ``artifact`` with the base's rows. Rows of new tokens, which no base has, stay as they are."""
    with writing(copy):
        shutil.copyfile(artifact, copy)
    _put_back(copy, "token_embd.weight", reference.embedding)
    if "output.weight" in GgufFile.open(copy).tensors:
        _put_back(copy, "output.weight", reference.head)


def _put_back(copy: Path, name: str, want: Expected) -> None:
    tensor = GgufFile.open(copy).tensors[name]
    with writing(copy), copy.open("r+b") as file:
        for token_id in sorted(want.rows):
            if token_id < want.base.spec.n_rows:
                value = want.base.rows(token_id, token_id + 1)
                file.seek(tensor.offset_bytes + token_id * tensor.row_nbytes)
                file.write(encode(value, tensor.type).tobytes())
