"""What a patch will do, whatever the format of its base, and how it is done: write, verify, then promote."""

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

#: The checks of the patched model at a path.
Checker = Callable[[Path], Iterator[Check]]


@dataclass(frozen=True)
class PatchPlan(ABC):
    """Everything that is known before a byte is written. proof: how the base proved to be made from its checkpoint."""

    spec: PatchSpec
    inputs: Inputs
    proof: str
    format: ClassVar[str]

    @property
    def adapters(self) -> Sequence[Adapter]:
        """The adapters in the order of the command."""
        return self.inputs.adapters

    @property
    @abstractmethod
    def out(self) -> Path:
        """The file or folder that names the patched model."""

    @property
    @abstractmethod
    def paths(self) -> Sequence[Path]:
        """``out``, and further files of a split model, the first part first."""

    @property
    @abstractmethod
    def storage(self) -> str:
        """The type of the embedding."""

    @property
    @abstractmethod
    def targets(self) -> Sequence[Mapping[str, Any]]:
        """What will be written: storage, path and nbytes of each artifact."""

    @property
    @abstractmethod
    def row_table(self) -> Sequence[Mapping[str, Any]]:
        """Which rows of which tensors: tensor, type, token_ids, dtype."""

    @property
    @abstractmethod
    def vocab(self) -> int:
        """Rows of the vocabulary after patching."""

    @property
    @abstractmethod
    def new(self) -> Mapping[int, str]:
        """Texts by id of the tokens that are new to the base."""

    @property
    @abstractmethod
    def moves_bytes(self) -> bool:
        """Whether what stays would lie elsewhere: then a patch in place gives a whole new artifact the old name."""

    @property
    def rewrites(self) -> bool:
        """In place, but bytes would move."""
        return self.spec.in_place and self.moves_bytes

    @property
    def in_place(self) -> bool:
        """Whether the base's own bytes are overwritten."""
        return self.spec.in_place and not self.moves_bytes

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Size of the patched model."""

    def run(self, hooks: Hooks) -> Report | None:
        """Write a copy, or overwrite rows under a journal; then verify. None where nothing was to be verified.

        Raises NotEquivalent, OutputError; the base then is as it was, and nothing new has its final name.
        """
        level = self.spec.level
        # Reads the base first: a patch in place leaves none to compare with.
        check = None if level == "off" else self._checker(every=level != "rows")
        if self.in_place:
            return self._run_in_place(check, hooks)
        require_space(self.out, self.nbytes)
        with staged(self.out, force=self.spec.force or self.rewrites) as draft:
            self._write(draft, hooks.start(f"{self.format} {self.storage}", self.nbytes))
            return self._verified(draft.with_name(self.paths[0].name), check, hooks) if check else None

    @abstractmethod
    def _checker(self, *, every: bool) -> Checker:
        """The checks of the patched model. Reads what they need of the base: all its bytes, or some of every tensor."""

    @abstractmethod
    def _write(self, draft: Path, progress: Progress) -> None:
        """Write the patched model to ``draft``, and further parts beside it under their final names."""

    @abstractmethod
    def _changes(self) -> Changes:
        """What a patch in place overwrites."""

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
        """The report about the patched model at ``path``, also written for ``--report``. Raises NotEquivalent."""
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
        """``report`` joined with that of a verification against the unmerged reference, which runs both."""
        from exporter.verify.run import verify  # the runtimes: only this level waits for their modules

        if not report.passed:
            return replace(report, skipped=[Skip("run", "the checks against the base failed before it")])
        [run] = verify([path], self._reference(), level="full", say=hooks.say)
        # Both have checks of the tokenizer files and special ids.
        checks = [replace(one, name=f"patch: {one.name}") for one in report.checks]
        return replace(
            run, artifact=report.artifact, checks=[*checks, *run.checks], facts={**report.facts, **run.facts}
        )

    def _reference(self) -> Reference:
        """Opened again: the checks have their own view of an adapter, whatever the patch made of it."""
        base = self.inputs.base
        assert base is not None, "the specification refuses what needs a base and has none"
        return Reference.open(base.path, [adapter.path for adapter in self.adapters])


def patch_json(plan: PatchPlan) -> dict[str, Any]:
    """What ``plan`` prints as JSON for a patch."""
    return {
        "base": str(plan.spec.base),
        "adapters": [str(adapter.path) for adapter in plan.adapters],
        "proof": plan.proof,
        "out": str(plan.out),
        "vocab": plan.vocab,
        "new_tokens": {str(token_id): text for token_id, text in plan.new.items()},
        "in_place": plan.in_place,
        "targets": [
            {"format": plan.format, **target, "expressible": True, "reason": None, "notes": []}
            for target in plan.targets
        ],
        "rows": list(plan.row_table),
    }
