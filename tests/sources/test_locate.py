from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub import constants

from exporter.errors import BadInput
from exporter.sources.adapter import Adapter
from exporter.sources.locate import find_base, is_adapter, locate
from tests.sources.folders import adapter as write_adapter
from tests.sources.folders import matrix

REVISION = "0123456789abcdef0123456789abcdef01234567"


def adapter(folder: Path, base: str | None) -> Adapter:
    return Adapter.open(write_adapter(folder, [0], {"model.embed_tokens": matrix(1)}, base=base))


def cached(monkeypatch: pytest.MonkeyPatch, cache: Path, name: str, *files: str) -> Path:
    """A hub cache that holds ``files`` of the repository ``name``."""
    repository = cache / f"models--{name.replace('/', '--')}"
    snapshot = repository / "snapshots" / REVISION
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(REVISION)
    for file in files:
        (snapshot / file).write_text("{}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    return snapshot


def test_what_the_user_names_wins_over_the_adapter(tmp_path: Path, tiny_tied: Path) -> None:
    assert find_base(str(tiny_tied), [adapter(tmp_path / "a", "/nowhere")]) == tiny_tied


def test_the_base_that_all_adapters_name_is_taken(tmp_path: Path, tiny_tied: Path) -> None:
    two = [adapter(tmp_path / name, str(tiny_tied)) for name in "ab"]
    assert find_base(None, two) == tiny_tied


def test_adapters_of_different_bases_are_refused(tmp_path: Path) -> None:
    two = [adapter(tmp_path / "a", "one"), adapter(tmp_path / "b", "two")]
    with pytest.raises(BadInput, match="expected one base for all adapters, found one, two") as caught:
        find_base(None, two)
    assert str(tmp_path / "a") in str(caught.value)


@pytest.mark.parametrize("base", [None, ""])
def test_an_adapter_that_names_no_base_asks_for_one(base: str | None, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"adapter_config\.json: base_model_name_or_path: .*give --base"):
        find_base(None, [adapter(tmp_path / "a", base)])


@pytest.mark.parametrize("name", ["./missing", "/missing/folder", "~/missing", "a/b/c", "missing", "a\0b/c"])
def test_a_path_that_is_not_there_is_not_asked_of_the_hub(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: object, **__: object) -> None:
        raise AssertionError("the hub was asked")

    if "\0" not in name:
        monkeypatch.setattr("huggingface_hub.snapshot_download", forbidden)
    with pytest.raises(BadInput, match="--base: ") as caught:
        locate(name, asked_by="--base")
    assert "\n" not in str(caught.value)


def test_a_hub_id_is_found_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = cached(monkeypatch, tmp_path, "org/model", "config.json", "model.safetensors")
    assert locate("org/model", asked_by="--base") == snapshot


def test_a_hub_id_outside_the_cache_is_one_line_when_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(BadInput, match="org/absent: neither a folder nor in the local cache") as caught:
        find_base(None, [adapter(tmp_path / "a", "org/absent")])
    assert "adapter_config.json" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_cache_with_the_tokenizer_alone_is_completed_by_a_download(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    partial, complete = tmp_path / "partial", tmp_path / "complete"
    for folder in (partial, complete):
        folder.mkdir()
        (folder / "config.json").touch()
    (complete / "model.safetensors").touch()

    def download(name: str, *, local_files_only: bool, allow_patterns: list[str]) -> str:
        assert not any("bin" in pattern or "*.py" in pattern for pattern in allow_patterns)
        return str(partial if local_files_only else complete)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert locate("org/model", asked_by="--base") == complete


def test_a_folder_with_an_adapter_config_is_an_adapter(tiny_adapter: Path, tiny_tied: Path) -> None:
    assert is_adapter(tiny_adapter)
    assert not is_adapter(tiny_tied)
