from __future__ import annotations

import hashlib
import json
import subprocess
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

import jsonschema
import onnx
import pytest
import torch
from gguf import GGUFReader
from google.protobuf.json_format import ParseDict  # type: ignore[import-untyped]  # protobuf ships no stubs
from in_toto_attestation.v1.statement import Statement
from in_toto_attestation.v1.statement_pb2 import Statement as StatementMessage
from safetensors import safe_open

from exporter.errors import BadInput, OutputError
from exporter.release.documents import manifest
from exporter.release.documents.write import NAMES, write_documents
from tests.release.conftest import Drafted
from tests.release.finished import COMMIT, RUN, release

SCHEMA = resources.files("exporter.release.documents").joinpath("manifest.schema.json").read_bytes()


def read(path: Path) -> Any:
    return json.loads(path.read_bytes())


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def digests(values: dict[str, bytes]) -> dict[str, str]:
    return {name: hashlib.sha256(content).hexdigest() for name, content in values.items()}


def test_the_manifest_keeps_to_its_schema(finished: Path) -> None:
    jsonschema.Draft202012Validator(json.loads(SCHEMA)).validate(read(finished / "manifest.json"))


def test_the_schema_on_disk_is_that_of_the_code() -> None:
    assert manifest.schema() == SCHEMA


def test_sha256sum_accepts_the_checksums_which_list_every_file_except_run_json(finished: Path) -> None:
    done = subprocess.run(["sha256sum", "-c", "--strict", "SHA256SUMS"], cwd=finished, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    listed = {line.partition(": ")[0] for line in done.stdout.splitlines()}
    assert listed == contents(finished).keys() - {"SHA256SUMS", "run.json"}


def test_two_runs_differ_only_in_run_json(drafted: Drafted, finished: Path, tmp_path: Path) -> None:
    folder = drafted.copy(tmp_path / "elsewhere")
    later = replace(RUN, started="2027-01-01T00:00:00Z", finished="2027-01-01T00:00:09Z", invocation="other")
    write_documents(folder, release(drafted.artifacts), later)
    ours, theirs = contents(finished), contents(folder)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if ours[name] != theirs[name]] == ["run.json"]


def test_every_file_is_in_the_manifest_with_its_digest(finished: Path) -> None:
    listed = {file["path"]: (file["size"], file["sha256"]) for file in read(finished / "manifest.json")["files"]}
    artifacts = contents(finished).keys() - set(NAMES)
    assert listed == {
        path: (len(content), hashlib.sha256(content).hexdigest())
        for path, content in contents(finished).items()
        if path in artifacts
    }


def test_tensors_have_the_digests_that_other_readers_find(finished: Path) -> None:
    """Compare with the safetensors package, gguf's reader, and onnx with its external data."""
    listed = {file["path"]: file["tensors"] for file in read(finished / "manifest.json")["files"]}
    with safe_open(finished / "hf/model.safetensors", "pt") as file:
        values = {name: file.get_tensor(name).view(torch.uint8).numpy().tobytes() for name in file.keys()}  # noqa: SIM118
    assert listed["hf/model.safetensors"] == digests(values)
    reader = GGUFReader(finished / "gguf/rows-Q8_0.gguf")
    assert listed["gguf/rows-Q8_0.gguf"] == digests({tensor.name: tensor.data.tobytes() for tensor in reader.tensors})
    graph = onnx.load(finished / "onnx/onnx/model.onnx").graph
    assert listed["onnx/onnx/model.onnx"] == digests(
        {value.name: onnx.numpy_helper.to_array(value).tobytes() for value in graph.initializer}
    )


def test_provenance_is_a_statement_about_every_file_and_the_manifest(finished: Path) -> None:
    document = read(finished / "provenance.intoto.json")
    statement = Statement.copy_from_pb(ParseDict(document, StatementMessage()))
    statement.validate()
    subjects = {subject["name"]: subject["digest"]["sha256"] for subject in document["subject"]}
    excluded = {"provenance.intoto.json", "SHA256SUMS", "run.json"}
    assert subjects == digests({path: content for path, content in contents(finished).items() if path not in excluded})
    materials = document["predicate"]["buildDefinition"]["resolvedDependencies"]
    assert [(material["name"], material["digest"]["sha256"][0], material.get("uri")) for material in materials] == [
        ("base: config.json", "a", f"pkg:huggingface/org/tiny@{COMMIT}#config.json"),
        ("base: model.safetensors", "b", f"pkg:huggingface/org/tiny@{COMMIT}#model.safetensors"),
        ("adapter tuned: adapter.safetensors", "c", None),
    ]
    assert document["predicateType"] == "https://slsa.dev/provenance/v1"


def test_documents_other_than_run_json_contain_no_time_and_no_local_path(finished: Path, drafted: Drafted) -> None:
    for path in ("manifest.json", "provenance.intoto.json", "SHA256SUMS", "README.md", "Modelfile"):
        text = (finished / path).read_text()
        assert RUN.started[:10] not in text
        assert str(drafted.folder.parent) not in text


def test_a_missing_artifact_is_refused(drafted: Drafted, tmp_path: Path) -> None:
    folder = drafted.copy(tmp_path / "draft")
    (folder / "gguf/rows-Q8_0.gguf").unlink()
    with pytest.raises(OutputError, match="the artifact of job tuned-gguf-q8_0 does not exist"):
        write_documents(folder, release(drafted.artifacts), RUN)
    assert not (folder / "manifest.json").exists()


def test_a_name_that_checksums_cannot_hold_is_refused(drafted: Drafted, tmp_path: Path) -> None:
    folder = drafted.copy(tmp_path / "draft")
    (folder / "hf" / "two\nlines.txt").touch()
    with pytest.raises(BadInput, match="printable"):
        write_documents(folder, release(drafted.artifacts), RUN)


def test_no_document_replaces_an_existing_file(drafted: Drafted, tmp_path: Path) -> None:
    folder = drafted.copy(tmp_path / "draft")
    (folder / "README.md").write_text("written by hand\n")
    with pytest.raises(OutputError, match=r"README\.md: File exists"):
        write_documents(folder, release(drafted.artifacts), RUN)
    assert (folder / "README.md").read_text() == "written by hand\n"
