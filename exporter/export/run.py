"""The way of one command: sources → plan → staged artifacts → verification → final name."""

from __future__ import annotations

from dataclasses import replace
from glob import escape
from pathlib import Path
from typing import Any

from exporter.errors import UsageError
from exporter.export.spec import ExportPlan, ExportSpec
from exporter.export.targets import plan_target, quants_for
from exporter.formats.target import DTYPES, Target, Wish
from exporter.io.apart import require_apart
from exporter.io.parallel import Budget
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
from exporter.verify.runtimes.installed import require


def plan_export(spec: ExportSpec) -> ExportPlan:
    """Read headers and decide. A format that cannot hold the model is a refusal in its target, not an error.

    Raises MissingDependency for a runtime that is required, or for what a report takes.
    """
    require(spec.require, needed_for="--require")
    if spec.report:
        require_renderers()
    located = [locate(str(word), asked_by="ADAPTER", content="adapter", quiet=spec.quiet) for word in spec.adapters]
    adapters = [Adapter.open(adapter.path) for adapter in located]
    base = find_base(spec.base, adapters, quiet=spec.quiet)
    merge = plan_merge(Checkpoint.open(base.path), adapters, untie=spec.untie)
    merge = replace(merge, origins=origins(base, located))
    name = (located or [base])[0].name or "model"  # what the user calls it; the root folder has no name
    dtype = DTYPES[spec.dtype] if spec.dtype else None
    wishes = [(fmt, quants) for fmt in spec.formats for quants in _quants(spec, fmt)]
    targets = []
    common = Wish(
        dtype=dtype,
        pre_tokenizer=spec.pre_tokenizer,
        converter=spec.converter,
        imatrix=spec.imatrix,
        token_embedding_type=spec.token_embedding_type and spec.token_embedding_type.upper(),
        output_tensor_type=spec.output_tensor_type and spec.output_tensor_type.upper(),
        budget=Budget(spec.memory_bytes) if spec.memory_bytes else Budget(),
        max_shard_bytes=spec.max_shard_bytes,
        split=spec.split,
        onnx_ops=spec.onnx_ops,
    )
    for fmt, quants in wishes:
        target = plan_target(fmt, replace(common, quants=quants), merge)
        if len(wishes) > 1:
            place = {"gguf": f"gguf/{name}-{target.storage}.gguf", "gguf-lora": f"gguf-lora/{name}.gguf"}.get(fmt, fmt)
            target = replace(target, place=place)
        targets.append(target)
    return ExportPlan(spec, merge, targets, spec.out or _default_out(name, targets))


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
    spec = plan.spec
    if spec.report and plan.out.resolve() in (report := spec.report.resolve(), *report.parents):
        raise UsageError(f"--report {spec.report}: expected a folder outside of OUT, which is made whole or not at all")
    with staged(plan.out, force=spec.force) as draft:
        paths = [draft / target.place if target.place else draft for target in plan.targets]
        for target, path in zip(plan.targets, paths, strict=True):
            assert target.write is not None, "a refusal was raised above"
            path.parent.mkdir(parents=True, exist_ok=True)
            target.write(path, hooks.start(f"{target.format} {target.storage}", target.work_nbytes or target.nbytes))
        paths = [written(path) for path in paths]
        reports = _verify(plan, paths, hooks)
        if reports:
            reports = _write_reports(plan, reports, draft, paths)
    return reports


def _write_reports(plan: ExportPlan, reports: list[Report], draft: Path, paths: list[Path]) -> list[Report]:
    """Into the folder that was asked for, failed or not, and into OUT if that has room for one beside the artifacts.

    Returns them under the final names. Raises NotEquivalent. The report inside OUT names artifacts relative to it:
    the folder may move, and its bytes must not tell where it was made.
    """
    spec = plan.spec
    # what was cut into parts is called by the first of them
    places = [_final(plan, target).with_name(path.name) for target, path in zip(plan.targets, paths, strict=True)]
    named = [replace(report, artifact=place) for report, place in zip(reports, places, strict=True)]
    where: dict[str, Any] = {}
    if spec.report:
        from exporter.verify.reports.setting import setting  # reads what is installed: only a report waits for it

        where = setting(_reference(plan), paths)
        write_report(spec.report, named, where)
    require_passed(named)
    if all(target.place for target in plan.targets):
        inside = [replace(report, artifact=report.artifact.relative_to(plan.out)) for report in named]
        if spec.report:
            write_report(draft, inside, where)
        else:
            write_file(draft / JSON, to_bytes(document(inside)))
    return named


def _verify(plan: ExportPlan, paths: list[Path], hooks: Hooks) -> list[Report]:
    """One report a target; none without verification."""
    if plan.spec.level == "off":
        return []
    spec, reference = plan.spec, _reference(plan)
    return verify(paths, reference, level=spec.level, prompts=spec.prompts, required=spec.require, say=hooks.say)


def _reference(plan: ExportPlan) -> Reference:
    merge = plan.merge
    adapters = [adapter.path for adapter in merge.adapters]
    return Reference.open(merge.checkpoint.path, adapters, untie=plan.spec.untie)


def written(path: Path) -> Path:
    """The artifact planned for ``path``: its first part, if it was cut into several."""
    if path.exists():
        return path
    return next(iter(sorted(path.parent.glob(f"{escape(path.stem)}-00001-of-?????.gguf"))), path)


def _final(plan: ExportPlan, target: Target) -> Path:
    return plan.out / target.place if target.place else plan.out


def _quants(spec: ExportSpec, fmt: str) -> list[tuple[str, ...]]:
    """What each artifact of ``fmt`` is to hold; nothing: it is written unquantised.

    GGUF takes a file for each, ONNX all in one folder.
    """
    chosen = quants_for(fmt, spec.formats, spec.quants)
    return [chosen] if fmt == "onnx" or not chosen else [(quant,) for quant in chosen]


def _default_out(name: str, targets: list[Target]) -> Path:
    """In the current folder, named after the model: a file for GGUF, else a folder."""
    if len(targets) > 1:
        return Path(f"{name}-export")
    if targets[0].format == "gguf-lora":
        return Path(f"{name}-lora.gguf")
    if targets[0].format == "gguf":
        return Path(f"{name}-{targets[0].storage}.gguf")
    return Path(f"{name}-{targets[0].format}")


def _inputs(plan: ExportPlan) -> set[Path]:
    """Every file that an export reads."""
    merge = plan.merge
    weights = {tensor.place.path for tensor in merge.checkpoint.tensors.values()}
    adapters = {adapter.weights for adapter in merge.adapters}
    return weights | adapters | {*merge.files.values(), merge.checkpoint.path / "config.json"}


def plan_json(plan: ExportPlan) -> dict[str, Any]:
    """What ``plan`` prints as JSON."""
    return {
        "base": str(plan.merge.checkpoint.path),
        "adapters": [str(adapter.path) for adapter in plan.merge.adapters],
        "origins": dict(plan.merge.origins),
        "out": str(plan.out),
        "vocab": plan.merge.vocab,
        "targets": [
            {
                "format": target.format,
                "storage": target.storage,
                "path": str(_final(plan, target)),
                **target.told(),
            }
            for target in plan.targets
        ],
        "ledger": [
            {"file": str(entry.path), "tensor": entry.key, "rule": entry.rule, "into": list(entry.into)}
            for entry in plan.merge.ledger_entries
        ],
    }
