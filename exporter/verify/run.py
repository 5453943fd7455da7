"""A verification: the weights of every artifact first, then, at level full, every artifact in its runtime.

Every runtime works in a process of its own on the files as they lie on disk; this process never loads a model. The
reference runs last and once for all artifacts: it then also judges the tokens that they chose.
"""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from exporter.verify.expect.reference import Reference
from exporter.verify.findings import RowErrors
from exporter.verify.folder.auxiliary_files import check_auxiliary_files
from exporter.verify.folder.checkpoint import check_checkpoint
from exporter.verify.gguf.lora import check_lora, is_lora
from exporter.verify.gguf.metadata import check_settings
from exporter.verify.gguf.special_tokens import check_specials
from exporter.verify.gguf.vocabulary import check_tokens
from exporter.verify.gguf.weights import check_weights
from exporter.verify.onnx.base_rows import BaseRows
from exporter.verify.report import Check, Report, Skip
from exporter.verify.running import gguf_loader
from exporter.verify.running.execution import Execution, Run, Say
from exporter.verify.running.prompts import build_sequences
from exporter.verify.running.texts import check_token_texts, run_texts
from exporter.verify.runtimes.installed import require
from exporter.verify.stored.artifact import Artifact, open_artifacts
from exporter.verify.values.row_errors import check_row_errors, row_errors
from exporter.verify.values.rows import check_rows


def verify(
    paths: Sequence[Path],
    reference: Reference,
    *,
    level: str,
    prompts: Sequence[str] = (),
    required: Collection[str] = (),
    say: Say = lambda line: None,
) -> list[Report]:
    """Judge every artifact in ``paths`` against ``reference``; one report each, in order.

    level: "rows" reads the trained rows and what lies beside the weights; "weights" every weight, in blocks; "full"
    also runs the artifact and the reference.  required: names of runtimes that have to run whatever they can.
    Raises BadInput for an artifact or reference that cannot be read, NotExpressible for a required runtime that does
    not compute the model; a failed check is in the report, not raised.
    """
    loras = {path: _verify_lora(path, reference, level, say) for path in paths if is_lora(path)}
    reports = _verify_models([path for path in paths if path not in loras], reference, level, prompts, required, say)
    return [loras[path] if path in loras else reports[path] for path in paths]


def _verify_lora(path: Path, reference: Reference, level: str, say: Say) -> Report:
    """An adapter alone runs nowhere: its pairs are checked, and whoever has the base's GGUF can run it with that."""
    say(f"reading the pairs of {path.name}")
    found = list(check_lora(path, reference, every=level == "full"))
    return Report(artifact=path, format="gguf-lora", level=level, checks=found, facts={})


def _verify_models(
    paths: Sequence[Path],
    reference: Reference,
    level: str,
    prompts: Sequence[str],
    required: Collection[str],
    say: Say,
) -> dict[Path, Report]:
    opened = [open_artifacts(path) for path in paths]
    if level == "full" and opened:
        require(["transformers"], needed_for="the reference")
        if gguf_loader.NAME in required and any(one[0].format == "gguf" for one in opened):
            gguf_loader.require_able(reference)
    base = BaseRows(reference)
    judged = [_judge_rows(one, reference, base, level, say) for artifacts in opened for one in artifacts]
    beside = [list(_beside_weights(path, one, reference)) for path, one in zip(paths, opened, strict=True)]
    if level == "full" and judged:
        with tempfile.TemporaryDirectory(prefix="ttexport-") as folder:
            sequences = build_sequences(reference, prompts)
            execution = Execution(reference, sequences, Path(folder), say, required)
            for one in judged:
                execution.run(one.artifact)
            execution.run_reference()
            for one in judged:
                one.checks += execution.judge(one.artifact, one.facts)
                one.run = execution.runs[one.artifact.path]
            say("encoding, decoding and chatting")
            texts = Path(folder) / "texts"
            formats = {path: one[0].format for path, one in zip(paths, opened, strict=True)}
            spoken = run_texts(formats, reference, sequences, texts)
            for number, (path, shared) in enumerate(zip(paths, beside, strict=True)):
                shared += spoken.judge(path)
                if formats[path] == "gguf":
                    shared += check_token_texts(path, spoken, texts / f"token_texts.{number}")
    by_path = {one.artifact.path: one for one in judged}
    return {
        path: _report(path, level, [by_path[artifact.path] for artifact in artifacts], shared)
        for path, artifacts, shared in zip(paths, opened, beside, strict=True)
    }


