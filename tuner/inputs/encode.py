"""Convert training examples to token ids and labels. Only tokens with a label contribute to the loss.

In an example of type ``text``, all tokens contribute to the loss. In a prompt with a completion, only the tokens of the
completion contribute to the loss. In a chat, only the assistant's turns contribute to the loss, including the
end-of-turn token of each turn. Tokens without a label are only context.
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

NO_LOSS: Final = -100  # torch's cross entropy ignores this label


@dataclass(frozen=True, slots=True)
class Encoded:
    """Encoded examples; each example consists of ``input_ids`` and ``labels``.

    truncated: number of examples that were longer than the maximum length. dropped: line numbers of the examples that
    were dropped because no token has a label.
    """

    examples: list[dict[str, list[int]]]
    truncated: int
    dropped: tuple[int, ...]


def encode_examples(tokenizer: Any, examples: Examples, max_length: int) -> Encoded:
    """Encode all examples, each truncated to ``max_length`` tokens.

    Examples without a labelled token after the first token are dropped, because the first token is never predicted.
    Raises: BadInput with the line number if the chat template rejects an example, BadInput with the file name if every
    example is dropped.
    """
    encoders: dict[str, _Encoder] = {"text": _text, "prompt": _completion}
    encode = encoders.get(examples.example_type) or _Chat(tokenizer, examples.path)
    kept: list[dict[str, list[int]]] = []
    dropped: list[int] = []
    truncated = 0
    for example in examples.examples:
        ids, labels = encode(tokenizer, example)
        truncated += len(ids) > max_length
        labels = labels[:max_length]
        # No token comes before the first token, so the label of the first token is never used.
        if all(label == NO_LOSS for label in labels[1:]):
            dropped.append(example.line)
        else:
            kept.append({"input_ids": ids[:max_length], "labels": labels})
    if not kept:
        raise BadInput(
            f"{examples.path}: expected an example with a token to learn among its first {max_length} tokens "
            "(--max-length), found no such example"
        )
    return Encoded(kept, truncated, tuple(dropped))


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
    """Return ``ids`` with the end-of-sequence token at the end.

    Nothing is added if the tokenizer has already added an end-of-sequence token.
    """
    end = tokenizer.eos_token_id
    return ids if end is None or ids[-1:] == [end] else [*ids, end]


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """Return the length of the longest common prefix of two lists of token ids.

    If the lists encode a prompt and the prompt followed by a completion, the result is the index of the completion's
    first token. A token that spans the border between prompt and completion counts as completion.
    """
    return next((index for index, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


class _Chat:
    """Encodes chats with the tokenizer's chat template.

    If the chat template marks the assistant's turns with ``{% generation %}``, these marks determine the labelled
    tokens. Few templates have marks. For a template without ``{% generation %}`` marks, the chat is rendered twice for
    each answer of the assistant: up to the start and up to the end of the answer. The answer is the text that only the
    longer rendering contains. If the rendering of earlier turns depends on later turns, TRL's variant of the template
    with ``{% generation %}`` marks is used, provided that TRL has a variant.
    """

    def __init__(self, tokenizer: Any, path: Path) -> None:
        self._path = path
        template = tokenizer.chat_template
        if not template:
            raise BadInput(f'{path}: "messages": expected a base with a chat template, found no chat template')
        self._marked = template if isinstance(template, str) and has_generation_markers(template) else None

    def __call__(self, tokenizer: Any, example: Example) -> tuple[list[int], list[int]]:
        messages = example.values[0]
        try:
            if self._marked is None:
                if (encoded := self._by_prefixes(tokenizer, messages)) is not None:
                    return encoded
                self._marked = _training_template(tokenizer)
            if self._marked is not None:
                return _by_markers(tokenizer, messages, self._marked)
        except (TemplateError, TypeError, ValueError, IndexError) as exc:
            reason = " ".join(str(exc).split()) or type(exc).__name__
            raise BadInput(f"{self._path}:{example.line}: the chat template rejects the chat: {reason}") from exc
        raise BadInput(
            f"{self._path}:{example.line}: expected a chat template with {{% generation %}} marks, "
            "found a chat template without marks, in which later turns change the text of earlier turns"
        )

    @staticmethod
    def _by_prefixes(tokenizer: Any, messages: list[dict[str, Any]]) -> tuple[list[int], list[int]] | None:
        whole = _render(tokenizer, messages)
        ids = _plain_ids(tokenizer, whole)
        labels = [NO_LOSS] * len(ids)
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = _render(tokenizer, messages[:index], add_generation_prompt=True)
            after = _render(tokenizer, messages[: index + 1])
            if not (whole.startswith(before) and whole.startswith(after) and len(before) < len(after)):
                return None
            # White space after the end of the turn belongs to the template and not to the answer.
            after = after.rstrip() if len(after.rstrip()) > len(before) else after
            start, end = (_common(_plain_ids(tokenizer, part), ids) for part in (before, after))
            labels[start:end] = ids[start:end]
        return ids, labels


def _render(tokenizer: Any, messages: list[dict[str, Any]], **options: Any) -> str:
    return str(tokenizer.apply_chat_template(messages, tokenize=False, **options))


def _plain_ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])  # the template already added special tokens


def _by_markers(tokenizer: Any, messages: list[dict[str, Any]], template: str) -> tuple[list[int], list[int]]:
    encoded = tokenizer.apply_chat_template(
        messages, chat_template=template, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    ids, mask = list(encoded["input_ids"]), encoded["assistant_masks"]
    return ids, [token_id if marked else NO_LOSS for token_id, marked in zip(ids, mask, strict=True)]


def _training_template(tokenizer: Any) -> str | None:
    try:
        template = get_training_chat_template(tokenizer)
    except ValueError:
        return None  # TRL has no variant of this template
    return None if template is None else str(template)
