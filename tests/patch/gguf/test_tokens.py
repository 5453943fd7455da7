"""Renamed reserved tokens are patched as merged, and a patch refuses token texts with which llama.cpp aborts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AddedToken, AutoTokenizer

from exporter.cli.main import run
from fixtures import adapters, tiny
from fixtures.models.tokenizers import as_transformers, llama_sentencepiece
from fixtures.peft_adapters import perturb

Capture = pytest.CaptureFixture[str]
RESERVED = ("<|reserved_0|>", "<|reserved_1|>")


def succeed(*arguments: object) -> None:
    assert run([*map(str, arguments), "-q"]) == 0


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with two reserved tokens and six rows of padding, and the checkpoint's GGUF beside."""
    folder = tiny.build_llama(tmp_path_factory.mktemp("base") / "base", padding_rows=8)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([AddedToken(text, special=True, normalized=False) for text in RESERVED])
    tokenizer.save_pretrained(folder)
    succeed("export", folder, "--to", "gguf", "-o", folder.with_suffix(".gguf"))
    return folder


def changed(adapter: Path, change: Callable[[list[dict[str, Any]]], None]) -> Path:
    path = adapter / "tokenizer.json"
    content = json.loads(path.read_text())
    change(content["added_tokens"])
    path.write_text(json.dumps(content))
    settings = adapter / "tokenizer_config.json"
    kept = json.loads(settings.read_text())
    kept.pop("added_tokens_decoder", None)
    settings.write_text(json.dumps(kept))
    return adapter


def renamed(tokens: list[dict[str, Any]]) -> None:
    for token in tokens:
        if token["content"] == RESERVED[0]:
            token["content"] = "<tool>"


def test_a_reserved_token_with_a_trained_row_is_renamed_as_in_a_merge(base: Path, tmp_path: Path) -> None:
    adapter = changed(adapters.stock_rows(base, tmp_path / "adapter", (5, 512)), renamed)
    succeed("merge", adapter, "--to", "gguf", "-o", tmp_path / "want.gguf")
    succeed("patch", base.with_suffix(".gguf"), adapter, "-o", tmp_path / "got.gguf", "--verify", "weights")
    assert (tmp_path / "got.gguf").read_bytes() == (tmp_path / "want.gguf").read_bytes()


def test_an_onnx_folder_takes_the_renamed_token_as_in_a_merge(base: Path, tmp_path: Path) -> None:
    adapter = changed(adapters.stock_rows(base, tmp_path / "adapter", (5, 512)), renamed)
    options = ["--to", "onnx", "--verify", "off", "-o"]
    succeed("export", base, *options, tmp_path / "base")
    succeed("merge", adapter, *options, tmp_path / "want")
    succeed("patch", tmp_path / "base", adapter, "-o", tmp_path / "got")
    got, want = ({file.name: file.read_bytes() for file in (tmp_path / name).rglob("*.*")} for name in ("got", "want"))
    assert got == want


def test_different_tokens_of_embedding_and_head_are_patched_as_merged(tmp_path: Path) -> None:
    base, adapter = tiny.build_llama(tmp_path / "base", tied=False), tmp_path / "adapter"
    ids = {"embed_tokens": [5, 300], "lm_head": [7]}
    model = get_peft_model(adapters.load(base), LoraConfig(target_modules=["q_proj"], trainable_token_indices=ids))
    perturb(model, 0)
    model.save_pretrained(str(adapter))
    weights = load_file(adapter / "adapter_model.safetensors")
    rows = {name: value for name, value in weights.items() if "lora_" not in name}
    save_file(rows, adapter / "adapter_model.safetensors", {"format": "pt"})
    for verb, source, out in (("export", base, "base"), ("merge", adapter, "want")):
        succeed(verb, source, "--to", "gguf", "-o", tmp_path / f"{out}.gguf")
    succeed("patch", tmp_path / "base.gguf", adapter, "-o", tmp_path / "got.gguf", "--verify", "weights")
    assert (tmp_path / "got.gguf").read_bytes() == (tmp_path / "want.gguf").read_bytes()


def test_a_reserved_token_without_a_trained_row_is_not_renamed(base: Path, tmp_path: Path, capsys: Capture) -> None:
    adapter = changed(adapters.stock_rows(base, tmp_path / "adapter", (5, 513)), renamed)
    assert run(["patch", str(base.with_suffix(".gguf")), str(adapter), "-o", str(tmp_path / "x.gguf")]) == 4
    assert "token 512: expected the text '<|reserved_0|>'" in capsys.readouterr().err


def refused_as_in_a_merge(base: Path, adapter: Path, tmp_path: Path, capsys: Capture) -> str:
    """Return the message of the patch."""
    assert run(["merge", str(adapter), "--to", "gguf", "-o", str(tmp_path / "want.gguf")]) == 5
    assert "llama.cpp needs unique, non-empty tokens" in capsys.readouterr().err
    assert run(["patch", str(base.with_suffix(".gguf")), str(adapter), "-o", str(tmp_path / "x.gguf")]) == 5
    assert not (tmp_path / "x.gguf").exists()
    message = capsys.readouterr().err
    assert "llama.cpp needs unique, non-empty tokens" in message
    return message


def test_the_text_of_a_row_of_padding(base: Path, tmp_path: Path, capsys: Capture) -> None:
    adapter = adapters.stock_rows_new_tokens(base, tmp_path / "adapter", ("[PAD517]",))
    message = refused_as_in_a_merge(base, adapter, tmp_path, capsys)
    assert "token 514" in message
    assert "'[PAD517]', which is also the text of token 517" in message


def test_the_text_of_another_reserved_token(base: Path, tmp_path: Path, capsys: Capture) -> None:
    def same(tokens: list[dict[str, Any]]) -> None:
        for token in tokens:
            if token["content"] == RESERVED[0]:
                token["content"] = RESERVED[1]

    adapter = changed(adapters.stock_rows(base, tmp_path / "adapter", (512,)), same)
    refused_as_in_a_merge(base, adapter, tmp_path, capsys)


def test_two_new_tokens_that_differ_only_in_how_a_space_is_written(tmp_path: Path, capsys: Capture) -> None:
    base = tiny.build_llama(tmp_path / "base", padding_rows=500)
    content = as_transformers(tmp_path / "tokenizer", llama_sentencepiece(), "LlamaTokenizer")
    (base / "tokenizer.json").write_text(json.dumps(content))
    (base / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    succeed("export", base, "--to", "gguf", "-o", base.with_suffix(".gguf"))
    first = max(content["model"]["vocab"].values()) + 1
    adapter = adapters.stock_rows(base, tmp_path / "adapter", (first, first + 1))

    def added(tokens: list[dict[str, Any]]) -> None:
        flags = dict.fromkeys(("special", "normalized", "lstrip", "rstrip", "single_word"), False)
        texts = ("two words", "two\u2581words")
        tokens += [{"id": first + number, "content": text, **flags} for number, text in enumerate(texts)]

    refused_as_in_a_merge(base, changed(adapter, added), tmp_path, capsys)
