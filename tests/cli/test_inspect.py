"""``ttexport inspect`` on ONNX: every model of a folder, with its precision and size."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from exporter.cli.main import run
from fixtures.models import families
from tests.formats.onnx.foreign import rewritten

Capture = pytest.CaptureFixture[str]

#: File → its precision in the output.
PRECISIONS = {
    "model.onnx": "F32",
    "model_q4.onnx": "int4 x 32 with zero points, int8 x 32, F32",
    "model_fp16.onnx": "F16",
    "model_int8.onnx": "int8 x 32, F32",
    "model_q4f16.onnx": "int4 x 32 with zero points, int8 x 32, F16",
    "model_sym_q4.onnx": "int4 x 32, int8 x 32, F32",
    "model_quantized.onnx": "int8 x 32, F32",
    "model_sym_q4f16.onnx": "int4 x 32, int8 x 32, F16",
}
QUANTS = ("fp32", "fp16", "int8", "q4", "q4-sym", "q4f16", "q4f16-sym")


def export(base: Path, out: Path, *quants: str) -> Path:
    options = [argument for quant in quants for argument in ("--quant", quant)]
    assert run(["export", str(base), "--to", "onnx", *options, "--verify", "off", "-q", "-o", str(out)]) == 0
    return out


def inspected(path: Path, capsys: Capture) -> dict[str, Any]:
    capsys.readouterr()
    assert run(["inspect", str(path), "--json"]) == 0
    document: dict[str, Any] = json.loads(capsys.readouterr().out)
    return document


def test_every_model_of_a_folder_is_listed(tiny_tied: Path, tmp_path: Path, capsys: Capture) -> None:
    folder = export(tiny_tied, tmp_path / "m", *QUANTS)
    document = inspected(folder, capsys)
    assert {model["file"]: model["precision"] for model in document["models"]} == {
        f"onnx/{name}": precision for name, precision in PRECISIONS.items()
    }
    for model in document["models"]:
        file = folder / model["file"]
        assert model["nbytes"] == file.stat().st_size + file.with_suffix(".onnx_data").stat().st_size
    assert document["facts"]["file"] == document["models"][0]["file"] == "onnx/model.onnx"
    assert run(["inspect", str(folder)]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown and precision in shown for name, precision in PRECISIONS.items())


def test_a_model_file_is_listed_alone(tiny_tied: Path, tmp_path: Path, capsys: Capture) -> None:
    folder = export(tiny_tied, tmp_path / "m", "fp32", "int8")
    document = inspected(folder / "onnx" / "model_int8.onnx", capsys)
    assert [(model["file"], model["precision"]) for model in document["models"]] == [
        ("model_int8.onnx", "int8 x 32, F32")
    ]


def test_codes_that_only_a_loop_over_experts_reads_are_listed(tmp_path: Path, capsys: Capture) -> None:
    base = families.build("mixtral", tmp_path / "base", dtype="float32")
    document = inspected(export(base, tmp_path / "m", "q4-sym"), capsys)
    assert [model["precision"] for model in document["models"]] == ["int4 x 32, int8 x 32, F32"]


@pytest.mark.parametrize(("quant", "precision"), [("q4", "int4 x 32 with zero points, F32"), ("q8", "U8, F32")])
def test_precisions_of_models_of_other_tools_are_read_from_their_graphs(
    tiny_tied: Path, tmp_path: Path, capsys: Capture, quant: str, precision: str
) -> None:
    folder = rewritten(export(tiny_tied, tmp_path / "m", "fp32"), tmp_path / "other", inside=True, quant=quant)
    [model] = inspected(folder, capsys)["models"]
    assert model == {
        "file": "onnx/model.onnx",
        "precision": precision,
        "nbytes": (folder / "onnx" / "model.onnx").stat().st_size,
    }


def test_a_variant_whose_data_is_missing_is_named(tiny_tied: Path, tmp_path: Path, capsys: Capture) -> None:
    folder = export(tiny_tied, tmp_path / "m", "fp32", "int8")
    (folder / "onnx" / "model_int8.onnx_data").unlink()
    assert run(["inspect", str(folder)]) == 4
    assert "model_int8.onnx_data" in capsys.readouterr().err
