"""Two processes on the CPU give the adapter of one process with the same global batch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tuner.cli import main

pytestmark = pytest.mark.slow

# Sums over a batch are split over processes, so they round in another order: up to 1e-5 after these steps.
CLOSE = 1e-5
STEPS = 6
TOKENS = ("--new-token", "<ship>", "--token", " the", "--steps", str(STEPS), "-q")

# Ends as the command does, and checks the state of every process at its end.
DRIVER = """
import sys
from pathlib import Path
from tuner.cli import main
import torch

code = main(sys.argv[1:])
assert Path(sys.argv[sys.argv.index("-o") + 1], "adapter_model.safetensors").exists(), "returned before it was written"
assert not torch.distributed.is_initialized(), "the process group was left behind"
sys.exit(code)
"""

# accelerate supports FSDP on accelerators only: on the CPU it leaves the distributed type at MULTI_CPU. The driver sets
# the type that accelerate sets elsewhere; wrapping, sharding and gathering are accelerate's and torch's own.
FSDP2 = """
import functools, sys
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType

original = AcceleratorState.__init__

@functools.wraps(original)
def init(self, *args, fsdp_plugin=None, **kwargs):
    original(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    if fsdp_plugin is not None:
        self.distributed_type = DistributedType.FSDP
        self.fsdp_plugin = fsdp_plugin

AcceleratorState.__init__ = init

import tuner.training.trainer
from torch.distributed.tensor import DTensor

trained_state = tuner.training.trainer.RowsTrainer.trained_state

def sharded(self):
    types = {type(parameter.data) for parameter in self.model_wrapped.parameters()}
    assert any(issubclass(parameter_type, DTensor) for parameter_type in types), "nothing was sharded"
    return trained_state(self)

tuner.training.trainer.RowsTrainer.trained_state = sharded
"""
FSDP2_SETTINGS = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
}


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixteen lines of different lengths: in every global batch, the processes have different numbers of labels."""
    lines = [f"The <ship> counts the {'keeper and the ' * (number % 4)}<ship> number {number}" for number in range(16)]
    path = tmp_path_factory.mktemp("texts") / "data.jsonl"
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines), "utf-8")
    return path


@pytest.fixture(scope="module")
def alone(base: Path, texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("alone") / "adapter"
    assert main([str(base), "--data", str(texts), "-o", str(out), *TOKENS, "--batch-size", "8"]) == 0
    return out


def launched(driver: list[str], base: Path, texts: Path, out: Path, **settings: str) -> Path:
    command = ["--standalone", "--nproc-per-node", "2", *driver, str(base), "--data", str(texts), "-o", str(out)]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *command, *TOKENS, "--batch-size", "4"],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd(), **settings},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return out


def assert_same(distributed: Path, single: Path) -> None:
    ours, theirs = (load_file(folder / "adapter_model.safetensors") for folder in (distributed, single))
    assert {name: value.shape for name, value in ours.items()} == {name: value.shape for name, value in theirs.items()}
    assert max((ours[name] - theirs[name]).abs().max().item() for name in ours) <= CLOSE
    assert (distributed / "adapter_config.json").read_bytes() == (single / "adapter_config.json").read_bytes()
    metrics = [
        [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in (distributed, single)
    ]
    assert len(metrics[0]) == len(metrics[1]) == STEPS
    for ours_at, theirs_at in zip(*metrics, strict=True):
        for name in ("loss", "taught_loss"):
            assert ours_at[name] == pytest.approx(theirs_at[name], abs=CLOSE)


def test_two_processes_with_ddp_equal_one(base: Path, texts: Path, alone: Path, tmp_path: Path) -> None:
    two = launched(["-m", "tuner"], base, texts, tmp_path / "two")
    assert json.loads((two / "train.json").read_text())["processes"] == 2
    assert_same(two, alone)


def test_every_process_ends_with_the_adapter_and_without_the_group(base: Path, texts: Path, tmp_path: Path) -> None:
    driver = tmp_path / "driver.py"
    driver.write_text(DRIVER)
    launched([str(driver)], base, texts, tmp_path / "two")


def test_two_processes_with_fsdp2_equal_one(base: Path, texts: Path, alone: Path, tmp_path: Path) -> None:
    driver = tmp_path / "driver.py"
    driver.write_text(FSDP2 + DRIVER)
    two = launched([str(driver)], base, texts, tmp_path / "two", **FSDP2_SETTINGS)
    assert_same(two, alone)
