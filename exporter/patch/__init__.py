"""Implements ``ttexport patch``, which writes an adapter's trained embedding rows into a GGUF or ONNX artifact.

The subpackages ``gguf`` and ``onnx`` implement the patch of one artifact format each.

``plan_patch(PatchSpec(…))`` returns the plan of a patch and writes nothing. ``run_patch(plan, hooks)`` writes and
verifies the patched artifact.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from exporter.errors import NotExpressible, UsageError
from exporter.patch.journal import recover
from exporter.patch.plan import PatchPlan, patch_json
from exporter.patch.spec import LEVELS, PatchSpec
from exporter.progress import Hooks
from exporter.sources.detect import detect
from exporter.sources.onnx.folder import has_model
from exporter.verify.report import Report
from exporter.verify.reports.write import require_renderers
from exporter.verify.runtimes.installed import require

__all__ = ["LEVELS", "PatchPlan", "PatchSpec", "is_patchable", "patch_json", "plan_patch", "restore", "run_patch"]


def plan_patch(spec: PatchSpec) -> PatchPlan:
    """Plan a patch from the adapters, and from the headers and a few rows of the base artifact.

    Raises BadInput for an input that does not fit, NotExpressible if the artifact cannot be patched, UsageError for
    options that contradict each other, and MissingDependency if the requested verification needs a missing package.
    """
    if spec.report:
        require_renderers()
        out = spec.base if spec.in_place else spec.out
        if out and out.resolve() in (folder := spec.report.resolve(), *folder.parents):
            raise UsageError(f"--report {spec.report}: expected a report folder outside of the patched model {out}")
    base_format = detect(spec.base)
    if spec.level == "full":
        runtimes = ["transformers", "onnxruntime"] if base_format == "onnx" else ["transformers"]
        require(runtimes, needed_for="--verify full")
    if base_format == "gguf":
        from exporter.patch.gguf.run import (
            plan_gguf_patch,
        )  # imported here, so that a patch loads only the modules of its format

        return plan_gguf_patch(spec)
    if base_format == "onnx":
        from exporter.patch.onnx.run import plan_onnx_patch

        return plan_onnx_patch(spec)
    raise NotExpressible(
        f"patch: {spec.base}",
        "only a .gguf file or a folder of ONNX models can be patched",
        instead=f"use ttexport merge ADAPTER --to {base_format} to write a new model",
    )


def run_patch(plan: PatchPlan, hooks: Hooks) -> Report | None:
    """Write the patched model, verify the written bytes, and then rename the new file or folder to its final name.

    Returns the verification report, or None if the verification level is off. Raises NotEquivalent if verification
    fails, or OutputError if a write fails. After an error, the base artifact is unchanged.
    """
    return plan.run(hooks)


def restore(base: Path) -> bool:
    """If an in-place patch of ``base`` was interrupted, restore the bytes from before the patch.

    Returns True if bytes were restored, or False if no patch was interrupted.
    """
    return recover(base)


def is_patchable(paths: Sequence[Path]) -> bool:
    """Whether ``paths`` are the arguments of a patch: a .gguf file or an ONNX folder, followed by adapters."""
    return paths[0].suffix == ".gguf" or (len(paths) > 1 and has_model(paths[0]))
