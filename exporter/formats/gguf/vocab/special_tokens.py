"""Special ids, add-bos/eos flags and chat templates as GGUF metadata.

Which token is which comes from tokenizer_config.json, then from config.json; whether one is put around a text comes
from the post-processor in tokenizer.json, then from tokenizer_config.json: the order of llama.cpp's converter.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from exporter.errors import BadInput, UnreadableFile, reading
from exporter.formats.gguf import writer
from exporter.formats.gguf.writer import Key
from exporter.sources.checkpoint import read_json

_ID_KEYS: Final = {
    "bos": "tokenizer.ggml.bos_token_id",
    "eos": "tokenizer.ggml.eos_token_id",
    "unk": "tokenizer.ggml.unknown_token_id",
    "sep": "tokenizer.ggml.seperator_token_id",  # llama.cpp spells it so
    "pad": "tokenizer.ggml.padding_token_id",
    "mask": "tokenizer.ggml.mask_token_id",
    "eot": "tokenizer.ggml.eot_token_id",
    "eom": "tokenizer.ggml.eom_token_id",
}
_ADD_KEYS: Final = {kind: f"tokenizer.ggml.add_{kind}_token" for kind in ("bos", "eos", "sep")}
_KINDS: Final = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")


@dataclass
class _Specials:
    """Text of the special tokens by kind, and which of them are added to a text."""

    texts: dict[str, str] = field(default_factory=dict)
    added: dict[str, bool] = field(default_factory=dict)


def special_keys(
    files: Mapping[str, Path],
    config: Mapping[str, Any],
    tokenizer: Mapping[str, Any],
    settings: Mapping[str, Any],
    ids: Mapping[str, int],
    vocab: int,
) -> list[Key]:
    """Keys for special ids, flags and templates.

    tokenizer, settings, config: the parsed tokenizer.json, tokenizer_config.json ({} if absent) and config.json.
    ids: the added tokens. Raises BadInput for an id outside the vocabulary.
    """
    specials = _Specials()
    for kind in _KINDS:
        if (text := _content(settings.get(f"{kind}_token"))) is not None:
            specials.texts[kind] = text
    for kind, twin in (("bos", "cls"), ("eos", "sep")):
        if kind not in specials.texts and twin in specials.texts:
            specials.texts[kind] = specials.texts[twin]
    _post_process(tokenizer.get("post_processor"), specials)
    if settings:
        for kind in _KINDS:
            if isinstance(flag := settings.get(f"add_{kind}_token"), bool):
                specials.added.setdefault(kind, flag)
    found = {kind: ids[text] for kind, text in specials.texts.items() if text in ids} if settings else {}
    for kind in _KINDS:
        token_id = config.get(f"{kind}_token_id")
        if type(token_id) is int and token_id >= 0:  # older configs say -1 for none
            if token_id >= vocab and kind not in found:
                raise BadInput(f"config.json: {kind}_token_id: expected an id below {vocab}, found {token_id}")
            found.setdefault(kind, token_id)
    keys = [writer.u32(_ID_KEYS[kind], found[kind]) for kind in _ID_KEYS if kind in found]
    keys += [writer.truth(_ADD_KEYS[kind], specials.added[kind]) for kind in _ADD_KEYS if kind in specials.added]
    return keys + _template_keys(files, settings)


def _content(entry: Any) -> str | None:
    """The text of a token that stands as a string or as a table with flags."""
    text = entry.get("content") if isinstance(entry, Mapping) else entry
    return text if isinstance(text, str) and text else None


def _post_process(node: Any, specials: _Specials) -> None:
    """What the post-processor puts around a single text, and between two."""
    if not isinstance(node, Mapping):
        return
    children = node.get("processors")
    for step in children if isinstance(children, list) else [node]:
        kind = step.get("type") if isinstance(step, Mapping) else None
        if kind == "ByteLevel":
            specials.added.setdefault("bos", False)
            specials.added.setdefault("eos", False)
        elif kind == "RobertaProcessing":
            specials.added |= {"bos": True, "eos": True, "sep": True}
            for name in ("cls", "sep"):
                if isinstance(pair := step.get(name), list) and pair and isinstance(pair[0], str):
                    specials.texts.setdefault(name, pair[0])
        elif kind == "TemplateProcessing":
            _template(step, specials)


def _template(step: Mapping[str, Any], specials: _Specials) -> None:
    single, texts = _pieces(step.get("single")), specials.texts
    first = single[0][1] if len(single) > 1 and single[0][0] == "SpecialToken" else None
    last = single[-1][1] if len(single) > 1 and single[-1][0] == "SpecialToken" else None
    if first:
        texts.setdefault("bos", first)
        texts.setdefault("cls", first)
        specials.added["bos"] = first in (texts["bos"], texts["cls"])
    if last:
        if texts.get("eos") not in (None, last):
            # A text ends with another token than the named end: that one then ends a turn.
            texts["eot" if "eot" not in texts else "eom"] = texts["eos"]
        texts["eos"] = last
        specials.added["eos"] = True
    pair = _pieces(step.get("pair"))
    if first and pair and pair[0] == ("SpecialToken", first):
        pair = pair[1:]
    if last and pair and pair[-1] == ("SpecialToken", last):
        pair = pair[:-1]
    between = pair[1:-1]
    if between and pair[0] == ("Sequence", "A") and pair[-1] == ("Sequence", "B"):
        ends = {texts.get("sep"), texts.get("eos")} - {None}
        separated = (not last and between[0][1] in ends) or (len(between) == 2 and between[1][1] in ends)
        specials.added["sep"] = separated
        if separated and "eos" in texts:
            texts.setdefault("sep", texts["eos"])


def _pieces(template: Any) -> list[tuple[str, str]]:
    """[("SpecialToken" or "Sequence", id)] of one template."""
    out = []
    for piece in template if isinstance(template, list) else []:
        for kind in ("SpecialToken", "Sequence"):
            if isinstance(piece, Mapping) and isinstance(piece.get(kind), Mapping):
                out.append((kind, str(piece[kind].get("id"))))
    return out


def _text(path: Path) -> str:
    with reading(path):
        data = path.read_bytes()
    try:
        return data.decode()
    except UnicodeDecodeError as exc:
        raise UnreadableFile(path, "expected text in UTF-8, found other bytes") from exc


def _template_keys(files: Mapping[str, Path], settings: Mapping[str, Any]) -> list[Key]:
    """The chat template, or several by name; llama.cpp's converter reads none without a tokenizer_config.json."""
    template: Any = settings.get("chat_template")
    if template is None and settings:
        if path := files.get("chat_template.jinja"):
            template = _text(path)
        elif path := files.get("chat_template.json"):
            template = read_json(path).get("chat_template")
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
