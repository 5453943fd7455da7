"""The table of faults of llama.cpp: each row is seen in llama.cpp itself, and refuses the model before any work."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import safe_open

from exporter.errors import NotExpressible
from exporter.formats.gguf.converter.scope import refuse_unverifiable
from exporter.formats.gguf.converter.upstream import FAULTS, Fault, fault_of, refuse_faults
from tests.conformance.gguf import required_converter
from tests.formats.gguf.converter.upstream_runs import CASES, SOUND, Case

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def fault(case: Case, folder: Path) -> Fault | None:
    base = case.build(folder)
    with safe_open(base / "model.safetensors", "np") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 - no mapping
    return fault_of(json.loads((base / "config.json").read_text()), shapes)


def test_each_row_of_the_table_has_a_tiny_model_and_sound_models_have_no_row(tmp_path: Path) -> None:
    found = [fault(case, tmp_path / str(number)) for number, case in enumerate(CASES)]
    assert [CASES[number].name for number, row in enumerate(found) if row is None] == []
    assert [row.reason for row in FAULTS if row not in found] == []
    assert [fault(case, tmp_path / f"sound{number}") for number, case in enumerate(SOUND)] == [None] * len(SOUND)


@pytest.mark.converter
def test_llama_cpp_still_has_each_fault_of_the_table(tmp_path: Path) -> None:
    root = required_converter()
    folders = (str(root), str(root / "gguf-py"), os.environ.get("PYTHONPATH", ""))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, folders))}
    command = [sys.executable, "-m", "tests.formats.gguf.converter.upstream_runs", str(tmp_path / "exact.json")]
    subprocess.run(command, env=environment, check=True, capture_output=True)
    exact = json.loads((tmp_path / "exact.json").read_text())
    # An exact case of CASES: llama.cpp has mended the fault, and the row can go.
    assert [CASES[number].name for number in exact if number < len(CASES)] == []
    assert [number for number in exact if number >= len(CASES)] == [*range(len(CASES), len(CASES) + len(SOUND))]


def test_a_fault_is_exit_5_with_the_reason_and_the_version() -> None:
    config = {"architectures": ["PhiForCausalLM"], "hidden_size": 64, "intermediate_size": 64}
    with pytest.raises(
        NotExpressible, match=r"gguf: lamp: .*four times hidden_size \(as of llama-cpp-python 0\.3"
    ) as caught:
        refuse_faults(config, {}, "lamp")
    assert caught.value.exit_code == 5
    refuse_faults({**config, "intermediate_size": 256}, {}, "lamp")


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"architectures": ["BertModel"]}, "no logits of the next token"),
        ({"architectures": ["T5ForConditionalGeneration"], "is_encoder_decoder": True}, "encoder and decoder apart"),
    ],
)
def test_a_model_without_logits_of_the_next_token_is_refused(config: dict[str, object], reason: str) -> None:
    with pytest.raises(NotExpressible, match=reason):
        refuse_unverifiable(config, "lamp")
    refuse_unverifiable({"architectures": ["OlmoForCausalLM"]}, "lamp")
