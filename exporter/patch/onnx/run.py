"""Patching a folder of ONNX models: folder and row adapters → proof of the base → patched folder → verification."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from exporter.errors import BadInput, UsageError
from exporter.io.apart import require_apart
from exporter.io.staging import require_space, staged
from exporter.patch.journal import patch_in_place
from exporter.patch.onnx.evidence import prove_base, recorded_provenance
from exporter.patch.onnx.plan import OnnxPatch, open_models, plan_rows, walk
from exporter.patch.onnx.write import changes_in_place, write_patched
from exporter.patch.spec import OVER_BASE, Inputs, PatchPlan, PatchSpec
from exporter.progress import Hooks
from exporter.verify.patched.onnx import Before, check_patched
from exporter.verify.report import Report


@dataclass(frozen=True)
class OnnxPatchPlan(PatchPlan):
    """The patch of a folder."""

    patch: OnnxPatch
    format: ClassVar[str] = "onnx"

    @property
    def out(self) -> Path:
        """The folder."""
        if self.spec.in_place:
            return self.spec.base
        return self.spec.out or Path(f"{self.spec.base.resolve().name}-patched")

    @property
    def targets(self) -> Sequence[Mapping[str, Any]]:
        """The folder."""
        kinds = dict.fromkeys(model.embedding.kind for model in self.patch.models)
        return [{"storage": "; ".join(kinds), "path": str(self.out), "nbytes": self.patch.nbytes}]

    @property
    def row_table(self) -> Sequence[Mapping[str, Any]]:
        """One entry a matrix of a model; rows go straight from what was trained to what is stored."""
        return [
            {
                "tensor": f"{model.file.path.relative_to(self.patch.folder).as_posix()}: {name}",
                "type": model.matrices[name].kind,
                "token_ids": list(ids),
                "dtype": None,
            }
            for model in self.patch.models
            for name, ids in self.patch.rows[model.file.path].items()
        ]

    @property
    def vocab(self) -> int:
        """Rows of every matrix."""
        return self.patch.vocab

    @property
    def new(self) -> Mapping[int, str]:
        """Tokens that the folder's tokenizer did not have."""
        return self.patch.new

    @property
    def moves_bytes(self) -> bool:
        """Whether the vocabulary grows: then weights behind it move."""
        return self.patch.moves_bytes

    def run(self, hooks: Hooks) -> Report | None:
        """Write a copy, or overwrite rows under a journal; then verify."""
        before = self._before()
        if self.in_place:
            changes = changes_in_place(self.patch)
            nbytes = sum(len(data) for pieces in changes.pieces.values() for _, data in pieces)
            reports: list[Report | None] = []
            patch_in_place(
                self.out,
                changes,
                lambda: reports.append(self._verified(self.out, before, every=False)),
                hooks.start("patching onnx", nbytes),
            )
            return reports[0]
        require_space(self.out, self.patch.nbytes)
        with staged(self.out, force=self.spec.force or self.rewrites) as draft:
            write_patched(self.patch, draft, hooks.start("onnx", self.patch.nbytes))
            return self._verified(draft, before, every=self.spec.level == "full")

    def _before(self) -> Before | None:
        if self.spec.level == "off":
            return None
        return Before.read(self.patch.folder, [model.file.path for model in self.patch.models], self.adapters)

    def _verified(self, folder: Path, before: Before | None, *, every: bool) -> Report | None:
        if before is None:
            return None
        facts: dict[str, float | str] = {"storage": self.targets[0]["storage"], "base": self.proof}
        checks = list(check_patched(folder, before, every=every))
        report = Report(artifact=self.out, format="onnx", level=self.spec.level, checks=checks, facts=facts)
        return self.conclude(report, folder)


def plan_onnx_patch(spec: PatchSpec) -> OnnxPatchPlan:
    """Read headers, graphs, adapters and some rows; decide. Raises BadInput, NotExpressible, UsageError."""
    if not spec.base.is_dir():
        raise UsageError(f"patch: expected the folder with all its models and tokenizer files, found {spec.base}")
    if spec.dtype is not None:
        raise UsageError("--dtype: rows go straight to what each ONNX model stores, so there is none to choose")
    inputs = Inputs.open(spec)
    models = open_models(spec.base)
    notes = [inputs.standing(one.file.path, recorded_provenance(one.file)) for one in models]
    patch = plan_rows(spec.base, models, inputs.adapters, inputs.provenance)
    proofs = dict.fromkeys(
        (prove_base(one.file, one.embedding, one.head, inputs.base) if inputs.base else "trusted") + note
        for one, note in zip(models, notes, strict=True)
    )
    plan = OnnxPatchPlan(spec, inputs, ", ".join(proofs), patch)
    if not spec.in_place:
        require_apart(plan.out, inputs.read, whole=[spec.base], hint=OVER_BASE)
    elif not plan.rewrites:
        _require_own_files(spec.base)
    return plan


def _require_own_files(folder: Path) -> None:
    """Raises BadInput for a link: the file behind it is not the folder's to change."""
    if (link := next((path for path in walk(folder) if path.is_symlink()), None)) is not None:
        raise BadInput(f"{link}: expected a file of the folder's own to patch in place, found a link; use -o")
