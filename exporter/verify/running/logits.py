"""Compare an artifact's logits and greedily decoded tokens with the results of the reference model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Final

import numpy as np

from exporter.tensors import Array
from exporter.verify.report import Check
from exporter.verify.running.metrics import Distance, compare, pool
from exporter.verify.tolerances import (
    GGUF_KL,
    GREEDY_MARGIN,
    HF_MAX_ABS,
    HF_ROUNDING_SHARE,
    ONNX_HALF_KL,
    ONNX_MAX_ABS,
    ONNX_MODES_KL,
)

Reader = Callable[[str], Array]

#: Run mode of an ONNX graph → name of the check.
_ONNX_MODES: Final = {
    "full": "logits",
    "cached": "logits with cache",
    "padded": "logits left-padded",
    "right-padded": "logits right-padded",
}


def distance(
    want: Reader,
    want_name: str,
    got: Reader,
    got_name: str,
    sequences: Sequence[Sequence[int]],
    columns: int | None = None,
) -> Distance:
    """Return the distance of the logits ``got`` from the logits ``want`` over all ``sequences``.

    columns: number of vocabulary entries to compare, or None to compare all entries.
    """
    distances = []
    for number, ids in enumerate(sequences):
        want_logits, got_logits = want(f"{want_name}.{number}"), got(f"{got_name}.{number}")
        distances.append(compare(want_logits[:, :columns], got_logits[:, :columns], ids))
    return pool(distances)


def check_hf(distances: Mapping[str, Distance], storage: str) -> Iterator[Check]:
    """Check that a merged checkpoint has the same logits as the reference model with equally rounded weights."""
    limit = HF_MAX_ABS
    if "rounding" in distances:
        limit = max(limit, HF_ROUNDING_SHARE * distances["rounding"].max_abs)
    yield _check_max_abs("logits", distances["full"], limit)


def check_onnx(distances: Mapping[str, Distance], storage: str) -> Iterator[Check]:
    """Compare the logits of an ONNX graph in each run mode (full, cached and padded) with the reference logits."""
    for mode in (known for known in _ONNX_MODES if known in distances):
        name = _ONNX_MODES[mode]
        if storage == "F32":
            yield _check_max_abs(name, distances[mode], ONNX_MAX_ABS)
        else:
            positions, max_abs = distances[mode].positions, distances[mode].max_abs
            detail = (
                f"mean KL from the reference over {positions} positions, "
                f"maximum absolute logit difference {max_abs:.2g}"
            )
            yield Check.at_most(f"{name}, mean KL", distances[mode].kl, ONNX_HALF_KL, detail)


def check_modes(got: Reader, modes: Sequence[str], sequences: Sequence[Sequence[int]]) -> Iterator[Check]:
    """Check that a quantised ONNX graph computes the same logits in full, cached and padded runs."""
    first, *others = modes
    for mode in others:
        deviation = distance(got, first, got, mode, sequences)
        detail = f"mean KL from the logits of the full pass over {deviation.positions} positions"
        yield Check.at_most(_ONNX_MODES[mode], deviation.kl, ONNX_MODES_KL, detail)


def check_gguf(distances: Mapping[str, Distance], storage: str) -> Iterator[Check]:
    """Check that the mean KL of a GGUF file from the reference is within the limit for the file's tensor type.

    For a float32 GGUF file, the top-1 token must also equal the reference's top-1 token at every position.
    """
    full = distances["full"]
    detail = (
        f"mean KL from the reference over {full.positions} positions, "
        f"maximum absolute logit difference {full.max_abs:.2g}"
    )
    yield Check.at_most("mean KL", full.kl, GGUF_KL[storage], detail)
    if storage == "F32":
        yield Check.at_most(
            "top-1 misses", full.misses, 0, f"positions with a different top-1 token, out of {full.positions} positions"
        )


def _check_max_abs(name: str, distance: Distance, limit: float) -> Check:
    detail = f"maximum absolute logit difference over {distance.positions} positions"
    return Check.at_most(name, distance.max_abs, limit, detail)


def check_greedy(want: Reader, got: Reader, rounding: str, continuations: Sequence[int]) -> Check:
    """Check that each token that the artifact decoded greedily has the highest logit in the reference, up to noise.

    continuations: for each prompt, the number N of the reference arrays ``best.N`` and ``behind.N`` that score the
    artifact's tokens.
    """
    total = undecided = 0
    for number, continuation in enumerate(continuations):
        ours, theirs = want(f"{rounding}.best.{continuation}"), got(f"greedy.{number}")
        behind = want(f"{rounding}.behind.{continuation}")
        total += len(ours)
        undecided += int((ours != theirs).sum())
        if (wrong := np.flatnonzero((ours != theirs) & ~(behind <= GREEDY_MARGIN))).size:
            step = wrong[0]
            detail = (
                f"prompt {number}, step {step}: expected token {ours[step]}, found token {theirs[step]}, "
                f"whose logit is {behind[step]:.3g} lower"
            )
            return Check(name="greedy tokens", passed=False, detail=detail)
    return Check(
        name="greedy tokens",
        passed=True,
        detail=f"{total - undecided} of {total} greedy tokens equal the reference's tokens",
    )


def check_tokens(want: Sequence[Sequence[int]], got: Reader, texts: Sequence[str]) -> Check:
    """Check that llama.cpp and the tuned model's tokenizer encode each text to the same tokens."""
    for number, text in enumerate(texts):
        if list(want[number]) != got(f"tokens.{number}").tolist():
            found_ids = got(f"tokens.{number}").tolist()
            detail = f"text {text[:40]!r}: expected token ids {list(want[number])[:12]}, found {found_ids[:12]}"
            return Check(name="tokenizer", passed=False, detail=detail)
    return Check(name="tokenizer", passed=True, detail=f"llama.cpp tokenises {len(texts)} texts as expected")
