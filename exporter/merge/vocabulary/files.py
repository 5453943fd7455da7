"""Chooses the auxiliary files of the merged model; an adapter's file replaces the base's file of the same name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from exporter.errors import BadInput
from exporter.io.files import read_file
from exporter.merge.vocabulary.nesting import largest
from exporter.merge.vocabulary.templates import chat_templates, has_processor, is_template
from exporter.sources.hf.checkpoint import GENERATION_CONFIG, VOCABULARIES, is_of_processor
from exporter.sources.peft.adapter import Adapter


def merge_auxiliary_files(base: Mapping[str, Path], adapters: Sequence[Adapter]) -> dict[str, Path]:
    """Return a dict that maps the name of each auxiliary file of the merged model to the path of the file to copy.

    If an adapter contains a tokenizer, none of the base model's tokenizer files is used, so that files of two
    tokenizers are never mixed. If an adapter contains a chat template, none of the base model's chat templates is used,
    because a template of the base could hide the adapter's template, or format dialogues on which the adapter was not
    trained. An adapter's file of a processor replaces only the base's file of the same name. Raises BadInput if two
    adapters contain different files that cannot be combined, such as unrelated tokenizers.
    """
    own = adapter_files(adapters)
    if chat_templates(own, processor=has_processor({**base, **own})) is not None:
        base = {name: path for name, path in base.items() if not is_template(name, processor=True)}
    if own.keys() & set(VOCABULARIES):
        base = {name: path for name, path in base.items() if not _is_of_tokenizer(name)}
    return {**base, **own}


def adapter_files(adapters: Sequence[Adapter]) -> dict[str, Path]:
    """Return a dict that maps the name of each auxiliary file in the adapters' folders to the path of the file to use.

    If the adapters' tokenizers differ, the tokenizer that contains all other tokenizers is used. Raises BadInput if no
    tokenizer contains all other tokenizers, or if two adapters contain different chat templates, generation configs or
    processor settings.
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
    return name != GENERATION_CONFIG and not is_of_processor(name) and not is_template(name, processor=True)


def _of_tokenizer(files: Mapping[str, Path]) -> dict[str, Path]:
    return {name: path for name, path in files.items() if _is_of_tokenizer(name)}
