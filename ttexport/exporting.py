"""The verbs ``merge``, ``export`` and ``plan`` as functions."""

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
    """One artifact on disk. path: a file, a folder, or the first part of a split GGUF.

    storage: dtype, quantisation or precisions. notes: properties of the model that the format cannot represent. report:
    None if the artifact was not verified.
    """

    format: str
    storage: str
    path: Path
    notes: Sequence[str]
    report: Report | None


@dataclass(frozen=True, kw_only=True)
class Exported:
    """The result of an export, with the artifacts at or below ``out``."""

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
    """Merge ``adapters`` into their base, write the formats in ``to``, and verify the artifacts on disk.

    adapters: PEFT adapters, given as paths or hub ids (org/name, org/name@revision). base: a path or hub id; None means
    the base named in the adapters. to: one or more formats, given as names (hf, gguf, gguf-lora, onnx) or as options,
    such as ``GgufOptions(types=("Q8_0",))``. out: a file or folder; two or more artifacts need a folder; None means a
    path in the current folder, named after the first adapter. verify: a level (off, rows, weights, full) or options.
    force: replace ``out``. hooks: progress callbacks.
    Raises UsageError, BadInput, NotExpressible, MissingDependency, OutputError and NotEquivalent. After an error,
    ``out`` is unchanged.
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
    """Write ``source``, a checkpoint or an adapter with its base, in other formats.

    The arguments and errors are described in ``merge``.
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
    """The plan of ``merge`` with the same arguments, made from headers alone. Without adapters, the plan of ``export``.

    If a format cannot represent the model, the target has a ``refusal``. Raises the errors that ``merge`` raises before
    writing.
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
