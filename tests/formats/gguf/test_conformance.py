"""Our files equal those of llama.cpp's converter in every key and byte, except free text and provenance."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from exporter.formats.gguf import plan_gguf, write_gguf, writer
from exporter.formats.gguf.vocab.tokenizer import vocabulary
from exporter.io.json_objects import read_object
from exporter.sources.hf.checkpoint import auxiliary_files
from tests.conformance.gguf import (
    GOLDEN,
    GOLDEN_VOCABULARIES,
    convert,
    convert_vocabulary,
    digest,
    required_converter,
    tokenizer_keys,
)
from tests.formats.gguf.conftest import Write, merged
from tests.formats.gguf.models import CASES
from tests.formats.gguf.vocab.vocabularies import VOCABULARIES

EACH = [pytest.param(case, ftype, id=f"{case}-{ftype}") for case, (_, ftypes) in CASES.items() for ftype in ftypes]


@pytest.fixture(scope="module")
def golden() -> dict[str, Any]:
    table: dict[str, Any] = json.loads(GOLDEN.read_text(encoding="utf-8"))
    return table


@pytest.mark.parametrize(("case", "ftype"), EACH)
def test_file_equals_that_of_llama_cpps_converter(
    golden: dict[str, Any], tmp_path: Path, write: Write, case: str, ftype: str
) -> None:
    assert digest(write(CASES[case][0](tmp_path / case), ftype=ftype)) == golden[f"{case}-{ftype}"]


@pytest.mark.parametrize("case", ["tied", "llama3", "added"])
def test_without_a_type_the_stored_type_is_kept(
    golden: dict[str, Any], tmp_path: Path, write: Write, case: str
) -> None:
    assert digest(write(CASES[case][0](tmp_path / case))) == golden[f"{case}-BF16"]


@pytest.mark.parametrize("ftype", ["F32", "F16", "Q8_0"])
def test_a_model_cast_to_float32_gives_the_same_file(golden: dict[str, Any], tmp_path: Path, ftype: str) -> None:
    out = tmp_path / "out.gguf"
    write_gguf(plan_gguf(merged(CASES["tied"][0](tmp_path / "tied"), dtype="F32"), ftype), out)
    assert digest(out) == golden[f"tied-{ftype}"]


@pytest.fixture(scope="module")
def golden_vocabularies() -> dict[str, Any]:
    table: dict[str, Any] = json.loads(GOLDEN_VOCABULARIES.read_text(encoding="utf-8"))
    return table


@pytest.mark.parametrize("case", VOCABULARIES)
def test_sentencepiece_tokenizer_equals_that_of_llama_cpps_converter(
    golden_vocabularies: dict[str, Any], tmp_path: Path, case: str
) -> None:
    source = VOCABULARIES[case](tmp_path / case)
    config = read_object(source / "config.json")
    vocab = vocabulary(auxiliary_files(source), config, config["vocab_size"], where=source)
    out = tmp_path / "out.gguf"
    out.write_bytes(writer.header(vocab.keys, [])[0])
    assert tokenizer_keys(out) == golden_vocabularies[case]


@pytest.mark.converter
@pytest.mark.parametrize("case", VOCABULARIES)
def test_golden_tokenizers_are_those_of_the_installed_converter(
    golden_vocabularies: dict[str, Any], tmp_path: Path, case: str
) -> None:
    root = required_converter()
    out = tmp_path / "out.gguf"
    convert_vocabulary(root, VOCABULARIES[case](tmp_path / case), out)
    assert tokenizer_keys(out) == golden_vocabularies[case]


@pytest.mark.converter
@pytest.mark.parametrize(("case", "ftype"), EACH)
def test_golden_digests_are_those_of_the_installed_converter(
    golden: dict[str, Any], tmp_path: Path, case: str, ftype: str
) -> None:
    root = required_converter()
    source, out = CASES[case][0](tmp_path / case), tmp_path / "out.gguf"
    convert(root, source, out, ftype, golden[f"{case}-{ftype}"]["keys"]["tokenizer.ggml.pre"])
    assert digest(out) == golden[f"{case}-{ftype}"]
