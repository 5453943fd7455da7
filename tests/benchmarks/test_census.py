from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.census import pool, trial
from benchmarks.census.__main__ import DOCS
from benchmarks.census.converter import divergence, forked
from benchmarks.census.table import counts, joined, markdown
from fixtures.zoo.names import NAMES
from fixtures.zoo.recipes import Recipe

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def a_row(**changes: Any) -> dict[str, Any]:
    row = {"name": "llama", "class_name": "LlamaForCausalLM", "adapter": "rows", "target": "hf", "result": trial.EXACT}
    return {**row, "exit_code": 0, "reason": "", **changes}


def test_a_trial_merges_both_adapters_and_says_how_far_the_outputs_differ(tmp_path: Path) -> None:
    trial.run_trial("gpt2", tmp_path, ["hf"], tmp_path / "out.jsonl")
    rows = trial.rows_of(tmp_path / "out.jsonl")
    assert [(row["adapter"], row["result"], row["exit_code"]) for row in rows] == [
        ("rows", "exact", 0),
        ("LoRA", "exact", 0),
    ]
    assert all(row["difference"] <= 1e-5 * row["largest"] for row in rows)
    assert rows[0]["effect"] > 0.01 * rows[0]["largest"]


def test_a_merge_that_writes_the_base_again_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def copy_base(arguments: list[str]) -> int:
        os.symlink(arguments[arguments.index("--base") + 1], arguments[arguments.index("-o") + 1])
        return 0

    monkeypatch.setattr(trial, "run", copy_base)
    trial.run_trial("gpt2", tmp_path, ["hf"], tmp_path / "out.jsonl")
    rows = trial.rows_of(tmp_path / "out.jsonl")
    assert [row["result"] for row in rows] == ["WRONG", "does not load"]
    assert rows[0]["reason"].startswith("outputs: largest difference")
    assert "index out of range" in rows[1]["reason"]  # the new tokens have no rows


@pytest.mark.parametrize(("code", "result"), [(4, "refused"), (5, "refused"), (3, "gate"), (1, "crash")])
def test_exit_codes_become_results(code: int, result: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "run", lambda _arguments: code)
    trial.run_trial("gpt2", tmp_path, ["hf"], tmp_path / "out.jsonl")
    assert {row["result"] for row in trial.rows_of(tmp_path / "out.jsonl")} == {result}


def test_a_model_that_cannot_be_built_and_an_adapter_that_peft_cannot_make_are_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_arguments: Path | str) -> Path:
        raise ValueError("no such layer")

    monkeypatch.setattr(trial, "ADAPTERS", {"rows": Recipe(fail), "LoRA": Recipe(fail)})
    trial.run_trial("gpt2", tmp_path, ["hf"], tmp_path / "peft.jsonl")
    monkeypatch.setattr(trial, "build", fail)
    trial.run_trial("gpt2", tmp_path, ["hf"], tmp_path / "built.jsonl")
    assert {row["result"] for row in trial.rows_of(tmp_path / "peft.jsonl")} == {"PEFT itself cannot"}
    rows = trial.rows_of(tmp_path / "built.jsonl")
    assert {(row["result"], row["reason"]) for row in rows} == {("not built", "ValueError: no such layer")}


@pytest.mark.parametrize(
    ("end", "reason"),
    [
        (lambda *_arguments: os.kill(os.getpid(), signal.SIGKILL), "the process ended with exit code -9"),
        (lambda *_arguments: signal.pause(), "the process exceeded the time limit"),
    ],
    ids=["a crash", "a hang"],
)
def test_a_process_that_does_not_end_well_is_a_result(end: Any, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "run_trial", end)
    rows = [row for mine in pool.run_all(["gpt2", "llama"], ["hf"], jobs=2, limit=1) for row in mine]
    assert {(row["name"], row["adapter"]) for row in rows} == {
        (n, a) for n in ("gpt2", "llama") for a in ("rows", "LoRA")
    }
    assert {(row["result"], row["reason"]) for row in rows} == {("crash", reason)}


def test_the_table_has_a_line_a_name_and_the_reasons_of_what_is_not_exact() -> None:
    rows = [a_row(), a_row(adapter="LoRA", result=trial.REFUSED, exit_code=4, reason="expected a | b")]
    lines = markdown(rows).splitlines()
    assert lines[0] == "| type | class | hf rows | hf LoRA | reason |"
    assert lines[2] == "| llama | LlamaForCausalLM | exact | refused (4) | expected a \\| b |"
    assert counts(rows).splitlines() == ["hf rows: 1 exact", "hf LoRA: 1 refused"]


def test_the_page_has_a_line_for_every_name() -> None:
    lines = [line for line in DOCS.read_text().splitlines() if line.startswith("| ")]
    assert {line.split(" | ")[0].removeprefix("| ") for line in lines} == {"type", *NAMES}


def test_a_later_run_of_the_census_counts() -> None:
    earlier, later = [a_row(), a_row(adapter="LoRA")], [a_row(result=trial.WRONG), a_row(target="gguf")]
    rows = joined([earlier, later])
    assert [(row["adapter"], row["target"], row["result"]) for row in rows] == [
        ("rows", "hf", "WRONG"),
        ("LoRA", "hf", "exact"),
        ("rows", "gguf", "exact"),
    ]


def test_a_gguf_is_exact_only_with_the_logits_of_the_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trial.run_trial("gpt2", tmp_path, ["gguf"], tmp_path / "out.jsonl")
    assert [row["result"] for row in trial.rows_of(tmp_path / "out.jsonl")] == ["exact", "exact"]
    for value, result in ((2e-6, trial.WRONG), ("exit code -6: no such key", trial.UNLOADABLE)):
        monkeypatch.setattr(trial, "divergence", lambda *_arguments, value=value: value)
        trial.run_trial("gpt2", tmp_path / result, ["gguf"], tmp_path / "out.jsonl")
        assert {row["result"] for row in trial.rows_of(tmp_path / "out.jsonl")} == {result}


def test_other_logits_and_unreadable_files_are_told_apart(tmp_path: Path) -> None:
    trial.run_trial("gpt2", tmp_path, ["gguf"], tmp_path / "out.jsonl")
    logits = torch.randn(1, 3, 512, generator=torch.Generator().manual_seed(0))
    value = divergence(tmp_path / "merged-rows-gguf", [[4, 5, 6]], logits)
    assert isinstance(value, float)
    assert value > 0.1
    (tmp_path / "broken.gguf").write_bytes(b"GGUF")
    assert str(divergence(tmp_path / "broken.gguf", [[4]], logits)).startswith("exit code 1")
    killed = forked(lambda: os.kill(os.getpid(), signal.SIGKILL), tmp_path / "messages.txt")
    assert killed == -signal.SIGKILL
