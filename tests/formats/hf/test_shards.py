from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from exporter.formats.hf.write import plan_hf, write_hf
from exporter.merge.plan import plan_merge
from exporter.sources.hf.checkpoint import INDEX, Checkpoint
from exporter.sources.hf.safetensors import read_tensors
from exporter.sources.peft.adapter import Adapter
from fixtures import adapters as stock
from tests.formats.merged import Merge, files, loaded, raw
from tests.sources.folders import EMBED, adapter, matrix, sharded
from tests.support.trained import TRAINED_IDS


def test_shards_keep_their_split(tiny_sharded: Path, tmp_path: Path, merge: Merge) -> None:
    rows = stock.stock_rows(tiny_sharded, tmp_path / "a", TRAINED_IDS, targets=stock.HEAD_AND_EMBEDDING)
    out = merge(tiny_sharded, rows)
    before, after = (json.loads((folder / INDEX).read_text()) for folder in (tiny_sharded, out))
    assert after["weight_map"] == before["weight_map"]
    assert list(after["weight_map"]) == sorted(after["weight_map"])
    tensors = Checkpoint.open(out).tensors
    assert after["metadata"]["total_size"] == sum(tensor.place.nbytes for tensor in tensors.values())
    assert after["metadata"]["total_parameters"] == loaded(out).num_parameters()
    shards = set(after["weight_map"].values())
    assert len(shards) == 3
    assert {path.name for path in out.glob("*.safetensors")} == shards


def test_a_sharded_matrix_grows_in_its_shard(tmp_path: Path, merge: Merge) -> None:
    shards = {"1.safetensors": {EMBED: matrix()}, "2.safetensors": {"model.norm.weight": matrix(1)}}
    base = sharded(tmp_path / "b", shards, vocab_size=6)
    rows = adapter(tmp_path / "a", [6], {"model.embed_tokens": matrix(1, start=90)})
    vocab = {f"t{n}": n for n in range(7)}
    (rows / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocab}}))
    out = merge(base, rows)
    np.testing.assert_array_equal(
        read_tensors(out / "1.safetensors")[EMBED].rows(0, 7), np.concatenate([matrix(), matrix(1, start=90)])
    )
    assert json.loads((out / "config.json").read_text())["vocab_size"] == 7


def test_a_shard_without_merged_tensors_equals_the_bases(tiny_sharded: Path, tmp_path: Path, merge: Merge) -> None:
    rows = stock.stock_rows(tiny_sharded, tmp_path / "a", TRAINED_IDS)
    out = merge(tiny_sharded, rows)
    before, after = ({k: v for k, v in files(path).items() if "safetensors" in k} for path in (tiny_sharded, out))
    touched = json.loads((out / INDEX).read_text())["weight_map"][EMBED]
    assert {name for name in before if before[name] != after[name]} == {touched}, (
        "the index is as transformers writes it"
    )


@pytest.mark.parametrize("max_bytes", [20_000, 70_000, 100_000])
def test_shards_are_split_by_size_on_request(
    max_bytes: int, tiny_tied: Path, tiny_adapter: Path, tmp_path: Path
) -> None:
    plan = plan_merge(Checkpoint.open(tiny_tied), [Adapter.open(tiny_adapter)])
    write_hf(plan_hf(plan.model(), max_bytes), tmp_path / "out")
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    names = sorted(set(index["weight_map"].values()))
    assert names == [f"model-{n:05}-of-{len(names):05}.safetensors" for n in range(1, len(names) + 1)]
    assert len(names) > 1
    stored = {name: read_tensors(tmp_path / "out" / name) for name in names}
    sizes = [[tensor.place.nbytes for tensor in shard.values()] for shard in stored.values()]
    assert all(sum(shard) <= max_bytes or len(shard) == 1 for shard in sizes)
    for shard, following in pairwise(sizes):
        assert sum(shard) + following[0] > max_bytes, "a shard that could have taken the next tensor"
    base = list(Checkpoint.open(tiny_tied).tensors)
    assert [name for shard in stored.values() for name in shard] == base
    model = loaded(tmp_path / "out")
    assert index["metadata"] == {"total_parameters": model.num_parameters(), "total_size": sum(map(sum, sizes))}


def test_a_sharded_base_becomes_one_file_on_request(tiny_sharded: Path, tmp_path: Path) -> None:
    write_hf(plan_hf(plan_merge(Checkpoint.open(tiny_sharded), []).model(), 1 << 30), tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").glob("*safetensors*")] == ["model.safetensors"]
    assert raw(tmp_path / "out") == raw(tiny_sharded)
    loaded(tmp_path / "out")
