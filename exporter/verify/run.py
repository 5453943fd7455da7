"""A verification: the rows of every artifact first, then, at level full, every artifact in its runtime.

The reference is computed once for all artifacts of a run. Every runtime works in a process of its own on the files as
they lie on disk; this process never loads a model.
"""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from exporter.verify import logits
from exporter.verify.artifact import Artifact, open_artifact
from exporter.verify.checkpoint_checks import check_checkpoint
from exporter.verify.prompts import Sequences, build_sequences
from exporter.verify.quantised import write_base
from exporter.verify.reference import Reference
from exporter.verify.report import Check, Report
from exporter.verify.rows import check_rows
from exporter.verify.runtimes.job import RuntimeFailed, run
from exporter.verify.tolerances import GREEDY_TOKENS

LEVELS: Final = ("rows", "full")

#: Called with a line that says what is being done.
Say = Callable[[str], None]


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
    artifacts = [open_artifact(path) for path in paths]
    checks: list[list[Check]] = []
    for artifact in artifacts:
        say(f"reading the rows of {artifact.path.name}")
        found = list(check_rows(artifact, reference, untouched=level == "full"))
        if artifact.format == "hf":
            found += check_checkpoint(artifact.path, reference, untouched=level == "full")
        checks.append(found)
    facts: list[dict[str, float | str]] = [{"storage": artifact.kind} for artifact in artifacts]
    if level == "full":
        with tempfile.TemporaryDirectory(prefix="ttexport-") as folder:
            full = _Full(reference, build_sequences(reference, prompts), Path(folder), say)
            full.compute_reference(artifacts)
            for artifact, found, fact in zip(artifacts, checks, facts, strict=True):
                found += full.check(artifact, fact)
    return [
        Report(artifact=artifact.path, format=artifact.format, level=level, checks=found, facts=fact)
        for artifact, found, fact in zip(artifacts, checks, facts, strict=True)
    ]


@dataclass
class _Full:
    """Runs the reference and the runtimes in ``folder``; results stay there as arrays until the run ends."""

    reference: Reference
    sequences: Sequences
    folder: Path
    say: Say
    want: logits.Reader | None = None

    def compute_reference(self, artifacts: Sequence[Artifact]) -> None:
        """One process for every rounding that the artifacts declare."""
        kinds = {artifact.kind for artifact in artifacts if artifact.kind in ("F16", "BF16")}
        quantised = any(self._is_quantised(artifact) for artifact in artifacts)
        job = self._job() | {
            "checkpoint": str(self.reference.checkpoint.path),
            "adapters": [str(adapter.path) for adapter in self.reference.adapters],
            "vocab": self.reference.vocab,
            "dtypes": ["F32", *sorted(kinds)],
            "base_sequences": self._base_sequences() if quantised else [],
        }
        self.say("computing the reference: transformers with PEFT, unmerged")
        self.want = run("reference", job, self.folder / "reference")

    def check(self, artifact: Artifact, facts: dict[str, float | str]) -> Iterator[Check]:
        """Run the artifact and compare. A runtime that fails on it is a failed check."""
        runtime = {"hf": "merged", "onnx": "onnx_runtime", "gguf": _gguf_runtime()}[artifact.format]
        facts["runtime"] = runtime
        self.say(f"running {artifact.path.name} in {runtime}")
        place = self.folder / f"artifact-{sum(1 for _ in self.folder.iterdir())}"
        try:
            got = run(runtime, self._job() | {"artifact": str(artifact.path)}, place)
            yield from self._compare(artifact, got, facts)
        except RuntimeFailed as exc:
            yield Check(name="runs", passed=False, detail=str(exc))

    def _compare(self, artifact: Artifact, got: logits.Reader, facts: dict[str, float | str]) -> Iterator[Check]:
        assert self.want is not None, "the reference is computed first"
        want, count, kind = self.want, len(self.sequences.all), artifact.kind
        if kind in ("F16", "BF16"):
            rounding = logits.distance(want, "F32", want, kind, count)
            facts["rounding max abs"], facts["rounding mean KL"] = rounding.max_abs, rounding.kl
        if self._is_quantised(artifact):
            yield from self._compare_quantised(artifact, got, facts)
        else:
            check = {"hf": logits.check_hf, "onnx": logits.check_onnx, "gguf": logits.check_gguf}[artifact.format]
            yield from check(want, got, kind, count)
        if kind == "F32" or artifact.format == "hf":
            yield logits.check_greedy(want, got, kind, len(self._greedy_prompts()))
        if facts["runtime"] == "llamacpp":
            yield logits.check_tokens(self.sequences.text_ids, got, self.sequences.texts)

    def _compare_quantised(
        self, artifact: Artifact, got: logits.Reader, facts: dict[str, float | str]
    ) -> Iterator[Check]:
        assert self.want is not None, "the reference is computed first"
        place = self.folder / f"base-of-{artifact.path.name}"
        place.mkdir()
        copy = place / "base.gguf"
        write_base(artifact.path, self.reference, copy)
        sequences = self._base_sequences()
        job = self._job() | {"artifact": str(copy), "sequences": sequences, "greedy_prompts": [], "texts": []}
        self.say(f"running the base as quantised in {artifact.path.name}")
        base_got = run(str(facts["runtime"]), job, place / "run")
        columns = self.reference.base_vocab
        base = logits.distance(self.want, "base", base_got, "full", len(sequences), columns)
        tuned = logits.distance(self.want, "F32", got, "full", len(self.sequences.all), columns)
        facts["mean KL"] = tuned.kl
        yield logits.check_excess(tuned, base)

    def _job(self) -> dict[str, Any]:
        return {
            "sequences": self.sequences.all,
            "greedy_prompts": self._greedy_prompts(),
            "greedy_tokens": GREEDY_TOKENS,
            "texts": self.sequences.texts,
        }

    def _greedy_prompts(self) -> list[list[int]]:
        """One control text, and one with trained tokens if there are any."""
        return [self.sequences.control[0][:12], *([self.sequences.trained[0]] if self.sequences.trained else [])]

    def _base_sequences(self) -> list[list[int]]:
        """The same sequences without the new tokens, which the base does not have."""
        limit = self.reference.base_vocab
        return [[token for token in ids if token < limit] for ids in self.sequences.all]

    @staticmethod
    def _is_quantised(artifact: Artifact) -> bool:
        return artifact.kind not in ("F64", "F32", "F16", "BF16")


def _gguf_runtime() -> str:
    """llama.cpp where it is installed, else transformers' own GGUF loader."""
    return "llamacpp" if importlib.util.find_spec("llama_cpp") else "gguf_in_transformers"
