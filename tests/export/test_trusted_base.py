"""An adapter of ``ttexport tune`` on another base of the same shape: exit code 4, and --trust-base goes on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import ttexport
from exporter.cli.main import run
from exporter.errors import BadInput
from exporter.sources.hf.checkpoint import Checkpoint
from tuner.cli import main as tune

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def tuned(tiny_tied: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of a new token, trained on ``tiny_tied``."""
    folder = tmp_path_factory.mktemp("tuned")
    (folder / "data.jsonl").write_text('{"text": "the <x> and the <x>"}\n')
    argv = [str(tiny_tied), "--data", str(folder / "data.jsonl"), "--new-token", "<x>", "--steps", "2", "-q"]
    assert tune([*argv, "-o", str(folder / "adapter")]) == 0
    return folder / "adapter"


@pytest.fixture(scope="module")
def other(tiny_tied: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base of the same shape with other values."""
    folder = Path(shutil.copytree(tiny_tied, tmp_path_factory.mktemp("other") / "base"))
    tensors = load_file(folder / "model.safetensors")
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].flip(0).contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def digests(adapter: Path, base: Path) -> tuple[str, str]:
    """The digests that the adapter records and that the base has, as messages show them."""
    recorded: str = json.loads((adapter / "train.json").read_text())["base_digest"]
    return recorded[:12], Checkpoint.open(base).embedding_digest[:12]


def test_another_base_of_the_same_shape_is_refused_in_every_verb(
    tuned: Path, other: Path, tiny_tied: Path, tmp_path: Path, capsys: Capture
) -> None:
    gguf, merged, out, toml = (tmp_path / name for name in ("m.gguf", "merged", "out", "release.toml"))
    assert run(["export", str(other), "--to", "gguf", "-o", str(gguf), "-q"]) == 0
    assert run(["merge", str(tuned), "--base", str(tiny_tied), "-o", str(merged), "-q"]) == 0
    text = f'name = "m"\nversion = "1"\nbase = "{other}"\n%s[models.m]\nadapters = ["{tuned}"]\n[hf]\n'
    toml.write_text(text % "" + '[verify]\nlevel = "rows"\n')
    capsys.readouterr()
    calls = [["merge", tuned, "--base", other, "--to", name, "-o", out] for name in ("hf", "gguf", "onnx", "gguf-lora")]
    calls += [["export", tuned, "--base", other, "-o", out], ["plan", tuned, "--base", other]]
    calls += [["verify", merged, "--reference", other, "--adapter", tuned, "--level", "rows"]]
    calls += [["patch", gguf, tuned, "--base", other, "-o", out], ["release", toml, "-o", out]]
    trained_on, given = digests(tuned, other)
    for call in calls:
        assert run([*map(str, call)]) == 4, call
        err = capsys.readouterr().err
        assert err.count("\n") == 1, err
        assert f"train.json: base_digest: expected the digest of model.embed_tokens.weight in {other} ({given})" in err
        assert f"found {trained_on}, of {tiny_tied}" in err
        assert "--trust-base" in err
        assert not out.exists()
    toml.write_text(text % "trust-base = true\n" + '[verify]\nlevel = "rows"\n')
    assert run(["release", str(toml), "-o", str(out), "-q"]) == 0
    assert "warning: " in capsys.readouterr().err


@pytest.mark.parametrize("target", ["hf", "gguf"])
def test_trust_base_goes_on_with_a_warning(
    target: str, tuned: Path, other: Path, tmp_path: Path, capsys: Capture
) -> None:
    argv = [str(tuned), "--base", str(other), "--to", target, "--trust-base"]
    assert run(["plan", *argv, "--json"]) == 0
    captured = capsys.readouterr()
    assert len(json.loads(captured.out)["warnings"]) == 1
    assert captured.err.startswith("warning: ")
    assert run(["merge", *argv, "-o", str(tmp_path / "out")]) == 0
    err = capsys.readouterr().err
    assert err.count("warning: ") == 1
    assert "the adapter is merged nevertheless, because trust-base is set" in err
    if target == "hf":
        argv = ["verify", str(tmp_path / "out"), "--reference", str(other), "--adapter", str(tuned), "--trust-base"]
        assert run([*argv, "--level", "weights"]) == 0
        assert "warning: " in capsys.readouterr().err


def test_the_same_base_elsewhere_and_in_other_shards_is_no_contradiction(
    tuned: Path, tiny_tied: Path, tmp_path: Path, capsys: Capture
) -> None:
    tensors = load_file(tiny_tied / "model.safetensors")
    copy = Path(shutil.copytree(tiny_tied, tmp_path / "copy"))
    (copy / "model.safetensors").unlink()
    names = {name: f"model-{1 + (name > 'model.m')}.safetensors" for name in tensors}
    for shard in set(names.values()):
        part = {name: tensors[name] for name in names if names[name] == shard}
        save_file(part, copy / shard, metadata={"format": "pt"})
    (copy / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    assert run(["merge", str(tuned), "--base", str(copy), "-o", str(tmp_path / "out"), "-q"]) == 0
    assert capsys.readouterr().err == ""


def test_the_python_functions_take_the_option(tuned: Path, other: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="base_digest"):
        ttexport.merge(tuned, base=other, out=tmp_path / "out")
    options = ttexport.MergeOptions(trust_base=True)
    made = ttexport.merge(tuned, base=other, out=tmp_path / "out", options=options)
    with pytest.raises(BadInput, match="base_digest"):
        ttexport.verify(made.out, reference=other, adapters=[tuned], options=ttexport.VerifyOptions(level="rows"))
    [report] = ttexport.verify(
        made.out, reference=other, adapters=[tuned], trust_base=True, options=ttexport.VerifyOptions(level="rows")
    )
    assert report.passed
    assert torch.equal(
        load_file(other / "model.safetensors")["model.norm.weight"],
        load_file(made.out / "model.safetensors")["model.norm.weight"],
    )
