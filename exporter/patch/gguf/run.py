"""Patching a GGUF: base file and row adapters → proof of the base → patched model → verification."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Final

from exporter.errors import NotExpressible
from exporter.io.apart import require_apart
from exporter.io.staging import require_space, staged
from exporter.patch.gguf.evidence import base_dtype, prove_base, recorded_provenance
from exporter.patch.gguf.plan import GgufPatch, plan_rows
from exporter.patch.gguf.write import changes_in_place, write_patched
from exporter.patch.journal import patch_in_place
from exporter.patch.spec import OVER_BASE, Inputs, PatchPlan, PatchSpec
from exporter.progress import Hooks
from exporter.sources.gguf.split_files import GgufModel, split_file_name
from exporter.verify.patched.gguf import Before, check_patched
from exporter.verify.report import Report

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
    def targets(self) -> Sequence[Mapping[str, Any]]:
        """One a file."""
        return [
            {"storage": self.patch.kind, "path": str(path), "nbytes": file.nbytes}
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

    def run(self, hooks: Hooks) -> Report | None:
        """Write a copy, or overwrite rows under a journal; then verify."""
        before = None
        if self.spec.level != "off":
            before = Before.read(self.patch.parts, self.adapters, self.patch.dtype)
        if self.in_place:
            nbytes = sum(one.encoded.nbytes for file in self.patch.files for one in file.tensors)
            reports: list[Report | None] = []
            patch_in_place(
                self.out,
                changes_in_place(self.patch),
                lambda: reports.append(self._verified(self.out, before, base=None)),
                hooks.start(f"patching {self.patch.kind}", nbytes),
            )
            return reports[0]
        require_space(self.out, self.patch.nbytes)
        with staged(self.out, force=self.spec.force or self.rewrites) as draft:
            meter = hooks.start(f"gguf {self.patch.kind}", self.patch.nbytes)
            for file, path in zip(self.patch.files, self.paths, strict=True):
                write_patched(file, draft.with_name(path.name), meter)
            base = self.patch.parts if self.spec.level == "full" else None
            return self._verified(draft.with_name(self.paths[0].name), before, base=base)

    def _verified(self, path: Path, before: Before | None, *, base: GgufModel | None) -> Report | None:
        if before is None:
            return None
        checks = list(check_patched(path, before, base=base))
        facts: dict[str, float | str] = {"storage": self.patch.kind, "base": self.proof}
        report = Report(artifact=self.paths[0], format="gguf", level=self.spec.level, checks=checks, facts=facts)
        return self.conclude(report, path)

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
    proof = prove_base(parts, inputs.base) if inputs.base else "trusted"
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
