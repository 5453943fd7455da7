"""Builds low-rank updates from the LoRA factors in an adapter file.

To update a parameter that ``target_parameters`` names, PEFT wraps the module that has the parameter. If
``target_parameters`` names several parameters of one module, the wrappers are nested, and the keys of an inner wrapper
contain ``base_layer``. For a stack of experts, each factor contains the factors of all experts. For rank r, lora_A has
the shape (r * experts, in), and lora_B has the shape (out, r * experts). If ``target_modules`` names experts of a model
whose experts are stacked, PEFT converts ``target_modules`` to ``target_parameters``, and stores the factors of all
experts together. Sources, in PEFT 0.21.2: ``ParamWrapper``, ``BaseTuner._inject_parameters`` and
``convert_peft_config_for_transformers``.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Final

from exporter.errors import LedgerError, NotExpressible, TensorMismatch
from exporter.sources.hf.safetensors import FileTensor
from exporter.sources.peft.edits import LowRank, require_floats, require_gathered
from exporter.sources.peft.lora_config import PEFT_MERGE, LoraSettings

#: Key suffix → name of a field of LowRank.
FACTORS: Final = {
    ".lora_A.weight": "down",
    ".lora_B.weight": "up",
    ".lora_B.bias": "bias",
    ".lora_embedding_A": "down",
    ".lora_embedding_B": "up",
    ".lora_magnitude_vector": "magnitude",
    ".lora_magnitude_vector.weight": "magnitude",
}
#: Segment of a module's path that PEFT adds to the keys of a wrapped module.
BASE_LAYER: Final = "base_layer"
#: Parameters that a module may define together, in the order in which the modules of transformers define them.
_DEFINED: Final = (
    "gate_up_proj",
    "gate_up_proj_bias",
    "gate_proj",
    "up_proj",
    "w1",
    "v1",
    "down_proj",
    "w2",
    "down_proj_bias",
)
#: Numbers of axes of the weights of convolutions over one, two and three axes.
_CONVOLUTION_AXES: Final = (3, 4, 5)
#: Limits that are checked before the shape of the base is known: four times the largest known rank and number of
#: experts.
_MAX_RANK: Final = 1 << 16
_MAX_EXPERTS: Final = 1 << 12

#: Path of a module with PEFT's wrappers → (path without wrappers, key suffix → tensor).
Groups = Mapping[str, tuple[str, Mapping[str, FileTensor]]]


def low_rank_updates(path: Path, groups: Groups, lora: LoraSettings) -> Iterator[LowRank]:
    """Yield the low-rank update of each module or parameter for which the adapter contains LoRA factors.

    Raises LedgerError if factors are missing or the updated parameter cannot be determined, and TensorMismatch if the
    shapes of the factors do not fit the config. Raises NotExpressible if an update cannot be assigned to a parameter
    because the order of the parameters is unknown.
    """
    levels = Counter(module for module, _ in groups.values())
    for wrapped, (module, factors) in groups.items():
        fields = _fields(path, module, factors)
        key = fields["down"].spec.name
        depth = wrapped.split(".").count(BASE_LAYER)
        parameter = _parameter(path, key, lora, module, depth=depth, levels=levels[module])
        yield _update(path, module, parameter, fields, factors, lora)


def _fields(path: Path, module: str, factors: Mapping[str, FileTensor]) -> dict[str, FileTensor]:
    """Check that both factors are present, and map the field names of LowRank (such as ``down``) to the tensors."""
    fields = {FACTORS[suffix]: tensor for suffix, tensor in factors.items()}
    first = next(iter(factors.values()))
    if len(fields) != len(factors) or not {"down", "up"} <= fields.keys():
        names = "lora_embedding_A and lora_embedding_B" if "embedding" in first.spec.name else "lora_A and lora_B"
        listed = ", ".join(suffix.lstrip(".") for suffix in factors)
        raise LedgerError(path, first.spec.name, expected=f"{names} of {module}", found=listed)
    convolution = len(fields["down"].spec.shape) in _CONVOLUTION_AXES
    for field, tensor in fields.items():
        require_floats(path, tensor)
        require_gathered(path, tensor, n_axes=2 if field in ("down", "up") and not convolution else None)
    return _flattened(path, fields) if convolution else fields


def _flattened(path: Path, fields: Mapping[str, FileTensor]) -> dict[str, FileTensor]:
    """Return the LoRA factors of a convolution as matrices of shapes (rank, in * kernel) and (out, rank).

    The product of both matrices is the update of the flattened weight. Source: ``_ConvNd.get_delta_weight`` in PEFT.
    Raises NotExpressible for a grouped convolution, for which the number of columns of ``up`` differs from the rank.
    Raises TensorMismatch if ``up`` has another invalid shape.
    """
    down, up = fields["down"], fields["up"]
    shape = up.spec.shape
    if len(shape) != len(down.spec.shape) or any(size != 1 for size in shape[2:]):
        expected = f"lora_B of shape (out, r{', 1' * (len(down.spec.shape) - 2)})"
        raise TensorMismatch(path, up.spec.name, expected=expected, found=f"shape {shape}")
    if shape[1] != down.spec.shape[0]:
        reason = "the adapter updates a grouped convolution, which neither ttexport nor PEFT can merge"
        raise NotExpressible(f"{path}: {down.spec.name}", reason, instead="train without this module")
    return {**fields, "down": _as_matrix(down), "up": _as_matrix(up)}


def _as_matrix(tensor: FileTensor) -> FileTensor:
    spec = tensor.spec
    return replace(tensor, spec=replace(spec, shape=(spec.shape[0], math.prod(spec.shape[1:]))))


def _update(
    path: Path,
    module: str,
    parameter: str | None,
    fields: Mapping[str, FileTensor],
    factors: Mapping[str, FileTensor],
    lora: LoraSettings,
) -> LowRank:
    down, up = fields["down"], fields["up"]
    target = f"{module}.{parameter}" if parameter else module
    stated, (rows, _) = lora.rank_of(target), down.spec.shape
    experts, rest = divmod(rows, stated) if parameter else (1, rows - stated)
    if max(stated, rows // max(1, experts)) > _MAX_RANK or experts > _MAX_EXPERTS:
        expected = f"a rank of at most {_MAX_RANK}" + (f" for each of {_MAX_EXPERTS} experts" if parameter else "")
        raise TensorMismatch(path, down.spec.name, expected=expected, found=rows)
    if rest or not experts or up.spec.shape[1] != rows:
        expected = f"rank {stated}, as in the config, in both factors" + (" for each expert" if parameter else "")
        raise TensorMismatch(path, down.spec.name, expected=expected, found=f"{down.spec.shape} and {up.spec.shape}")
    embedding = any(".lora_embedding_" in suffix for suffix in factors)
    convolution = not embedding and len(factors[".lora_A.weight"].spec.shape) in _CONVOLUTION_AXES
    return LowRank(
        path,
        module,
        parameter or "weight",
        "parameter" if parameter else "embedding" if embedding else "convolution" if convolution else "linear",
        down,
        up,
        lora.scaling_of(target),
        lora.fan_in_fan_out,
        fields.get("magnitude"),
        fields.get("bias"),
        experts=experts,
    )


def _parameter(path: Path, key: str, lora: LoraSettings, module: str, *, depth: int, levels: int) -> str | None:
    """Return the name of the updated parameter in target_parameters, or None if the module is in target_modules.

    depth: number of wrappers that enclose the wrapper of the update. levels: number of updates of ``module``. PEFT
    wraps the parameters of a module in the order in which the module's class defines the parameters, so that the
    parameter that is defined last has the outermost wrapper. Source: ``BaseTuner._inject_parameters``.
    """
    names = lora.parameters_of(module, levels)
    if not names:
        return None
    if len(names) != levels:
        expected = f"an update of each of the parameters {', '.join(names)}"
        raise LedgerError(path, key, expected=expected, found=f"updates of {levels} parameters of {module}")
    if levels > 1 and not set(names) <= set(_DEFINED):
        raise NotExpressible(
            f"{path}: {key}",
            f"the adapter updates {' and '.join(names)} of {module}, and the keys do not show which update belongs to "
            "which parameter",
            instead=PEFT_MERGE,
        )
    return sorted(names, key=_DEFINED.index)[levels - 1 - depth] if levels > 1 else names[0]
