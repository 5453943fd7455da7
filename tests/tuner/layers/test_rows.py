from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tuner.layers.layer import TrainableTokensLayer
from tuner.layers.rows import RowIndex, head_with_rows, substitute_rows

V, H, IDS = 11, 4, [7, 2, 9]
INDEX = RowIndex.build(IDS, torch.device("cpu"))


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def merged(weight: Tensor, rows: Tensor) -> Tensor:
    return weight.index_copy(0, torch.tensor(IDS), rows)


def wrapped(base: nn.Module, rows: Tensor) -> TrainableTokensLayer:
    layer = TrainableTokensLayer(base.requires_grad_(False), "default")
    layer.update_layer("default", token_indices=IDS)
    layer.trainable_tokens_delta["default"].data.copy_(rows)
    return layer


@pytest.mark.parametrize("with_bias", [False, True])
def test_head_gradients_are_the_derivatives(with_bias: bool) -> None:
    hidden, weight, rows = drawn(2, 3, H), drawn(V, H, seed=1), drawn(3, H, seed=2)

    def head(hidden: Tensor, weight: Tensor, rows: Tensor, *bias: Tensor) -> Tensor:
        return head_with_rows(hidden, weight, bias[0] if bias else None, rows, INDEX)

    inputs = [hidden, weight, rows, *([drawn(V, seed=3)] if with_bias else [])]
    assert torch.autograd.gradcheck(head, tuple(tensor.requires_grad_() for tensor in inputs))


def test_head_equals_the_head_of_the_merged_matrix() -> None:
    hidden, weight, bias, rows = drawn(2, 3, H), drawn(V, H, seed=1), drawn(V, seed=3), drawn(3, H, seed=2)
    torch.testing.assert_close(
        head_with_rows(hidden, weight, bias, rows, INDEX), F.linear(hidden, merged(weight, rows), bias)
    )


def test_substitution_gradients_are_the_derivatives() -> None:
    weight, x = drawn(V, H), torch.tensor([[7, 0, 9], [7, 1, 10]])

    def lookup(rows: Tensor) -> Tensor:
        return substitute_rows(
            F.embedding(x, weight), x, rows, INDEX, dtype=weight.dtype, scale=torch.tensor(3.0, dtype=weight.dtype)
        )

    assert torch.autograd.gradcheck(lookup, (drawn(3, H, seed=2).requires_grad_(),))


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "padding": {"padding_idx": 7},
    "padding that is not trained": {"padding_idx": 0},
    "short": {"max_norm": 1.0},
    "short in the 1-norm": {"max_norm": 1.5, "norm_type": 1.0},
    "by frequency": {"scale_grad_by_freq": True},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_embedding_equals_that_of_the_merged_matrix_with_every_option(options: dict[str, Any]) -> None:
    weight, rows, out = drawn(V, H), drawn(3, H, seed=2), drawn(2, 4, H, seed=4)
    x = torch.tensor([[7, 0, 9, 7], [2, 7, 7, 10]])
    layer = wrapped(nn.Embedding(V, H, _weight=weight.clone(), **options), rows)
    result = layer(x)
    result.backward(out)

    reference = rows.clone().requires_grad_()
    # The matrix is cloned once more because max_norm shortens it in place.
    expected = F.embedding(x, merged(weight, reference).clone(), **options)
    expected.backward(out)
    torch.testing.assert_close(result, expected)
    torch.testing.assert_close(layer.trainable_tokens_delta["default"].grad, reference.grad)
    assert torch.equal(layer.weight, weight), "the frozen matrix was written to"


def test_linear_layer_keeps_its_bias() -> None:
    base, rows, hidden = nn.Linear(H, V, dtype=torch.float64), drawn(3, H, seed=2), drawn(5, H)
    expected = F.linear(hidden, merged(base.weight.detach(), rows), base.bias.detach())
    torch.testing.assert_close(wrapped(base, rows)(hidden), expected)


def test_a_batch_without_trained_tokens_gives_zero_gradients() -> None:
    # None instead would let AdamW skip the step that stock PEFT takes with its momentum.
    layer = wrapped(nn.Embedding(V, H), drawn(3, H))
    layer(torch.tensor([0, 1])).sum().backward()
    assert torch.equal(layer.trainable_tokens_delta["default"].grad, torch.zeros(3, H))


