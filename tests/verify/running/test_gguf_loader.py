"""transformers' own GGUF loader beside llama.cpp: it runs models that it supports; others are reported."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from exporter.cli.main import run
from exporter.verify.running.gguf_loader import NAME, check_exact, check_quantised, sequences_to_run
from exporter.verify.running.metrics import Distance, compare
from exporter.verify.tolerances import HF_ROUNDING_SHARE, LOADER_KL, LOADER_MAX_ABS
from fixtures.adapters import stock_rows
from fixtures.models.families import build
from tests.marks import needs_llama_cpp
from tests.support.documents import read_report
from tests.verify.conftest import Tuned

REFERENCE = np.random.default_rng(0).normal(0, 3, (12, 64)).astype(np.float32)


def off(by: float) -> Distance:
    distance = compare(REFERENCE, REFERENCE)
    return replace(distance, kl_at=np.full(12, by), max_abs_at=np.full(12, by))


@pytest.mark.parametrize(("factor", "passes"), [(0.9, True), (1.1, False), (np.nan, False)])
def test_the_checks_fail_just_beyond_their_limits(factor: float, passes: bool) -> None:
    assert check_exact(off(factor * LOADER_MAX_ABS), 0.0).passed is passes
    assert check_exact(off(factor * HF_ROUNDING_SHARE * 0.5), 0.5).passed is passes
    assert check_quantised(off(factor * LOADER_KL)).passed is passes


def test_the_loader_runs_one_text_and_one_with_trained_tokens() -> None:
    assert sequences_to_run([[1]] * 5 + [[2]] * 3, [[2]] * 3) == [0, 5]
    assert sequences_to_run([[1]] * 5, []) == [0]


@needs_llama_cpp
def test_the_loader_runs_one_file_and_every_file_if_required(tuned: Tuned, tmp_path: Path) -> None:
    (tmp_path / "out" / "gguf").mkdir(parents=True)
    for number, artifact in enumerate((tuned.gguf, tuned.q8_0)):
        (tmp_path / "out" / "gguf" / f"{number}.gguf").symlink_to(artifact)
    argv = tuned.argv(tmp_path / "out")
    assert run([*argv, "--report", str(tmp_path / "one")]) == 0
    first, second = read_report(tmp_path / "one")["artifacts"]
    assert NAME in {check["name"] for check in first["checks"]}
    assert NAME not in {check["name"] for check in second["checks"]}
    assert [f"--require {NAME}" in skip["reason"] for skip in second["skipped"] if skip["name"] == NAME] == [True]
    assert run([*argv, "--require", NAME, "--report", str(tmp_path / "all")]) == 0
    for artifact in read_report(tmp_path / "all")["artifacts"]:
        assert NAME in {check["name"] for check in artifact["checks"]}
        assert NAME not in {skip["name"] for skip in artifact["skipped"]}


@needs_llama_cpp
@pytest.mark.parametrize("family", ["qwen3", "stablelm_12b"])
def test_an_unsupported_model_is_reported_and_is_exit_5_if_the_loader_is_required(
    family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = build(family, tmp_path / "base")
    adapter = stock_rows(base, tmp_path / "adapter", (300, 17, 2))
    common = [str(tmp_path / "model.gguf"), "--reference", str(base), "--adapter", str(adapter), "-q"]
    merge = ["merge", str(adapter), "--base", str(base), "--to", "gguf", "--verify", "off", "-q", "-o", common[0]]
    assert run([*merge, "--pre-tokenizer", "smollm"]) == 0
    assert run(["verify", *common, "--require", NAME]) == 5
    error = capsys.readouterr().err
    assert f"does not support {family.removesuffix('_12b')}" in error
    assert error.count("\n") == 1
    run(["verify", *common, "--report", str(tmp_path / "report")])
    (artifact,) = read_report(tmp_path / "report")["artifacts"]
    assert [
        f"does not support {family.removesuffix('_12b')}" in skip["reason"]
        for skip in artifact["skipped"]
        if skip["name"] == NAME
    ] == [True]
