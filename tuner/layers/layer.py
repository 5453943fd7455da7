"""Define the layer that wraps an embedding or a head and contains the trained rows."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from peft import TrainableTokensConfig as PeftTrainableTokensConfig
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from tuner.layers.rows import RowIndex, head_with_rows, scaled, shorten, substitute_rows

__all__ = ["TrainableTokensLayer"]


class TrainableTokensLayer(nn.Module, BaseTunerLayer):
    """An embedding or head (``base_layer``) in which the rows of selected tokens are trained.

    The attributes have the same names as in PEFT's layer, because the attribute names become tensor names in adapter
    files. Despite its name, ``trainable_tokens_delta`` contains the final rows (k, H) of each adapter's k trained
    tokens, and not the differences from the base's rows. The original rows of the base are kept in
    ``trainable_tokens_original`` for ``unmerge``. A layer with a ``tied_adapter`` has no parameters of its own and uses
    the rows of the layer ``tied_adapter``.
    """

    adapter_layer_names = ("trainable_tokens_delta",)
    other_param_names = ("token_indices", "trainable_tokens_original")

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        config: PeftTrainableTokensConfig | Mapping[str, Any] | Sequence[int] | None = None,
        tied_adapter: TrainableTokensLayer | None = None,
        **kwargs: Any,
    ) -> None:
        """Wrap ``base_layer``.

        The new layer has no trained rows until ``update_layer`` is called. The parameter ``config`` is unused and
        exists only to match PEFT's signature. Raises: ValueError if ``base_layer`` is neither an embedding nor a linear
        layer, or if the weight of ``base_layer`` is packed by a quantiser or sharded.
        """
        super().__init__()
        self.base_layer = base_layer
        self.in_features, self.out_features = _features(self.get_base_layer())
        self._active_adapter: str | list[str] = adapter_name
        self.kwargs = kwargs
        self.merged_adapters: list[str] = []
        # The embedding is kept in a list, so that torch does not register the embedding as a submodule of the head.
        self._tied_adapter = [] if tied_adapter is None else [tied_adapter]
        if tied_adapter is None:
            self.trainable_tokens_delta = nn.ParameterDict({})
            self.trainable_tokens_original = BufferDict({})
            self.token_indices: dict[str, list[int]] = {}
        else:
            self.trainable_tokens_delta = tied_adapter.trainable_tokens_delta
            self.trainable_tokens_original = tied_adapter.trainable_tokens_original
            self.token_indices = tied_adapter.token_indices
        self._index_cache: dict[tuple[Any, ...], tuple[list[list[int]], RowIndex]] = {}

    @property
    def tied_adapter(self) -> TrainableTokensLayer | None:
        """The layer of the embedding to which this head is tied, or None if this layer has its own rows."""
        return self._tied_adapter[0] if self._tied_adapter else None

    def update_layer(
        self,
        adapter_name: str,
        config: PeftTrainableTokensConfig | Mapping[str, Any] | None = None,
        tied_adapter: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Create the rows of ``adapter_name``.

        The rows are copies of the base's rows, or random values with ``init_weights=False``.

        The values of ``token_indices`` and ``init_weights`` come from ``config`` (an object or a mapping) or from
        keyword arguments. If ``tied_adapter`` is given, no rows are created, because the layer ``tied_adapter`` owns
        the rows. Raises: ValueError if a token id is repeated, negative, or not below the number of rows of the base
        matrix.
        """
        if tied_adapter is not None or self.tied_adapter is not None:
            return
        options = _options(config, kwargs)
        weight = self.weight
        token_ids = checked_ids(options["token_indices"], len(weight))
        with torch.no_grad():
            originals = weight[token_ids].clone()
        if options.get("init_weights", True):
            rows = originals.clone()
        else:
            rows = torch.randn(originals.shape, dtype=weight.dtype, device=weight.device)
        self.token_indices[adapter_name] = token_ids
        self.trainable_tokens_delta[adapter_name] = nn.Parameter(rows, requires_grad=True)
        self.trainable_tokens_original[adapter_name] = originals
        self._move_adapter_to_device_of_base_layer(adapter_name)

    def _check_overlapping_tokens(self, adapter_names: Sequence[str]) -> None:
        """Raise ValueError if a token has rows in two adapters.

        ``adapter_names`` and the adapters that are already merged are checked together.
        """
        owner: dict[int, str] = {}
        for name in dict.fromkeys([*self.merged_adapters, *adapter_names]):
            for token_id in self.token_indices.get(name, ()):
                if token_id in owner:
                    raise ValueError(
                        f"adapters {owner[token_id]!r} and {name!r} both have a row for token id {token_id}; "
                        "only adapters with disjoint token ids can be used together"
                    )
                owner[token_id] = name

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Write the rows of ``adapter_names`` (default: the active adapters) into the base matrix, in place.

        The base matrix is modified in place, so that a tied head still shares the embedding's storage and no tensor as
        large as the embedding is copied. All checks run before the first row is written. Raises: ValueError if two
        adapters have rows for the same token, or, with ``safe_merge``, if a row is not finite in the base's dtype.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.trainable_tokens_delta]
        if not names:
            return
        self._check_overlapping_tokens(names)
        weight = self.weight
        rows = {name: self.trainable_tokens_delta[name].detach().to(weight) for name in names}
        for name in names:
            if safe_merge and not torch.isfinite(rows[name]).all():
                raise ValueError(f"adapter {name!r}: expected finite token rows, found NaN or infinity")
        for name in names:
            _write_rows(weight, self.token_indices[name], rows[name])
            self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Restore the original rows of the base matrix bit for bit."""
        if not self.merged:
            warnings.warn("No adapter is merged, so unmerge changes nothing.", stacklevel=2)
            return
        weight = self.weight
        while self.merged_adapters:
            name = self.merged_adapters.pop()
            _write_rows(weight, self.token_indices[name], self.trainable_tokens_original[name].to(weight))

    def get_merged_weights(self, active_adapters: Sequence[str]) -> Tensor:
        """Return a copy of the base matrix in which the adapters' rows replace the base's rows.

        The method ``get_merged_weights`` is called only by PEFT's wrapper classes.
        """
        merged = self.weight
        for name in active_adapters:
            if name not in self.token_indices:
                continue
            index = torch.tensor(self.token_indices[name], dtype=torch.int64, device=merged.device)
            merged = merged.index_copy(0, index, self.trainable_tokens_delta[name].to(merged))
        return merged

    def forward_adapters(self, x: Tensor, active_adapters: Sequence[str], *args: Any, **kwargs: Any) -> Tensor:
        """Run the base layer with the rows of ``active_adapters`` in place of the base's rows.

        Without an active adapter, run the base layer unchanged.
        """
        off = self.disable_adapters or not active_adapters
        if off and self.merged:
            self.unmerge()
        names = [name for name in active_adapters if self.token_indices.get(name)]
        if off or self.merged or not names:
            result: Tensor = self.base_layer(x, *args, **kwargs)
            return result
        base = self.get_base_layer()
        index = self._index(names, self.weight.device)
        parts = [self.trainable_tokens_delta[name] for name in names]
        rows = parts[0] if len(parts) == 1 else torch.cat(parts)
        if isinstance(base, nn.Embedding):
            return self._embed(base, x, rows, index, *args, **kwargs)
        return head_with_rows(x, self.weight, self.bias, rows, index)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Run the layer with the rows of the active adapters.

        x: token ids (...) for an embedding, hidden states (..., H) for a head.
        """
        return self.forward_adapters(x, self.active_adapters, *args, **kwargs)

    def _embed(self, base: nn.Embedding, x: Tensor, rows: Tensor, index: RowIndex, *args: Any, **kwargs: Any) -> Tensor:
        scale = _embed_scale(base)
        if base.max_norm is None:
            looked_up = self.base_layer(x, *args, **kwargs)
        else:
            # nn.Embedding would shorten rows of the frozen matrix in place. Here, the looked-up vectors are shortened
            # instead.
            looked_up = F.embedding(x, base.weight, base.padding_idx)
            shorten(looked_up, base.max_norm, base.norm_type)
            looked_up = looked_up if scale is None else scaled(looked_up, scale)
        return substitute_rows(
            looked_up,
            x,
            rows,
            index,
            dtype=base.weight.dtype,
            scale=scale,
            padding_idx=base.padding_idx,
            max_norm=base.max_norm,
            norm_type=base.norm_type,
            scale_grad_by_freq=base.scale_grad_by_freq,
        )

    def _index(self, names: Sequence[str], device: torch.device) -> RowIndex:
        """Return an index of all tokens that have a row in one of the adapters ``names``.

        The index is cached. If the token ids of an adapter have changed, the index is rebuilt. Raises: ValueError if a
        token has rows in two adapters.
        """
        lists = [self.token_indices[name] for name in names]
        key = (*names, device)
        cached = self._index_cache.get(key)
        if cached is not None and len(cached[0]) == len(lists) and all(map(_is_same, cached[0], lists)):
            return cached[1]
        self._check_overlapping_tokens(names)
        index = RowIndex.build([token_id for ids in lists for token_id in ids], device)
        self._index_cache = {key: (lists, index)}  # the cache keeps one index, because switching adapters is rare
        return index


