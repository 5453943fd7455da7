from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoModelForCausalLM

from exporter.errors import BadInput, TTExportError, UnreadableFile
from exporter.sources.hf.checkpoint import Checkpoint
from exporter.sources.hf.tie import Tie
from exporter.tensors import read
from fixtures.hostile import cases as hostile
from fixtures.hostile import rawtensors
from tests.sources.folders import EMBED, HEAD, NORM, checkpoint, matrix, sharded, write_index

SAME, OTHER = matrix(), matrix(start=100)
NESTED_EMBED, NESTED_HEAD = "model.language_model.embed_tokens.weight", "lm_head.weight"


@pytest.mark.parametrize(
    ("head", "flag", "tie"),
    [
        (None, True, Tie(EMBED, None, tied=True, tied_in_config=True)),
        (None, None, Tie(EMBED, None, tied=True, tied_in_config=True)),
        (SAME, True, Tie(EMBED, HEAD, tied=True, tied_in_config=True)),
        (SAME, None, Tie(EMBED, HEAD, tied=True, tied_in_config=True)),
        (SAME, False, Tie(EMBED, HEAD, tied=False)),
        (OTHER, True, Tie(EMBED, HEAD, tied=False, tied_in_config=True)),
        (OTHER, False, Tie(EMBED, HEAD, tied=False)),
        (OTHER, None, Tie(EMBED, HEAD, tied=False)),
        (matrix(7), None, Tie(EMBED, HEAD, tied=False)),
        (SAME.astype(np.float16), None, Tie(EMBED, HEAD, tied=False)),
    ],
)
def test_the_tie_follows_config_and_tensors(
    head: np.ndarray | None, flag: bool | None, tie: Tie, tmp_path: Path
) -> None:
    tensors = {EMBED: SAME} | ({} if head is None else {HEAD: head})
    config = {} if flag is None else {"tie_word_embeddings": flag}
    assert Checkpoint.open(checkpoint(tmp_path / "base", tensors, **config)).tie == tie


def test_a_difference_in_the_last_row_only_is_detected(tmp_path: Path) -> None:
    head = matrix(5000, 1024)  # more than one block
    embedding = head.copy()
    embedding[-1, -1] += 1
    assert not Checkpoint.open(checkpoint(tmp_path / "base", {EMBED: embedding, HEAD: head})).tie.tied


def test_an_untied_model_without_a_head_is_refused(tmp_path: Path) -> None:
    base = checkpoint(tmp_path / "base", {EMBED: SAME}, tie_word_embeddings=False)
    with pytest.raises(
        BadInput, match=r"expected a stored head \(lm_head or embed_out\), because the config does not tie"
    ):
        _ = Checkpoint.open(base).tie


@pytest.mark.parametrize(
    ("outer", "inner", "head", "tied"),
    [
        ({}, {"tie_word_embeddings": True}, None, True),
        ({}, {"tie_word_embeddings": True}, SAME, True),
        ({}, {"tie_word_embeddings": False}, SAME, False),
        ({"tie_word_embeddings": False}, {}, SAME, False),
        ({"tie_word_embeddings": True}, {"tie_word_embeddings": False}, SAME, True),
        ({"tie_word_embeddings": True}, {"tie_word_embeddings": False}, OTHER, False),
        ({"tie_word_embeddings": True}, {"tie_word_embeddings": False}, None, True),
        ({"tie_word_embeddings": False}, {"tie_word_embeddings": True}, OTHER, False),
        ({"tie_word_embeddings": "no"}, {}, SAME, True),
    ],
)
def test_the_flags_of_a_wrapper_and_its_text_model_are_combined(
    outer: dict[str, object], inner: dict[str, object], head: np.ndarray | None, tied: bool, tmp_path: Path
) -> None:
    tensors = {NESTED_EMBED: SAME} | ({} if head is None else {NESTED_HEAD: head})
    base = Checkpoint.open(checkpoint(tmp_path / "base", tensors, **outer, text_config={"vocab_size": 6, **inner}))
    assert base.text_config["vocab_size"] == 6
    tie = base.tie
    assert (tie.embedding, tie.head, tie.tied) == (NESTED_EMBED, None if head is None else NESTED_HEAD, tied)


def test_an_embedding_without_columns_does_not_crash(tmp_path: Path) -> None:
    empty = np.zeros((5, 0), np.float32)
    assert Checkpoint.open(checkpoint(tmp_path / "base", {EMBED: empty, HEAD: empty})).tie.tied


@pytest.mark.parametrize("names", [[], [EMBED, "model.decoder.embed_tokens.weight"]])
def test_one_embedding_is_needed(names: list[str], tmp_path: Path) -> None:
    base = checkpoint(tmp_path / "base", {NORM: matrix(1)} | {name: SAME for name in names})
    with pytest.raises(BadInput, match=r"expected (an|one) input embedding"):
        _ = Checkpoint.open(base).stored_embedding


def test_tensors_with_names_like_the_embeddings_are_ignored(tmp_path: Path) -> None:
    like = ["model.embed_tokens_per_layer.weight", "model.embed_tokens.weight_scale", "my_lm_head.weight"]
    base = Checkpoint.open(checkpoint(tmp_path / "base", {EMBED: SAME} | {name: SAME for name in like}))
    assert (base.stored_embedding, base.stored_head) == (EMBED, None)


