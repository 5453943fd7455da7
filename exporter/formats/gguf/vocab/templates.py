"""Convert chat templates to GGUF metadata, either a single template or several named templates."""

from __future__ import annotations

import re
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from exporter.errors import UnreadableFile
from exporter.formats.gguf import writer
from exporter.formats.gguf.writer import Key
from exporter.io.files import read_file
from exporter.io.json_objects import read_object
from exporter.sources.hf.checkpoint import ADDITIONAL_TEMPLATES


def template_keys(files: Mapping[str, Path], settings: Mapping[str, Any]) -> list[Key]:
    """Return the GGUF keys for the chat templates.

    If there is no tokenizer_config.json, the returned list is empty, as llama.cpp's converter writes no chat templates
    in this case.
    """
    template: Any = settings.get("chat_template")
    if template is None and settings:
        if path := files.get("chat_template.jinja"):
            template = _text(path)
            # transformers saves named templates in a folder beside the default template.
            if others := [files[name] for name in sorted(files) if fnmatchcase(name, ADDITIONAL_TEMPLATES)]:
                named = [{"name": other.stem, "template": _text(other)} for other in others]
                template = [{"name": "default", "template": template}, *named]
        elif path := files.get("chat_template.json"):
            template = read_object(path).get("chat_template")
    if isinstance(template, str):
        return [writer.text("tokenizer.chat_template", template)] if template else []
    keys, names = [], set()
    for choice in template if isinstance(template, list) else []:
        name = re.sub(r"[^A-Za-z0-9]", "_", str(choice.get("name", ""))) if isinstance(choice, Mapping) else ""
        if not name or not isinstance(text := choice.get("template"), str) or not text:
            continue
        if name == "default":
            keys.append(writer.text("tokenizer.chat_template", text))
        else:
            names.add(name)
            keys.append(writer.text(f"tokenizer.chat_template.{name}", text))
    if names:
        keys.append(writer.texts("tokenizer.chat_templates", sorted(names)))
    return keys


def _text(path: Path) -> str:
    try:
        return read_file(path).decode()
    except UnicodeDecodeError as exc:
        raise UnreadableFile(path, "expected text in UTF-8, found bytes that are not UTF-8") from exc
