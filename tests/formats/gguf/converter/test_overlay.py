"""The overlay that the converter reads: links for what is unchanged, one file for what is changed."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from exporter.formats.gguf.converter.overlay import Overlay, plan_overlay, write_overlay
from exporter.formats.hf.write import plan_hf, write_hf
from exporter.merge.plan import MergePlan, plan_merge
from exporter.sources.hf.checkpoint import Checkpoint
from exporter.sources.hf.safetensors import read_tensors
from exporter.sources.peft.adapter import Adapter
from tests.formats.gguf.converter.overlays import flattened

INDEX = "model.safetensors.index.json"


def planned(base: Path, *adapters: Path) -> MergePlan:
    return plan_merge(Checkpoint.open(base), [Adapter.open(path) for path in adapters])


def written(plan: MergePlan, folder: Path) -> tuple[Overlay, Path]:
    overlay = plan_overlay(plan.model(), plan.model())
    write_overlay(overlay, folder)
    return overlay, folder


@pytest.fixture(params=["one file", "shards"])
def base(request: pytest.FixtureRequest, tiny_untied: Path, tmp_path: Path) -> Path:
    """A checkpoint in one file, or in several files."""
    if request.param == "one file":
        return tiny_untied
    write_hf(plan_hf(planned(tiny_untied).model(), 40_000), tmp_path / "shards")
    return tmp_path / "shards"


def test_changed_tensors_are_written_and_files_of_the_base_are_linked(
    base: Path, tiny_adapter: Path, tmp_path: Path
) -> None:
    plan = planned(base, tiny_adapter)
    overlay, folder = written(plan, tmp_path / "overlay")
    tie = plan.tie
    assert set(overlay.own) == {tie.embedding, tie.head}
    shards = [folder / name for name in sorted(overlay.shards)]
    written_files = [path for path in shards if not path.is_symlink()]
    assert [name for path in written_files for name in read_tensors(path)] == list(overlay.own)
    # A linked file with a changed tensor is followed by the file with the merged tensor.
    assert len(shards) == len([*base.glob("*.safetensors")]) + (len(written_files) == 1)
    # The converter compares the names in the index with the names in all files.
    places = json.loads((folder / INDEX).read_text())["weight_map"]
    assert places.keys() == {name for path in shards for name in read_tensors(path)}
    for name, shard in places.items():
        assert name in read_tensors(folder / shard)
        assert (name in overlay.own) == (not (folder / shard).is_symlink())
        assert shard == max(path.name for path in shards if name in read_tensors(path))
    files = [path for path in folder.iterdir() if not path.is_symlink()]
    small = sum(path.stat().st_size for path in files) - overlay.nbytes
    assert small < 20_000  # config, index and the header of the own file


def test_the_tensors_of_the_index_are_those_of_the_merged_checkpoint(
    base: Path, tiny_adapter: Path, tmp_path: Path
) -> None:
    plan = planned(base, tiny_adapter)
    _, folder = written(plan, tmp_path / "overlay")
    write_hf(plan_hf(plan.model()), tmp_path / "merged")
    got, want = Checkpoint.open(flattened(folder, tmp_path / "flat")), Checkpoint.open(tmp_path / "merged")
    assert got.tensors.keys() == want.tensors.keys()
    for name, tensor in want.tensors.items():
        assert np.array_equal(got.tensors[name].rows(0, tensor.spec.n_rows), tensor.rows(0, tensor.spec.n_rows))
    settings = json.loads((tmp_path / "merged" / "tokenizer_config.json").read_text())
    settings["chat_template"] = (tmp_path / "merged" / "chat_template.jinja").read_text()
    assert json.loads((folder / "tokenizer_config.json").read_text()) == settings, "the converter prefers this file"
    for path in (tmp_path / "merged").iterdir():
        if not path.name.startswith(("model", "tokenizer_config", "chat_template")):
            assert (folder / path.name).read_bytes() == path.read_bytes()


def test_a_base_without_adapters_is_linked_as_it_is(base: Path, tmp_path: Path) -> None:
    overlay, folder = written(planned(base), tmp_path / "overlay")
    assert overlay.nbytes == 0
    assert all(path.is_symlink() for path in folder.glob("*.safetensors"))


def test_trained_rows_are_rounded_once_if_a_dtype_is_requested(
    tiny_untied: Path, tiny_adapter: Path, tmp_path: Path
) -> None:
    plan = planned(tiny_untied, tiny_adapter)
    overlay = plan_overlay(plan.model(), plan.model("F32"))
    assert {overlay.values.specs[name].dtype for name in overlay.own} == {"F32"}
    assert set(overlay.own) == {plan.tie.embedding, plan.tie.head}


def test_a_file_with_a_tensor_that_the_merge_drops_is_not_linked(tiny_untied: Path, tmp_path: Path) -> None:
    model = planned(tiny_untied).model()
    [dropped, *kept] = model.tensors
    smaller = type(model)(**{**vars(model), "tensors": {name: model.tensors[name] for name in kept}})
    overlay = plan_overlay(smaller, smaller)
    assert overlay.contents == (tuple(kept),)
    write_overlay(overlay, tmp_path / "overlay")
    (file,) = (tmp_path / "overlay").glob("*.safetensors")
    assert dropped not in read_tensors(file)


def test_files_are_copied_where_links_are_impossible(
    tiny_untied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object, **more: object) -> None:
        raise OSError("no links here")

    monkeypatch.setattr(os, "symlink", refuse)
    _, folder = written(planned(tiny_untied), tmp_path / "overlay")
    (file,) = folder.glob("*.safetensors")
    assert not file.is_symlink()
    assert file.read_bytes() == (tiny_untied / "model.safetensors").read_bytes()
    shutil.rmtree(folder)
