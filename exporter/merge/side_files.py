"""Which tokenizer, chat template and generation config the merged model carries: the adapter's win over the base's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

from exporter.errors import BadInput
from exporter.sources.adapter import Adapter
from exporter.sources.checkpoint import Checkpoint
from exporter.sources.files import read_file
from exporter.sources.json_objects import read_object

#: These belong to the model or to the dialogue, not to the tokenizer: the base's stay if the adapter has none.
_TEMPLATES: Final = ("chat_template.jinja", "chat_template.json")
_KEPT: Final = ("generation_config.json", *_TEMPLATES)
_SETTINGS: Final = "tokenizer_config.json"
#: Any of these makes a tokenizer.
_VOCABULARIES: Final = ("tokenizer.json", "tokenizer.model", "vocab.json")


def merge_side_files(checkpoint: Checkpoint, adapters: Sequence[Adapter]) -> dict[str, Path]:
    """Name → path. An adapter's tokenizer replaces the base's as a whole: files of two tokenizers are never mixed.

    Raises BadInput if two adapters bring different files of one name.
    """
    brought = brought_files(adapters)
    base = checkpoint.side_files
    if "chat_template" in (read_object(brought[_SETTINGS]) if _SETTINGS in brought else {}):
        # A template in a file of its own would hide the adapter's for every reader.
        base = {name: path for name, path in base.items() if name not in _TEMPLATES}
    if brought.keys() & set(_VOCABULARIES):
        base = {name: path for name, path in base.items() if name in _KEPT}
    return base | brought


def brought_files(adapters: Sequence[Adapter]) -> dict[str, Path]:
    """The side files of all adapters, name → path. Raises BadInput if two of them differ."""
    brought: dict[str, Path] = {}
    for adapter in adapters:
        for name, path in adapter.side_files.items():
            first = brought.setdefault(name, path)
            if first != path and read_file(first) != read_file(path):
                raise BadInput(f"{path}: expected the same file as {first}, found another one")
    return brought
