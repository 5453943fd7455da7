"""Find the tables of a checkpoint that have one entry per token, besides the input embedding and the output head.

Such tables are the biases of heads, and additional embeddings such as the per-layer embeddings of Gemma. When the
vocabulary grows, all of the tables have to grow, or the model fails on its new tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from exporter.models.architecture import pattern_of
from exporter.models.module_map import ModuleMap
from exporter.sources.hf.checkpoint import Checkpoint

#: Key of the config with the number of rows of Gemma's per-layer embeddings.
_PER_LAYER: Final = "vocab_size_per_layer_input"


@dataclass(frozen=True, slots=True)
class TokenTable:
    """A stored tensor with one entry per token along ``axis``.

    parameter: the tensor's name in the loaded model. key: the dotted key of the config that contains the number of
    entries.
    """

    name: str
    parameter: str
    axis: int
    key: str


def token_tables(checkpoint: Checkpoint) -> list[TokenTable]:
    """Return all tables that transformers resizes with the embedding, except embedding, head and their copies.

    Gemma's per-layer embeddings are included, because transformers resizes them, too, when it resizes the embedding.
    Tables of any other size, such as the tables of a second vocabulary, are not returned.
    """
    modules, tie = checkpoint.modules, checkpoint.tie
    if modules is None:
        return []
    size = checkpoint.tensors[tie.embedding].spec.n_rows
    keys = _own_keys(modules)
    tables = []
    for parameter, axis, key in _described(modules):
        name = modules.stored_name(parameter)
        if name is None or name in tie.names or key not in keys:
            continue
        shape = checkpoint.tensors[name].spec.shape
        if len(shape) > axis and (shape[axis] == size or key.endswith(_PER_LAYER)):
            tables.append(TokenTable(name, parameter, axis, key))
    return tables


def _own_keys(modules: ModuleMap) -> set[str]:
    """Return the dotted config keys that contain the vocabulary size of the embedding and of per-layer embeddings."""
    embedding = f"{modules.architecture.embedding}.weight"
    keys = {key for name, _, key in modules.architecture.tables if name == pattern_of(embedding)}
    return keys | {f"{key.removesuffix('vocab_size')}{_PER_LAYER}" for key in keys}


def _described(modules: ModuleMap) -> list[tuple[str, int, str]]:
    described = {name: (axis, key) for name, axis, key in modules.architecture.tables}
    return [
        (parameter, *described[pattern_of(parameter)])
        for parameter in modules.groups
        if pattern_of(parameter) in described
    ]


def resize_config(config: dict[str, Any], checkpoint: Checkpoint, size: int) -> None:
    """Set to ``size`` every key of ``config`` that contains the number of tokens.

    If ``config`` lacks a key that the model class reads, the key is added, because transformers omits defaults in
    nested configs.
    """
    base = checkpoint.tensors[checkpoint.tie.embedding].spec.n_rows
    for key in ("vocab_size", "text_config.vocab_size", "decoder.vocab_size"):
        table, last = _table(config, key)
        if table is not None and (table.get(last) == base or (checkpoint.modules is None and last in table)):
            table[last] = size
    for key in described_keys(checkpoint):
        table, last = _table(config, key)
        if table is not None:
            table[last] = size


def described_keys(checkpoint: Checkpoint) -> list[str]:
    """Return the dotted config keys from which the model class reads the row counts of embedding and token tables."""
    modules = checkpoint.modules
    if modules is None:
        return []
    names = {checkpoint.tie.embedding, *(table.name for table in token_tables(checkpoint))}
    return sorted({key for parameter, _, key in _described(modules) if modules.stored_name(parameter) in names})


def _table(config: dict[str, Any], key: str) -> tuple[dict[str, Any] | None, str]:
    *path, last = key.split(".")
    table: Any = config
    for name in path:
        table = table.get(name) if isinstance(table, dict) else None
    return (table if isinstance(table, dict) else None), last
