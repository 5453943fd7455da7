"""Convert the post-processor of a tokenizer.json to llama.cpp's flags and ids for special tokens.

A post-processor's template can express more than llama.cpp's three flags, so the template is reduced to the flags by
the same rules as in llama.cpp's converter.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Specials:
    """The special tokens of a tokenizer.

    texts: maps the kind of a special token (bos, eos, …) to the token's text. added: maps the kind to True if the
    tokenizer adds the special token to each text, otherwise to False.
    """

    texts: dict[str, str] = field(default_factory=dict)
    added: dict[str, bool] = field(default_factory=dict)


def post_process(node: Any, specials: Specials) -> None:
    """Record in ``specials`` the tokens that the post-processor adds around a text or between two texts."""
    if not isinstance(node, Mapping):
        return
    children = node.get("processors")
    for step in children if isinstance(children, list) else [node]:
        step_type = step.get("type") if isinstance(step, Mapping) else None
        if step_type == "ByteLevel":
            specials.added.setdefault("bos", False)
            specials.added.setdefault("eos", False)
        elif step_type == "RobertaProcessing":
            specials.added |= {"bos": True, "eos": True, "sep": True}
            for name in ("cls", "sep"):
                if isinstance(pair := step.get(name), list) and pair and isinstance(pair[0], str):
                    specials.texts.setdefault(name, pair[0])
        elif step_type == "TemplateProcessing":
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
            # The template's last token differs from the configured EOS; the configured EOS then ends a turn (EOT, EOM).
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
    """Return the elements of a post-processor's template, as pairs ("SpecialToken" or "Sequence", id)."""
    out = []
    for piece in template if isinstance(template, list) else []:
        for piece_type in ("SpecialToken", "Sequence"):
            if isinstance(piece, Mapping) and isinstance(piece.get(piece_type), Mapping):
                out.append((piece_type, str(piece[piece_type].get("id"))))
    return out
