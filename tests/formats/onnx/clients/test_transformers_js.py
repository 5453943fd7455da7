"""transformers.js in Node opens the folder unchanged and generates the tokens of transformers."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from fixtures.corpus import PROMPTS
from tests.formats.onnx import reference
from tests.formats.onnx.conftest import Write

pytestmark = pytest.mark.node

TOKENS = 32
SCRIPT = Path(__file__).with_name("generate.mjs")
#: Where ``make node`` installs the library.
LIBRARY = Path(__file__).parents[4] / ".node"


@pytest.fixture
def node() -> str:
    executable = shutil.which("node")
    reason = "" if executable else "Node is not installed"
    if not (LIBRARY / "node_modules" / "@huggingface" / "transformers").is_dir():
        reason = reason or "transformers.js is not installed (make node)"
    if reason:
        # CI requires this client, so it must not pass without it.
        (pytest.fail if os.environ.get("TTEXPORT_REQUIRE_NODE") else pytest.skip)(reason)
    assert executable
    return executable


def generate(node: str, folder: Path, dtype: str, prompts: Sequence[str], **options: str) -> list[dict[str, list[int]]]:
    arguments = json.dumps({"dtype": dtype, **options})
    command = [node, str(SCRIPT), f"{LIBRARY}/", str(folder), arguments, str(TOKENS), *prompts]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    results: list[dict[str, list[int]]] = json.loads(done.stdout.splitlines()[-1])
    return results


def assert_generates_the_same(node: str, folder: Path, base: Path, adapter: Path, prompts: Sequence[str]) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(adapter)
    peft = reference.load(base, adapter)
    results = generate(node, folder, "fp32", prompts)
    for prompt, result in zip(prompts, results, strict=True):
        ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        assert result == {"prompt": ids, "chosen": reference.greedy(peft, ids, TOKENS)}


def test_tiny_model_generates_the_tokens_of_transformers(
    node: str, write: Write, tiny_tied: Path, tiny_adapter: Path
) -> None:
    assert_generates_the_same(node, write(tiny_tied, tiny_adapter), tiny_tied, tiny_adapter, PROMPTS)


@pytest.mark.slow
def test_encoder_decoder_generates_the_tokens_of_transformers(
    node: str, t5_exported: Path, t5_tied: tuple[Path, Path]
) -> None:
    assert_generates_the_same(node, t5_exported, *t5_tied, PROMPTS)


@pytest.mark.smollm2
def test_smollm2_generates_the_tokens_of_transformers(
    node: str, write: Write, smollm2: Path, smollm2_adapter: Path
) -> None:
    assert_generates_the_same(node, write(smollm2, smollm2_adapter), smollm2, smollm2_adapter, PROMPTS[:1])


@pytest.mark.parametrize("dtype", ["fp16", "int8", "q8", "q4", "q4f16"])
def test_every_variant_is_found_by_its_name_and_runs(node: str, write: Write, tiny_tied: Path, dtype: str) -> None:
    """Another build of ONNX Runtime rounds activations differently, so the tokens are not compared."""
    folder = write(tiny_tied, quants=("fp16", "int8", "q4", "q4f16"))
    [result] = generate(node, folder, dtype, PROMPTS[:1])
    assert len(result["chosen"]) == TOKENS
    assert len(set(result["chosen"])) > 1


@pytest.mark.parametrize("dtype", ["q4", "q4f16"])
def test_the_symmetric_variant_is_a_model_of_another_name(node: str, write: Write, tiny_tied: Path, dtype: str) -> None:
    """The only model in its folder, so that transformers.js cannot open another."""
    folder = write(tiny_tied, quants=(f"{dtype}-sym",))
    [result] = generate(node, folder, dtype, PROMPTS[:1], model_file_name="model_sym")
    assert len(set(result["chosen"])) > 1
