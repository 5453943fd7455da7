"""Compute the outputs of an embedding and a head in which a few rows of the base matrix are replaced by trained rows.

No function in this module allocates a tensor as large as the base matrix, which has the shape (V, H) for V tokens and
the hidden size H. An embedding lookup reads the base matrix and substitutes the rows of trained tokens. A head
multiplies the hidden states by the base matrix and overwrites the logits of the k trained tokens. The outputs of the
embedding and of the head equal the outputs that the merged matrix would give.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["RowIndex", "head_with_rows", "substitute_rows"]


@dataclass(frozen=True, slots=True)
class RowIndex:
    """An index that maps ids of trained tokens to row numbers. ids: (k,) int64 token ids in the order of the rows.

    sorted_ids: ``ids`` in ascending order. order: (k,) row number of each element of ``sorted_ids``. Memory is O(k). A
    lookup table with an entry for every token of the vocabulary would be slightly faster, but would need O(V) memory
    per device.
    """

    ids: Tensor
    sorted_ids: Tensor
    order: Tensor

    @classmethod
    def build(cls, token_ids: Sequence[int], device: torch.device) -> RowIndex:
        """Build an index of ``token_ids`` (distinct, at least one) on ``device``."""
        ids = torch.tensor(list(token_ids), dtype=torch.int64, device=device)
        sorted_ids, order = torch.sort(ids)
        return cls(ids, sorted_ids, order)

    def find(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the flat positions of trained tokens in ``x`` and the row number of each position, both (n,) int64."""
        flat = x.reshape(-1).to(self.sorted_ids.dtype).contiguous()
        candidates = torch.searchsorted(self.sorted_ids, flat).clamp_(max=len(self.sorted_ids) - 1)
        positions = torch.nonzero(self.sorted_ids[candidates] == flat).squeeze(-1)
        return positions, self.order[candidates[positions]]


def substitute_rows(
    looked_up: Tensor,
    x: Tensor,
    rows: Tensor,
    index: RowIndex,
    *,
    dtype: torch.dtype,
    scale: Tensor | float | None = None,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
) -> Tensor:
    """Return ``looked_up`` with the vectors of trained tokens replaced, in place if autograd allows in-place writes.

    looked_up: the base's embedding vectors (..., H) of the ids ``x`` (...), already multiplied by ``scale``. rows: (k,
    H) trained rows in any float dtype, in the order of ``index``. dtype: the dtype of the base matrix; the trained rows
    are first rounded to this dtype, as in a merged matrix. scale, padding_idx, max_norm, norm_type, scale_grad_by_freq:
    the settings of the wrapped embedding. As in torch, ``max_norm`` scales values but not gradients, and the row
    ``padding_idx`` gets no gradient. Memory: O(n * H) if n of the ids ``x`` are trained tokens. The gradient of
    ``rows`` is accumulated in the dtype of ``rows``.
    """
    positions, slots = index.find(x)
    hits = rows.index_select(0, slots)
    if padding_idx is not None:
        frozen = (index.ids[slots] == padding_idx).unsqueeze(-1)
        hits = torch.where(frozen, hits.detach(), hits)
    if scale_grad_by_freq and hits.requires_grad:
        counts = torch.bincount(slots, minlength=len(index.ids))[slots].unsqueeze(-1)
        hits.register_hook(lambda grad: grad / counts)
    hits = hits.to(dtype)
    if max_norm is not None:
        hits = hits.clone()  # `to` may have returned a tensor that autograd still needs
        shorten(hits, max_norm, norm_type)
    if scale is not None:
        hits = scaled(hits, scale)
    if looked_up.requires_grad and looked_up.is_leaf:
        looked_up = looked_up.clone()  # a hook made the lookup a leaf (input gradients for checkpointing)
    looked_up.view(-1, looked_up.shape[-1]).index_copy_(0, positions, hits.to(looked_up.dtype))
    return looked_up


def scaled(vectors: Tensor, scale: Tensor | float) -> Tensor:
    """Multiply the vectors (..., H) by ``scale``.

    If ``scale`` is a tensor, the factor is first rounded to the dtype of the vectors; a Python number is not rounded.
    In transformers, gemma3's embedding also rounds its factor, a tensor, and bart's embedding does not round its
    factor, a number.
    """
    return vectors * (scale.to(vectors.dtype) if isinstance(scale, Tensor) else scale)


