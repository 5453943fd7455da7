"""Runs artifacts and the reference, and hands their arrays to the checks."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from exporter.verify.expect.reference import Reference
from exporter.verify.findings import Profile
from exporter.verify.report import Check, Skip
from exporter.verify.running import excess, gguf_loader, logits
from exporter.verify.running.metrics import Distance
from exporter.verify.running.profile import profile
from exporter.verify.running.prompts import Sequences
from exporter.verify.running.quantised_base import write_base
from exporter.verify.running.runtime_choice import (
    HALVES,
    choose_runtime,
    graph_modes,
    greedy_must_match,
    reference_rounding,
)
from exporter.verify.runtimes.installed import TITLES, installed, missing, require
from exporter.verify.runtimes.job import RuntimeFailed, run
from exporter.verify.stored.artifact import Artifact
from exporter.verify.tolerances import GGUF_KL, GREEDY_TOKENS

#: Called with a line that says what is being done.
Say = Callable[[str], None]


@dataclass
class Run:
    """What one artifact's processes left behind. ``failure`` is what its runtime said instead.

    rounding: that of the reference which it is held to.  ways: those in which it computed the sequences.
    kept: tuned tensors that the base so stored has, too, so that it is not the base.
    """

    artifact: Artifact
    runtime: str
    rounding: str
    ways: Sequence[str] = ("full",)
    got: logits.Reader | None = None
    base: logits.Reader | None = None
    loader: logits.Reader | None = None
    failure: str = ""
    kept: Sequence[str] = ()
    profile: Profile | None = None
    skipped: list[Skip] = field(default_factory=list)


@dataclass
class Execution:
    """The processes of one verification; their results stay in ``folder``, read as they are needed.

    required: names of runtimes that have to run whatever they can.
    """

    reference: Reference
    sequences: Sequences
    folder: Path
    say: Say
    required: Collection[str] = ()
    runs: dict[Path, Run] = field(default_factory=dict)
    want: logits.Reader | None = None

    def run(self, artifact: Artifact) -> None:
        """Run ``artifact`` in its runtime; a quantised one also with the base's rows put back.

        Raises MissingDependency if nothing is installed that could.
        """
        runtime = choose_runtime(artifact, self.reference)
        name = "onnxruntime" if artifact.format == "onnx" else "transformers"
        if runtime != "llamacpp":
            require([name], needed_for=f"running {artifact.path.name}")
        place = self.folder / str(len(self.runs))
        done = self.runs[artifact.path] = Run(artifact, runtime, reference_rounding(artifact, self.reference))
        if artifact.format == "onnx":
            done.ways, done.skipped = graph_modes(artifact)
        if runtime == "gguf_in_transformers":
            reason = missing("llama.cpp", needed_for="running a GGUF file where its users do")
            done.skipped.append(Skip("llama.cpp", f"{reason}; transformers ran it instead"))
        job = {
            "artifact": str(artifact.path),
            "sequences": self.sequences.all,
            "more": self.sequences.more if self._is_mean(done) else [],
            # Who does not have to choose alike is not asked.
            "greedy_prompts": self._greedy_prompts() if greedy_must_match(artifact) else [],
            "greedy_tokens": self._greedy_tokens(),
            "texts": self.sequences.texts,
            "ways": done.ways,
            "cache_shape": self.reference.cache_shape,
            "start_token": self.reference.start_token,
        }
        started = time.perf_counter()
        try:
            self.say(f"running {artifact.path.name} in {TITLES[runtime]}")
            done.got = run(runtime, job, place)
            if self._is_mean(done):
                copy, done.kept = write_base(artifact, self.reference, place / "copy")
                ids = {"sequences": self._base_sequences(), "more": [], "greedy_prompts": []}
                quiet = ids | {"texts": [], "ways": ["full"]}
                self.say(f"running the base as stored in {artifact.path.name}")
                done.base = run(runtime, job | {"artifact": str(copy)} | quiet, place / "base")
                shutil.rmtree(place / "copy")
            if runtime == "llamacpp":
                self._run_loader(done, job | {"more": [], "greedy_prompts": []}, place)
        except RuntimeFailed as exc:
            done.failure = str(exc)
        self.say(f"{artifact.path.name} took {time.perf_counter() - started:.1f} s")

    def _run_loader(self, done: Run, job: dict[str, Any], place: Path) -> None:
        """Run a GGUF in transformers, too, or say why not."""
        reason = gguf_loader.unable(self.reference)
        if not installed(gguf_loader.NAME):
            reason = str(missing(gguf_loader.NAME, needed_for="reading a GGUF file as transformers does"))
        elif len(done.artifact.files) > 1:
            reason = "transformers' own loader reads no file that is split"
        elif gguf_loader.NAME not in self.required and any(one.loader for one in self.runs.values()):
            reason = f"it ran another GGUF of the same model; --require {gguf_loader.NAME} runs all"
        if reason:
            done.skipped.append(Skip(gguf_loader.NAME, reason))
            return
        self.say(f"running {done.artifact.path.name} in transformers' own loader")
        sequences = [self.sequences.all[number] for number in self._shown()]
        done.loader = run("gguf_in_transformers", job | {"sequences": sequences}, place / "loader")

    def _shown(self) -> list[int]:
        return gguf_loader.shown(self.sequences.all, self.sequences.trained)

    def run_reference(self) -> None:
        """One process for every rounding that the artifacts declare, and for every token that they chose."""
        alive = [one for one in self.runs.values() if one.got is not None]
        if not alive:
            return
        wanted = {one.rounding: self.sequences.all for one in alive}
        wanted |= {one.rounding: self.sequences.many for one in alive if one.base}
        job: dict[str, Any] = {
            "checkpoint": str(self.reference.checkpoint.path),
            "adapters": [str(adapter.path) for adapter in self.reference.adapters],
            "vocab": self.reference.vocab,
            "sequences": {"F32": self.sequences.all} | dict(sorted(wanted.items())),
            "base_sequences": self._base_sequences() if any(one.base for one in alive) else [],
            "continuations": {name: list(map(list, pairs)) for name, pairs in self._continuations(alive).items()},
        }
        self.say("computing the reference: transformers with PEFT, unmerged")
        self.want = run("reference", job, self.folder / "reference")

    def judge(self, artifact: Artifact, facts: dict[str, float | str]) -> Iterator[Check]:
        """Compare what ``artifact`` computed with the reference. A runtime that failed on it is a failed check."""
        done = self.runs[artifact.path]
        facts["runtime"] = TITLES[done.runtime]
        yield Check(name="runs", passed=not done.failure, detail=done.failure or TITLES[done.runtime])
        if done.got is None or done.failure:
            return
        assert self.want is not None, "the reference ran if any artifact did"
        want, got, sequences, kind = self.want, done.got, self.sequences.all, artifact.kind
        if done.rounding != "F32":
            rounding = logits.distance(want, "F32", want, done.rounding, sequences)
            facts["rounding max abs"], facts["rounding mean KL"] = rounding.max_abs, rounding.kl
        found = {way: logits.distance(want, done.rounding, got, way, sequences) for way in done.ways[1:]}
        many = self.sequences.many if done.base else sequences
        whole = logits.distance(want, done.rounding, got, "full", many)
        found["full"] = whole.at(slice(sum(map(len, sequences))))
        if done.rounding != "F32" and self.reference.computes:
            found["rounding"] = rounding
        facts |= {"max abs": found["full"].max_abs, "mean KL": found["full"].kl}
        facts["trained tokens run"] = f"{len(self.sequences.covered)} of {len(self.reference.trained_ids)}"
        done.profile = profile(found["full"], self.sequences, want, done.rounding, got)
        if done.base is not None:
            yield from self._check_excess(done, whole)
            yield from logits.check_alike(got, done.ways, sequences)
        else:
            check = {"hf": logits.check_hf, "onnx": logits.check_onnx, "gguf": logits.check_gguf}[artifact.format]
            yield from check(found, kind)
        if greedy_must_match(artifact):
            own = self._continuations([done])[done.rounding]
            judged = list(self._continuations(self.runs.values())[done.rounding])
            yield logits.check_greedy(want, got, done.rounding, [judged.index(pair) for pair in own])
        if done.loader is not None:
            yield self._check_loader(done, found)
        if done.runtime == "llamacpp":
            yield logits.check_tokens(self.sequences.text_ids, got, self.sequences.texts)

    def _check_loader(self, done: Run, found: Mapping[str, Distance]) -> Check:
        assert self.want is not None, "the reference ran if any artifact did"
        assert done.got is not None
        assert done.loader is not None
        if done.artifact.quantised:
            return gguf_loader.check_quantised(gguf_loader.distance(done.got, "full", done.loader, self._shown()))
        rounding = found["rounding"].max_abs if "rounding" in found else 0.0
        return gguf_loader.check_exact(
            gguf_loader.distance(self.want, done.rounding, done.loader, self._shown()), rounding
        )

    def _check_excess(self, done: Run, tuned: Distance) -> Iterator[Check]:
        assert self.want is not None, "the reference ran if any artifact did"
        assert done.got is not None
        assert done.base is not None
        # New tokens have no column in the base: both sides are compared over the base's vocabulary.
        columns = self.reference.base_vocab
        base = logits.distance(self.want, "base", done.base, "full", self._base_sequences(), columns)
        if self.reference.vocab != columns:
            tuned = logits.distance(self.want, done.rounding, done.got, "full", self.sequences.many, columns)
        if done.kept:
            yield excess.check_alone(tuned, done.artifact.types)
            reason = (
                f"{len(done.kept)} tuned tensors, such as {done.kept[0]}, cannot be made the base's in this storage"
            )
            done.skipped.append(Skip("excess KL", f"{reason}: there is no base so stored to compare with"))
            return
        quantised = done.artifact.quantised
        if quantised:
            yield excess.check_base(base, done.artifact.types)
        lengths = [len(ids) for ids in self.sequences.many]
        if not self.reference.routed:
            yield excess.check_excess(tuned, base, lengths, self._varied())
            return
        most = None if quantised else GGUF_KL[done.artifact.kind]
        yield from excess.check_routed(tuned, base, lengths, self._varied(), most)

    def _varied(self) -> int:
        """Positions of sequences that the base computes in another way: it has other inner weights or other inputs."""
        trained = set(self.reference.trained_ids)
        computes = self.reference.computes
        return sum(len(ids) for ids in self.sequences.many if computes or trained.intersection(ids))

    def _is_mean(self, done: Run) -> bool:
        """Whether what is judged is a mean over positions, beside that of the base so stored."""
        return done.artifact.quantised or self._jumps(done)

    def _jumps(self, done: Run) -> bool:
        """llama.cpp rounds activations to a 16-bit file's type, which may send a token to another expert."""
        return self.reference.routed and done.artifact.kind in HALVES and done.runtime == "llamacpp"

    def _greedy_prompts(self) -> list[list[int]]:
        """One control text, and one with trained tokens if there are any, equally long: a batch without padding."""
        prompts = [self.sequences.control[0], *self.sequences.trained[:1]]
        length = min(map(len, prompts))
        return [prompt[:length] for prompt in prompts]

    def _greedy_tokens(self) -> int:
        """As many as the model has positions for after a prompt."""
        length = len(self._greedy_prompts()[0])
        room = (self.reference.max_positions or length + GREEDY_TOKENS) - length
        return max(1, min(GREEDY_TOKENS, room))

    def _base_sequences(self) -> list[list[int]]:
        """The same sequences, position by position: a known token stands for the new ones, which the base has not."""
        limit, known = self.reference.base_vocab, self.sequences.control[0][0]
        return [[token if token < limit else known for token in ids] for ids in self.sequences.many]

    def _continuations(self, runs: Any) -> dict[str, dict[tuple[tuple[int, ...], tuple[int, ...]], None]]:
        """Per rounding, the distinct (prompt, chosen tokens) that the reference has to judge, in order."""
        wanted: dict[str, dict[tuple[tuple[int, ...], tuple[int, ...]], None]] = {}
        for one in runs:
            if one.got is not None and greedy_must_match(one.artifact):
                for number, prompt in enumerate(self._greedy_prompts()):
                    chosen = tuple(one.got(f"greedy.{number}").tolist())
                    wanted.setdefault(one.rounding, {})[tuple(prompt), chosen] = None
        return wanted
