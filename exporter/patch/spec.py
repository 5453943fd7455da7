"""What a patch is asked for and what is known of it before it is done, whatever the format of its base."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Final

from exporter.errors import BadInput, UsageError
from exporter.merge.vocabulary.whole_embedding import as_rows
from exporter.progress import Hooks
from exporter.sources.hf.checkpoint import Checkpoint
from exporter.sources.hub.locate import ADAPTERS_DIGEST, PREFIX, Located, locate, origins_after
from exporter.sources.peft.adapter import NO_ADAPTERS_DIGEST, Adapter, combined_digest
from exporter.verify.expect.reference import Reference
from exporter.verify.report import Report, require_passed
from exporter.verify.reports.setting import setting, setting_without_base
from exporter.verify.reports.write import write_report

#: Ends the refusal of an OUT that is an input.
OVER_BASE: Final = "--in-place changes the base itself"
_DIGEST: Final = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True, kw_only=True)
class PatchSpec:
    """What the user asked for. ``checkpoint``: what the base was made from, to prove it. ``dtype``: as in a merge.

    base: a .gguf file, or a folder with ONNX models. level: "rows" compares the new rows and some of every tensor,
    "full" every byte, "off" nothing.
    """

    base: Path
    adapters: tuple[str, ...]
    out: Path | None = None
    in_place: bool = False
    checkpoint: str | None = None
    trust_base: bool = False
    dtype: str | None = None
    level: str = "rows"
    force: bool = False
    quiet: bool = False
    report: Path | None = None

    def __post_init__(self) -> None:
        if self.report and self.level == "off":
            raise UsageError("--report: expected something to report, found --verify off")
        if self.in_place and self.out is not None:
            raise UsageError(f"--in-place: changes {self.base} itself, so there is no -o {self.out}")
        if self.trust_base and self.checkpoint:
            raise UsageError("--trust-base: goes on without a proof, so there is no --base to compare with")
        if not self.adapters:
            raise UsageError("patch: expected an adapter behind the base, found none")


@dataclass(frozen=True)
class Inputs:
    """The adapters, opened, and the base checkpoint; None where the base is trusted. Both with where they come from.

    With a base, an adapter's copy of the resized embedding is not among its parts, but the rows that it adds are.
    """

    adapters: Sequence[Adapter]
    located: Sequence[Located]
    base: Checkpoint | None
    base_located: Located | None

    @classmethod
    def open(cls, spec: PatchSpec) -> Inputs:
        """Read headers, and a whole embedding beside an adapter's rows, to take it for the rows that it adds.

        Raises BadInput, NotExpressible.
        """
        located = [locate(word, asked_by="ADAPTER", content="adapter", quiet=spec.quiet) for word in spec.adapters]
        adapters = [Adapter.open(one.path) for one in located]
        base = None if spec.trust_base else _locate_base(spec, adapters)
        checkpoint = Checkpoint.open(base.path) if base else None
        if checkpoint is not None:
            adapters = as_rows(checkpoint, adapters)
        return cls(adapters, located, checkpoint, base)

    def provenance(self, recorded: Mapping[str, str]) -> dict[str, str]:
        """What the patched artifact says of its origins. recorded: what the base artifact, in good standing, says.

        An artifact of another tool or of an older version has no place for the adapters' digest, and gets none.
        """
        told = origins_after(recorded, self.base_located, self.located)
        if (before := recorded.get(ADAPTERS_DIGEST)) is not None and before != self._tuned:
            told[ADAPTERS_DIGEST] = combined_digest(before, self.adapters)
        return told

    def standing(self, path: Path, recorded: Mapping[str, str]) -> str:
        """What to say of adapters whose rows are in the artifact already. path: of the file, for the message.

        Raises BadInput for others than these, whose rows would stay beside the new ones, unless the base is trusted;
        and for what is no digest.
        """
        before = recorded.get(ADAPTERS_DIGEST, NO_ADAPTERS_DIGEST)
        if not _DIGEST.fullmatch(before):
            raise BadInput(f"{path}: {PREFIX}{ADAPTERS_DIGEST}: expected 64 hexadecimal digits, found {before!r:.80}")
        if before == NO_ADAPTERS_DIGEST:
            return ""
        if before == self._tuned:
            return ", patched with the same before"
        if self.base is not None:
            raise BadInput(
                f"{path}: {PREFIX}{ADAPTERS_DIGEST}: expected an artifact of the base alone, or with these adapters in "
                f"it, found {before[:12]}, other adapters, whose rows would stay; patch the base's own artifact "
                "(--trust-base puts the rows beside theirs)"
            )
        return ", beside the rows of other adapters"

    @cached_property
    def _tuned(self) -> str:
        """The digest of the base with these adapters."""
        return combined_digest(NO_ADAPTERS_DIGEST, self.adapters)

    @property
    def read(self) -> set[Path]:
        """The adapters' folders and weight files."""
        return {path for adapter in self.adapters for path in (adapter.path, adapter.weights)}


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

    @abstractmethod
    def run(self, hooks: Hooks) -> Report | None:
        """Write, verify and promote. Raises NotEquivalent; the base then is as it was."""

    def conclude(self, report: Report, path: Path) -> Report:
        """Write what ``--report`` asks for about the artifact at ``path``, passed or not. Raises NotEquivalent."""
        if folder := self.spec.report:
            base = self.inputs.base
            if base:
                where = setting(Reference(base, self.adapters), [path])
            else:
                where = setting_without_base(self.spec.base.name, self.adapters, [path])
            write_report(folder, [report], where)
        require_passed([report])
        return report


def _locate_base(spec: PatchSpec, adapters: Sequence[Adapter]) -> Located:
    """The base to prove the artifact by: ``--base``, else the folder that the adapters name, if it is here."""
    if spec.checkpoint is not None:
        return locate(spec.checkpoint, asked_by="--base", content="checkpoint", quiet=spec.quiet)
    named = {adapter.base_name for adapter in adapters}
    name = named.pop() if len(named) == 1 else None
    if name is None or not Path(name).is_dir():
        found = f"{name!r}, which is no folder here" if name else "no one folder that the adapters name"
        raise BadInput(
            f"{spec.base}: expected --base CHECKPOINT to prove that the file was made from the adapters' base, found "
            f"{found}; --trust-base goes on without a proof"
        )
    return Located(Path(name))


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
