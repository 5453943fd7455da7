"""Reads a PEFT adapter folder, and converts its tensors to edits, each of which changes a module of the base model."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final

from exporter.errors import BadInput, UnreadableFile
from exporter.io.json_objects import read_object
from exporter.sources.hf.checkpoint import auxiliary_files
from exporter.sources.hf.safetensors import read_tensors
from exporter.sources.peft.edits import Edit, FullModule, TokenRows
from exporter.sources.peft.folders import CONFIG, adapter_folder
from exporter.sources.peft.keys import originals, read_edits
from exporter.sources.peft.lora_config import LoraSettings
from exporter.sources.peft.normal_keys import NormalKeys
from exporter.sources.peft.notes import notes
from exporter.sources.peft.types.changes import ByPeft
from exporter.sources.peft.types.table import MERGED, merged_type, refusal
from exporter.tensors import byte_blocks

WEIGHTS: Final = "adapter_model.safetensors"
_PEFT_TYPES: Final = ("TRAINABLE_TOKENS", "LORA")
#: Keys of the config that determine the effect of the tensors on a base.
_EFFECTIVE_KEYS: Final = (
    "peft_type",
    "token_indices",
    "trainable_token_indices",
    "r",
    "lora_alpha",
    "rank_pattern",
    "alpha_pattern",
    "use_rslora",
    "use_dora",
    "fan_in_fan_out",
)
#: Keys of the config that do not change the effect of an adapter that PEFT merges.
_RECORDS: Final = ("auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision", "task_type")
#: ``combined_digest`` of a model without adapters. All digests have the same length, so that a patch moves no byte.
NO_ADAPTERS_DIGEST: Final = "0" * 64


@dataclass(frozen=True)
class Adapter:
    """An adapter folder. ``open`` reads the adapter's config and token rows.

    path: the folder that contains the adapter's files. unused: maps the name of each adapter tensor that is not merged,
    such as a copy of a base tensor, to the reason. normal: the keys under which PEFT's ``save_pretrained`` would store
    the tensors. originals: matrices of the base beside trained copies; these matrices are also in ``unused``.
    """

    path: Path
    config: Mapping[str, Any]
    edits: Sequence[Edit]
    unused: Mapping[str, str]
    normal: NormalKeys
    originals: Sequence[FullModule] = ()

    @classmethod
    def open(cls, path: Path, *, via_peft: bool = False) -> Adapter:
        """Read and check the adapter in the folder ``path``, or in the only subfolder that contains an adapter.

        via_peft: whether adapters that only PEFT can merge are accepted. Raises BadInput if the folder does not contain
        an adapter, or if a tensor of the adapter is invalid. Raises LedgerError if the adapter contains a tensor that
        no merge rule handles. Raises NotExpressible if the adapter type is not supported.
        """
        path = adapter_folder(path)
        config = read_object(path / CONFIG)
        peft_type = _peft_type(path, config, via_peft=via_peft)
        if not os.path.lexists(path / WEIGHTS) and (path / "adapter_model.bin").exists():
            raise BadInput(
                f"{path / 'adapter_model.bin'}: expected {WEIGHTS}, found pickled weights, which ttexport does not "
                "read; load the adapter with PEFT, and save the adapter again with save_pretrained"
            )
        lora = LoraSettings.read(path / CONFIG, config, via_peft=via_peft) if peft_type == "LORA" else None
        tensors = read_tensors(path / WEIGHTS)
        normal = NormalKeys.of(path / WEIGHTS, tensors)
        by_key = {normal.keys[name]: tensor for name, tensor in tensors.items()}
        by_peft = merged_type(config) if via_peft else None
        edits, unused = read_edits(path / WEIGHTS, path / CONFIG, config, lora, by_key, by_peft)
        if not edits:
            raise UnreadableFile(path / WEIGHTS, "expected token rows or LoRA factors, found a file without tensors")
        return cls(path, config, edits, unused, normal, originals(path / WEIGHTS, by_key))

    @property
    def weights(self) -> Path:
        """Path of the file that contains the adapter's tensors."""
        return self.path / WEIGHTS

    @property
    def rows(self) -> list[TokenRows]:
        """Return the edits of the adapter that replace token rows."""
        return [edit for edit in self.edits if isinstance(edit, TokenRows)]

    @property
    def keys(self) -> list[str]:
        """Names of all tensors in the adapter file."""
        return [key for edit in self.edits for key in edit.keys] + list(self.unused)

    @cached_property
    def notes(self) -> list[str]:
        """Return notes for the user about unusual properties of the adapter that do not prevent a merge."""
        return notes(self.weights, self.edits, self.normal)

    @property
    def base_name(self) -> str | None:
        """Path or hub id of the base model that the adapter's config names, or None if the config names no base."""
        name = self.config.get("base_model_name_or_path")
        return name if isinstance(name, str) and name else None

    @cached_property
    def digest(self) -> str:
        """Return the SHA-256 digest of all tensors of the adapter and of the config settings that affect a merge.

        The digest does not depend on where the adapter folder is stored.
        """
        digest = hashlib.sha256()
        keys: Iterable[str] = _EFFECTIVE_KEYS
        if any(isinstance(edit, ByPeft) for edit in self.edits):
            keys = self.config.keys() - _RECORDS
        effective = {key: self.config.get(key) for key in keys}
        digest.update(json.dumps(effective, sort_keys=True).encode())
        for name, tensor in sorted(read_tensors(self.weights).items()):
            digest.update(f"\n{name} {tensor.spec.dtype} {tensor.spec.shape}\n".encode())
            for content in byte_blocks(tensor):
                digest.update(content)
        return digest.hexdigest()

    @property
    def auxiliary_files(self) -> dict[str, Path]:
        """Map the names of the tokenizer files in the adapter folder to their paths."""
        return auxiliary_files(self.path)


def combined_digest(recorded: str, adapters: Sequence[Adapter]) -> str:
    """Return a digest that identifies the set of adapters merged into a model.

    recorded: the digest of the adapters that were already merged, or NO_ADAPTERS_DIGEST. The digest is the sum, modulo
    2**256, of ``recorded`` and of the digests of ``adapters``, so that the order of the adapters does not matter.
    Source: AdHash of Bellare and Micciancio, "A New Paradigm for Collision-Free Hashing".
    """
    total = sum((int(adapter.digest, 16) for adapter in adapters), int(recorded, 16))
    return f"{total % (1 << 256):064x}"


def _peft_type(path: Path, config: Mapping[str, Any], *, via_peft: bool) -> str:
    peft_type = config.get("peft_type")
    if not isinstance(peft_type, str):
        raise UnreadableFile(path / CONFIG, f"peft_type: expected the name of an adapter type, found {peft_type!r:.80}")
    if peft_type not in _PEFT_TYPES and not (via_peft and peft_type in MERGED):
        raise refusal(path / CONFIG, peft_type, via_peft=via_peft)
    return peft_type
