"""Compare ttexport's tuner with stock PEFT and with a frozen model.

The time and peak memory of one training step are measured. The frozen model is the lower bound for every method that
trains rows. The frozen model computes the same loss as the other variants, but no gradient of token rows. The variants
with ttexport's tuner and with PEFT also update trained rows with one AdamW step.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Mapping
from typing import Any

from benchmarks._cases import figures, loads
from benchmarks._measure import Measured, machine, ratio, serve, show, take_turns, write

SHAPES = ((49_152, 576), (262_144, 640))
COUNTS = (16, 1024)
VARIANTS = ("floor", "ours", "peft")
BATCH, LENGTH, LAYERS = 2, 128, 4
# The bars: ours / floor in time, ours / PEFT in time for the large vocabulary, ours - floor in memory.
OVER_FLOOR, OVER_PEFT, EXTRA_BYTES = 1.05, 0.7, 50_000_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9, help="number of measured steps of each variant")
    parser.add_argument("--warm-up", type=int, default=2, help="number of unmeasured steps before the measured steps")
    parser.add_argument(
        "--shape", type=int, choices=range(len(SHAPES)), help="index of a model shape to measure; default: all shapes"
    )
    parser.add_argument("--worker", nargs=4, metavar=("VARIANT", "V", "H", "K"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        variant, *sizes = options.worker
        return work(variant, *map(int, sizes))
    shapes = SHAPES if options.shape is None else (SHAPES[options.shape],)
    cases = [measure(*shape, k, options.warm_up, options.rounds) for shape in shapes for k in COUNTS]
    report(cases, options.rounds)
    return None


def measure(vocab: int, hidden: int, count: int, warm_up: int, rounds: int) -> dict[str, Any]:
    """Measure the three variants (frozen model, ttexport's tuner, stock PEFT) for one model shape.

    In each round, every variant runs one training step.
    """
    before = machine()["load_1_5_15_min"]
    sizes = [str(vocab), str(hidden), str(count)]
    arguments = {name: ["-m", "benchmarks.tuner", "--worker", name, *sizes] for name in VARIANTS}
    measured = take_turns(arguments, warm_up=warm_up, rounds=rounds)
    losses = [measured[name].facts["first_loss"] for name in VARIANTS]
    if max(losses) - min(losses) > 1e-4:  # float32 sums differ in order; a variant that skips work would differ by more
        raise SystemExit(f"benchmark: expected equal losses from all variants, found {losses}")
    return {
        "vocab": vocab,
        "hidden": hidden,
        "tokens": count,
        "load_before": before,
        "load_after": machine()["load_1_5_15_min"],
        "variants": {name: {**figures(m), "first_loss": m.facts["first_loss"]} for name, m in measured.items()},
        **ratios(measured),
    }


def ratios(measured: Mapping[str, Measured]) -> dict[str, Any]:
    floor, ours, theirs = (measured[name] for name in VARIANTS)
    result: dict[str, Any] = {"extra_bytes_over_floor": ours.peak_bytes - floor.peak_bytes}
    for name, other in (("floor", floor), ("peft", theirs)):
        result[f"time_over_{name}"] = ratio(ours.seconds, other.seconds)
        result[f"least_time_over_{name}"] = min(ours.seconds) / min(other.seconds)
        result[f"cpu_time_over_{name}"] = ratio(ours.cpu_seconds, other.cpu_seconds)
    return result


def report(cases: list[dict[str, Any]], rounds: int) -> None:
    columns = ["V x H, k", "floor s", "ours s", "PEFT s", "ours/floor", "ours/PEFT", "floor MB", "ours MB", "PEFT MB"]
    rows, failed = [], []
    for case in cases:
        variants = [case["variants"][name] for name in VARIANTS]
        label = f"{case['vocab']:,} x {case['hidden']}, {case['tokens']}"
        rows.append(
            [
                label,
                *(f"{variant['seconds_median']:.3f}" for variant in variants),
                f"{case['time_over_floor']:.3f}",
                f"{case['time_over_peft']:.3f}",
                *(f"{variant['peak_bytes'] / 1e6:,.0f}" for variant in variants),
            ]
        )
        large = case["vocab"] == SHAPES[-1][0]
        case["bars_met"] = {
            f"time over floor <= {OVER_FLOOR}": case["time_over_floor"] <= OVER_FLOOR,
            f"memory over floor <= {EXTRA_BYTES // 1_000_000} MB": case["extra_bytes_over_floor"] <= EXTRA_BYTES,
            **({f"time over PEFT <= {OVER_PEFT}": case["time_over_peft"] <= OVER_PEFT} if large else {}),
        }
        failed += [f"{label}: missed {bar}" for bar, met in case["bars_met"].items() if not met]
    title = (
        f"One training step of a tied llama with {LAYERS} layers, {BATCH} x {LENGTH} tokens, float32, {rounds} rounds"
    )
    notes = [loads(cases), *(failed or ["all bars met"])]
    show(title, columns, rows, notes=notes)
    path = write("tuner", {"machine": machine(), "rounds": rounds, "cases": cases})
    print(f"written: {path}")


# --- the worker: only this part imports torch ---------------------------------------------------------------------


def work(variant: str, vocab: int, hidden: int, count: int) -> None:
    import torch

    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    generator = torch.Generator().manual_seed(1)
    token_ids = torch.randperm(vocab, generator=generator)[:count].tolist()
    batch = torch.randint(0, vocab, (BATCH, LENGTH), generator=generator)
    batch[:, ::8] = torch.tensor(token_ids)[torch.randint(0, count, (LENGTH // 8,), generator=generator)]
    step = STEPS[variant](_model(vocab, hidden), token_ids)
    first: dict[str, float] = {}

    def timed() -> Mapping[str, Any]:
        loss = step(batch)
        first.setdefault("first_loss", loss)
        return {**first, "loss": loss}

    serve(timed, threads=torch.get_num_threads(), torch=torch.__version__)


def _model(vocab: int, hidden: int) -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=1536,
        num_hidden_layers=LAYERS,
        num_attention_heads=hidden // 64,
        num_key_value_heads=1,
        tie_word_embeddings=True,
        use_cache=False,
    )
    return LlamaForCausalLM(config).train()


def _floor(model: Any, token_ids: list[int]) -> Callable[[Any], float]:
    model.requires_grad_(False)
    embedding = model.get_input_embeddings()

    def step(batch: Any) -> float:
        vectors = embedding(batch).requires_grad_()
        loss = model(inputs_embeds=vectors, labels=batch).loss
        loss.backward()
        assert vectors.grad is not None
        return loss.item()  # type: ignore[no-any-return]

    return step


def _trained(wrapped: Any) -> Callable[[Any], float]:
    import torch

    optimiser = torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad], lr=1e-3)

    def step(batch: Any) -> float:
        loss = wrapped(input_ids=batch, labels=batch).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        return loss.item()  # type: ignore[no-any-return]

    return step


def _ours(model: Any, token_ids: list[int]) -> Callable[[Any], float]:
    import tuner

    return _trained(tuner.get_peft_model(model, tuner.TrainableTokensConfig(token_indices=token_ids)))


def _peft(model: Any, token_ids: list[int]) -> Callable[[Any], float]:
    import peft

    return _trained(peft.get_peft_model(model, peft.TrainableTokensConfig(token_indices=token_ids)))


STEPS: Mapping[str, Callable[[Any, list[int]], Callable[[Any], float]]] = {
    "floor": _floor,
    "ours": _ours,
    "peft": _peft,
}

if __name__ == "__main__":
    main()
