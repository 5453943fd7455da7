"""An ONNX folder in ONNX Runtime on the CPU: one full pass, token by token with the cache, and a left-padded batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from exporter.tensors import Array
from exporter.verify.runtimes.job import serve

_DTYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


class Session:
    """A loaded model; feeds only the inputs that the graph has."""

    def __init__(self, path: Path) -> None:
        """Load ``path``; ONNX Runtime's own errors say what is wrong with it."""
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self.inputs = {value.name: value for value in self.session.get_inputs()}
        self.outputs = [value.name for value in self.session.get_outputs()]
        self.cache_inputs = [name for name in self.inputs if name.startswith("past_key_values.")]

    def empty_cache(self, batch: int) -> dict[str, Array]:
        """A cache of no positions: (batch, kv_heads, 0, head_dim), by input name."""
        cache: dict[str, Array] = {}
        for name in self.cache_inputs:
            value = self.inputs[name]
            cache[name] = np.zeros((batch, value.shape[1], 0, value.shape[3]), _DTYPES[value.type])
        return cache

    def run(
        self, ids: Array, mask: Array, positions: Array, cache: Mapping[str, Array]
    ) -> tuple[Array, dict[str, Array]]:
        """(logits (batch, positions, vocabulary), the new cache). ``mask`` covers past and new positions."""
        return self.feed({"input_ids": ids, "attention_mask": mask, "position_ids": positions, **cache})

    def feed(self, feeds: Mapping[str, Array]) -> tuple[Array, dict[str, Array]]:
        """As ``run``, with everything that the graph may want by name; what it has no input for is left out."""
        out = self.session.run(self.outputs, {name: value for name, value in feeds.items() if name in self.inputs})
        by_name = dict(zip(self.outputs, out, strict=True))
        cache = {name: by_name[name.replace("past_key_values.", "present.")] for name in self.cache_inputs}
        return by_name["logits"].astype(np.float32), cache


def compute(job: Mapping[str, Any], save: Callable[[str, Array], None]) -> None:
    """Job: artifact (a model file), sequences, greedy_prompts, greedy_tokens.

    Saves per sequence ``full.N``, ``cached.N`` (token by token) and ``padded.N`` (all in one left-padded batch), and
    ``greedy.N``.
    """
    session = Session(Path(job["artifact"]))
    for number, ids in enumerate(job["sequences"]):
        save(f"full.{number}", _full(session, ids))
        save(f"cached.{number}", _cached(session, ids))
    for number, logits in enumerate(_padded(session, job["sequences"])):
        save(f"padded.{number}", logits)
    for number, prompt in enumerate(job["greedy_prompts"]):
        save(f"greedy.{number}", _greedy(session, prompt, job["greedy_tokens"]))


def _full(session: Session, ids: Sequence[int]) -> Array:
    logits, _ = session.run(*_step(ids, 0), session.empty_cache(1))
    return np.asarray(logits[0])


def _cached(session: Session, ids: Sequence[int]) -> Array:
    cache, rows = session.empty_cache(1), []
    for past, token in enumerate(ids):
        logits, cache = session.run(*_step([token], past), cache)
        rows.append(logits[0, -1])
    return np.stack(rows)


def _padded(session: Session, sequences: Sequence[Sequence[int]]) -> list[Array]:
    """Shorter sequences are padded on the left; the padding's own logits are dropped."""
    longest = max(map(len, sequences))
    ids = np.zeros((len(sequences), longest), np.int64)
    mask = np.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        ids[row, longest - len(sequence) :] = sequence
        mask[row, longest - len(sequence) :] = 1
    positions = np.maximum(mask.cumsum(axis=1) - 1, 0)
    logits, _ = session.run(ids, mask, positions, session.empty_cache(len(sequences)))
    return [logits[row, longest - len(sequence) :] for row, sequence in enumerate(sequences)]


def _greedy(session: Session, prompt: Sequence[int], tokens: int) -> Array:
    cache, ids, past = session.empty_cache(1), list(prompt), 0
    chosen = []
    for _ in range(tokens):
        logits, cache = session.run(*_step(ids, past), cache)
        past, ids = past + len(ids), [int(logits[0, -1].argmax())]
        chosen.append(ids[0])
    return np.array(chosen, np.int64)


def _step(ids: Sequence[int], past: int) -> tuple[Array, Array, Array]:
    """input_ids, attention_mask and position_ids of one unpadded sequence after ``past`` cached positions."""
    count = len(ids)
    positions = np.arange(past, past + count, dtype=np.int64)[None]
    return np.array([list(ids)], np.int64), np.ones((1, past + count), np.int64), positions


if __name__ == "__main__":
    serve(compute)
