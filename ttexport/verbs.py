"""The verbs ``patch``, ``verify``, ``release``, ``inspect`` and ``tune`` as functions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exporter.progress import Hooks

if TYPE_CHECKING:
    from exporter.release.facts import Release
    from exporter.verify.options import VerifyOptions
    from exporter.verify.report import Report
    from tuner.spec import TuneSpec


@dataclass(frozen=True, kw_only=True)
class Patched:
    """The result of a patch. paths: patched files or models of a folder. report: None if the patch was not verified."""

    paths: Sequence[Path]
    report: Report | None


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """A trained adapter. record: content of the adapter's train.json: tokens, losses, settings and versions."""

    adapter: Path
    record: dict[str, Any]


def patch(
    base: str | Path,
    *adapters: str | Path,
    out: str | Path | None = None,
    in_place: bool = False,
    checkpoint: str | Path | None = None,
    trust_base: bool = False,
    dtype: str | None = None,
    verify: str = "rows",
    force: bool = False,
    hooks: Hooks | None = None,
) -> Patched:
    """Put the token rows of ``adapters`` into ``base``, a .gguf file or a folder of ONNX models.

    The cost of a patch is one copy. out: the file or folder to write. in_place: modify ``base`` itself, without
    ``out``. checkpoint: path or hub id of the checkpoint that ``base`` was made from, as proof of the origin of
    ``base``; None means the checkpoint named in the adapters. trust_base: continue without proof. dtype: f32, f16 or
    bf16, to which rows are rounded first; None means the dtype of the rows in ``base``. verify: a level.
    Raises UsageError, BadInput, NotExpressible, OutputError and NotEquivalent.
    """
    from exporter.patch import PatchSpec, plan_patch, restore, run_patch

    spec = PatchSpec(
        base=Path(base),
        adapters=tuple(map(str, adapters)),
        out=None if out is None else Path(out),
        in_place=in_place,
        checkpoint=None if checkpoint is None else str(checkpoint),
        trust_base=trust_base,
        dtype=dtype,
        level=verify,
        force=force,
        quiet=True,
    )
    if in_place:
        restore(spec.base)
    made = plan_patch(spec)
    report = run_patch(made, hooks or Hooks())
    return Patched(paths=[Path(target["path"]) for target in made.targets], report=report)


def verify(
    artifact: str | Path,
    *,
    reference: str | Path,
    adapters: Sequence[str | Path] = (),
    untie: bool = False,
    options: VerifyOptions | None = None,
    hooks: Hooks | None = None,
) -> list[Report]:
    """Compare ``artifact`` with ``reference`` and the unmerged ``adapters``. Returns a report for each artifact.

    artifact: a .gguf file, an ONNX or checkpoint folder, or a folder of two or more formats. reference, adapters: paths
    or hub ids. untie: whether ``artifact`` was merged with ``MergeOptions(untie=True)``. options: level and prompts;
    None means level full.
    A failed check is recorded in the report and raises no error. Raises BadInput, NotExpressible and MissingDependency.
    """
    from exporter.verify.options import VerifyOptions
    from exporter.verify.request import VerifyRequest, verify_request

    request = VerifyRequest(
        artifact=Path(artifact),
        reference=str(reference),
        adapters=tuple(map(str, adapters)),
        untie=untie,
        options=options or VerifyOptions(level="full"),
        quiet=True,
    )
    return verify_request(request, hooks or Hooks())


def release(
    toml: str | Path,
    *,
    out: str | Path | None = None,
    resume: bool = False,
    force: bool = False,
    cache: str | Path | None = None,
    hooks: Hooks | None = None,
) -> Release:
    """Make, verify and describe every artifact of a release. Returns the facts of the release.

    toml: the path of a release.toml. out: the folder to write; None means NAME-VERSION in the current folder. resume:
    continue an interrupted run. cache: folder that keeps base artifacts; None keeps no artifacts. Raises BadInput,
    NotExpressible, NotEquivalent and OutputError.
    """
    from exporter.release import Cache, plan_release, read_spec, run_release

    spec = read_spec(Path(toml))
    made = plan_release(spec, cache=Cache(Path(cache).absolute()) if cache else None, asked_by=Path(toml))
    place = Path(out) if out is not None else Path(f"{spec.name}-{spec.version}")
    return run_release(made, place, hooks, resume=resume, force=force)


def inspect(path: str | Path) -> dict[str, Any]:
    """The content of ``path`` as ``{"kind", "facts", "tensors"}``. Only headers are read.

    path: path or hub id of an adapter, a checkpoint, a .gguf file or an ONNX folder. Raises BadInput.
    """
    from exporter.inspection import inspect_path
    from exporter.sources.hub.locate import locate

    return inspect_path(locate(str(path), asked_by="path"))


def tune(spec: TuneSpec) -> Tuned:
    """Train the token rows in ``spec`` and write the adapter to ``spec.out``.

    Needs the extra ``tune``. Raises UsageError, BadInput, NotExpressible and OutputError. After an error, nothing is
    left at ``spec.out``.
    """
    from tuner.extra import require_extra

    require_extra(tensorboard=spec.tensorboard is not None)
    from tuner.training.train import tune as run_tune

    return Tuned(adapter=spec.out, record=run_tune(spec))
