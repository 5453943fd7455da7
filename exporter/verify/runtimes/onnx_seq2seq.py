"""An encoder and its decoder in ONNX Runtime on the CPU, fed as Optimum and transformers.js feed them.

A sequence stands on both sides: one pass over all of it, token by token with the cache, and a padded batch. Padding is
on the right, as tokenizers of encoder-decoders have it: the encoder's is masked, the decoder's comes after what counts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from exporter.errors import BadInput
from exporter.sources.onnx_folder import encoder_of
from exporter.tensors import Array
from exporter.verify.runtimes.job import serve
from exporter.verify.runtimes.onnx_runtime import Session

_USES_CACHE = "use_cache_branch"


class Pair:
    """Both models, loaded."""

    def __init__(self, path: Path) -> None:
        """``path``: the decoder. Raises BadInput without its encoder; ONNX Runtime's own errors say the rest."""
        beside = encoder_of(path)
        if beside is None:
            raise BadInput(f"{path}: expected a decoder with an encoder beside it, found a model of another name")
        self.encoder, self.decoder = Session(beside), Session(path)

    def encode(self, ids: Array, mask: Array) -> dict[str, Array]:
        """What every call of the decoder needs of the encoder. ids, mask: (batch, encoder's tokens)."""
        (states,) = self.encoder.session.run(["last_hidden_state"], {"input_ids": ids, "attention_mask": mask})
        return {"encoder_hidden_states": np.asarray(states), "encoder_attention_mask": mask}

    def decode(
        self, ids: Array, encoded: Mapping[str, Array], cache: Mapping[str, Array] | None
    ) -> tuple[Array, dict[str, Array]]:
        """(logits (batch, positions, vocabulary), the new cache). cache: None at the first call."""
        given = self.decoder.empty_cache(len(ids)) if cache is None else cache
        return self.decoder.feed({"input_ids": ids, **encoded, _USES_CACHE: np.array([cache is not None]), **given})


def compute(job: Mapping[str, Any], save: Callable[[str, Array], None]) -> None:
    """Job: artifact (the decoder's model file), sequences, greedy_prompts, greedy_tokens, start_token.

    Saves per sequence ``full.N``, ``cached.N`` (token by token) and ``padded.N`` (all in one padded batch), and
    ``greedy.N``, which answers the prompt from the start token.
    """
    pair = Pair(Path(job["artifact"]))
    for number, ids in enumerate(job["sequences"]):
        encoded, tokens = _encoded(pair, ids), np.array([ids], np.int64)
        save(f"full.{number}", pair.decode(tokens, encoded, None)[0][0])
        save(f"cached.{number}", _cached(pair, tokens, encoded))
    for number, logits in enumerate(_padded(pair, job["sequences"])):
        save(f"padded.{number}", logits)
    for number, prompt in enumerate(job["greedy_prompts"]):
        save(f"greedy.{number}", _answer(pair, prompt, job["start_token"], job["greedy_tokens"]))


def _encoded(pair: Pair, ids: Sequence[int]) -> dict[str, Array]:
    tokens = np.array([list(ids)], np.int64)
    return pair.encode(tokens, np.ones_like(tokens))


def _cached(pair: Pair, tokens: Array, encoded: Mapping[str, Array]) -> Array:
    cache, rows = None, []
    for place in range(tokens.shape[1]):
        logits, cache = pair.decode(tokens[:, place : place + 1], encoded, cache)
        rows.append(logits[0, -1])
    return np.stack(rows)


def _padded(pair: Pair, sequences: Sequence[Sequence[int]]) -> list[Array]:
    ids = np.zeros((len(sequences), max(map(len, sequences))), np.int64)
    mask = np.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence)] = sequence
        mask[row, : len(sequence)] = 1
    logits, _ = pair.decode(ids, pair.encode(ids, mask), None)
    return [logits[row, : len(sequence)] for row, sequence in enumerate(sequences)]


def _answer(pair: Pair, prompt: Sequence[int], start: int, tokens: int) -> Array:
    encoded, cache = _encoded(pair, prompt), None
    chosen = [start]
    for _ in range(tokens):
        logits, cache = pair.decode(np.array([chosen[-1:]], np.int64), encoded, cache)
        chosen.append(int(logits[0, -1].argmax()))
    return np.array(chosen[1:], np.int64)


if __name__ == "__main__":
    serve(compute)
