"""Find llama.cpp's name for the pre-tokenizer in a tokenizer.json by looking up the structure of the pre-tokenizer.

llama.cpp's converter identifies a tokenizer by a hash of the token ids of a test text, so the converter fails to
recognise a tokenizer if an added token changes the encoding of that text. The structure of a pre-tokenizer does not
change if tokens are added to the vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final

from exporter.errors import NotExpressible
from exporter.formats.gguf.vocab.pre_tokenizer_table import BYTES, COVERING, GPT2, TABLE, PreTokenizer, Step, split

#: ByteLevel with use_regex is equivalent to a Split with ByteLevel's expression and a ByteLevel without use_regex.
_BYTES_WITH_REGEX: Final[Step] = ("ByteLevel", False, True)


def recognise(tokenizer: Mapping[str, Any], model_type: object, where: str) -> str:
    """Return llama.cpp's name for the pre-tokenizer of a parsed tokenizer.json.

    where: the path of the tokenizer.json, for error messages. Raises NotExpressible if ttexport does not know the
    pre-tokenizer; the message contains the pre-tokenizer's structure.
    """
    if row := _row(tokenizer):
        return row.by_model_type.get(str(model_type), row.name)
    fields = {"pre_tokenizer": tokenizer.get("pre_tokenizer"), "ignore_merges": _ignores_merges(tokenizer)}
    raise NotExpressible(
        f"gguf: {where}",
        f"ttexport does not know llama.cpp's name of the pre-tokenizer {json.dumps(fields)}",
        instead="use --pre-tokenizer NAME to choose a llama.cpp pre-tokenizer, such as llama-bpe",
    )


def difference_notes(tokenizer: Mapping[str, Any]) -> list[str]:
    """Return a note if llama.cpp's pre-tokenizer is known to split some texts differently from transformers."""
    row = _row(tokenizer)
    return [f"pre-tokenizer {row.name}: unlike transformers, {row.difference}"] if row and row.difference else []


def override_notes(name: str, tokenizer: Mapping[str, Any]) -> list[str]:
    """Return notes if the pre-tokenizer ``name``, chosen by the user, is unknown or contradicts tokenizer.json.

    An unknown name causes a note rather than an error, because a newer llama.cpp may support the name.
    """
    row = _row(tokenizer)
    if row and name not in row.names:
        return [
            f"--pre-tokenizer {name}: the option contradicts tokenizer.json, which has the pre-tokenizer {row.name}"
        ]
    if not any(name in known.names for known in TABLE):
        return [
            f"--pre-tokenizer {name}: ttexport does not know this pre-tokenizer, "
            f"and only a llama.cpp that supports {name} can open the GGUF"
        ]
    return []


def _row(tokenizer: Mapping[str, Any]) -> PreTokenizer | None:
    structure, ignore_merges = steps(tokenizer.get("pre_tokenizer")), _ignores_merges(tokenizer)
    return next((row for row in TABLE if row.steps == structure and row.ignore_merges in (None, ignore_merges)), None)


def _ignores_merges(tokenizer: Mapping[str, Any]) -> bool:
    model = tokenizer.get("model")
    return bool(model.get("ignore_merges")) if isinstance(model, Mapping) else False


def steps(node: Any) -> tuple[Step, ...]:
    """Return the steps of a pre-tokenizer in a canonical form.

    In the canonical form, nested sequences are flattened, equivalent steps are written in the same way, and the field
    ``trim_offsets``, which does not affect the tokens, is omitted.
    """
    if not isinstance(node, Mapping):
        return ()
    step_type = node.get("type")
    if step_type == "Sequence" and isinstance(node.get("pretokenizers"), list):
        return tuple(step for child in node["pretokenizers"] for step in steps(child))
    if step_type == "ByteLevel":
        step: Step = ("ByteLevel", node.get("add_prefix_space", True), node.get("use_regex", True))
        return (split(GPT2), BYTES) if step == _BYTES_WITH_REGEX else (step,)
    if step_type == "Digits":
        return (("Digits", node.get("individual_digits", False)),)
    if step_type == "Punctuation":
        return (("Punctuation", node.get("behavior", "Isolated")),)
    pattern = node.get("pattern")
    if step_type == "Split" and isinstance(pattern, Mapping) and len(pattern) == 1:
        ((form, expression),) = pattern.items()
        return (_split(form, expression, node.get("behavior"), node.get("invert", False)),)
    return ((json.dumps(node, sort_keys=True),),)


def _split(form: object, expression: object, behaviour: object, invert: object) -> Step:
    if form == "Regex" and isinstance(expression, str):
        # A literal line break and an escaped line break are equivalent in a regular expression.
        expression = expression.replace("\r", r"\r").replace("\n", r"\n")
        if (behaviour, invert) == ("Removed", True) and expression in COVERING:
            behaviour, invert = "Isolated", False
    return ("Split", form, expression, behaviour, invert)
