"""Every numeric check passes for a sound case and fails for a fault just beyond its limit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from exporter.errors import NotEquivalent
from exporter.tensors import Array
from exporter.verify.report import Check, Report, require_passed
from exporter.verify.running import logits
from exporter.verify.running.metrics import Distance, compare
from exporter.verify.tolerances import (
    GGUF_KL,
    GREEDY_MARGIN,
    HF_MAX_ABS,
    HF_ROUNDING_SHARE,
    ONNX_HALF_KL,
    ONNX_MAX_ABS,
    ONNX_MODES_KL,
)

REFERENCE = np.random.default_rng(0).normal(0, 3, (12, 64)).astype(np.float32)


def reader(**arrays: Array) -> Callable[[str], Array]:
    return lambda name: arrays[name.replace(".", "_")]


def distances(logits_by_mode: dict[str, Array]) -> dict[str, Distance]:
    return {mode: compare(REFERENCE, got) for mode, got in logits_by_mode.items()}


def shifted(by: float) -> Array:
    """The reference with one logit at one position moved."""
    moved = REFERENCE.astype(np.float64)
    moved[5, 7] += by
    return moved


@pytest.mark.parametrize(
    ("check", "limit", "mode"),
    [
        (logits.check_hf, HF_MAX_ABS, "full"),
        (logits.check_onnx, ONNX_MAX_ABS, "full"),
        (logits.check_onnx, ONNX_MAX_ABS, "cached"),
        (logits.check_onnx, ONNX_MAX_ABS, "padded"),
    ],
)
def test_the_max_abs_check_fails_just_beyond_its_limit(
    check: Callable[[dict[str, Distance], str], Iterator[Check]], limit: float, mode: str
) -> None:
    sound = {name: shifted(0.8 * limit) for name in ("full", "cached", "padded")}
    assert all(outcome.passed for outcome in check(distances(sound), "F32"))
    broken = list(check(distances(sound | {mode: shifted(1.2 * limit)}), "F32"))
    assert [outcome.passed for outcome in broken].count(False) == 1


def test_a_sum_stored_in_16_bits_may_differ_by_a_share_of_what_rounding_does() -> None:
    rounding = {"rounding": compare(REFERENCE, shifted(1e-2))}
    limit = 1e-2 * HF_ROUNDING_SHARE
    assert all(
        outcome.passed for outcome in logits.check_hf(distances({"full": shifted(0.9 * limit)}) | rounding, "BF16")
    )
    assert not any(
        outcome.passed for outcome in logits.check_hf(distances({"full": shifted(1.1 * limit)}) | rounding, "BF16")
    )


def distorted(limit: float) -> Array:
    """Scale the logits until the mean KL is about ``limit``."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if compare(REFERENCE, REFERENCE * (1.0 + middle)).kl < limit else (low, middle)
    return REFERENCE * (1.0 + low)


@pytest.mark.parametrize("storage", GGUF_KL)
def test_the_kl_check_fails_beyond_its_limit(storage: str) -> None:
    assert next(logits.check_gguf(distances({"full": distorted(0.9 * GGUF_KL[storage])}), storage)).passed
    assert not next(logits.check_gguf(distances({"full": distorted(1.1 * GGUF_KL[storage])}), storage)).passed


@pytest.mark.parametrize("mode", ["full", "cached", "padded"])
def test_the_half_precision_check_fails_beyond_its_limit(mode: str) -> None:
    sound = dict.fromkeys(("full", "cached", "padded"), distorted(0.9 * ONNX_HALF_KL))
    assert all(outcome.passed for outcome in logits.check_onnx(distances(sound), "F16"))
    broken = list(logits.check_onnx(distances(sound | {mode: distorted(1.1 * ONNX_HALF_KL)}), "F16"))
    assert [outcome.passed for outcome in broken].count(False) == 1


@pytest.mark.parametrize("mode", ["cached", "padded"])
def test_the_check_of_run_modes_of_a_quantised_graph_fails_beyond_its_limit(mode: str) -> None:
    def checks(factor: float) -> list[bool]:
        modes = dict.fromkeys(("full_0", "cached_0", "padded_0"), REFERENCE)
        got = reader(**modes | {f"{mode}_0": distorted(factor * ONNX_MODES_KL)})
        return [
            outcome.passed for outcome in logits.check_modes(got, ("full", "cached", "padded"), [[0] * len(REFERENCE)])
        ]

    assert checks(0.9) == [True, True]
    assert checks(1.1).count(False) == 1


def test_another_best_token_fails_the_top_1_check() -> None:
    swapped = REFERENCE.copy()
    best, second = np.argsort(swapped[3])[[-1, -2]]
    swapped[3, [best, second]] = swapped[3, [second, best]]
    checks = list(logits.check_gguf(distances({"full": swapped}), "F32"))
    assert not next(outcome for outcome in checks if outcome.name == "top-1 misses").passed


def test_equal_best_logits_have_no_order() -> None:
    tied = REFERENCE.copy()
    tied[0, 9] = tied[0].max()
    lower = tied.astype(np.float64)
    lower[0, int(tied[0].argmax())] -= 1e-9
    assert compare(tied, lower).misses == 0


@pytest.mark.parametrize(
    ("behind", "passes"), [(0.9 * GREEDY_MARGIN, True), (1.1 * GREEDY_MARGIN, False), (np.nan, False)]
)
def test_another_token_passes_only_where_the_reference_is_undecided(behind: float, passes: bool) -> None:
    want = reader(F32_best_0=np.array([4, 5, 6]), F32_behind_0=np.array([0, behind, 0]))
    got = reader(greedy_0=np.array([4, 8, 6]))
    assert logits.check_greedy(want, got, "F32", [0]).passed is passes


def test_other_tokens_fail_the_tokenizer_check() -> None:
    assert logits.check_tokens([[1, 2]], reader(tokens_0=np.array([1, 2])), ["ab"]).passed
    assert not logits.check_tokens([[1, 2]], reader(tokens_0=np.array([3])), ["ab"]).passed


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_value_that_is_no_number_fails_every_check(value: float) -> None:
    broken = REFERENCE.copy()
    broken[2, 2] = value
    broken_distances = distances({"full": broken, "cached": broken, "padded": broken})
    for check in (logits.check_hf, logits.check_onnx, logits.check_gguf):
        assert not any(outcome.passed for outcome in check(broken_distances, "F32"))


def test_kl_is_the_textbook_value() -> None:
    want, got = np.log([[0.5, 0.5]]), np.log([[0.25, 0.75]])
    assert compare(want, got).kl == pytest.approx(0.5 * np.log(2) + 0.5 * np.log(2 / 3))


def test_a_report_without_checks_is_no_proof() -> None:
    report = Report(artifact=Path("x"), format="hf", level="full", checks=[], facts={})
    with pytest.raises(NotEquivalent, match="no check was run"):
        require_passed([report])


def test_a_verdict_names_the_gate_the_limit_and_the_value() -> None:
    checks = [Check.at_most("logits", 0.5, 1e-5, "max abs"), Check(name="tie", passed=False)]
    report = Report(artifact=Path("out.gguf"), format="gguf", level="full", checks=checks, facts={})
    assert report.verdict() == (
        "out.gguf: not equivalent: logits: expected at most 1e-05, found 0.5: max abs (and 1 more)"
    )
