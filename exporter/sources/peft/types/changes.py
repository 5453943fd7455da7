"""Groups the tensors of an adapter that only PEFT can merge by the module that the tensors change."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from exporter.sources.hf.safetensors import FileTensor
from exporter.sources.peft.types.table import MergedType

_MODULE_PREFIX: Final = "base_model.model."
#: Prefix of tensors that belong to all modules, such as VeRA's projections.
_MODEL_PREFIX: Final = "base_model."
_BASE_LAYER: Final = "base_layer"


@dataclass(frozen=True, slots=True)
class ByPeft:
    """A change of ``module`` that only PEFT can compute.

    tensors: maps the keys that PEFT writes to the tensors of the module. base: the module's frozen weight, which PEFT
    saves for an embedding and a head, or None. shared: maps keys to the tensors that all modules share. bias: whether
    the change also scales the module's bias.
    """

    path: Path
    module: str
    type: MergedType
    tensors: Mapping[str, FileTensor]
    base: FileTensor | None
    shared: Mapping[str, FileTensor]
    bias: bool

    @property
    def key(self) -> str:
        """Name of the adapter tensor that error messages about the change show."""
        return self.keys[0]

    @property
    def keys(self) -> tuple[str, ...]:
        """Names of the adapter tensors from which the change was built."""
        base = () if self.base is None else (self.base,)
        return tuple(tensor.spec.name for tensor in (*self.tensors.values(), *base))


def changes_by_peft(
    path: Path, adapter_type: MergedType, tensors: Mapping[str, FileTensor]
) -> tuple[list[ByPeft], dict[str, FileTensor]]:
    """Return (the change of each module, {key: tensor} for the tensors that all modules share).

    Tensors whose keys lack the prefix of the adapter type are ignored. tensors: maps the keys that PEFT writes to the
    tensors.
    """
    groups: dict[str, dict[str, FileTensor]] = {}
    shared: dict[str, FileTensor] = {}
    for key, tensor in tensors.items():
        if not key.startswith(_MODULE_PREFIX):
            if key.removeprefix(_MODEL_PREFIX).startswith(adapter_type.prefix):
                shared[key] = tensor
            continue
        module = _module(key.removeprefix(_MODULE_PREFIX), adapter_type.prefix)
        if module is not None:
            groups.setdefault(module, {})[key] = tensor
    changes = [
        ByPeft(
            path,
            module,
            adapter_type,
            of_module,
            tensors.get(f"{_MODULE_PREFIX}{module}.{_BASE_LAYER}.weight"),
            shared,
            bias=_changes_bias(adapter_type, of_module),
        )
        for module, of_module in groups.items()
    ]
    return changes, shared


def _module(name: str, prefix: str) -> str | None:
    """Return the part of ``name`` before the first segment that begins with ``prefix``, or None if no segment does."""
    segments = name.split(".")
    for number, segment in enumerate(segments):
        if number and segment.startswith(prefix):
            return ".".join(segments[:number])
    return None


def _changes_bias(adapter_type: MergedType, tensors: Mapping[str, FileTensor]) -> bool:
    """Whether the tensors change the module's bias.

    The bias changes if the tensors rotate or scale the output of the module, but not if they scale the input.
    """
    if adapter_type.prefix == "ia3_":
        return any(tensor.spec.shape[1:] == (1,) for tensor in tensors.values())
    return adapter_type.prefix in ("ln_tuning_", "road_")
