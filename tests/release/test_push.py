"""Releases pushed to a hub on this machine, as users call it: huggingface_hub reads its settings when imported."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from exporter.errors import NotEquivalent, UsageError
from exporter.release.check import check_release
from exporter.release.documents.signature import Signing
from exporter.release.documents.write import write_documents
from exporter.release.push import push
from fixtures.hub.server import Hub
from fixtures.hub.upload import taking_uploads
from tests.release.conftest import Drafted
from tests.release.documents.test_signature import write_keys
from tests.release.finished import RUN, release
from tests.release.projects import Project

ROOT = Path(__file__).parents[2]
#: What ``ttexport release --push-to-hub`` does once the release is finished.
CODE = """
import json, sys
from pathlib import Path
import click
from exporter.cli.verbs.release_push import push_options, push_release
from exporter.errors import TTExportError

@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@push_options
def finish(folder, **options):
    pushed = push_release(folder, quiet=False, **options)
    print(json.dumps(pushed.to_json()))

try:
    finish(standalone_mode=False)
except TTExportError as exc:
    print(exc, file=sys.stderr)
    sys.exit(exc.exit_code)
"""


#: Ends of the names of variables that would lead past the stand-in, or hide bars that a user sees.
UNWANTED = ("_proxy", "hf_hub_disable_progress_bars")


@dataclass(frozen=True)
class Site:
    hub: Hub
    home: Path

    def push(
        self, folder: Path, *options: str, environment: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        kept = {key: value for key, value in os.environ.items() if not key.lower().endswith(UNWANTED)} | {"CI": ""}
        names = {"HF_ENDPOINT": self.hub.url, "HF_HOME": str(self.home), "HF_HUB_OFFLINE": "0", "HF_TOKEN": "hf_lamp"}
        place = {"PYTHONPATH": str(ROOT), "HF_HUB_DISABLE_XET": "1"}
        command = [sys.executable, "-c", CODE, str(folder), "--push-to-hub", "org/lamps", *options]
        settings = {**kept, **names, **place, **(environment or {})}
        return subprocess.run(command, env=settings, capture_output=True, text=True)

    def pushed(self, folder: Path, *options: str) -> dict[str, Any]:
        done = self.push(folder, *options)
        assert done.returncode == 0, done.stderr
        document: dict[str, Any] = json.loads(done.stdout)
        return document

    def files(self, revision: str = "main") -> dict[str, bytes]:
        repository = self.hub.repositories["org/lamps"]
        return repository.commits[repository.refs[revision]]

    def puts(self) -> list[str]:
        return [line for line in self.hub.requests if line.startswith("PUT ")]


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    with taking_uploads() as hub:
        yield Site(hub, tmp_path / "hf")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_pushed_release_has_the_same_bytes(site: Site, finished: Path, tmp_path: Path) -> None:
    document = site.pushed(finished)
    assert site.files() == {**contents(finished), ".gitattributes": b""}
    assert site.hub.messages == ["Tiny-Lamps 1.0"]
    assert document["commit"] == site.hub.repositories["org/lamps"].refs["main"]
    for path, content in site.files().items():
        (tmp_path / "back" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "back" / path).write_bytes(content)
    assert check_release(tmp_path / "back").passed


def test_branch_message_and_privacy_are_honoured(site: Site, finished: Path) -> None:
    site.pushed(finished, "--revision", "v1.0", "--message", "Lamps, first light", "--private")
    assert site.hub.visibilities == {"org/lamps": "private"}
    assert site.files("main") == {".gitattributes": b""}
    assert site.files("v1.0") == {**contents(finished), ".gitattributes": b""}
    assert site.hub.messages == ["Lamps, first light"]


def test_a_dry_run_lists_the_files_without_network(site: Site, finished: Path) -> None:
    document = site.pushed(finished, "--dry-run")
    assert document["files"] == {path: len(content) for path, content in contents(finished).items()}
    assert document["dry_run"]
    assert site.hub.requests == []


def test_a_push_into_a_log_is_one_line(site: Site, finished: Path) -> None:
    [line] = site.push(finished).stderr.splitlines()
    assert line.startswith(f"org/lamps@main: {len(contents(finished))} files, ")


def test_in_ci_a_push_is_dry_by_default(site: Site, finished: Path) -> None:
    assert json.loads(site.push(finished, environment={"CI": "true"}).stdout)["dry_run"]
    assert site.hub.requests == []
    assert not json.loads(site.push(finished, "--no-dry-run", environment={"CI": "true"}).stdout)["dry_run"]


def test_a_second_push_of_the_same_release_makes_no_commit(site: Site, finished: Path) -> None:
    first, second = site.pushed(finished), site.pushed(finished)
    assert first["commit"] == second["commit"]
    assert len(site.hub.messages) == 1


def test_files_of_an_earlier_release_are_deleted_and_other_files_are_kept(site: Site, finished: Path) -> None:
    site.pushed(finished)
    repository, listing = site.hub.repositories["org/lamps"], json.loads(site.files()["manifest.json"])
    old: dict[str, Any] = {"path": "gguf/old[1].gguf", "kind": "model", "size": 1, "sha256": "a" * 64, "tensors": {}}
    listing["files"].append(old)
    changed: dict[str, bytes] = {
        "manifest.json": json.dumps(listing).encode(),
        "gguf/old[1].gguf": b"x",
        "picture.png": b"y",
    }
    repository.commit(site.files() | changed)
    assert site.pushed(finished)["deleted"] == [old["path"]]
    assert site.files() == {**contents(finished), ".gitattributes": b"", "picture.png": b"y"}


def test_a_signature_does_not_outlive_its_release(site: Site, finished: Path, drafted: Drafted, tmp_path: Path) -> None:
    private, _ = write_keys(tmp_path)
    signed = drafted.copy(tmp_path / "signed")
    write_documents(signed, release(drafted.artifacts), RUN, signing=Signing(private_key=private))
    site.pushed(signed)
    assert "model.sig" in site.files()
    assert site.pushed(finished)["deleted"] == ["model.sig"]
    assert site.files() == {**contents(finished), ".gitattributes": b""}


@pytest.mark.parametrize("fault", ["broken once", "drop once"])
def test_a_temporary_fault_is_retried(site: Site, finished: Path, fault: str) -> None:
    site.hub.faults["/lfs-storage/"] = fault
    site.pushed(finished)
    assert site.files() == {**contents(finished), ".gitattributes": b""}


@pytest.mark.parametrize(("fault", "message"), [("broken", "HTTP 500"), ("drop", "the upload failed: ")])
def test_a_commit_that_fails_changes_nothing_and_the_next_push_sends_no_large_file_again(
    site: Site, finished: Path, fault: str, message: str
) -> None:
    site.hub.faults["/api/models/org/lamps/commit/"] = fault
    done = site.push(finished)
    assert done.returncode == 7
    assert message in done.stderr
    assert "run the command again with --resume" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert site.files() == {".gitattributes": b""}
    sent = site.puts()
    site.hub.faults.clear()
    site.pushed(finished)
    assert site.files() == {**contents(finished), ".gitattributes": b""}
    assert site.puts() == sent


def test_an_earlier_release_that_cannot_be_read_is_not_replaced(site: Site, finished: Path) -> None:
    site.pushed(finished)
    site.hub.faults["/org/lamps/resolve/"] = "forbidden"
    done = site.push(finished)
    assert done.returncode == 7
    assert "HTTP 403" in done.stderr


@pytest.mark.parametrize("fault", ["unauthorised", "forbidden"])
def test_a_token_without_write_access_is_named(site: Site, finished: Path, fault: str) -> None:
    site.hub.faults["/api/repos/create"] = fault
    done = site.push(finished)
    assert done.returncode == 7
    assert "set HF_TOKEN to a token with write access" in done.stderr


def test_offline_mode_is_named(site: Site, finished: Path) -> None:
    done = site.push(finished, environment={"HF_HUB_OFFLINE": "1"})
    assert done.returncode == 7
    assert "HF_HUB_OFFLINE disables uploads" in done.stderr


def test_a_changed_release_is_not_sent(finished: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(finished, tmp_path / "release")
    (folder / "README.md").write_text("better\n")
    with pytest.raises(NotEquivalent, match="the folder does not match its manifest"):
        push(folder, "org/lamps", dry_run=True)


@pytest.mark.parametrize("repo", ["lamps", "a/b/c", "org/", "--x/y", ""])
def test_an_invalid_repository_id_is_refused_first(finished: Path, repo: str) -> None:
    with pytest.raises(UsageError, match="expected org/name"):
        push(finished, repo, dry_run=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--push-to-hub", "lamps"], "--push-to-hub: expected org/name, found 'lamps'"),
        (["--no-dry-run"], "--revision, --message, --private and --dry-run require --push-to-hub"),
        (["--revision", "v1"], "--revision, --message, --private and --dry-run require --push-to-hub"),
    ],
)
def test_invalid_options_of_a_push_are_refused_before_anything_is_made(
    options: list[str], message: str, project: Project, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert project.write("one").release(tmp_path / "out", *options) == 2
    assert capsys.readouterr().err == f"ttexport: {message}\n"
    assert [path.name for path in tmp_path.iterdir()] == ["project"]


def test_a_release_that_could_not_be_sent_is_sent_by_resume(
    project: Project, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Offline, so that the upload fails; then dry, so that it is not needed."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    project.write("one", formats="[hf]\n")
    piece, joined = tmp_path / "piece", tmp_path / "joined"
    assert project.release(piece, "--only", "hf") == 0
    for out, how in ((tmp_path / "out", ()), (joined, ("--assemble", piece))):
        assert project.release(out, *how, "--push-to-hub", "org/lamps", "--no-dry-run") == 7
        assert "run the command again with --resume" in capsys.readouterr().err
        run = (out / "run.json").read_bytes()
        assert project.release(out, *how, "--push-to-hub", "org/lamps", "--resume", "--dry-run", "--json") == 0
        assert json.loads(capsys.readouterr().out)["pushed"]["files"].keys() == contents(out).keys()
        assert (out / "run.json").read_bytes() == run, "made again"
