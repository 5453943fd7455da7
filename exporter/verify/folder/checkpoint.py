"""Check config.json and the tensors of a merged Hugging Face checkpoint against the base and the adapters."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from exporter.sources.hf.checkpoint import Checkpoint
from exporter.sources.hf.quantised import quantiser_floats
from exporter.sources.hf.safetensors import FileTensor
from exporter.tensors import FLOATS, Array, blocks, cast
from exporter.verify.expect.reference import Reference
from exporter.verify.folder.configs import check_config
from exporter.verify.folder.special_ids import check_special_ids
from exporter.verify.report import Check
from exporter.verify.stored.artifact import stored_matrix
from exporter.verify.tolerances import MERGED_ULPS
from exporter.verify.values.computed import compare, sample


def check_checkpoint(path: Path, reference: Reference, *, untouched: bool) -> Iterator[Check]:
    """Yield the checks of a merged checkpoint.

    untouched: True to also compare the tensors that no adapter changes, and to compare all rows of changed tensors
    instead of a sample. The embedding and the head are compared by the checks in ``exporter.verify.values.rows``.
    """
    merged = Checkpoint.open(path)
    yield _check_names(merged, reference)
    yield check_config(merged.config, reference)
    yield check_special_ids(merged.config, merged.auxiliary_files, reference)
    yield from _check_changed(merged, reference, every=untouched)
    if untouched:
        yield _check_values(merged, reference)


def _vocabulary(reference: Reference) -> set[str | None]:
    tie = reference.checkpoint.tie
    return set(tie.names)


def _check_names(merged: Checkpoint, reference: Reference) -> Check:
    base = reference.checkpoint
    names = merged.tensors.keys() - ({merged.stored_head} if base.tie.tied and not reference.tied else set())
    wanted = {**reference.tensors, **reference.untied}
    wrong = sorted(names ^ ((base.tensors.keys() | reference.untied.keys()) - ({base.tie.head} - names)))
    wrong += [
        name
        for name in (base.tensors.keys() | reference.untied.keys()) & merged.tensors.keys() - _vocabulary(reference)
        if merged.tensors[name].spec.shape != wanted[name].shape
    ]
    detail = f"the names and shapes of {len(merged.tensors)} tensors match the base"
    if wrong:
        detail = f"{len(wrong)} tensors are missing, are unexpected or have a wrong shape; the first is {wrong[0]}"
    return Check(name="tensor names", passed=not wrong, value=float(len(wrong)), limit=0.0, detail=detail)


def _check_changed(merged: Checkpoint, reference: Reference, *, every: bool) -> Iterator[Check]:
    """Compare every tensor that an adapter changes, except embedding and head, with the tensor's expected values.

    Sums of base and updates are compared up to rounding errors, and tensors that an adapter replaces are compared
    exactly.
    """
    changed = {
        name: want
        for name, want in {**reference.tensors, **reference.untied}.items()
        if (want.changed or name not in reference.checkpoint.tensors)
        and name in merged.tensors
        and name not in _vocabulary(reference)
    }
    wrong, worst = [], 0.0
    for name, want in changed.items():
        tensor = merged.tensors[name]
        if want.computed or want.rows or want.zero_columns:
            ids = range(want.n_rows) if every else sample(want.n_rows)
            rows, deviation = compare(stored_matrix(tensor), want, ids)
            worst = max(worst, deviation)
            wrong += [name] if rows else []
        elif not _same_values(tensor, want.source, want.base.spec.dtype):
            wrong.append(name)
    if changed:
        detail = (
            f"compared {'all' if every else 'sampled'} rows of {len(changed)} tensors with base plus adapter updates"
        )
        if wrong:
            detail = (
                f"{len(wrong)} of {len(changed)} tensors differ from base plus adapter updates; the first is {wrong[0]}"
            )
        yield Check(name="updates", passed=not wrong, value=worst, limit=MERGED_ULPS, detail=detail)


def _check_values(merged: Checkpoint, reference: Reference) -> Check:
    base = reference.checkpoint.tensors
    wanted = {**reference.tensors, **reference.untied}
    names = [name for name in base if name not in _vocabulary(reference) and not wanted[name].changed]
    # A cast of a quantiser's scales would change the values of the quantised matrices.
    kept = quantiser_floats(base) if reference.checkpoint.quantisation else frozenset()
    wrong = [
        name
        for name in names
        if (tensor := merged.tensors.get(name)) is not None
        and (not _same_values(tensor, base[name]) or (name in kept and tensor.spec.dtype != base[name].spec.dtype))
    ]
    detail = f"{len(names)} tensors that no adapter targets equal the base bit for bit"
    if wrong:
        detail = (
            f"{len(wrong)} of {len(names)} tensors that no adapter targets differ from the base; "
            f"the first is {wrong[0]}"
        )
    return Check(name="other tensors", passed=not wrong, value=float(len(wrong)), limit=0.0, detail=detail)


def _same_values(tensor: FileTensor, source: FileTensor, through: str | None = None) -> bool:
    """Whether ``tensor`` equals ``source`` bit for bit, after ``source`` is cast to the dtype of ``tensor``.

    The tensors are compared as bytes, so that NaNs equal each other and differently signed zeros differ.

    through: a dtype to which ``source`` may have been rounded before the cast to the dtype of ``tensor``, or None.
    """
    if tensor.spec.shape != source.spec.shape:
        return False
    if (tensor.spec.dtype in FLOATS) != (source.spec.dtype in FLOATS):
        return False
    for start, want in blocks(source):
        stored = tensor.rows(start, start + len(want))
        accepted = [want]
        if source.spec.dtype in FLOATS:
            accepted = [cast(want, tensor.spec.dtype)] + (
                [cast(cast(want, through), tensor.spec.dtype)] if through else []
            )
        if not any(np.array_equal(_bytes(expected), _bytes(stored)) for expected in accepted):
            return False
    return True


def _bytes(value: Array) -> Array:
    return np.ascontiguousarray(value).reshape(-1).view(np.uint8)
