"""Chooses the auxiliary files of the merged model; an adapter's file replaces the base's file of the same name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Final

from exporter.errors import BadInput
from exporter.io.files import read_file
from exporter.io.json_objects import read_object
from exporter.merge.vocabulary.nesting import largest
from exporter.sources.hf.checkpoint import ADDITIONAL_TEMPLATES, GENERATION_CONFIG, VOCABULARIES
from exporter.sources.peft.adapter import Adapter

#: Chat templates. A chat template does not belong to the tokenizer: the base's templates stay if the adapter has no
#: template.
_TEMPLATES: Final = ("chat_template.jinja", "chat_template.json")
_SETTINGS: Final = "tokenizer_config.json"


def merge_auxiliary_files(base: Mapping[str, Path], adapters: Sequence[Adapter]) -> dict[str, Path]:
    """Return a dict that maps the name of each auxiliary file of the merged model to the path of the file to copy.

    If an adapter contains a tokenizer, none of the base model's tokenizer files is used, so that files of two
    tokenizers are never mixed. Raises BadInput if two adapters contain different files that cannot be combined, such as
    unrelated tokenizers.
    """
    own = adapter_files(adapters)
    if any(map(_is_template, own)) or "chat_template" in _settings(own):
        # All templates are replaced together: a template of the base could hide the adapter's template, or format
        # dialogues on which the adapter was not trained.
        base = {name: path for name, path in base.items() if not _is_template(name)}
    if own.keys() & set(VOCABULARIES):
        base = {name: path for name, path in base.items() if name == GENERATION_CONFIG or _is_template(name)}
    return {**base, **own}


def _is_template(name: str) -> bool:
    return name in _TEMPLATES or fnmatchcase(name, ADDITIONAL_TEMPLATES)


def _settings(files: Mapping[str, Path]) -> Mapping[str, Any]:
    return read_object(files[_SETTINGS]) if _SETTINGS in files else {}


def adapter_files(adapters: Sequence[Adapter]) -> dict[str, Path]:
    """Return a dict that maps the name of each auxiliary file in the adapters' folders to the path of the file to use.

    If the adapters' tokenizers differ, the tokenizer that contains all other tokenizers is used. Raises BadInput if no
    tokenizer contains all other tokenizers, or if two adapters contain different chat templates or generation configs.
    """
    files: dict[str, Path] = {}
    different: tuple[str, Path, Path] | None = None
    for adapter in adapters:
        for name, path in adapter.auxiliary_files.items():
            first = files.setdefault(name, path)
            if first != path and read_file(first) != read_file(path):
                if not _is_of_tokenizer(name):
                    raise _different(name, first, path)
                different = different or (name, first, path)
    if different is None:
        return files
    tokenizers = [_of_tokenizer(adapter.auxiliary_files) for adapter in adapters]
    chosen = largest([tokenizer for tokenizer in tokenizers if tokenizer])
    if chosen is None:
        raise _different(*different)
    return {**files, **chosen}


def _different(name: str, first: Path, path: Path) -> BadInput:
    expected = f"the same content as {first}"
    if _is_of_tokenizer(name):
        expected += ", or a tokenizer that differs only by additional added tokens"
    return BadInput(f"{path}: expected {expected}, found different content")


def _is_of_tokenizer(name: str) -> bool:
    return name != GENERATION_CONFIG and not _is_template(name)


def _of_tokenizer(files: Mapping[str, Path]) -> dict[str, Path]:
    return {name: path for name, path in files.items() if _is_of_tokenizer(name)}
