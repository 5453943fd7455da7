from __future__ import annotations

import json
import subprocess
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from exporter.errors import OutputError
from exporter.release import manifest
from exporter.release.documents import write_documents
from tests.release.conftest import Drafted
from tests.release.finished import RUN, release

SCHEMA = resources.files("exporter.release").joinpath("manifest.schema.json").read_bytes()


def read(path: Path) -> Any:
    return json.loads(path.read_bytes())


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_manifest_keeps_to_its_schema(finished: Path) -> None:
    jsonschema.Draft202012Validator(json.loads(SCHEMA)).validate(read(finished / "manifest.json"))


def test_the_schema_on_disk_is_that_of_the_code() -> None:
    assert manifest.schema() == SCHEMA


def test_sha256sum_accepts_the_checksums_and_they_list_every_file_but_the_run(finished: Path) -> None:
    done = subprocess.run(["sha256sum", "-c", "--strict", "SHA256SUMS"], cwd=finished, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    listed = {line.partition(": ")[0] for line in done.stdout.splitlines()}
    assert listed == contents(finished).keys() - {"SHA256SUMS", "run.json"}


def test_two_runs_differ_in_their_record_alone(drafted: Drafted, finished: Path, tmp_path: Path) -> None:
    folder = drafted.copy(tmp_path / "elsewhere")
    later = replace(RUN, started="2027-01-01T00:00:00Z", finished="2027-01-01T00:00:09Z", invocation="other")
    write_documents(folder, release(drafted.artifacts), later)
    ours, theirs = contents(finished), contents(folder)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if ours[name] != theirs[name]] == ["run.json"]


def test_no_document_is_written_over_a_file_that_is_there(drafted: Drafted, tmp_path: Path) -> None:
    folder = drafted.copy(tmp_path / "draft")
    (folder / "README.md").write_text("somebody's own\n")
    with pytest.raises(OutputError, match=r"README\.md: File exists"):
        write_documents(folder, release(drafted.artifacts), RUN)
    assert (folder / "README.md").read_text() == "somebody's own\n"
