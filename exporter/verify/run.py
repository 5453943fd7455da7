"""A verification: the weights of every artifact first, then, at level full, every artifact in its runtime.

Every runtime works in a process of its own on the files as they lie on disk; this process never loads a model. The
reference runs last and once for all artifacts: it then also judges the tokens that they chose.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from exporter.verify.artifact import open_artifact
from exporter.verify.checkpoint_checks import check_checkpoint
from exporter.verify.execution import Execution, Run, Say
from exporter.verify.lora import check_lora, is_lora
from exporter.verify.prompts import build_sequences
from exporter.verify.reference import Reference
from exporter.verify.report import Report
from exporter.verify.row_errors import check_drowned, row_errors
from exporter.verify.rows import check_rows
from exporter.verify.runtimes.installed import require

LEVELS: Final = ("rows", "full")


def verify(
    paths: Sequence[Path],
    reference: Reference,
    *,
    level: str,
    prompts: Sequence[str] = (),
    say: Say = lambda line: None,
) -> list[Report]:
    """Judge every artifact in ``paths`` against ``reference``; one report each, in order.

    level: "rows" reads the weights only, in blocks; "full" also runs the artifact and the reference.
    Raises BadInput for an artifact or reference that cannot be read; a failed check is in the report, not raised.
    """
    loras = {path: _verify_lora(path, reference, level, say) for path in paths if is_lora(path)}
    reports = _verify_models([path for path in paths if path not in loras], reference, level, prompts, say)
    return [loras[path] if path in loras else reports[path] for path in paths]


def _verify_lora(path: Path, reference: Reference, level: str, say: Say) -> Report:
    """An adapter alone runs nowhere: its pairs are checked, and whoever has the base's GGUF can run it with that."""
    say(f"reading the pairs of {path.name}")
    found = list(check_lora(path, reference, every=level == "full"))
    return Report(artifact=path, format="gguf-lora", level=level, checks=found, facts={})


def _verify_models(
    paths: Sequence[Path], reference: Reference, level: str, prompts: Sequence[str], say: Say
) -> dict[Path, Report]:
    artifacts = [open_artifact(path) for path in paths]
    if level == "full" and artifacts:
        require(["transformers"], needed_for="the reference")
    checks, rows = [], []
    for artifact in artifacts:
        say(f"reading the rows of {artifact.path.name}")
        found = list(check_rows(artifact, reference, untouched=level == "full"))
        if artifact.format == "hf":
            found += check_checkpoint(artifact.path, reference, untouched=level == "full")
        rows.append(row_errors(artifact, reference))
        checks.append(found + list(check_drowned(rows[-1])))
    facts: list[dict[str, float | str]] = [{"storage": artifact.kind} for artifact in artifacts]
    runs: Mapping[Path, Run] = {}
    if level == "full" and artifacts:
        with tempfile.TemporaryDirectory(prefix="ttexport-") as folder:
            execution = Execution(reference, build_sequences(reference, prompts), Path(folder), say)
            for artifact in artifacts:
                execution.run(artifact)
            execution.run_reference()
            for artifact, found, fact in zip(artifacts, checks, facts, strict=True):
                found += execution.judge(artifact, fact)
            runs = execution.runs
    return {
        artifact.path: Report(
            artifact=artifact.path,
            format=artifact.format,
            level=level,
            checks=found,
            facts=fact,
            rows=errors,
            profile=runs[artifact.path].profile if runs else None,
            skipped=runs[artifact.path].skipped if runs else [],
        )
        for artifact, found, fact, errors in zip(artifacts, checks, facts, rows, strict=True)
    }
