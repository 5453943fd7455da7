"""Texts with added tokens in all surroundings, on which transformers and llama.cpp are compared."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import cycle, islice, product
from pathlib import Path
from typing import Any

import pytest

from exporter.formats.gguf import writer
from exporter.formats.gguf.vocab.tokenizer import Vocabulary, vocabulary
from exporter.io.json_objects import read_object
from exporter.sources.hf.checkpoint import auxiliary_files

_BEFORE = ("", " ", "the", "the ", "a\n", "7", "(", "é", "灯", "\t", ".", "  ")
_AFTER = ("", " ", "ing", " the", "\n", "0", ")", "é", "台", "'s", "!", "  ")


def surrounded(tokens: Sequence[str], count: int = 200) -> list[str]:
    """``count`` texts: each token between all kinds of characters, twice in a row, and beside every other token."""
    texts = [before + token + after for before, after in product(_BEFORE, _AFTER) for token in tokens]
    beside = [left + gap + right for left in tokens for right in tokens for gap in ("", " ")]
    step = max(1, len(texts) // max(1, count - len(beside)))
    return list(islice(cycle([*beside, *texts[::step], *texts]), count))


def write_vocabulary(folder: Path, configuration: Mapping[str, Any] | None = None) -> tuple[Path, Vocabulary]:
    """(a GGUF with the tokenizer in ``folder`` and no tensors, what was written)."""
    settings = configuration or read_object(folder / "config.json")
    vocab = vocabulary(auxiliary_files(folder), settings, settings["vocab_size"], where=folder)
    out = folder / "vocabulary.gguf"
    out.write_bytes(writer.header([writer.text("general.architecture", "llama"), *vocab.keys], [])[0])
    return out, vocab


def disagreements(out: Path, folder: Path, tokens: Sequence[str]) -> dict[str, tuple[list[int], list[int]]]:
    """Text → (ids of transformers, ids of llama.cpp) where they differ, of 200 texts with ``tokens``."""
    runtime = pytest.importorskip("tests.formats.gguf.runtime", reason="llama-cpp-python is not installed")
    from transformers import AutoTokenizer

    texts = surrounded(tokens)
    assert len(texts) == 200
    want = AutoTokenizer.from_pretrained(folder)(texts)["input_ids"]
    got = runtime.tokenize(out, texts, add_special=True)
    return {text: (a, b) for text, a, b in zip(texts, want, got, strict=True) if a != b}


def write_files(folder: Path, **files: Any) -> Path:
    """Write ``files`` (name without .json → content) into ``folder``."""
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    return folder
