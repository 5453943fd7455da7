"""The name of a GGUF, from which llama.cpp derives whether whitespace after tokens is dropped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from exporter.errors import NotExpressible
from exporter.formats.gguf import writer
from exporter.formats.gguf.in_llama_cpp.general_name import general_name
from exporter.formats.gguf.vocab.tokenizer import vocabulary
from exporter.sources.hf.checkpoint import auxiliary_files
from tests.formats.gguf.vocab.vocabularies import LLAMA, NAMES, PREPEND, folder, model_file, template, tokenizer_json

TEXTS = ["<|user|>\n Hello<|end|>\n<|assistant|>", "<s> a", "a <|end|>  b", "</s> a", "<|user|> <|end|>"]
PLAIN = {0: "<unk>", 1: "<s>", 280: "<|endoftext|>"}
STRIPPED = {2: "</s>", 281: "<|user|>", 282: "<|assistant|>", 283: "<|end|>"}


def entry(text: str, *, rstrip: bool, special: bool = True) -> dict[str, Any]:
    return {"content": text, "special": special, "normalized": False, "rstrip": rstrip, "lstrip": False} | {
        "single_word": False
    }


def phi3(path: Path, new: dict[int, str] | None = None, *, strips: bool = True) -> Path:
    """The tokenizer of Phi-3: whitespace after its tokens is dropped, but not after the tokens in ``PLAIN``."""
    tokens = {str(index): entry(text, rstrip=False) for index, text in PLAIN.items()}
    tokens |= {str(index): entry(text, rstrip=strips) for index, text in STRIPPED.items()}
    tokens |= {str(index): entry(text, rstrip=False) for index, text in (new or {}).items()}
    parts = tokenizer_json(tokens, normalizer=PREPEND, post_processor=template(None))
    model = parts["model"] | {"vocab": {text: i for i, (text, _) in enumerate([*LLAMA, *[("\u2581a", 1)]])}}
    return folder(
        path,
        model_file(LLAMA),
        {"model_type": "phi3"},
        tokenizer_config={**NAMES, "eos_token": "<|endoftext|>", "add_bos_token": False},
        tokenizer={**parts, "model": model},
    )


def written(source: Path, name: str, *, strips: bool = False) -> Path:
    vocab = vocabulary(auxiliary_files(source), {"model_type": "phi3"}, 300, where=source, strips=strips)
    keys = [writer.text("general.architecture", "phi3"), writer.text("general.name", name), *vocab.keys]
    (source / "out.gguf").write_bytes(writer.header(keys, [])[0])
    return source / "out.gguf"


@pytest.mark.parametrize("folder_name", ["my-model", "Phi-3-mini", "x"])
def test_the_name_of_phi_3_makes_llama_cpp_drop_the_whitespace(tmp_path: Path, folder_name: str) -> None:
    runtime = pytest.importorskip("tests.formats.gguf.runtime", reason="llama-cpp-python is not installed")
    source = phi3(tmp_path / folder_name)
    named = general_name(source, auxiliary_files(source))
    assert named.exact
    assert "phi-3" in named.text.lower()
    exact, plain = (runtime.tokenize(written(source, name), TEXTS) for name in (named.text, "other"))
    assert exact != plain
    stripped = ["<|user|>Hello<|end|><|assistant|>", "<s> a", "a <|end|>b", "</s>a", "<|user|><|end|>"]
    assert exact == runtime.tokenize(written(source, "other"), stripped)


def test_only_a_name_that_is_exact_hides_the_note_on_the_flag(tmp_path: Path) -> None:
    source = phi3(tmp_path / "base")
    notes = [
        vocabulary(auxiliary_files(source), {}, 300, where=source, strips=strips).notes for strips in (False, True)
    ]
    assert [any("flag rstrip" in note for note in lines) for lines in notes] == [True, False]


@pytest.mark.parametrize(
    ("folder_name", "expected"),
    [
        ("Phi-3-mini", "Phi_3-mini"),
        ("phi3", "phi_3"),
        ("Phi-3.5-moe", "Phi_3.5-moe"),
        ("my-Modern-BERT", "my-Modern_BERT"),
        ("phi-2", "phi-2"),
        ("llama", "llama"),
    ],
)
def test_the_name_of_another_model_holds_nothing_that_llama_cpp_misreads(
    tmp_path: Path, folder_name: str, expected: str
) -> None:
    source = phi3(tmp_path / folder_name, strips=False)
    named = general_name(source, auxiliary_files(source))
    assert (named.text, named.strips) == (expected, False)


def test_a_new_token_that_does_not_strip_is_refused(tmp_path: Path) -> None:
    base, tuned = phi3(tmp_path / "Phi-3"), phi3(tmp_path / "tuned", {284: "<tool>"})
    with pytest.raises(NotExpressible, match=r"the new token '<tool>' has no flag rstrip, unlike .*set rstrip to true"):
        general_name(base, auxiliary_files(tuned))
    assert "phi-3" in general_name(tuned, auxiliary_files(tuned)).text
    content = json.loads((tuned / "tokenizer.json").read_text())
    for token in content["added_tokens"]:
        token["rstrip"] |= token["content"] == "<tool>"
    (tuned / "tokenizer.json").write_text(json.dumps(content))
    assert general_name(base, auxiliary_files(tuned)).exact


def test_a_model_without_tokenizer_json_has_a_plain_name(tmp_path: Path) -> None:
    assert general_name(tmp_path / "phi3", {}).text == "phi_3"
