"""A base from the hub: ``tune`` finds it as ``merge`` does, and ``merge`` finds the one that was tuned."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file

from fixtures.hub.server import serving
from fixtures.tiny import build_llama
from tests.support.hub import Site

TUNE = ("--data", "data.jsonl", "--new-token", "<ship>", "--steps", "1", "-o", "adapter")


@pytest.fixture
def site(base: Path, data: Path, tmp_path: Path) -> Iterator[Site]:
    """``org/base`` with the base at the tag v1 and another model at main."""
    with serving() as hub:
        hub.add("org/base", base, "v1", extra={"pytorch_model.bin": b"x", "modeling.py": b"y"})
        hub.add("org/base", build_llama(tmp_path / "later", tied=True, vocab=320, hidden=32, layers=1, seed=1))
        site = Site(hub, tmp_path / "home")
        site.home.mkdir()
        shutil.copy(data, site.work / "data.jsonl")
        yield site


def test_a_revision_is_tuned_recorded_and_merged_without_naming_it_again(site: Site, base: Path) -> None:
    tuned = site.run("tune", "org/base@v1", *TUNE)
    assert tuned.returncode == 0, tuned.stderr
    assert tuned.stderr.splitlines()[0] == "downloading org/base@v1"
    assert "pytorch_model.bin" not in site.hub.fetched()
    assert "modeling.py" not in site.hub.fetched()
    config = json.loads((site.work / "adapter" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("org/base", "v1")
    assert json.loads((site.work / "adapter" / "train.json").read_text())["base"] == "org/base"
    site.hub.requests.clear()
    merged = site.run("merge", "adapter", "-o", "merged", "-q", offline=True)
    assert (merged.returncode, merged.stderr, site.hub.requests) == (0, "", [])
    stored, expected = (load_file(folder / "model.safetensors") for folder in (site.work / "merged", base))
    name = "model.layers.0.mlp.up_proj.weight"
    assert stored[name].equal(expected[name])


def test_without_a_revision_none_is_recorded_and_the_cache_serves_offline(site: Site) -> None:
    assert site.run("plan", "org/base", "--to", "hf", "-q").returncode == 0
    site.hub.requests.clear()
    tuned = site.run("tune", "org/base", *TUNE, "-q", offline=True)
    assert (tuned.returncode, tuned.stderr, site.hub.requests) == (0, "", [])
    config = json.loads((site.work / "adapter" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("org/base", None)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("org/base@v9", "BASE: org/base@v9: .*no such revision"),
        ("org/absent", "BASE: org/absent@main: .*the repository does not exist or is private"),
        ("absent folder", "BASE: expected a path or a hub id, found 'absent folder', which does not exist"),
    ],
)
def test_a_base_that_cannot_be_found_is_one_line(name: str, message: str, site: Site) -> None:
    done = site.run("tune", name, *TUNE, "-q")
    assert (done.returncode, done.stdout, site.left()) == (4, "", ["data.jsonl"])
    assert done.stderr.count("\n") == 1
    assert re.search(message, done.stderr)
