"""Checks that adapters can be merged into a checkpoint, and that the adapters were trained on that checkpoint.

The check fails only if an adapter records a fact that contradicts the checkpoint. An adapter that records no facts
about its base passes the check. An adapter may record three facts about its base: the digest in the training record of
``ttexport tune``, the commit in PEFT's config, and the values of a frozen embedding or head that PEFT saved with the
adapter.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from exporter.errors import BadInput
from exporter.sources.hf.checkpoint import Checkpoint
from exporter.sources.hf.full_precision import require_plain_rows
from exporter.sources.hf.safetensors import FileTensor
from exporter.sources.hub.locate import Located
from exporter.sources.peft.adapter import Adapter
from exporter.sources.peft.edits import FullModule, LowRank
from exporter.sources.peft.folders import CONFIG
from exporter.sources.peft.training_record import read_record
from exporter.sources.peft.types.changes import ByPeft
from exporter.sources.places import EMBEDDING, stored_name, use_of
from exporter.tensors import FLOATS, as_bytes, cast

_COMMIT: Final = re.compile("[0-9a-f]{40}")
#: Number of rows of a saved matrix to compare. The matrices of two bases differ in almost every row.
_SAMPLED: Final = 64
_REMEDY: Final = "give the base on which the adapter was trained, or use --trust-base to merge into this base"


@dataclass(frozen=True)
class Contradiction:
    """A fact about the base that an adapter records and that does not hold for the given base.

    place: the file of the adapter, and the key or tensor in the file, that contain the fact.
    """

    place: str
    expected: str
    actual: str

    def __str__(self) -> str:
        """Return the file, the expected value and the actual value as the first part of an error message."""
        return f"{self.place}: expected {self.expected}, found {self.actual}"


def check_base(
    base: Located, checkpoint: Checkpoint, adapters: Sequence[Adapter], *, untie: bool = False, trust: bool = False
) -> tuple[str, ...]:
    """Check that the adapters can be merged into the base, and that they were trained on that base.

    checkpoint: the opened checkpoint of ``base``. untie: whether a separate head is to be stored. trust: whether to
    accept a base that contradicts the facts in the adapters. If ``trust`` is set, a warning is returned for every
    contradiction.

    Raises BadInput for a quantised base if the embedding is quantised, or if the adapters contain low-rank updates or
    changes that only PEFT can compute. Raises BadInput if an adapter records a fact that contradicts the base and
    ``trust`` is not set. Raises NotExpressible if ``untie`` is set for a base that is quantised and tied.
    """
    updates = any(isinstance(edit, LowRank | ByPeft) for adapter in adapters for edit in adapter.edits)
    named = [name for name in (base.repo, *(adapter.base_name for adapter in adapters)) if name]
    require_plain_rows(checkpoint, updates=updates, untie=untie, names=named)
    warnings = []
    for contradiction in contradictions(base, checkpoint, adapters):
        if not trust:
            raise BadInput(f"{contradiction}: the adapter was trained on a different base; {_REMEDY}")
        warnings.append(f"{contradiction}; the adapter is merged nevertheless, because trust-base is set")
    return tuple(warnings)


def contradictions(base: Located, checkpoint: Checkpoint, adapters: Sequence[Adapter]) -> Iterator[Contradiction]:
    """Yield the facts recorded in the adapters that do not hold for ``base``.

    If an adapter has a training record, one tensor of the base is read completely to compute its digest.
    """
    for adapter in adapters:
        yield from _by_record(checkpoint, adapter)
        yield from _by_commit(base, adapter)
        yield from _by_saved_rows(checkpoint, adapter)


def _by_record(checkpoint: Checkpoint, adapter: Adapter) -> Iterator[Contradiction]:
    record = read_record(adapter.path)
    if record is None:
        return
    embedding = checkpoint.tie.embedding
    named = record.tensor in checkpoint.tensors and record.tensor != embedding
    digest = checkpoint.digest(record.tensor) if named else checkpoint.embedding_digest
    if digest != record.digest:
        yield Contradiction(
            f"{record.path}: base_digest",
            f"the digest of {record.tensor if named else embedding} in {checkpoint.path} ({digest[:12]})",
            f"{record.digest[:12]}, of {record.base}",
        )


def _by_commit(base: Located, adapter: Adapter) -> Iterator[Contradiction]:
    """Compare the base's commit with the commit in the adapter's config.

    Commits of different repositories, and branch or tag names, are not compared.
    """
    recorded, name = adapter.config.get("revision"), adapter.base_name
    if not isinstance(recorded, str) or name != base.repo or base.revision is None:
        return
    if _COMMIT.fullmatch(recorded) and _COMMIT.fullmatch(base.revision) and recorded != base.revision:
        yield Contradiction(
            f"{adapter.path / CONFIG}: revision", f"the commit {base.revision} of {base.repo}", recorded
        )


def _by_saved_rows(checkpoint: Checkpoint, adapter: Adapter) -> Iterator[Contradiction]:
    """Sample rows of the frozen matrices that PEFT saved in the adapter file, and compare them with the base's rows.

    If only a few rows differ, no contradiction is reported, because rows of reserved tokens are often initialised
    before training.
    """
    with_rows = {edit.module for edit in adapter.rows}
    for edit in adapter.edits:
        if not isinstance(edit, FullModule) or not edit.in_place or edit.parameter != "weight":
            continue
        # PEFT freezes a wrapped matrix. A matrix that is not wrapped may have been trained as a whole.
        frozen = edit.module in with_rows or "base_layer" in edit.key.split(".")
        stored = _stored(checkpoint, edit.module) if frozen else None
        different, count = _different_rows(edit.tensor, stored) if stored is not None else (0, 0)
        if stored is not None and 2 * different > count:
            expected = f"the rows of {stored.spec.name} in {checkpoint.path}"
            actual = f"other values in {different} of {count} compared rows"
            yield Contradiction(f"{edit.path}: {edit.key}", expected, actual)


def _stored(checkpoint: Checkpoint, module: str) -> FileTensor | None:
    """Return the base's stored weight of ``module``, or None if no single stored tensor is the weight."""
    tie, use = checkpoint.tie, use_of(checkpoint, module)
    if use is not None:
        return checkpoint.tensors[tie.embedding if use == EMBEDDING or tie.head is None else tie.head]
    name = stored_name(checkpoint, module, "weight")
    return checkpoint.tensors[name] if name else None


def _different_rows(saved: FileTensor, stored: FileTensor) -> tuple[int, int]:
    """Return (number of sampled rows that differ, number of sampled rows).

    The rows of the base are rounded to the dtype of the saved rows, because PEFT saves rows in the dtype in which it
    trained. If the matrices have different numbers of rows, the additional rows of the larger matrix are not compared.
    """
    if {saved.spec.dtype, stored.spec.dtype} - FLOATS or saved.spec.shape[1:] != stored.spec.shape[1:]:
        return 0, 0
    last = min(saved.spec.n_rows, stored.spec.n_rows) - 1
    rows = sorted({round(step * last / (_SAMPLED - 1)) for step in range(_SAMPLED)}) if last >= 0 else []
    different = 0
    for row in rows:
        rounded = cast(stored.rows(row, row + 1), saved.spec.dtype)
        different += as_bytes(rounded) != as_bytes(saved.rows(row, row + 1))
    return different, len(rows)
