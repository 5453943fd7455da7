"""The Python functions ``merge``, ``export`` and ``plan``."""

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

#: A format, given by name or by its options.
Format = str | FormatOptions


@dataclass(frozen=True, kw_only=True)
class ExportedArtifact:
    """An exported artifact on disk.

    path: path of the file, the folder, or the first part of a split GGUF file.

    storage: the artifact's dtype, quantisation type or ONNX precisions.
    notes: properties of the model that the format cannot represent.
    report: the verification report, or None if the artifact was not verified.
    """

    format: str
    storage: str
    path: Path
    notes: Sequence[str]
    report: Report | None


@dataclass(frozen=True, kw_only=True)
class Exported:
    """The result of an export: the output path ``out``, and the artifacts that the file or folder ``out`` contains."""

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
    """Merge ``adapters`` into their base, write the result in the formats ``to``, and verify the artifacts on disk.

    adapters: PEFT adapters, given as paths or hub ids (org/name, org/name@revision).
    base: the path or hub id of the base checkpoint, or None for the base that the adapters name.
    to: one or more formats, given as names, such as "onnx", or as options, such as ``GgufOptions(types=("Q8_0",))``.
    out: the file or folder to write (several artifacts need a folder), or None for a path in the current folder that is
    named after the first adapter.
    verify: a verification level (off, rows, weights, full) or verification options.
    force: whether to replace an existing ``out``.
    hooks: callbacks that report progress.
    Raises UsageError, BadInput, NotExpressible, MissingDependency, OutputError and NotEquivalent. After an error, an
    existing ``out`` is unchanged.
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
    """Write a checkpoint, or an adapter merged into its base, in other formats.

    source: path or hub id of the checkpoint or the adapter.

    For the other arguments and the errors, see the function ``merge``.
    """
    common: dict[str, Any] = {"to": to, "out": out, "options": options, "verify": verify, "force": force}
    if is_adapter(locate(str(source), asked_by="source").path):
        return _run(plan(source, base=base, **common), hooks)
    if base is not None:
        raise UsageError(f"base: remove this argument, because {source} is a checkpoint; only an adapter has a base")
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
    """Return the plan of the export that ``merge`` would run with the same arguments. Only file headers are read.

    Without ``adapters``, return the plan of the export of ``base``.

    If a format cannot represent the model, the attribute ``refusal`` of the artifact's plan contains the reason. Raises
    the errors that ``merge`` would raise before writing the first file.
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
