"""The way of ``ttexport patch``: base file and row adapters → proof of the base → patched model → verification."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final

from exporter.errors import BadInput, NotExpressible, UsageError
from exporter.formats.gguf.patching.evidence import base_dtype, prove_base
from exporter.formats.gguf.patching.journal import patch_in_place, recover
from exporter.formats.gguf.patching.plan import GgufPatch, plan_patch
from exporter.formats.gguf.patching.write import write_patched
from exporter.hooks import Hooks
from exporter.sources.adapter import Adapter
from exporter.sources.checkpoint import Checkpoint
from exporter.sources.gguf_parts import GgufParts, part_name
from exporter.sources.locate import locate
from exporter.staging import require_space, staged
from exporter.verify.artifact import detect
from exporter.verify.patched import Before, check_patched
from exporter.verify.report import Report, require_passed

_PART: Final = re.compile(r"-\d{5}-of-\d{5}$")


@dataclass(frozen=True, kw_only=True)
class PatchSpec:
    """What the user asked for. ``checkpoint``: what the file was made from, to prove it. ``dtype``: as in a merge.

    level: "rows" compares the new rows and some of every tensor, "full" every byte, "off" nothing.
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

    def __post_init__(self) -> None:
        if self.in_place and self.out is not None:
            raise UsageError(f"--in-place: changes {self.base} itself, so there is no -o {self.out}")
        if self.trust_base and self.checkpoint:
            raise UsageError("--trust-base: goes on without a proof, so there is no --base to compare with")
        if not self.adapters:
            raise UsageError("patch: expected an adapter behind the GGUF, found none")


@dataclass(frozen=True)
class PatchPlan:
    """Everything that is known before a byte is written. proof: how the file proved to be made from its base."""

    spec: PatchSpec
    adapters: Sequence[Adapter]
    patch: GgufPatch
    proof: str

    @property
    def out(self) -> Path:
        """The file that names the patched model."""
        if self.spec.in_place:
            return self.spec.base
        return self.spec.out or Path(f"{self._stem(self.spec.base)}-patched.gguf")

    @cached_property
    def paths(self) -> list[Path]:
        """Every file of the patched model, the first part first."""
        if self.spec.in_place:
            return [file.file.path for file in self.patch.files]
        count = len(self.patch.files)
        if count == 1:
            return [self.out]
        return [self.out.with_name(part_name(self._stem(self.out), number, count)) for number in range(count)]

    @property
    def rewrites(self) -> bool:
        """In place, but bytes would move: then a whole new file takes the old one's name."""
        return self.spec.in_place and not self.patch.in_place

    @staticmethod
    def _stem(path: Path) -> str:
        return _PART.sub("", path.name.removesuffix(".gguf"))


def restore(base: Path) -> bool:
    """Undo an interrupted patch in place of ``base``; whether there was one."""
    return recover(base)


def plan_gguf_patch(spec: PatchSpec) -> PatchPlan:
    """Read headers, adapters and some rows; decide. Raises BadInput, NotExpressible, UsageError."""
    if (kind := detect(spec.base)) != "gguf":
        instead = f"ttexport merge ADAPTER --to {kind} writes it anew"
        raise NotExpressible(f"patch: {spec.base}", "only .gguf files are patched in this version", instead=instead)
    located = [locate(word, asked_by="ADAPTER", kind="adapter", quiet=spec.quiet) for word in spec.adapters]
    adapters = [Adapter.open(one.path) for one in located]
    parts = GgufParts.open(spec.base)
    base = None if spec.trust_base else _checkpoint(spec, adapters)
    dtype = spec.dtype.upper() if spec.dtype else base_dtype(parts)
    patch = plan_patch(parts, adapters, dtype)
    plan = PatchPlan(spec, adapters, patch, prove_base(parts, base) if base else "trusted")
    _spare_inputs(plan)
    if plan.rewrites and len(patch.files) > 1:
        raise NotExpressible(
            f"patch --in-place: {spec.base}",
            "the vocabulary changes size, and the parts of a split model cannot all be replaced in one moment",
            instead="-o writes a patched copy",
        )
    return plan


