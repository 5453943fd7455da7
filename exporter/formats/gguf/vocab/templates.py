"""Convert chat templates to GGUF metadata, either a single template or several named templates."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

from exporter.errors import NotExpressible
from exporter.formats.gguf import writer
from exporter.formats.gguf.writer import Key
from exporter.merge.vocabulary.templates import DEFAULT

#: The key of the template without a name. A named template has this key with a dot and the name appended.
TEMPLATE: Final = "tokenizer.chat_template"
NAMES: Final = "tokenizer.chat_templates"


def template_keys(templates: Mapping[str, str]) -> list[Key]:
    """Return the GGUF keys for the chat templates, a dict from name to text, in the order of llama.cpp's converter.

    llama.cpp's converter replaces each character of a name that is not an ASCII letter or digit by "_". Raises
    NotExpressible if two names become equal, because a GGUF has one value for each key.
    """
    names: dict[str, str] = {}
    for name in templates:
        if name == DEFAULT:
            continue
        stored = re.sub(r"[^A-Za-z0-9]", "_", name)
        if stored in ("", DEFAULT, *names):
            raise NotExpressible(
                f"gguf: chat template {name!r:.80}",
                f"the name becomes {stored!r:.80}, as another template's name or no name at all",
                instead="rename the chat template",
            )
        names[stored] = name
    keys = [writer.text(f"{TEMPLATE}.{stored}", templates[name]) for stored, name in names.items()]
    if names:
        keys.append(writer.texts(NAMES, sorted(names)))
    return [*keys, writer.text(TEMPLATE, templates[DEFAULT])] if DEFAULT in templates else keys
