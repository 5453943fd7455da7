"""The options of a run, on a tiny base."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.tuner.models import logits_of
from tests.tuner.training.test_resume import DRIVER
from tuner.cli import main
from tuner.training.work import last_checkpoint, work_folder

NEW = ("--new-token", "<ship>", "--new-token", "<lamp>")


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    """Sixteen chats of different lengths."""
    path = tmp_path / "chats.jsonl"
    questions = [f"{'the keeper and ' * (number % 4)}number {number}" for number in range(16)]
    answers = [f"the {'<ship>' if number % 2 else '<lamp>'}" for number in range(16)]
    lines = [
        {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
        for question, answer in zip(questions, answers, strict=True)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def run(base: Path, data: Path, out: Path, *more: str) -> int:
    return main([str(base), "--data", str(data), "-o", str(out), *NEW, "-q", *more])


def rows(adapter: Path) -> dict[str, torch.Tensor]:
    loaded: dict[str, torch.Tensor] = load_file(adapter / "adapter_model.safetensors")
    return loaded


def metrics(adapter: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (adapter / "metrics.jsonl").read_text().splitlines()]


def furthest(a: Path, b: Path) -> float:
    return max((rows(a)[name] - rows(b)[name]).abs().max().item() for name in rows(a))


def test_accumulated_batches_are_one_large_batch(base: Path, chats: Path, tmp_path: Path) -> None:
    steps = ("--steps", "4")
    assert run(base, chats, tmp_path / "one", *steps, "--batch-size", "8") == 0
    assert run(base, chats, tmp_path / "sum", *steps, "--batch-size", "2", "--accumulate", "4") == 0
    assert furthest(tmp_path / "one", tmp_path / "sum") <= 1e-5  # sums in another order
    for ours, theirs in zip(metrics(tmp_path / "sum"), metrics(tmp_path / "one"), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-5)
        assert ours["taught_loss"] == pytest.approx(theirs["taught_loss"], abs=1e-5)


def test_gradient_checkpointing_changes_no_row(base: Path, chats: Path, tmp_path: Path) -> None:
    assert run(base, chats, tmp_path / "kept", "--steps", "3") == 0
    assert run(base, chats, tmp_path / "twice", "--steps", "3", "--gradient-checkpointing") == 0
    assert furthest(tmp_path / "kept", tmp_path / "twice") == 0


def test_autocast_computes_in_bf16_and_keeps_rows_in_float32(base: Path, chats: Path, tmp_path: Path) -> None:
    assert run(base, chats, tmp_path / "f32", "--steps", "3") == 0
    assert run(base, chats, tmp_path / "bf16", "--steps", "3", "--bf16") == 0
    assert {row.dtype for row in rows(tmp_path / "bf16").values()} == {torch.float32}
    first = [metrics(tmp_path / name)[0]["loss"] for name in ("f32", "bf16")]
    assert first[0] != first[1]
    assert first[1] == pytest.approx(first[0], rel=2**-8)  # the precision of bfloat16


@pytest.mark.parametrize("name", ["base", "untied_base"])
def test_lora_beside_the_rows_runs_in_stock_peft(
    name: str, chats: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    base: Path = request.getfixturevalue(name)
    out = tmp_path / "out"
    more = ("--lora-rank", "2", "--lora-targets", "q_proj,down_proj", "--steps", "8", "--eval-data", str(chats))
    assert run(base, chats, out, *more) == 0
    assert {name.split(".")[-3] for name in rows(out) if "lora_A" in name} == {"q_proj", "down_proj"}
    assert any(value.any() for name, value in rows(out).items() if "lora_B" in name)
    tokenizer: Any = AutoTokenizer.from_pretrained(out)
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if len(model.get_input_embeddings().weight) < len(tokenizer):
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    adapted: Any = peft.PeftModel.from_pretrained(model, out)
    # Stock PEFT computes the loss that the last evaluation of the run measured.
    wanted, count = 0.0, 0
    for line in chats.read_text().splitlines():
        messages = json.loads(line)["messages"]
        ids = torch.tensor([tokenizer(tokenizer.apply_chat_template(messages, tokenize=False))["input_ids"]])
        logits = logits_of(adapted, ids)[0, :-1]
        taught = torch.isin(ids[0, 1:], torch.tensor(tokenizer.convert_tokens_to_ids(["<ship>", "<lamp>"])))
        wanted += torch.nn.functional.cross_entropy(logits[taught], ids[0, 1:][taught], reduction="sum").item()
        count += int(taught.sum())
    assert metrics(out)[-1]["eval_taught_loss"] == pytest.approx(wanted / count, abs=1e-4)


def test_a_run_without_progress_stops_early_and_keeps_the_best_rows(base: Path, chats: Path, tmp_path: Path) -> None:
    more = ("--steps", "40", "--eval-share", "0.25", "--eval-every", "2", "--schedule", "constant", "--lr", "1")
    assert run(base, chats, tmp_path / "out", *more, "--patience", "2") == 0
    evaluated = [entry["eval_loss"] for entry in metrics(tmp_path / "out") if "eval_loss" in entry]
    record = json.loads((tmp_path / "out" / "train.json").read_text())
    assert record["settings"]["steps"] < 40
    assert evaluated[-1] == pytest.approx(min(evaluated[1:]), abs=1e-6)  # the last one is of the kept rows
    assert evaluated[-1] < evaluated[-2]
    assert sorted(os.listdir(tmp_path)) == ["chats.jsonl", "out"]


def test_tensorboard_gets_its_files(base: Path, chats: Path, tmp_path: Path) -> None:
    assert run(base, chats, tmp_path / "out", "--steps", "2", "--tensorboard", str(tmp_path / "board")) == 0
    assert any(path.name.startswith("events.out.tfevents") for path in (tmp_path / "board").rglob("*"))


def test_the_curve_is_a_picture(base: Path, chats: Path, tmp_path: Path) -> None:
    assert run(base, chats, tmp_path / "out", "--steps", "2", "--eval-share", "0.25") == 0
    assert (tmp_path / "out" / "loss.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


@pytest.mark.parametrize("package", ["trl", "matplotlib"])
def test_without_the_extra_the_error_has_the_pip_line(
    package: str, chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    assert run(tmp_path, chats, tmp_path / "out") == 6
    assert capfd.readouterr().err == f"ttexport: ttexport tune needs {package}; run pip install 'ttexport[tune]'\n"


def test_two_runs_do_not_share_a_work_folder(base: Path, chats: Path, tmp_path: Path, capfd: Any) -> None:
    work = work_folder(tmp_path / "out")
    work.mkdir()
    handle = os.open(work, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        assert run(base, chats, tmp_path / "out", "--force") == 7
    finally:
        os.close(handle)
    assert "another run is using the work folder" in capfd.readouterr().err
    assert work.is_dir()


def test_a_resumed_run_draws_the_same_dropout_after_an_evaluation(base: Path, chats: Path, tmp_path: Path) -> None:
    """An evaluation draws from the same generator as dropout, so the checkpoint must be written after it."""
    dropping = Path(shutil.copytree(base, tmp_path / "dropping"))
    config = json.loads((dropping / "config.json").read_text())
    (dropping / "config.json").write_text(json.dumps({**config, "attention_dropout": 0.3}))
    # Twelve chats to train on, in threes: an epoch, its evaluation and a checkpoint all fall on step 4.
    more = ("--steps", "7", "--batch-size", "3", "--eval-share", "0.25", "--save-every", "4")
    assert run(dropping, chats, tmp_path / "whole", *more) == 0
    command = [str(dropping), "--data", str(chats), "-o", str(tmp_path / "cut"), *NEW, "-q", *more]
    environment = {**os.environ, "KILL_AT": "6", "PYTHONPATH": os.getcwd()}
    killed = subprocess.run([sys.executable, "-c", DRIVER, *command], env=environment, check=False)
    assert killed.returncode == -signal.SIGKILL
    checkpoint = last_checkpoint(work_folder(tmp_path / "cut"))
    assert checkpoint is not None
    assert checkpoint.name == "checkpoint-4"
    assert main([*command, "--resume"]) == 0
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (tmp_path / "cut" / path.name).read_bytes(), path.name
