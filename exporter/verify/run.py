"""Run a verification: check the weights of every artifact and, at level full, also run every artifact.

Every runtime is a separate process that reads the files from disk, so the parent process never loads a model. The
reference model is run only once, after all artifacts, because the reference model also computes scores for the tokens
that the artifacts generated.

Modules that only one format or only the level full needs are imported where they are used, because the imports take as
long as verifying a small checkpoint.
"""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from exporter.errors import NotExpressible
from exporter.verify.expect.reference import Reference
from exporter.verify.findings import RowErrors
from exporter.verify.folder.auxiliary_files import check_auxiliary_files
from exporter.verify.folder.checkpoint import check_checkpoint
from exporter.verify.formats import FORMATS, adapter_format
from exporter.verify.onnx.base_rows import BaseRows
from exporter.verify.report import Check, Report, Skip
from exporter.verify.stored.artifact import Artifact, open_artifacts
from exporter.verify.values.row_errors import check_row_errors, row_errors
from exporter.verify.values.rows import check_rows

if TYPE_CHECKING:
    from exporter.verify.running.execution import ArtifactResults, Say


def verify(
    paths: Sequence[Path],
    reference: Reference,
    *,
    level: str,
    prompts: Sequence[str] = (),
    required: Collection[str] = (),
    say: Say = lambda line: None,
) -> list[Report]:
    """Compare every artifact in ``paths`` with ``reference``, and return one report per artifact, in order.

    level: "rows" checks the trained token rows and the auxiliary files; "weights" also checks every weight; "full" also
    runs the artifact and the reference model.
    required: names of runtimes, each of which must run all artifacts of the formats that the runtime supports.
    say: a function that is called with each progress message.

    A failed check is recorded in its report and does not raise an exception. Raises BadInput if an artifact or the
    reference cannot be read, and NotExpressible if a required runtime does not support the model.
    """
    reports: dict[Path, Report] = {}
    for path in paths:
        name = adapter_format(path)
        if name and (verifier := FORMATS[name].verifier):
            reports[path] = verifier(path, reference, level, say)
    models = [path for path in paths if path not in reports]
    reports |= _verify_models(models, reference, level, prompts, required, say)
    return [reports[path] for path in paths]


def _verify_models(
    paths: Sequence[Path],
    reference: Reference,
    level: str,
    prompts: Sequence[str],
    required: Collection[str],
    say: Say,
) -> dict[Path, Report]:
    opened = [open_artifacts(path) for path in paths]
    reference = _of_kept_rows(reference, [artifact for artifacts in opened for artifact in artifacts], level)
    if level == "full" and opened:
        from exporter.verify.running import gguf_loader
        from exporter.verify.runtimes.installed import require

        require(["transformers"], needed_for="running the reference")
        if gguf_loader.NAME in required and any(artifacts[0].format == "gguf" for artifacts in opened):
            gguf_loader.require_supported(reference)
    base = BaseRows(reference)
    results = [_check_model(artifact, reference, base, level, say) for artifacts in opened for artifact in artifacts]
    shared = [list(_check_files(path, artifacts, reference)) for path, artifacts in zip(paths, opened, strict=True)]
    if level == "full" and results:
        from exporter.verify.running.execution import Execution
        from exporter.verify.running.prompts import build_sequences
        from exporter.verify.running.texts import check_token_texts, run_texts

        with tempfile.TemporaryDirectory(prefix="ttexport-") as folder:
            sequences = build_sequences(reference, prompts)
            execution = Execution(reference, sequences, Path(folder), say, required)
            for result in results:
                execution.run(result.artifact)
            execution.run_reference()
            for result in results:
                result.checks += execution.compare(result.artifact, result.facts)
                result.run = execution.runs[result.artifact.path]
            say("comparing encoded texts, decoded tokens and rendered chats")
            texts = Path(folder) / "texts"
            formats = {path: artifacts[0].format for path, artifacts in zip(paths, opened, strict=True)}
            text_results = run_texts(formats, reference, sequences, texts)
            for number, (path, outcomes) in enumerate(zip(paths, shared, strict=True)):
                outcomes += text_results.check(path)
                if formats[path] == "gguf":
                    outcomes += check_token_texts(path, text_results, texts / f"token_texts.{number}")
    by_path = {result.artifact.path: result for result in results}
    return {
        path: _report(path, level, [by_path[artifact.path] for artifact in artifacts], outcomes)
        for path, artifacts, outcomes in zip(paths, opened, shared, strict=True)
    }


