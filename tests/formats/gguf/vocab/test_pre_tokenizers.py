"""Every row of the table of pre-tokenizers: recognised from the structure, and equal in llama.cpp and tokenizers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken

from exporter.formats.gguf import writer
from exporter.formats.gguf.vocab.pre_tokenizer_table import TABLE, PreTokenizer, Step
from exporter.formats.gguf.vocab.pre_tokenizers import recognise, steps
from exporter.formats.gguf.vocab.tokenizer import vocabulary
from fixtures.models.tokenizers import train_bpe
from tests.formats.gguf.models import BYTE_LEVEL, BYTES_ONLY, LLAMA3, LLAMA3_EXPRESSION, sequence, split, tokenizer_json
from tests.formats.gguf.vocab.texts import ADDED, ALL_TEXTS

MARKED = ("नमस्ते दुनिया", "e\u0301", "cafe\u0301 na\u0308ive", "a\u0300\u0301\u0302b")
#: name → the texts that llama.cpp splits differently: exactly these and no others. The table says why.
DIFFERENCES: dict[str, Callable[[str], bool]] = {
    "tekken": lambda text: text in MARKED,
    "gpt-4o": lambda text: text in MARKED,
    "kimi-k2": lambda text: text in MARKED,
    "deepseek-llm": lambda text: text == "   \u3000",
    "laguna": lambda text: "\r\n" in text,
}

ROWS = [pytest.param(row, id=row.name) for row in TABLE]
CASES = [
    pytest.param(row, model_type, name, id=f"{row.name}-{model_type}")
    for row in TABLE
    for model_type, name in row.by_model_type.items()
]


def as_json(step: Step) -> dict[str, Any]:
    step_type = step[0]
    if step_type == "Split":
        return {"type": step_type, "pattern": {step[1]: step[2]}, "behavior": step[3], "invert": step[4]}
    if step_type == "ByteLevel":
        return {"type": step_type, "add_prefix_space": step[1], "trim_offsets": True, "use_regex": step[2]}
    if step_type == "Digits":
        return {"type": step_type, "individual_digits": step[1]}
    return {"type": step_type, "behavior": step[1]}


def structure(row: PreTokenizer) -> dict[str, Any]:
    return sequence(*map(as_json, row.steps))


def header_only(folder: Path, tokenizer_json: str, vocab: int, pre_tokenizer: str | None = None) -> Path:
    """A GGUF of nothing but a tokenizer, which is enough for llama.cpp to load a vocabulary."""
    path = folder / "tokenizer.json"
    path.write_text(tokenizer_json, encoding="utf-8")
    metadata = vocabulary({path.name: path}, {}, vocab, where=folder, pre_tokenizer=pre_tokenizer)
    out = folder / "out.gguf"
    out.write_bytes(writer.header([writer.text("general.architecture", "llama"), *metadata.keys], [])[0])
    return out


def test_there_are_500_texts() -> None:
    assert len(set(ALL_TEXTS)) >= 500


@pytest.mark.parametrize("row", ROWS)
def test_llama_cpp_tokenises_texts_as_tokenizers_does(tmp_path: Path, row: PreTokenizer) -> None:
    runtime = pytest.importorskip("tests.formats.gguf.runtime", reason="llama-cpp-python is not installed")
    tokenizer = train_bpe(structure(row), ignore_merges=bool(row.ignore_merges), texts=ALL_TEXTS)
    tokenizer.add_tokens([AddedToken(text, normalized=True) for text in ADDED])
    got = runtime.tokenize(header_only(tmp_path, tokenizer.to_str(), tokenizer.get_vocab_size()), ALL_TEXTS)
    want = [tokenizer.encode(text, add_special_tokens=False).ids for text in ALL_TEXTS]
    expected: Callable[[str], bool] = DIFFERENCES.get(row.name, lambda text: False)
    differing = {text for text, ours, theirs in zip(ALL_TEXTS, want, got, strict=True) if ours != theirs}
    assert differing == {text for text in ALL_TEXTS if expected(text)}


def test_every_difference_is_noted(tmp_path: Path) -> None:
    assert DIFFERENCES.keys() == {row.name for row in TABLE if row.difference}
    for row in TABLE:
        content = tokenizer_json(structure(row), model={"ignore_merges": bool(row.ignore_merges)})
        (tmp_path / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
        notes = vocabulary({"tokenizer.json": tmp_path / "tokenizer.json"}, {}, 269, where=tmp_path).notes
        wanted = f"pre-tokenizer {row.name}: unlike transformers, {row.difference}"
        assert notes == ([wanted] if row.name in DIFFERENCES else [])


@pytest.mark.parametrize(("row", "model_type", "name"), CASES)
def test_the_model_type_decides_between_names_of_one_structure(row: PreTokenizer, model_type: str, name: str) -> None:
    content = {"pre_tokenizer": structure(row), "model": {"ignore_merges": bool(row.ignore_merges)}}
    assert recognise(content, model_type, "tokenizer.json") == name
    assert recognise(content, "another", "tokenizer.json") == row.name


@pytest.mark.parametrize("name", sorted({name for row in TABLE for name in row.names}))
def test_llama_cpp_knows_every_name(tmp_path: Path, name: str) -> None:
    runtime = pytest.importorskip("tests.formats.gguf.runtime", reason="llama-cpp-python is not installed")
    tokenizer = train_bpe(BYTE_LEVEL, vocab=300)
    out = header_only(tmp_path, tokenizer.to_str(), tokenizer.get_vocab_size(), name)
    assert runtime.tokenize(out, ["ships"])[0]


def test_no_tokenizer_matches_two_rows() -> None:
    patterns = [(row.steps, flag) for row in TABLE for flag in (True, False) if row.ignore_merges in (None, flag)]
    assert len(set(patterns)) == len(patterns)


def test_equivalent_spellings_of_a_pre_tokenizer_are_equal() -> None:
    removed = {**split(LLAMA3_EXPRESSION), "behavior": "Removed", "invert": True}
    written_out = split(LLAMA3_EXPRESSION.replace("\\r", "\r").replace("\\n", "\n"))
    nested = sequence(sequence(split(LLAMA3_EXPRESSION)), BYTES_ONLY)
    for other in (sequence(removed, BYTES_ONLY), sequence(written_out, BYTES_ONLY), nested):
        assert steps(other) == steps(LLAMA3)
    gpt2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    assert steps(sequence(split(gpt2), BYTES_ONLY)) == steps(BYTE_LEVEL)


def test_removing_the_text_between_matches_differs_from_isolating_if_an_expression_leaves_some() -> None:
    step = split(r"\p{N}{1,3}")
    assert steps({**step, "behavior": "Removed", "invert": True}) != steps(step)
