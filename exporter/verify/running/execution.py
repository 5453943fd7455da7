"""Run the artifacts and the reference model in separate processes, and compare the resulting arrays."""

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

#: Function that is called with each line of progress.
Say = Callable[[str], None]


@dataclass
class ArtifactResults:
    """The result arrays of all processes that ran one artifact or the artifact's quantised base.

    rounding: name of the rounding, such as BF16, that is applied to the reference model before the comparison with the
    artifact. modes: the artifact's run modes, such as cached. arrays: logits and tokens of the artifact. base_arrays:
    logits of the untuned base, quantised in the same way as the artifact. loader_arrays: logits and tokens of the
    artifact, computed by the GGUF loader of transformers. failure: error message of the runtime, or "" if the run
    succeeded. not_restored: names of tuned tensors that could not be replaced by the base's tensors. If
    ``not_restored`` is not empty, ``base_arrays`` were computed from a mixture of tuned and untuned tensors, and must
    not be used.
    """

    artifact: Artifact
    runtime: str
    rounding: str
    modes: Sequence[str] = ("full",)
    arrays: logits.Reader | None = None
    base_arrays: logits.Reader | None = None
    loader_arrays: logits.Reader | None = None
    failure: str = ""
    not_restored: Sequence[str] = ()
    profile: Profile | None = None
    skipped: list[Skip] = field(default_factory=list)


