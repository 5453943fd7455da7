"""Which of llama.cpp's named splittings a tokenizer.json describes, told from its structure.

llama.cpp's converter hashes the ids of a test text, so a single added token hides a tokenizer from it. The structure
does not change with the vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final

from exporter.errors import NotExpressible
from exporter.formats.gguf.vocab.pre_tokenizer_table import BYTES, COVERING, GPT2, TABLE, PreTokenizer, Step, split

#: ByteLevel that splits, too: the same as its expression followed by the bytes.
_SPLITTING_BYTES: Final[Step] = ("ByteLevel", False, True)


def recognise(tokenizer: Mapping[str, Any], model_type: object, where: str) -> str:
    """llama.cpp's name for the splitting in a parsed tokenizer.json; ``where`` is the file, for messages.

    Raises NotExpressible, with the structure printed, for one that is not in the table.
    """
    if row := _row(tokenizer):
        return row.by_model_type.get(str(model_type), row.name)
    shown = json.dumps({"pre_tokenizer": tokenizer.get("pre_tokenizer"), "ignore_merges": _ignores_merges(tokenizer)})
    raise NotExpressible(
        f"gguf: {where}",
        f"llama.cpp has no name known here for this pre-tokenizer: {shown}",
        instead="--pre-tokenizer NAME names it (one of llama.cpp's, such as llama-bpe)",
    )


def doubts(name: str, tokenizer: Mapping[str, Any]) -> list[str]:
    """What speaks against ``name``, which the user chose: notes, for a later llama.cpp may know what this does not."""
    row, known = _row(tokenizer), {one for row in TABLE for one in (row.name, *row.by_model_type.values())}
    if row and name not in (row.name, *row.by_model_type.values()):
        return [f"--pre-tokenizer {name}: the structure of tokenizer.json is that of {row.name}"]
    if name not in known:
        return [f"--pre-tokenizer {name}: no name known here; a llama.cpp that does not know it opens no such file"]
    return []


def _row(tokenizer: Mapping[str, Any]) -> PreTokenizer | None:
    found, ignore_merges = steps(tokenizer.get("pre_tokenizer")), _ignores_merges(tokenizer)
    return next((row for row in TABLE if row.steps == found and row.ignore_merges in (None, ignore_merges)), None)


def _ignores_merges(tokenizer: Mapping[str, Any]) -> bool:
    model = tokenizer.get("model")
    return bool(model.get("ignore_merges")) if isinstance(model, Mapping) else False


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
