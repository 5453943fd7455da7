"""Special ids, flags and templates: their sources, and their effect in llama.cpp."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from exporter.errors import BadInput
from exporter.formats.gguf import writer
from exporter.formats.gguf.vocab.tokenizer import vocabulary
from exporter.sources.gguf.file import GgufFile
from exporter.sources.gguf.header import GgufArray
from exporter.sources.hf.checkpoint import auxiliary_files
from tests.formats.gguf.models import LLAMA3, SMOLLM, config, tokenizer_json
from tests.formats.gguf.vocab.vocabularies import LLAMA, PREPEND, folder, gemma, llama2, model_file
from tests.formats.gguf.vocab.vocabularies import tokenizer_json as sentencepiece_json

FILL_IN = ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>")
#: Ids 0 to 3 of the tiny byte-level tokenizer are <|endoftext|>, <|im_start|>, <|im_end|> and <|pad|>; words follow.
WORD = 261


def keys_of(
    source: Path, rows: int, configuration: Mapping[str, Any] | None = None, generation: Mapping[str, Any] | None = None
) -> tuple[Path, dict[str, Any], list[str]]:
    """(a GGUF of the tokenizer in ``source``, its keys without "tokenizer.ggml.", the notes)."""
    vocab = vocabulary(auxiliary_files(source), configuration or {}, rows, where=source, generation=generation)
    out = source / "out.gguf"
    out.write_bytes(writer.header([writer.text("general.architecture", "llama"), *vocab.keys], [])[0])
    metadata = GgufFile.open(out).metadata
    keys = {name.removeprefix("tokenizer.ggml."): value for name, value in metadata.items()}
    return out, keys, list(vocab.notes)


def byte_level(path: Path, added: tuple[str, ...] = (), **files: Mapping[str, Any]) -> Path:
    path.mkdir()
    for name, content in {"tokenizer": tokenizer_json(SMOLLM, added), **files}.items():
        (path / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return path


def test_llama_cpp_finds_fill_in_the_middle_tokens_by_their_text(tmp_path: Path) -> None:
    runtime = pytest.importorskip("tests.formats.gguf.runtime", reason="llama-cpp-python is not installed")
    out, _, _ = keys_of(byte_level(tmp_path / "base", FILL_IN), 275)
    ids = runtime.special_ids(out)
    kinds = ("fim_pre", "fim_suf", "fim_mid", "fim_pad", "fim_rep", "fim_sep")
    assert [ids[kind] for kind in kinds] == [269, 270, 271, 272, 273, 274]


def test_ids_come_from_the_map_then_the_settings_then_the_configs(tmp_path: Path) -> None:
    names = {"bos_token": "<|pad|>", "eos_token": "<|pad|>", "unk_token": {"content": "<|endoftext|>"}}
    source = byte_level(
        tmp_path / "base",
        tokenizer_config={"bos_token": "<|im_start|>"},
        special_tokens_map=names,
    )
    stale = byte_level(
        tmp_path / "stale",
        tokenizer_config={"bos_token": "<|im_start|>", "added_tokens_decoder": {}},
        special_tokens_map=names,
    )
    generation = {"bos_token_id": 3, "eos_token_id": 2, "unk_token_id": 3, "pad_token_id": 3}
    wanted = {source: (3, 3, 0, 3), stale: (1, 2, 3, 3)}  # transformers reads no map beside an added_tokens_decoder
    for path, (bos, eos, unknown, padding) in wanted.items():
        _, keys, _ = keys_of(path, 269, {"bos_token_id": 0, "eos_token_id": 2}, generation)
        ids = {name: value for name, value in keys.items() if name.endswith("_id")}
        named = {"bos_token_id": bos, "eos_token_id": eos, "unknown_token_id": unknown, "padding_token_id": padding}
        assert ids == named


def test_every_listed_end_of_text_ends_it_in_llama_cpp(tmp_path: Path) -> None:
    runtime = pytest.importorskip("tests.formats.gguf.runtime", reason="llama-cpp-python is not installed")
    out, keys, notes = keys_of(
        byte_level(tmp_path / "base"), 269, {"eos_token_id": [WORD, 2]}, {"eos_token_id": [WORD, 262, 263, 0]}
    )
    # llama.cpp recognises <|im_end|> and <|endoftext|> by their text.
    assert (keys["eos_token_id"], keys["eot_token_id"], keys["eom_token_id"]) == (WORD, 262, 263)
    assert runtime.ends(out) == {0, 2, WORD, 262, 263}
    assert notes == []


def test_more_ends_than_a_gguf_has_keys_are_noted(tmp_path: Path) -> None:
    _, _, notes = keys_of(byte_level(tmp_path / "base"), 269, {}, {"eos_token_id": [261, 262, 263, 264]})
    assert notes == ["a GGUF has no metadata key for the additional EOS token ids 264"]


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_an_end_outside_the_vocabulary_is_bad_input(tmp_path: Path, name: str) -> None:
    configs: list[dict[str, Any]] = [{}, {}]
    configs[name != "config.json"] = {"eos_token_id": [2, 269]}
    with pytest.raises(BadInput, match=rf"^{name}: eos_token_id: expected ids below 269, found 269"):
        keys_of(byte_level(tmp_path / "base"), 269, *configs)


def test_the_hard_coded_end_of_a_turn_applies_only_if_the_text_agrees(tmp_path: Path) -> None:
    _, keys, _ = keys_of(gemma(tmp_path / "gemma"), 400, config(model_type="gemma"))
    assert keys["eot_token_id"] == 107
    _, keys, _ = keys_of(llama2(tmp_path / "other"), 288, config(model_type="gemma"))
    assert "eot_token_id" not in keys


def test_codellamas_end_of_a_turn_is_written(tmp_path: Path) -> None:
    names = ("<PRE>", "<SUF>", "<MID>", "<EOT>")
    normal = (*(f"w{index}" for index in range(32007 - len(LLAMA))), *(f"\u2581{name}" for name in names))
    source = folder(tmp_path / "code", model_file(LLAMA, normal), {}, tokenizer_config={"eos_token": "</s>"})
    added = [{"content": text, "id": 32007 + index, "special": True} for index, text in enumerate(normal[-4:])]
    (source / "tokenizer.json").write_text(json.dumps(sentencepiece_json({}, added_tokens=added, normalizer=PREPEND)))
    out, keys, _ = keys_of(source, 32016, {"model_type": "llama"})
    assert keys["eot_token_id"] == 32010
    runtime = pytest.importorskip("tests.formats.gguf.runtime", reason="llama-cpp-python is not installed")
    ids = runtime.special_ids(out)
    assert [ids[kind] for kind in ("fim_pre", "fim_suf", "fim_mid", "eot")] == [32007, 32008, 32009, 32010]


def test_a_sentencepiece_tokenizer_that_adds_nothing_has_the_flag(tmp_path: Path) -> None:
    runtime = pytest.importorskip("tests.formats.gguf.runtime", reason="llama-cpp-python is not installed")
    source = folder(
        tmp_path / "bare",
        model_file(LLAMA),
        {},
        tokenizer=sentencepiece_json({}, normalizer=PREPEND),
        tokenizer_config={},
    )
    out, keys, _ = keys_of(source, 280)
    assert keys["add_bos_token"] is False
    assert runtime.tokenize(out, ["a"], add_special=True) == runtime.tokenize(out, ["a"])


def test_a_byte_level_tokenizer_that_adds_nothing_has_the_flag_if_llama_cpp_would_add(tmp_path: Path) -> None:
    runtime = pytest.importorskip("tests.formats.gguf.runtime", reason="llama-cpp-python is not installed")
    source = byte_level(tmp_path / "base", tokenizer=tokenizer_json(LLAMA3, model={"ignore_merges": True}))
    out, keys, _ = keys_of(source, 269)
    assert (keys["pre"], keys["add_bos_token"]) == ("llama-bpe", False)
    assert runtime.tokenize(out, ["a"], add_special=True) == runtime.tokenize(out, ["a"])
    _, keys, _ = keys_of(byte_level(tmp_path / "other"), 269)
    assert "add_bos_token" not in keys


def test_templates_in_separate_files_are_written_by_name(tmp_path: Path) -> None:
    source = byte_level(tmp_path / "base", tokenizer_config={"bos_token": "<|im_start|>"})
    (source / "chat_template.jinja").write_text("{{ messages }}")
    (source / "additional_chat_templates").mkdir()
    for name in ("tool_use", "rag"):
        (source / "additional_chat_templates" / f"{name}.jinja").write_text(f"{{{{ {name} }}}}")
    out, _, _ = keys_of(source, 269)
    metadata = GgufFile.open(out).metadata
    names = metadata["tokenizer.chat_templates"]
    assert isinstance(names, GgufArray)
    assert names.values() == ["rag", "tool_use"]
    templates = [metadata[f"tokenizer.chat_template{name}"] for name in ("", ".rag", ".tool_use")]
    assert templates == ["{{ messages }}", "{{ rag }}", "{{ tool_use }}"]
