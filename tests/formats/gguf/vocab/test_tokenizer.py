"""Tokenizers in the header, with which llama.cpp tokenises texts as transformers does."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer

from exporter.errors import BadInput, NotExpressible, UnreadableFile
from exporter.formats.gguf import plan_gguf, write_gguf
from exporter.formats.gguf.vocab.pre_tokenizers import recognise
from exporter.sources.gguf.file import GgufFile
from exporter.sources.gguf.header import GgufArray
from tests.formats.gguf import models
from tests.formats.gguf.conftest import Write, merged
from tests.formats.gguf.models import GPT2, LLAMA3, QWEN2, SMOLLM, checkpoint, config, sequence, split, tokenizer_json
from tests.formats.gguf.vocab.texts import ADDED, COMBINING, TEXTS

NFC = {"type": "NFC"}
STRUCTURES = {"smollm": SMOLLM, "gpt-2": GPT2, "qwen2": QWEN2, "llama-bpe": LLAMA3}


def with_added(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.add_tokens([AddedToken(text, normalized=True) for text in ADDED])
    return tokenizer


def model_of(folder: Path, tokenizer: Tokenizer) -> Path:
    """A checkpoint with this tokenizer, four numbers wide: only its vocabulary is used."""
    size = tokenizer.get_vocab_size()
    return checkpoint(
        folder,
        config(hidden_size=4, intermediate_size=4, num_attention_heads=1, num_key_value_heads=1, vocab_size=size),
        json.loads(tokenizer.to_str()),
    )


def differences(path: Path, tokenizer: Tokenizer, texts: tuple[str, ...]) -> dict[str, tuple[list[int], list[int]]]:
    runtime = pytest.importorskip("tests.formats.gguf.runtime", reason="llama-cpp-python is not installed")
    want = [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
    got = runtime.tokenize(path, texts)
    return {text: (a, b) for text, a, b in zip(texts, want, got, strict=True) if a != b}


@pytest.mark.parametrize("name", STRUCTURES)
def test_llama_cpp_tokenises_as_transformers_does(name: str, tiny_tied: Path, tmp_path: Path, write: Write) -> None:
    content = json.loads((tiny_tied / "tokenizer.json").read_text())
    content["pre_tokenizer"] = STRUCTURES[name]
    content["model"]["ignore_merges"] = name == "llama-bpe"
    tokenizer = with_added(Tokenizer.from_str(json.dumps(content)))
    out = write(model_of(tmp_path / "model", tokenizer))
    assert GgufFile.open(out).metadata["tokenizer.ggml.pre"] == name
    assert not differences(out, tokenizer, (*TEXTS, *COMBINING))


@pytest.mark.smollm2
def test_llama_cpp_tokenises_as_smollm2s_tokenizer_does(smollm2: Path, tmp_path: Path, write: Write) -> None:
    tokenizer = with_added(Tokenizer.from_file(str(smollm2 / "tokenizer.json")))
    assert not differences(write(model_of(tmp_path / "model", tokenizer)), tokenizer, (*TEXTS, *COMBINING))


def test_a_wrong_name_shows_in_the_tokens(tiny_tied: Path, tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_file(str(tiny_tied / "tokenizer.json"))
    layout = plan_gguf(merged(model_of(tmp_path / "model", tokenizer)), pre_tokenizer="qwen2")
    write_gguf(layout, tmp_path / "out.gguf")
    assert differences(tmp_path / "out.gguf", tokenizer, TEXTS)
    assert layout.notes == [
        "--pre-tokenizer qwen2: the option contradicts tokenizer.json, which has the pre-tokenizer smollm"
    ]


def test_an_unknown_name_is_noted(tmp_path: Path) -> None:
    unknown = tokenizer_json({"type": "Whitespace"})
    for name, notes in (("nonsense", 1), ("llama-bpe", 0)):
        layout = plan_gguf(merged(checkpoint(tmp_path / name, config(), unknown)), pre_tokenizer=name)
        unknown_name = f"--pre-tokenizer {name}: ttexport does not know this pre-tokenizer"
        assert len([note for note in layout.notes if note.startswith(unknown_name)]) == notes


def test_composition_is_the_one_difference_of_an_nfc_normalizer(tiny_tied: Path, tmp_path: Path, write: Write) -> None:
    content = json.loads((tiny_tied / "tokenizer.json").read_text())
    content["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "Sequence", "normalizers": []}, NFC]}
    content["pre_tokenizer"] = QWEN2
    tokenizer = with_added(Tokenizer.from_str(json.dumps(content)))
    model = model_of(tmp_path / "model", tokenizer)
    assert any("NFC" in note for note in plan_gguf(merged(model)).notes)
    assert not differences(write(model), tokenizer, TEXTS)
    assert differences(write(model), tokenizer, COMBINING)


@pytest.mark.parametrize(
    "no_op",
    [
        {"type": "Sequence", "normalizers": []},
        {"type": "Strip", "strip_left": False, "strip_right": False},
        {"type": "Replace", "pattern": {"String": " "}, "content": " "},
    ],
    ids=lambda step: str(step["type"]),
)
def test_a_normalizer_that_changes_no_text_is_no_obstacle(
    tiny_tied: Path, tmp_path: Path, write: Write, no_op: dict[str, Any]
) -> None:
    content = json.loads((tiny_tied / "tokenizer.json").read_text()) | {"normalizer": no_op}
    tokenizer = with_added(Tokenizer.from_str(json.dumps(content)))
    model = model_of(tmp_path / "model", tokenizer)
    assert plan_gguf(merged(model)).notes == []
    assert not differences(write(model), tokenizer, (*TEXTS, *COMBINING))


def test_a_text_begins_with_bos_where_the_template_says_so(tiny_tied: Path, tmp_path: Path, write: Write) -> None:
    runtime = pytest.importorskip("tests.formats.gguf.runtime", reason="llama-cpp-python is not installed")
    out = write(models.llama3(tmp_path / "model"))
    tokenizer = Tokenizer.from_file(str(tmp_path / "model" / "tokenizer.json"))
    assert runtime.tokenize(out, ["the thing"], add_special=True) == [tokenizer.encode("the thing").ids]
    assert tokenizer.encode("the thing").ids[0] == 1


def test_added_tokens_do_not_hide_the_pre_tokenizer(tmp_path: Path) -> None:
    for count in (0, 1, 50):
        content = tokenizer_json(SMOLLM, tuple(f"<new_{index}>" for index in range(count)))
        assert recognise(content, "llama", "tokenizer.json") == "smollm"


@pytest.mark.parametrize(("model_type", "name"), [("llama", "smollm"), ("cohere", "command-r"), (None, "smollm")])
def test_the_model_type_decides_between_names_of_one_structure(model_type: str | None, name: str) -> None:
    assert recognise(tokenizer_json(SMOLLM), model_type, "tokenizer.json") == name


@pytest.mark.parametrize(
    "structure",
    [
        {"type": "Whitespace"},
        {**GPT2, "add_prefix_space": True},
        sequence({"type": "Digits", "individual_digits": False}, GPT2),
        sequence(split(r"\p{N}{1,2}"), models.BYTES_ONLY),
        sequence({**split(models.LLAMA3_EXPRESSION), "invert": True}, models.BYTES_ONLY),
        sequence({**split(models.LLAMA3_EXPRESSION), "behavior": "Removed"}, models.BYTES_ONLY),
    ],
    ids=["whitespace", "prefix-space", "grouped-digits", "other-expression", "inverted", "removed"],
)
def test_unknown_pre_tokenizer_is_printed_with_the_option_to_name_it(
    tmp_path: Path, structure: Mapping[str, Any]
) -> None:
    base = checkpoint(tmp_path / "base", config(), tokenizer_json(structure))
    with pytest.raises(NotExpressible, match="--pre-tokenizer NAME") as caught:
        plan_gguf(merged(base))
    assert json.dumps(structure) in str(caught.value)
    assert plan_gguf(merged(base), pre_tokenizer="gpt-2").nbytes > 0


@pytest.mark.parametrize(
    "changes",
    [
        {"model": {"type": "WordPiece"}},
        {"model": {"type": "WordLevel"}},
        {"model": {"byte_fallback": True}},
        {"model": {"end_of_word_suffix": "</w>"}},
        {"normalizer": {"type": "Lowercase"}},
        {"normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "NFKC"}]}},
    ],
    ids=["wordpiece", "wordlevel", "byte-fallback", "suffix", "lowercase", "nfkc"],
)
def test_other_kinds_of_tokenizers_are_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    base = checkpoint(tmp_path / "base", config(), tokenizer_json(SMOLLM, **copy.deepcopy(changes)))
    with pytest.raises(NotExpressible, match=r"tokenizer\.json"):
        plan_gguf(merged(base))


def test_absent_tokenizer_is_bad_input(tmp_path: Path) -> None:
    base = checkpoint(tmp_path / "base", config(), tokenizer_json(SMOLLM))
    (base / "tokenizer.json").unlink()
    with pytest.raises(UnreadableFile, match=r"tokenizer\.json"):
        plan_gguf(merged(base))


def test_duplicate_tokens_are_refused_as_llama_cpp_would_abort_on_them(tmp_path: Path) -> None:
    content = tokenizer_json(SMOLLM, ("[PAD270]",))
    base = checkpoint(tmp_path / "base", config(vocab_size=272), content)
    with pytest.raises(NotExpressible, match=r"\[PAD270\]' 2 times"):
        plan_gguf(merged(base))


def test_special_id_outside_the_vocabulary_is_bad_input(tmp_path: Path) -> None:
    settings = {**models.SETTINGS, "pad_token": None}
    base = checkpoint(tmp_path / "base", config(pad_token_id=5000), tokenizer_json(SMOLLM), settings=settings)
    with pytest.raises(BadInput, match="pad_token_id: expected an id below 269, found 5000"):
        plan_gguf(merged(base))


def test_flags_that_a_gguf_cannot_represent_are_noted(tmp_path: Path) -> None:
    content = tokenizer_json(SMOLLM)
    content["added_tokens"][3]["lstrip"] = True
    notes = plan_gguf(merged(checkpoint(tmp_path / "base", config(), content))).notes
    assert notes == ["added token '<|pad|>': a GGUF has no metadata key for the flag lstrip"]


def test_older_merges_and_spaces_inside_them_become_the_same_strings(tmp_path: Path, write: Write) -> None:
    content = tokenizer_json(SMOLLM)
    content["model"]["merges"] = [" ".join(pair) for pair in content["model"]["merges"]]
    old = GgufFile.open(write(checkpoint(tmp_path / "old", config(), content)))
    content["model"]["merges"] = [
        [part.replace("Ġ", " ") for part in pair.split(" ")] for pair in content["model"]["merges"]
    ]
    spaced = GgufFile.open(write(checkpoint(tmp_path / "spaced", config(), content)))
    arrays: list[GgufArray] = [file.metadata["tokenizer.ggml.merges"] for file in (old, spaced)]
    assert arrays[0].values() == arrays[1].values()
    assert arrays[0].values()[0] == "Ġ t"
