"""Repositories in a real cache on disk, offline: complete ones are used, missing files are named."""

from __future__ import annotations

import errno
import json
from collections.abc import Mapping
from pathlib import Path

import pytest
from huggingface_hub import constants

from exporter.errors import BadInput, OutputError
from exporter.sources.hub import fetch as hub
from exporter.sources.hub.locate import locate
from fixtures.hub.server import fill_cache

COMMIT = "0123456789abcdef0123456789abcdef01234567"
OTHER = "89abcdef0123456789abcdef0123456789abcdef"
CHECKPOINT = {"config.json": b"{}", "tokenizer.json": b"{ }", "model.safetensors": b"weights"}
ADAPTER = {"adapter_config.json": b"{}", "adapter_model.safetensors": b"rows"}
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
INDEX = json.dumps({"weight_map": {"a": SHARDS[0], "b": SHARDS[1]}}).encode()
SHARDED = {"config.json": b"{}", "tokenizer.json": b"{ }", "model.safetensors.index.json": INDEX}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def sizes(files: Mapping[str, bytes]) -> dict[str, int]:
    return {name: len(content) for name, content in files.items()}


def find(name: str = "org/model") -> Path:
    return locate(name, asked_by="--base", content="checkpoint").path


@pytest.mark.parametrize("listed", [True, False])
def test_a_complete_repository_in_the_cache_is_used(listed: bool, cache: Path) -> None:
    snapshot = fill_cache(
        cache, "org/model", CHECKPOINT, commit=COMMIT, tree=sizes({**CHECKPOINT, "x.bin": b""}) if listed else None
    )
    located = locate("org/model", asked_by="--base", content="checkpoint")
    assert (located.path, located.repo, located.revision) == (snapshot, "org/model", COMMIT)
    assert located.name == "model"


def test_an_old_repository_has_no_owner(cache: Path) -> None:
    snapshot = fill_cache(cache, "gpt2", CHECKPOINT, commit=COMMIT)
    assert find("gpt2") == snapshot


@pytest.mark.parametrize("revision", ["v1", "refs/pr/3", OTHER])
def test_a_revision_is_a_branch_a_tag_or_a_commit(revision: str, cache: Path) -> None:
    fill_cache(cache, "org/model", CHECKPOINT, commit=COMMIT)
    ref = "v1" if revision == OTHER else revision
    snapshot = fill_cache(cache, "org/model", CHECKPOINT, commit=OTHER, ref=ref)
    assert find(f"org/model@{revision}") == snapshot


def test_a_revision_that_is_not_cached_is_not_replaced_by_another(cache: Path) -> None:
    fill_cache(cache, "org/model", CHECKPOINT, commit=COMMIT)
    with pytest.raises(BadInput, match=r"^--base: org/model@v2: found neither as a local folder nor .*--revision v2"):
        find("org/model@v2")


@pytest.mark.parametrize("listed", [True, False])
@pytest.mark.parametrize("absent", sorted(CHECKPOINT))
def test_a_file_that_the_cache_lacks_is_named(absent: str, listed: bool, cache: Path) -> None:
    present = {name: content for name, content in CHECKPOINT.items() if name != absent}
    fill_cache(cache, "org/model", present, commit=COMMIT, tree=sizes(CHECKPOINT) if listed else None)
    with pytest.raises(
        BadInput, match=rf"^--base: org/model@main: the local cache is incomplete: {absent} is missing, and HF_HUB"
    ):
        find()


@pytest.mark.parametrize("listed", [True, False])
def test_a_shard_that_the_cache_lacks_is_named(listed: bool, cache: Path) -> None:
    whole = {**SHARDED, SHARDS[0]: b"one", SHARDS[1]: b"two"}
    present = {**SHARDED, SHARDS[0]: b"one"}
    fill_cache(cache, "org/model", present, commit=COMMIT, tree=sizes(whole) if listed else None)
    with pytest.raises(BadInput, match=rf"org/model@main: the local cache is incomplete: {SHARDS[1]} is missing"):
        find()
    snapshot = fill_cache(cache, "org/other", whole, commit=COMMIT, tree=sizes(whole) if listed else None)
    assert find("org/other") == snapshot


def test_a_missing_chat_template_is_known_from_the_listing(cache: Path) -> None:
    listing = {**sizes(CHECKPOINT), "chat_template.jinja": 9}
    fill_cache(cache, "org/model", CHECKPOINT, commit=COMMIT, tree=listing)
    with pytest.raises(BadInput, match=r"chat_template\.jinja is missing"):
        find()


def test_a_link_without_its_blob_is_a_missing_file(cache: Path) -> None:
    snapshot = fill_cache(cache, "org/model", CHECKPOINT, commit=COMMIT)
    (snapshot / "model.safetensors").resolve().unlink()
    with pytest.raises(BadInput, match=r"model\.safetensors is missing"):
        find()


def test_a_file_shorter_than_its_listing_is_named_with_the_blob_to_delete(cache: Path) -> None:
    listing = {**sizes(CHECKPOINT), "model.safetensors": 100}
    snapshot = fill_cache(cache, "org/model", CHECKPOINT, commit=COMMIT, tree=listing)
    blob = (snapshot / "model.safetensors").resolve()
    with pytest.raises(BadInput, match=r"model\.safetensors has 7 of 100 bytes \(delete ") as caught:
        find()
    assert str(blob) in str(caught.value)


def test_an_adapter_needs_its_own_weights_only(cache: Path) -> None:
    both = {**CHECKPOINT, **ADAPTER}
    present = {name: content for name, content in both.items() if name != "model.safetensors"}
    snapshot = fill_cache(cache, "user/adapter", present, commit=COMMIT, tree=sizes(both))
    assert locate("user/adapter", asked_by="ADAPTER", content="adapter").path == snapshot
    assert locate("user/adapter", asked_by="SOURCE").path == snapshot
    with pytest.raises(BadInput, match=r"model\.safetensors is missing"):
        find("user/adapter")


def test_a_checkpoint_is_not_an_adapter(cache: Path) -> None:
    fill_cache(cache, "org/model", CHECKPOINT, commit=COMMIT, tree=sizes(CHECKPOINT))
    with pytest.raises(
        BadInput, match=r"^ADAPTER: org/model@main: the local cache is incomplete: adapter_config\.json is missing"
    ):
        locate("org/model", asked_by="ADAPTER", content="adapter")


@pytest.mark.parametrize("revision", ["../../../etc/passwd", "a/../b", "-x", "a b", ".hidden", "v1\n"])
def test_a_revision_cannot_escape_the_cache(revision: str, cache: Path) -> None:
    with pytest.raises(BadInput, match="expected a branch, tag or commit"):
        locate("org/model", asked_by="--base", content="checkpoint", revision=revision)


def test_a_name_that_the_hub_cannot_have_is_bad_input(cache: Path) -> None:
    with pytest.raises(BadInput, match="of the form org/name"):
        find("org/two--dashes")


def test_a_full_cache_disk_is_an_output_error(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> Path:
        raise OSError(errno.ENOSPC, "No space left on device", str(cache))

    monkeypatch.setattr(hub, "_download", full)
    with pytest.raises(OutputError, match="No space left"):
        find()
