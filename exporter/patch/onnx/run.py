"""Patching a folder of ONNX models: folder and row adapters → proof of the base → patched folder → verification."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from exporter.errors import BadInput, UsageError
from exporter.io.apart import require_apart
from exporter.patch.journal import Changes
from exporter.patch.onnx.evidence import prove_base, recorded_provenance
from exporter.patch.onnx.plan import OnnxPatch, open_models, plan_rows, walk
from exporter.patch.onnx.write import changes_in_place, write_patched
from exporter.patch.plan import Checker, PatchPlan
from exporter.patch.spec import OVER_BASE, Inputs, PatchSpec
from exporter.progress import Progress
from exporter.verify.patched.onnx import Before, check_patched


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
    def paths(self) -> Sequence[Path]:
        """The folder."""
        return [self.out]

    @property
    def storage(self) -> str:
        """The storage of each model's embedding."""
        return "; ".join(dict.fromkeys(model.embedding.kind for model in self.patch.models))

    @property
    def targets(self) -> Sequence[Mapping[str, Any]]:
        """The folder."""
        return [{"storage": self.storage, "path": str(self.out), "nbytes": self.patch.nbytes}]

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

    @property
    def nbytes(self) -> int:
        """Of the patched folder."""
        return self.patch.nbytes

    def _checker(self, *, every: bool) -> Checker:
        paths = [model.file.path for model in self.patch.models]
        return partial(check_patched, before=Before.read(self.patch.folder, paths, self.adapters, every=every))

    def _write(self, draft: Path, progress: Progress) -> None:
        write_patched(self.patch, draft, progress)

    def _changes(self) -> Changes:
        return changes_in_place(self.patch)


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
        (prove_base(one.file, one.embedding, one.head, inputs.proving) if inputs.proving else "trusted") + note
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
