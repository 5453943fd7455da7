"""Parses the names (keys) of the tensors in an adapter file and builds edits from the tensors.

In an adapter file, a tensor key has the form ``base_model.model.<module>.<suffix>``, as written by
``get_peft_model_state_dict`` of PEFT 0.12 to 0.21. The suffix of a tensor key is ``trainable_tokens_delta`` (below
``token_adapter`` if the adapter is a LoRA), ``lora_A.weight``, ``lora_B.weight|bias``, ``lora_embedding_A``,
``lora_embedding_B``, ``lora_magnitude_vector``, or the name of a parameter. A suffix that is the name of a parameter
marks a tensor of a module in ``modules_to_save``, a trained bias, or, below ``base_layer``, a changed tensor of the
base, such as a resized embedding. PEFT names token rows "delta", but applies token rows with ``index_copy``, so the
stored token rows are **final rows** and not differences.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np

from exporter.errors import LedgerError, TensorMismatch, UnreadableFile
from exporter.sources.hf.safetensors import FileTensor
from exporter.sources.peft.edits import Edit, FullModule, LowRank, TokenRows, first_not_finite, require_floats
from exporter.sources.peft.lora_config import LoraSettings
from exporter.tensors import read

_PREFIX: Final = "base_model.model."
_ROWS: Final = ".trainable_tokens_delta"
#: Key suffix → name of a field of LowRank.
_FACTORS: Final = {
    ".lora_A.weight": "down",
    ".lora_B.weight": "up",
    ".lora_B.bias": "bias",
    ".lora_embedding_A": "down",
    ".lora_embedding_B": "up",
    ".lora_magnitude_vector": "magnitude",
    ".lora_magnitude_vector.weight": "magnitude",
}
#: Path segments of PEFT's wrappers. The module paths of the base do not contain these segments.
_WRAPPERS: Final = ("base_layer", "token_adapter", "modules_to_save")
_ORIGINAL: Final = "original_module"
#: Maximum width of a row: four times the widest known model. A limit is needed because rows are read before the width
#: of the base is known.
_MAX_WIDTH: Final = 1 << 16

Tensors = Mapping[str, FileTensor]


def read_edits(
    path: Path, config_path: Path, config: Mapping[str, Any], lora: LoraSettings | None, tensors: Tensors
) -> tuple[list[Edit], dict[str, str]]:
    """Parse all tensors and return (edits, names of tensors that are not merged → the reasons).

    lora: the settings of the adapter if its type is LORA, or None if its type is TRAINABLE_TOKENS. Raises LedgerError
    for a tensor that no merge rule handles, TensorMismatch for an invalid tensor, and UnreadableFile for invalid token
    ids.
    """
    edits: list[Edit] = []
    unused: dict[str, str] = {}
    factors: dict[str, dict[str, FileTensor]] = {}
    for key, tensor in tensors.items():
        if not key.startswith(_PREFIX):
            expected = f"{_PREFIX}<module>{_ROWS}, LoRA factors or a saved module"
            raise LedgerError(path, key, expected=expected, found="a tensor that no rule takes")
        name = key.removeprefix(_PREFIX)
        suffix = next((factor for factor in _FACTORS if name.endswith(factor)), None)
        if name.endswith(_ROWS):
            module = _unwrapped(name.removesuffix(_ROWS))
            edits.append(_token_rows(path, tensor, module, _token_ids(config_path, config, module)))
        elif suffix and lora:
            factors.setdefault(name.removesuffix(suffix), {})[suffix] = tensor
        elif f".{_ORIGINAL}." in name:
            unused[key] = "the base's own tensor, kept beside its trained copy"
        else:
            edits.append(_full_module(path, tensor, name, config, lora))
    edits += [_low_rank(path, module, tensors_of, lora) for module, tensors_of in factors.items() if lora]
    _drop_duplicates(edits, unused)
    return edits, unused


def _unwrapped(module: str) -> str:
    return ".".join(segment for segment in module.split(".") if segment not in _WRAPPERS)


def _drop_duplicates(edits: list[Edit], unused: dict[str, str]) -> None:
    """Remove duplicate edits, because PEFT may store a saved module under two keys: its own and its wrapper's."""
    seen: dict[tuple[str, str, bool], FullModule] = {}
    for edit in [edit for edit in edits if isinstance(edit, FullModule)]:
        first = seen.setdefault((edit.module, edit.parameter, edit.in_place), edit)
        if first is not edit:
            if not first.equals(edit):
                raise LedgerError(
                    edit.path,
                    edit.key,
                    expected="the same values under both keys of the module",
                    found=f"different values under {first.key}",
                )
            edits.remove(edit)
            unused[edit.key] = f"the same as {first.key}"


def _full_module(
    path: Path, tensor: FileTensor, name: str, config: Mapping[str, Any], lora: LoraSettings | None
) -> FullModule:
    wrapped, _, parameter = name.rpartition(".")
    module, key = _unwrapped(wrapped), tensor.spec.name
    foreign = any(segment.startswith(("lora_", "trainable_")) for segment in name.split("."))
    if not module or foreign or (lora is None and parameter != "weight"):
        raise LedgerError(path, key, expected="rows, factors or a saved module", found="a tensor that no rule takes")
    require_floats(path, tensor)
    saved = config.get("modules_to_save") or []
    copied = isinstance(saved, list) and any(_ends_with(module, entry) for entry in saved if isinstance(entry, str))
    in_base = "base_layer" in wrapped.split(".")
    biases = lora is not None and parameter == "bias" and config.get("bias", "none") != "none"
    resized = parameter == "weight" and len(tensor.spec.shape) == 2
    if not (copied or in_base or biases or resized):
        raise LedgerError(path, key, expected="a module of modules_to_save", found="a tensor that no rule takes")
    return FullModule(path, key, module, parameter, tensor, in_place=not copied)


