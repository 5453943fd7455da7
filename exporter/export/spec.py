"""The options of an export, and the plan that is made from the options."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from exporter.errors import UsageError
from exporter.formats.hf.options import HfOptions
from exporter.formats.target import FormatOptions, Target
from exporter.io.parallel import Budget
from exporter.merge.plan import MergePlan
from exporter.options import Options, ValueType, option
from exporter.verify.options import VerifyOptions


@dataclass(frozen=True, kw_only=True)
class MergeOptions(Options):
    """Options of the merge that apply to all formats.

    memory: limit, in bytes, for tensor data in memory.
    """

    untie: bool = option(False, "Store a tied LM head as a separate tensor.", type=ValueType.SWITCH)
    drop_unused_tokens: bool = option(
        False, "Leave out tokens of the tokenizer that have no embedding row and that no text of the model needs.",
        type=ValueType.SWITCH,
    )  # fmt: skip
    trust_base: bool = option(
        False, "Merge even if an adapter records that it was trained on a different base.", type=ValueType.SWITCH
    )
    via: str | None = option(
        None, "The tool that merges adapters that ttexport cannot merge itself, such as LoHa, OFT or VeRA.",
        choices=("peft",),
    )  # fmt: skip
    memory: int | None = option(
        None, "Memory limit for merged rows that are computed at once, such as 64MB. Default: 256MiB.",
        type=ValueType.SIZE, metavar="SIZE",
    )  # fmt: skip

    @property
    def budget(self) -> Budget:
        """Return the limit, in bytes, for tensor data in memory."""
        return Budget(self.memory) if self.memory else Budget()


@dataclass(frozen=True, kw_only=True)
class ExportSpec:
    """All options of an export, including the inputs, the formats and the output path.

    If ``adapters`` is empty, the checkpoint ``base`` is exported without a merge.
    adapters, base: paths or hub ids.
    formats: the option dataclass of each requested format.
    out: the file or folder to write, or None for a path in the current folder that is named after the first input.
    force: whether to replace an existing ``out``.
    quiet: whether to hide progress bars of downloads.

    Raises UsageError if a format is requested twice.
    """

    adapters: tuple[Path | str, ...] = ()
    base: str | None = None
    formats: tuple[FormatOptions, ...] = (HfOptions(),)
    out: Path | None = None
    merge: MergeOptions = field(default_factory=MergeOptions)
    verify: VerifyOptions = field(default_factory=VerifyOptions)
    force: bool = False
    quiet: bool = False

    def __post_init__(self) -> None:
        names = [options.section for options in self.formats]
        if len(set(names)) != len(names):
            raise UsageError(f"--to: expected each format once, found {', '.join(names)}")


@dataclass(frozen=True)
class ExportPlan:
    """The plan of an export, made before any output is written."""

    spec: ExportSpec
    merge: MergePlan
    targets: Sequence[Target]
    out: Path
    prompts: Sequence[str] = ()

    @property
    def nbytes(self) -> int:
        """Total size of all artifacts in bytes."""
        return sum(target.nbytes for target in self.targets)

    @property
    def work_nbytes(self) -> int:
        """Peak disk space, in bytes, needed to write the artifacts, including a temporary unquantised file."""
        temporary = [target.work_nbytes - target.nbytes for target in self.targets if target.work_nbytes]
        return self.nbytes + max(temporary, default=0)

    def place(self, target: Target) -> Path:
        """Return the final path of the planned artifact ``target``."""
        return self.out / target.place if target.place else self.out

    def to_json(self) -> dict[str, Any]:
        """Return the JSON document that ``ttexport plan --json`` prints."""
        return {
            "base": str(self.merge.checkpoint.path),
            "adapters": [str(adapter.path) for adapter in self.merge.adapters],
            "notes": [note for adapter in self.merge.adapters for note in adapter.notes],
            "origins": dict(self.merge.origins),
            "out": str(self.out),
            "vocab": self.merge.vocab,
            "warnings": list(self.merge.warnings),
            "targets": [
                {
                    "format": target.format,
                    "storage": target.storage,
                    "path": str(self.place(target)),
                    **target.to_json(),
                }
                for target in self.targets
            ],
            "ledger": [
                {"file": str(entry.path), "tensor": entry.key, "rule": entry.rule, "into": list(entry.into)}
                for entry in self.merge.ledger_entries
            ],
        }