def test_the_digest_is_that_of_the_stored_bytes(tiny_tied: Path) -> None:
    header, data = rawtensors.read(tiny_tied / "model.safetensors")
    begin, end = header[EMBED]["data_offsets"]
    assert Checkpoint.open(tiny_tied).embedding_digest == hashlib.sha256(data[begin:end]).hexdigest()


def test_shards_hold_what_the_model_holds(tiny_sharded: Path) -> None:
    base = Checkpoint.open(tiny_sharded)
    assert len({tensor.place.path for tensor in base.tensors.values()}) == 3
    model = AutoModelForCausalLM.from_pretrained(tiny_sharded)
    state = model.state_dict()
    assert base.tensors.keys() == state.keys()
    for name, tensor in base.tensors.items():
        np.testing.assert_array_equal(read(tensor).astype(np.float32), state[name].float().numpy())


def test_a_single_file_takes_precedence_over_an_index_as_in_transformers(tiny_tied: Path, tmp_path: Path) -> None:
    base = shutil.copytree(tiny_tied, tmp_path / "base")
    (base / "stale.safetensors").write_bytes((base / "model.safetensors").read_bytes())
    rawtensors.replace(base / "stale.safetensors", {NORM: ("BF16", (64,), bytes(128))})
    write_index(base, dict.fromkeys(Checkpoint.open(base).tensors, "stale.safetensors"))
    stored = read(Checkpoint.open(base).tensors[NORM]).astype(np.float32)
    loaded = AutoModelForCausalLM.from_pretrained(base).state_dict()[NORM].float().numpy()
    np.testing.assert_array_equal(stored, loaded)


def two_shards(folder: Path) -> Path:
    return sharded(folder, {"1.safetensors": {EMBED: SAME}, "2.safetensors": {NORM: matrix(1)}})


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    base = two_shards(tmp_path / "base")
    (base / "2.safetensors").unlink()
    with pytest.raises(UnreadableFile, match=r"2\.safetensors: no such file"):
        Checkpoint.open(base)


@pytest.mark.parametrize("shard", ["../out.safetensors", "/etc/passwd", "a/b.safetensors", "..", "", "a\0b"])
def test_a_shard_outside_the_folder_is_refused(shard: str, tmp_path: Path) -> None:
    base = two_shards(tmp_path / "base")
    write_index(base, {EMBED: "1.safetensors", NORM: shard})
    with pytest.raises(UnreadableFile, match=r"index\.json: expected shard files in the folder") as caught:
        Checkpoint.open(base)
    assert caught.value.path.name == "model.safetensors.index.json"


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        (
            {EMBED: "1.safetensors", NORM: "1.safetensors"},
            r"1\.safetensors: expected the tensor model.norm.weight, which the index lists",
        ),
        (
            {EMBED: "2.safetensors"},
            r"model.norm.weight: expected the tensor in no shard, found the tensor in 2\.safetensors",
        ),
        ({EMBED: 1}, "expected a weight_map"),
        (["1.safetensors"], "expected a weight_map"),
    ],
)
def test_an_index_that_disagrees_with_its_shards_is_refused(weight_map: object, message: str, tmp_path: Path) -> None:
    base = two_shards(tmp_path / "base")
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(UnreadableFile, match=message):
        Checkpoint.open(base)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "config.json is not valid JSON"),
        (b"[]", "config.json: expected a JSON object, found list"),
        (b"\xff", "not valid JSON"),
        (b'{"a": 1, "a": 2}', "a: expected a unique key, found the same key twice"),
        (b'{"t": {"a": 1, "b": 0, "a": 1}}', "a: expected a unique key, found the same key twice"),
        (b'{"a": "\\ud800"}', "not valid JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not valid JSON"),
        (b"{" + b'"a":{' * 100_000, "not valid JSON"),
    ],
    ids=["cut", "list", "no-utf8", "twice", "twice-below", "lone-surrogate", "long-number", "deep"],
)
def test_a_broken_config_is_refused(content: bytes, message: str, tmp_path: Path) -> None:
    base = checkpoint(tmp_path / "base", {EMBED: SAME})
    (base / "config.json").write_bytes(content)
    with pytest.raises(UnreadableFile, match=message):
        Checkpoint.open(base)


def test_a_path_without_a_checkpoint_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_text("{}")
    for name, message in [
        ("absent", "found no such folder"),
        ("file", "found a file"),
        ("empty", "config.json: no such file"),
        ("bare", "expected model.safetensors or model.safetensors.index.json, found no such file"),
    ]:
        with pytest.raises(UnreadableFile, match=message):
            Checkpoint.open(tmp_path / name)


def test_pickled_weights_are_refused_with_the_conversion(tiny_adapter: Path, tiny_tied: Path, tmp_path: Path) -> None:
    _, base = hostile.HOSTILE["pickle_base"](tiny_adapter, tiny_tied, tmp_path)
    with pytest.raises(TTExportError, match=r"pytorch_model\.bin: .*save_pretrained") as caught:
        Checkpoint.open(base)
    assert isinstance(caught.value, BadInput)
    assert not (tmp_path / hostile.PICKLE_MARKER).exists()


def test_auxiliary_files_are_the_existing_ones(tiny_tied: Path) -> None:
    files = Checkpoint.open(tiny_tied).auxiliary_files
    assert {"tokenizer.json", "tokenizer_config.json", "generation_config.json"} <= files.keys()
    assert "config.json" not in files
    assert all(path.is_file() for path in files.values())
