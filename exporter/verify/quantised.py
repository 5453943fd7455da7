"""Quantised artifacts are judged against the same quantisation of the untuned base, which is made here.

Rows quantise independently of each other, so the artifact with the base's rows put back in place of the trained ones
*is* the base in the same quantisation, down to the quantiser that made it.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from exporter.errors import writing
from exporter.sources.gguf_parts import GgufParts
from exporter.verify.artifact import encode
from exporter.verify.expected import Expected
from exporter.verify.reference import Reference


def write_base(artifact: Path, reference: Reference, folder: Path) -> Path:
    """Write ``artifact`` with the base's rows into ``folder``, a new one; the file that names the copy.

    Rows of new tokens, which no base has, stay as they are.
    """
    with writing(folder):
        folder.mkdir()
        for file in GgufParts.open(artifact).files:
            shutil.copyfile(file.path, folder / file.path.name)
    parts = GgufParts.open(folder / artifact.name)
    _put_back(parts, "token_embd.weight", reference.embedding)
    if "output.weight" in parts.tensors:
        _put_back(parts, "output.weight", reference.head)
    return parts.path


def _put_back(parts: GgufParts, name: str, want: Expected) -> None:
    tensor, copy = parts.tensors[name], parts.holder(name).path
    with writing(copy), copy.open("r+b") as file:
        for token_id in sorted(want.rows):
            if token_id < want.base.spec.n_rows:
                value = want.base.rows(token_id, token_id + 1)
                file.seek(tensor.offset_bytes + token_id * tensor.row_nbytes)
                file.write(encode(value, tensor.type).tobytes())
