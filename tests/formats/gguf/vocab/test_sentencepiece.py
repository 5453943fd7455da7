"""SentencePiece tokenizers, from tokenizer.model and tokenizer.json: llama.cpp tokenises texts as transformers does."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
from tokenizers import AddedToken, Tokenizer

from exporter.formats.gguf import writer
from exporter.formats.gguf.vocab.tokenizer import Vocabulary, vocabulary
from fixtures.models.tokenizers import as_transformers, llama_sentencepiece, t5_sentencepiece
from fixtures.tiny import SPECIAL_TOKENS
from tests.formats.gguf.conftest import Write
from tests.formats.gguf.models import checkpoint, config, sequence
from tests.formats.gguf.vocab.texts import ADDED, ALL_TEXTS

MARK = "\u2581"
TO_MARKS = {"type": "Replace", "pattern": {"String": " "}, "content": MARK}
RUNS = {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": MARK}
AFTER_SPACES = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}
STRIP = {"type": "Strip", "strip_left": False, "strip_right": True}


def normalizers(*steps: Mapping[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", "normalizers": list(steps)}


def metaspace(scheme: str, *, split: bool) -> dict[str, Any]:
    return {"type": "Metaspace", "replacement": MARK, "prepend_scheme": scheme, "split": split}


MAP: dict[str, Any] = {"type": "Precompiled"}  # transformers copies the map from tokenizer.model
#: name → (normalizer, pre-tokenizer), as transformers 4 and 5 write them for the families of the name.
BPE: dict[str, tuple[Any, Any]] = {
    "llama-4": (normalizers({"type": "Prepend", "prepend": MARK}, TO_MARKS), None),  # mistral and phi3, too
    "llama-5": (None, metaspace("always", split=False)),
    "mistral-v3": (None, metaspace("first", split=False)),
    "gemma": (
        TO_MARKS,
        {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False},
    ),
    "no-prefix": (None, metaspace("never", split=False)),
    "no-prefix-4": (TO_MARKS, None),
}
UNIGRAM: dict[str, tuple[Any, Any]] = {
    "t5-4": (normalizers(MAP, STRIP, RUNS), metaspace("always", split=True)),
    "t5-5": (MAP, sequence({"type": "WhitespaceSplit"}, metaspace("always", split=True))),
    "first": (normalizers(MAP, STRIP, RUNS), metaspace("first", split=True)),
}

TOKENS = re.compile("|".join(map(re.escape, sorted((*ADDED, *SPECIAL_TOKENS), key=len, reverse=True))))


def segments(text: str) -> list[str]:
    """The parts of a text between added tokens, some of them empty."""
    return TOKENS.split(text)


#: name → (why llama.cpp tokenises differently, on which texts): exactly these and no others.
DIFFERENCES: dict[str, tuple[str, Callable[[str], bool]]] = {
    "llama-5": (
        "Metaspace adds no space to a text that begins with a space; SentencePiece and llama.cpp do",
        lambda text: any(part.startswith(" ") for part in segments(text)),
    ),
    "mistral-v3": (
        "the same, and Metaspace's scheme 'first' adds no space after an added token; llama.cpp does",
        lambda text: text.startswith(" ") or any(segments(text)[1:]),
    ),
}
#: The character map: tokenizers applies it to a whole grapheme, then to single characters. SentencePiece and
#: llama.cpp use the longest match, so a letter composes with the first of its marks, and jamo with each other.
COMPOSED = ("cafe\u0301 na\u0308ive", "a\u0300\u0301\u0302b", "\u1112\u1161\u11ab")
DIFFERENCES |= {
    "t5-4": ("COMPOSED", lambda text: text in COMPOSED),
    "t5-5": (
        "COMPOSED, and WhitespaceSplit treats U+0085 as a space, which the map keeps",
        lambda text: text in COMPOSED or "\x85" in text,
    ),
    "first": (
        "COMPOSED, and Metaspace's scheme 'first' adds no space after an added token; llama.cpp does",
        lambda text: text in COMPOSED or any(part and not part[0].isspace() for part in segments(text)[1:]),
    ),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[bytes, dict[str, Any]]]:
    """Algorithm → (tokenizer.model, the tokenizer.json that transformers converts it to)."""
    folder = tmp_path_factory.mktemp("sentencepiece")
    bpe, unigram = llama_sentencepiece(ALL_TEXTS), t5_sentencepiece(ALL_TEXTS)
    return {
        "bpe": (bpe, as_transformers(folder / "bpe", bpe, "LlamaTokenizer")),
        "unigram": (unigram, as_transformers(folder / "unigram", unigram, "T5Tokenizer")),
    }


def with_spaces(content: Mapping[str, Any], form: tuple[Any, Any], added: Sequence[AddedToken] = ()) -> Tokenizer:
    """The tokenizer with another treatment of spaces, and with added tokens."""
    text = json.dumps({**content, "normalizer": form[0], "pre_tokenizer": form[1]})
    if content["normalizer"]:
        text = text.replace(json.dumps(MAP), json.dumps(content["normalizer"]))
    tokenizer = Tokenizer.from_str(text)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in ADDED] if not added else list(added))
    return tokenizer


def header_only(folder: Path, tokenizer: Tokenizer | None, model: bytes | None, rows: int) -> tuple[Path, Vocabulary]:
    """A GGUF with a tokenizer only, which is enough for llama.cpp to load a vocabulary."""
    files = {}
    if tokenizer is not None:
        files["tokenizer.json"] = folder / "tokenizer.json"
        files["tokenizer.json"].write_text(tokenizer.to_str(), encoding="utf-8")
    if model is not None:
        files["tokenizer.model"] = folder / "tokenizer.model"
        files["tokenizer.model"].write_bytes(model)
    vocab = vocabulary(files, {}, rows, where=folder)
    out = folder / "out.gguf"
    out.write_bytes(writer.header([writer.text("general.architecture", "llama"), *vocab.keys], [])[0])
    return out, vocab


def differing(out: Path, tokenizer: Tokenizer, texts: Sequence[str], *, special: bool = False) -> set[str]:
    runtime = pytest.importorskip("tests.formats.gguf.runtime", reason="llama-cpp-python is not installed")
    got = runtime.tokenize(out, texts, add_special=special)
    want = [tokenizer.encode(text, add_special_tokens=special).ids for text in texts]
    return {text for text, ours, theirs in zip(texts, want, got, strict=True) if ours != theirs}


@pytest.mark.parametrize("with_model", [False, True], ids=["json", "json-and-model"])
@pytest.mark.parametrize("name", [*BPE, *UNIGRAM])
def test_llama_cpp_tokenises_texts_as_tokenizers_does(
    tmp_path: Path, models: dict[str, tuple[bytes, dict[str, Any]]], name: str, with_model: bool
) -> None:
    model, content = models["bpe" if name in BPE else "unigram"]
    tokenizer = with_spaces(content, (BPE | UNIGRAM)[name])
    out, vocab = header_only(tmp_path, tokenizer, model if with_model else None, tokenizer.get_vocab_size())
    _, expected = DIFFERENCES.get(name, ("", lambda text: False))
    assert differing(out, tokenizer, ALL_TEXTS) == {text for text in ALL_TEXTS if expected(text)}
    assert bool(vocab.notes) == ((name in DIFFERENCES and name in BPE) or name == "first")


def test_user_defined_pieces_of_tokenizer_model_are_matched_first(tmp_path: Path) -> None:
    runtime = pytest.importorskip("tests.formats.gguf.runtime", reason="llama-cpp-python is not installed")
    symbols = ["\n\n", "<table>", MARK * 2, MARK * 3]  # as Gemma has them
    model = llama_sentencepiece(ALL_TEXTS, user_defined_symbols=symbols, add_dummy_prefix=False)
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    out, _ = header_only(tmp_path, None, model, processor.vocab_size())
    texts = (*ALL_TEXTS, "a\n\n<table>   b", "\n\n\n    ")
    got = runtime.tokenize(out, texts)
    assert {text for text, ids in zip(texts, got, strict=True) if ids != processor.encode(text)} == set()


@pytest.mark.parametrize("algorithm", ["bpe", "unigram"])
def test_from_tokenizer_model_alone_llama_cpp_tokenises_texts_as_sentencepiece_does(
    tmp_path: Path, models: dict[str, tuple[bytes, dict[str, Any]]], algorithm: str
) -> None:
    runtime = pytest.importorskip("tests.formats.gguf.runtime", reason="llama-cpp-python is not installed")
    model, _ = models[algorithm]
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    out, vocab = header_only(tmp_path, None, model, processor.vocab_size() + 3)
    got = runtime.tokenize(out, ALL_TEXTS)
    assert {text for text, ids in zip(ALL_TEXTS, got, strict=True) if ids != processor.encode(text)} == set()
    assert [note[:34] for note in vocab.notes] == ["llama.cpp adds the BOS token befor"] * (algorithm == "bpe")


def test_a_checkpoint_with_such_a_tokenizer_runs_in_llama_cpp(
    tmp_path: Path, models: dict[str, tuple[bytes, dict[str, Any]]], write: Write
) -> None:
    runtime = pytest.importorskip("tests.formats.gguf.runtime", reason="llama-cpp-python is not installed")
    model, content = models["bpe"]
    tokenizer = with_spaces(content, BPE["llama-4"])
    rows = tokenizer.get_vocab_size() + 5  # padding
    base = checkpoint(tmp_path / "base", config(vocab_size=rows), json.loads(tokenizer.to_str()), settings={})
    (base / "tokenizer.model").write_bytes(model)
    out = write(base)
    assert not differing(out, tokenizer, ALL_TEXTS[:50])
    ids = tokenizer.encode("The keeper counts <lamp> the ships").ids
    assert np.isfinite(runtime.logits(out, ids)).all()
