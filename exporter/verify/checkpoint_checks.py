"""Checks of a merged Hugging Face folder: the same tensors as the base, config and vocabulary agree."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from exporter.sources.checkpoint import Checkpoint
from exporter.tensors import FLOATS, blocks, cast
from exporter.verify.reference import Reference
from exporter.verify.report import Check

#: Config keys that follow the weights and therefore may differ from the base.
_FOLLOWING = frozenset({"vocab_size", "dtype", "torch_dtype", "tie_word_embeddings", "text_config"})


def check_checkpoint(path: Path, reference: Reference, *, untouched: bool) -> Iterator[Check]:
    """Yield the checks; ``untouched`` compares every tensor but embedding and head with the base's, byte for byte."""
    merged, base = Checkpoint.open(path), reference.checkpoint
    yield _check_names(merged, base)
    yield _check_config(merged, reference)
    if untouched:
        yield _check_values(merged, base)


def _check_names(merged: Checkpoint, base: Checkpoint) -> Check:
    matrices = {base.tie.embedding, base.tie.head}
    wrong = sorted(merged.tensors.keys() ^ base.tensors.keys())
    wrong += [
        name
        for name in base.tensors.keys() & merged.tensors.keys() - matrices
        if merged.tensors[name].spec.shape != base.tensors[name].spec.shape
    ]
    detail = f"{len(base.tensors)} tensors, named and shaped as in the base"
    if wrong:
        detail = f"{len(wrong)} tensors are missing, new or of another shape, first {wrong[0]}"
    return Check(name="tensor names", passed=not wrong, value=float(len(wrong)), limit=0.0, detail=detail)


def _check_config(merged: Checkpoint, reference: Reference) -> Check:
    base = reference.checkpoint
    wrong = [
        key
        for key in sorted(merged.config.keys() | base.config.keys())
        if key not in _FOLLOWING and merged.config.get(key) != base.config.get(key)
    ]
    if merged.text_config.get("vocab_size") not in (None, reference.vocab):
        wrong.append("vocab_size")
    if merged.text_config.get("tie_word_embeddings") != base.text_config.get("tie_word_embeddings"):
        wrong.append("tie_word_embeddings")
    detail = f"config.json: {wrong[0]}: not what base and adapters give" if wrong else "agrees with the base"
    return Check(name="config", passed=not wrong, detail=detail)


def _check_values(merged: Checkpoint, base: Checkpoint) -> Check:
    names = [name for name in base.tensors if name not in (base.tie.embedding, base.tie.head)]
    wrong = [name for name in names if name in merged.tensors and not _same_values(merged, base, name)]
    detail = f"{len(names)} other tensors as in the base, bit for bit"
    if wrong:
        detail = f"{len(wrong)} of {len(names)} other tensors differ from the base, first {wrong[0]}"
    return Check(name="other tensors", passed=not wrong, value=float(len(wrong)), limit=0.0, detail=detail)


def _same_values(merged: Checkpoint, base: Checkpoint, name: str) -> bool:
    """Compared as bytes after the cast that the merged dtype declares: NaNs and signed zeros count."""
    tensor, source = merged.tensors[name], base.tensors[name]
    if tensor.spec.shape != source.spec.shape:
        return False
    if (tensor.spec.dtype in FLOATS) != (source.spec.dtype in FLOATS):
        return False
    for start, want in blocks(source):
        want = cast(want, tensor.spec.dtype) if source.spec.dtype in FLOATS else want
        got = tensor.rows(start, start + len(want))
        if not np.array_equal(want.reshape(-1).view(np.uint8), got.reshape(-1).view(np.uint8)):
            return False
    return True
