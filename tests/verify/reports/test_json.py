"""report.json: follows its schema, is the same in every run, and has the content of the other forms."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from exporter.cli.main import run
from exporter.sources.hf.checkpoint import Checkpoint
from exporter.verify.findings import RowErrors
from exporter.verify.report import SCHEMA as VERSION
from exporter.verify.report import Check, Report, document
from tests.support.documents import SCHEMA, read_report, validate
from tests.support.trained import TRAINED_IDS
from tests.verify.conftest import Tuned

FORMS = ("report.json", "report.xml", "report.html")


def test_the_schema_is_one_and_of_the_version_that_is_written() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    assert SCHEMA["properties"]["schema"]["const"] == VERSION
    assert SCHEMA["$id"].endswith(f":{VERSION}")


FAULTS: dict[str, Callable[[dict[str, Any]], object]] = {
    "another version": lambda report: report.update(schema=VERSION + 1),
    "an unknown key": lambda report: report["artifacts"][0].update(note="?"),
    "a check without a value": lambda report: report["artifacts"][0]["checks"][0].pop("value"),
    "a verdict that is no boolean": lambda report: report["artifacts"][0].update(passed="yes"),
    "an unknown kind": lambda report: report["artifacts"][0]["profile"]["traces"][0]["kinds"].append("other"),
    "digests without an environment": lambda report: report.pop("environment"),
    "half a digest": lambda report: report["files"][0].update(sha256="00"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_schema_refuses(fault: str, report: Path) -> None:
    document = copy.deepcopy(read_report(report))
    FAULTS[fault](document)
    with pytest.raises(jsonschema.ValidationError):
        validate(document)


@pytest.mark.parametrize("use", ["embedding", "encoder embedding", "head"])
def test_rows_of_every_matrix_follow_the_schema(use: str) -> None:
    errors = RowErrors(use, "Q8_0", [3], [0.01], [1.0])
    checks = [Check(name="tie", passed=True)]
    report = Report(artifact=Path("out"), format="onnx", level="rows", checks=checks, facts={}, rows=[errors])
    validate(document([report]))


def test_it_names_the_files_the_base_and_the_adapter_by_digest(report: Path, tuned: Tuned) -> None:
    document = read_report(report)
    q8_0 = next(n for n, entry in enumerate(document["artifacts"]) if entry["artifact"].endswith("q8_0.gguf"))
    (file,) = (entry for entry in document["files"] if entry["artifact"] == q8_0)
    assert file["sha256"] == hashlib.sha256(tuned.q8_0.read_bytes()).hexdigest()
    assert document["reference"]["embedding_sha256"] == Checkpoint.open(tuned.base).embedding_digest
    weights = (tuned.adapter / "adapter_model.safetensors").read_bytes()
    assert document["reference"]["adapters"][0]["sha256"] == hashlib.sha256(weights).hexdigest()
    assert document["environment"]["packages"]["numpy"]


def test_every_kind_of_position_is_measured_and_every_trained_token_run(report: Path) -> None:
    for artifact in read_report(report)["artifacts"]:
        figures = artifact["profile"]["figures"]
        assert set(figures) == {"all", "control", "user", "trained as input", "trained as target", "beside trained"}
        assert figures["trained as input"]["positions"] == len(TRAINED_IDS)
        assert figures["all"]["positions"] == sum(
            values["positions"] for kind, values in figures.items() if kind != "all"
        )
        assert artifact["facts"]["trained tokens run"] == f"{len(TRAINED_IDS)} of {len(TRAINED_IDS)}"


def test_a_users_text_keeps_its_trained_tokens(report: Path) -> None:
    traces = read_report(report)["artifacts"][0]["profile"]["traces"]
    texts = ["".join(trace["words"]) for trace in traces if "user" in trace["kinds"]]
    assert texts[0].endswith("<|im_end|>")


def test_the_fault_shows_in_the_figures_of_its_artifact_alone(report: Path) -> None:
    figures = {
        Path(entry["artifact"]).name: entry["profile"]["figures"]["all"] for entry in read_report(report)["artifacts"]
    }
    assert figures["broken.gguf"]["mean KL"] > 100 * figures["onnx"]["mean KL"]
    assert figures["onnx"]["top-1"] == figures["hf"]["top-1"] == 1
    assert abs(figures["broken.gguf"]["perplexity difference"]) > abs(figures["onnx"]["perplexity difference"])


def test_rows_are_measured_against_their_change(report: Path) -> None:
    shares = {}
    for artifact in read_report(report)["artifacts"]:
        (rows,) = artifact["rows"]
        assert rows["token_ids"] == sorted(TRAINED_IDS)
        shares[rows["storage"]] = max(e / c for e, c in zip(rows["errors"], rows["changes"], strict=True))
    assert shares["F32"] == 0, "what the adapter holds is float32"
    assert 0 < shares["BF16"] < shares["Q8_0"] < 1


@pytest.mark.slow
def test_two_runs_write_the_same_bytes(tuned: Tuned, tmp_path: Path) -> None:
    for name in ("one", "two"):
        assert run([*tuned.argv(tuned.onnx), "--report", str(tmp_path / name)]) == 0
    for form in FORMS:
        assert (tmp_path / "one" / form).read_bytes() == (tmp_path / "two" / form).read_bytes()


def test_a_merge_puts_all_forms_into_both_places(tuned: Tuned, tmp_path: Path) -> None:
    out, folder = tmp_path / "out", tmp_path / "report"
    argv = ["merge", str(tuned.adapter), "--base", str(tuned.base), "--to", "hf", "--to", "gguf", "-q"]
    assert run([*argv, "-o", str(out), "--report", str(folder)]) == 0
    assert read_report(folder)["artifacts"][0]["artifact"] == str(out / "hf")
    assert read_report(out)["artifacts"][0]["artifact"] == "hf"
    assert all((place / form).is_file() for place in (out, folder) for form in FORMS)
    assert str(tmp_path) not in (out / "report.html").read_text(), "the folder may move"


def test_every_part_of_a_split_file_has_its_digest(
    tiny_untied: Path, tiny_untied_adapter: Path, tmp_path: Path
) -> None:
    argv = ["merge", str(tiny_untied_adapter), "--base", str(tiny_untied), "--to", "gguf", "--to", "gguf-lora", "-q"]
    argv += ["--split-max-tensors", "8", "-o", str(tmp_path / "out"), "--report", str(tmp_path / "report")]
    assert run(argv) == 0
    document = read_report(tmp_path / "report")
    assert [entry["format"] for entry in document["artifacts"]] == ["gguf", "gguf-lora"]
    parts = sorted(path.name for path in (tmp_path / "out" / "gguf").iterdir())
    assert len(parts) > 1
    assert [file["file"] for file in document["files"] if file["artifact"] == 0] == parts


def test_without_a_report_a_merge_writes_json_alone(tuned: Tuned, tmp_path: Path) -> None:
    out = tmp_path / "out"
    argv = ["merge", str(tuned.adapter), "--base", str(tuned.base), "--to", "hf", "--to", "gguf", "-q"]
    assert run([*argv, "-o", str(out)]) == 0
    assert "files" not in read_report(out)
    assert not (out / "report.html").exists()


def test_json_on_stdout_follows_the_schema(tuned: Tuned, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*tuned.argv(tuned.gguf), "--level", "rows", "--json"]) == 0
    validate(json.loads(capsys.readouterr().out))
