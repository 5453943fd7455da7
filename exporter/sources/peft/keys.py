"""Parses the names (keys) of the tensors in an adapter file, and builds edits (changes of modules) from the tensors.

``get_peft_model_state_dict`` of PEFT 0.12 to 0.21 writes tensor keys of the form
``base_model.model.<module>.<suffix>``. The suffix of a tensor key is ``trainable_tokens_delta`` (below
``token_adapter`` if the adapter is a LoRA), ``lora_A.weight``, ``lora_B.weight|bias``, ``lora_embedding_A``,
``lora_embedding_B``, ``lora_magnitude_vector``, or the name of a parameter. A suffix that is the name of a parameter
marks a tensor of a module in ``modules_to_save``, a trained bias, or, below ``base_layer``, a changed tensor of the
base, such as a resized embedding.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from exporter.errors import LedgerError
from exporter.sources.hf.safetensors import FileTensor
from exporter.sources.peft.edits import Edit, FullModule, require_floats, require_gathered
from exporter.sources.peft.lora_config import LoraSettings
from exporter.sources.peft.low_rank import BASE_LAYER, FACTORS, low_rank_updates
from exporter.sources.peft.matching import wraps
from exporter.sources.peft.normal_keys import PREFIX
from exporter.sources.peft.token_rows import token_rows
from exporter.sources.peft.types.changes import changes_by_peft
from exporter.sources.peft.types.table import MergedType

_ROWS: Final = ".trainable_tokens_delta"
#: Path segments of PEFT's wrappers. The module paths of the base do not contain these segments.
_WRAPPERS: Final = (BASE_LAYER, "token_adapter", "modules_to_save")
_ORIGINAL: Final = "original_module"
#: Why a tensor below ``original_module`` is not merged.
_REPLACED: Final = "tensor of the base that a trained copy replaces"
#: Modules whose weight is a matrix. Source: EMBEDDING_LAYER_NAMES in PEFT.
_MATRICES: Final = ("embed_tokens", "lm_head")

Tensors = Mapping[str, FileTensor]


def read_edits(
    path: Path,
    config_path: Path,
    config: Mapping[str, Any],
    lora: LoraSettings | None,
    tensors: Tensors,
    by_peft: MergedType | None = None,
) -> tuple[list[Edit], dict[str, str]]:
    """Parse all tensors and return (edits, {name of a tensor that is not merged: reason why it is not merged}).

    lora: the settings of the adapter if its type is LORA, else None. tensors: maps the keys that PEFT's
    ``save_pretrained`` writes to the tensors. The key of a tensor in the adapter file may differ and is its
    ``spec.name``. by_peft: the type of the adapter if PEFT computes the merge, else None. Raises LedgerError for a
    tensor that no merge rule handles, TensorMismatch for an invalid tensor, and UnreadableFile for invalid token ids.
    Raises NotExpressible if the keys do not determine which parameter an update changes.
    """
    changes, shared = changes_by_peft(path, by_peft, tensors) if by_peft else ([], {})
    edits: list[Edit] = list(changes)
    unused = {tensor.spec.name: "tensor that all modules share, applied by PEFT" for tensor in shared.values()}
    of_changes = {name for change in changes for name in change.keys} | unused.keys()
    rows: list[tuple[str, FileTensor]] = []
    factors: dict[str, dict[str, FileTensor]] = {}
    for key, tensor in tensors.items():
        if tensor.spec.name in of_changes:
            continue
        if not key.startswith(PREFIX):
            expected = f"a tensor name that begins with {PREFIX}"
            raise LedgerError(path, tensor.spec.name, expected=expected, found="a tensor that no merge rule handles")
        name = key.removeprefix(PREFIX)
        suffix = next((factor for factor in FACTORS if name.endswith(factor)), None)
        if name.endswith(_ROWS):
            rows.append((_unwrapped(name.removesuffix(_ROWS)), tensor))
        elif suffix and lora:
            factors.setdefault(name.removesuffix(suffix), {})[suffix] = tensor
        elif f".{_ORIGINAL}." in name:
            unused[tensor.spec.name] = _REPLACED
        else:
            whole = lora is not None or by_peft is not None
            beside = _beside_matrix(tensors, name)
            edits.append(_full_module(path, tensor, name, config, whole_modules=whole, beside_matrix=beside))
    edits += token_rows(path, config_path, config, rows)
    if lora:
        groups = {wrapped: (_unwrapped(wrapped), of_module) for wrapped, of_module in factors.items()}
        edits += low_rank_updates(path, groups, lora)
    _drop_duplicates(edits, unused)
    return edits, unused


def originals(path: Path, tensors: Tensors) -> list[FullModule]:
    """Return the weight matrices of the base that an adapter file stores below ``original_module``.

    PEFT stores the base's own matrix beside the copy that it trained for ``modules_to_save``, if the user resized the
    matrix before training. tensors: maps the keys that PEFT's ``save_pretrained`` writes to the tensors.
    """
    ending = f".{_ORIGINAL}.weight"
    return [
        FullModule(
            path, tensor.spec.name, key.removeprefix(PREFIX).removesuffix(ending), "weight", tensor, in_place=True
        )
        for key, tensor in tensors.items()
        if key.endswith(ending) and len(tensor.spec.shape) == 2
    ]


def _unwrapped(module: str) -> str:
    return ".".join(segment for segment in module.split(".") if segment not in _WRAPPERS)


def _drop_duplicates(edits: list[Edit], unused: dict[str, str]) -> None:
    """Remove duplicate edits: PEFT may store a module twice, under its own key and under the key of its wrapper."""
    seen: dict[tuple[str, str, bool], FullModule] = {}
    for edit in [edit for edit in edits if isinstance(edit, FullModule)]:
        first = seen.setdefault((edit.module, edit.parameter, edit.in_place), edit)
        if first is not edit:
            if not first.equals(edit):
                raise LedgerError(
                    edit.path,
                    edit.key,
                    expected="equal values in the two tensors stored for the module",
                    found=f"different values in {first.key}",
                )
            edits.remove(edit)
            unused[edit.key] = f"the same as {first.key}"


def _beside_matrix(tensors: Tensors, name: str) -> bool:
    """Whether ``name`` is a bias, and the adapter also contains the weight matrix of the module."""
    module, _, parameter = name.rpartition(".")
    matches = [tensor for key, tensor in tensors.items() if key.endswith(f"{module}.weight")]
    return parameter == "bias" and any(len(tensor.spec.shape) == 2 for tensor in matches)


def _full_module(
    path: Path,
    tensor: FileTensor,
    name: str,
    config: Mapping[str, Any],
    *,
    whole_modules: bool,
    beside_matrix: bool,
) -> FullModule:
    wrapped, _, parameter = name.rpartition(".")
    module, key = _unwrapped(wrapped), tensor.spec.name
    foreign = any(segment.startswith(("lora_", "trainable_")) for segment in name.split("."))
    if not module or foreign or (not whole_modules and parameter != "weight"):
        raise LedgerError(
            path,
            key,
            expected="token rows, LoRA factors or a saved module",
            found="a tensor that no merge rule handles",
        )
    require_floats(path, tensor)
    in_base = BASE_LAYER in wrapped.split(".")
    wraps_matrix = wrapped.rpartition(".")[2] == BASE_LAYER or module.rpartition(".")[2] in _MATRICES
    is_matrix = parameter == "weight" and wraps_matrix
    require_gathered(path, tensor, n_axes=2 if is_matrix and len(tensor.spec.shape) == 1 else None)
    saved = config.get("modules_to_save") or []
    copied = isinstance(saved, list) and any(wraps(entry, module) for entry in saved if isinstance(entry, str))
    biases = whole_modules and parameter == "bias" and config.get("bias", "none") != "none"
    # PEFT saves a resized head whole, with the bias of the head.
    resized = (parameter == "weight" and len(tensor.spec.shape) == 2) or (parameter == "bias" and beside_matrix)
    if not (copied or in_base or biases or resized):
        raise LedgerError(
            path, key, expected="a module listed in modules_to_save", found="a tensor that no merge rule handles"
        )
    return FullModule(path, key, module, parameter, tensor, in_place=not copied)
