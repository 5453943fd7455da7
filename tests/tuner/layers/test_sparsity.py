"""Allocations of a training step, counted at the dispatcher: neither a (V, H) tensor nor a second set of logits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

import tuner
from tests.tuner.models import HIDDEN, IDS, VOCAB, build

BATCH, LENGTH = 2, 7


class Allocations(TorchDispatchMode):
    """Counts fresh storages by the number of elements of the tensor that an operator returned."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.sizes: Counter[int] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        old = {leaf.untyped_storage().data_ptr() for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and leaf.untyped_storage().data_ptr() not in old:
                self.sizes[leaf.numel()] += 1
        return out


def step(model: Any) -> Counter[int]:
    x = torch.randint(0, VOCAB, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))
    seen = Allocations()
    with seen:
        model(input_ids=x, labels=x).loss.backward()
    return seen.sizes


def frozen(model: PreTrainedModel, config: Any) -> PreTrainedModel:
    """The floor: no parameter is trained, but gradients flow to the input."""
    model.requires_grad_(False)
    model.get_input_embeddings().register_forward_hook(lambda module, args, output: output.requires_grad_())
    return model


def allocations(wrap: Callable[[Any, Any], Any], *, tied: bool) -> Counter[int]:
    config = tuner.TrainableTokensConfig(token_indices=IDS, train_head=not tied)
    return step(wrap(build("llama", tied=tied), config))


@pytest.mark.parametrize("tied", [True, False])
def test_no_tensor_of_the_matrix_size_is_made(tied: bool) -> None:
    assert allocations(tuner.get_peft_model, tied=tied)[VOCAB * HIDDEN] == 0


@pytest.mark.parametrize("tied", [True, False])
def test_logits_are_not_copied(tied: bool) -> None:
    logits = BATCH * LENGTH * VOCAB
    assert allocations(tuner.get_peft_model, tied=tied)[logits] == allocations(frozen, tied=tied)[logits]


def test_the_count_includes_the_copies_of_stock_peft() -> None:
    assert allocations(peft.get_peft_model, tied=True)[VOCAB * HIDDEN] > 0
