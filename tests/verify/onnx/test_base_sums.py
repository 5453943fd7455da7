"""Updates of inner weights in quantised artifacts: wrong merges are caught although no row has known bytes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch

from exporter.cli.main import run
from exporter.sources.gguf.file import GgufFile
from exporter.verify.stored.artifact import encode
from exporter.verify.tolerances import UPDATE_SHARE
from exporter.verify.values.quantised_rows import sum_fault
from fixtures import tiny
from fixtures.adapters import load
from tests.marks import needs_llama_cpp
from tests.support.documents import read_report
from tests.verify.damage import corruptions

pytestmark = needs_llama_cpp

#: File or folder → options of merge. Q4_K_M needs rows of 256 numbers.
ARTIFACTS: Mapping[str, list[str]] = {
    "q8_0.gguf": ["--to", "gguf", "--quant", "Q8_0"],
    "q4_k_m.gguf": ["--to", "gguf", "--quant", "Q4_K_M"],
    "int4": ["--to", "onnx", "--quant", "int4"],
}
TARGETS = ["q_proj", "v_proj", "down_proj"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.build_llama(tmp_path_factory.mktemp("sums") / "base", hidden=256)


@pytest.fixture(scope="module")
def lora(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Updates a fifteenth as large as the weights, by stock PEFT, with an alpha that is no power of two."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    wrapped = get_peft_model(load(base), LoraConfig(r=4, lora_alpha=12, target_modules=TARGETS))
    with torch.no_grad():
        for name, weight in wrapped.named_parameters():
            if "lora_B" in name:
                weight.normal_(0, 0.006)
    out = tmp_path_factory.mktemp("adapter") / "lora"
    wrapped.save_pretrained(str(out), save_embedding_layers=False)
    return out


def other_scale(lora: Path, out: Path, alpha: float) -> Path:
    """The same adapter with another alpha."""
    copy = Path(shutil.copytree(lora, out))
    path = copy / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"lora_alpha": alpha}))
    return copy


def made(base: Path, adapter: Path, out: Path) -> Path:
    argv = ["merge", str(adapter), "--base", str(base), "--verify", "off", "-q", "-o", str(out), *ARTIFACTS[out.name]]
    assert run(argv) == 0
    return out


def verified(artifact: Path, base: Path, adapter: Path, report: Path, level: str) -> tuple[int, set[str]]:
    """The exit code, and the names of the failed checks."""
    argv = ["verify", str(artifact), "--reference", str(base), "--adapter", str(adapter), "--level", level, "-q"]
    code = run([*argv, "--report", str(report)])
    (entry,) = read_report(report)["artifacts"]
    return code, {check["name"] for check in entry["checks"] if not check["passed"]}


@pytest.mark.parametrize("name", ARTIFACTS)
def test_a_sound_merge_passes_and_its_excess_is_over_the_base(
    name: str, base: Path, lora: Path, tmp_path: Path
) -> None:
    assert verified(made(base, lora, tmp_path / name), base, lora, tmp_path / "report", "full") == (0, set())
    (entry,) = read_report(tmp_path / "report")["artifacts"]
    assert {"base as stored", "excess KL", "other tensors"} <= {check["name"] for check in entry["checks"]}
    assert not [skip for skip in entry["skipped"] if skip["name"] in ("excess KL", "other tensors")]


@pytest.mark.parametrize("name", ARTIFACTS)
@pytest.mark.parametrize("alpha", [0.001, 6, 24], ids=["missing", "half", "twice"])
def test_updates_of_another_size_are_caught_by_the_weights(
    alpha: float, name: str, base: Path, lora: Path, tmp_path: Path
) -> None:
    wrong = made(base, other_scale(lora, tmp_path / "scaled", alpha), tmp_path / name)
    assert verified(wrong, base, lora, tmp_path / "report", "weights") == (3, {"other tensors"})


def test_updates_that_are_missing_are_caught_by_running(base: Path, lora: Path, tmp_path: Path) -> None:
    wrong = made(base, other_scale(lora, tmp_path / "scaled", 0.001), tmp_path / "q8_0.gguf")
    code, failed = verified(wrong, base, lora, tmp_path / "report", "full")
    assert code == 3
    assert {"other tensors", "excess KL"} <= failed


def test_one_tensor_of_many_without_its_update_is_named(
    base: Path, lora: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sound = made(base, lora, tmp_path / "q8_0.gguf")
    (tmp_path / "base").mkdir()
    untuned = made(base, other_scale(lora, tmp_path / "scaled", 0.0001), tmp_path / "base" / "q8_0.gguf")
    name = "blk.1.attn_v.weight"
    donor, taker = GgufFile.open(untuned), GgufFile.open(sound)
    corruptions.poke(sound, taker.tensors[name].offset_bytes, donor.rows(name, 0, donor.tensors[name].n_rows).tobytes())
    argv = ["verify", str(sound), "--reference", str(base), "--adapter", str(lora), "--level", "weights", "-q"]
    assert run(argv) == 3
    assert name in capsys.readouterr().err


@pytest.mark.parametrize("storage", ["Q8_0", "Q4_0", "Q4_K", "Q6_K", "int4 x 32, scales F32", "int8 x 32, scales F16"])
def test_an_update_far_below_the_error_of_the_type_still_has_to_arrive(storage: str) -> None:
    """A twentieth of the error in every row: no single row shows it, the sum over all rows does."""
    rng = np.random.default_rng(0)
    base = rng.normal(0, 0.02, (512, 512)).astype(np.float32).astype(np.float64)
    error = np.linalg.norm(_decoded(base, storage) - base)
    update = rng.normal(0, 1, (512, 4)) @ rng.normal(0, 1, (4, 512))
    update *= error / 20 / np.linalg.norm(update)

    def fault(share: float) -> str | None:
        stored = encode((base + share * update).astype(np.float32), storage)
        return sum_fault(stored, base + update, base, storage, "BF16")

    assert fault(1) == ""
    assert all("expected the adapter update to be added once" in (fault(share) or "") for share in (-1, 0, 2.0))


def test_an_update_far_below_quantisation_noise_is_not_reported_as_proven() -> None:
    rng = np.random.default_rng(0)
    base = rng.normal(0, 0.02, (32, 64))
    update = rng.normal(0, 1e-6, base.shape)
    assert sum_fault(encode(base.astype(np.float32), "Q4_0"), base + update, base, "Q4_0", "F32") is None


@pytest.mark.parametrize(("off", "passes"), [(0.8, True), (1.2, False)])
def test_the_gate_of_the_share_closes_just_beyond_its_limit(off: float, passes: bool) -> None:
    """The update is a tenth of the matrix, as is the error of Q4_0; over a million numbers they hardly correlate."""
    rng = np.random.default_rng(0)
    base, update = rng.normal(0, 0.02, (2, 1024, 1024)) * [[[1]], [[0.1]]]
    stored = encode((base + (1 + off * UPDATE_SHARE) * update).astype(np.float32), "Q4_0")
    assert (sum_fault(stored, base + update, base, "Q4_0", "F32") == "") is passes


def _decoded(value: np.ndarray, storage: str) -> np.ndarray:
    from exporter.verify.stored.artifact import decode

    return np.asarray(decode(encode(value.astype(np.float32), storage), storage))