def checked_ids(token_ids: Sequence[int], vocab: int) -> list[int]:
    """Return ``token_ids`` as a Python list. Raises: ValueError if token ids are repeated or outside [0, vocab)."""
    ids = [int(token_id) for token_id in token_ids]
    if outside := [token_id for token_id in ids if not 0 <= token_id < vocab]:
        raise ValueError(f"token_indices: expected ids in [0, {vocab}), found {outside[0]}")
    if len(set(ids)) != len(ids):
        twice = next(token_id for token_id in ids if ids.count(token_id) > 1)
        raise ValueError(f"token_indices: expected distinct ids, found id {twice} more than once")
    return ids


def _is_same(a: object, b: object) -> bool:
    return a is b


def _options(config: object, kwargs: Mapping[str, Any]) -> Mapping[str, Any]:
    if config is None:
        return kwargs
    if isinstance(config, Mapping):
        return config
    return vars(config)


def _features(base: nn.Module) -> tuple[int, int]:
    """Return (in_features, out_features) as PEFT defines these attributes.

    With V tokens and the hidden size H, the result is (V, H) for an embedding and (H, V) for a head.
    """
    if isinstance(base, nn.Embedding):
        features = stored = (base.num_embeddings, base.embedding_dim)
    elif isinstance(base, nn.Linear):
        features, stored = (base.in_features, base.out_features), (base.out_features, base.in_features)
    else:
        # PEFT raises ValueError for the same mistake, so the error is no TypeError.
        raise ValueError(f"base_layer: expected an embedding or a linear layer, found {type(base).__name__}")  # noqa: TRY004
    if tuple(base.weight.shape) != stored:  # the weight is packed by a quantiser, or partitioned over processes
        raise ValueError(
            f"{type(base).__name__}: expected a weight of shape {stored}, found shape {tuple(base.weight.shape)}"
        )
    return features


def _embed_scale(base: nn.Module) -> Tensor | float | None:
    """Return the factor by which an embedding multiplies its output (a tensor in gemma3, a number in bart), or None.

    If the attribute ``embed_scale`` is a tensor with two or more elements, None is returned, as in stock PEFT, because
    it is unknown how ``forward`` uses such a tensor.
    """
    scale = getattr(base, "embed_scale", None)
    if isinstance(scale, Tensor):
        return scale if scale.numel() == 1 else None
    return float(scale) if isinstance(scale, int | float) else None


def _write_rows(weight: Tensor, token_ids: Sequence[int], rows: Tensor) -> None:
    with torch.no_grad():
        weight.data.index_copy_(0, torch.tensor(token_ids, dtype=torch.int64, device=weight.device), rows)
