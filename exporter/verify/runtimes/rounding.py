"""Round the weights of the tuned model to 16 bits, as in a file with 16-bit weights.

Each tensor is rounded once, after the adapters have been added to the tensor.
"""

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
    """Return a context manager in which the tuned tensors are rounded to ``dtype`` and then stored as fp32.

    vectors: True to also round norms and biases.

    For a module with an adapter, the merged matrix is computed by running the module on unit vectors, because PEFT's
    merge is wrong for some models with tied weights. Peak extra memory: copies of all matrices that have adapters and
    of all tensors that the rounding changes.
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
    """Return a context manager that replaces every adapted module by a plain module with the merged weights."""
    adapted = list(_adapted(model))
    plain = [_plain(module) for _, _, module in adapted]
    for (parent, name, _), module in zip(adapted, plain, strict=True):
        setattr(parent, name, module)
    yield
    for parent, name, module in adapted:
        setattr(parent, name, module)


def _adapted(parent: torch.nn.Module) -> Iterator[tuple[torch.nn.Module, str, torch.nn.Module]]:
    """Yield (parent, name, module) for each outermost module that has an adapter."""
    for name, child in parent.named_children():
        if isinstance(child, _WRAPPERS) and not _is_stack(child):
            yield parent, name, child
        else:
            yield from _adapted(child)


def _plain(module: Any) -> torch.nn.Module:
    """Return a copy of the base module that PEFT wrapped in ``module``, with the merged weight and bias.

    The merged weight and bias are computed by running ``module`` on unit vectors.
    """
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
    result: torch.nn.Module = plain
    return result


def _innermost(module: torch.nn.Module) -> Any:
    while inner := module._modules.get("base_layer") or module._modules.get("token_adapter"):
        module = inner
    return module


def _stored_in_out(base: torch.nn.Module) -> bool:
    """Whether the weight has the shape (in, out), as in GPT-2's Conv1D, instead of (out, in), as in Linear."""
    return not isinstance(base, torch.nn.Linear)


@contextmanager
def _no_biases(module: torch.nn.Module) -> Iterator[None]:
    """Return a context manager that sets the biases of ``module`` to zero.

    A module that runs on unit vectors returns matrix columns; adding a bias to a column would round off the column's
    last bits.
    """
    biases = [bias for name, bias in module.named_parameters() if name.rpartition(".")[2] == "bias"]
    originals = [bias.clone() for bias in biases]
    for bias in biases:
        bias.zero_()
    yield
    for bias, value in zip(biases, originals, strict=True):
        bias.copy_(value)


def _is_stack(module: Any) -> bool:
    return isinstance(module, ParamWrapper) and module.get_param().ndim > 2


@contextmanager
def _stacks_merged(model: torch.nn.Module) -> Iterator[None]:
    """Return a context manager that merges the adapters of stacked experts (one 3-D tensor for all experts of a layer).

    A module of stacked experts is not linear, so the merged weights cannot be computed from unit vectors. PEFT's merge
    is correct for stacked experts, because stacked experts share no weights with other tensors.
    """
    stacks: list[Any] = [module for module in model.modules() if _is_stack(module)]
    originals = [stack.get_param().clone() for stack in stacks]
    for stack in stacks:
        stack.merge()
    yield
    for stack, value in zip(stacks, originals, strict=True):
        stack.merged_adapters.clear()
        stack.get_param().copy_(value)
