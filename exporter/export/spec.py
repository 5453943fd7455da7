"""What an export is asked for, and what is known of it before a byte is written."""

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
    """Options of the merge itself, which all formats share. memory: bytes."""

    untie: bool = option(False, "Give a tied head a tensor of its own.", type=ValueType.SWITCH)
    memory: int | None = option(
        None, "Merged rows held at once while they are computed, such as 64MB; default: 256MiB.", type=ValueType.SIZE,
        metavar="SIZE",
    )  # fmt: skip

    @property
    def budget(self) -> Budget:
        """The bytes of tensor data that may be in flight at once."""
        return Budget(self.memory) if self.memory else Budget()


@dataclass(frozen=True, kw_only=True)
class ExportSpec:
    """One export. ``adapters`` empty: the checkpoint ``base`` itself is exported.

    Adapters and base are paths or hub ids. formats: one group of options for each format. out: a file or folder; None:
    in the current folder, named after the first input. force: replace ``out``. quiet: no bars during downloads.
    Raises UsageError for a format that is named twice.
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
    """Everything that is known before a byte of output exists."""

    spec: ExportSpec
    merge: MergePlan
    targets: Sequence[Target]
    out: Path
    prompts: Sequence[str] = ()

    @property
    def nbytes(self) -> int:
        """Bytes of all artifacts."""
        return sum(target.nbytes for target in self.targets)

    @property
    def work_nbytes(self) -> int:
        """Bytes on the disk at once while the artifacts are written: an unquantised file may be needed on the way."""
        more = [target.work_nbytes - target.nbytes for target in self.targets if target.work_nbytes]
        return self.nbytes + max(more, default=0)

    def place(self, target: Target) -> Path:
        """Where the artifact of ``target`` lies in the end."""
        return self.out / target.place if target.place else self.out

    def to_json(self) -> dict[str, Any]:
        """What ``ttexport plan --json`` prints."""
        return {
            "base": str(self.merge.checkpoint.path),
            "adapters": [str(adapter.path) for adapter in self.merge.adapters],
            "origins": dict(self.merge.origins),
            "out": str(self.out),
            "vocab": self.merge.vocab,
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
