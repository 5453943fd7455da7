"""What a tokenizer.json's post-processor puts around a text: llama.cpp keeps this as flags and special ids.

A template says more than three flags can; it is read as llama.cpp's converter reads it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Specials:
    """Text of the special tokens by kind, and which of them are added to a text."""

    texts: dict[str, str] = field(default_factory=dict)
    added: dict[str, bool] = field(default_factory=dict)


def post_process(node: Any, specials: Specials) -> None:
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


def _template(step: Mapping[str, Any], specials: Specials) -> None:
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
