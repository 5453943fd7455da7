"""The runtimes themselves: clean artifacts pass, faults that only running shows do not."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from exporter.cli.main import run
from tests.marks import needs_llama_cpp
from tests.support.documents import read_report
from tests.verify.conftest import Tuned
from tests.verify.damage import corruptions

pytestmark = pytest.mark.models


def failed(folder: Path) -> dict[str, set[str]]:
    """artifact name → names of its failed checks."""
    document = read_report(folder)
    return {
        Path(artifact["artifact"]).name: {check["name"] for check in artifact["checks"] if not check["passed"]}
        for artifact in document["artifacts"]
    }


def in_one_folder(out: Path, **artifacts: Path) -> Path:
    """Several formats in the layout of one folder, so that the reference runs once."""
    (out / "gguf").mkdir(parents=True)
    for name, artifact in artifacts.items():
        (out / name if artifact.is_dir() else out / "gguf" / f"{name}.gguf").symlink_to(artifact)
    return out


@needs_llama_cpp
@pytest.mark.usefixtures("fresh_runtimes")
def test_clean_artifacts_of_every_format_and_storage_pass(tuned: Tuned, tmp_path: Path) -> None:
    out = in_one_folder(
        tmp_path / "out", hf=tuned.hf, onnx=tuned.onnx, bf16=tuned.gguf, f32=tuned.gguf_f32, q8_0=tuned.q8_0
    )
    assert run([*tuned.argv(out), "--report", str(tmp_path / "report")]) == 0
    document = read_report(tmp_path / "report")
    assert document["passed"]
    names = {
        Path(artifact["artifact"]).stem: {check["name"] for check in artifact["checks"]}
        for artifact in document["artifacts"]
    }
    assert {"logits", "greedy tokens", "other tensors"} <= names["hf"]
    assert {"logits", "logits with cache", "logits left-padded", "greedy tokens"} <= names["onnx"]
    assert {"mean KL", "top-1 misses", "greedy tokens", "tokenizer"} <= names["f32"]
    assert "excess KL" in names["q8_0"]


@needs_llama_cpp
def test_faults_that_only_running_shows_are_exit_3(tuned: Tuned, tmp_path: Path) -> None:
    norm = corruptions.copy(tuned.gguf_f32, tmp_path)
    corruptions.gguf_scale_f32(norm, "blk.1.ffn_norm.weight", 1.02)
    (tmp_path / "eps").mkdir()
    epsilon = corruptions.copy(tuned.gguf_f32, tmp_path / "eps")
    corruptions.gguf_set_number(epsilon, "llama.attention.layer_norm_rms_epsilon", 1e-2)
    (tmp_path / "rope").mkdir()
    rope = corruptions.copy(tuned.gguf_f32, tmp_path / "rope")
    corruptions.gguf_set_number(rope, "llama.rope.freq_base", 20000.0)
    weights = corruptions.copy(tuned.onnx, tmp_path)
    corruptions.onnx_set_attribute(weights, "RMSNormalization", "epsilon", 1e-2)
    out = in_one_folder(tmp_path / "out", onnx=weights, norm=norm, epsilon=epsilon, rope=rope, clean=tuned.gguf_f32)
    assert run([*tuned.argv(out), "--report", str(tmp_path / "report")]) == 3
    failures = failed(tmp_path / "report")
    assert failures.pop("clean.gguf") == set(), "faults of other artifacts do not count here"
    assert "logits with cache" in failures.pop("onnx")
    assert all("mean KL" in checks for checks in failures.values())
    assert len(failures) == 3


def test_no_text_is_longer_than_the_model_has_positions(tuned: Tuned, tmp_path: Path) -> None:
    """The ONNX graph holds a table of 48 positions: one token more and ONNX Runtime refuses."""
    base = corruptions.copy(tuned.base, tmp_path)
    corruptions.hf_config(base, max_position_embeddings=48)
    argv = ["merge", str(tuned.adapter), "--base", str(base), "--to", "onnx", "-q", "--verify", "full"]
    assert run([*argv, "-o", str(tmp_path / "out"), "--report", str(tmp_path / "report")]) == 0
    checks = {check["name"]: check for check in read_report(tmp_path / "report")["artifacts"][0]["checks"]}
    assert checks["greedy tokens"]["detail"] == "16 of 16 greedy tokens equal the reference's tokens"


@pytest.mark.usefixtures("fresh_runtimes")
def test_an_artifact_that_its_runtime_refuses_is_exit_3(tuned: Tuned, tmp_path: Path) -> None:
    import onnx

    broken = corruptions.copy(tuned.onnx, tmp_path)
    path = broken / "onnx" / "model.onnx"
    model = onnx.load(path, load_external_data=False)
    next(node for node in model.graph.node if node.op_type == "Softmax" or node.op_type == "Attention").op_type = "Nope"
    onnx.save(model, path)
    assert run([*tuned.argv(broken), "--report", str(tmp_path / "report")]) == 3
    assert failed(tmp_path / "report")[broken.name] == {"runs"}


def test_without_llama_cpp_transformers_own_loader_refutes_a_broken_gguf(
    tuned: Tuned, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    broken = corruptions.copy(tuned.gguf_f32, tmp_path)
    corruptions.gguf_scale_f32(broken, "blk.0.attn_norm.weight", 1.05)
    assert run(tuned.argv(broken)) == 3


def test_every_model_of_an_onnx_folder_is_verified(tuned: Tuned, tmp_path: Path) -> None:
    assert run([*tuned.argv(tuned.onnx_variants), "--report", str(tmp_path)]) == 0
    [artifact] = read_report(tmp_path)["artifacts"]
    names = {check["name"] for check in artifact["checks"]}
    modes = {"logits", "logits with cache", "logits left-padded"}
    assert {f"model_fp16: {mode}, mean KL" for mode in modes} <= names
    assert {"model_q4f16: embedding rows", "model_q4f16: excess KL", "model_q4f16: logits with cache"} <= names
    assert artifact["facts"]["model_q4f16: storage"] == "int8 x 32, scales F16"
    assert {"model_sym_q4f16: embedding rows", "model_sym_q4f16: excess KL"} <= names
    assert (
        "tokens below are those of model_fp16, the first model of the artifact"
        in (tmp_path / "report.html").read_text()
    )


def test_a_fault_in_one_model_of_a_folder_is_named_with_its_file(tuned: Tuned, tmp_path: Path) -> None:
    """A sign in a matrix that no row check reads; the quantised model beside it stays sound."""
    broken = corruptions.copy(tuned.onnx_variants, tmp_path)
    corruptions.onnx_flip(broken / "onnx" / "model_fp16.onnx", "layers.0.mlp.down_proj.weight", 1)
    assert run([*tuned.argv(broken), "--report", str(tmp_path)]) == 3
    assert all(name.startswith("model_fp16: ") for name in failed(tmp_path)[broken.name])


def test_a_quantised_model_that_decodes_at_wrong_positions_is_found(tuned: Tuned, tmp_path: Path) -> None:
    broken = corruptions.copy(tuned.onnx_variants, tmp_path)
    corruptions.onnx_shift_queries(broken / "onnx" / "model_q4f16.onnx")
    assert run([*tuned.argv(broken), "--report", str(tmp_path)]) == 3
    assert failed(tmp_path)[broken.name] == {"model_q4f16: logits with cache"}
