"""Runs the patch of an ONNX folder: proves that the models were made from the base, writes the result, and verifies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from exporter.errors import BadInput, UsageError
from exporter.io.apart import require_apart
from exporter.patch.evidence import prove_base, recorded_provenance
from exporter.patch.journal import Changes
from exporter.patch.onnx.plan import OnnxPatch, VocabModel, open_models, plan_rows, walk
from exporter.patch.onnx.write import changes_in_place, write_patched
from exporter.patch.plan import Checker, PatchPlan
from exporter.patch.spec import OVER_BASE, Inputs, PatchSpec
from exporter.progress import Progress
from exporter.sources.hf.checkpoint import Checkpoint
from exporter.verify.patched.onnx import Before, check_patched


@dataclass(frozen=True)
class OnnxPatchPlan(PatchPlan):
    """The planned patch of a folder of ONNX models."""

    patch: OnnxPatch
    format: ClassVar[str] = "onnx"

    @property
    def out(self) -> Path:
        """The patched folder."""
        if self.spec.in_place:
            return self.spec.base
        return self.spec.out or Path(f"{self.spec.base.resolve().name}-patched")

    @property
    def paths(self) -> Sequence[Path]:
        """The patched folder."""
        return [self.out]

    @property
    def storage(self) -> str:
        """Storage types of the embeddings of all ONNX models in the folder."""
        return "; ".join(dict.fromkeys(model.embedding.storage for model in self.patch.models))

    @property
    def targets(self) -> Sequence[Mapping[str, Any]]:
        """The patched folder."""
        return [{"storage": self.storage, "path": str(self.out), "nbytes": self.nbytes}]

    @property
    def row_table(self) -> Sequence[Mapping[str, Any]]:
        """One dict with the keys tensor, type, token_ids and dtype for each vocabulary matrix of each model.

        The value of ``dtype`` is always None, because rows are encoded directly from the trained values.
        """
        return [
            {
                "tensor": f"{model.file.path.relative_to(self.patch.folder).as_posix()}: {name}",
                "type": model.matrices[name].storage,
                "token_ids": list(token_ids),
                "dtype": None,
            }
            for model in self.patch.models
            for name, token_ids in self.patch.rows[model.file.path].items()
        ]

    @property
    def vocab(self) -> int:
        """Number of rows of every vocabulary matrix after patching."""
        return self.patch.vocab

    @property
    def new_tokens(self) -> Mapping[int, str]:
        """The tokens that the patch adds to the folder's tokenizer, as a dict from token id to text."""
        return self.patch.new_tokens

    @property
    def moves_bytes(self) -> bool:
        """Whether the patch moves weights: the vocabulary grows, or a vocabulary matrix is inside a model file."""
        return self.patch.moves_bytes

    @property
    def nbytes(self) -> int:
        """Total size of the patched folder in bytes."""
        return self.patch.nbytes

    def _checker(self, *, every: bool) -> Checker:
        paths = [model.file.path for model in self.patch.models]
        return partial(check_patched, before=Before.read(self.patch.folder, paths, self.adapters, every=every))

    def _write(self, draft: Path, progress: Progress) -> None:
        write_patched(self.patch, draft, progress)

    def _changes(self) -> Changes:
        return changes_in_place(self.patch)


def plan_onnx_patch(spec: PatchSpec) -> OnnxPatchPlan:
    """Plan the patch of an ONNX folder; the function reads the graphs, the adapters and some matrix rows of the models.

    Raises BadInput for an input that does not fit, NotExpressible if the models cannot be patched, and UsageError for
    options that contradict each other.
    """
    if not spec.base.is_dir():
        raise UsageError(f"patch: expected a folder with all ONNX models and tokenizer files, found {spec.base}")
    if spec.dtype is not None:
        raise UsageError(
            "--dtype does not apply to ONNX models, because rows are encoded directly from the trained values"
        )
    inputs = Inputs.open(spec)
    models = open_models(spec.base)
    notes = [inputs.note_on_adapters(model.file.path, recorded_provenance(model.file.metadata)) for model in models]
    patch = plan_rows(spec.base, models, inputs.adapters, inputs.provenance)
    proofs = [inputs.prove(partial(_prove, model)) + note for model, note in zip(models, notes, strict=True)]
    plan = OnnxPatchPlan(spec, inputs, ", ".join(dict.fromkeys(proofs)), patch)
    if not spec.in_place:
        require_apart(plan.out, inputs.paths, whole=[spec.base], hint=OVER_BASE)
    elif not plan.rewrites:
        _require_no_links(spec.base)
    return plan


def _prove(model: VocabModel, base: Checkpoint) -> str:
    head = None if model.head.name == model.embedding.name else model.head.rows
    return prove_base(model.file.path, model.file.metadata, base, model.embedding.rows, head)


def _require_no_links(folder: Path) -> None:
    """Raise BadInput if the folder contains a symbolic link.

    Patching through a symbolic link could change a file in the Hugging Face cache that other programs also use.
    """
    if (link := next((path for path in walk(folder) if path.is_symlink()), None)) is not None:
        raise BadInput(
            f"{link}: expected a regular file to patch in place, found a symbolic link; use -o OUT to write a copy"
        )
