"""Auxiliary files of the merged model: those of the adapters replace those of the base."""

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

#: Chat templates, which do not belong to the tokenizer: the base's stay if the adapter has none.
_TEMPLATES: Final = ("chat_template.jinja", "chat_template.json")
_SETTINGS: Final = "tokenizer_config.json"


def merge_auxiliary_files(base: Mapping[str, Path], adapters: Sequence[Adapter]) -> dict[str, Path]:
    """Name → path. base: the base's files. A tokenizer is replaced as a whole: files of two are never mixed.

    Raises BadInput if two adapters have different files of one name.
    """
    own = adapter_files(adapters)
    if any(map(_is_template, own)) or "chat_template" in _settings(own):
        # Templates are one set: a file of the base could hide the adapter's, or offer dialogues it was not trained on.
        base = {name: path for name, path in base.items() if not _is_template(name)}
    if own.keys() & set(VOCABULARIES):
        base = {name: path for name, path in base.items() if name == GENERATION_CONFIG or _is_template(name)}
    return {**base, **own}


def _is_template(name: str) -> bool:
    return name in _TEMPLATES or fnmatchcase(name, ADDITIONAL_TEMPLATES)


def _settings(files: Mapping[str, Path]) -> Mapping[str, Any]:
    return read_object(files[_SETTINGS]) if _SETTINGS in files else {}


def adapter_files(adapters: Sequence[Adapter]) -> dict[str, Path]:
    """The auxiliary files of all adapters, name → path. Raises BadInput if two files of one name differ."""
    files: dict[str, Path] = {}
    for adapter in adapters:
        for name, path in adapter.auxiliary_files.items():
            first = files.setdefault(name, path)
            if first != path and read_file(first) != read_file(path):
                raise BadInput(f"{path}: expected the same file as {first}, found another one")
    return files
