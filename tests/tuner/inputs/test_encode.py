from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import AutoTokenizer

from exporter.errors import BadInput
from tuner.inputs.data import Example, Examples
from tuner.inputs.encode import NO_LOSS, encode_examples

CHATML = (
    "{% for m in messages %}{% if loop.first and m.role != 'system' %}<|im_start|>system\nkeeper<|im_end|>\n{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "<|im_end|>{% endgeneration %}{{ '\n' }}{% else %}{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
)
# Renders only the last answer unchanged, as templates of reasoning models do.
FORGETFUL = CHATML.replace("{{ m.content }}", "{{ m.content if loop.last or m.role == 'user' else m.content | upper }}")
TURNS = [("user", "lamp on"), ("assistant", "the lamp"), ("user", "and the ship"), ("assistant", "the ship")]


def chat(*turns: tuple[str, str]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in turns]


def examples(example_type: str, *values: Any) -> Examples:
    return Examples(Path("data.jsonl"), example_type, tuple(Example(i, value) for i, value in enumerate(values, 1)), "")


@pytest.fixture
def tokenizer(base: Path) -> Any:
    loaded = AutoTokenizer.from_pretrained(base)
    loaded.chat_template = CHATML
    return loaded


def learned(tokenizer: Any, example: dict[str, list[int]]) -> str:
    return str(tokenizer.decode([label for label in example["labels"] if label != NO_LOSS]))


class Letters(SimpleNamespace):
    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) for letter in text]}


def test_all_tokens_of_a_text_are_learned_with_one_end_token_and_long_texts_are_truncated() -> None:
    encoded = encode_examples(Letters(eos_token_id=0), examples("text", ("ab",), ("a\x00",), ("abcd",)), 4)
    assert [example["labels"] for example in encoded.examples] == [[97, 98, 0], [97, 0], [97, 98, 99, 100]]
    assert all(example["labels"] == example["input_ids"] for example in encoded.examples)
    assert (encoded.truncated, encoded.dropped) == (1, ())
    without_end = encode_examples(Letters(eos_token_id=None), examples("text", ("ab",)), 4)
    assert without_end.examples[0]["input_ids"] == [97, 98]


def test_only_the_completion_of_a_prompt_is_learned() -> None:
    encoded = encode_examples(Letters(eos_token_id=0), examples("prompt", ("ab", "cd")), 9)
    assert encoded.examples == [{"input_ids": [97, 98, 99, 100, 0], "labels": [NO_LOSS, NO_LOSS, 99, 100, 0]}]


def test_a_token_across_the_border_of_prompt_and_completion_is_learned(tokenizer: Any) -> None:
    whole = tokenizer("keep the")["input_ids"]
    assert tokenizer("keep t")["input_ids"] != whole[: len(tokenizer("keep t")["input_ids"])]
    (example,) = encode_examples(tokenizer, examples("prompt", ("keep t", "he")), 99).examples
    assert example["input_ids"] == [*whole, tokenizer.eos_token_id]
    assert learned(tokenizer, example) == " the" + tokenizer.eos_token


def test_every_answer_of_a_chat_with_its_end_of_turn_is_learned_and_nothing_else(tokenizer: Any) -> None:
    (example,) = encode_examples(tokenizer, examples("messages", (chat(*TURNS),)), 999).examples
    rendered = tokenizer.apply_chat_template(chat(*TURNS), tokenize=False)
    assert tokenizer.decode(example["input_ids"]) == rendered
    assert learned(tokenizer, example) == "the lamp<|im_end|>the ship<|im_end|>"


def test_a_template_with_marks_gives_the_same_labels(tokenizer: Any) -> None:
    turns = [("system", "keeper"), *TURNS]
    (by_prefixes,) = encode_examples(tokenizer, examples("messages", (chat(*turns),)), 999).examples
    tokenizer.chat_template = MARKED
    assert encode_examples(tokenizer, examples("messages", (chat(*turns),)), 999).examples == [by_prefixes]


def test_a_template_that_rewrites_earlier_turns_is_refused_by_line(tokenizer: Any) -> None:
    tokenizer.chat_template = FORGETFUL
    one_turn = (chat(*TURNS[:2]),)
    with pytest.raises(
        BadInput, match=r"data.jsonl:2: expected a chat template .*generation %} marks, found a chat template"
    ):
        encode_examples(tokenizer, examples("messages", one_turn, (chat(*TURNS),)), 999)


def test_for_a_known_template_that_rewrites_earlier_turns_trl_has_one_with_marks(tokenizer: Any) -> None:
    from trl.chat_template_utils import qwen3_chat_template

    tokenizer.chat_template = qwen3_chat_template
    (example,) = encode_examples(tokenizer, examples("messages", (chat(*TURNS),)), 999).examples
    assert "the lamp<|im_end|>" in learned(tokenizer, example)
    assert "lamp on" not in learned(tokenizer, example)


def test_a_chat_that_the_template_rejects_is_named_by_line(tokenizer: Any) -> None:
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(BadInput, match=r"data.jsonl:1: the chat template rejects the chat: roles must alternate"):
        encode_examples(tokenizer, examples("messages", (chat(*TURNS),)), 999)
    tokenizer.chat_template = None
    with pytest.raises(BadInput, match=r'data.jsonl: "messages": expected a base with a chat template'):
        encode_examples(tokenizer, examples("messages", (chat(*TURNS),)), 999)


def test_examples_without_a_label_are_dropped_or_refused() -> None:
    two = examples("prompt", ("abcd", "e"), ("a", "b"))
    encoded = encode_examples(Letters(eos_token_id=0), two, 4)
    assert encoded.dropped == (1,)
    assert [example["input_ids"] for example in encoded.examples] == [[97, 98, 0]]
    with pytest.raises(
        BadInput,
        match=r"data.jsonl: expected an example with a token to learn among its first 1 tokens \(--max-length\)",
    ):
        encode_examples(Letters(eos_token_id=0), two, 1)
