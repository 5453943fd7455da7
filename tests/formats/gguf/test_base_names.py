"""A checkpoint that was saved from the base model lacks the prefix of the base model's tensors."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from exporter.verify.expect.reference import Reference
from exporter.verify.run import verify
from fixtures.models.families import build
from tests.conformance.gguf import digest
from tests.formats.gguf.conftest import Write


def without_prefix(base: Path, out: Path, prefix: str) -> Path:
    shutil.copytree(base, out)
    tensors = load_file(out / "model.safetensors")
    renamed = {name.removeprefix(prefix): value for name, value in tensors.items()}
    save_file(renamed, out / "model.safetensors", {"format": "pt"})
    return out


@pytest.mark.parametrize(("name", "prefix"), [("llama", "model."), ("gpt_neox", "gpt_neox."), ("gemma2", "model.")])
def test_names_without_the_prefix_give_the_same_tensors_and_pass_every_check_of_weights(
    tmp_path: Path, write: Write, name: str, prefix: str
) -> None:
    base = build(name, tmp_path / name)
    bare = without_prefix(base, tmp_path / "bare", prefix)
    out = write(bare)
    assert sorted(digest(out)["tensors"]) == sorted(digest(write(base))["tensors"])
    (report,) = verify([out], Reference.open(bare, []), level="weights")
    assert report.failures == []