@dataclass
class _Judged:
    artifact: Artifact
    checks: list[Check]
    facts: dict[str, float | str]
    rows: list[RowErrors]
    skipped: list[Skip]
    run: Run | None = None


def _judge_rows(artifact: Artifact, reference: Reference, base: BaseRows, level: str, say: Say) -> _Judged:
    say(f"reading the rows of {artifact.path.name}")
    every = level != "rows"
    found: list[Check | Skip] = [*check_rows(artifact, reference, untouched=every)]
    if artifact.format == "onnx" and reference.checkpoint.is_encoder_decoder:
        found.append(Skip("graph", "the graphs of an encoder-decoder are judged by their logits"))
    elif artifact.format == "onnx":
        from exporter.verify.onnx.folder import check_graph
        from exporter.verify.onnx.weights import check_weights as check_initialisers

        found += check_graph(artifact, reference)
        found += check_initialisers(artifact.path, reference, base) if every else []
    if artifact.parts and every:
        found += check_weights(artifact.parts, reference)
    if artifact.format == "hf":
        found += check_checkpoint(artifact.path, reference, untouched=every)
    rows = row_errors(artifact, reference)
    found += check_row_errors(rows)
    checks, skips = _apart(found)
    return _Judged(artifact, checks, {"storage": artifact.kind}, rows, skips)


def _apart(found: Iterable[Check | Skip]) -> tuple[list[Check], list[Skip]]:
    """What was checked, and what was not."""
    both = list(found)
    return [one for one in both if isinstance(one, Check)], [one for one in both if isinstance(one, Skip)]


def _beside_weights(path: Path, artifacts: Sequence[Artifact], reference: Reference) -> Iterator[Check | Skip]:
    """What runtimes are told beside the weights: of a folder once, however many models it holds."""
    match artifacts[0].format:
        case "gguf":
            parts = artifacts[0].parts
            assert parts is not None, "a GGUF is opened with its header"
            yield from check_settings(parts, reference)
            yield from check_tokens(parts, reference)
            yield from check_specials(parts, reference)
        case "onnx":
            from exporter.verify.onnx.folder import check_folder  # parses protobuf: only ONNX waits for it

            yield from check_folder(path, artifacts, reference)
        case _:
            yield from check_auxiliary_files(path, reference)


def _report(path: Path, level: str, judged: Sequence[_Judged], beside: Sequence[Check | Skip]) -> Report:
    """One report for what lies at ``path``; where that is several models, each check and fact says whose it is.

    The profile is that of the first that was run.
    """
    checks: list[Check] = []
    skips: list[Skip] = []
    facts: dict[str, float | str] = {}
    rows: list[RowErrors] = []
    for one in judged:
        whose = f"{one.artifact.path.stem}: " if len(judged) > 1 else ""
        checks += [replace(check, name=whose + check.name) for check in one.checks]
        facts |= {whose + name: value for name, value in one.facts.items()}
        rows += one.rows  # each says its storage
        skips += [Skip(whose + skip.name, skip.reason) for skip in one.skipped]
    more, others = _apart(beside)
    runs = [one.run for one in judged if one.run]
    return Report(
        artifact=path,
        format=judged[0].artifact.format,
        level=level,
        checks=checks + more,
        facts=facts,
        rows=rows,
        profile=runs[0].profile if runs else None,
        skipped=skips + others + [skip for run in runs for skip in run.skipped],
    )
