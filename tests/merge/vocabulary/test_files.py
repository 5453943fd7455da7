from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest

from exporter.errors import BadInput
from exporter.merge.vocabulary.files import merge_auxiliary_files
from exporter.sources.hf.checkpoint import Checkpoint
from exporter.sources.peft.adapter import Adapter
from tests.sources.folders import EMBED, adapter, checkpoint, matrix

BASE = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json", "merges.txt")


def base_with(folder: Path, *names: str) -> dict[str, Path]:
    checkpoint(folder, {EMBED: matrix()})
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("base")
    return Checkpoint.open(folder).auxiliary_files


def adapter_with(folder: Path, files: Mapping[str, str]) -> Adapter:
    adapter(folder, [0], {"model.embed_tokens": matrix(1)})
    for name, text in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    return Adapter.open(folder)


def origins(files: Mapping[str, Path]) -> dict[str, str]:
    return {name: path.parent.name for name, path in files.items()}


def test_without_a_tokenizer_beside_the_adapter_the_base_keeps_its_own(tmp_path: Path) -> None:
    files = merge_auxiliary_files(base_with(tmp_path / "base", *BASE), [adapter_with(tmp_path / "a", {})])
    assert origins(files) == dict.fromkeys(BASE, "base")


@pytest.mark.parametrize("vocabulary", ["tokenizer.json", "tokenizer.model", "vocab.json", "tekken.json"])
def test_the_adapters_tokenizer_replaces_the_bases_as_a_whole(vocabulary: str, tmp_path: Path) -> None:
    base = base_with(tmp_path / "base", *BASE, "chat_template.jinja")
    files = merge_auxiliary_files(
        base, [adapter_with(tmp_path / "a", {vocabulary: "a", "tokenizer_config.json": "{}"})]
    )
    assert origins(files) == {
        vocabulary: "a",
        "tokenizer_config.json": "a",
        "generation_config.json": "base",
        "chat_template.jinja": "base",
    }


def test_the_adapters_chat_template_replaces_the_bases(tmp_path: Path) -> None:
    base = base_with(tmp_path / "base", "tokenizer.json", "chat_template.jinja")
    files = merge_auxiliary_files(base, [adapter_with(tmp_path / "a", {"chat_template.jinja": "new"})])
    assert origins(files) == {"tokenizer.json": "base", "chat_template.jinja": "a"}


MORE = "additional_chat_templates/tool_use.jinja"


def test_additional_chat_templates_are_copied_with_the_default_one(tmp_path: Path) -> None:
    base = base_with(tmp_path / "base", "tokenizer.json", "chat_template.jinja", MORE)
    bare = merge_auxiliary_files(base, [adapter_with(tmp_path / "bare", {})])
    assert bare[MORE] == tmp_path / "base" / MORE
    tokenizer = merge_auxiliary_files(base, [adapter_with(tmp_path / "tokenizer", {"tokenizer.json": "{}"})])
    assert tokenizer[MORE] == tmp_path / "base" / MORE
    own = merge_auxiliary_files(base, [adapter_with(tmp_path / "own", {"chat_template.jinja": "new"})])
    assert MORE not in own
    named = merge_auxiliary_files(base, [adapter_with(tmp_path / "named", {"chat_template.jinja": "new", MORE: "new"})])
    assert named[MORE] == tmp_path / "named" / MORE


def test_two_adapters_may_have_equal_files_but_not_different_ones(tmp_path: Path) -> None:
    base = base_with(tmp_path / "base")
    first, same, other = (
        adapter_with(tmp_path / name, {"tokenizer.json": json.dumps(text)})
        for name, text in [("first", "x"), ("same", "x"), ("other", "y")]
    )
    assert origins(merge_auxiliary_files(base, [first, same])) == {"tokenizer.json": "first"}
    with pytest.raises(BadInput, match=r"other/tokenizer\.json: expected the same content as .*first/tokenizer\.json"):
        merge_auxiliary_files(base, [first, same, other])


def test_other_files_are_not_copied(tmp_path: Path) -> None:
    others = {"README.md": "x", "modeling_custom.py": "x", "optimizer.pt": "x", "training_args.bin": "x"}
    assert merge_auxiliary_files(base_with(tmp_path / "base", *others), [adapter_with(tmp_path / "a", others)]) == {}


def test_two_adapters_with_different_chat_templates_are_refused(tmp_path: Path) -> None:
    first, other = (adapter_with(tmp_path / name, {"chat_template.jinja": name}) for name in ("first", "other"))
    with pytest.raises(BadInput, match=r"other/chat_template\.jinja: expected the same content as \S+jinja, found"):
        merge_auxiliary_files({}, [first, other])
