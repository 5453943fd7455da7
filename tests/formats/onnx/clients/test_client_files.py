"""The files beside onnx/: each client finds its settings in its place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from exporter.errors import UnreadableFile
from exporter.formats.onnx import plan_onnx
from tests.formats.onnx.conftest import Change, Write, merged


def settings(folder: Path, name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / name).read_text())
    return content


def test_config_names_the_data_file_for_browsers(write: Write, change: Change, tiny_tied: Path) -> None:
    base = change(tiny_tied, **{"transformers.js_config": {"dtype": "fp32"}})
    config = settings(write(base), "config.json")
    assert config["transformers.js_config"] == {"dtype": "fp32", "use_external_data_format": {"model.onnx": 1}}
    assert config["dtype"] == "float32"


def test_genai_config_describes_the_merged_model(write: Write, tiny_tied: Path, tiny_new_tokens_adapter: Path) -> None:
    folder = write(tiny_tied, tiny_new_tokens_adapter)
    genai = settings(folder, "genai_config.json")
    model, decoder = genai["model"], genai["model"]["decoder"]
    assert (folder / decoder["filename"]).is_file()
    assert (model["vocab_size"], model["context_length"]) == (515, 512)
    assert (model["bos_token_id"], model["eos_token_id"], model["pad_token_id"]) == (1, 2, 3)
    shape = ("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_size", "hidden_size")
    assert [decoder[key] for key in shape] == [2, 4, 2, 16, 64]
    assert genai["search"]["past_present_share_buffer"] is False


def test_several_eos_tokens_come_from_the_generation_config(write: Write, change: Change, tiny_tied: Path) -> None:
    base = change(tiny_tied, pad_token_id=None)
    (base / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 0]}))
    model = settings(write(base), "genai_config.json")["model"]
    assert model["eos_token_id"] == [2, 0]
    assert model["pad_token_id"] == 2


def test_chat_template_is_in_both_places(write: Write, tiny_tied: Path) -> None:
    folder = write(tiny_tied)
    template = (tiny_tied / "chat_template.jinja").read_text()
    assert (folder / "chat_template.jinja").read_text() == template
    assert settings(folder, "tokenizer_config.json")["chat_template"] == template
    assert "chat_template" not in settings(tiny_tied, "tokenizer_config.json")


@pytest.mark.parametrize(
    "stored",
    ["{{ messages }}", [{"name": "tool_use", "template": "x"}, {"name": "default", "template": "{{ messages }}"}]],
    ids=["one", "named"],
)
def test_template_of_the_tokenizer_config_gets_its_file(
    write: Write, change: Change, tiny_tied: Path, stored: object
) -> None:
    base = change(tiny_tied)
    (base / "chat_template.jinja").unlink()
    config = settings(base, "tokenizer_config.json") | {"chat_template": stored}
    (base / "tokenizer_config.json").write_text(json.dumps(config))
    folder = write(base)
    assert (folder / "chat_template.jinja").read_text() == "{{ messages }}"
    assert (folder / "tokenizer_config.json").read_bytes() == (base / "tokenizer_config.json").read_bytes()


def test_model_without_a_template_gets_none(write: Write, change: Change, tiny_tied: Path) -> None:
    base = change(tiny_tied)
    (base / "chat_template.jinja").unlink()
    folder = write(base)
    assert not (folder / "chat_template.jinja").exists()
    assert "chat_template" not in settings(folder, "tokenizer_config.json")


def test_template_that_is_no_text_is_refused_by_name(change: Change, tiny_tied: Path) -> None:
    base = change(tiny_tied)
    (base / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(UnreadableFile, match=r"chat_template\.jinja: expected text in UTF-8"):
        plan_onnx(merged(base))


def test_tokenizer_is_the_adapters(write: Write, tiny_tied: Path, tiny_new_tokens_adapter: Path) -> None:
    folder = write(tiny_tied, tiny_new_tokens_adapter)
    assert (folder / "tokenizer.json").read_bytes() == (tiny_new_tokens_adapter / "tokenizer.json").read_bytes()
