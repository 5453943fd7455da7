"""Checks that run the model: the artifact's logits and greedy tokens against the reference's."""

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

#: How an ONNX runtime computed the sequences → the name of the check.
_ONNX_WAYS: Final = {
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
    """Distance over the logits of ``sequences``; ``columns`` compares only the first tokens of the vocabulary."""
    found = []
    for number, ids in enumerate(sequences):
        one, other = want(f"{want_name}.{number}"), got(f"{got_name}.{number}")
        found.append(compare(one[:, :columns], other[:, :columns], ids))
    return pool(found)


def check_hf(found: Mapping[str, Distance], kind: str) -> Iterator[Check]:
    """The merged checkpoint computes what the unmerged adapter computes, rounded as the checkpoint is."""
    limit = HF_MAX_ABS
    if "rounding" in found:
        limit = max(limit, HF_ROUNDING_SHARE * found["rounding"].max_abs)
    yield _check_max_abs("logits", found["full"], limit)


def check_onnx(found: Mapping[str, Distance], kind: str) -> Iterator[Check]:
    """The same logits in one pass, and if the graph can, token by token with the cache, and in a padded batch."""
    for way in (one for one in _ONNX_WAYS if one in found):
        name = _ONNX_WAYS[way]
        if kind == "F32":
            yield _check_max_abs(name, found[way], ONNX_MAX_ABS)
        else:
            detail = f"{found[way].positions} positions, max abs {found[way].max_abs:.2g}"
            yield Check.at_most(f"{name}, mean KL", found[way].kl, ONNX_HALF_KL, detail)


def check_alike(got: Reader, ways: Sequence[str], sequences: Sequence[Sequence[int]]) -> Iterator[Check]:
    """A quantised graph computes the same token by token, and in a padded batch, as in one pass."""
    first, *others = ways
    for way in others:
        found = distance(got, first, got, way, sequences)
        detail = f"mean KL from one full pass, {found.positions} positions"
        yield Check.at_most(_ONNX_WAYS[way], found.kl, ONNX_MODES_KL, detail)


def check_gguf(found: Mapping[str, Distance], kind: str) -> Iterator[Check]:
    """Mean KL by storage type; the favourite token at every position where nothing but the order of sums differs."""
    full = found["full"]
    yield Check.at_most("mean KL", full.kl, GGUF_KL[kind], f"{full.positions} positions, max abs {full.max_abs:.2g}")
    if kind == "F32":
        yield Check.at_most("top-1 misses", full.misses, 0, f"{full.positions} positions")


def _check_max_abs(name: str, found: Distance, limit: float) -> Check:
    return Check.at_most(name, found.max_abs, limit, f"max abs over {found.positions} positions")


def check_greedy(want: Reader, got: Reader, kind: str, continuations: Sequence[int]) -> Check:
    """Every token that the artifact chose greedily is the reference's best one too, or as good within the noise.

    ``continuations[n]`` is the reference's number for the tokens that the artifact chose after prompt n.
    """
    total = undecided = 0
    for number, continuation in enumerate(continuations):
        ours, theirs = want(f"{kind}.best.{continuation}"), got(f"greedy.{number}")
        behind = want(f"{kind}.behind.{continuation}")
        total += len(ours)
        undecided += int((ours != theirs).sum())
        if (wrong := np.flatnonzero((ours != theirs) & ~(behind <= GREEDY_MARGIN))).size:
            step = wrong[0]
            detail = f"prompt {number}, step {step}: expected token {ours[step]}, found {theirs[step]}"
            return Check(name="greedy tokens", passed=False, detail=f"{detail}, {behind[step]:.3g} behind")
    return Check(name="greedy tokens", passed=True, detail=f"{total - undecided} of {total} identical")


def check_tokens(want: Sequence[Sequence[int]], got: Reader, texts: Sequence[str]) -> Check:
    """llama.cpp cuts the texts into the same tokens as the tokenizer of the tuned model."""
    for number, text in enumerate(texts):
        if list(want[number]) != got(f"tokens.{number}").tolist():
            detail = f"{text[:40]!r}: expected {list(want[number])[:12]}, found {got(f'tokens.{number}').tolist()[:12]}"
            return Check(name="tokenizer", passed=False, detail=detail)
    return Check(name="tokenizer", passed=True, detail=f"{len(texts)} texts")
