"""Run an ONNX model in ONNX Runtime on the CPU.

An ONNX model is run in up to three modes: in one full pass, token by token with the KV cache, and in a padded batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnxruntime

from exporter.tensors import Array
from exporter.verify.runtimes.job import serve

_DTYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


class Session:
    """An ONNX model loaded in ONNX Runtime, which receives only the inputs that the graph declares."""

    def __init__(self, path: Path, cache_shape: Sequence[int] = (0, 0)) -> None:
        """Load the ONNX model at ``path``. Raises ONNX Runtime's own error if the model cannot be loaded.

        cache_shape: (heads, head size) of the KV cache, used for cache axes whose size is not given in the graph.
        """
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        # Waiting threads must not take CPU time from other processes, as for OpenMP.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self.inputs = {value.name: value for value in self.session.get_inputs()}
        self.outputs = [value.name for value in self.session.get_outputs()]
        self.cache_shape = cache_shape
        self.cache_inputs = [name for name in self.inputs if name.startswith("past_key_values.")]

    def empty_cache(self, batch: int) -> dict[str, Array]:
        """Create an empty KV cache for ``batch`` sequences.

        Returns a dict from input name to an array of shape (batch, kv_heads, 0, head_dim).
        """
        cache: dict[str, Array] = {}
        for name in self.cache_inputs:
            value = self.inputs[name]
            stated = zip((value.shape[1], value.shape[3]), self.cache_shape, strict=True)
            heads, width = (number if isinstance(number, int) else default for number, default in stated)
            cache[name] = np.zeros((batch, heads, 0, width), _DTYPES[value.type])
        return cache

    def run(
        self, ids: Array, mask: Array, positions: Array, cache: Mapping[str, Array]
    ) -> tuple[Array, dict[str, Array]]:
        """Run one forward pass. Returns the logits, with shape (batch, positions, vocabulary), and the new KV cache.

        mask: attention mask over the cached and the new positions.
        """
        return self.feed({"input_ids": ids, "attention_mask": mask, "position_ids": positions, **cache})

    def feed(self, feeds: Mapping[str, Array]) -> tuple[Array, dict[str, Array]]:
        """Run one forward pass. Inputs that the graph does not declare are ignored.

        feeds: input name → array.
        """
        out = self.session.run(self.outputs, {name: value for name, value in feeds.items() if name in self.inputs})
        by_name = dict(zip(self.outputs, out, strict=True))
        cache = {name: by_name[name.replace("past_key_values.", "present.")] for name in self.cache_inputs}
        return by_name["logits"].astype(np.float32), cache


def compute(job: Mapping[str, Any], save: Callable[[str, Array], None]) -> None:
    """Save the logits of sequence N in run mode MODE as ``MODE.N``, and greedy tokens after prompt N as ``greedy.N``.

    ``job`` has the keys artifact (a model file), sequences, more (additional sequences to run in the mode ``full``,
    numbered after ``sequences``), modes, cache_shape, greedy_prompts (of equal length) and greedy_tokens (number of
    tokens to choose).
    The run modes are full (one pass), cached (token by token), and padded and right-padded (all sequences in one batch,
    padded on the left or right).
    """
    session = Session(Path(job["artifact"]), job["cache_shape"])
    for mode in job["modes"]:
        more = job["more"] if mode == "full" else []
        for number, logits in enumerate(_MODES[mode](session, [*job["sequences"], *more])):
            save(f"{mode}.{number}", logits)
    if job["greedy_prompts"]:
        for number, chosen in enumerate(_greedy(session, job["greedy_prompts"], job["greedy_tokens"])):
            save(f"greedy.{number}", chosen)


def _full(session: Session, sequences: Sequence[Sequence[int]]) -> Iterator[Array]:
    for ids in sequences:
        logits, _ = session.run(*_step([ids], 0), session.empty_cache(1))
        yield np.asarray(logits[0])


def _cached(session: Session, sequences: Sequence[Sequence[int]]) -> list[Array]:
    """Compute the logits of all sequences token by token, in one batch without padding.

    A sequence is removed from the batch after its last token, so sequences are sorted by decreasing length.
    """
    order = sorted(range(len(sequences)), key=lambda number: -len(sequences[number]))
    rows: list[list[Array]] = [[] for _ in sequences]
    cache = session.empty_cache(len(sequences))
    for past in range(len(sequences[order[0]])):
        live = [number for number in order if len(sequences[number]) > past]
        cache = {name: value[: len(live)] for name, value in cache.items()}
        logits, cache = session.run(*_step([[sequences[number][past]] for number in live], past), cache)
        for number, row_logits in zip(live, logits, strict=True):
            rows[number].append(row_logits[-1])
    return [np.stack(row) for row in rows]


def _padded(session: Session, sequences: Sequence[Sequence[int]]) -> list[Array]:
    """Compute the logits of all sequences in one batch that is padded on the left.

    Logits at padding positions are dropped.
    """
    longest = max(map(len, sequences))
    ids = np.zeros((len(sequences), longest), np.int64)
    mask = np.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        ids[row, longest - len(sequence) :] = sequence
        mask[row, longest - len(sequence) :] = 1
    positions = np.maximum(mask.cumsum(axis=1) - 1, 0)
    logits, _ = session.run(ids, mask, positions, session.empty_cache(len(sequences)))
    return [logits[row, longest - len(sequence) :] for row, sequence in enumerate(sequences)]


def _right_padded(session: Session, sequences: Sequence[Sequence[int]]) -> list[Array]:
    """Compute the logits of all sequences in one batch that is padded on the right.

    Right padding is used for graphs without the input position_ids, because these graphs number the positions from the
    first column.
    """
    longest = max(map(len, sequences))
    ids = np.zeros((len(sequences), longest), np.int64)
    mask = np.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence)], mask[row, : len(sequence)] = sequence, 1
    logits, _ = session.run(ids, mask, np.zeros_like(ids), session.empty_cache(len(sequences)))
    return [logits[row, : len(sequence)] for row, sequence in enumerate(sequences)]


_MODES: Final = {"full": _full, "cached": _cached, "padded": _padded, "right-padded": _right_padded}


def _greedy(session: Session, prompts: Sequence[Sequence[int]], tokens: int) -> Array:
    """Return the tokens chosen greedily after each prompt, with shape (prompts, tokens).

    All prompts must have equal lengths, because the prompts run as one batch.
    """
    cache, ids, past = session.empty_cache(len(prompts)), [list(prompt) for prompt in prompts], 0
    chosen = []
    for _ in range(tokens):
        logits, cache = session.run(*_step(ids, past), cache)
        best = logits[:, -1].argmax(axis=-1).tolist()
        chosen.append(best)
        if session.cache_inputs:
            past, ids = past + len(ids[0]), [[token] for token in best]
        else:
            ids = [[*row_ids, token] for row_ids, token in zip(ids, best, strict=True)]
    return np.array(chosen, np.int64).T


def _step(ids: Sequence[Sequence[int]], past: int) -> tuple[Array, Array, Array]:
    """Return input_ids, attention_mask and position_ids for sequences of equal length.

    past: number of positions that are already in the KV cache.
    """
    new = np.array(ids, np.int64)
    batch, count = new.shape
    positions = np.arange(past, past + count, dtype=np.int64)
    return new, np.ones((batch, past + count), np.int64), np.tile(positions, (batch, 1))


if __name__ == "__main__":
    serve(compute)
