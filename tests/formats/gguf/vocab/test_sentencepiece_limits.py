"""Features of SentencePiece tokenizers that llama.cpp does not support are refused in one line, or noted."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer

from exporter.errors import BadInput, NotExpressible, UnreadableFile, UsageError
from exporter.formats.gguf import writer
from exporter.formats.gguf.vocab.tokenizer import Vocabulary, vocabulary
from fixtures.models.tokenizers import model_proto
from tests.formats.gguf.vocab.vocabularies import BYTES, LLAMA, PREPEND, REPLACE, model_file

MARK = "\u2581"
WORDS = (MARK + "t", "he", MARK + "the", "er", *f"{MARK}ehrt")


def tokenizer_json(**model: Any) -> dict[str, Any]:
    """A whole BPE tokenizer without tokenizer.model: 3 special tokens, 256 bytes, 4 words with merges, 5 characters."""
    tokens = [text for text, _ in LLAMA] + list(WORDS)
    merges = [[MARK, "t"], ["h", "e"], [MARK + "t", "he"], ["e", "r"]]
    defaults = {
        "type": "BPE",
        "byte_fallback": True,
        "fuse_unk": True,
        "unk_token": "<unk>",
        "vocab": {text: index for index, text in enumerate(tokens)},
        "merges": merges,
    }
    return {"added_tokens": [], "normalizer": PREPEND, "pre_tokenizer": None, "model": {**defaults, **model}}


ROWS = len(LLAMA) + len(WORDS)


def unigram_json(**model: Any) -> dict[str, Any]:
    metaspace = {"type": "Metaspace", "replacement": MARK, "prepend_scheme": "always", "split": True}
    defaults = {"type": "Unigram", "unk_id": 0, "vocab": [["<unk>", 0.0], [MARK, -1.0], ["a", -2.0]]}
    return {"added_tokens": [], "normalizer": None, "pre_tokenizer": metaspace, "model": {**defaults, **model}}


def vocabulary_of(
    folder: Path, content: Mapping[str, Any] | None, model: bytes | None = None, rows: int = ROWS
) -> Vocabulary:
    files = {}
    if content is not None:
        files["tokenizer.json"] = folder / "tokenizer.json"
        files["tokenizer.json"].write_text(json.dumps(content), encoding="utf-8")
    if model is not None:
        files["tokenizer.model"] = folder / "tokenizer.model"
        files["tokenizer.model"].write_bytes(model)
    return vocabulary(files, {}, rows, where=folder)


def changed(**settings: Any) -> bytes:
    """A tokenizer.model with settings of its trainer or normalizer changed."""
    proto = model_proto(model_file(LLAMA))
    for name, value in settings.items():
        setattr(proto.trainer_spec if hasattr(proto.trainer_spec, name) else proto.normalizer_spec, name, value)
    data: bytes = proto.SerializeToString()
    return data


CLASSES = {"type": "Split", "pattern": {"Regex": "\\d"}, "behavior": "Isolated", "invert": False}
METASPACE_SPLIT = {"type": "Metaspace", "replacement": MARK, "prepend_scheme": "always", "split": True}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ({**tokenizer_json(), "normalizer": {"type": "Lowercase"}}, '{"type": "Lowercase"}'),
        ({**tokenizer_json(), "pre_tokenizer": CLASSES}, '"Regex": "\\\\d"'),
        ({**tokenizer_json(), "normalizer": None, "pre_tokenizer": METASPACE_SPLIT}, '"split": true'),
        ({**tokenizer_json(), "normalizer": {"type": "Precompiled", "precompiled_charsmap": "*"}}, "Precompiled"),
        (tokenizer_json(ignore_merges=True), "ignore_merges"),
        (
            tokenizer_json(vocab={"<unk>": 0, "<0x00>": 1}, merges=[]),
            "lacks 255 of the 256 byte pieces, such as <0x01>",
        ),
        (unigram_json(unk_id=None), "requires a piece for unknown tokens, but the unigram model has unk_id None"),
        (unigram_json(byte_fallback=True, vocab=[["<unk>", 0], ["<0x0A>", -1]]), "has byte fallback"),
        ({**unigram_json(), "normalizer": {"type": "NFKC"}}, '{"type": "NFKC"}'),
        ({**unigram_json(), "pre_tokenizer": {"type": "Whitespace"}}, '{"type": "Whitespace"}'),
    ],
)
def test_an_unsupported_tokenizer_is_refused(tmp_path: Path, content: dict[str, Any], reason: str) -> None:
    with pytest.raises(NotExpressible, match=re.escape(reason)) as caught:
        vocabulary_of(tmp_path, content)
    assert "tokenizer.json" in str(caught.value)
    assert "--to hf" in str(caught.value)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (changed(model_type=4), "of the types word and char are not supported"),
        (changed(treat_whitespace_as_suffix=True), "treat_whitespace_as_suffix"),
        (changed(model_type=1), "has byte fallback"),
        (model_file(LLAMA[:-1]), "lacks 1 of the 256 byte pieces, such as <0xFF>"),
    ],
)
def test_a_model_file_that_llama_cpp_cannot_run_is_refused(tmp_path: Path, model: bytes, reason: str) -> None:
    with pytest.raises(NotExpressible, match=reason):
        vocabulary_of(tmp_path, None, model, 300)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (tokenizer_json(vocab=[]), "model.vocab: expected an object"),
        (tokenizer_json(vocab={"a": 1 << 40}), "expected token ids without large gaps"),
        (tokenizer_json(merges=["a b", "a b c"]), "model.merges: expected pairs of tokens, found 'a b c'"),
        (tokenizer_json(merges=[["a"]]), "model.merges: "),
        (unigram_json(vocab={"a": 0}), "expected a list of pieces with scores"),
        (unigram_json(vocab=[["a"]]), "expected a pair of a piece and a score"),
        (unigram_json(vocab=[["a", "b"]]), "'a': expected a score, found 'b'"),
        ({**tokenizer_json(), "added_tokens": [{"id": 1}]}, "expected a token with id and content"),
    ],
)
def test_a_broken_tokenizer_is_bad_input(tmp_path: Path, content: dict[str, Any], reason: str) -> None:
    with pytest.raises(UnreadableFile, match=r"tokenizer\.json: .*" + reason):
        vocabulary_of(tmp_path, content)


def test_naming_a_pre_tokenizer_of_a_sentencepiece_tokenizer_is_a_usage_error(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(model_file(LLAMA))
    with pytest.raises(UsageError, match="--pre-tokenizer needs a byte-level BPE"):
        vocabulary({path.name: path}, {}, 300, where=tmp_path, pre_tokenizer="llama-bpe")


def test_tokens_beyond_the_matrix_are_bad_input(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"tokenizer\.model: expected token ids below 279 .*, found 279"):
        vocabulary_of(tmp_path, None, model_file(LLAMA), 279)


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"remove_extra_whitespaces": True}, "llama.cpp keeps runs of spaces"),
        ({"precompiled_charsmap": b"1"}, "this tokenizer normalises characters"),
    ],
)
def test_normalisation_of_a_bpe_model_is_noted(tmp_path: Path, settings: dict[str, Any], word: str) -> None:
    notes = vocabulary_of(tmp_path, None, changed(**settings), 300).notes
    assert [note.startswith(word) for note in notes] == [True, False]  # the second note is about the BOS token


def test_pieces_that_llama_cpp_joins_without_a_merge_are_noted(tmp_path: Path) -> None:
    content = tokenizer_json()
    assert not vocabulary_of(tmp_path, content).notes
    content["model"]["vocab"]["the"] = ROWS
    content["model"]["merges"].append(["t", "he"])
    (note,) = vocabulary_of(tmp_path, content, rows=ROWS + 1).notes
    assert note == f"llama.cpp joins '{MARK}' and 'the' into a token, but this tokenizer has no merge for the pair"


#: (flags of <lamp>, part of the note, text → whether llama.cpp tokenises it as tokenizers does).
FLAGS: list[tuple[dict[str, bool], str, dict[str, bool]]] = [
    ({}, "", {"the <lamp> the": True, "the<lamp>the": True, "<lamp><lamp>": True}),
    # The token consumes the spaces beside it; llama.cpp keeps them as text.
    ({"lstrip": True}, "lstrip", {"the <lamp>the": False, "the<lamp> the": True, "<lamp><lamp>": True}),
    ({"rstrip": True}, "rstrip", {"the <lamp>the": True, "the<lamp> the": False, "<lamp><lamp>": True}),
    # Only between words; llama.cpp finds it everywhere.
    ({"single_word": True}, "single_word", {"the <lamp> the": True, "the<lamp>the": False}),
    # The normalizer also adds its mark before the token, so tokenizers finds it only after a space, and consumes that.
    ({"normalized": True}, "transformers matches", {"<lamp>": True, "the <lamp>": False, "the<lamp>": False}),
]


@pytest.mark.parametrize(("flags", "note", "texts"), FLAGS, ids=lambda value: "-".join(value) if value else "none")
def test_an_added_tokens_flags_are_kept_or_noted(
    tmp_path: Path, flags: dict[str, bool], note: str, texts: dict[str, bool]
) -> None:
    runtime = pytest.importorskip("tests.formats.gguf.runtime", reason="llama-cpp-python is not installed")
    tokenizer = Tokenizer.from_str(json.dumps({"version": "1.0", **tokenizer_json()}))
    tokenizer.add_tokens([AddedToken("<lamp>", **{"normalized": False, **flags})])
    vocab = vocabulary_of(tmp_path, json.loads(tokenizer.to_str()), rows=ROWS + 1)
    out = tmp_path / "out.gguf"
    out.write_bytes(writer.header([writer.text("general.architecture", "llama"), *vocab.keys], [])[0])
    got = runtime.tokenize(out, list(texts))
    same = {text: tokenizer.encode(text).ids == ids for text, ids in zip(texts, got, strict=True)}
    assert same == texts
    assert [note in line for line in vocab.notes] == ([True] if note else [])


def test_older_gemmas_tab_instead_of_its_byte_piece_is_accepted(tmp_path: Path) -> None:
    runtime = pytest.importorskip("tests.formats.gguf.runtime", reason="llama-cpp-python is not installed")
    content = copy.deepcopy(tokenizer_json())
    content["normalizer"] = REPLACE
    vocab = content["model"]["vocab"]
    vocab["\t"] = vocab.pop("<0x09>")
    metadata = vocabulary_of(tmp_path, content)
    out = tmp_path / "out.gguf"
    out.write_bytes(writer.header([writer.text("general.architecture", "llama"), *metadata.keys], [])[0])
    assert runtime.tokenize(out, ["\t\n"]) == [[vocab["\t"], 3 + [text for text, _ in BYTES].index("<0x0A>")]]
