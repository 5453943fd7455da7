"""From examples to token ids and labels: which tokens of an example are learned.

All of a text; of a prompt with its completion, the completion; of a chat, what the assistant says up to and with its
end of turn. The other tokens are read, but have no loss.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from jinja2 import TemplateError
from trl.chat_template_utils import get_training_chat_template, has_generation_markers

from exporter.errors import BadInput
from tuner.inputs.data import Example, Examples

_Encoder = Callable[[Any, Example], tuple[list[int], list[int]]]

__all__ = ["NO_LOSS", "Encoded", "encode_examples"]

NO_LOSS: Final = -100  # the label that torch's cross entropy leaves out


@dataclass(frozen=True, slots=True)
class Encoded:
    """Examples as ``{"input_ids", "labels"}``; how many were cut; the lines left out since no answer was left."""

    examples: list[dict[str, list[int]]]
    cut: int
    dropped: tuple[int, ...]


def encode_examples(tokenizer: Any, examples: Examples, max_length: int) -> Encoded:
    """Encode all examples, cut at ``max_length`` tokens; those without a label after the first token are left out.

    Raises: BadInput naming the line that the chat template refuses, or the file when nothing is left to learn from.
    """
    encoders: dict[str, _Encoder] = {"text": _text, "prompt": _completion}
    encode = encoders.get(examples.kind) or _Chat(tokenizer, examples.path)
    kept: list[dict[str, list[int]]] = []
    dropped: list[int] = []
    cut = 0
    for example in examples.examples:
        ids, labels = encode(tokenizer, example)
        cut += len(ids) > max_length
        labels = labels[:max_length]
        # The first token is predicted from nothing, so its label is never used.
        if all(label == NO_LOSS for label in labels[1:]):
            dropped.append(example.line)
        else:
            kept.append({"input_ids": ids[:max_length], "labels": labels})
    if not kept:
        raise BadInput(
            f"{examples.path}: expected something to learn in {max_length} tokens (--max-length), found nothing"
        )
    return Encoded(kept, cut, tuple(dropped))


def _text(tokenizer: Any, example: Example) -> tuple[list[int], list[int]]:
    ids = _with_end(tokenizer, _ids(tokenizer, example.values[0]))
    return ids, list(ids)


def _completion(tokenizer: Any, example: Example) -> tuple[list[int], list[int]]:
    prompt, completion = example.values
    ids = _with_end(tokenizer, _ids(tokenizer, prompt + completion))
    start = _common(_ids(tokenizer, prompt), ids)
    return ids, [NO_LOSS] * start + ids[start:]


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text)["input_ids"])


def _with_end(tokenizer: Any, ids: list[int]) -> list[int]:
    """Return ``ids`` with the end token after them, if the tokenizer has one and did not write it itself."""
    end = tokenizer.eos_token_id
    return ids if end is None or ids[-1:] == [end] else [*ids, end]


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """Return how many leading ids are equal. A token across the border of two texts belongs to the later one."""
    return next((place for place, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


class _Chat:
    """Encoder of chats by the tokenizer's template.

    A template that marks the assistant's part (``{% generation %}``) is believed. Few do; for the others the chat is
    rendered up to each answer, and up to its end: what lies between is the answer. That needs a template that renders
    the beginning of a chat as the chat begins; where it does not, TRL may know a variant of the template that does.
    """

    def __init__(self, tokenizer: Any, path: Path) -> None:
        self._path = path
        template = tokenizer.chat_template
        if not template:
            raise BadInput(f'{path}: expected a base with a chat template for "messages", found none')
        self._marked = template if isinstance(template, str) and has_generation_markers(template) else None

    def __call__(self, tokenizer: Any, example: Example) -> tuple[list[int], list[int]]:
        messages = example.values[0]
        try:
            if self._marked is None:
                if (found := self._by_prefixes(tokenizer, messages)) is not None:
                    return found
                self._marked = _training_template(tokenizer)
            if self._marked is not None:
                return _by_markers(tokenizer, messages, self._marked)
        except (TemplateError, TypeError, ValueError, IndexError) as exc:
            reason = " ".join(str(exc).split()) or type(exc).__name__
            raise BadInput(f"{self._path}:{example.line}: the chat template refuses this chat: {reason}") from exc
        raise BadInput(
            f"{self._path}:{example.line}: the chat template changes earlier turns when later ones follow, so it does "
            "not show what the assistant says; expected one with {% generation %} marks"
        )

    @staticmethod
    def _by_prefixes(tokenizer: Any, messages: list[dict[str, Any]]) -> tuple[list[int], list[int]] | None:
        whole = _render(tokenizer, messages)
        ids = _plain_ids(tokenizer, whole)
        labels = [NO_LOSS] * len(ids)
        for place, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = _render(tokenizer, messages[:place], add_generation_prompt=True)
            after = _render(tokenizer, messages[: place + 1])
            if not (whole.startswith(before) and whole.startswith(after) and len(before) < len(after)):
                return None
            # White space after the end of the turn belongs to the template, not to the answer.
            after = after.rstrip() if len(after.rstrip()) > len(before) else after
            start, end = (_common(_plain_ids(tokenizer, part), ids) for part in (before, after))
            labels[start:end] = ids[start:end]
        return ids, labels


def _render(tokenizer: Any, messages: list[dict[str, Any]], **options: Any) -> str:
    return str(tokenizer.apply_chat_template(messages, tokenize=False, **options))


def _plain_ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])  # the template wrote them


def _by_markers(tokenizer: Any, messages: list[dict[str, Any]], template: str) -> tuple[list[int], list[int]]:
    found = tokenizer.apply_chat_template(
        messages, chat_template=template, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    ids, mask = list(found["input_ids"]), found["assistant_masks"]
    return ids, [token_id if said else NO_LOSS for token_id, said in zip(ids, mask, strict=True)]


def _training_template(tokenizer: Any) -> str | None:
    try:
        found = get_training_chat_template(tokenizer)
    except ValueError:
        return None  # not among those that TRL knows
    return None if found is None else str(found)
