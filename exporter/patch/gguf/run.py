"""Runs the patch of a GGUF model: proves that the model was made from the base, then writes and verifies the result."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, ClassVar, Final

from exporter.errors import NotExpressible
from exporter.io.apart import require_apart
from exporter.patch.evidence import recorded_provenance
from exporter.patch.gguf.evidence import base_dtype, prove_base
from exporter.patch.gguf.plan import GgufPatch, plan_rows
from exporter.patch.gguf.write import changes_in_place, write_patched
from exporter.patch.journal import Changes
from exporter.patch.plan import Checker, PatchPlan
from exporter.patch.spec import OVER_BASE, Inputs, PatchSpec
from exporter.progress import Progress
from exporter.sources.gguf.split_files import GgufModel, split_file_name
from exporter.verify.patched.gguf import Before, check_patched

_SPLIT_SUFFIX: Final = re.compile(r"-\d{5}-of-\d{5}$")


@dataclass(frozen=True)
class GgufPatchPlan(PatchPlan):
    """The planned patch of a GGUF model, which is a single file or a split GGUF."""

    patch: GgufPatch

    format: ClassVar[str] = "gguf"

    @property
    def out(self) -> Path:
        """Path of the patched model, or of the first part of a split GGUF."""
        if self.spec.in_place:
            return self.spec.base
        return self.spec.out or Path(f"{self._stem(self.spec.base)}-patched.gguf")

    @cached_property
    def paths(self) -> list[Path]:
        """Paths of all files of the patched model; the parts of a split GGUF are in order."""
        if self.spec.in_place:
            return [file.file.path for file in self.patch.files]
        count = len(self.patch.files)
        if count == 1:
            return [self.out]
        return [self.out.with_name(split_file_name(self._stem(self.out), number, count)) for number in range(count)]

    @property
    def storage(self) -> str:
        """GGUF tensor type of the embedding matrix."""
        return self.patch.storage

    @property
    def targets(self) -> Sequence[Mapping[str, Any]]:
        """One dict with the keys storage, path and nbytes for each file of the patched model."""
        return [
            {"storage": self.storage, "path": str(path), "nbytes": file.nbytes}
            for path, file in zip(self.paths, self.patch.files, strict=True)
        ]

    @property
    def row_table(self) -> Sequence[Mapping[str, Any]]:
        """One dict with the keys tensor, type, token_ids and dtype for each patched tensor."""
        return [
            {
                "tensor": changed.tensor.name,
                "type": changed.tensor.type,
                "token_ids": list(changed.token_ids),
                "dtype": self.patch.dtype,
            }
            for file in self.patch.files
            for changed in file.tensors
        ]

    @property
    def vocab(self) -> int:
        """Number of rows of the embedding after patching."""
        return self.patch.vocab

    @property
    def new_tokens(self) -> Mapping[int, str]:
        """The tokens that the patch adds to the model, as a dict from token id to text."""
        return self.patch.new_tokens

    @property
    def moves_bytes(self) -> bool:
        """Whether the patch changes the size of a header or of a tensor."""
        return not self.patch.in_place

    @property
    def nbytes(self) -> int:
        """Total size of all files of the patched model in bytes."""
        return self.patch.nbytes

    @property
    def _staged_as(self) -> Path:
        return self.out if len(self.paths) == 1 else self.out.with_name(f"{self._stem(self.out)}.gguf")

    def _checker(self, *, every: bool) -> Checker:
        before = Before.read(self.patch.model, self.adapters, self.patch.dtype, every=every)
        return partial(check_patched, before=before)

    def _write(self, draft: Path, progress: Progress) -> None:
        for file, path in zip(self.patch.files, self.paths, strict=True):
            write_patched(file, draft.with_name(path.name), progress)

    def _changes(self) -> Changes:
        return changes_in_place(self.patch)

    @staticmethod
    def _stem(path: Path) -> str:
        return _SPLIT_SUFFIX.sub("", path.name.removesuffix(".gguf"))


def plan_gguf_patch(spec: PatchSpec) -> GgufPatchPlan:
    """Plan the patch of a GGUF model by reading the adapters, the headers of the model and a few of its token rows.

    Raises BadInput for an input that does not fit, NotExpressible if the model cannot be patched, and UsageError for
    options that contradict each other.
    """
    inputs = Inputs.open(spec)
    model = GgufModel.open(spec.base)
    dtype = spec.dtype.upper() if spec.dtype else base_dtype(model)
    recorded = recorded_provenance(model.metadata)
    note = inputs.note_on_adapters(model.path, recorded)
    patch = plan_rows(model, inputs.adapters, dtype, inputs.provenance(recorded))
    proof = inputs.prove(partial(prove_base, model))
    plan = GgufPatchPlan(spec, inputs, proof + note, patch)
    if not spec.in_place:
        read = inputs.paths | {file.path for file in model.files}
        for path in plan.paths:
            require_apart(path, read, hint=OVER_BASE)
    if plan.rewrites and len(patch.files) > 1:
        raise NotExpressible(
            f"patch --in-place: {spec.base}",
            "the patch changes the size of a header or tensor, which is not possible in place for a split GGUF",
            instead="use -o OUT to write a patched copy",
        )
    return plan
