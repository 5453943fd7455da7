"""Split GGUF files: split as by llama.cpp's writer, read by llama.cpp, patched part by part."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFWriter

from exporter.cli.main import run
from exporter.errors import UnreadableFile, UsageError
from exporter.formats.gguf.options import GgufOptions
from exporter.formats.gguf.split import Split, split_file
from exporter.sources.gguf.split_files import GgufModel
from tests.formats.gguf import runtime

Capture = pytest.CaptureFixture[str]


def by_gguf_py(path: Path, size: int = 0, tensors: int = 0) -> None:
    gguf = GGUFWriter(path, "llama", split_max_size=size, split_max_tensors=tensors)
    gguf.add_uint32("llama.block_count", 2)
    gguf.add_token_list(["a", "b"])
    for number, rows in enumerate((3, 1, 8, 5, 2, 30, 1)):
        gguf.add_tensor(f"blk.{number}.weight", np.full((rows, 9), number, np.float32))
    gguf.write_header_to_file()
    gguf.write_kv_data_to_file()
    gguf.write_tensors_to_file()
    gguf.close()


@pytest.mark.parametrize(
    ("limits", "split"),
    [
        ({"tensors": 2}, Split(max_tensors=2)),
        ({"size": 400}, Split(max_nbytes=400)),
        ({"size": 1000, "tensors": 3}, Split(1000, 3)),
        ({"size": 100_000}, Split(max_nbytes=100_000)),
    ],
    ids=["tensors", "size", "both", "one part"],
)
def test_parts_are_those_of_llama_cpps_writer(tmp_path: Path, limits: dict[str, int], split: Split) -> None:
    (tmp_path / "want").mkdir()
    (tmp_path / "got").mkdir()
    by_gguf_py(tmp_path / "want" / "m.gguf", **limits)
    by_gguf_py(tmp_path / "got" / "m.gguf")
    split_file(tmp_path / "got" / "m.gguf", split)
    want, got = ({part.name: part.read_bytes() for part in (tmp_path / name).iterdir()} for name in ("want", "got"))
    assert got == want


def test_split_model_runs_in_llama_cpp_like_the_whole_one(
    tiny_tied: Path, tiny_adapter: Path, tmp_path: Path, capsys: Capture
) -> None:
    args = ["merge", str(tiny_adapter), "--to", "gguf", "-q"]
    assert run([*args, "-o", str(tmp_path / "whole.gguf")]) == 0
    capsys.readouterr()
    assert run([*args, "-o", str(tmp_path / "m.gguf"), "--split-max-size", "50K", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    parts = sorted(tmp_path.glob("m-*"))
    assert len(parts) > 3
    assert document["artifacts"][0]["path"] == document["artifacts"][0]["verification"]["artifact"] == str(parts[0])
    assert document["artifacts"][0]["nbytes"] == sum(part.stat().st_size for part in parts)
    assert all(part.stat().st_size < 52_000 for part in parts[1:])  # data and a small header
    ids = [1, 300, 17, 2, 40]
    assert np.array_equal(runtime.logits(parts[0], ids), runtime.logits(tmp_path / "whole.gguf", ids))


def test_several_quantisations_are_each_split_and_verified_as_a_whole(
    tiny_tied: Path, tiny_adapter: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    args = ["merge", str(tiny_adapter), "--to", "gguf", "--quant", "Q8_0", "--quant", "Q4_0", "-q", "-o", str(out)]
    assert run([*args, "--split-max-tensors", "12"]) == 0
    assert sorted(path.name for path in (out / "gguf").iterdir()) == [
        *(f"rows-Q4_0-0000{number}-of-00002.gguf" for number in (1, 2)),
        *(f"rows-Q8_0-0000{number}-of-00002.gguf" for number in (1, 2)),
    ]
    report = json.loads((out / "report.json").read_text())
    assert [Path(artifact["artifact"]).name for artifact in report["artifacts"]] == [
        "rows-Q8_0-00001-of-00002.gguf",
        "rows-Q4_0-00001-of-00002.gguf",
    ]
    argv = ["verify", str(out), "--reference", str(tiny_tied), "--adapter", str(tiny_adapter), "--level", "rows"]
    assert run(argv) == 0


def test_existing_parts_are_kept_unless_forced(tiny_tied: Path, tmp_path: Path, capsys: Capture) -> None:
    args = [
        "export",
        str(tiny_tied),
        "--to",
        "gguf",
        "-q",
        "-o",
        str(tmp_path / "m.gguf"),
        "--split-max-tensors",
        "15",
    ]
    (tmp_path / "m-00002-of-00002.gguf").write_text("mine")
    assert run(args) == 7
    assert "--force" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["m-00002-of-00002.gguf"]
    assert run([*args, "--force"]) == 0
    assert len(GgufModel.open(tmp_path / "m-00001-of-00002.gguf").files) == 2


@pytest.mark.parametrize("tokens", ["known", "new"])
@pytest.mark.parametrize("tie", ["tied", "untied"])
def test_a_split_base_is_patched_part_by_part(
    wide_tied: Path, wide_untied: Path, wide_adapters: dict[str, Path], tmp_path: Path, tie: str, tokens: str
) -> None:
    adapter, base = wide_adapters[f"{tie}-{tokens}"], {"tied": wide_tied, "untied": wide_untied}[tie]
    options = ["--to", "gguf", "--quant", "Q4_K_M", "--split-max-tensors", "6", "-q"]
    assert run(["export", str(base), *options, "-o", str(tmp_path / "base.gguf")]) == 0
    assert run(["merge", str(adapter), *options, "-o", str(tmp_path / "want.gguf")]) == 0
    first = next(tmp_path.glob("base-00001-of-*"))
    argv = ["patch", str(first), str(adapter), "-q"]
    assert run([*argv, "-o", str(tmp_path / "got.gguf"), "--verify", "full"]) == 0
    want, got = ([part.read_bytes() for part in sorted(tmp_path.glob(f"{name}-*"))] for name in ("want", "got"))
    assert got == want
    assert run([*argv, "--in-place"]) == (5 if tokens == "new" else 0)
    if tokens == "known":
        assert [part.read_bytes() for part in sorted(tmp_path.glob("base-*"))] == want


@pytest.mark.parametrize("damage", ["missing", "swapped", "second alone", "renamed"])
def test_parts_that_do_not_belong_together_are_refused(tiny_tied: Path, tmp_path: Path, damage: str) -> None:
    args = ["export", str(tiny_tied), "--to", "gguf", "-q", "-o", str(tmp_path / "m.gguf"), "--split-max-tensors", "8"]
    assert run(args) == 0
    parts = sorted(tmp_path.iterdir())
    path = parts[0]
    if damage == "missing":
        parts[2].unlink()
    elif damage == "swapped":
        shutil.copy(parts[1], parts[2])
    elif damage == "second alone":
        path = parts[1]
    else:
        path = parts[0].rename(tmp_path / "model.gguf")
    with pytest.raises(UnreadableFile, match=r"expected|no such file"):
        GgufModel.open(path)


@pytest.mark.parametrize("size", ["2", "0G", "-1M", "G"])
def test_invalid_sizes_are_usage_errors(size: str) -> None:
    with pytest.raises(UsageError, match="split_max_size: expected a size such as"):
        GgufOptions.parse({"split_max_size": size})


def test_options_without_gguf_are_usage_errors(tiny_tied: Path, tmp_path: Path, capsys: Capture) -> None:
    assert run(["export", str(tiny_tied), "--to", "hf", "--split-max-size", "1G", "-o", str(tmp_path / "x")]) == 2
    assert run(["export", str(tiny_tied), "--to", "gguf", "--split-max-tensors", "0", "-o", str(tmp_path / "x")]) == 2
    assert capsys.readouterr().err.count("--split-max") >= 2