def test_a_lookup_made_a_leaf_by_a_hook_still_trains_rows() -> None:
    base = nn.Embedding(V, H)
    base.register_forward_hook(lambda module, args, output: output.requires_grad_())
    layer = wrapped(base, drawn(3, H))
    layer(torch.tensor([7, 0])).sum().backward()
    assert layer.trainable_tokens_delta["default"].grad.abs().sum() > 0


def test_rows_are_rounded_to_the_base_dtype_before_anything_else() -> None:
    base = nn.Embedding(V, H, dtype=torch.bfloat16)
    rows = drawn(3, H, dtype=torch.float32)
    layer = wrapped(base, torch.zeros(3, H))
    layer.trainable_tokens_delta["default"] = nn.Parameter(rows)
    assert torch.equal(layer(torch.tensor(IDS)), rows.to(torch.bfloat16))
    layer(torch.tensor([7, 7, 7])).sum().backward()
    assert layer.trainable_tokens_delta["default"].grad.dtype == torch.float32


@pytest.mark.parametrize("thawed", [False, True])
def test_base_weights_get_a_gradient_only_if_the_user_thaws_them(thawed: bool) -> None:
    weight, rows, hidden = drawn(V, H, seed=1), drawn(3, H, seed=2).requires_grad_(), drawn(5, H)
    head_with_rows(hidden, weight.requires_grad_(thawed), None, rows, INDEX).sum().backward()
    assert (weight.grad is not None) == thawed
    if weight.grad is not None:
        assert torch.equal(weight.grad[IDS], torch.zeros(3, H, dtype=weight.dtype))


def test_autocast_runs_the_head_in_its_dtype_and_rows_keep_theirs() -> None:
    hidden, weight = drawn(5, H, dtype=torch.float32).requires_grad_(), drawn(V, H, seed=1, dtype=torch.float32)
    rows = drawn(3, H, seed=2, dtype=torch.float32).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = head_with_rows(hidden, weight, None, rows, INDEX)
        expected = F.linear(hidden, merged(weight, rows.detach()))
    assert logits.dtype == torch.bfloat16
    assert torch.equal(logits, expected)
    logits.sum().backward()
    assert rows.grad is not None
    assert hidden.grad is not None
    assert (rows.grad.dtype, hidden.grad.dtype) == (torch.float32, torch.float32)


def test_ids_outside_the_matrix_and_repeated_ids_are_refused() -> None:
    layer = TrainableTokensLayer(nn.Embedding(V, H), "default")
    with pytest.raises(ValueError, match=r"expected ids in \[0, 11\), found 11"):
        layer.update_layer("default", token_indices=[1, 11])
    with pytest.raises(ValueError, match=r"found -1"):
        layer.update_layer("default", token_indices=[-1])
    with pytest.raises(ValueError, match=r"distinct ids, found id 4 more than once"):
        layer.update_layer("default", token_indices=[4, 2, 4])


def test_ids_of_another_integer_type_or_stride_are_found() -> None:
    layer = wrapped(nn.Embedding(V, H), drawn(3, H))
    x = torch.tensor([7, 0, 2, 1, 9], dtype=torch.int32)
    assert torch.equal(layer(x), layer(x.long()))
    assert torch.equal(layer(x.long()[::2]), layer(torch.tensor(IDS)))


def test_no_tokens_is_the_base_alone() -> None:
    base, x = nn.Embedding(V, H), torch.tensor([1, 2])
    layer = TrainableTokensLayer(base, "default")
    layer.update_layer("default", token_indices=[])
    assert torch.equal(layer(x), base(x))


def test_layers_that_are_neither_embedding_nor_head_are_refused() -> None:
    with pytest.raises(ValueError, match="found LayerNorm"):
        TrainableTokensLayer(nn.LayerNorm(H), "default")


def test_packed_weights_are_refused() -> None:
    base = nn.Linear(H, V)
    base.weight = nn.Parameter(torch.zeros(V * H // 2, 1))
    with pytest.raises(ValueError, match="expected a weight of shape"):
        TrainableTokensLayer(base, "default")
