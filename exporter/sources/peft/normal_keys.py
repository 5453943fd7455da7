"""Converts the keys of an adapter file to the keys that PEFT's ``save_pretrained`` writes.

If an adapter was saved from the state dict of a wrapped model, its keys differ from PEFT's keys. torch.compile, FSDP
and activation checkpointing insert a segment into the path of each wrapped module, and DistributedDataParallel and
DeepSpeed put ``module.`` before all keys. The keys of a state dict contain the adapter's name, which
``save_pretrained`` removes. If PEFT's ``inject_adapter_in_model`` added the adapter to the model, the keys of the state
dict lack the prefix ``base_model.model.``.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from exporter.errors import BadInput, LedgerError

PREFIX: Final = "base_model.model."
#: Segments that wrappers insert. Sources: OptimizedModule, FullyShardedDataParallel and CheckpointWrapper in torch.
_WRAPPERS: Final = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
#: Prefix of all keys. Sources: DistributedDataParallel in torch, and DeepSpeedEngine.
_PARALLEL: Final = "module."
#: (start, name of the adapter, end). Source: ``_remove_adapter_name_from_state_dict_key`` in PEFT.
_NAMED: Final = (
    re.compile(r"(.*\.lora_[AB])\.([^.]+)(\.(?:weight|bias))"),
    re.compile(r"(.*\.(?:lora_embedding_[AB]|trainable_tokens_delta))\.([^.]+)()"),
    re.compile(r"(.*\.lora_magnitude_vector)\.(?!weight$)([^.]+)(|\.weight)"),
)
#: Ends of keys without the name of an adapter. Most keys have such an end, and no pattern is tried on these keys.
_UNNAMED: Final = (
    ".lora_A.weight",
    ".lora_B.weight",
    ".lora_B.bias",
    ".lora_embedding_A",
    ".lora_embedding_B",
    ".lora_magnitude_vector",
    ".trainable_tokens_delta",
)
#: A copy of a module in modules_to_save, which may consist of several modules.
_COPY: Final = re.compile(r"(.*\.modules_to_save)\.([^.]+)(\..+)")
_DEFAULT_NAME: Final = "default"


@dataclass(frozen=True, slots=True)
class NormalKeys:
    """The keys of an adapter file, and the keys that PEFT's ``save_pretrained`` would write for the same tensors.

    keys: maps each key in the file to PEFT's key. removed: the segments that occur in the keys of the file but not in
    PEFT's keys. prefixed: whether the keys in the file lack PEFT's prefix ``base_model.model.``, which was added to
    PEFT's keys.
    """

    keys: Mapping[str, str]
    removed: tuple[str, ...]
    prefixed: bool

    @property
    def differ(self) -> bool:
        """Whether any stored key differs from the key that PEFT writes."""
        return bool(self.removed) or self.prefixed

    @classmethod
    def of(cls, path: Path, stored: Collection[str]) -> NormalKeys:
        """Convert the keys ``stored`` of the adapter file ``path`` to the keys that PEFT writes.

        Raises BadInput if the file contains several adapters, and LedgerError if two stored keys convert to the same
        key.
        """
        removed: dict[str, None] = {}
        keys = {key: _without_wrappers(key, removed) for key in stored}
        while keys and all(key.startswith(_PARALLEL) for key in keys.values()):
            removed[_PARALLEL] = None
            keys = {stored_key: key.removeprefix(_PARALLEL) for stored_key, key in keys.items()}
        keys = _without_names(path, keys, removed)
        prefixed = bool(keys) and not any(key.startswith("base_model.") for key in keys.values())
        if prefixed:
            keys = {stored_key: f"{PREFIX}{key}" for stored_key, key in keys.items()}
        _require_distinct(path, keys)
        return cls(keys, tuple(removed), prefixed)


def _without_wrappers(key: str, removed: dict[str, None]) -> str:
    if not any(wrapper in key for wrapper in _WRAPPERS):
        return key
    segments = key.split(".")
    removed.update({f"{segment}.": None for segment in segments if segment in _WRAPPERS})
    return ".".join(segment for segment in segments if segment not in _WRAPPERS)


def _without_names(path: Path, keys: Mapping[str, str], removed: dict[str, None]) -> dict[str, str]:
    matches = {stored: _named(key) for stored, key in keys.items()}
    names = {match[2] for match in matches.values() if match}
    if len(names) > 1:
        raise BadInput(
            f"{path}: expected the tensors of one adapter, found the adapters {', '.join(sorted(names))}; "
            "save each adapter to a folder of its own with save_pretrained"
        )
    removed.update({f".{name}": None for name in sorted(names)})
    copies = names or {_DEFAULT_NAME}
    normal = {}
    for stored, key in keys.items():
        match = matches[stored]
        if match is None and (copy := _COPY.fullmatch(key)) and copy[2] in copies:
            removed[f".{copy[2]}"] = None
            match = copy
        normal[stored] = match[1] + match[3] if match else key
    return normal


def _named(key: str) -> re.Match[str] | None:
    if key.endswith(_UNNAMED):
        return None
    return next((match for pattern in _NAMED if (match := pattern.fullmatch(key))), None)


def _require_distinct(path: Path, keys: Mapping[str, str]) -> None:
    first: dict[str, str] = {}
    for stored, key in keys.items():
        if (other := first.setdefault(key, stored)) != stored:
            raise LedgerError(path, stored, expected=f"one tensor for the key {key}", found=f"also {other}")
