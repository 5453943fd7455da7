"""Twenty optimiser steps of ours and of stock PEFT from the same start, compared."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from torch import Tensor

import tuner
from tests.tuner.models import IDS, batch, build, rows_of

STEPS = 20
FP32 = 1e-6  # rounding of twenty float32 steps: the products are the same, but summed in another order
# bfloat16 keeps 8 bits: PEFT sums a row's gradient over its occurrences in bfloat16, ours in float32.
BF16 = 1e-2


def trained(wrap: Callable[..., Any], model: Any, config: Any) -> tuple[list[float], dict[str, Tensor]]:
    model = wrap(model, config)
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for step in range(STEPS):
        x = batch(step)
        if step % 4 == 0:
            x = x.remainder(30) + 20  # a batch that holds none of the tokens
        loss = model(input_ids=x, labels=x).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
    return losses, rows_of(model)


def worst(architecture: str, tied: bool, dtype: torch.dtype, *, both: bool = False) -> tuple[float, float]:
    """Return the largest difference of any loss and of any row value."""
    head = ["wte" if architecture == "gpt2" else "embed_tokens", "lm_head"]
    ours = tuner.TrainableTokensConfig(token_indices=IDS, task_type="CAUSAL_LM", train_head=both)
    theirs = peft.TrainableTokensConfig(token_indices=IDS, task_type="CAUSAL_LM", target_modules=head if both else None)
    our_losses, our_rows = trained(tuner.get_peft_model, build(architecture, tied=tied).to(dtype), ours)
    their_losses, their_rows = trained(peft.get_peft_model, build(architecture, tied=tied).to(dtype), theirs)
    assert our_rows.keys() == their_rows.keys()
    start = rows_of(tuner.get_peft_model(build(architecture, tied=tied).to(dtype), ours))
    assert all((our_rows[name] - start[name]).abs().min() > 0 for name in start), "nothing was trained"
    return (
        max(abs(a - b) for a, b in zip(our_losses, their_losses, strict=True)),
        max((our_rows[name] - their_rows[name]).abs().max().item() for name in our_rows),
    )


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("architecture", ["llama", "gemma3", "gpt2", "t5"])
def test_losses_and_rows_equal_stock_peft(architecture: str, tied: bool) -> None:
    loss, rows = worst(architecture, tied, torch.float32)
    assert loss <= FP32
    assert rows <= FP32


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "gpt2"])
def test_training_an_untied_head_too_equals_stock_peft_with_both_targets(architecture: str) -> None:
    loss, rows = worst(architecture, False, torch.float32, both=True)
    assert loss <= FP32
    assert rows <= FP32


def test_a_bfloat16_base_gives_the_same_training_within_its_rounding() -> None:
    loss, rows = worst("gemma3", True, torch.bfloat16)
    assert loss <= BF16
    assert rows <= BF16


def test_a_head_that_does_not_follow_would_be_seen() -> None:
    ours = tuner.TrainableTokensConfig(token_indices=IDS, task_type="CAUSAL_LM")

    def without_tie(model: Any, config: Any) -> Any:
        wrapped: Any = tuner.get_peft_model(model, config)
        wrapped.base_model.model.lm_head = wrapped.base_model.model.lm_head.base_layer
        return wrapped

    tied = trained(tuner.get_peft_model, build("llama"), ours)[0]
    broken = trained(without_tie, build("llama"), ours)[0]
    assert max(abs(a - b) for a, b in zip(tied, broken, strict=True)) > 100 * FP32
