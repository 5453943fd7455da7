"""A quantised base in every verb and format: merged where token rows are stored as floats, else one line."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from exporter.cli.main import run
from exporter.sources.hf.safetensors import FileTensor, read_tensors
from exporter.tensors import Array, read
from fixtures.adapters import load, stock_rows
from fixtures.hostile import rawtensors
from fixtures.models.quantised import build_mxfp4, quantise
from tests.support.trained import TRAINED_IDS
from tuner.cli import main as tune

Capture = pytest.CaptureFixture[str]
PACKED = ("bnb 4bit", "bnb 8bit", "gptq", "awq", "compressed")
FORMATS = ("hf", "gguf", "gguf-lora", "onnx")


@pytest.fixture(scope="module")
def lora(tiny_tied: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stock LoRA of linear layers."""
    folder = tmp_path_factory.mktemp("lora")
    get_peft_model(load(tiny_tied), LoraConfig(target_modules=["q_proj"])).save_pretrained(str(folder))
    return folder


@pytest.fixture(scope="module")
def mxfp4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_mxfp4(tmp_path_factory.mktemp("mxfp4") / "gpt-oss")


@pytest.fixture
def base(request: pytest.FixtureRequest, tiny_tied: Path, tmp_path: Path) -> Path:
    """The tiny llama, quantised by the method that the test names."""
    return quantise(tiny_tied, tmp_path / "Llama-3.2-1B-bnb-4bit", request.param)


def line(capsys: Capture) -> str:
    err = capsys.readouterr().err
    assert err.count("\n") == 1, err
    return err


@pytest.mark.parametrize("base", PACKED, indirect=True)
@pytest.mark.parametrize("kind", ["rows", "lora"])
def test_a_packed_base_is_one_line_in_every_verb_and_format(
    base: Path, kind: str, tiny_tied: Path, tiny_adapter: Path, lora: Path, tmp_path: Path, capsys: Capture
) -> None:
    adapter, out = tiny_adapter if kind == "rows" else lora, tmp_path / "out"
    data, toml, gguf = tmp_path / "data.jsonl", tmp_path / "release.toml", tmp_path / "model.gguf"
    data.write_text('{"text": "a b"}\n')
    toml.write_text(
        f'name = "m"\nversion = "1"\nbase = "{base}"\n[models.m]\nadapters = ["{adapter}"]\n[hf]\n'
        '[verify]\nlevel = "rows"\n'
    )
    assert run(["export", str(tiny_tied), "--to", "gguf", "-o", str(gguf), "-q"]) == 0
    assert run(["merge", str(tiny_adapter), "--base", str(tiny_tied), "-o", str(tmp_path / "merged"), "-q"]) == 0
    capsys.readouterr()
    calls = [["merge", adapter, "--base", base, "--to", name, "-o", out] for name in FORMATS]
    calls += [["export", base, "--to", name, "-o", out] for name in ("hf", "gguf", "onnx")]
    calls += [["plan", adapter, "--base", base, "--to", name] for name in FORMATS]
    calls += [["verify", tmp_path / "merged", "--reference", base, "--adapter", adapter, "--level", "rows"]]
    calls += [["patch", gguf, adapter, "--base", base, "-o", out]]
    calls += [["release", toml, "-o", out]]
    for call in calls:
        assert run([*map(str, call)]) == 4, call
        shown = line(capsys)
        assert "expected a full-precision base, found " in shown, call
        assert "use the unquantised checkpoint Llama-3.2-1B as the base" in shown, call
        assert not out.exists()
    assert tune([str(base), "--data", str(data), "--new-token", "<x>", "-o", str(out)]) == 4
    assert "expected a full-precision base, found " in line(capsys)


