"""Overlapping added tokens: the two splits equal those of the tokenizers library and of llama.cpp."""

from __future__ import annotations

import itertools
import time
from pathlib import Path

import pytest

from exporter.sources.hf.by_llama_cpp.overlaps import contested, from_left, longest_first
from exporter.sources.hf.sentencepiece import USER_DEFINED
from tests.sources.hf.by_llama_cpp.test_tokens import FIRST, vocabulary_file

tokenizers = pytest.importorskip("tokenizers")

SETS = (
    {"foo bar": False, "bar bazinga": False},
    {"foo bar": True, "bar bazinga": True},
    {"foo bar": True, "bar": False, "bar bazinga": True},
    {"aa": False, "aaa": False, "aaaaa": True},
    {"<a>": False, "<ab>": False, "b><c": False},
)
PARTS = ("foo bar", " bar bazinga", "bazinga", "aa", "aaa", "<a", "b><c", ">", " ")
TEXTS = ["".join(parts) for count in (1, 2, 3) for parts in itertools.product(PARTS, repeat=count)]


@pytest.mark.parametrize("tokens", SETS, ids=lambda tokens: ",".join(tokens))
def test_the_splits_equal_both_libraries(tokens: dict[str, bool], tmp_path: Path) -> None:
    runtime = pytest.importorskip("tests.formats.gguf.runtime", reason="llama-cpp-python is not installed")
    ours = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={}, merges=[]))
    ours.add_tokens([tokenizers.AddedToken(text, normalized=flag) for text, flag in tokens.items()])
    names = list(tokens)
    assert [ours.encode(text).tokens for text in TEXTS] == [
        [piece for piece in from_left(text, tokens) if piece in tokens] for text in TEXTS
    ]
    path = vocabulary_file(tmp_path / "tokens.gguf", names, USER_DEFINED)
    for text, ids in zip(TEXTS, runtime.tokenize(path, TEXTS), strict=True):
        found = [names[token_id - FIRST] for token_id in ids if token_id >= FIRST]
        assert found == [piece for piece in longest_first(text, tokens) if piece in tokens]


def test_a_pair_is_contested_only_if_the_right_token_is_searched_first() -> None:
    assert contested({"foo bar": True, "bar bazinga": True}, {"foo bar"}) == [("foo bar", "bar bazinga")]
    assert contested({"foo bar": True, "bar bazinga": True}, {"other"}) == []
    assert contested({"foo bazinga": True, "bazinga!": True}, {"bazinga!"}) == []
    assert contested({"\n" * count: False for count in range(1, 30)}, {"\n\n"}) == []


def test_a_token_inside_another_is_contested_if_the_outer_one_is_normalized() -> None:
    assert contested({"a<b>c": True, "<b>": False}, {"a<b>c"}) == [("a<b>c", "<b>")]
    assert contested({"a<b>c": False, "<b>": False}, {"a<b>c"}) == []


def test_tokens_of_equal_length_are_contested_whatever_their_order() -> None:
    assert contested({"ab": False, "ba": False}, {"ab"}) == [("ab", "ba"), ("ba", "ab")]


def test_thirty_thousand_tokens_take_seconds() -> None:
    tokens = {f"<item_{index}>": index % 2 == 0 for index in range(30_000)}
    began = time.perf_counter()
    assert contested(tokens, tokens.keys()) == []
    assert time.perf_counter() - began < 20
