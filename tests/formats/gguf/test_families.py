"""Every family: the bytes of llama.cpp's converter, and the logits of transformers."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fixtures.families import FAMILIES, build
from fixtures.tiny import PROMPTS
from tests.conformance.gguf import (
    CHANGES,
    FAMILY_GOLDEN,
    VARIABLE,
    brief,
    convert_family,
    converter,
    digest,
    fingerprint,
    merge_rows,
    row_adapter,
)
from tests.formats.gguf.conftest import Write

#: The bar of the format. Rounding gives about 1e-12, and 2e-7 where llama.cpp looks GELU up in a table of float16.
KL_BAR = 1e-6

Build = Callable[[str], Path]


@pytest.fixture(scope="session")
def family(tmp_path_factory: pytest.TempPathFactory) -> Build:
    """family(name): the tiny checkpoint of a family, made once."""
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = build(name, tmp_path_factory.mktemp("family") / "model")
        return made[name]

    return get


@pytest.fixture(scope="module")
def golden() -> dict[str, Any]:
    table: dict[str, Any] = json.loads(FAMILY_GOLDEN.read_text(encoding="utf-8"))
    return table


@pytest.mark.parametrize("name", FAMILIES)
def test_file_equals_that_of_llama_cpps_converter(
    name: str, golden: dict[str, Any], family: Build, write: Write
) -> None:
    assert brief(digest(write(family(name)))) == golden[f"{name}-BF16"]
    assert fingerprint(brief(digest(write(family(name), ftype="Q8_0")))) == golden[f"{name}-Q8_0"]


@pytest.mark.parametrize("name", FAMILIES)
def test_merged_file_equals_what_the_converter_makes_of_the_merged_checkpoint(
    name: str, golden: dict[str, Any], family: Build, write: Write, tmp_path: Path
) -> None:
    adapter = row_adapter(family(name), tmp_path / "adapter")
    assert fingerprint(brief(digest(write(family(name), adapter)))) == golden[f"{name}-merged"]
    assert fingerprint(golden[f"{name}-BF16"]) != golden[f"{name}-merged"]


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_golden_digests_are_those_of_the_converter_at_hand(
    name: str, golden: dict[str, Any], family: Build, tmp_path: Path
) -> None:
    root = converter()
    if root is None:
        pytest.skip(f"{VARIABLE} does not name an unpacked llama.cpp")
    base = family(name)
    assert convert_family(root, name, base, tmp_path / "base.gguf", "BF16") == golden[f"{name}-BF16"]
    made = convert_family(root, name, base, tmp_path / "q8_0.gguf", "Q8_0")
    assert fingerprint(made) == golden[f"{name}-Q8_0"]
    merged = convert_family(root, name, merge_rows(base, tmp_path / "merged"), tmp_path / "merged.gguf", "BF16")
    assert fingerprint(merged) == golden[f"{name}-merged"]


def test_changes_to_the_converter_are_explained() -> None:
    assert CHANGES.keys() <= FAMILIES.keys()
    assert all(reason for _, reason in CHANGES.values())


def mean_kl(base: Path, file: Path, *, repeat: int = 1) -> float:
    """Mean KL of llama.cpp's logits on ``file`` from those of transformers in float32, over the prompts."""
    runtime = pytest.importorskip("tests.formats.gguf.runtime", reason="llama-cpp-python is not installed")
    ids = AutoTokenizer.from_pretrained(base)(" ".join(PROMPTS))["input_ids"] * repeat
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    with torch.no_grad():
        want = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    got = torch.from_numpy(runtime.logits(file, ids)).double().log_softmax(-1)
    value = float((want.exp() * (want - got)).sum(-1).mean())
    assert not math.isnan(value)
    return value


@pytest.mark.parametrize("name", FAMILIES)
def test_float32_file_computes_what_transformers_computes(name: str, family: Build, write: Write) -> None:
    assert mean_kl(family(name), write(family(name), ftype="F32")) <= KL_BAR