@pytest.mark.parametrize("base", ["fp8", "compressed fp8"], indirect=True)
def test_an_fp8_base_takes_rows_and_no_updates(
    base: Path, tiny_adapter: Path, lora: Path, tmp_path: Path, capsys: Capture
) -> None:
    out = tmp_path / "out"
    assert run(["merge", str(lora), "--base", str(base), "-o", str(out)]) == 4
    assert "expected a full-precision base to merge updates of weight matrices, found FP8" in line(capsys)
    for name in ("gguf", "onnx"):
        assert run(["merge", str(tiny_adapter), "--base", str(base), "--to", name, "-o", str(out)]) == 5
        assert "the matrices of the base are quantised with FP8" in line(capsys)
        assert run(["plan", str(tiny_adapter), "--base", str(base), "--to", name, "-q"]) == 5
        assert "use --to hf to merge token rows into this base" in line(capsys)
    assert run(["merge", str(tiny_adapter), "--base", str(base), "--untie", "-o", str(out)]) == 5
    assert "--untie" in line(capsys)
    assert not out.exists()
    check_merged(base, tiny_adapter, out, ["model.embed_tokens.weight"])


def test_an_mxfp4_base_takes_rows(mxfp4: Path, tmp_path: Path, capsys: Capture) -> None:
    adapter, out = stock_rows(mxfp4, tmp_path / "rows", TRAINED_IDS), tmp_path / "out"
    capsys.readouterr()
    check_merged(mxfp4, adapter, out, ["model.embed_tokens.weight"])
    for name in ("gguf", "onnx"):
        assert run(["merge", str(adapter), "--base", str(mxfp4), "--to", name, "-o", str(tmp_path / "x")]) == 5
        assert "the matrices of the base are quantised with MXFP4" in line(capsys)


def check_merged(base: Path, adapter: Path, out: Path, changed: list[str]) -> None:
    """Only rows of the tensors ``changed`` differ from the base; the config still states the quantisation."""
    argv = ["merge", str(adapter), "--base", str(base), "-q"]
    assert run([*argv, "--verify", "weights", "-o", str(out)]) == 0
    ours, theirs = read_tensors(out / "model.safetensors"), read_tensors(base / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if content(ours[name]) != content(theirs[name])] == changed
    rows = load_file(adapter / "adapter_model.safetensors")[
        "base_model.model.model.embed_tokens.trainable_tokens_delta"
    ]
    ids = json.loads((adapter / "adapter_config.json").read_text())["token_indices"]
    assert (load_file(out / "model.safetensors")["model.embed_tokens.weight"][ids] == rows.bfloat16()).all()
    configs = [json.loads((folder / "config.json").read_text()) for folder in (out, base)]
    assert configs[0]["quantization_config"] == configs[1]["quantization_config"]


def content(tensor: FileTensor) -> tuple[object, bytes]:
    value: Array = read(tensor)
    return tensor.spec, value.tobytes()


@pytest.mark.parametrize("dtype", ["bf16", "f16", "f32"])
@pytest.mark.parametrize("base", ["fp8", "compressed fp8"], indirect=True)
def test_dtype_leaves_the_scales_alone(base: Path, dtype: str, tiny_adapter: Path, tmp_path: Path) -> None:
    argv = ["merge", str(tiny_adapter), "--base", str(base), "--dtype", dtype, "--verify", "weights", "-q"]
    assert run([*argv, "-o", str(tmp_path / "out")]) == 0
    ours, theirs = read_tensors(tmp_path / "out" / "model.safetensors"), read_tensors(base / "model.safetensors")
    scales = [name for name in theirs if "scale" in name]
    assert scales
    assert all(content(ours[name]) == content(theirs[name]) for name in scales)
    assert ours["model.norm.weight"].spec.dtype == dtype.upper()


