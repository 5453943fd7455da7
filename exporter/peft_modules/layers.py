"""Injects an adapter, with the unmodified PEFT library, into a model that contains only the modules to change."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

import torch
from peft import PeftConfig, PeftModel, set_peft_model_state_dict
from safetensors import safe_open
from transformers.pytorch_utils import Conv1D

from exporter.peft_modules.weights import Layout, module_places, values
from exporter.sources.hf.checkpoint import Checkpoint
from exporter.sources.hf.safetensors import FileTensor
from exporter.sources.peft.adapter import Adapter
from exporter.sources.peft.types.changes import ByPeft
from exporter.tensors import cast, read

#: Settings that choose modules. The modules are given, so that these settings must not exclude a module.
_CHOICES: Final = (
    "exclude_modules",
    "layers_pattern",
    "layers_to_transform",
    "modules_to_save",
    "target_parameters",
    "trainable_token_indices",
)


def unmerged_layers(checkpoint: Checkpoint, adapter: Adapter) -> Iterator[tuple[ByPeft, Layout, Any]]:
    """Yield (change, layout of the module, PEFT's layer with the base's weight and the unmerged adapter).

    Peak memory: the size of one module and of the module's adapter tensors. If several modules share tensors of the
    adapter, the whole adapter is in memory, because PEFT needs the shapes of all modules to create the shared tensors.
    Raises ValueError if the tensors of the adapter do not fit the modules.
    """
    changes = [edit for edit in adapter.edits if isinstance(edit, ByPeft)]
    if changes[0].type.shared:
        yield from _layers_with_shared_tensors(checkpoint, adapter, changes)
        return
    for change in changes:
        layout, module = _module(checkpoint, adapter, change, weight=_weight(checkpoint, adapter, change))
        model = _inject(adapter, {change.module: module}, change.tensors, change.type.prefix)
        yield change, layout, model.get_submodule(change.module)


def _layers_with_shared_tensors(
    checkpoint: Checkpoint, adapter: Adapter, changes: Sequence[ByPeft]
) -> Iterator[tuple[ByPeft, Layout, Any]]:
    modules, layouts = {}, {}
    for change in changes:
        layouts[change.module], modules[change.module] = _module(checkpoint, adapter, change, weight=None)
    tensors = dict(changes[0].shared)
    for change in changes:
        tensors |= change.tensors
    model = _inject(adapter, modules, tensors, changes[0].type.prefix)
    for change in changes:
        layer: Any = model.get_submodule(change.module)
        base = layer.get_base_layer()
        base.weight = torch.nn.Parameter(_weight(checkpoint, adapter, change), requires_grad=False)
        yield change, layouts[change.module], layer
        base.weight = torch.nn.Parameter(_hollow(base.weight.shape), requires_grad=False)


def _weight(checkpoint: Checkpoint, adapter: Adapter, change: ByPeft) -> torch.Tensor:
    if change.base is not None:
        return torch.from_numpy(cast(read(change.base), "F32"))
    return torch.from_numpy(values(checkpoint, _places(checkpoint, adapter, change).weight))


def _places(checkpoint: Checkpoint, adapter: Adapter, change: ByPeft) -> Any:
    return module_places(checkpoint, change, in_out=adapter.config.get("fan_in_fan_out") is True)


def _hollow(shape: Sequence[int]) -> torch.Tensor:
    """Return a tensor of zeros with the shape ``shape``; all elements share the memory of a single number."""
    return torch.zeros(1).expand(tuple(shape))


def _module(
    checkpoint: Checkpoint, adapter: Adapter, change: ByPeft, *, weight: torch.Tensor | None
) -> tuple[Layout, torch.nn.Module]:
    """Create the torch module that the adapter's change ``change`` modifies.

    Returns (layout of the weight, module). weight: the weight, or None to use zeros that need no memory.
    """
    places = _places(checkpoint, adapter, change)
    shape = places.weight_shape
    weight = torch.nn.Parameter(_hollow(shape) if weight is None else weight, requires_grad=False)
    bias = None
    if places.bias is not None:
        bias = torch.nn.Parameter(torch.from_numpy(values(checkpoint, places.bias)), requires_grad=False)
    module: Any
    with torch.device("meta"):
        match places.layout:
            case "embedding":
                module = torch.nn.Embedding(*shape)
            case "conv1d":
                module = Conv1D(shape[1], shape[0])
            case "linear":
                module = torch.nn.Linear(shape[1], shape[0], bias=bias is not None)
            case _:
                module = torch.nn.Module()
    module.weight, module.bias = weight, bias
    return places.layout, module


def _inject(
    adapter: Adapter, modules: Mapping[str, torch.nn.Module], tensors: Mapping[str, FileTensor], prefix: str
) -> torch.nn.Module:
    """Return a model that consists of ``modules``, into which PEFT has injected the adapter's ``tensors``."""
    skeleton = torch.nn.Module()
    for path, module in modules.items():
        _place(skeleton, path, module)
    config: Any = PeftConfig.from_pretrained(str(adapter.path))
    for name in _CHOICES:
        if hasattr(config, name):
            setattr(config, name, None)
    config.target_modules = set(modules)
    model = PeftModel(skeleton, config)
    with safe_open(adapter.weights, framework="pt") as file:
        state = {key: file.get_tensor(tensor.spec.name) for key, tensor in tensors.items()}
    result: Any = set_peft_model_state_dict(model, state)
    _require_complete(result, prefix, {key.rpartition(".")[2] for key in tensors})
    model.eval()
    return skeleton


def _require_complete(result: Any, prefix: str, names: set[str]) -> None:
    """Raise ValueError if PEFT did not use an adapter tensor, or needs an adapter tensor that the file lacks.

    names: last segments of the tensor names in the adapter file. A shared tensor does not count as missing: PEFT
    reports a shared tensor for each module, but saves a shared tensor only once.
    """
    missing = []
    for key in result.missing_keys:
        segments = key.split(".")
        own = any(segment.startswith(prefix) for segment in segments)
        shared = segments[-2] in names and segments[-2].startswith(prefix)
        missing += [key] if own and not shared else []
    for problem, keys in (("an unknown tensor", result.unexpected_keys), ("no tensor", missing)):
        if keys:
            raise ValueError(f"{problem} {keys[0]}")


def _place(skeleton: torch.nn.Module, path: str, module: torch.nn.Module) -> None:
    *parents, last = path.split(".")
    for name in parents:
        if name not in skeleton._modules:
            skeleton.add_module(name, torch.nn.Module())
        skeleton = skeleton.get_submodule(name)
    skeleton.add_module(last, module)