@dataclass
class Execution:
    """Starts the processes that run the artifacts and the reference model, and compares the results.

    The result arrays of the processes are stored in ``folder``, and each array is read from disk when needed.

    required: names of runtimes, each of which must run all artifacts of the formats that the runtime supports.
    """

    reference: Reference
    sequences: Sequences
    folder: Path
    say: Say
    required: Collection[str] = ()
    runs: dict[Path, ArtifactResults] = field(default_factory=dict)
    reference_arrays: logits.Reader | None = None

    def run(self, artifact: Artifact) -> None:
        """Run ``artifact`` in the runtime for its format.

        If ``artifact`` is quantised, a copy with the values of the untuned base is also run. Raises MissingDependency
        if no installed runtime can run ``artifact``.
        """
        runtime = choose_runtime(artifact, self.reference)
        name = "onnxruntime" if artifact.format == "onnx" else "transformers"
        if runtime != "llamacpp":
            require([name], needed_for=f"running {artifact.path.name}")
        folder = self.folder / str(len(self.runs))
        state = self.runs[artifact.path] = ArtifactResults(
            artifact, runtime, reference_rounding(artifact, self.reference)
        )
        if artifact.format == "onnx":
            state.modes, state.skipped = graph_modes(artifact)
        if runtime == "gguf_in_transformers":
            reason = missing("llama.cpp", needed_for="running a GGUF file in llama.cpp")
            state.skipped.append(Skip("llama.cpp", f"{reason}; transformers ran the file instead of llama.cpp"))
        job = {
            "artifact": str(artifact.path),
            "sequences": self.sequences.all,
            "more": self.sequences.more if self._uses_mean(state) else [],
            # Greedy decoding runs only if the chosen tokens must match exactly.
            "greedy_prompts": self._greedy_prompts() if greedy_must_match(artifact) else [],
            "greedy_tokens": self._greedy_tokens(),
            "texts": self.sequences.texts,
            "modes": state.modes,
            "cache_shape": self.reference.cache_shape,
            "start_token": self.reference.start_token,
        }
        started = time.perf_counter()
        try:
            self.say(f"running {artifact.path.name} in {TITLES[runtime]}")
            state.arrays = run(runtime, job, folder)
            if self._uses_mean(state):
                copy, state.not_restored = write_base(artifact, self.reference, folder / "copy")
                base_sequences = {"sequences": self._base_sequences(), "more": [], "greedy_prompts": []}
                base_job = base_sequences | {"texts": [], "modes": ["full"]}
                self.say(f"running the base, quantised like {artifact.path.name}")
                state.base_arrays = run(runtime, job | {"artifact": str(copy)} | base_job, folder / "base")
                shutil.rmtree(folder / "copy")
            if runtime == "llamacpp":
                self._run_loader(state, job | {"more": [], "greedy_prompts": []}, folder)
        except RuntimeFailed as exc:
            state.failure = str(exc)
        self.say(f"running {artifact.path.name} took {time.perf_counter() - started:.1f} s")

    def _run_loader(self, state: ArtifactResults, job: dict[str, Any], folder: Path) -> None:
        """Run a GGUF file in the GGUF loader of transformers, or record why the loader cannot run the file."""
        reason = gguf_loader.unsupported_reason(self.reference)
        if not installed(gguf_loader.NAME):
            reason = str(missing(gguf_loader.NAME, needed_for="reading a GGUF file in transformers"))
        elif len(state.artifact.files) > 1:
            reason = "the GGUF loader of transformers cannot read split GGUF files"
        elif gguf_loader.NAME not in self.required and any(earlier.loader_arrays for earlier in self.runs.values()):
            reason = f"transformers runs only one GGUF per model; use --require {gguf_loader.NAME} to run every GGUF"
        if reason:
            state.skipped.append(Skip(gguf_loader.NAME, reason))
            return
        self.say(f"running {state.artifact.path.name} in the GGUF loader of transformers")
        sequences = [self.sequences.all[number] for number in self._loader_sequences()]
        state.loader_arrays = run("gguf_in_transformers", job | {"sequences": sequences}, folder / "loader")

    def _loader_sequences(self) -> list[int]:
        return gguf_loader.sequences_to_run(self.sequences.all, self.sequences.trained)

    def run_reference(self) -> None:
        """Run the reference model in one process, once for each rounding that the comparison with an artifact requires.

        The reference model also computes scores of the tokens that the artifacts chose by greedy decoding.
        """
        ran = [state for state in self.runs.values() if state.arrays is not None]
        if not ran:
            return
        wanted = {state.rounding: self.sequences.all for state in ran}
        wanted |= {state.rounding: self.sequences.many for state in ran if state.base_arrays}
        job: dict[str, Any] = {
            "checkpoint": str(self.reference.checkpoint.path),
            "adapters": [str(adapter.path) for adapter in self.reference.adapters],
            "vocab": self.reference.vocab,
            "sequences": {"F32": self.sequences.all} | dict(sorted(wanted.items())),
            "base_sequences": self._base_sequences() if any(state.base_arrays for state in ran) else [],
            "continuations": {name: list(map(list, pairs)) for name, pairs in self._continuations(ran).items()},
        }
        self.say("running the reference in transformers with unmerged PEFT adapters")
        self.reference_arrays = run("reference", job, self.folder / "reference")

    def compare(self, artifact: Artifact, facts: dict[str, float | str]) -> Iterator[Check]:
        """Compare the logits and tokens of ``artifact`` with the logits and tokens of the reference model.

        If the runtime that ran the artifact failed, only a failed check is yielded.
        """
        state = self.runs[artifact.path]
        facts["runtime"] = TITLES[state.runtime]
        yield Check(name="runs", passed=not state.failure, detail=state.failure or TITLES[state.runtime])
        if state.arrays is None or state.failure:
            return
        assert self.reference_arrays is not None, "expected logits of the reference model"
        reference, arrays = self.reference_arrays, state.arrays
        sequences, storage = self.sequences.all, artifact.storage
        if state.rounding != "F32":
            rounding = logits.distance(reference, "F32", reference, state.rounding, sequences)
            facts["rounding max abs"], facts["rounding mean KL"] = rounding.max_abs, rounding.kl
        distances = {
            mode: logits.distance(reference, state.rounding, arrays, mode, sequences) for mode in state.modes[1:]
        }
        compared = self.sequences.many if state.base_arrays else sequences
        all_positions = logits.distance(reference, state.rounding, arrays, "full", compared)
        distances["full"] = all_positions.at(slice(sum(map(len, sequences))))
        if state.rounding != "F32" and self.reference.computes:
            distances["rounding"] = rounding
        facts |= {"max abs": distances["full"].max_abs, "mean KL": distances["full"].kl}
        facts["trained tokens run"] = f"{len(self.sequences.covered)} of {len(self.reference.trained_ids)}"
        state.profile = profile(distances["full"], self.sequences, reference, state.rounding, arrays)
        if state.base_arrays is not None:
            yield from self._check_excess(state, all_positions)
            yield from logits.check_modes(arrays, state.modes, sequences)
        else:
            check = {"hf": logits.check_hf, "onnx": logits.check_onnx, "gguf": logits.check_gguf}[artifact.format]
            yield from check(distances, storage)
        own = self._continuations([state]).get(state.rounding)
        if own is None and greedy_must_match(artifact):
            state.skipped.append(Skip("greedy tokens", "the model does not generate text"))
        elif own is not None:
            scored = list(self._continuations(self.runs.values())[state.rounding])
            yield logits.check_greedy(reference, arrays, state.rounding, [scored.index(pair) for pair in own])
        if state.loader_arrays is not None:
            yield self._check_loader(state, distances)
        if state.runtime == "llamacpp":
            yield logits.check_tokens(self.sequences.text_ids, arrays, self.sequences.texts)

    def _check_loader(self, state: ArtifactResults, distances: Mapping[str, Distance]) -> Check:
        assert self.reference_arrays is not None, "expected logits of the reference model"
        assert state.arrays is not None
        assert state.loader_arrays is not None
        numbers = self._loader_sequences()
        if state.artifact.quantised:
            return gguf_loader.check_quantised(gguf_loader.distance(state.arrays, "full", state.loader_arrays, numbers))
        rounding = distances["rounding"].max_abs if "rounding" in distances else 0.0
        distance = gguf_loader.distance(self.reference_arrays, state.rounding, state.loader_arrays, numbers)
        return gguf_loader.check_exact(distance, rounding)

    def _check_excess(self, state: ArtifactResults, tuned: Distance) -> Iterator[Check]:
        assert self.reference_arrays is not None, "expected logits of the reference model"
        assert state.arrays is not None
        assert state.base_arrays is not None
        # New tokens have no column in the base, so logits are compared over the base's vocabulary.
        columns = self.reference.base_vocab
        base = logits.distance(
            self.reference_arrays, "base", state.base_arrays, "full", self._base_sequences(), columns
        )
        if self.reference.vocab != columns:
            tuned = logits.distance(
                self.reference_arrays, state.rounding, state.arrays, "full", self.sequences.many, columns
            )
        if state.not_restored:
            yield excess.check_alone(tuned, state.artifact.types)
            count, first = len(state.not_restored), state.not_restored[0]
            reason = f"{count} tuned tensors, such as {first}, cannot be replaced by the base's tensors"
            state.skipped.append(Skip("excess KL", f"no equally quantised base is available, because {reason}"))
            return
        quantised = state.artifact.quantised
        if quantised:
            yield excess.check_base(base, state.artifact.types)
        lengths = [len(ids) for ids in self.sequences.many]
        if not self.reference.routed:
            yield excess.check_excess(tuned, base, lengths, self._tuned_positions())
            return
        most = None if quantised else GGUF_KL[state.artifact.storage]
        yield from excess.check_routed(tuned, base, lengths, self._tuned_positions(), most)

    def _tuned_positions(self) -> int:
        """Count the positions, over all sequences, at which tuning may change the logits of all tokens."""
        trained, computes = set(self.reference.trained_ids), self.reference.computes
        return sum(len(ids) for ids in self.sequences.many if computes or trained.intersection(ids))

    def _uses_mean(self, state: ArtifactResults) -> bool:
        """Whether the artifact's mean KL is compared with the mean KL of the equally quantised base."""
        return state.artifact.quantised or self._router_is_noisy(state)

    def _router_is_noisy(self, state: ArtifactResults) -> bool:
        """Whether rounding may change the experts to which a mixture-of-experts model routes tokens.

        Routing may change for 16-bit files, because llama.cpp rounds activations to the 16-bit type of the file.
        """
        return self.reference.routed and state.artifact.storage in HALVES and state.runtime == "llamacpp"

    def _greedy_prompts(self) -> list[list[int]]:
        """Return the prompts for greedy decoding: a control text and, if available, a text with trained tokens.

        The prompts have equal lengths, so that a batch of prompts needs no padding.
        """
        prompts = [self.sequences.control[0], *self.sequences.trained[:1]]
        length = min(map(len, prompts))
        return [prompt[:length] for prompt in prompts]

    def _greedy_tokens(self) -> int:
        """Number of tokens to decode greedily, limited so that prompt and tokens fit into the model's context."""
        length = len(self._greedy_prompts()[0])
        left = (self.reference.max_positions or length + GREEDY_TOKENS) - length
        return max(1, min(GREEDY_TOKENS, left))

    def _base_sequences(self) -> list[list[int]]:
        """Return the token sequences for running the untuned base.

        In the sequences for the untuned base, new tokens are replaced by a token of the base's vocabulary, so that the
        number of positions is unchanged.
        """
        limit, known = self.reference.base_vocab, self.sequences.control[0][0]
        return [[token if token < limit else known for token in ids] for ids in self.sequences.many]

    def _continuations(self, runs: Any) -> dict[str, dict[tuple[tuple[int, ...], tuple[int, ...]], None]]:
        """Return a dict from rounding to the distinct pairs (prompt, chosen tokens) that the reference must score."""
        wanted: dict[str, dict[tuple[tuple[int, ...], tuple[int, ...]], None]] = {}
        for state in runs:
            if state.arrays is not None and greedy_must_match(state.artifact):
                for number, prompt in enumerate(self._greedy_prompts()):
                    if chosen := tuple(state.arrays(f"greedy.{number}").tolist()):
                        wanted.setdefault(state.rounding, {})[tuple(prompt), chosen] = None
        return wanted
