"""Which of llama.cpp's named splittings a tokenizer.json describes, told from its structure.

llama.cpp's converter hashes the ids of a test text, so a single added token hides a tokenizer from it. The structure
does not change with the vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from exporter.errors import NotExpressible

Step = tuple[object, ...]

_BYTES: Final[Step] = ("ByteLevel", False, False)  # no prefix space; the splitting was done before
_GPT2: Final[Step] = ("ByteLevel", False, True)  # no prefix space; GPT-2's own expression splits
_DIGITS: Final[Step] = ("Digits", True)

_LLAMA3: Final = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2: Final = _LLAMA3.replace("{1,3}", "")


def _split(expression: str) -> Step:
    return ("Split", "Regex", expression, "Isolated", False)


@dataclass(frozen=True, slots=True)
class PreTokenizer:
    """A row of the table: the steps and the flag of the model, and llama.cpp's name for them.

    Where several names share one splitting the model type decides; ``name`` is for all others.
    """

    name: str
    steps: tuple[Step, ...]
    ignore_merges: bool = False
    by_model_type: Mapping[str, str] = field(default_factory=dict)


#: Source: the tokenizer.json of the named models, and the expressions in llama.cpp's llama-vocab.cpp.
TABLE: Final = (
    PreTokenizer("llama-bpe", (_split(_LLAMA3), _BYTES), ignore_merges=True),
    PreTokenizer("smaug-bpe", (_split(_LLAMA3), _BYTES), by_model_type={"dbrx": "dbrx"}),
    PreTokenizer("qwen2", (_split(_QWEN2), _BYTES)),
    PreTokenizer(
        "smollm",
        (_DIGITS, _GPT2),
        by_model_type={"starcoder2": "starcoder", "gpt_refact": "refact", "cohere": "command-r"},
    ),
    PreTokenizer("gpt-2", (_GPT2,)),
)


def recognise(tokenizer: Mapping[str, Any], model_type: object, where: str) -> str:
    """llama.cpp's name for the splitting in a parsed tokenizer.json; ``where`` is the file, for messages.

    Raises NotExpressible, with the structure printed, for one that is not in the table.
    """
    found = steps(tokenizer.get("pre_tokenizer"))
    model = tokenizer.get("model")
    ignore_merges = bool(model.get("ignore_merges")) if isinstance(model, Mapping) else False
    for row in TABLE:
        if row.steps == found and row.ignore_merges == ignore_merges:
            return row.by_model_type.get(str(model_type), row.name)
    shown = json.dumps({"pre_tokenizer": tokenizer.get("pre_tokenizer"), "ignore_merges": ignore_merges})
    raise NotExpressible(
        f"gguf: {where}",
        f"llama.cpp has no name known here for this pre-tokenizer: {shown}",
        instead="--pre-tokenizer NAME names it (one of llama.cpp's, such as llama-bpe)",
    )


def steps(node: Any) -> tuple[Step, ...]:
    """The steps of a pre-tokenizer, sequences flattened, without the fields that do not change the splitting."""
    if not isinstance(node, Mapping):
        return ()
    kind = node.get("type")
    if kind == "Sequence" and isinstance(node.get("pretokenizers"), list):
        return tuple(step for child in node["pretokenizers"] for step in steps(child))
    if kind == "ByteLevel":
        return (("ByteLevel", node.get("add_prefix_space", True), node.get("use_regex", True)),)
    if kind == "Digits":
        return (("Digits", node.get("individual_digits", False)),)
    pattern = node.get("pattern")
    if kind == "Split" and isinstance(pattern, Mapping) and len(pattern) == 1:
        ((form, expression),) = pattern.items()
        return (("Split", form, expression, node.get("behavior"), node.get("invert", False)),)
    return ((json.dumps(node, sort_keys=True),),)
