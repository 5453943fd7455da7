"""Tokens named outside tokenizer.json, and vocabularies in older files, as transformers and llama.cpp read them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from exporter.errors import NotExpressible, UnreadableFile
from exporter.sources.gguf.file import GgufFile
from exporter.sources.gguf.header import GgufArray
from exporter.sources.gguf.split_files import GgufModel
from exporter.verify.expect.reference import Reference
from exporter.verify.gguf.special_tokens import check_specials
from exporter.verify.gguf.vocabulary import check_tokens
from exporter.verify.report import Check
from exporter.verify.running.prompts import build_sequences
from tests.formats.gguf.models import SETTINGS, SMOLLM, checkpoint, config, tokenizer_json
from tests.formats.gguf.vocab.surroundings import disagreements, surrounded, write_files, write_vocabulary

SPECIAL = {"__type": "AddedToken", "normalized": False, "lstrip": False, "rstrip": False, "single_word": False}
DECODER = {"0": {"content": "<|endoftext|>", "special": True}, "1": {"content": "<|im_start|>", "special": True}}

#: name → (settings, files, added tokens of tokenizer.json, texts with their ids)
OUTSIDE: dict[str, tuple[dict[str, Any], dict[str, Any], tuple[str, ...], dict[str, int]]] = {
    "additional": ({"additional_special_tokens": ["<new>", "<b>"]}, {}, (), {"<new>": 269, "<b>": 270}),
    "extra-list": (
        {"extra_special_tokens": ["<new>", {**SPECIAL, "content": "[c]"}]},
        {},
        ("<lamp>",),
        {"<lamp>": 269, "<new>": 270, "[c]": 271},
    ),
    "extra-dict": ({"extra_special_tokens": {"image_token": "<new>"}}, {}, (), {"<new>": 269}),
    "model-token": ({"image_token": "<new>"}, {}, ("<lamp>",), {"<new>": 270}),
    "pad-by-hand": ({"pad_token": "<new>"}, {}, (), {"<new>": 269}),
    "pad-is-a-word": ({"pad_token": "he"}, {}, (), {"he": 261}),
    "map": (
        {},
        {"special_tokens_map": {"additional_special_tokens": ["<new>"], "bos_token": "<|pad|>"}},
        (),
        {"<new>": 269},
    ),
    "map-of-objects": (
        {},
        {"special_tokens_map": {"pad_token": {"content": "<new>", "normalized": True, "lstrip": False}}},
        (),
        {"<new>": 269},
    ),
    "decoder": (
        {"added_tokens_decoder": {"300": {"content": "<new>", "special": False}, "299": {"content": "<b>"}}},
        {},
        (),
        {"<b>": 269, "<new>": 270},
    ),
    "added-tokens-file": ({}, {"added_tokens": {"<new>": 269, "he": 261}}, (), {"<new>": 269, "he": 261}),
    "added-tokens-file-and-named": (
        {"additional_special_tokens": ["<new>"]},
        {"added_tokens": {"<new>": 269}},
        (),
        {"<new>": 269},
    ),
    "stale-decoder": (
        {"added_tokens_decoder": {**DECODER, "269": {"content": "<lamp>", "special": True}}},
        {"special_tokens_map": {"pad_token": "<old>"}, "added_tokens": {"<older>": 269, "<lamp>": 2}},
        ("<ship>", "<lamp>"),
        {"<ship>": 269, "<lamp>": 270},
    ),
    "stale-added-tokens-file": (
        {},
        {"added_tokens": {"<old>": 269, "<lamp>": 2}},
        ("<ship>", "<lamp>"),
        {"<ship>": 269, "<lamp>": 270},
    ),
}


def model(folder: Path, case: str) -> Path:
    settings, files, added, _ = OUTSIDE[case]
    content = tokenizer_json(SMOLLM, added)
    base = checkpoint(folder, config(vocab_size=276), content, settings={**SETTINGS, **settings})
    return write_files(base, **files)


def failures(folder: Path, reference: Reference) -> list[tuple[str, str]]:
    """(name, detail) of each check that a GGUF of the tokenizer in ``folder`` fails."""
    gguf = GgufModel.open(write_vocabulary(folder)[0])
    checks = [*check_tokens(gguf, reference), *check_specials(gguf, reference)]
    return [(check.name, check.detail) for check in checks if isinstance(check, Check) and not check.passed]


@pytest.mark.parametrize("case", OUTSIDE)
def test_a_token_named_outside_tokenizer_json_has_the_id_that_transformers_gives(tmp_path: Path, case: str) -> None:
    base = model(tmp_path / "base", case)
    ids = OUTSIDE[case][3]
    out, written = write_vocabulary(base)
    tokens = GgufFile.open(out).metadata["tokenizer.ggml.tokens"]
    assert isinstance(tokens, GgufArray)
    texts = tokens.values()
    assert {text: texts.index(text) for text in ids} == ids
    assert texts.count("<old>") + texts.count("<older>") == 0
    assert not disagreements(out, base, [*ids, "<|im_end|>"])
    assert written.notes == []


@pytest.mark.parametrize("case", OUTSIDE)
def test_the_checker_accepts_the_token_and_refuses_a_file_without_it(tmp_path: Path, case: str) -> None:
    base = model(tmp_path / "base", case)
    reference = Reference.open(base, [])
    assert failures(base, reference) == []
    if "he" not in OUTSIDE[case][3]:
        plain = checkpoint(tmp_path / "plain", config(vocab_size=276), tokenizer_json(SMOLLM))
        assert "tokens" in [name for name, _ in failures(plain, reference)]


def test_a_token_without_an_embedding_row_is_noted_and_left_out(tmp_path: Path) -> None:
    settings = {**SETTINGS, "pad_token": "<new>", "additional_special_tokens": ["<b>"]}
    base = checkpoint(tmp_path / "base", config(vocab_size=270), tokenizer_json(SMOLLM), settings=settings)
    out, written = write_vocabulary(base)
    reason = "transformers gives the token the id 270, but the model has only 270 embedding rows"
    assert written.notes == [f"added token '<b>': {reason}, so the GGUF lacks the token"]
    assert failures(base, Reference.open(base, [])) == []
    assert not disagreements(out, base, ["<new>"])


def test_a_setting_for_an_end_token_does_not_count_beside_tokenizer_json(tmp_path: Path) -> None:
    settings = {**SETTINGS, "add_eos_token": True}
    base = checkpoint(tmp_path / "base", config(), tokenizer_json(SMOLLM), settings=settings)
    out, written = write_vocabulary(base)
    assert not disagreements(out, base, ["<|im_end|>"])  # transformers adds no end token either
    assert [note[:47] for note in written.notes] == ["tokenizer_config.json sets add_eos_token, but t"]
    assert failures(base, Reference.open(base, [])) == []


@pytest.mark.parametrize("flag", [None, "add_bos_token", "add_eos_token"])
@pytest.mark.parametrize("name", ["GPT2Tokenizer", "Qwen2TokenizerFast", "GPTNeoXTokenizer"])
def test_a_vocabulary_in_two_files_is_read_as_transformers_reads_it(
    tmp_path: Path, name: str, flag: str | None
) -> None:
    settings = {**SETTINGS, "tokenizer_class": name, "pad_token": "<pad>", **({flag: True} if flag else {})}
    base = checkpoint(tmp_path / "base", config(vocab_size=276), tokenizer_json(SMOLLM), settings=settings)
    two_files(base, added_tokens={"<lamp>": 269, "<ship>": 270})
    out, written = write_vocabulary(base)
    assert not disagreements(out, base, ["<lamp>", "<ship>", "<pad>", "<|im_end|>"])
    assert [note for note in written.notes if "NFC" not in note] == []
    reference = Reference.open(base, [])
    assert failures(base, reference) == []
    (base / "merges.txt").write_text("h e\n")
    assert [name for name, _ in failures(base, reference)] == ["merges"]


def test_a_vocabulary_in_two_files_of_an_unknown_class_is_refused_with_a_remedy(tmp_path: Path) -> None:
    settings = {**SETTINGS, "tokenizer_class": "BlenderbotTokenizer"}
    base = two_files(checkpoint(tmp_path / "base", config(), tokenizer_json(SMOLLM), settings=settings))
    with pytest.raises(NotExpressible, match=r"found BlenderbotTokenizer.*AutoTokenizer") as caught:
        write_vocabulary(base)
    assert str(base / "vocab.json") in str(caught.value)


def test_a_broken_list_of_merges_is_refused_with_its_line(tmp_path: Path) -> None:
    base = two_files(checkpoint(tmp_path / "base", config(model_type="qwen2"), tokenizer_json(SMOLLM)))
    (base / "merges.txt").write_text("#version: 0.2\nh e\nx\n")
    with pytest.raises(UnreadableFile, match=r"merges\.txt: line 3: expected two tokens"):
        write_vocabulary(base)


TEXTS = ("naïve", "straße", "<süß>", "灯", "fog\u2581bank", "Ġx", " the", "<|é|>")


def test_added_tokens_with_letters_that_are_symbols_of_bytes_are_tokenised_alike(tmp_path: Path) -> None:
    base = checkpoint(tmp_path / "base", config(vocab_size=280), tokenizer_json(SMOLLM, TEXTS))
    out, written = write_vocabulary(base)
    assert not disagreements(out, base, TEXTS)
    assert written.notes == []
    assert failures(base, Reference.open(base, [])) == []


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("text", ["ä", "Ġthe"])
def test_an_added_token_that_is_also_the_symbol_of_bytes_is_refused(tmp_path: Path, text: str, special: bool) -> None:
    content = tokenizer_json(SMOLLM)
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": special}
    content["added_tokens"].append({"id": content["model"]["vocab"][text], "content": text, **flags})
    base = checkpoint(tmp_path / "base", config(), content)
    with pytest.raises(NotExpressible, match=f"the added token '{text}' has the same id as the byte-level symbols"):
        write_vocabulary(base)


def test_two_added_tokens_with_one_text_in_a_gguf_are_refused(tmp_path: Path) -> None:
    content = tokenizer_json(SMOLLM, ("<lamp>", "<ship>"))
    content["added_tokens"][-1]["content"] = "<lamp>"
    with pytest.raises(NotExpressible, match="unique, non-empty tokens, found '<lamp>' 2 times"):
        write_vocabulary(checkpoint(tmp_path / "base", config(vocab_size=271), content))


def two_files(base: Path, **files: Any) -> Path:
    """Replace tokenizer.json by vocab.json and merges.txt, as older tokenizers are saved."""
    model = json.loads((base / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    (base / "tokenizer.json").unlink()
    merges = "#version: 0.2\n" + "".join(f"{left} {right}\n" for left, right in model["merges"])
    (base / "merges.txt").write_text(merges, encoding="utf-8")
    return write_files(base, vocab=model["vocab"], **files)


def test_the_checker_encodes_prompts_with_a_vocabulary_in_two_files(tmp_path: Path) -> None:
    settings = {**SETTINGS, "tokenizer_class": "GPT2Tokenizer"}
    base = checkpoint(tmp_path / "base", config(vocab_size=276), tokenizer_json(SMOLLM), settings=settings)
    two_files(base, added_tokens={"<lamp>": 269, "naïve": 270})
    prompts = surrounded(["<lamp>", "naïve", "<|im_end|>"])
    sequences = build_sequences(Reference.open(base, []), prompts)
    assert sequences.texts[-len(prompts) :] == prompts
    assert sequences.text_ids == AutoTokenizer.from_pretrained(base)(sequences.texts)["input_ids"]