def run_patch(plan: PatchPlan, hooks: Hooks) -> Report | None:
    """Write, verify what lies on disk, and give it its name. Raises NotEquivalent; the base then is as it was."""
    before = None if plan.spec.level == "off" else Before.read(plan.patch.parts, plan.adapters, plan.patch.dtype)
    if plan.spec.in_place and not plan.rewrites:
        nbytes = sum(one.encoded.nbytes for file in plan.patch.files for one in file.tensors)
        reports: list[Report | None] = []
        patch_in_place(
            plan.patch,
            lambda: reports.append(_verified(plan, plan.out, before, base=None)),
            hooks.start(f"patching {plan.patch.kind}", nbytes),
        )
        return reports[0]
    require_space(plan.out, plan.patch.nbytes)
    with staged(plan.out, force=plan.spec.force or plan.rewrites) as draft:
        meter = hooks.start(f"gguf {plan.patch.kind}", plan.patch.nbytes)
        for file, path in zip(plan.patch.files, plan.paths, strict=True):
            write_patched(file, draft.with_name(path.name), meter)
        base = plan.patch.parts if plan.spec.level == "full" else None
        return _verified(plan, draft.with_name(plan.paths[0].name), before, base=base)


def _verified(plan: PatchPlan, path: Path, before: Before | None, *, base: GgufParts | None) -> Report | None:
    if before is None:
        return None
    checks = list(check_patched(path, before, base=base))
    facts: dict[str, float | str] = {"storage": plan.patch.kind, "base": plan.proof}
    report = Report(artifact=plan.paths[0], format="gguf", level=plan.spec.level, checks=checks, facts=facts)
    require_passed([report])
    return report


def _checkpoint(spec: PatchSpec, adapters: Sequence[Adapter]) -> Checkpoint:
    """The base to prove the file by: ``--base``, else the folder that the adapters name, if it is here."""
    if spec.checkpoint is not None:
        located = locate(spec.checkpoint, asked_by="--base", kind="checkpoint", quiet=spec.quiet)
        return Checkpoint.open(located.path)
    named = {adapter.base_name for adapter in adapters}
    name = named.pop() if len(named) == 1 else None
    if name is None or not Path(name).is_dir():
        found = f"{name!r}, which is no folder here" if name else "no one folder that the adapters name"
        raise BadInput(
            f"{spec.base}: expected --base CHECKPOINT to prove that the file was made from the adapters' base, found "
            f"{found}; --trust-base goes on without a proof"
        )
    return Checkpoint.open(Path(name))


def _spare_inputs(plan: PatchPlan) -> None:
    """Only --in-place may touch what is read."""
    if plan.spec.in_place:
        return
    read = {file.file.path.resolve() for file in plan.patch.files}
    read |= {path.resolve() for one in plan.adapters for path in (one.path, one.weights)}
    for path in plan.paths:
        if path.resolve() in read:
            raise UsageError(f"-o {plan.out}: expected a place apart from the inputs, found {path} (--in-place?)")


def patch_json(plan: PatchPlan) -> dict[str, Any]:
    """What ``plan`` prints as JSON for a patch."""
    patch = plan.patch
    return {
        "base": str(plan.spec.base),
        "adapters": [str(adapter.path) for adapter in plan.adapters],
        "proof": plan.proof,
        "out": str(plan.out),
        "vocab": patch.vocab,
        "new_tokens": {str(token_id): text for token_id, text in patch.new.items()},
        "in_place": plan.spec.in_place and not plan.rewrites,
        "targets": [
            {
                "format": "gguf",
                "storage": patch.kind,
                "path": str(path),
                "expressible": True,
                "reason": None,
                "nbytes": file.nbytes,
                "notes": [],
            }
            for path, file in zip(plan.paths, patch.files, strict=True)
        ],
        "rows": [
            {"tensor": one.tensor.name, "type": one.tensor.type, "token_ids": list(one.token_ids), "dtype": patch.dtype}
            for file in patch.files
            for one in file.tensors
        ],
    }
