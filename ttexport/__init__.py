"""Merge, export, patch, verify and release language models with trained token rows; train token rows with ``tune``.

    import ttexport

    merged = ttexport.merge("my-adapter", to=["hf", ttexport.GgufOptions(types=("Q8_0",))], out="out")
    for artifact in merged.artifacts:
        print(artifact.path, artifact.report.verdict())

Each function of this package does the same as the ``ttexport`` subcommand with the same name. All errors are subclasses
of ``TTExportError``, and no function prints anything. Names are imported on first use, so ``import ttexport`` imports
neither torch nor any library that only one format needs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from exporter.lazy import lazy_attributes
from exporter.version import __version__

if TYPE_CHECKING:
    from exporter.errors import (
        BadInput,
        MissingDependency,
        NotEquivalent,
        NotExpressible,
        OutputError,
        TTExportError,
        UsageError,
    )
    from exporter.export.spec import ExportPlan, MergeOptions
    from exporter.formats.gguf.options import GgufOptions
    from exporter.formats.gguf_lora.options import GgufLoraOptions
    from exporter.formats.hf.options import HfOptions
    from exporter.formats.onnx.options import OnnxOptions
    from exporter.progress import Hooks
    from exporter.release.facts import Release
    from exporter.verify.options import VerifyOptions
    from exporter.verify.report import Check, Report, Skip
    from ttexport.exporting import Exported, ExportedArtifact, export, merge, plan
    from ttexport.verbs import Patched, Tuned, inspect, patch, release, tune, verify
    from tuner.spec import TuneSpec

__all__ = [
    "BadInput",
    "Check",
    "ExportPlan",
    "Exported",
    "ExportedArtifact",
    "GgufLoraOptions",
    "GgufOptions",
    "HfOptions",
    "Hooks",
    "MergeOptions",
    "MissingDependency",
    "NotEquivalent",
    "NotExpressible",
    "OnnxOptions",
    "OutputError",
    "Patched",
    "Release",
    "Report",
    "Skip",
    "TTExportError",
    "TuneSpec",
    "Tuned",
    "UsageError",
    "VerifyOptions",
    "__version__",
    "export",
    "inspect",
    "merge",
    "patch",
    "plan",
    "release",
    "tune",
    "verify",
]

_ERRORS = "exporter.errors"
_REPORT = "exporter.verify.report"
_EXPORTING = "ttexport.exporting"
_VERBS = "ttexport.verbs"

__getattr__ = lazy_attributes(
    __name__,
    {
        "BadInput": _ERRORS,
        "Check": _REPORT,
        "ExportPlan": "exporter.export.spec",
        "Exported": _EXPORTING,
        "ExportedArtifact": _EXPORTING,
        "GgufLoraOptions": "exporter.formats.gguf_lora.options",
        "GgufOptions": "exporter.formats.gguf.options",
        "HfOptions": "exporter.formats.hf.options",
        "Hooks": "exporter.progress",
        "MergeOptions": "exporter.export.spec",
        "MissingDependency": _ERRORS,
        "NotEquivalent": _ERRORS,
        "NotExpressible": _ERRORS,
        "OnnxOptions": "exporter.formats.onnx.options",
        "OutputError": _ERRORS,
        "Patched": _VERBS,
        "Release": "exporter.release.facts",
        "Report": _REPORT,
        "Skip": _REPORT,
        "TTExportError": _ERRORS,
        "TuneSpec": "tuner.spec",
        "Tuned": _VERBS,
        "UsageError": _ERRORS,
        "VerifyOptions": "exporter.verify.options",
        "export": _EXPORTING,
        "inspect": _VERBS,
        "merge": _EXPORTING,
        "patch": _VERBS,
        "plan": _EXPORTING,
        "release": _VERBS,
        "tune": _VERBS,
        "verify": _VERBS,
    },
)
