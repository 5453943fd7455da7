"""No check fails on a sound artifact: all families, formats and precisions, with weights and rows of three seeds.

Families that differ from older ones in single properties are checked with one seed.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from exporter.cli.main import run
from exporter.verify.expect.reference import Reference
from exporter.verify.run import verify
from fixtures import adapters
from fixtures.models import families
from fixtures.models.related_families import RELATED
from tests.support.trained import TRAINED_IDS
from tests.verify.subjects import make

SEEDS = (0, 1, 2)
ONNX = ("fp32", "fp16", "int8", "q4", "q4-sym")
#: Folder or file → its arguments. Q4_K_M needs rows of 256 numbers, which these models lack.
ARTIFACTS = {
    "hf": [],
    "hf-f16": ["--dtype", "f16"],
    "bf16.gguf": ["--to", "gguf"],
    "f32.gguf": ["--to", "gguf", "--dtype", "f32"],
    "f16.gguf": ["--to", "gguf", "--dtype", "f16"],
    "q8_0.gguf": ["--to", "gguf", "--quant", "Q8_0"],
    "onnx": ["--to", "onnx", *(argument for precision in ONNX for argument in ("--quant", precision))],
    "onnx-ort": ["--to", "onnx", "--onnx-ops", "ort", "--quant", "fp32", "--quant", "fp16", "--quant", "int8"],
}


def tuned(family: str, seed: int, out: Path) -> tuple[Path, Path]:
    """A base and an adapter with weights that depend on ``seed``."""
    base = families.build(family, out / "base", seed=seed)
    return base, adapters.stock_rows(base, out / "rows", TRAINED_IDS, seed=seed)


@pytest.mark.parametrize("family", families.FAMILIES)
def test_sound_artifacts_pass_without_running_a_model(family: str, tmp_path: Path) -> None:
    for seed in SEEDS[:1] if family in RELATED else SEEDS:
        base, rows = tuned(family, seed, tmp_path / str(seed))
        for name, arguments in ARTIFACTS.items():
            subject = make(base, rows, tmp_path / str(seed) / name, *(arguments or ["--to", "hf"]))
            assert run(subject.argv(subject.path, "weights")) == 0, f"{name}, seed {seed}"


#: One family per seed: full attention, sliding windows with soft caps, no rotary embedding.
IN_RUNTIMES = (("llama", 0), ("gemma2", 1), ("gpt2", 2))


@pytest.mark.parametrize(("family", "seed"), IN_RUNTIMES)
def test_sound_artifacts_pass_in_their_runtimes(family: str, seed: int, tmp_path: Path) -> None:
    base, rows = tuned(family, seed, tmp_path)
    names = ("hf", "bf16.gguf", "f32.gguf", "q8_0.gguf", "onnx")
    made = [make(base, rows, tmp_path / name, *(ARTIFACTS[name] or ["--to", "hf"])).path for name in names]
    reports = verify(made, Reference.open(base, [rows]), level="full")
    assert [report.failures for report in reports] == [[]] * len(names)
