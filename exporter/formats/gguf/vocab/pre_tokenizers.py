"""Which of llama.cpp's named splittings a tokenizer.json describes, told from its structure.

llama.cpp's converter hashes the ids of a test text, so a single added token hides a tokenizer from it. The structure
does not change with the vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final

from exporter.errors import NotExpressible
from exporter.formats.gguf.vocab.splittings import BYTES, COVERING, GPT2, TABLE, Step, split

#: ByteLevel that splits, too: the same as its expression followed by the bytes.
_SPLITTING_BYTES: Final[Step] = ("ByteLevel", False, True)


def recognise(tokenizer: Mapping[str, Any], model_type: object, where: str) -> str:
    """llama.cpp's name for the splitting in a parsed tokenizer.json; ``where`` is the file, for messages.

    Raises NotExpressible, with the structure printed, for one that is not in the table.
    """
    found = steps(tokenizer.get("pre_tokenizer"))
    model = tokenizer.get("model")
    ignore_merges = bool(model.get("ignore_merges")) if isinstance(model, Mapping) else False
    for row in TABLE:
        if row.steps == found and row.ignore_merges in (None, ignore_merges):
            return row.by_model_type.get(str(model_type), row.name)
    shown = json.dumps({"pre_tokenizer": tokenizer.get("pre_tokenizer"), "ignore_merges": ignore_merges})
    raise NotExpressible(
        f"gguf: {where}",
        f"llama.cpp has no name known here for this pre-tokenizer: {shown}",
        instead="--pre-tokenizer NAME names it (one of llama.cpp's, such as llama-bpe)",
    )


def steps(node: Any) -> tuple[Step, ...]:
    """The steps of a pre-tokenizer: sequences flattened, one spelling for each thing that can be said in several.

    Fields that do not change the splitting (``trim_offsets``) are left out.
    """
    if not isinstance(node, Mapping):
        return ()
    kind = node.get("type")
    if kind == "Sequence" and isinstance(node.get("pretokenizers"), list):
        return tuple(step for child in node["pretokenizers"] for step in steps(child))
    if kind == "ByteLevel":
        step: Step = ("ByteLevel", node.get("add_prefix_space", True), node.get("use_regex", True))
        return (split(GPT2), BYTES) if step == _SPLITTING_BYTES else (step,)
    if kind == "Digits":
        return (("Digits", node.get("individual_digits", False)),)
    if kind == "Punctuation":
        return (("Punctuation", node.get("behavior", "Isolated")),)
    pattern = node.get("pattern")
    if kind == "Split" and isinstance(pattern, Mapping) and len(pattern) == 1:
        ((form, expression),) = pattern.items()
        return (_split(form, expression, node.get("behavior"), node.get("invert", False)),)
    return ((json.dumps(node, sort_keys=True),),)


def _split(form: object, expression: object, behaviour: object, invert: object) -> Step:
    if form == "Regex" and isinstance(expression, str):
        # A line break means the same to the expression, written as itself or escaped.
        expression = expression.replace("\r", r"\r").replace("\n", r"\n")
        if (behaviour, invert) == ("Removed", True) and expression in COVERING:
            behaviour, invert = "Isolated", False
    return ("Split", form, expression, behaviour, invert)