@pytest.mark.parametrize("base", ["fp8"], indirect=True)
def test_verify_finds_scales_that_were_cast(base: Path, tiny_adapter: Path, tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "out"
    assert run(["merge", str(tiny_adapter), "--base", str(base), "-o", str(out), "-q"]) == 0
    tensors = load_file(out / "model.safetensors")
    name = next(name for name in tensors if name.endswith("weight_scale_inv"))
    save_file(tensors | {name: tensors[name].bfloat16()}, out / "model.safetensors", metadata={"format": "pt"})
    capsys.readouterr()
    argv = ["verify", str(out), "--reference", str(base), "--adapter", str(tiny_adapter), "--level", "weights", "-q"]
    assert run(argv) == 3
    assert name in line(capsys)


@pytest.mark.parametrize("base", ["fp8"], indirect=True)
def test_a_merged_fp8_model_computes_what_transformers_and_peft_compute(
    base: Path, tiny_adapter: Path, tmp_path: Path
) -> None:
    argv = ["merge", str(tiny_adapter), "--base", str(base), "--verify", "full", "-q"]
    assert run([*argv, "-o", str(tmp_path / "out")]) == 0


@pytest.mark.parametrize("base", ["fp8"], indirect=True)
def test_rows_that_were_trained_on_an_fp8_base_are_merged_into_it(base: Path, tmp_path: Path, capsys: Capture) -> None:
    data, adapter = tmp_path / "data.jsonl", tmp_path / "adapter"
    data.write_text('{"text": "the <x> and the <x>"}\n')
    argv = [str(base), "--data", str(data), "--new-token", "<x>", "--steps", "2", "-q"]
    assert tune([*argv, "--lora-rank", "2", "-o", str(adapter)]) == 4
    assert "to merge updates of weight matrices, found FP8" in line(capsys)
    assert tune([*argv, "-o", str(adapter)]) == 0
    assert run(["merge", str(adapter), "--base", str(base), "-o", str(tmp_path / "out"), "-q"]) == 0


@pytest.mark.parametrize("base", ["fp8"], indirect=True)
def test_an_artifact_of_another_maker_is_patched_and_its_rows_are_verified(
    base: Path, tiny_tied: Path, tiny_adapter: Path, tmp_path: Path, capsys: Capture
) -> None:
    """The GGUF of an FP8 checkpoint has the embedding of the checkpoint, and its matrices cannot be compared."""
    gguf, out = tmp_path / "model.gguf", tmp_path / "tuned.gguf"
    assert run(["export", str(tiny_tied), "--to", "gguf", "-o", str(gguf), "-q"]) == 0
    patch = ["patch", str(gguf), str(tiny_adapter), "--base", str(base), "-o", str(out)]
    capsys.readouterr()
    assert run([*patch, "--verify", "full"]) == 5
    assert "the matrices of the base are quantised with FP8" in line(capsys)
    assert run([*patch, "-q"]) == 0
    verify = ["verify", str(out), "--reference", str(base), "--adapter", str(tiny_adapter), "-q"]
    assert run([*verify, "--level", "rows"]) == 0
    capsys.readouterr()
    for level in ("weights", "full"):
        assert run([*verify, "--level", level]) == 5
        assert "the matrices of the base are quantised with FP8" in line(capsys)


def test_inspect_names_the_method(mxfp4: Path, tiny_tied: Path, capsys: Capture) -> None:
    for folder, method in ((mxfp4, "MXFP4"), (tiny_tied, "no")):
        assert run(["inspect", str(folder), "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["facts"]["quantised"] == method


@pytest.mark.parametrize("base", ["fp8"], indirect=True)
def test_scales_that_are_powers_of_two_in_a_byte_are_kept(base: Path, tiny_adapter: Path, tmp_path: Path) -> None:
    weights = base / "model.safetensors"
    scales = {name: tensor for name, tensor in read_tensors(weights).items() if name.endswith("_scale_inv")}
    bytes_of = {name: bytes([120]) * math.prod(tensor.spec.shape) for name, tensor in scales.items()}
    rawtensors.replace(weights, {name: ("F8_E8M0", scales[name].spec.shape, bytes_of[name]) for name in scales})
    argv = ["merge", str(tiny_adapter), "--base", str(base), "--dtype", "f32", "--verify", "weights", "-q"]
    assert run([*argv, "-o", str(tmp_path / "out")]) == 0
    merged = read_tensors(tmp_path / "out" / "model.safetensors")
    assert {name: content(merged[name])[1] for name in scales} == bytes_of
