"""Patching a GGUF: base file and row adapters → proof of the base → patched model → verification."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, ClassVar, Final

from exporter.errors import NotExpressible
from exporter.io.apart import require_apart
from exporter.patch.gguf.evidence import base_dtype, prove_base, recorded_provenance
from exporter.patch.gguf.plan import GgufPatch, plan_rows
from exporter.patch.gguf.write import changes_in_place, write_patched
from exporter.patch.journal import Changes
from exporter.patch.plan import Checker, PatchPlan
from exporter.patch.spec import OVER_BASE, Inputs, PatchSpec
from exporter.progress import Progress
from exporter.sources.gguf.split_files import GgufModel, split_file_name
from exporter.verify.patched.gguf import Before, check_patched

_PART: Final = re.compile(r"-\d{5}-of-\d{5}$")


@dataclass(frozen=True)
class GgufPatchPlan(PatchPlan):
    """The patch of one GGUF model, of one file or several parts."""

    patch: GgufPatch

    format: ClassVar[str] = "gguf"

    @property
    def out(self) -> Path:
        """The first file."""
        if self.spec.in_place:
            return self.spec.base
        return self.spec.out or Path(f"{self._stem(self.spec.base)}-patched.gguf")

    @cached_property
    def paths(self) -> list[Path]:
        """Every file of the patched model, the first part first."""
        if self.spec.in_place:
            return [file.file.path for file in self.patch.files]
        count = len(self.patch.files)
        if count == 1:
            return [self.out]
        return [self.out.with_name(split_file_name(self._stem(self.out), number, count)) for number in range(count)]

    @property
    def storage(self) -> str:
        """The type of the embedding."""
        return self.patch.kind

    @property
    def targets(self) -> Sequence[Mapping[str, Any]]:
        """One a file."""
        return [
            {"storage": self.storage, "path": str(path), "nbytes": file.nbytes}
            for path, file in zip(self.paths, self.patch.files, strict=True)
        ]

    @property
    def row_table(self) -> Sequence[Mapping[str, Any]]:
        """One entry a tensor."""
        return [
            {
                "tensor": one.tensor.name,
                "type": one.tensor.type,
                "token_ids": list(one.token_ids),
                "dtype": self.patch.dtype,
            }
            for file in self.patch.files
            for one in file.tensors
        ]

    @property
    def vocab(self) -> int:
        """Rows of the embedding."""
        return self.patch.vocab

    @property
    def new(self) -> Mapping[int, str]:
        """Tokens that the file did not have."""
        return self.patch.new

    @property
    def moves_bytes(self) -> bool:
        """Whether a header or a tensor gets another size."""
        return not self.patch.in_place

    @property
    def nbytes(self) -> int:
        """Of all files together."""
        return self.patch.nbytes

    def _checker(self, *, every: bool) -> Checker:
        before = Before.read(self.patch.parts, self.adapters, self.patch.dtype, every=every)
        return partial(check_patched, before=before)

    def _write(self, draft: Path, progress: Progress) -> None:
        for file, path in zip(self.patch.files, self.paths, strict=True):
            write_patched(file, draft.with_name(path.name), progress)

    def _changes(self) -> Changes:
        return changes_in_place(self.patch)

    @staticmethod
    def _stem(path: Path) -> str:
        return _PART.sub("", path.name.removesuffix(".gguf"))


def plan_gguf_patch(spec: PatchSpec) -> GgufPatchPlan:
    """Read headers, adapters and some rows; decide. Raises BadInput, NotExpressible, UsageError."""
    inputs = Inputs.open(spec)
    parts = GgufModel.open(spec.base)
    dtype = spec.dtype.upper() if spec.dtype else base_dtype(parts)
    recorded = recorded_provenance(parts)
    note = inputs.standing(parts.path, recorded)
    patch = plan_rows(parts, inputs.adapters, dtype, inputs.provenance(recorded))
    proof = prove_base(parts, inputs.proving) if inputs.proving else "trusted"
    plan = GgufPatchPlan(spec, inputs, proof + note, patch)
    if not spec.in_place:
        read = plan.inputs.read | {file.file.path for file in patch.files}
        for path in plan.paths:
            require_apart(path, read, hint=OVER_BASE)
    if plan.rewrites and len(patch.files) > 1:
        raise NotExpressible(
            f"patch --in-place: {spec.base}",
            "a header or tensor changes size, and the parts of a split model cannot all be replaced in one moment",
            instead="-o writes a patched copy",
        )
    return plan
