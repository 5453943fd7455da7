"""The way of one command: sources → plan → staged artifacts → verification → final name."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from glob import escape
from pathlib import Path
from typing import Any

from exporter.errors import UsageError
from exporter.formats.gguf.mixtures import MIXTURES, TENSOR_TYPES
from exporter.formats.gguf.split import Split
from exporter.hooks import Hooks
from exporter.merge.plan import MergePlan, plan_merge
from exporter.parallel import Budget
from exporter.sources.adapter import Adapter
from exporter.sources.checkpoint import Checkpoint
from exporter.sources.locate import find_base, locate, origins
from exporter.staging import require_space, staged, write_file
from exporter.targets import DTYPES, Target, Wish, plan_target, quants_for
from exporter.verify.reference import Reference
from exporter.verify.report import Report, document, require_passed, to_bytes
from exporter.verify.reports.write import JSON, require_renderers, write_report
from exporter.verify.run import verify
from exporter.verify.runtimes.installed import require


@dataclass(frozen=True, kw_only=True)
class ExportSpec:
    """What the user asked for. ``adapters`` empty: the checkpoint ``base`` itself is exported.

    Adapters and base are paths or hub ids; ``quiet``: no bars while they are downloaded.
    """

    adapters: tuple[Path | str, ...]
    base: str | None
    formats: tuple[str, ...]
    out: Path | None = None
    dtype: str | None = None
    quants: tuple[str, ...] = ()
    level: str = "rows"
    force: bool = False
    prompts: tuple[str, ...] = ()
    report: Path | None = None
    require: tuple[str, ...] = ()
    onnx_ops: str = "standard"
    pre_tokenizer: str | None = None
    converter: Path | None = None
    imatrix: Path | None = None
    token_embedding_type: str | None = None
    output_tensor_type: str | None = None
    split_max_size: str | None = None
    split_max_tensors: int | None = None
    untie: bool = False
    memory_bytes: int | None = None
    max_shard_bytes: int | None = None
    quiet: bool = False

    def __post_init__(self) -> None:
        if len(set(self.formats)) != len(self.formats):
            raise UsageError(f"--to: expected each format once, found {', '.join(self.formats)}")
        if self.quants and not {"gguf", "onnx"} & set(self.formats):
            raise UsageError("--quant: needs --to gguf or --to onnx")
        if len({quant.lower() for quant in self.quants}) != len(self.quants):
            raise UsageError(f"--quant: expected each type once, found {', '.join(self.quants)}")
        for option, given, fmt in (
            ("--max-shard-size", self.max_shard_bytes, "hf"),
            ("--onnx-ops", self.onnx_ops != "standard", "onnx"),
            ("--pre-tokenizer", self.pre_tokenizer, "gguf"),
            ("--converter", self.converter, "gguf"),
        ):
            if given and fmt not in self.formats:
                raise UsageError(f"{option}: needs --to {fmt}")
        if self.prompts and self.level != "full":
            raise UsageError("--prompts: needs --verify full, which alone runs a model")
        if self.converter and self.pre_tokenizer:
            raise UsageError("--converter: chooses the pre-tokenizer itself, so --pre-tokenizer has no use beside it")
        if self.report and self.level == "off":
            raise UsageError("--report: expected something to report, found --verify off")
        if self.split is not None and "gguf" not in self.formats:
            raise UsageError("--split-max-size, --split-max-tensors: need --to gguf")
        self._check_quantiser()

    @property
    def split(self) -> Split | None:
        """Where GGUF files are cut into parts."""
        return Split.parse(self.split_max_size, self.split_max_tensors)

    def _check_quantiser(self) -> None:
        """Options of llama.cpp's quantiser say what to do with a quantisation: without one they would do nothing."""
        made = [quant for quant in quants_for("gguf", self.formats, self.quants) if quant in MIXTURES]
        types = {"--token-embedding-type": self.token_embedding_type, "--output-tensor-type": self.output_tensor_type}
        for option, value in types.items():
            if value is not None and self.converter:
                raise UsageError(f"{option}: is for llama.cpp's quantiser, which does not run beside --converter")
            if value is not None and not made:
                raise UsageError(f"{option}: needs --to gguf and a quantisation, such as --quant Q4_K_M")
            if value is not None and value.upper() not in TENSOR_TYPES:
                raise UsageError(f"{option}: expected a type of ggml, such as Q6_K or F16, found {value}")
        if self.imatrix is not None and not set(made) - {"Q8_0"}:
            raise UsageError("--imatrix: needs --to gguf and a --quant below Q8_0, which makes no use of it")


@dataclass(frozen=True)
class ExportPlan:
    """Everything that is known before a byte of output exists."""

    spec: ExportSpec
    merge: MergePlan
    targets: Sequence[Target]
    out: Path

    @property
    def nbytes(self) -> int:
        """Bytes of all artifacts."""
        return sum(target.nbytes for target in self.targets)

    @property
    def work_nbytes(self) -> int:
        """Bytes that lie on the disk at once while it is written: an unquantised file may be needed on the way."""
        more = [target.work_nbytes - target.nbytes for target in self.targets if target.work_nbytes]
        return self.nbytes + max(more, default=0)


def plan_export(spec: ExportSpec) -> ExportPlan:
    """Read headers and decide. A format that cannot hold the model is a refusal in its target, not an error.

    Raises MissingDependency for a runtime that is required, or for what a report takes.
    """
    require(spec.require, needed_for="--require")
    if spec.report:
        require_renderers()
    located = [locate(str(word), asked_by="ADAPTER", kind="adapter", quiet=spec.quiet) for word in spec.adapters]
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
    _spare_inputs(plan)
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


def _spare_inputs(plan: ExportPlan) -> None:
    """No --force reaches the inputs: neither a file that is read, nor a folder above one, may be replaced.

    ``realpath``, unlike ``resolve``, passes over a link that goes in a circle: who reads it will say so.
    """
    merge = plan.merge
    read = {tensor.place.path for tensor in merge.checkpoint.tensors.values()} | set(merge.files.values())
    read |= {adapter.weights for adapter in merge.adapters}
    read.add(merge.checkpoint.path / "config.json")
    outs = {plan.out.absolute(), Path(os.path.realpath(plan.out.parent)) / plan.out.name}
    for path in sorted(read):
        for form in (path.absolute(), Path(os.path.realpath(path)), Path(os.path.realpath(path.parent)) / path.name):
            if outs & {form, *form.parents}:
                raise UsageError(f"-o {plan.out}: expected a place apart from the inputs, found {path} there")


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
            {"file": str(booking.path), "tensor": booking.key, "rule": booking.rule, "into": list(booking.into)}
            for booking in plan.merge.bookings
        ],
    }
