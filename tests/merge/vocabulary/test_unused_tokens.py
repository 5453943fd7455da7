"""A tokenizer with tokens that have no embedding row: named, and left out with --drop-unused-tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from exporter.cli.main import run
from exporter.sources.gguf.file import GgufFile
from exporter.sources.gguf.header import GgufArray
from tests.formats.gguf.models import SETTINGS, SMOLLM, checkpoint, config, template, tokenizer_json
from tests.formats.gguf.vocab.surroundings import write_files

Capture = pytest.CaptureFixture[str]


def too_large(folder: Path, text: str = "[PAD]", **settings: Any) -> Path:
    """A base with 270 rows, and a tokenizer of 271 tokens whose last token ``text`` is named in four files."""
    content = tokenizer_json(SMOLLM, ("<lamp>", text))
    content["added_tokens"][-1]["special"] = True
    base = checkpoint(folder, config(vocab_size=270), content, settings={**SETTINGS, "pad_token": text, **settings})
    named = {"pad_token": text, "additional_special_tokens": [text]}
    return write_files(base, special_tokens_map=named, added_tokens={"<lamp>": 269, text: 270})


@pytest.mark.parametrize("target", ["hf", "gguf", "onnx"])
def test_the_token_is_named_with_both_ways(tmp_path: Path, target: str, capsys: Capture) -> None:
    base, out = too_large(tmp_path / "base"), tmp_path / "out"
    assert run(["export", str(base), "--to", target, "-o", str(out)]) == 4
    message = capsys.readouterr().err
    assert "expected token ids below 270" in message
    assert "found 270 for the token '[PAD]'; use --drop-unused-tokens" in message
    assert "ttexport tune --new-token '[PAD]'" in message
    assert not out.exists()


@pytest.mark.parametrize("target", ["hf", "onnx"])
def test_a_folder_without_the_unused_token_is_verified(tmp_path: Path, target: str) -> None:
    base, out = too_large(tmp_path / "base"), tmp_path / "out"
    before = {path.name: path.read_bytes() for path in base.iterdir()}
    drop = ["--drop-unused-tokens", "--verify", "weights"]
    assert run(["export", str(base), "--to", target, *drop, "-q", "-o", str(out)]) == 0
    assert {path.name: path.read_bytes() for path in base.iterdir()} == before
    assert not [path for path in out.rglob("*.json") if "[PAD]" in path.read_text(encoding="utf-8")]
    again = ["verify", str(out), "--reference", str(base), "--level", "weights", "-q"]
    assert run([*again, "--drop-unused-tokens"]) == 0
    assert run(again) == 3
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert (len(tokenizer), tokenizer.pad_token) == (270, None)
    assert tokenizer("the <lamp>")["input_ids"] == AutoTokenizer.from_pretrained(base)("the <lamp>")["input_ids"]


def test_a_gguf_without_the_unused_token_is_verified(tmp_path: Path, capsys: Capture) -> None:
    base, out = too_large(tmp_path / "base"), tmp_path / "out.gguf"
    drop = ["--drop-unused-tokens", "--verify", "weights"]
    assert run(["export", str(base), "--to", "gguf", *drop, "-o", str(out)]) == 0
    assert "left out the token '[PAD]', which has no embedding row" in capsys.readouterr().err
    tokens = GgufFile.open(out).metadata["tokenizer.ggml.tokens"]
    assert isinstance(tokens, GgufArray)
    assert (len(tokens.values()), tokens.values()[-1]) == (270, "<lamp>")


@pytest.mark.parametrize("user", ["a chat template", "the post-processor", "the setting of the token"])
def test_a_token_that_a_text_needs_is_not_dropped(tmp_path: Path, user: str, capsys: Capture) -> None:
    settings: dict[str, Any] = {"chat_template": "{{ '[PAD]' }}"} if user == "a chat template" else {}
    base = too_large(tmp_path / "base", **settings)
    if user == "the post-processor":
        content = json.loads((base / "tokenizer.json").read_text())
        content["post_processor"] = template(["<|im_start|>", "A"], ["A", "B"])
        content["post_processor"]["single"][0]["SpecialToken"]["id"] = "[PAD]"
        write_files(base, tokenizer=content)
    elif user == "the setting of the token":
        write_files(base, special_tokens_map={"eos_token": "[PAD]"})
    assert run(["export", str(base), "--to", "gguf", "--drop-unused-tokens", "-o", str(tmp_path / "out.gguf")]) == 5
    message = capsys.readouterr().err
    assert f"the token '[PAD]' with the id 270 has no embedding row, but {user}" in message


def test_a_word_of_the_vocabulary_is_not_dropped(tmp_path: Path, capsys: Capture) -> None:
    content = tokenizer_json(SMOLLM)
    content["model"]["vocab"]["word"] = 269
    base = checkpoint(tmp_path / "base", config(), content)
    assert run(["export", str(base), "--to", "hf", "--drop-unused-tokens", "-o", str(tmp_path / "out")]) == 4
    assert "found the token 'word' of the vocabulary with the id 269" in capsys.readouterr().err
