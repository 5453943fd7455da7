"""Which tokenizer, chat template and generation config the merged model carries: the adapter's win over the base's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Final

from exporter.errors import BadInput
from exporter.io.files import read_file
from exporter.io.json_objects import read_object
from exporter.sources.hf.checkpoint import ADDITIONAL_TEMPLATES, GENERATION_CONFIG, VOCABULARIES
from exporter.sources.peft.adapter import Adapter

#: These belong to the model or to the dialogue, not to the tokenizer: the base's stay if the adapter has none.
_TEMPLATES: Final = ("chat_template.jinja", "chat_template.json")
_SETTINGS: Final = "tokenizer_config.json"


def merge_auxiliary_files(base: Mapping[str, Path], adapters: Sequence[Adapter]) -> dict[str, Path]:
    """Name → path; ``base``: the base's own. An adapter's tokenizer replaces it as a whole: two are never mixed.

    Raises BadInput if two adapters bring different files of one name.
    """
    brought = brought_files(adapters)
    if any(map(_is_template, brought)) or "chat_template" in _settings(brought):
        # Templates are one set: a file of the base's would hide the adapter's, or offer dialogues it was not made for.
        base = {name: path for name, path in base.items() if not _is_template(name)}
    if brought.keys() & set(VOCABULARIES):
        base = {name: path for name, path in base.items() if name == GENERATION_CONFIG or _is_template(name)}
    return {**base, **brought}


def _is_template(name: str) -> bool:
    return name in _TEMPLATES or fnmatchcase(name, ADDITIONAL_TEMPLATES)


def _settings(files: Mapping[str, Path]) -> Mapping[str, Any]:
    return read_object(files[_SETTINGS]) if _SETTINGS in files else {}


def brought_files(adapters: Sequence[Adapter]) -> dict[str, Path]:
    """The side files of all adapters, name → path. Raises BadInput if two of them differ."""
    brought: dict[str, Path] = {}
    for adapter in adapters:
        for name, path in adapter.auxiliary_files.items():
            first = brought.setdefault(name, path)
            if first != path and read_file(first) != read_file(path):
                raise BadInput(f"{path}: expected the same file as {first}, found another one")
    return brought
