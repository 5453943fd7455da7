"""Each known difference, as a change of the tokenizer, gives the token ids of llama.cpp."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from exporter.verify.runtimes.tokens.surroundings import SURROUNDINGS, surrounded
from exporter.verify.runtimes.tokens.variants import split_longest_first, variants
from tests.formats.gguf.models import SMOLLM, checkpoint, config, tokenizer_json
from tests.formats.gguf.vocab.surroundings import write_vocabulary

pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed (extra: llamacpp)")
pytestmark = pytest.mark.models

NFC = {"type": "NFC"}
NO_FLAGS = {"single_word": False, "lstrip": False, "rstrip": False}


def reasons(folder: Path, content: Mapping[str, Any]) -> dict[str, str]:
    """Text that llama.cpp tokenises differently → the first known difference that explains the token ids."""
    from tests.formats.gguf.runtime import tokenize

    base = checkpoint(folder, config(vocab_size=275), content)
    tokens = [entry["content"] for entry in content["added_tokens"]]
    texts = [*surrounded(tokens), "e\u0301 <lamp>"]
    tokenizer = Tokenizer.from_str(json.dumps(content))
    by_llama_cpp = tokenize(write_vocabulary(base)[0], texts)
    found = {}
    for text, ids in zip(texts, by_llama_cpp, strict=True):
        if tokenizer.encode(text, add_special_tokens=False).ids != ids:
            causes = (reason for reason, encode in variants(content) if encode(text) == ids)
            found[text] = next(causes, "")
    return found


@pytest.mark.parametrize("flag", ["lstrip", "rstrip", "single_word"])
def test_a_flag_explains_exactly_the_texts_that_differ(tmp_path: Path, flag: str) -> None:
    content = tokenizer_json(SMOLLM, ("<lamp>", "fog"))
    content["added_tokens"][-1][flag] = True
    found = reasons(tmp_path / "base", content)
    assert found
    assert set(found.values()) == {f"a GGUF has no key for the flag {flag} of the added tokens 'fog'"}
    assert all("fog" in text for text in found)


def test_a_normalizer_explains_the_texts_that_differ(tmp_path: Path) -> None:
    found = reasons(tmp_path / "base", {**tokenizer_json(SMOLLM, ("<lamp>",)), "normalizer": NFC})
    assert found == {"e\u0301 <lamp>": "llama.cpp does not apply the normalizer NFC"}


def test_overlaps_explain_the_texts_that_differ(tmp_path: Path) -> None:
    found = reasons(tmp_path / "base", tokenizer_json(SMOLLM, ("foo bar", "bar bazinga")))
    assert list(found) == ["a foo bar bazinga b"]
    assert found["a foo bar bazinga b"].startswith("llama.cpp matches the longest added token first")


def test_a_text_is_split_at_the_longest_token_first() -> None:
    ids = {"ab": 1, "bcd": 2, "d": 3}
    assert split_longest_first("xabcdd", ids) == ["xa", "bcd", "d"]
    assert split_longest_first("", ids) == []


def test_every_token_is_in_every_surrounding_until_there_are_too_many() -> None:
    few = list(surrounded(["<a>", "<b>"]))
    assert {surrounding.replace("{}", token) for surrounding in SURROUNDINGS for token in ("<a>", "<b>")} < set(few)
    assert "<a><b> <a> <b><a>" in few
    many = list(surrounded([f"<{number}>" for number in range(5000)]))
    assert "<4199> ships<4199>sail <4199> <4199>" in many
    assert not any("<4200>" in text for text in many)
    assert len(many) < 8000


@pytest.mark.parametrize(
    ("scheme", "text", "before", "after", "cause"),
    [
        ("always", "a\nb", [1, 2, 1, 3], [1, 2, 0, 3], "and llama.cpp as unknown characters"),
        ("first", "<s>a", [4, 2], [4, 1, 2], "llama.cpp adds a space to each text after a special token"),
    ],
)
def test_line_breaks_and_spaces_of_sentencepiece_are_known_differences(
    scheme: str, text: str, before: list[int], after: list[int], cause: str
) -> None:
    space = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": scheme, "split": True}
    split = {"type": "Sequence", "pretokenizers": [{"type": "WhitespaceSplit"}, space]}
    pieces = [["<unk>", 0.0], ["\u2581", -1.0], ["a", -1.0], ["b", -1.0]]
    added = [{"id": 4, "content": "<s>", "special": True, "normalized": False} | NO_FLAGS]
    content: dict[str, Any] = {"model": {"type": "Unigram", "unk_id": 0, "vocab": pieces}, "added_tokens": added}
    content |= {"version": "1.0", "normalizer": None, "pre_tokenizer": split, "post_processor": None, "decoder": None}
    assert Tokenizer.from_str(json.dumps(content)).encode(text, add_special_tokens=False).ids == before
    reason = next(reason for reason, encode in variants(content) if encode(text) == after)
    assert cause in reason
