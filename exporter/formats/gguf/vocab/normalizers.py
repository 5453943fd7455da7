"""Flatten the normalizer of a tokenizer.json, without the steps that change no text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

#: Why a tokenizer with the normalizer NFC can be written: llama.cpp differs only for text that is not in NFC.
NFC_NOTE: Final = (
    "llama.cpp does not apply the normalizer NFC, so llama.cpp tokenises text that is not in NFC differently from "
    "transformers"
)


def normalizer_steps(node: Any) -> Sequence[Any]:
    """Return the steps of the parsed normalizer ``node``, without nested sequences and without no-ops.

    A no-op is an empty sequence, a Strip of neither side, or a Replace of a string by itself.
    """
    if node is None:
        return []
    if not isinstance(node, Mapping):
        return [node]
    children = node.get("normalizers")
    if node.get("type") == "Sequence" and isinstance(children, list):
        return [step for child in children for step in normalizer_steps(child)]
    return [] if _is_no_op(node) else [node]


def _is_no_op(step: Mapping[str, Any]) -> bool:
    step_type, pattern = step.get("type"), step.get("pattern")
    if step_type == "Strip":
        return step.get("strip_left") is False and step.get("strip_right") is False
    return step_type == "Replace" and isinstance(pattern, Mapping) and pattern.get("String") == step.get("content", 0)
