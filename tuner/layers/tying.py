"""Find the modules that share the input embedding's matrix, without relying on the architecture's name.

Three kinds of evidence show that a module is tied to the input embedding, listed from strongest to weakest. First, the
weights of the module and of the embedding share storage. Second, the config (or the text config) sets
``tie_word_embeddings`` to true. Third, the config has no flag ``tie_word_embeddings``, and the model's class declares
the tie. Evidence from the config or the class counts only if the weights of the module and of the embedding are equal.
Weights on the meta device, which cannot be compared, count as equal. The weights are compared because the config can be
wrong: a T5 v1.1 checkpoint has a separate head although its config has ``tie_word_embeddings: true``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["further_embedding", "input_embedding", "output_embedding", "tie_flag", "tied_module_names", "unwrap"]


def input_embedding(model: nn.Module) -> nn.Module | None:
    """Return the model's input embedding (or the tuner layer that wraps the embedding), or None."""
    return _ask(model, "get_input_embeddings")


def output_embedding(model: nn.Module) -> nn.Module | None:
    """Return the model's output head (or the tuner layer that wraps the head), or None."""
    return _ask(model, "get_output_embeddings")


def further_embedding(model: nn.Module) -> nn.Module | None:
    """Return the per-layer input embedding of models such as Gemma 4, or None.

    The per-layer input embedding also has one row per token, so a new token needs a row in it.
    """
    return _ask(model, "get_per_layer_input_embeddings")


def _ask(model: nn.Module, method: str) -> nn.Module | None:
    getter = getattr(model, method, None)
    if getter is None:
        return None
    try:
        module = getter()
    except (NotImplementedError, AttributeError):
        # transformers raises one of the two errors if transformers cannot find the embedding.
        return None
    return module if isinstance(module, nn.Module) else None


def unwrap(module: nn.Module) -> nn.Module:
    """Return the original module inside the layers and wrappers that this package or PEFT added around ``module``."""
    while True:
        inner = getattr(module, "base_layer", None)
        if not isinstance(inner, nn.Module):
            inner = getattr(module, "original_module", None)
        if not isinstance(inner, nn.Module):
            return module
        module = inner


def tie_flag(config: Any) -> bool | None:
    """Return the value of ``tie_word_embeddings`` in the config, or else in the text config.

    Return None if neither config has the flag ``tie_word_embeddings``.
    """
    flag = getattr(config, "tie_word_embeddings", None)
    if flag is None and hasattr(config, "get_text_config"):
        flag = getattr(config.get_text_config(), "tie_word_embeddings", None)
    return None if flag is None else bool(flag)


def tied_module_names(model: nn.Module) -> list[str]:
    """Return the names of all modules other than the input embedding that use the input embedding's matrix.

    For a wrapped module, the name of the outermost tuner layer is returned. Two of the returned names may refer to the
    same module.
    """
    embedding = input_embedding(model)
    if embedding is None:
        return []
    weight = getattr(unwrap(embedding), "weight", None)
    if not isinstance(weight, Tensor):
        return []
    flag = tie_flag(getattr(model, "config", None))
    declared = set() if flag is False else _declared_names(model)
    head = output_embedding(model) if flag else None
    return [
        name
        for name, module in _outermost(model)
        if module is not embedding and _is_tied(unwrap(module), weight, declared=module is head or name in declared)
    ]


def _is_tied(module: nn.Module, weight: Tensor, *, declared: bool) -> bool:
    if not isinstance(module, nn.Embedding | nn.Linear):
        return False
    other = module.weight
    if other is weight:
        return True
    if other.shape != weight.shape:
        return False
    if other.is_meta or weight.is_meta:
        return declared
    if _same_storage(other, weight):
        return True
    return declared and other.dtype == weight.dtype and other.device == weight.device and torch.equal(other, weight)


def _same_storage(a: Tensor, b: Tensor) -> bool:
    if a.device != b.device or a.dtype != b.dtype or a.storage_offset() != b.storage_offset():
        return False
    try:
        return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr() != 0
    except (NotImplementedError, RuntimeError):
        return False  # tensor subclasses such as shards have no single storage


def _outermost(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield (name, module) for all modules that are not inside a tuner layer.

    A module that is registered under two names is yielded twice.
    """
    inside: tuple[str, ...] = ()
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if not name or name.startswith(inside):
            continue
        if unwrap(module) is not module:
            inside = (*inside, f"{name}.")
        yield name, module


def _declared_names(model: nn.Module) -> set[str]:
    """Return the module names in ``_tied_weights_keys``, a mapping in transformers 5 and a list in earlier versions."""
    names: set[str] = set()
    for prefix, module in model.named_modules():
        keys = getattr(module, "_tied_weights_keys", None) or ()
        for key in keys:
            owner = str(key).rpartition(".")[0]
            names.add(f"{prefix}.{owner}" if prefix else owner)
    return names
