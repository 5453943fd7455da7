"""The tuned model as a file in a 16-bit type holds it: what the adapters make of each tensor, rounded once."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import TrainableTokensWrapper

_WRAPPERS = (BaseTunerLayer, TrainableTokensWrapper)


@contextmanager
def rounded(model: torch.nn.Module, dtype: torch.dtype, *, vectors: bool) -> Iterator[None]:
    """Round the tuned tensors to ``dtype`` and back to fp32 for a while. vectors: norms and biases, too.

    A module with an adapter on it is asked for its matrix, without PEFT's merge, which is wrong for some tied models.
    Memory: such matrices, and what the rounding changes, are held once more.
    """
    originals = []
    with torch.no_grad(), _stacks_merged(model), _as_computed(model):
        for parameter in model.parameters():
            as_stored = parameter.to(dtype).to(parameter.dtype)
            if (vectors or parameter.ndim > 1) and not torch.equal(as_stored, parameter):
                originals.append((parameter, parameter.clone()))
                parameter.copy_(as_stored)
        yield
        for parameter, original in originals:
            parameter.copy_(original)


@contextmanager
def _as_computed(model: torch.nn.Module) -> Iterator[None]:
    """Plain modules in the place of those with adapters."""
    found = list(_adapted(model))
    plain = [_plain(module) for _, _, module in found]
    for (parent, name, _), module in zip(found, plain, strict=True):
        setattr(parent, name, module)
    yield
    for parent, name, module in found:
        setattr(parent, name, module)


def _adapted(parent: torch.nn.Module) -> Iterator[tuple[torch.nn.Module, str, torch.nn.Module]]:
    """(parent, name, module) of the outermost modules that hold an adapter's part of a matrix."""
    for name, child in parent.named_children():
        if isinstance(child, _WRAPPERS) and not _is_stack(child):
            yield parent, name, child
        else:
            yield from _adapted(child)


def _plain(module: Any) -> torch.nn.Module:
    """The innermost module with the weight and the bias that ``module`` computes with: it is fed the unit vectors."""
    base = _innermost(module)
    plain: Any = copy.copy(base)
    plain._parameters = dict(base._parameters)
    if isinstance(base, torch.nn.Embedding):
        weight = module(torch.arange(base.num_embeddings))
        weight = weight / getattr(base, "embed_scale", 1.0)
    else:
        n_inputs = base.weight.shape[0 if _stored_in_out(base) else 1]
        bias = module(torch.zeros(1, n_inputs))[0]
        if bias.any():
            plain.bias = torch.nn.Parameter(bias)
        with _no_biases(module):
            weight = module(torch.eye(n_inputs))
        weight = weight if _stored_in_out(base) else weight.T.contiguous()
    plain.weight = torch.nn.Parameter(weight)
    found: torch.nn.Module = plain
    return found


def _innermost(module: torch.nn.Module) -> Any:
    while inner := module._modules.get("base_layer") or module._modules.get("token_adapter"):
        module = inner
    return module


def _stored_in_out(base: torch.nn.Module) -> bool:
    """GPT-2's Conv1D is no Linear, and keeps its weight as (in, out)."""
    return not isinstance(base, torch.nn.Linear)


@contextmanager
def _no_biases(module: torch.nn.Module) -> Iterator[None]:
    """A bias would cost the matrix its last bits."""
    biases = [one for name, one in module.named_parameters() if name.rpartition(".")[2] == "bias"]
    kept = [one.clone() for one in biases]
    for one in biases:
        one.zero_()
    yield
    for one, value in zip(biases, kept, strict=True):
        one.copy_(value)


def _is_stack(module: Any) -> bool:
    return isinstance(module, ParamWrapper) and module.get_param().ndim > 2


@contextmanager
def _stacks_merged(model: torch.nn.Module) -> Iterator[None]:
    """Stacks of experts cannot be fed unit vectors; nothing is tied to them, so that PEFT's merge is right."""
    stacks: list[Any] = [module for module in model.modules() if _is_stack(module)]
    kept = [stack.get_param().clone() for stack in stacks]
    for stack in stacks:
        stack.merge()
    yield
    for stack, value in zip(stacks, kept, strict=True):
        stack.merged_adapters.clear()
        stack.get_param().copy_(value)