def _ends_with(module: str, suffix: str) -> bool:
    """Whether the dotted name ``module`` contains all segments of the dotted name ``suffix`` in sequence."""
    return f".{module}".endswith(f".{suffix}") or f".{suffix}." in f".{module}."


def _low_rank(path: Path, wrapped: str, factors: Tensors, lora: LoraSettings) -> LowRank:
    """Build the low-rank update of one module. factors: maps the suffix of each tensor key to the tensor."""
    module = _unwrapped(wrapped)
    fields = {_FACTORS[suffix]: tensor for suffix, tensor in factors.items()}
    first = next(iter(factors.values()))
    if len(fields) != len(factors) or not {"down", "up"} <= fields.keys():
        names = "lora_embedding_A and lora_embedding_B" if "embedding" in first.spec.name else "lora_A and lora_B"
        listed = ", ".join(suffix.lstrip(".") for suffix in factors)
        raise LedgerError(path, first.spec.name, expected=f"{names} of {module}", found=listed)
    for tensor in fields.values():
        require_floats(path, tensor)
    down, up = fields["down"], fields["up"]
    for tensor in (down, up):
        if len(tensor.spec.shape) != 2 or 0 in tensor.spec.shape:
            hint = "factors that were sharded in training must be gathered before they are saved"
            raise TensorMismatch(path, tensor.spec.name, expected="a matrix", found=tensor.spec.shape, hint=hint)
    embedding = any(".lora_embedding_" in suffix for suffix in factors)
    parameter, by_name = _parameter(wrapped, module, lora)
    target = f"{module}.{parameter}" if by_name else module
    rank = down.spec.shape[0]
    if rank > _MAX_WIDTH:
        raise TensorMismatch(path, down.spec.name, expected=f"a rank of at most {_MAX_WIDTH}", found=rank)
    if (not by_name and rank != lora.rank_of(module)) or up.spec.shape[1] != rank:
        expected = f"rank {lora.rank_of(module)} by the config in both factors"
        raise TensorMismatch(path, down.spec.name, expected=expected, found=f"{down.spec.shape} and {up.spec.shape}")
    return LowRank(
        path,
        module,
        parameter,
        "embedding" if embedding else "parameter" if by_name else "linear",
        down,
        up,
        lora.scaling_of(target),
        lora.fan_in_fan_out,
        fields.get("magnitude"),
        fields.get("bias"),
    )


def _parameter(wrapped: str, module: str, lora: LoraSettings) -> tuple[str, bool]:
    """Return (name of the updated parameter, whether the parameter is listed in target_parameters).

    PEFT nests the wrappers of a module's parameters in the order in which the module defines the parameters, with the
    first parameter innermost. Among the supported modules, only stacked experts have more than one parameter, and
    stacked experts define the down projection last.
    """
    named = [name.rpartition(".")[2] for name in lora.parameters if _ends_with(module, name.rpartition(".")[0])]
    if not named:
        return "weight", False
    depth = wrapped.split(".").count("base_layer")
    return sorted(named, key=lambda name: name.startswith("down_"))[max(0, len(named) - 1 - depth)], True


def _token_ids(path: Path, config: Mapping[str, Any], module: str) -> list[int]:
    """Return the token ids of the adapter's rows for ``module``.

    The adapter's config contains a single list of token ids, or maps suffixes of module names to lists of token ids.
    """
    name = "token_indices" if config["peft_type"] == "TRAINABLE_TOKENS" else "trainable_token_indices"
    ids = config.get(name)
    if isinstance(ids, dict):
        ids = next((listed for suffix, listed in ids.items() if _ends_with(module, suffix)), None)
    if not isinstance(ids, list) or not all(type(item) is int for item in ids):
        raise UnreadableFile(path, f"{name}: expected a list of integers, found {ids!r:.80}")
    if not ids:
        raise UnreadableFile(path, f"{name}: expected at least one token id, found an empty list")
    if min(ids) < 0:
        raise UnreadableFile(path, f"{name}: expected ids of 0 or more, found {min(ids)}")
    ((commonest, times),) = Counter(ids).most_common(1)
    if times > 1:
        raise UnreadableFile(path, f"{name}: expected each id once, found {commonest} {times} times")
    return ids


def _token_rows(path: Path, tensor: FileTensor, module: str, token_ids: list[int]) -> TokenRows:
    spec = tensor.spec
    if len(spec.shape) != 2 or spec.shape[0] != len(token_ids):
        expected = f"{len(token_ids)} rows, one for each of token_indices"
        raise TensorMismatch(path, spec.name, expected=expected, found=f"shape {spec.shape}")
    if spec.shape[1] > _MAX_WIDTH:
        raise TensorMismatch(path, spec.name, expected=f"rows of at most {_MAX_WIDTH} numbers", found=spec.shape[1])
    require_floats(path, tensor)
    rows = read(tensor)
    if (wrong := first_not_finite(rows)) is not None:
        actual = f"NaN or Inf in the row of token {token_ids[wrong]}"
        raise TensorMismatch(path, spec.name, expected="finite values", found=actual)
    order = np.argsort(token_ids, kind="stable")
    return TokenRows(path, spec.name, module, tuple(sorted(token_ids)), np.ascontiguousarray(rows[order]))
