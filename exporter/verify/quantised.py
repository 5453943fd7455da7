"""Quantised artifacts are judged against the same quantisation of the untuned base, which is made here.

Rows quantise independently of each other, so the artifact with the base's rows put back in place of the trained ones
*is* the base in the same quantisation, down to the quantiser that made it.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from exporter.errors import writing
from exporter.verify.artifact import Artifact, Matrix, encode, open_artifacts
from exporter.verify.expected import Expected
from exporter.verify.reference import Reference


def write_base(artifact: Artifact, reference: Reference, folder: Path) -> Path:
    """Copy ``artifact`` into ``folder``, a new one, with the base's rows; return the copy's path.

    Rows of new tokens, which no base has, stay as they are.
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
    return made.path


def _put_back(matrix: Matrix, want: Expected) -> None:
    for token_id in sorted(want.rows):
        if token_id < want.base.spec.n_rows:
            row = encode(want.base.rows(token_id, token_id + 1), matrix.kind).tobytes()
            for place in matrix.places(token_id):
                with writing(place.path), place.path.open("r+b") as file:
                    file.seek(place.offset_bytes)
                    file.write(row[: place.nbytes])
                row = row[place.nbytes :]
