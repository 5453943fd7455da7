"""Checkpoint and adapter folders of a few bytes, written by the safetensors library, for tests of reading."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from exporter.tensors import Array

EMBED = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
NORM = "model.norm.weight"
PREFIX = "base_model.model."
ROWS = ".trainable_tokens_delta"


def matrix(n_rows: int = 6, width: int = 4, start: int = 0, dtype: Any = np.float32) -> Array:
    """A matrix of distinct numbers."""
    return (np.arange(n_rows * width) + start).reshape(n_rows, width).astype(dtype)


def checkpoint(folder: Path, tensors: Mapping[str, Array], **config: object) -> Path:
    """A folder with config.json and one weight file."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(dict(tensors), folder / "model.safetensors", {"format": "pt"})
    return folder


def sharded(folder: Path, shards: Mapping[str, Mapping[str, Array]], **config: object) -> Path:
    """A folder with an index and the weight files ``shards``."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    for shard, tensors in shards.items():
        save_file(dict(tensors), folder / shard, {"format": "pt"})
    write_index(folder, {name: shard for shard, tensors in shards.items() for name in tensors})
    return folder


def write_index(folder: Path, weight_map: Mapping[str, object]) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def adapter(
    folder: Path, token_ids: Sequence[int], rows: Mapping[str, Array], *, base: str | None = None, **config: object
) -> Path:
    """An adapter of token rows in PEFT's format. rows: module name → rows."""
    folder.mkdir(parents=True)
    table = {"peft_type": "TRAINABLE_TOKENS", "token_indices": list(token_ids), "base_model_name_or_path": base}
    (folder / "adapter_config.json").write_text(json.dumps(table | config))
    tensors = {f"{PREFIX}{module}{ROWS}": np.ascontiguousarray(value) for module, value in rows.items()}
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    return folder
