"""SentencePiece tokenizers whose added tokens, spaces and BOS depend on tokenizer_config.json."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from fixtures.models.tokenizers import as_transformers, llama_sentencepiece
from tests.formats.gguf.vocab.surroundings import disagreements, write_files, write_vocabulary

TOKENS = ("<pad>", "<new>", "naïve")
NAMED = {"pad_token": "<pad>", "additional_special_tokens": ["<new>", "naïve"]}
ROLES = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
FILE = {**ROLES, **NAMED, "tokenizer_class": "PreTrainedTokenizerFast"}
CLASS = {**ROLES, **NAMED, "tokenizer_class": "LlamaTokenizer"}
PREPEND = {
    "type": "Sequence",
    "normalizers": [
        {"type": "Prepend", "prepend": "\u2581"},
        {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"},
    ],
}
LEADING = "llama.cpp adds a space even to a text that begins with a space"
AFTER = "llama.cpp adds a space to the text after each special token"
BOS = "llama.cpp adds the BOS token before each text, but transformers does not"

#: name → (settings, whether tokenizer.json exists, whether tokenizer.model exists, starts of the notes)
CASES: dict[str, tuple[dict[str, Any], bool, bool, list[str]]] = {
    "json": (FILE, True, False, []),
    "json-and-model": (FILE, True, True, []),
    "class": (CLASS, True, True, [LEADING, AFTER]),
    "class-legacy": ({**CLASS, "legacy": True}, True, False, [LEADING]),
    "class-without-prefix": ({**CLASS, "add_prefix_space": False}, True, False, []),
    "model": ({**CLASS, "legacy": True, "add_bos_token": True}, False, True, [LEADING]),
    "model-without-bos": ({**CLASS, "legacy": True}, False, True, [LEADING, BOS]),
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, dict[str, Any]]:
    """(tokenizer.model, tokenizer.json as transformers 4 wrote it)."""
    model = llama_sentencepiece()
    content = as_transformers(tmp_path_factory.mktemp("llama") / "model", model, "LlamaTokenizer")
    return model, {**content, "normalizer": PREPEND, "pre_tokenizer": None}


@pytest.mark.parametrize("name", CASES)
def test_tokens_named_outside_are_tokenised_alike_and_every_difference_is_noted(
    tmp_path: Path, llama: tuple[bytes, dict[str, Any]], name: str
) -> None:
    settings, with_json, with_model, notes = CASES[name]
    model, content = llama
    write_files(tmp_path, config={"model_type": "llama", "vocab_size": 2000}, tokenizer_config=settings)
    if with_json:
        write_files(tmp_path, tokenizer=content)
    if with_model:
        (tmp_path / "tokenizer.model").write_bytes(model)
    out, written = write_vocabulary(tmp_path)
    assert [note[: len(start)] for note, start in zip(written.notes, notes, strict=True)] == notes
    differing = disagreements(out, tmp_path, TOKENS)
    noted = {text for text in differing if LEADING in notes and _starts_with_space(text)}
    noted |= {text for text in differing if AFTER in notes and re.search("|".join(TOKENS), text)}
    noted |= differing.keys() if BOS in notes else set()
    assert differing.keys() == noted
    assert bool(differing) == bool(notes)


def _starts_with_space(text: str) -> bool:
    """Whether the text, or the text after one of the tokens, begins with a space."""
    return any(part.startswith(" ") for part in re.split("|".join(TOKENS), text))


def test_the_class_does_not_count_for_other_model_types(tmp_path: Path, llama: tuple[bytes, dict[str, Any]]) -> None:
    write_files(tmp_path, config={"model_type": "phi3", "vocab_size": 2000}, tokenizer_config=CLASS, tokenizer=llama[1])
    out, written = write_vocabulary(tmp_path, json.loads((tmp_path / "config.json").read_text()))
    assert written.notes == []
    assert not disagreements(out, tmp_path, TOKENS)
