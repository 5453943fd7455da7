"""``merge``, ``export`` and ``plan`` as functions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exporter.errors import UsageError
from exporter.export.run import plan_export, run_export, written
from exporter.export.spec import ExportPlan, ExportSpec, MergeOptions
from exporter.formats.table import FORMATS
from exporter.formats.target import FormatOptions
from exporter.progress import Hooks
from exporter.sources.hub.locate import is_adapter, locate
from exporter.verify.options import VerifyOptions
from exporter.verify.report import Report

#: A format by name, or its options.
Format = str | FormatOptions


@dataclass(frozen=True, kw_only=True)
class ExportedArtifact:
    """One artifact on disk. path: a file or folder; of a split GGUF its first part.

    storage: dtype, quantisation or precisions. notes: what the format cannot represent. report: None if it was not
    verified.
    """

    format: str
    storage: str
    path: Path
    notes: Sequence[str]
    report: Report | None


@dataclass(frozen=True, kw_only=True)
class Exported:
    """What an export left: artifacts at or below ``out``."""

    out: Path
    artifacts: Sequence[ExportedArtifact]


def merge(
    *adapters: str | Path,
    base: str | Path | None = None,
    to: Format | Iterable[Format] = "hf",
    out: str | Path | None = None,
    options: MergeOptions | None = None,
    verify: str | VerifyOptions = "rows",
    force: bool = False,
    hooks: Hooks | None = None,
) -> Exported:
    """Merge ``adapters`` into their base, write the formats of ``to``, verify what lies on disk.

    adapters: PEFT adapters, paths or hub ids (org/name, org/name@revision). base: the same; None: what the adapters
    name. to: names (hf, gguf, gguf-lora, onnx) or options, such as ``GgufOptions(types=("Q8_0",))``; one or several.
    out: a file or folder, a folder for several artifacts; None: in the current folder, named after the first adapter.
    verify: a level (off, rows, weights, full) or options. force: replace ``out``. hooks: progress callbacks.
    Raises UsageError, BadInput, NotExpressible, MissingDependency, OutputError, and NotEquivalent, after which ``out``
    is as it was before.
    """
    made = plan(*adapters, base=base, to=to, out=out, options=options, verify=verify, force=force)
    return _run(made, hooks)


def export(
    source: str | Path,
    *,
    base: str | Path | None = None,
    to: Format | Iterable[Format] = "hf",
    out: str | Path | None = None,
    options: MergeOptions | None = None,
    verify: str | VerifyOptions = "rows",
    force: bool = False,
    hooks: Hooks | None = None,
) -> Exported:
    """Write ``source``, a checkpoint or an adapter on its base, in other formats. Arguments and errors: ``merge``'s."""
    common: dict[str, Any] = {"to": to, "out": out, "options": options, "verify": verify, "force": force}
    if is_adapter(locate(str(source), asked_by="source").path):
        return _run(plan(source, base=base, **common), hooks)
    if base is not None:
        raise UsageError(f"base: is for adapters, and {source} is a checkpoint")
    return _run(plan(base=source, **common), hooks)


def plan(
    *adapters: str | Path,
    base: str | Path | None = None,
    to: Format | Iterable[Format] = "hf",
    out: str | Path | None = None,
    options: MergeOptions | None = None,
    verify: str | VerifyOptions = "rows",
    force: bool = False,
) -> ExportPlan:
    """What ``merge`` would write with the same arguments, from headers alone; without adapters, what ``export`` would.

    A format that cannot hold the model is the ``refusal`` of its target. Raises what ``merge`` raises before it writes.
    """
    return plan_export(
        ExportSpec(
            adapters=tuple(map(str, adapters)),
            base=None if base is None else str(base),
            formats=_formats(to),
            out=None if out is None else Path(out),
            merge=options or MergeOptions(),
            verify=VerifyOptions(level=verify) if isinstance(verify, str) else verify,
            force=force,
            quiet=True,
        )
    )


def _run(made: ExportPlan, hooks: Hooks | None) -> Exported:
    reports: Sequence[Report | None] = run_export(made, hooks or Hooks()) or [None] * len(made.targets)
    artifacts = [
        ExportedArtifact(
            format=target.format,
            storage=target.storage,
            path=report.artifact if report else written(made.place(target)),
            notes=target.notes,
            report=report,
        )
        for target, report in zip(made.targets, reports, strict=True)
    ]
    return Exported(out=made.out, artifacts=artifacts)


def _formats(to: Format | Iterable[Format]) -> tuple[FormatOptions, ...]:
    chosen = [to] if isinstance(to, str | FormatOptions) else list(to)
    for name in chosen:
        if isinstance(name, str) and name not in FORMATS:
            raise UsageError(f"to: expected {', '.join(FORMATS)}, found {name!r:.80}")
    return tuple(FORMATS[name].options() if isinstance(name, str) else name for name in chosen)
