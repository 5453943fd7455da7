"""Run one export: read, plan, stage, verify, publish."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from glob import escape
from pathlib import Path
from typing import Any

from exporter.errors import UsageError
from exporter.export.spec import ExportPlan, ExportSpec
from exporter.formats.table import FORMATS, plan_target
from exporter.formats.target import Target, scratch_beside
from exporter.io.apart import require_apart
from exporter.io.staging import require_space, staged, write_file
from exporter.merge.plan import plan_merge
from exporter.progress import Hooks
from exporter.sources.hf.checkpoint import Checkpoint
from exporter.sources.hub.locate import find_base, locate, origins
from exporter.sources.peft.adapter import Adapter
from exporter.verify.expect.reference import Reference
from exporter.verify.report import Report, document, require_passed, to_bytes
from exporter.verify.reports.write import JSON, require_renderers, write_report
from exporter.verify.run import verify
from exporter.verify.running.prompts import read_prompts
from exporter.verify.runtimes.installed import require


def plan_export(spec: ExportSpec) -> ExportPlan:
    """Read headers and decide. A format that cannot hold the model is a refusal in its target, not an error.

    Raises MissingDependency for a required runtime or a package that the report needs, BadInput.
    """
    require(spec.verify.require, needed_for="--require")
    if spec.verify.report:
        require_renderers()
    located = [locate(str(source), asked_by="ADAPTER", content="adapter", quiet=spec.quiet) for source in spec.adapters]
    adapters = [Adapter.open(adapter.path) for adapter in located]
    base = find_base(spec.base, adapters, quiet=spec.quiet)
    merge = plan_merge(Checkpoint.open(base.path), adapters, untie=spec.merge.untie)
    merge = replace(merge, origins=origins(base, located))
    name = (located or [base])[0].name or "model"  # what the user calls it; the root folder has no name
    prompts = read_prompts(spec.verify.prompts) if spec.verify.prompts else ()
    artifacts = [options for group in spec.formats for options in group.artifacts()]
    targets = [plan_target(options, merge, spec.merge.budget) for options in artifacts]
    if len(targets) > 1:
        targets = [replace(target, place=_named(FORMATS[target.format].place, name, target)) for target in targets]
    return ExportPlan(spec, merge, targets, spec.out or _default_out(name, targets), prompts)


def run_export(plan: ExportPlan, hooks: Hooks) -> list[Report]:
    """Write every target beside OUT, verify what lies on disk, then give it its name.

    Raises NotExpressible (before anything is written), OutputError, UnreadableFile, or NotEquivalent, after which
    OUT is as it was before.
    """
    for target in plan.targets:
        if target.refusal:
            raise target.refusal
    require_apart(plan.out, _inputs(plan))
    require_space(plan.out, plan.work_nbytes)
    report = plan.spec.verify.report
    if report and plan.out.resolve() in (folder := report.resolve(), *folder.parents):
        raise UsageError(f"--report {report}: expected a folder outside of OUT, which is made whole or not at all")
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
    """Write the reports to --report, passed or not, and into OUT where it is a folder of several artifacts.

    Returns them under the final names. Raises NotEquivalent. The report inside OUT names artifacts relative to it:
    the folder may move, and its bytes must not depend on where it was made.
    """
    folder = plan.spec.verify.report
    # A split artifact goes by the name of its first part.
    places = [plan.place(target).with_name(path.name) for target, path in zip(plan.targets, paths, strict=True)]
    named = [replace(report, artifact=place) for report, place in zip(reports, places, strict=True)]
    where: dict[str, Any] = {}
    if folder:
        from exporter.verify.reports.setting import setting  # reads what is installed: only a report waits for it

        where = setting(_reference(plan), paths)
        write_report(folder, named, where)
    require_passed(named)
    if all(target.place for target in plan.targets):
        inside = [replace(report, artifact=report.artifact.relative_to(plan.out)) for report in named]
        if folder:
            write_report(draft, inside, where)
        else:
            write_file(draft / JSON, to_bytes(document(inside)))
    return named


def _verify(plan: ExportPlan, paths: list[Path], hooks: Hooks) -> list[Report]:
    """One report a target; none without verification."""
    wanted = plan.spec.verify
    if wanted.level == "off":
        return []
    reference = _reference(plan)
    return verify(paths, reference, level=wanted.level, prompts=plan.prompts, required=wanted.require, say=hooks.say)


def _reference(plan: ExportPlan) -> Reference:
    merge = plan.merge
    adapters = [adapter.path for adapter in merge.adapters]
    return Reference.open(merge.checkpoint.path, adapters, untie=plan.spec.merge.untie)


def written(path: Path) -> Path:
    """The artifact planned for ``path``: its first part, if it was split."""
    if path.exists():
        return path
    return next(iter(sorted(path.parent.glob(f"{escape(path.stem)}-00001-of-?????.gguf"))), path)


def _named(template: str, name: str, target: Target) -> str:
    return template.format(name=name, storage=target.storage)


def _default_out(name: str, targets: Sequence[Target]) -> Path:
    """In the current folder, named after the model."""
    if len(targets) > 1:
        return Path(f"{name}-export")
    return Path(_named(FORMATS[targets[0].format].file, name, targets[0]))


def _inputs(plan: ExportPlan) -> set[Path]:
    """Every file that an export reads."""
    merge = plan.merge
    weights = {tensor.place.path for tensor in merge.checkpoint.tensors.values()}
    adapters = {adapter.weights for adapter in merge.adapters}
    return weights | adapters | {*merge.files.values(), merge.checkpoint.path / "config.json"}
