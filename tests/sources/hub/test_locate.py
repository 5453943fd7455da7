from __future__ import annotations

import json
from pathlib import Path

import pytest
from huggingface_hub import constants

from exporter.errors import BadInput
from exporter.sources.hub.locate import Located, find_base, is_adapter, locate, origins, origins_after
from exporter.sources.peft.adapter import Adapter
from fixtures.hub.server import fill_cache
from tests.sources.folders import adapter as write_adapter
from tests.sources.folders import matrix

COMMIT = "0123456789abcdef0123456789abcdef01234567"
WHOLE = {"config.json": b"{}", "tokenizer.json": b"{ }", "model.safetensors": b"weights"}


def adapter(folder: Path, base: str | None) -> Adapter:
    return Adapter.open(write_adapter(folder, [0], {"model.embed_tokens": matrix(1)}, base=base))


def test_the_base_option_takes_precedence_over_the_adapter(tmp_path: Path, tiny_tied: Path) -> None:
    assert find_base(str(tiny_tied), [adapter(tmp_path / "a", "/nowhere")]) == Located(tiny_tied)


def test_the_base_that_all_adapters_name_is_taken(tmp_path: Path, tiny_tied: Path) -> None:
    two = [adapter(tmp_path / name, str(tiny_tied)) for name in "ab"]
    assert find_base(None, two) == Located(tiny_tied)


def test_adapters_of_different_bases_are_refused(tmp_path: Path) -> None:
    two = [adapter(tmp_path / "a", "one"), adapter(tmp_path / "b", "two")]
    with pytest.raises(BadInput, match="expected one base for all adapters, found the bases one, two") as caught:
        find_base(None, two)
    assert str(tmp_path / "a") in str(caught.value)


def test_a_missing_base_with_the_name_of_a_quantised_one_names_the_checkpoint_before(tmp_path: Path) -> None:
    with pytest.raises(
        BadInput, match=r"a quantised checkpoint; use --base to give the unquantised checkpoint unsloth/Llama-3\.2-1B"
    ):
        find_base(None, [adapter(tmp_path / "a", "unsloth/Llama-3.2-1B-bnb-4bit")])


@pytest.mark.parametrize("base", [None, ""])
def test_an_adapter_that_names_no_base_asks_for_one(base: str | None, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"adapter_config\.json: base_model_name_or_path: .*use --base to give the base"):
        find_base(None, [adapter(tmp_path / "a", base)])


@pytest.mark.parametrize("name", ["./missing", "/missing/folder", "~/missing", "a/b/c", "missing", "a\0b/c", "a/b@"])
def test_a_missing_path_is_not_looked_up_on_the_hub(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: object, **__: object) -> None:
        raise AssertionError("the hub was asked")

    if "\0" not in name:
        monkeypatch.setattr("huggingface_hub.snapshot_download", forbidden)
    with pytest.raises(BadInput, match="--base: ") as caught:
        locate(name, asked_by="--base")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("a" * 5000, "a path or a hub id"),
        ("a/" * 2500, "a path or a hub id"),
        (f"org/{'a' * 256}", "a path or a hub id"),
        (f"org/name@{'a' * 256}", "a branch, tag or commit"),
    ],
    ids=["name", "path", "hub id", "revision"],
)
def test_a_name_too_long_for_a_file_system_is_bad_input_with_a_short_message(word: str, expected: str) -> None:
    with pytest.raises(BadInput, match=f"^--base: .*expected {expected}, found ") as caught:
        locate(word, asked_by="--base", content="checkpoint")
    assert len(str(caught.value)) < 200
    assert caught.value.exit_code == 4


def test_a_hub_id_outside_the_cache_is_one_line_when_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        BadInput, match="org/absent@main: found neither as a local folder nor in the local cache"
    ) as caught:
        find_base(None, [adapter(tmp_path / "a", "org/absent")])
    assert "adapter_config.json" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_folder_with_an_adapter_config_is_an_adapter(tiny_adapter: Path, tiny_tied: Path) -> None:
    assert is_adapter(tiny_adapter)
    assert not is_adapter(tiny_tied)


def revised(folder: Path, base: str, revision: object) -> Adapter:
    written = adapter(folder, base)
    config = {**written.config, "revision": revision}
    (written.path / "adapter_config.json").write_text(json.dumps(config))
    return Adapter.open(written.path)


@pytest.fixture
def two_revisions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """``org/base`` at main and at v1, in the cache."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    new = fill_cache(tmp_path / "cache", "org/base", WHOLE, commit=COMMIT)
    return new, fill_cache(tmp_path / "cache", "org/base", WHOLE, commit=COMMIT[::-1], ref="v1")


def test_the_revision_that_the_adapter_names_is_its_bases(tmp_path: Path, two_revisions: tuple[Path, Path]) -> None:
    new, old = two_revisions
    assert find_base(None, [revised(tmp_path / "a", "org/base", "v1")]) == Located(old, "org/base", COMMIT[::-1])
    assert find_base(None, [revised(tmp_path / "b", "org/base", None)]).path == new
    assert find_base("org/base", [revised(tmp_path / "c", "org/base", "v1")]).path == new


def test_a_local_base_has_no_revision(tmp_path: Path, tiny_tied: Path) -> None:
    assert find_base(None, [revised(tmp_path / "a", str(tiny_tied), "v1")]) == Located(tiny_tied)


def test_adapters_of_two_revisions_are_refused(tmp_path: Path, two_revisions: tuple[Path, Path]) -> None:
    pair = [revised(tmp_path / "a", "org/base", "v1"), revised(tmp_path / "b", "org/base", "main")]
    with pytest.raises(BadInput, match="expected one base for all adapters, found the bases org/base, org/base@v1"):
        find_base(None, pair)
    same = [revised(tmp_path / "c", "org/base", None), revised(tmp_path / "d", "org/base", "main")]
    assert find_base(None, same).path == two_revisions[0]


def test_a_revision_that_is_not_a_string_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"adapter_config\.json: revision: expected a branch, tag or commit, found 7"):
        find_base(None, [revised(tmp_path / "a", "org/base", 7)])


def test_a_local_folder_takes_precedence_over_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "base@v1").mkdir(parents=True)
    assert locate("org/base@v1", asked_by="--base") == Located(Path("org/base@v1"))


def test_only_the_hub_is_an_origin(tmp_path: Path) -> None:
    recorded = origins(Located(tmp_path), [Located(tmp_path), Located(tmp_path, "user/adapter", COMMIT)])
    assert recorded == {"adapter.1.repo": "user/adapter", "adapter.1.revision": COMMIT}


def test_a_patch_numbers_its_adapters_after_the_recorded_ones(tmp_path: Path) -> None:
    local = Located(tmp_path)
    first, second = (Located(tmp_path, f"a/{name}", COMMIT) for name in ("first", "second"))
    recorded = {"base.embedding_sha256": "00", **origins(local, [local, first])}
    assert origins_after(recorded, None, [first]) == recorded
    assert origins_after(recorded, local, [first, second]) == {
        **recorded,
        "adapter.2.repo": "a/second",
        "adapter.2.revision": COMMIT,
    }
    assert origins_after({}, first, [local, second]) == origins(first, [local, second])
