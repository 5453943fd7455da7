"""Determines the chat templates of a model from its files, by the order of precedence of transformers.

Sources: ``PreTrainedTokenizerBase.from_pretrained`` and ``ProcessorMixin.get_processor_dict`` of transformers 5.23.
"""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Final

from exporter.errors import NotExpressible, UnreadableFile
from exporter.io.files import read_file
from exporter.io.json_objects import as_json, read_object
from exporter.sources.hf.checkpoint import (
    ADDITIONAL_TEMPLATES,
    LEGACY_TEMPLATE,
    PROCESSOR_CONFIG,
    PROCESSOR_FILES,
    TEMPLATE,
    TOKENIZER_CONFIG,
)

DEFAULT: Final = "default"
_KEY: Final = "chat_template"


def has_processor(files: Mapping[str, Path]) -> bool:
    """Whether the model has a processor for images, sounds or videos.

    Only a processor reads chat_template.json and the template in processor_config.json. The processor then prefers
    these two places to the tokenizer's chat templates.
    """
    return not PROCESSOR_FILES.isdisjoint(files)


def chat_templates(files: Mapping[str, Path], *, processor: bool | None = None) -> dict[str, str] | None:
    """Return a dict from name to text of each chat template that transformers uses, or None if there is no template.

    files: the auxiliary files, by name. processor: whether the model has a processor, or None to decide by ``files``.
    The template without a name has the name "default". If a model has chat templates in separate files, transformers
    ignores all chat templates in tokenizer_config.json. Raises UnreadableFile if a template is not a text.
    """
    if has_processor(files) if processor is None else processor:
        for name in (PROCESSOR_CONFIG, LEGACY_TEMPLATE):
            if (own := _stated(files, name)) is not None:
                return own
    separate = {DEFAULT: read_template(files[TEMPLATE])} if TEMPLATE in files else {}
    for name in sorted(files):
        if fnmatchcase(name, ADDITIONAL_TEMPLATES):
            separate[Path(name).name.removesuffix(".jinja")] = read_template(files[name])
    return separate or _stated(files, TOKENIZER_CONFIG)


def merged_templates(
    base: Mapping[str, Path], own: Mapping[str, Path], files: Mapping[str, Path]
) -> tuple[dict[str, str], dict[str, bytes]]:
    """Return (chat templates of the merged model, contents of the files that cannot be copied unchanged).

    base, own, files: the auxiliary files of the base, of the adapters and of the merged model. The chat templates are a
    dict from name to text: the adapters' templates or, if the adapters have none, the base's templates. The second dict
    maps file names to contents, so that transformers finds the same templates in the merged folder. For example,
    the base may have a chat template in the tokenizer_config.json that the adapter's file of the same name replaces.
    """
    processor = has_processor(files)
    brought = chat_templates(own, processor=processor)
    wanted = chat_templates(base, processor=processor) if brought is None else brought
    if wanted is None or chat_templates(files) == wanted:
        return wanted or {}, {}
    contents = template_files(wanted)
    if PROCESSOR_CONFIG in files and (settings := read_object(files[PROCESSOR_CONFIG])).pop(_KEY, None) is not None:
        contents[PROCESSOR_CONFIG] = as_json(settings)  # the processor prefers this file
    return wanted, contents


def is_template(name: str, *, processor: bool) -> bool:
    """Whether the file ``name`` contains nothing but a chat template. processor: whether the model has a processor."""
    return name == TEMPLATE or (processor and name == LEGACY_TEMPLATE) or fnmatchcase(name, ADDITIONAL_TEMPLATES)


def template_files(templates: Mapping[str, str]) -> dict[str, bytes]:
    """Return the files in which transformers saves chat templates: a dict from file name to content.

    templates: dict from name to text. Raises NotExpressible if a name cannot be a file name.
    """
    contents = {}
    for name, text in templates.items():
        if name == DEFAULT:
            contents[TEMPLATE] = text.encode()
        elif name in ("", ".", "..") or any(mark in name for mark in "/\\\0"):
            raise NotExpressible(
                f"chat template {name!r:.80}",
                "transformers saves each named chat template in a file, and the name is not a file name",
                instead=f"rename the chat template in {TOKENIZER_CONFIG}",
            )
        else:
            contents[ADDITIONAL_TEMPLATES.replace("*", name)] = text.encode()
    return contents


def template_setting(templates: Mapping[str, str]) -> str | list[dict[str, str]]:
    """Return the value of the key ``chat_template`` in tokenizer_config.json: a text, or a list of named texts."""
    if templates.keys() == {DEFAULT}:
        return templates[DEFAULT]
    return [{"name": name, "template": text} for name, text in templates.items()]


def _stated(files: Mapping[str, Path], name: str) -> dict[str, str] | None:
    """Return the chat templates in the JSON file ``name``, or None if there is no such file or no chat template.

    The key ``chat_template`` contains a text, a list of objects with the keys name and template, or a dict from name to
    text.
    """
    value: Any = read_object(files[name]).get(_KEY) if name in files else None
    if value is None or isinstance(value, str):
        return None if value is None else {DEFAULT: value}
    if isinstance(value, list) and all(isinstance(entry, dict) and "template" in entry for entry in value):
        value = {entry.get("name"): entry["template"] for entry in value}
    if not isinstance(value, dict) or not all(isinstance(part, str) for pair in value.items() for part in pair):
        raise UnreadableFile(
            files[name], f"{_KEY}: expected a text, or a text for each name, found {value!r:.80}; remove the key"
        )
    return value or None


def read_template(path: Path) -> str:
    """Return the text of a file with a chat template. Raises UnreadableFile if the file is not UTF-8."""
    try:
        text = read_file(path).decode()
    except UnicodeDecodeError as exc:
        raise UnreadableFile(path, f"expected text in UTF-8, found {exc.reason} at offset {exc.start}") from exc
    return text.replace("\r\n", "\n").replace("\r", "\n")  # as Python reads text files
