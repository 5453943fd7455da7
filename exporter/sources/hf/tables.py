"""Find the tables of a checkpoint that have one entry per token, besides the input embedding and the output head.

Examples are the bias of a head and the per-layer embeddings of Gemma. When tokens are added to the vocabulary, every
table with one entry per token has to be enlarged, because the model would fail on the added tokens otherwise.
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
    """Return all tables that transformers resizes with the embedding, except the head and copies of embedding or head.

    The result includes Gemma's per-layer embeddings. The result excludes tables whose number of entries differs from
    the number of rows of the embedding, such as the tables of a second vocabulary.
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


def replaced_biases(checkpoint: Checkpoint) -> dict[str, str]:
    """Return {name of a stored bias: name of the head's stored bias, which replaces it when the vocabulary is resized}.

    An example is ``cls.predictions.bias`` of a BERT model with a separate head: ``resize_token_embeddings`` makes it
    the same parameter as ``cls.predictions.decoder.bias``. Without a resize, the two biases may differ.
    """
    modules = checkpoint.modules
    if modules is None or checkpoint.tie.tied or modules.architecture.head is None:
        return {}
    bias = modules.stored_name(f"{modules.architecture.head}.bias")
    copies = [modules.stored_name(name) for name in modules.architecture.facts.bias_copies]
    return {name: bias for name in copies if bias and name and name != bias}


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
    """In ``config``, set every key that contains the vocabulary size to ``size``.

    If the model class reads the vocabulary size from a key that ``config`` lacks, the key is added. Transformers omits
    keys with default values in nested configs.
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
    """Return the config keys from which the model class reads the sizes of the embedding and the ``token_tables``."""
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
