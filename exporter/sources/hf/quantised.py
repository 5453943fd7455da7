"""Detects, from the config or the tensors, whether a checkpoint contains matrices packed or scaled by a quantiser.

Sources: the quantisation configs and the weight loaders of transformers (``utils/quantization_config.py`` and
``quantizers``), and the tensor names that bitsandbytes, GPTQ, AWQ, compressed-tensors and MLX write.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from exporter.sources.hf.safetensors import FileTensor
from exporter.tensors import FLOATS

#: Keys of a config under which quantisers record their settings. MLX writes the key ``quantization``.
_CONFIG_KEYS: Final = ("quantization_config", "compression_config", "quantization")
#: ``quant_method`` in the config → name of the method.
_METHODS: Final[Mapping[str, str]] = {
    "bitsandbytes": "bitsandbytes",
    "gptq": "GPTQ",
    "awq": "AWQ",
    "fp8": "FP8",
    "fbgemm_fp8": "FP8",
    "mxfp4": "MXFP4",
    "auto-round": "AutoRound",
    "hqq": "HQQ",
    "aqlm": "AQLM",
    "nvfp4": "NVFP4",
    "mxfp8": "MXFP8",
}
_NAME: Final = re.compile(r"[\w.+-]{1,40}", re.ASCII)
#: Methods that store embedding, head and norms as ordinary floats, and that need no packed table for token rows.
_PLAIN_ROWS: Final = frozenset({"FP8", "MXFP4"})
#: Last part of the name of a floating-point tensor that only a quantiser writes.
_SCALES: Final = frozenset(
    {
        "SCB",
        "absmax",
        "nested_absmax",
        "quant_map",
        "nested_quant_map",
        "weight_scale",
        "weight_scale_inv",
        "weight_scale_2",
        "weight_zero_point",
        "weight_global_scale",
        "input_scale",
        "input_global_scale",
        "input_zero_point",
        "activation_scale",
        "output_scale",
        "q_scale",
        "k_scale",
        "v_scale",
        "kv_scale",
        "prob_scale",
    }
)
#: Endings that quantisers add to the name of the tensor that they scale, such as ``gate_up_proj_scale_inv``.
_SCALE_ENDINGS: Final = ("_scale_inv", "_scales", "_scale")


@dataclass(frozen=True, slots=True)
class Quantisation:
    """The quantisation of a checkpoint.

    method: name of the method, such as "GPTQ". place: the config key or the tensor from which the quantisation was
    detected. plain_rows: whether embedding and head are stored as ordinary floats, so that token rows can be replaced
    exactly.
    """

    method: str
    place: str
    plain_rows: bool


def find_quantisation(config: Mapping[str, Any], tensors: Mapping[str, FileTensor]) -> Quantisation | None:
    """Return the quantisation of a checkpoint, or None if neither the config nor the tensors indicate a quantisation.

    If the config and the tensors indicate different methods, token rows can be replaced only if both methods allow the
    replacement.
    """
    stated, stored = _in_config(config), _in_tensors(tensors)
    if stated is None or stored is None:
        return stated or stored
    return Quantisation(stated.method, stated.place, stated.plain_rows and stored.plain_rows)


def quantiser_floats(tensors: Mapping[str, FileTensor]) -> frozenset[str]:
    """Return the names of the floating-point tensors that belong to the quantiser, such as scales.

    The merge must not cast a scale to another dtype, because the cast would change the values of the quantised matrix.
    """
    return frozenset(
        name for name, tensor in tensors.items() if tensor.spec.dtype in FLOATS and _is_scale(name, tensors)
    )


def _is_scale(name: str, tensors: Mapping[str, FileTensor]) -> bool:
    module, _, last = name.rpartition(".")
    if last in _SCALES:
        return True
    if last in ("scales", "biases", "zeros"):
        weight = tensors.get(f"{module}.qweight") or tensors.get(f"{module}.weight")
        return weight is not None and weight.spec.dtype not in FLOATS
    ending = next((ending for ending in _SCALE_ENDINGS if last.endswith(ending)), None)
    return ending is not None and name.removesuffix(ending) in tensors


def _in_config(config: Mapping[str, Any]) -> Quantisation | None:
    nested = [(f"{name}.", table) for name, table in config.items() if isinstance(table, dict)]
    for prefix, table in (("", config), *nested):
        for key in _CONFIG_KEYS:
            settings = table.get(key)
            if isinstance(settings, dict) and settings:
                method, plain_rows = _method(settings)
                return Quantisation(method, f"config.json: {prefix}{key}", plain_rows)
    return None


def _method(settings: Mapping[str, Any]) -> tuple[str, bool]:
    """From the quantisation config, return (name of the method, whether token rows can be replaced exactly)."""
    stated = settings.get("quant_method")
    bits = next((bits for bits in (4, 8) if settings.get(f"load_in_{bits}bit") is True), None)
    if stated == "bitsandbytes" or (stated is None and bits):
        return f"bitsandbytes ({bits} bits)" if bits else "bitsandbytes", False
    if stated is None and "group_size" in settings:
        return "MLX", False
    if stated == "compressed-tensors" or (stated is None and "config_groups" in settings):
        fp8 = settings.get("format") in ("float-quantized", "naive-quantized") and _only_floats(settings)
        return ("FP8 (compressed-tensors)" if fp8 else "compressed-tensors"), fp8
    if stated == "modelopt" or (stated is None and "quant_algo" in settings):
        algorithm = _printable(settings.get("quant_algo"))
        return f"{algorithm} (ModelOpt)", algorithm == "FP8"
    method = _METHODS.get(str(stated)) or _printable(stated)
    return method, method in _PLAIN_ROWS


def _printable(name: object) -> str:
    """Return the name of an unknown quantisation method, or "an unnamed method" if the name is not short ASCII text."""
    return name if isinstance(name, str) and _NAME.fullmatch(name) else "an unnamed method"


def _only_floats(settings: Mapping[str, Any]) -> bool:
    """Whether every group of a compressed-tensors config stores its weights as 8-bit floats."""
    groups = settings.get("config_groups")
    listed = list(groups.values()) if isinstance(groups, dict) else []
    weights = [group.get("weights") if isinstance(group, dict) else None for group in listed]
    return all(
        isinstance(table, dict) and (table.get("type"), table.get("num_bits")) == ("float", 8) for table in weights
    )


def _in_tensors(tensors: Mapping[str, FileTensor]) -> Quantisation | None:
    """Return the quantisation that the tensors' names and dtypes indicate, or None if they indicate no quantisation.

    If both a packed format and FP8 are possible, the packed format is returned, because packed formats may store scales
    in FP8.
    """
    first: tuple[str, str] | None = None
    for name, method in _shown(tensors):
        if method not in _PLAIN_ROWS:
            return Quantisation(method, name, plain_rows=False)
        first = first or (name, method)
    return Quantisation(first[1], first[0], plain_rows=True) if first else None


def _shown(tensors: Mapping[str, FileTensor]) -> Iterator[tuple[str, str]]:
    """Yield (tensor, method) for each tensor whose name or dtype indicates a quantisation method."""
    for name, tensor in tensors.items():
        method = _method_of(name, tensor, tensors)
        if method:
            yield name, method


def _method_of(name: str, tensor: FileTensor, tensors: Mapping[str, FileTensor]) -> str | None:
    dtype = tensor.spec.dtype
    if dtype in FLOATS and name.endswith(".weight"):
        return None  # the case of almost every tensor of a large mixture
    module, _, last = name.rpartition(".")
    if last == "SCB":
        return "bitsandbytes (8 bits)"
    if last in ("absmax", "quant_map") or last.startswith("bitsandbytes__"):
        return "bitsandbytes (4 bits)"
    if last == "qweight":
        return "GPTQ" if f"{module}.g_idx" in tensors else "AWQ"
    if last == "weight_packed":
        return "compressed-tensors"
    if last == "weight_scale_inv":
        return "FP8"
    if dtype in FLOATS or len(tensor.spec.shape) < 2:
        return None
    if last.endswith("_blocks") and f"{name.removesuffix('_blocks')}_scales" in tensors:
        return "MXFP4"
    if last.endswith("_scales") and f"{name.removesuffix('_scales')}_blocks" in tensors:
        return "MXFP4"
    if dtype.startswith("F8_"):
        return "FP8"
    return _integer_method(name, module, tensors) if last == "weight" else None


def _integer_method(name: str, module: str, tensors: Mapping[str, FileTensor]) -> str:
    """Return the quantisation method of the weight ``name``, which is stored as integers."""
    if f"{module}.SCB" in tensors:
        return "bitsandbytes (8 bits)"
    if f"{name}.absmax" in tensors:
        return "bitsandbytes (4 bits)"
    if f"{module}.scales" in tensors and f"{module}.biases" in tensors:
        return "MLX"
    return f"a format of {tensors[name].spec.dtype} integers"
