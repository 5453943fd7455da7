"""Plans a patch of an artifact in any format, and runs the plan: writes, verifies and renames the new artifact."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from exporter.io.staging import require_space, staged
from exporter.patch.journal import Changes, linked, patch_in_place
from exporter.patch.spec import Inputs, PatchSpec
from exporter.progress import Hooks, Progress
from exporter.sources.peft.adapter import Adapter
from exporter.verify.expect.reference import Reference
from exporter.verify.report import Check, Report, Skip, require_passed
from exporter.verify.reports.setting import setting, setting_without_base
from exporter.verify.reports.write import write_report

#: Function that returns the checks of the patched model at a path.
Checker = Callable[[Path], Iterator[Check]]


@dataclass(frozen=True)
class PatchPlan(ABC):
    """The plan of a patch, which is complete before any byte is written. Each artifact format has its own subclass.

    proof: description of the proof that the base artifact was made from its checkpoint.
    """

    spec: PatchSpec
    inputs: Inputs
    proof: str
    format: ClassVar[str]

    @property
    def adapters(self) -> Sequence[Adapter]:
        """The adapters in the order given on the command line."""
        return self.inputs.adapters

    @property
    @abstractmethod
    def out(self) -> Path:
        """Path of the patched model: the folder, the file, or the first part of a split GGUF."""

    @property
    @abstractmethod
    def paths(self) -> Sequence[Path]:
        """Paths of the files to write: ``out`` and, for a split GGUF, the paths of the other parts in order."""

    @property
    @abstractmethod
    def storage(self) -> str:
        """The dtype or quantisation with which the artifact stores the embedding."""

    @property
    @abstractmethod
    def targets(self) -> Sequence[Mapping[str, Any]]:
        """One dict with the keys storage, path and nbytes for each file or folder to write."""

    @property
    @abstractmethod
    def row_table(self) -> Sequence[Mapping[str, Any]]:
        """One dict with the keys tensor, type, token_ids and dtype for each tensor with replaced rows."""

    @property
    @abstractmethod
    def vocab(self) -> int:
        """Number of rows of the embedding after patching."""

    @property
    @abstractmethod
    def new_tokens(self) -> Mapping[int, str]:
        """The tokens that the patch adds to the base, as a dict from token id to text."""

    @property
    @abstractmethod
    def moves_bytes(self) -> bool:
        """Whether the patch moves unchanged bytes of the artifact to new offsets.

        If bytes move, ``--in-place`` writes a whole new artifact and then replaces the old artifact.
        """

    @property
    def rewrites(self) -> bool:
        """Whether ``--in-place`` was requested, but the whole artifact is rewritten because unchanged bytes move."""
        return self.spec.in_place and self.moves_bytes

    @property
    def in_place(self) -> bool:
        """Whether the patch overwrites bytes inside the base artifact instead of writing a copy."""
        return self.spec.in_place and not self.moves_bytes

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Total size of the patched model in bytes."""

    def run(self, hooks: Hooks) -> Report | None:
        """Write a patched copy or overwrite bytes in place, then verify the patched model.

        Returns the verification report, or None if the verification level is off.

        Raises NotEquivalent if verification fails, and OutputError if a write fails. After an error, the base is
        unchanged, and no patched copy exists under the path ``out``.
        """
        level = self.spec.level
        # The base is read before the patch, because an in-place patch overwrites the base.
        check = None if level == "off" else self._checker(every=level != "rows")
        if self.in_place:
            return self._run_in_place(check, hooks)
        require_space(self.out, self.nbytes)
        with staged(self._staged_as, force=self.spec.force or self.rewrites) as draft:
            self._write(draft, hooks.start(f"{self.format} {self.storage}", self.nbytes))
            return self._verified(draft.with_name(self.paths[0].name), check, hooks) if check else None

    @property
    def _staged_as(self) -> Path:
        """Path that names the staging folder: ``out`` or, for a split GGUF, a path that no part of the model has."""
        return self.out

    @abstractmethod
    def _checker(self, *, every: bool) -> Checker:
        """Read the base artifact before the patch, and return a function that compares a patched model with the base.

        every: whether to compare every byte of each tensor instead of only some rows.
        """

    @abstractmethod
    def _write(self, draft: Path, progress: Progress) -> None:
        """Write the patched model to the temporary path ``draft``.

        If the model is a split GGUF, all parts are written to the folder of ``draft`` under their final names.
        """

    @abstractmethod
    def _changes(self) -> Changes:
        """Return the changes that an in-place patch makes to the model's files."""

    def _run_in_place(self, check: Checker | None, hooks: Hooks) -> Report | None:
        changes, reports = self._changes(), []
        nbytes = sum(len(data) for pieces in changes.pieces.values() for _, data in pieces)

        def verify() -> None:
            if check:
                with linked(self.paths) as path:
                    reports.append(self._verified(path, check, hooks))

        patch_in_place(self.out, changes, verify, hooks.start(f"patching {self.format} {self.storage}", nbytes))
        return reports[0] if reports else None

    def _verified(self, path: Path, check: Checker, hooks: Hooks) -> Report:
        """Verify the patched model at ``path``, and return the verification report.

        The verification report is also written to the folder given by ``--report``.

        Raises NotEquivalent if a check fails.
        """
        level, facts = self.spec.level, {"storage": self.storage, "base": self.proof}
        report = Report(artifact=self.paths[0], format=self.format, level=level, checks=list(check(path)), facts=facts)
        if level == "full":
            report = self._with_run(report, path, hooks)
        if folder := self.spec.report:
            if self.inputs.base:
                where = setting(self._reference(), [path])
            else:
                where = setting_without_base(self.spec.base.name, self.adapters, [path])
            write_report(folder, [report], where)
        require_passed([report])
        return report

    def _with_run(self, report: Report, path: Path, hooks: Hooks) -> Report:
        """Compare the outputs of the patched model with the outputs of the base plus unmerged adapters."""
        from exporter.verify.run import verify  # imported here, because only level full needs a runtime

        if not report.passed:
            reason = "the patched model is not run, because a check of its file failed"
            return replace(report, skipped=[Skip("run", reason)])
        [run] = verify([path], self._reference(), level="full", say=hooks.say)
        # Both reports contain checks of tokenizer files and special ids. The prefix makes the names of the checks
        # distinct.
        checks = [replace(check, name=f"patch: {check.name}") for check in report.checks]
        return replace(
            run, artifact=report.artifact, checks=[*checks, *run.checks], facts={**report.facts, **run.facts}
        )

    def _reference(self) -> Reference:
        """Open the base and the adapters again, so that verification does not reuse data that the patch has read."""
        base = self.inputs.base
        assert base is not None, "verification at level full requires a base checkpoint"
        return Reference.open(base.path, [adapter.path for adapter in self.adapters])


def patch_json(plan: PatchPlan) -> dict[str, Any]:
    """Return the JSON object that ``ttexport plan`` prints for a patch."""
    return {
        "base": str(plan.spec.base),
        "adapters": [str(adapter.path) for adapter in plan.adapters],
        "notes": [note for adapter in plan.adapters for note in adapter.notes],
        "proof": plan.proof,
        "out": str(plan.out),
        "vocab": plan.vocab,
        "new_tokens": {str(token_id): text for token_id, text in plan.new_tokens.items()},
        "in_place": plan.in_place,
        "targets": [
            {"format": plan.format, **target, "expressible": True, "reason": None, "notes": []}
            for target in plan.targets
        ],
        "rows": list(plan.row_table),
    }
