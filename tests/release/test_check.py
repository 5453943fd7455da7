from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from exporter.cli.main import run
from exporter.errors import NotEquivalent, UnreadableFile
from exporter.release.check import check_release, require_as_released
from exporter.release.documents import checksums, manifest, provenance
from exporter.release.documents import run_record as record
from tests.release.finished import RUN
from tests.test_light_imports import run_and_list


@pytest.fixture
def mine(finished: Path, tmp_path: Path) -> Path:
    """A release to tamper with."""
    return shutil.copytree(finished, tmp_path / "release")


def failures(folder: Path) -> dict[str, str]:
    return {check.name: check.detail for check in check_release(folder).failures}


def refused(folder: Path) -> int:
    """The exit code of the check."""
    try:
        require_as_released(check_release(folder))
    except (NotEquivalent, UnreadableFile) as exc:
        return exc.exit_code
    return 0


def test_a_release_is_as_released_from_the_command_line(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["verify", str(finished), "--json"]) == 0
    document: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert document["passed"]
    assert [skip["name"] for skip in document["artifacts"][0]["skipped"]] == ["signature"]


def test_a_flipped_bit_in_any_file_is_found(mine: Path) -> None:
    for path in sorted(path for path in mine.rglob("*") if path.is_file()):
        content = path.read_bytes()
        for at in (0, len(content) // 2, len(content) - 1):
            path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
            assert run(["verify", str(mine), "-q"]) in ((3, 4) if path.name == "manifest.json" else (3,)), (path, at)
        path.write_bytes(content)
    assert failures(mine) == {}


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["manifest.json", "provenance.intoto.json", "SHA256SUMS", "run.json", "README.md", "Modelfile"]
)
def test_every_line_of_a_document_counts(mine: Path, name: str) -> None:
    """Each line in turn is deleted, doubled, and altered in its middle."""
    path = mine / name
    lines = path.read_bytes().splitlines(keepends=True)
    for number, line in enumerate(lines):
        middle = len(line) // 2
        for other in (b"", line + line, line[:middle] + bytes([line[middle] ^ 1]) + line[middle + 1 :]):
            path.write_bytes(b"".join([*lines[:number], other, *lines[number + 1 :]]))
            assert refused(mine) in ({3, 4} if name == "manifest.json" else {3}), (number, other)


def test_added_and_missing_files_are_found(mine: Path) -> None:
    (mine / "hf" / "pytorch_model.bin").write_bytes(b"x")
    (mine / "empty").mkdir()
    (mine / "onnx" / "config.json").unlink()
    assert (
        failures(mine)["files"] == "onnx/config.json: listed in the manifest, but missing from the folder (and 2 more)"
    )


def test_files_of_git_and_the_hub_are_ignored(mine: Path) -> None:
    for path in (".gitattributes", ".git/config", ".cache/huggingface/download/x.lock"):
        (mine / path).parent.mkdir(parents=True, exist_ok=True)
        (mine / path).write_text("x")
    assert failures(mine) == {}
    (mine / "hf" / ".gitattributes").write_text("x")
    assert failures(mine).keys() == {"files"}


def test_a_folder_of_links_as_in_the_hubs_cache_is_a_release(finished: Path, tmp_path: Path) -> None:
    for path in finished.rglob("*"):
        link = tmp_path / "snapshot" / path.relative_to(finished)
        link.mkdir(parents=True) if path.is_dir() else link.symlink_to(path)
    assert failures(tmp_path / "snapshot") == {}


@pytest.mark.parametrize("name", ["SHA256SUMS", "provenance.intoto.json", "run.json"])
def test_a_missing_document_is_found(mine: Path, name: str) -> None:
    (mine / name).unlink()
    assert failures(mine) == {name: "no such file"}


def test_a_pipe_in_place_of_a_file_is_refused_at_once(mine: Path) -> None:
    (mine / "hf" / "config.json").unlink()
    os.mkfifo(mine / "hf" / "config.json")
    assert failures(mine)["digests"] == "hf/config.json: expected a regular file, found a pipe"


