"""Which tests are quick, and that a quick test imports nothing heavy unnoticed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from tests.tiers.imports import ROOT, heavy_file, heavy_function

CONFTESTS = sorted((ROOT / "tests").rglob("conftest.py"))


@pytest.mark.parametrize("path", CONFTESTS, ids=[str(path.parent.relative_to(ROOT)) for path in CONFTESTS])
def test_a_conftest_imports_nothing_heavy(path: Path) -> None:
    """It is imported for every test below its folder; its fixtures import what they need when they run."""
    assert heavy_file(path) == ()


@pytest.mark.parametrize(
    ("source", "ends"),
    [
        ("import torch", ["torch"]),
        ("from transformers.utils import logging", ["transformers.utils"]),
        ("from safetensors.torch import load_file", ["safetensors.torch"]),
        ("if True:\n    import peft", ["peft"]),
        ("class Model:\n    import torch", ["torch"]),
        ("from fixtures import tiny", ["fixtures.tiny", "torch"]),
        ("import tests.merge.tuned", ["tests.merge.tuned", "torch"]),
        ("from exporter.formats.onnx.trace import decoder", ["exporter.formats.onnx.trace.decoder", "torch"]),
        ("import torchless, exporter.cli.main", []),
        ("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch", []),
        ("def model():\n    import torch", []),
    ],
)
def test_what_a_file_imports_is_found_through_other_files(source: str, ends: list[str], tmp_path: Path) -> None:
    file = tmp_path / "file.py"
    file.write_text(source)
    chain = heavy_file(file)
    assert sorted({*chain[:1], *chain[-1:]}) == ends


def imports() -> None:
    import torch

    torch.manual_seed(0)


def nested() -> object:
    return lambda: import_module("llama_cpp")


def skipped() -> None:
    pytest.importorskip("tests.formats.gguf.runtime")


def calls() -> None:
    imports()


def starts() -> None:
    subprocess.run(["true"], check=True)


def light() -> None:
    import json

    assert json


def test_what_a_function_imports_is_found_through_helpers() -> None:
    assert heavy_function(imports) == (f"{__name__}.imports", "torch")
    assert heavy_function(calls)[-1] == "torch"
    assert heavy_function(nested)[-1] == "llama_cpp"
    assert heavy_function(skipped)[-1] == "llama_cpp"
    assert heavy_function(starts) == (f"{__name__}.starts", "subprocess")
    assert heavy_function(light) == ()


_TESTS = """
import subprocess, sys
from importlib.util import find_spec
import pytest

PACKAGE = "onnx" + "runtime"

@pytest.fixture
def model():
    import torch

def test_light(): assert find_spec(PACKAGE)
def test_by_its_fixture(model): raise AssertionError
def test_by_itself(): import torch
@pytest.mark.models
def test_by_its_marker(): raise AssertionError
def test_unseen(): __import__(PACKAGE)
def test_unseen_where_the_package_may_be_missing():
    try:
        __import__(PACKAGE)
    except Exception:
        pass
def test_unseen_in_another_process():
    run = getattr(__import__("sub" + "process"), "run")
    assert run([sys.executable, "-c", "import onnxruntime"]).returncode == 0
def test_by_its_process():
    subprocess.run(["true"])
"""


def test_a_quick_run_leaves_out_what_is_heavy_and_fails_at_what_it_did_not_see(tmp_path: Path) -> None:
    (tmp_path / "test_some.py").write_text(_TESTS)
    (tmp_path / "test_heavy.py").write_text("import torch\ndef test_other(): pass\n")
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = models\n quick\n")
    command = [sys.executable, "-m", "pytest", "-p", "tests.tiers.quick", "--quick", "-p", "no:cacheprovider", "-rA"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    ends = {test: end for end, test in re.findall(r"^(PASSED|FAILED) \S+::(\w+)", done.stdout, re.MULTILINE)}
    assert ends == {
        "test_light": "PASSED",
        "test_unseen": "FAILED",
        "test_unseen_where_the_package_may_be_missing": "FAILED",
        "test_unseen_in_another_process": "FAILED",
    }
    assert "NotQuick: onnxruntime was imported by a quick test" in done.stdout
    assert "4 deselected" in done.stdout
