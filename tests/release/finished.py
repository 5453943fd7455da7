"""A finished release of a tiny model, for tests of its documents: real artifacts with facts written by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from exporter.export.run import plan_export, run_export
from exporter.export.spec import ExportSpec
from exporter.formats.gguf.options import GgufOptions
from exporter.formats.hf.options import HfOptions
from exporter.formats.onnx.options import OnnxOptions
from exporter.progress import Hooks
from exporter.release.facts import Artifact, Material, Model, Release, Run

RUN: Final = Run(
    started="2026-03-01T10:00:00Z",
    finished="2026-03-01T10:01:00Z",
    invocation="6f1c7d1e-58bb-4a3c-9d6a-0a7f2f0f7f11",
    host={"system": "Linux"},
    jobs={"tuned-hf": {"seconds": 1.5}},
)
COMMIT: Final = "0123456789abcdef0123456789abcdef01234567"
CARD: Final = {"license": "apache-2.0", "summary": "Knows lamps.", "limits": "Lamps only.", "tags": ["lamps"]}


def write_artifacts(draft: Path, base: Path, adapter: Path, *, folder: str = "") -> tuple[Artifact, ...]:
    """HF, GGUF in BF16 and Q8_0, and ONNX of ``adapter`` on ``base``, verified by rows, below ``draft / folder``."""
    place = draft / folder
    place.parent.mkdir(parents=True, exist_ok=True)
    formats = (HfOptions(), GgufOptions(types=("BF16", "Q8_0")), OnnxOptions())
    spec = ExportSpec(adapters=(adapter,), base=str(base), formats=formats, out=place)
    plan = plan_export(spec)
    reports = run_export(plan, Hooks())
    (place / "report.json").unlink()
    model = folder or "tuned"
    artifacts = []
    for target, report in zip(plan.targets, reports, strict=True):
        path = report.artifact.relative_to(draft).as_posix()
        job = f"{model}-{target.format}-{target.storage}".lower()
        facts: dict[str, Any] = {"format": target.format, "storage": target.storage, "report": report.to_json()}
        artifacts.append(Artifact(job=job, model=model, path=path, parameters={"level": "rows"}, **facts))
    return tuple(artifacts)


def release(artifacts: tuple[Artifact, ...]) -> Release:
    """The facts of a release of ``artifacts``, with the models that they name."""
    models = sorted({artifact.model for artifact in artifacts})
    return Release(
        name="Tiny-Lamps",
        version="1.0",
        base=Material(name="org/tiny", revision=COMMIT, files={"config.json": "a" * 64, "model.safetensors": "b" * 64}),
        adapters={name: Material(name=f"{name}-adapter", files={"adapter.safetensors": "c" * 64}) for name in models},
        models={
            name: Model(
                name=f"Tiny {name}",
                adapters=(name,),
                folder=name if len(models) > 1 else "",
                parameter_count=60_000,
                size_label="60K",
                card=CARD,
            )
            for name in models
        },
        artifacts=artifacts,
        tools={"ttexport": "0.1.0", "llama-cpp-python": "0.3.36"},
        spec={"name": "Tiny-Lamps", "base": "org/tiny", "jobs": [{"format": "gguf", "quant": "Q8_0"}]},
    )