def agree(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the manifest and rewrite the other documents consistently, without a key to sign with."""
    document = json.loads((folder / "manifest.json").read_bytes())
    change(document)
    built = msgspec.convert(document, manifest.Manifest)
    content, statement = manifest.to_bytes(built), provenance.to_bytes(built)
    (folder / "manifest.json").write_bytes(content)
    (folder / "provenance.intoto.json").write_bytes(statement)
    sums = checksums.to_bytes(built, {"manifest.json": content, "provenance.intoto.json": statement})
    (folder / "SHA256SUMS").write_bytes(sums)
    (folder / "run.json").write_bytes(record.to_bytes(RUN, content, None))


def other_tensor(document: dict[str, Any]) -> None:
    file = next(file for file in document["files"] if file["path"] == "hf/model.safetensors")
    file["tensors"]["model.norm.weight"] = "0" * 64


def other_kind(document: dict[str, Any]) -> None:
    document["files"][0]["kind"] = "weights"


def other_order(document: dict[str, Any]) -> None:
    document["files"].reverse()


def other_verdict(document: dict[str, Any]) -> None:
    document["artifacts"][0]["verdict"]["passed"] = False


def other_artifact(document: dict[str, Any]) -> None:
    document["artifacts"][0]["path"] = "gguf/rows-F16.gguf"


def other_title(document: dict[str, Any]) -> None:
    document["models"]["tuned"]["name"] = "Large"


CHANGES: list[tuple[Callable[[dict[str, Any]], None], str, str]] = [
    (other_tensor, "tensors", "hf/model.safetensors: model.norm.weight: expected sha256 0000"),
    (other_kind, "tensors", "Modelfile: expected kind weights, found modelfile"),
    (other_order, "manifest.json", "expected the files to be listed in sorted order, each once"),
    (other_verdict, "artifacts", "the verification of this artifact failed"),
    (other_artifact, "artifacts", "the manifest lists no file of this artifact (job "),
    (other_title, "cards and Modelfiles", "Modelfile: line 1: expected b'# Large"),
]


@pytest.mark.parametrize(("change", "name", "detail"), CHANGES, ids=lambda value: getattr(value, "__name__", ""))
def test_a_manifest_that_contradicts_the_files_is_found_despite_consistent_documents(
    mine: Path, change: Callable[[dict[str, Any]], None], name: str, detail: str
) -> None:
    agree(mine, lambda document: None)
    assert failures(mine) == {}
    agree(mine, change)
    assert detail in failures(mine)[name]


def test_cards_of_another_version_are_not_made_again(mine: Path) -> None:
    agree(mine, lambda document: document["tools"].update(Jinja2="1.0"))
    report = check_release(mine)
    rendered_again = "cards and Modelfiles rendered again"
    assert {skip.name: skip.reason for skip in report.skipped}[rendered_again].startswith(
        "the documents were rendered with Jinja2 1.0"
    )
    assert report.passed


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "manifest.json is not valid JSON"),
        (b"[]", "manifest.json: expected a JSON object"),
        (b'{"schema": 1, "schema": 1}', "manifest.json: schema: expected a unique key, found the same key twice"),
        (b'{"schema": 1}', "expected a JSON document with ttexport's schema 2"),
        (b"[" * 100_000, "manifest.json is not valid JSON"),
        (b"\xff", "manifest.json is not valid JSON"),
        (
            b'{"spec": [' + b"{}," * 5_000_000 + b"{}]}",
            "manifest.json: expected JSON that needs at most 128 MB of memory",
        ),
        (None, "no such file"),
    ],
)
def test_a_manifest_that_cannot_be_read_is_bad_input(
    mine: Path, content: bytes | None, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (mine / "manifest.json").unlink()
    if content is not None:
        (mine / "manifest.json").write_bytes(content)
    assert run(["verify", str(mine), "-q"]) == 4
    line = capsys.readouterr().err
    assert f"manifest.json: {message}" in line
    assert line.count("\n") == 1


@pytest.mark.parametrize("path", ["../secret", "/etc/passwd", "a//b", "./a", "a\\b", "a\nb", ""])
def test_a_manifest_with_paths_outside_of_its_folder_is_bad_input(mine: Path, path: str) -> None:
    document = json.loads((mine / "manifest.json").read_bytes())
    document["files"][0]["path"] = path
    (mine / "manifest.json").write_text(json.dumps(document))
    with pytest.raises(UnreadableFile, match="expected paths below the release"):
        check_release(mine)


@pytest.mark.parametrize("keys", [("artifacts", 0, "model"), ("models", "tuned", "adapters", 0)])
def test_a_manifest_with_unknown_references_is_bad_input(mine: Path, keys: tuple[Any, ...]) -> None:
    document = json.loads((mine / "manifest.json").read_bytes())
    place = document
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = "absent"
    (mine / "manifest.json").write_text(json.dumps(document))
    with pytest.raises(
        UnreadableFile, match=r"(belongs to the model|uses the adapter) 'absent', which the manifest does not define"
    ):
        check_release(mine)


def test_checking_a_release_imports_nothing_that_runs_models(finished: Path) -> None:
    code, loaded = run_and_list("verify", finished)
    assert code == 0
    assert set(loaded) == {"onnx", "jinja2"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--adapter", "a"], "require --reference"),
        (["--report", "r"], "require --reference"),
        (["--level", "full"], "require --reference"),
        (["--public-key", "k", "--identity", "me", "--issuer", "i"], "mutually exclusive"),
        (["--identity", "me"], "must be given together"),
        (["--reference", "b", "--public-key", "k"], "cannot be combined with --reference"),
    ],
)
def test_contradicting_options_are_refused(
    finished: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["verify", str(finished), *options]) == 2
    assert message in capsys.readouterr().err


def test_an_artifact_still_needs_its_reference(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["verify", str(finished / "hf")]) == 2
    assert "--reference is required" in capsys.readouterr().err
