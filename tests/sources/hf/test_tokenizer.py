from __future__ import annotations

import json
import re
import shutil
import weakref
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from exporter.errors import UnreadableFile
from exporter.sources.hf.tokenizer import Tokenizer, read_tokenizer, token_ids
from tests.support.trained import NEW_TOKENS


def test_every_id_of_the_tokenizer_is_found(tiny_tied: Path, tiny_new_tokens_adapter: Path) -> None:
    for folder in (tiny_tied, tiny_new_tokens_adapter):
        vocab = AutoTokenizer.from_pretrained(folder).get_vocab()
        assert token_ids(folder / "tokenizer.json") == set(vocab.values())
    assert token_ids(tiny_new_tokens_adapter / "tokenizer.json") >= set(range(512, 512 + len(NEW_TOKENS)))


def test_a_unigram_list_counts_its_pieces(tmp_path: Path) -> None:
    (tmp_path / "t").write_text(
        json.dumps({"model": {"vocab": [["a", 0.0], ["b", -1.5]]}, "added_tokens": [{"id": 7}]})
    )
    assert token_ids(tmp_path / "t") == {0, 1, 7}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "model: Expected `object`, got `null`"),
        ({"model": []}, "model: Expected `object`, got `array`"),
        ({"model": {}}, "model.vocab: Expected `object | array`, got `null`"),
        ({"model": {"vocab": 5}}, "model.vocab: Expected `object | array`, got `int`"),
        ({"model": {"vocab": {"a": -1}}}, "model.vocab: Expected `int` >= 0"),
        ({"model": {"vocab": {"a": 1.5}}}, "model.vocab: Expected `int`, got `float`"),
        ({"model": {"vocab": {"a": True}}}, "model.vocab: Expected `int`, got `bool`"),
        ({"model": {"vocab": {"a": [1]}}}, "model.vocab: Expected `int`, got `array`"),
        ({"model": {"vocab": {}}, "added_tokens": {"id": 1}}, "added_tokens: Expected `array | null`, got `object`"),
        ({"model": {"vocab": {}}, "added_tokens": [1]}, "added_tokens: Expected `object`, got `int`"),
        ({"model": {"vocab": {}}, "added_tokens": [{}]}, "added_tokens: Object missing required field `id`"),
        ({"model": {"vocab": {}}, "added_tokens": [{"id": {}}]}, "added_tokens: Expected `int`, got `object`"),
    ],
)
def test_a_file_that_is_not_a_tokenizer_is_refused(content: object, message: str, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(content))
    with pytest.raises(UnreadableFile, match=re.escape(message)) as caught:
        token_ids(path)
    assert caught.value.path == path


def test_readers_share_a_tokenizer_while_it_is_referenced(tiny_tied: Path, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    shutil.copy(tiny_tied / "tokenizer.json", path)
    tokenizer = Tokenizer.open(path)
    assert read_tokenizer(path) is tokenizer.content

    content = json.loads(path.read_text())
    content["added_tokens"].append({"id": 9999, "content": "<late>", "special": True})
    path.write_text(json.dumps(content))
    assert 9999 in token_ids(path)  # the changed file is decoded again

    reference = weakref.ref(Tokenizer.open(path))
    assert reference() is None
