"""``plan --to onnx`` names the maker of the graph: a family's description, or a trace."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from exporter.cli.main import run
from fixtures.models import seq2seq, tie_layouts

FAMILY, TRACED, SEQ2SEQ = "family graph", "traced", "traced encoder-decoder"


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One checkpoint for each maker; the plan reads config and headers alone."""
    folder = tmp_path_factory.mktemp("makers")
    made = {
        FAMILY: tie_layouts.build(folder / "llama", "llama", "tied"),
        TRACED: tie_layouts.build(folder / "other", "llama", "tied"),
        SEQ2SEQ: seq2seq.build(folder / "t5", "t5"),
    }
    rename(made[TRACED], "unknown-type")
    return made


def rename(base: Path, model_type: str) -> None:
    path = base / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_type": model_type}))


@pytest.mark.parametrize("maker", [FAMILY, TRACED, SEQ2SEQ])
def test_the_maker_is_named_in_text_and_json(
    maker: str, bases: dict[str, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(["plan", "--to", "onnx", str(bases[maker])]) == 0
    assert f"onnx: {maker}\n" in capsys.readouterr().out
    assert run(["plan", "--to", "onnx", "--to", "hf", str(bases[maker]), "--json"]) == 0
    onnx, hf = json.loads(capsys.readouterr().out)["targets"]
    assert (onnx["format"], onnx["maker"]) == ("onnx", maker)
    assert (hf["format"], hf["maker"]) == ("hf", None)


def test_both_files_of_an_encoder_decoder_are_counted(
    bases: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = {}
    for fmt in ("onnx", "hf"):
        assert run(["plan", "--to", fmt, str(bases[SEQ2SEQ]), "--json"]) == 0
        (target,) = json.loads(capsys.readouterr().out)["targets"]
        sizes[fmt] = target["nbytes"]
    assert sizes["onnx"] - sizes["hf"] == 4 * seq2seq.VOCAB * seq2seq.HIDDEN


@pytest.mark.parametrize("option", [["--quant", "int8"], ["--dtype", "f16"], ["--onnx-ops", "ort"]])
def test_options_that_a_traced_model_does_not_have_are_refused(
    option: list[str], bases: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["plan", "--to", "onnx", str(bases[SEQ2SEQ]), *option]) == 5
    assert "a traced model can be written only in fp32 with standard operators" in capsys.readouterr().err


def test_other_encoder_decoders_are_refused_before_anything_is_traced(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rename(base := seq2seq.build(tmp_path / "base", "t5"), "novel")
    assert run(["plan", "--to", "onnx", str(base)]) == 5
    assert (
        "encoder-decoder models of type 'novel' are not supported (supported types: t5, mt5" in capsys.readouterr().err
    )
