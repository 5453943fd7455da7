"""Run an export: plan the artifacts, write and verify temporary files, and give the files their final names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from glob import escape
from pathlib import Path
from typing import Any

from exporter.errors import UsageError
from exporter.export.inputs import (
    merge_files,
    open_adapters,
    option_files,
    plan_located_merge,
    reference_of,
)
from exporter.export.spec import ExportPlan, ExportSpec
from exporter.formats.table import FORMATS, plan_target
from exporter.formats.target import Target, scratch_beside
from exporter.io.apart import require_apart
from exporter.io.staging import require_space, staged, write_file
from exporter.progress import Hooks
from exporter.sources.hf.checkpoint import Checkpoint
from exporter.sources.hub.locate import find_base
from exporter.verify.expect.reference import Reference
from exporter.verify.report import Report, document, require_passed, to_bytes
from exporter.verify.reports.write import JSON, write_report
from exporter.verify.request import require_verifiable
from exporter.verify.run import verify


def plan_export(spec: ExportSpec) -> ExportPlan:
    """Read the headers of all inputs and plan every artifact.

    If a format cannot represent the model, no error is raised, and the reason is recorded in the plan of the artifact.
    Raises BadInput if an input is missing or damaged, and MissingDependency if a runtime that ``--require`` names or a
    package for the report is not installed.
    """
    prompts = require_verifiable(spec.verify, needed_for="--require")
    adapters = open_adapters(spec.adapters, spec.merge, asked_by="ADAPTER", quiet=spec.quiet)
    base = find_base(spec.base, [adapter for _, adapter in adapters], quiet=spec.quiet)
    merge = plan_located_merge(base, Checkpoint.open(base.path), adapters, spec.merge)
    name = (adapters[0].source if adapters else base).name or "model"  # the name of the root folder is empty
    artifacts = [options for group in spec.formats for options in group.artifacts()]
    targets = [plan_target(options, merge, spec.merge.budget) for options in artifacts]
    if len(targets) > 1:
        targets = [replace(target, place=_named(FORMATS[target.format].place, name, target)) for target in targets]
    return ExportPlan(spec, merge, targets, spec.out or _default_out(name, targets), prompts)


def run_export(plan: ExportPlan, hooks: Hooks) -> list[Report]:
    """Write every artifact to a temporary path beside OUT, verify the written artifact, and rename the artifact to OUT.

    If a format cannot represent the model, NotExpressible is raised before any file is written. Raises OutputError,
    UnreadableFile or NotEquivalent if writing or verification fails. After any error, an existing OUT is unchanged.
    """
    for target in plan.targets:
        if target.refusal:
            raise target.refusal
    require_apart(plan.out, merge_files(plan.merge) | option_files(plan.spec.formats, plan.spec.verify))
    require_space(plan.out, plan.work_nbytes)
    report = plan.spec.verify.report
    if report and plan.out.resolve() in (folder := report.resolve(), *folder.parents):
        raise UsageError(f"--report {report}: expected a folder outside of OUT, because OUT is replaced as a whole")
    with staged(plan.out, force=plan.spec.force) as draft:
        paths = [draft / target.place if target.place else draft for target in plan.targets]
        with scratch_beside(draft) as scratch:
            for target, path in zip(plan.targets, paths, strict=True):
                path.parent.mkdir(parents=True, exist_ok=True)
                nbytes = target.work_nbytes or target.nbytes
                target.make(path, hooks.start(f"{target.format} {target.storage}", nbytes), scratch)
        paths = [written(path) for path in paths]
        reports = _verify(plan, paths, hooks)
        if reports:
            reports = _write_reports(plan, reports, draft, paths)
    return reports


def _write_reports(plan: ExportPlan, reports: list[Report], draft: Path, paths: list[Path]) -> list[Report]:
    """Write the reports to the folder given by --report, even if the verification failed.

    If OUT is a folder of several artifacts, the reports are also written into OUT. Returns the reports, with the final
    path of each artifact instead of its temporary path. In the report inside OUT, paths are relative to OUT, so that
    the folder can be moved and the bytes of the report do not depend on the location of OUT. Raises NotEquivalent.
    """
    folder = plan.spec.verify.report
    # The first part of a split artifact names the artifact.
    places = [plan.place(target).with_name(path.name) for target, path in zip(plan.targets, paths, strict=True)]
    named = [replace(report, artifact=place) for report, place in zip(reports, places, strict=True)]
    provenance: dict[str, Any] = {}
    if folder:
        from exporter.verify.reports.setting import setting  # this module lists installed packages, which takes time

        provenance = setting(_reference(plan), paths)
        write_report(folder, named, provenance)
    require_passed(named)
    if all(target.place for target in plan.targets):
        inside = [replace(report, artifact=report.artifact.relative_to(plan.out)) for report in named]
        if folder:
            write_report(draft, inside, provenance)
        else:
            write_file(draft / JSON, to_bytes(document(inside)))
    return named


def _verify(plan: ExportPlan, paths: list[Path], hooks: Hooks) -> list[Report]:
    """Return one report for each planned artifact, or no reports at the verification level ``off``."""
    options = plan.spec.verify
    if options.level == "off":
        return []
    reference = _reference(plan)
    return verify(paths, reference, level=options.level, prompts=plan.prompts, required=options.require, say=hooks.say)


def _reference(plan: ExportPlan) -> Reference:
    return reference_of(plan.merge, untie=plan.spec.merge.untie)


def written(path: Path) -> Path:
    """Return the path at which the artifact planned for ``path`` was written.

    A split GGUF is written as several numbered files; the result is then the path of the first file.
    """
    if path.exists():
        return path
    return next(iter(sorted(path.parent.glob(f"{escape(path.stem)}-00001-of-?????.gguf"))), path)


def _named(template: str, name: str, target: Target) -> str:
    place = Path(template.format(name=name, storage=target.storage))
    return str(place.with_name(target.prefix + place.name))


def _default_out(name: str, targets: Sequence[Target]) -> Path:
    """Return the default output path: a name in the current folder that is derived from ``name``."""
    if len(targets) > 1:
        return Path(f"{name}-export")
    return Path(_named(FORMATS[targets[0].format].file, name, targets[0]))