def shorten(vectors: Tensor, max_norm: float, norm_type: float) -> None:
    """Scale vectors (..., H) whose norm exceeds ``max_norm`` down to ``max_norm``, in place and outside of autograd.

    Source of the formula: torch.embedding_renorm_, which scales by max_norm / (norm + 1e-7).
    """
    values = vectors.detach()
    norms = torch.linalg.vector_norm(values, ord=norm_type, dim=-1, keepdim=True)
    values.mul_(torch.where(norms > max_norm, max_norm / (norms + 1e-7), 1.0))


def head_with_rows(hidden: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor, index: RowIndex) -> Tensor:
    """Return the logits (..., V) of the hidden states ``hidden`` (..., H), computed with trained rows.

    The result equals the product of ``hidden`` and the head matrix ``weight`` (V, H), in which ``rows`` (k, H) replace
    the rows that ``index`` lists.

    Peak memory with k trained rows: the logits plus O(k) columns in the forward pass, and O(k) columns in the backward
    pass. A gradient of ``weight`` is computed only if ``weight.requires_grad`` is true. Under autocast the product is
    computed in the autocast dtype, as in nn.Linear.
    """
    logits: Tensor = _HeadWithRows.apply(hidden, weight, bias, rows, index.ids)  # type: ignore[no-untyped-call]
    return logits


class _HeadWithRows(torch.autograd.Function):
    """Autograd function of a linear layer in which k rows of the weight are replaced.

    Because the whole layer is a single autograd node, neither the logits nor their gradient are copied.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor, ids: Tensor) -> Tensor:
        device = hidden.device.type
        autocast = torch.is_autocast_enabled(device)
        # Without autocast, the product raises an error if the hidden state has another dtype, as in nn.Linear. A cast
        # of the matrix would copy (V, H).
        dtype = torch.get_autocast_dtype(device) if autocast else weight.dtype
        with torch.autocast(device, enabled=False):
            h, w = (hidden.to(dtype), weight.to(dtype)) if autocast else (hidden, weight)
            b = None if bias is None else bias.to(dtype)
            r = rows.to(weight.dtype).to(dtype)
            logits = torch.nn.functional.linear(h, w, b)
            columns = torch.nn.functional.linear(h, r, None if b is None else b.index_select(0, ids))
            logits.index_copy_(-1, ids, columns)
        ctx.save_for_backward(h, w, r, ids)
        ctx.dtypes = hidden.dtype, weight.dtype, None if bias is None else bias.dtype, rows.dtype
        return logits

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        h, w, r, ids = ctx.saved_tensors
        hidden_dtype, weight_dtype, bias_dtype, rows_dtype = ctx.dtypes
        need_hidden, need_weight, need_bias, need_rows, _ = ctx.needs_input_grad
        grad = grad.reshape(
            -1, grad.shape[-1]
        )  # this is a view, because the gradients of loss functions are contiguous
        columns = grad.index_select(-1, ids)
        grad_hidden = grad_weight = grad_bias = grad_rows = None
        if need_hidden:
            # The gradient of the merged matrix is the gradient of the base product plus k corrected columns. Zeroing
            # the columns of ``grad`` instead would need a copy of ``grad``, because other nodes may use the same
            # tensor.
            grad_hidden = grad.matmul(w)
            grad_hidden.addmm_(columns, r - w.index_select(0, ids))
            grad_hidden = grad_hidden.view(h.shape).to(hidden_dtype)
        if need_rows:
            grad_rows = columns.t().matmul(h.reshape(-1, h.shape[-1])).to(rows_dtype)
        if need_weight:  # this package freezes the base, but a user may unfreeze the base
            grad_weight = grad.t().matmul(h.reshape(-1, h.shape[-1])).index_fill_(0, ids, 0).to(weight_dtype)
        if need_bias:
            grad_bias = grad.sum(0).to(bias_dtype)
        return grad_hidden, grad_weight, grad_bias, grad_rows, None
