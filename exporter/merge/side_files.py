"""Which tokenizer, chat template and generation config the merged model carries: the adapter's win over the base's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

from exporter.errors import BadInput
from exporter.sources.adapter import Adapter
from exporter.sources.checkpoint import Checkpoint

#: These belong to the model or to the dialogue, not to the tokenizer: the base's stay if the adapter has none.
_KEPT: Final = ("generation_config.json", "chat_template.jinja", "chat_template.json")


def merge_side_files(checkpoint: Checkpoint, adapters: Sequence[Adapter]) -> dict[str, Path]:
    """Name → path. An adapter's tokenizer replaces the base's as a whole: files of two tokenizers are never mixed.

    Raises BadInput if two adapters bring different files of one name.
    """
    brought: dict[str, Path] = {}
    for adapter in adapters:
        for name, path in adapter.side_files.items():
            if name in brought and brought[name].read_bytes() != path.read_bytes():
                raise BadInput(f"{path}: expected the same file as {brought[name]}, found another one")
            brought.setdefault(name, path)
    base = checkpoint.side_files
    if "tokenizer.json" in brought or "tokenizer.model" in brought:
        base = {name: path for name, path in base.items() if name in _KEPT}
    return base | brought
