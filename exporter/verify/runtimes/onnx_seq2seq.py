"""Run an ONNX encoder-decoder in ONNX Runtime on the CPU, with the input names of Optimum and transformers.js.

The encoder and the decoder receive the same sequences. An encoder-decoder is run in up to three modes: in one full
pass, token by token with the KV cache, and in a padded batch. Sequences are padded on the right, because tokenizers of
encoder-decoders pad on the right. Padding does not change the results, because the encoder masks the padding, and the
causal decoder processes the real tokens before the padding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from exporter.errors import BadInput
from exporter.sources.onnx.folder import encoder_of
from exporter.tensors import Array
from exporter.verify.runtimes.job import serve
from exporter.verify.runtimes.onnx_runtime import Session

_USES_CACHE = "use_cache_branch"


class EncoderDecoder:
    """An encoder and a decoder loaded in ONNX Runtime."""

    def __init__(self, path: Path, cache_shape: Sequence[int]) -> None:
        """Load the encoder and the decoder.

        path: path of the decoder's model file.  cache_shape: (heads, head size) of the KV cache, as for ``Session``.

        Raises BadInput if the encoder's model file is missing, or ONNX Runtime's own error if a model cannot be loaded.
        """
        encoder_path = encoder_of(path)
        if encoder_path is None:
            raise BadInput(f"{path}: expected an encoder in the folder of the decoder, found no encoder")
        self.encoder, self.decoder = Session(encoder_path, cache_shape), Session(path, cache_shape)

    def encode(self, ids: Array, mask: Array) -> dict[str, Array]:
        """Run the encoder, and return a dict from names of decoder inputs to encoder outputs.

        ids, mask: token ids and attention mask, both of shape (batch, encoder tokens).
        """
        (states,) = self.encoder.session.run(["last_hidden_state"], {"input_ids": ids, "attention_mask": mask})
        return {"encoder_hidden_states": np.asarray(states), "encoder_attention_mask": mask}

    def decode(
        self, ids: Array, encoded: Mapping[str, Array], cache: Mapping[str, Array] | None
    ) -> tuple[Array, dict[str, Array]]:
        """Run one forward pass of the decoder.

        Returns the logits, with shape (batch, positions, vocabulary), and the new KV cache.

        cache: KV cache returned by the previous call, or None at the first call.
        """
        given = self.decoder.empty_cache(len(ids)) if cache is None else cache
        return self.decoder.feed({"input_ids": ids, **encoded, _USES_CACHE: np.array([cache is not None]), **given})


def compute(job: Mapping[str, Any], save: Callable[[str, Array], None]) -> None:
    """Save the logits of sequence N in run mode MODE as ``MODE.N``, and greedy tokens after prompt N as ``greedy.N``.

    Greedy decoding starts with the decoder's start token.

    ``job`` has the keys of the job of ``onnx_runtime.compute`` and the key start_token; the key artifact is the
    decoder's model file.
    The run modes are full (one pass), cached (token by token) and right-padded (all sequences in one batch, padded on
    the right).
    """
    model = EncoderDecoder(Path(job["artifact"]), job["cache_shape"])
    for mode in job["modes"]:
        more = job["more"] if mode == "full" else []
        for number, logits in enumerate(_MODES[mode](model, [*job["sequences"], *more])):
            save(f"{mode}.{number}", logits)
    for number, prompt in enumerate(job["greedy_prompts"]):
        save(f"greedy.{number}", _answer(model, prompt, job["start_token"], job["greedy_tokens"]))


def _encoded(model: EncoderDecoder, ids: Sequence[int]) -> dict[str, Array]:
    tokens = np.array([list(ids)], np.int64)
    return model.encode(tokens, np.ones_like(tokens))


def _full(model: EncoderDecoder, sequences: Sequence[Sequence[int]]) -> Iterator[Array]:
    for ids in sequences:
        yield model.decode(np.array([ids], np.int64), _encoded(model, ids), None)[0][0]


def _cached(model: EncoderDecoder, sequences: Sequence[Sequence[int]]) -> Iterator[Array]:
    for ids in sequences:
        encoded, cache, rows = _encoded(model, ids), None, []
        for token_id in ids:
            logits, cache = model.decode(np.array([[token_id]], np.int64), encoded, cache)
            rows.append(logits[0, -1])
        yield np.stack(rows)


def _right_padded(model: EncoderDecoder, sequences: Sequence[Sequence[int]]) -> list[Array]:
    ids = np.zeros((len(sequences), max(map(len, sequences))), np.int64)
    mask = np.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence)] = sequence
        mask[row, : len(sequence)] = 1
    logits, _ = model.decode(ids, model.encode(ids, mask), None)
    return [logits[row, : len(sequence)] for row, sequence in enumerate(sequences)]


_MODES: Final = {"full": _full, "cached": _cached, "right-padded": _right_padded}


def _answer(model: EncoderDecoder, prompt: Sequence[int], start: int, tokens: int) -> Array:
    encoded, cache = _encoded(model, prompt), None
    chosen = [start]
    for _ in range(tokens):
        logits, cache = model.decode(np.array([chosen[-1:]], np.int64), encoded, cache)
        chosen.append(int(logits[0, -1].argmax()))
    return np.array(chosen[1:], np.int64)


if __name__ == "__main__":
    serve(compute)