def _of_kept_rows(reference: Reference, artifacts: Sequence[Artifact], level: str) -> Reference:
    """Return the reference for artifacts that keep all rows of the base although the adapters' embedding is reduced.

    Any other reference is returned unchanged. Raises NotExpressible for the level full, because PEFT's model lacks the
    logits of the kept rows.
    """
    rows = {artifact.embedding.n_rows for artifact in artifacts}
    if reference.vocab >= reference.base_vocab or rows != {reference.base_vocab}:
        return reference
    if level == "full":
        raise NotExpressible(
            f"{artifacts[0].path}: --verify full",
            f"the adapters were trained on a model with {reference.vocab} rows, whose logits cannot be compared with "
            f"those of an artifact that keeps the {reference.base_vocab} rows of the base",
            instead="use the level weights, or use ttexport merge in place of patch",
        )
    return replace(reference, keeps_rows=True)


@dataclass
class _Result:
    """The results of all checks of one model of an artifact; an ONNX folder may contain several models."""

    artifact: Artifact
    checks: list[Check]
    facts: dict[str, float | str]
    rows: list[RowErrors]
    skipped: list[Skip]
    run: ArtifactResults | None = None


def _check_model(artifact: Artifact, reference: Reference, base: BaseRows, level: str, say: Say) -> _Result:
    """Compare the weights of one model with the reference without running the model."""
    say(f"checking the weights in {artifact.path.name}")
    every = level != "rows"
    outcomes: list[Check | Skip] = [*check_rows(artifact, reference, untouched=every)]
    if artifact.format == "onnx" and reference.checkpoint.is_encoder_decoder:
        outcomes.append(
            Skip("graph", "the graphs of an encoder-decoder can be verified only by comparing the model's logits")
        )
    elif artifact.format == "onnx":
        from exporter.verify.onnx.folder import check_graph
        from exporter.verify.onnx.weights import check_weights as check_initialisers

        outcomes += check_graph(artifact, reference)
        outcomes += check_initialisers(artifact.path, reference, base) if every else []
    if artifact.gguf and every:
        from exporter.verify.gguf.weights import check_weights

        outcomes += check_weights(artifact.gguf, reference)
    if artifact.format == "hf":
        outcomes += check_checkpoint(artifact.path, reference, untouched=every)
    rows = row_errors(artifact, reference)
    outcomes += check_row_errors(rows)
    checks, skips = _split(outcomes)
    return _Result(artifact, checks, {"storage": artifact.storage}, rows, skips)


def _split(outcomes: Iterable[Check | Skip]) -> tuple[list[Check], list[Skip]]:
    """Split ``outcomes`` into a list of checks and a list of skipped parts."""
    both = list(outcomes)
    return [item for item in both if isinstance(item, Check)], [item for item in both if isinstance(item, Skip)]


def _check_files(path: Path, artifacts: Sequence[Artifact], reference: Reference) -> Iterator[Check | Skip]:
    """Check the metadata and the auxiliary files of the artifact ``path``, which all models in ``path`` share."""
    match artifacts[0].format:
        case "gguf":
            from exporter.verify.gguf.metadata import check_settings
            from exporter.verify.gguf.special_tokens import check_specials
            from exporter.verify.gguf.vocabulary import check_tokens
            from exporter.verify.tokenised.check import check_tokenised

            gguf = artifacts[0].gguf
            assert gguf is not None, "expected an opened GGUF file in an artifact of the format gguf"
            yield from check_settings(gguf, reference)
            yield from check_tokens(gguf, reference)
            yield from check_specials(gguf, reference)
            yield from check_tokenised(path, gguf, reference)
        case "onnx":
            from exporter.verify.onnx.folder import check_folder

            yield from check_folder(path, artifacts, reference)
        case _:
            yield from check_auxiliary_files(path, reference)


def _report(path: Path, level: str, results: Sequence[_Result], shared: Sequence[Check | Skip]) -> Report:
    """Combine the results of all models in ``path`` into one report.

    If ``path`` contains more than one model, the name of each check and fact starts with the name of its model. If
    several models were run, the report contains the profile of only the first model.
    """
    checks: list[Check] = []
    skips: list[Skip] = []
    facts: dict[str, float | str] = {}
    rows: list[RowErrors] = []
    for result in results:
        prefix = f"{result.artifact.path.stem}: " if len(results) > 1 else ""
        checks += [replace(check, name=prefix + check.name) for check in result.checks]
        facts |= {prefix + name: value for name, value in result.facts.items()}
        rows += result.rows  # RowErrors contain their storage
        skips += [Skip(prefix + skip.name, skip.reason) for skip in result.skipped]
    shared_checks, shared_skips = _split(shared)
    runs = [result.run for result in results if result.run]
    return Report(
        artifact=path,
        format=results[0].artifact.format,
        level=level,
        checks=checks + shared_checks,
        facts=facts,
        rows=rows,
        profile=runs[0].profile if runs else None,
        skipped=skips + shared_skips + [skip for run in runs for skip in run.skipped],
    )
