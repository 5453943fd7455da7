"""A PEFT adapter folder, read into typed edits: what it sets, where, and from which tensors of which file."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final

from exporter.errors import BadInput, NotExpressible, UnreadableFile
from exporter.io.json_objects import read_object
from exporter.sources.hf.checkpoint import auxiliary_files
from exporter.sources.hf.safetensors import read_tensors
from exporter.sources.peft.edits import Edit, TokenRows
from exporter.sources.peft.keys import read_edits
from exporter.sources.peft.lora_config import PEFT_MERGE, LoraSettings
from exporter.tensors import byte_blocks

WEIGHTS: Final = "adapter_model.safetensors"
CONFIG: Final = "adapter_config.json"
_KINDS: Final = ("TRAINABLE_TOKENS", "LORA")
#: What of the config decides on what the tensors do to a base.
_DECIDES: Final = (
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
#: The digest of a model that no adapter went into: as long as any, so that a patch moves no byte.
NO_ADAPTERS_DIGEST: Final = "0" * 64


@dataclass(frozen=True)
class Adapter:
    """An adapter folder. Opening reads the config and its small tensors.

    unused: tensors of the file that are copies of what the base holds → why they are not applied.
    """

    path: Path
    config: Mapping[str, Any]
    edits: Sequence[Edit]
    unused: Mapping[str, str]

    @classmethod
    def open(cls, path: Path) -> Adapter:
        """Read and check the folder.

        Raises BadInput for a folder that is no adapter or holds broken tensors, LedgerError for a tensor that no rule
        takes, NotExpressible for an adapter kind that is not merged here.
        """
        if not os.path.lexists(path / CONFIG):
            raise UnreadableFile(path / CONFIG, "expected a PEFT adapter, found no such file")
        config = read_object(path / CONFIG)
        kind = _kind(path, config)
        if not os.path.lexists(path / WEIGHTS) and (path / "adapter_model.bin").exists():
            raise BadInput(
                f"{path / 'adapter_model.bin'}: expected {WEIGHTS}, found pickled weights, which are not read; "
                "load the adapter with PEFT and save it again with save_pretrained"
            )
        lora = LoraSettings.read(path / CONFIG, config) if kind == "LORA" else None
        tensors = read_tensors(path / WEIGHTS)
        edits, unused = read_edits(path / WEIGHTS, path / CONFIG, config, lora, tensors)
        if not edits:
            raise UnreadableFile(path / WEIGHTS, "expected token rows or LoRA factors, found no tensors")
        return cls(path, config, edits, unused)

    @property
    def weights(self) -> Path:
        """The file with the tensors."""
        return self.path / WEIGHTS

    @property
    def rows(self) -> list[TokenRows]:
        """The edits that are rows of tokens."""
        return [edit for edit in self.edits if isinstance(edit, TokenRows)]

    @property
    def keys(self) -> list[str]:
        """Every tensor of the file."""
        return [key for edit in self.edits for key in edit.keys] + list(self.unused)

    @property
    def base_name(self) -> str | None:
        """What the adapter says it was trained on: a path or a hub id."""
        name = self.config.get("base_model_name_or_path")
        return name if isinstance(name, str) and name else None

    @cached_property
    def digest(self) -> str:
        """sha256 of every tensor, and of what the config says of them: tells adapters apart, wherever they lie."""
        digest = hashlib.sha256()
        told = {key: self.config.get(key) for key in _DECIDES}
        digest.update(json.dumps(told, sort_keys=True).encode())
        for name, tensor in sorted(read_tensors(self.weights).items()):
            digest.update(f"\n{name} {tensor.spec.dtype} {tensor.spec.shape}\n".encode())
            for content in byte_blocks(tensor):
                digest.update(content)
        return digest.hexdigest()

    @property
    def auxiliary_files(self) -> dict[str, Path]:
        """Tokenizer files beside the adapter: name → path."""
        return auxiliary_files(self.path)


def combined_digest(recorded: str, adapters: Sequence[Adapter]) -> str:
    """Identifies the set of adapters merged into a model. recorded: the digest before, or NO_ADAPTERS_DIGEST.

    The sum of the adapters' digests modulo 2**256: the order of adapters does not matter. Source: AdHash of Bellare
    and Micciancio, "A New Paradigm for Collision-Free Hashing".
    """
    total = sum((int(adapter.digest, 16) for adapter in adapters), int(recorded, 16))
    return f"{total % (1 << 256):064x}"


def _kind(path: Path, config: Mapping[str, Any]) -> str:
    kind = config.get("peft_type")
    if not isinstance(kind, str):
        raise UnreadableFile(path / CONFIG, f"expected peft_type to name an adapter kind, found {kind!r:.80}")
    if kind not in _KINDS:
        raise NotExpressible(
            f"{path / CONFIG}: peft_type {kind}",
            f"only {' and '.join(_KINDS)} adapters are merged",
            instead=PEFT_MERGE,
        )
    return kind
