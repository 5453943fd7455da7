"""Find the chat templates of the tuned model, without the code that writes chat templates.

Source of the order of precedence: the loaders of tokenizers and processors in transformers 5.23.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Final

from exporter.errors import UnreadableFile
from exporter.io.files import read_file
from exporter.io.json_objects import read_object

TEMPLATE: Final = "chat_template.jinja"
#: Named chat templates, and the older file that transformers reads only for a model with a processor.
_NAMED: Final = "additional_chat_templates/*.jinja"
_OLD: Final = "chat_template.json"
#: Files with nothing but chat templates, which belong to the model and not to the tokenizer.
_FILES: Final = (TEMPLATE, _NAMED, _OLD)
#: A model with one of these files has a processor for images, sounds or videos.
_OF_PROCESSORS: Final = (
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "audio_tokenizer_config.json",
)


def is_template(name: str) -> bool:
    """Whether the file ``name`` contains nothing but chat templates."""
    return any(fnmatchcase(name, pattern) for pattern in _FILES)


def is_of_processor(name: str) -> bool:
    """Whether the file ``name`` belongs to a processor of images, sounds or videos.

    Such a file contains settings, or is part of an additional tokenizer in a subfolder such as qformer_tokenizer.
    """
    return name in _OF_PROCESSORS or name.partition("/")[0].endswith("_tokenizer")


def templates(files: Mapping[str, Path], *, processor: bool = False) -> dict[str, str]:
    """Return a dict from name to text of each chat template. A template without a name gets the name ``default``.

    files: dict from file name to path. processor: whether the model has a processor even if no file in ``files``
    belongs to a processor.
    """
    return next(filter(None, _places(files, processor or any(map(is_of_processor, files)))), {})


def tuned_templates(base: Mapping[str, Path], adapters: Sequence[Mapping[str, Path]]) -> dict[str, str]:
    """Return the chat templates of the tuned model: the adapters' or, if there are none, the base's.

    base, adapters: dicts from file name to path.
    """
    processor = any(is_of_processor(name) for files in (base, *adapters) for name in files)
    return next((texts for files in (*adapters, base) if (texts := templates(files, processor=processor))), {})


def stored_name(name: str) -> str:
    """Return the name of a chat template in a GGUF, in which only ASCII letters, digits and "_" are used."""
    return re.sub(r"[^A-Za-z0-9]", "_", name)


def _places(files: Mapping[str, Path], processor: bool) -> Iterator[dict[str, str]]:
    """Yield the chat templates of each place by precedence; only the first place with a template counts."""
    if processor:
        yield from (named(_setting(files, name)) for name in ("processor_config.json", _OLD))
    separate = {path.name[: -len(".jinja")]: path for name, path in files.items() if fnmatchcase(name, _NAMED)}
    if TEMPLATE in files:
        separate.setdefault("default", files[TEMPLATE])
    yield {name: _text(path) for name, path in separate.items()}
    yield named(_setting(files, "tokenizer_config.json"))


def named(setting: Any) -> dict[str, str]:
    """Return the chat templates in a parsed value of the key ``chat_template``: a text, a list or a dict of texts."""
    if isinstance(setting, str):
        return {"default": setting}
    if isinstance(setting, list):
        setting = {entry.get("name"): entry.get("template") for entry in setting if isinstance(entry, dict)}
    pairs = setting.items() if isinstance(setting, dict) else ()
    return {str(name): text for name, text in pairs if isinstance(text, str)}


def _setting(files: Mapping[str, Path], name: str) -> Any:
    return read_object(files[name]).get("chat_template") if name in files else None


def _text(path: Path) -> str:
    try:
        return io.TextIOWrapper(io.BytesIO(read_file(path)), encoding="utf-8").read()
    except UnicodeDecodeError as exc:
        raise UnreadableFile(path, "expected UTF-8 text, found invalid bytes") from exc
