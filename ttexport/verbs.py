"""The Python functions ``patch``, ``verify``, ``release``, ``inspect`` and ``tune``."""

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
    """The result of a patch.

    paths: the patched GGUF file, or the patched ONNX models of a folder.
    report: the verification report, or None if the patch was not verified.
    """

    paths: Sequence[Path]
    report: Report | None


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """A trained adapter.

    record: content of the adapter's train.json, with tokens, losses, settings and versions.
    """

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
    """Write the token rows of ``adapters`` into ``base``, which is a .gguf file or a folder of ONNX models.

    Patching takes about as long as copying ``base``.

    out: the file or folder to write.
    in_place: whether to modify ``base`` itself; if so, ``out`` must not be given.
    checkpoint: path or hub id of the checkpoint from which ``base`` was made, to check the origin of ``base``; None
    means the checkpoint that the adapters name.
    trust_base: whether to patch ``base`` without checking from which checkpoint ``base`` was made.
    dtype: the type (f32, f16 or bf16) to which the rows are first rounded, or None for the type of the rows in
    ``base``.
    verify: the verification level: off, rows, weights or full.
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
    drop_unused: bool = False,
    trust_base: bool = False,
    options: VerifyOptions | None = None,
    hooks: Hooks | None = None,
) -> list[Report]:
    """Compare ``artifact`` with the checkpoint ``reference`` and the unmerged ``adapters``.

    Returns one report for each artifact.

    artifact: a .gguf file, an ONNX folder, a checkpoint folder, or a folder that contains several formats.
    reference, adapters: paths or hub ids of the base checkpoint and the adapters.
    untie, drop_unused: whether ``artifact`` was merged with ``MergeOptions(untie=True)`` or
        ``MergeOptions(drop_unused_tokens=True)``.
    trust_base: whether to accept a reference other than the base that an adapter records.
    options: verification level and prompts, or None for the level full.
    A failed check is recorded in the report and raises no error. Raises BadInput, NotExpressible and MissingDependency.
    """
    from exporter.verify.options import VerifyOptions
    from exporter.verify.request import VerifyRequest, verify_request

    request = VerifyRequest(
        artifact=Path(artifact),
        reference=str(reference),
        adapters=tuple(map(str, adapters)),
        untie=untie,
        drop_unused=drop_unused,
        trust_base=trust_base,
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
    """Make and verify every artifact of a release, and write the release's documents.

    Returns a description of the finished release.

    toml: path of the file release.toml that describes the release.
    out: the folder to write, or None for NAME-VERSION in the current folder.
    resume: whether to continue an interrupted run.
    cache: folder in which base artifacts are kept for later releases, or None to keep no base artifacts. Raises
    BadInput, NotExpressible, NotEquivalent and OutputError.
    """
    from exporter.release import Cache, plan_release, read_spec, run_release

    spec = read_spec(Path(toml))
    made = plan_release(spec, cache=Cache(Path(cache).absolute()) if cache else None, asked_by=Path(toml))
    place = Path(out) if out is not None else Path(f"{spec.name}-{spec.version}")
    return run_release(made, place, hooks, resume=resume, force=force)


def inspect(path: str | Path) -> dict[str, Any]:
    """Return a description of the file or folder ``path`` as a dict with the keys kind, facts and tensors.

    Only file headers are read, and no weights.

    path: path or hub id of an adapter, a checkpoint, a .gguf file or an ONNX folder.
    Raises BadInput.
    """
    from exporter.inspection import inspect_path
    from exporter.sources.hub.locate import locate

    return inspect_path(locate(str(path), asked_by="path"))


def tune(spec: TuneSpec) -> Tuned:
    """Train the token rows that ``spec`` describes, and write the adapter to ``spec.out``.

    Needs the package extra ``ttexport[tune]``. Raises UsageError, BadInput, NotExpressible and OutputError. After an
    error, no file remains at ``spec.out``.
    """
    from tuner.extra import require_extra

    require_extra(tensorboard=spec.tensorboard is not None)
    from tuner.training.train import tune as run_tune

    return Tuned(adapter=spec.out, record=run_tune(spec))
