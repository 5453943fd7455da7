"""``patch --verify``: each level finds its kind of damage before anything is promoted."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from exporter.cli.main import run
from exporter.errors import UsageError
from exporter.patch import PatchSpec
from exporter.patch.gguf import run as gguf_run
from exporter.patch.onnx import run as onnx_run
from exporter.sources.gguf.file import GgufFile
from exporter.sources.journal import journal_of
from exporter.sources.onnx.file import OnnxFile
from exporter.tensors import Array
from exporter.verify.running import execution
from exporter.verify.runtimes import job
from tests.patch.test_defaults import assert_same, files
from tests.support.documents import read_report

Capture = pytest.CaptureFixture[str]
FORMATS = ("gguf", "onnx")
INNER = {"gguf": "blk.1.ffn_up.weight", "onnx": "layers.1.mlp.up_proj.weight"}


@pytest.fixture(scope="module")
def exported(tiny_tied: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The base in each format; read-only."""
    folder = tmp_path_factory.mktemp("exported")
    made = {"gguf": folder / "model.gguf", "onnx": folder / "model"}
    for name, path in made.items():
        assert run(["export", str(tiny_tied), "--to", name, "--verify", "off", "-q", "-o", str(path)]) == 0
    return made


@pytest.fixture(params=FORMATS)
def base(request: pytest.FixtureRequest, exported: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of the base in one format, alone in ``tmp_path``/base."""
    source, out = exported[request.param], tmp_path / "base" / exported[request.param].name
    out.parent.mkdir()
    return Path(shutil.copytree(source, out) if source.is_dir() else shutil.copy(source, out))


def patch(base: Path, adapter: Path, *arguments: object) -> int:
    return run(["patch", str(base), str(adapter), *map(str, arguments)])


def format_of(path: Path) -> str:
    return "onnx" if path.is_dir() else "gguf"


def corrupt_inner_weight(path: Path) -> None:
    """Another exponent in a row of an inner matrix that no sampled level reads."""
    if path.is_dir():
        place = OnnxFile.open(path / "onnx" / "model.onnx").initialisers[INNER["onnx"]].place
        assert place
        file, at = place.path, place.offset_bytes + 4 * 64 * 11 + 3
    else:
        tensor = GgufFile.open(path).tensors[INNER["gguf"]]
        file, at = path, tensor.offset_bytes + 11 * tensor.row_nbytes + 1
    data = bytearray(file.read_bytes())
    data[at] ^= 2
    file.write_bytes(data)


def test_full_runs_the_patched_artifact_and_joins_the_reports(
    base: Path, tiny_adapter: Path, tmp_path: Path, capsys: Capture
) -> None:
    out = tmp_path / f"out{base.suffix}"
    assert patch(base, tiny_adapter, "-o", tmp_path / "want", "-q") == 0
    before = files(base)
    capsys.readouterr()
    assert patch(base, tiny_adapter, "-o", out, "--verify", "full", "--json") == 0
    [artifact] = json.loads(capsys.readouterr().out)["artifacts"]
    report = artifact["verification"]
    names = [check["name"] for check in report["checks"]]
    assert (report["artifact"], report["level"], report["passed"]) == (str(out), "full", True)
    assert len(set(names)) == len(names)
    assert {"patch: untouched", "other tensors", "runs"} <= set(names)
    assert next(check for check in report["checks"] if check["name"] == "patch: untouched")["detail"].startswith("all ")
    assert report["facts"]["base"] == "recorded digest"
    assert report["profile"]
    assert_same(out, tmp_path / "want")
    assert files(base) == before


def test_full_in_place_runs_before_the_journal_goes(base: Path, tiny_adapter: Path, tmp_path: Path) -> None:
    assert patch(base, tiny_adapter, "-o", tmp_path / "want", "-q") == 0
    report = tmp_path / "report"
    assert patch(base, tiny_adapter, "--in-place", "--verify", "full", "--report", report, "-q") == 0
    assert_same(base, tmp_path / "want")
    [artifact] = read_report(report)["artifacts"]
    assert artifact["artifact"] == str(base)
    assert "runs" in [check["name"] for check in artifact["checks"]]
    assert list(base.parent.iterdir()) == [base]


@pytest.mark.parametrize("in_place", [False, True])
def test_a_wrong_result_of_a_runtime_promotes_nothing(
    base: Path, tiny_adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture, *, in_place: bool
) -> None:
    journals = []

    def corrupted(runtime: str, *arguments: Any) -> Callable[[str], Array]:
        journals.append(journal_of(base).exists())
        read = job.run(runtime, *arguments)

        def result(name: str) -> Array:
            values = read(name)
            return np.flip(values, -1) if runtime != "reference" and values.dtype.kind == "f" else values

        return result

    monkeypatch.setattr(execution, "run", corrupted)
    before, out = files(base), tmp_path / "out"
    arguments = ["--in-place"] if in_place else ["-o", out]
    assert patch(base, tiny_adapter, *arguments, "--verify", "full", "-q") == 3
    assert "not equivalent" in capsys.readouterr().err
    assert set(journals) == {in_place}
    assert files(base) == before
    assert list(base.parent.iterdir()) == [base]
    assert list(tmp_path.iterdir()) == [base.parent]


def test_an_inner_weight_that_was_damaged_before_the_patch_is_found_by_full_alone(
    base: Path, tiny_adapter: Path, tmp_path: Path, capsys: Capture
) -> None:
    corrupt_inner_weight(base)
    for level in ("rows", "weights"):
        assert patch(base, tiny_adapter, "-o", tmp_path / level, "--verify", level, "-q") == 0
    assert patch(base, tiny_adapter, "-o", tmp_path / "full", "--verify", "full", "-q") == 3
    assert "other tensors" in capsys.readouterr().err
    assert not (tmp_path / "full").exists()


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("level", ["weights", "full"])
def test_an_inner_weight_that_the_patch_damages_is_found_without_a_run(
    base: Path,
    tiny_adapter: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
    level: str,
    *,
    in_place: bool,
) -> None:
    module = {"gguf": gguf_run, "onnx": onnx_run}[format_of(base)]
    check_patched = module.check_patched

    def damaged(path: Path, before: Any) -> Any:
        corrupt_inner_weight(path)
        return check_patched(path, before)

    monkeypatch.setattr(module, "check_patched", damaged)
    arguments = ["--in-place"] if in_place else ["-o", tmp_path / "out"]
    assert patch(base, tiny_adapter, *arguments, "--verify", level, "--report", tmp_path / "report", "-q") == 3
    printed = capsys.readouterr().err
    assert f"not equivalent: untouched: expected at most 0, found 1: {INNER[format_of(base)]}" in printed
    [artifact] = read_report(tmp_path / "report")["artifacts"]
    assert [skip["name"] for skip in artifact["skipped"]] == (["run"] if level == "full" else [])
    assert not (tmp_path / "out").exists()
    assert list(base.parent.iterdir()) == [base]


def test_a_split_model_is_verified_in_place_and_reported(
    exported: dict[str, Path], tiny_tied: Path, tiny_adapter: Path, tmp_path: Path
) -> None:
    arguments = ["export", str(tiny_tied), "--to", "gguf", "--split-max-tensors", "8", "--verify", "off", "-q"]
    assert run([*arguments, "-o", str(tmp_path / "base" / "m.gguf")]) == 0
    first, *others = sorted((tmp_path / "base").iterdir())
    assert len(others) == 2
    assert patch(first, tiny_adapter, "-o", tmp_path / "want" / first.name, "-q") == 0
    report = tmp_path / "report"
    assert patch(first, tiny_adapter, "--in-place", "--verify", "weights", "--report", report, "-q") == 0
    assert_same(first.parent, tmp_path / "want")
    assert [entry["file"] for entry in read_report(report)["files"]] == [path.name for path in (first, *others)]


def orphan(adapter: Path, out: Path) -> Path:
    """A copy of an adapter; the base that it names does not exist."""
    shutil.copytree(adapter, out)
    config = json.loads((out / "adapter_config.json").read_text()) | {"base_model_name_or_path": "some/where"}
    (out / "adapter_config.json").write_text(json.dumps(config))
    return out


@pytest.mark.parametrize("verb", ["patch", "plan"])
@pytest.mark.parametrize("place", ["-o", "--in-place"])
def test_full_without_a_base_checkpoint_is_a_usage_error(
    base: Path, tiny_adapter: Path, tmp_path: Path, capsys: Capture, verb: str, place: str
) -> None:
    adapter = orphan(tiny_adapter, tmp_path / "orphan")
    arguments = [place, str(tmp_path / "out")] if place == "-o" else [place]
    for missing in ([str(adapter)], [str(tiny_adapter), "--trust-base"]):
        assert run([verb, str(base), *missing, *arguments, "--verify", "full"]) == 2
        printed = capsys.readouterr().err
        assert "--verify full: expected --base CHECKPOINT" in printed
        assert printed.count("\n") == 1
    assert list(base.parent.iterdir()) == [base]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", FORMATS)
def test_full_without_its_runtimes_is_refused_before_anything_is_written(
    exported: dict[str, Path],
    tiny_adapter: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
    content: str,
) -> None:
    needed = {"gguf": "transformers", "onnx": "onnxruntime"}[content]
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == needed else find_spec(name))
    assert patch(exported[content], tiny_adapter, "-o", tmp_path / "out", "--verify", "full") == 6
    assert f"--verify full needs {needed}" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_trusted_base_is_proved_by_the_run_alone(
    exported: dict[str, Path], tiny_tied: Path, tiny_adapter: Path, tmp_path: Path, capsys: Capture
) -> None:
    other = Path(shutil.copytree(tiny_tied, tmp_path / "other"))
    weights = load_file(other / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    weights[name] = -weights[name]
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    arguments = ["-o", tmp_path / "out.gguf", "--verify", "full", "--trust-base", "--base"]
    assert patch(exported["gguf"], tiny_adapter, *arguments, other, "-q") == 3
    assert not (tmp_path / "out.gguf").exists()
    capsys.readouterr()
    assert patch(exported["gguf"], tiny_adapter, *arguments, tiny_tied, "--json") == 0
    assert json.loads(capsys.readouterr().out)["proof"] == "trusted"
    assert patch(exported["gguf"], tiny_adapter, "-o", tmp_path / "want", "--trust-base", "-q") == 0
    assert_same(tmp_path / "out.gguf", tmp_path / "want")


def test_every_verb_takes_the_same_levels(
    exported: dict[str, Path], tiny_adapter: Path, tmp_path: Path, capsys: Capture
) -> None:
    arguments = [str(exported["gguf"]), str(tiny_adapter)]
    for level in ("off", "rows", "weights", "full"):
        assert run(["plan", *arguments, "--verify", level, "-q"]) == 0
    for verb in ("patch", "plan"):
        assert run([verb, *arguments, "-o", str(tmp_path / "out"), "--verify", "auto"]) == 2
        assert "'off', 'rows', 'weights', 'full'" in capsys.readouterr().err
    with pytest.raises(UsageError, match="expected off, rows, weights, full, found 'auto'"):
        PatchSpec(base=exported["gguf"], adapters=(str(tiny_adapter),), level="auto")
