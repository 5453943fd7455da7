from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from exporter.errors import OutputError
from exporter.io import staging
from exporter.io.staging import staged, write_file

HOLD = """
import os, sys
from pathlib import Path
from exporter.io.staging import staged
with staged(Path(sys.argv[1]), force=True) as draft:
    draft.write_text("half")
    print("ready", flush=True)
    sys.stdin.read()
"""


def build(draft: Path, file_type: str, text: str) -> None:
    if file_type == "folder":
        (draft / "deep").mkdir(parents=True)
        write_file(draft / "deep" / "file", text.encode())
    else:
        write_file(draft, text.encode())


def break_off(draft: Path, file_type: str, error: type[BaseException]) -> None:
    build(draft, file_type, "half")
    raise error("broken")


def content(path: Path) -> str:
    return (path / "deep" / "file" if path.is_dir() else path).read_text()


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@contextmanager
def holder(final: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process inside ``staged``; it ends when its standard input ends."""
    command = [sys.executable, "-c", HOLD, str(final)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield process
        process.kill()


@pytest.mark.parametrize("file_type", ["file", "folder"])
def test_the_output_appears_when_the_body_has_ended(file_type: str, tmp_path: Path) -> None:
    final = tmp_path / "new" / "out"
    with staged(final, force=False) as draft:
        assert draft.name == final.name
        build(draft, file_type, "whole")
        assert not final.exists()
    assert content(final) == "whole"
    assert left(final.parent) == ["out"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_an_exception_leaves_nothing(error: type[BaseException], tmp_path: Path) -> None:
    with pytest.raises(error), staged(tmp_path / "out", force=False) as draft:
        break_off(draft, "folder", error)
    assert left(tmp_path) == []


@pytest.mark.parametrize("file_type", ["file", "folder"])
def test_an_exception_leaves_the_old_artifact_unchanged(file_type: str, tmp_path: Path) -> None:
    build(tmp_path / "out", file_type, "old")
    with pytest.raises(ValueError, match="broken"), staged(tmp_path / "out", force=True) as draft:
        break_off(draft, file_type, ValueError)
    assert content(tmp_path / "out") == "old"
    assert left(tmp_path) == ["out"]


@pytest.mark.parametrize("file_type", ["file", "folder", "dangling link"])
def test_an_existing_output_is_not_replaced_without_force(file_type: str, tmp_path: Path) -> None:
    if file_type == "dangling link":
        (tmp_path / "out").symlink_to("nowhere")
    else:
        build(tmp_path / "out", file_type, "old")
    with (
        pytest.raises(OutputError, match="the output exists already; use --force to replace the output"),
        staged(tmp_path / "out", force=False),
    ):
        raise AssertionError("the body must not run")
    assert left(tmp_path) == ["out"]


@pytest.mark.parametrize("old", ["file", "folder"])
@pytest.mark.parametrize("new", ["file", "folder"])
def test_force_replaces_files_and_folders_by_either(old: str, new: str, tmp_path: Path) -> None:
    build(tmp_path / "out", old, "old")
    with staged(tmp_path / "out", force=True) as draft:
        build(draft, new, "new")
        assert content(tmp_path / "out") == "old"
    assert content(tmp_path / "out") == "new"
    assert left(tmp_path) == ["out"]


@pytest.mark.parametrize("file_type", ["file", "folder"])
def test_force_replaces_on_file_systems_without_exchange(
    file_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(source: Path, target: Path, flags: int) -> None:
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(staging, "_renameat2", missing)
    build(tmp_path / "out", file_type, "old")
    with staged(tmp_path / "out", force=True) as draft:
        build(draft, file_type, "new")
    assert content(tmp_path / "out") == "new"
    assert left(tmp_path) == ["out"]


def test_force_replaces_a_link_and_not_its_target(tmp_path: Path) -> None:
    build(tmp_path / "elsewhere", "folder", "precious")
    (tmp_path / "out").symlink_to("elsewhere")
    with staged(tmp_path / "out", force=True) as draft:
        build(draft, "folder", "new")
    assert not (tmp_path / "out").is_symlink()
    assert (content(tmp_path / "out"), content(tmp_path / "elsewhere")) == ("new", "precious")


def test_a_name_that_appears_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    def race() -> None:
        with staged(tmp_path / "out", force=False) as draft:
            build(draft, "file", "mine")
            build(tmp_path / "out", "file", "theirs")

    with pytest.raises(OutputError, match="another run finished this output first"):
        race()
    assert content(tmp_path / "out") == "theirs"
    assert left(tmp_path) == ["out"]


def test_the_leftover_of_a_killed_process_is_cleared(tmp_path: Path) -> None:
    final = tmp_path / "out"
    with holder(final) as process:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert left(tmp_path) == [".out.partial"]
    with staged(final, force=False) as draft:
        assert left(draft.parent) == []
        build(draft, "folder", "second")
    assert content(final) == "second"
    assert left(tmp_path) == ["out"]


def test_a_second_concurrent_run_is_refused_without_effect(tmp_path: Path) -> None:
    final = tmp_path / "out"
    with holder(final) as process:
        with pytest.raises(OutputError, match="another run is writing this output"), staged(final, force=True):
            raise AssertionError("the body must not run")
        process.communicate("")
        assert process.returncode == 0
    assert content(final) == "half"
    assert left(tmp_path) == ["out"]


def test_a_link_in_place_of_the_staging_folder_is_not_followed(tmp_path: Path) -> None:
    build(tmp_path / "precious", "folder", "kept")
    (tmp_path / ".out.partial").symlink_to("precious")
    with pytest.raises(OutputError), staged(tmp_path / "out", force=False):
        raise AssertionError("the body must not run")
    assert content(tmp_path / "precious") == "kept"


def test_clearing_a_leftover_removes_links_and_keeps_their_targets(tmp_path: Path) -> None:
    build(tmp_path / "precious", "folder", "kept")
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "link").symlink_to("../precious")
    with staged(tmp_path / "out", force=False) as draft:
        build(draft, "file", "new")
    assert content(tmp_path / "precious") == "kept"
    assert left(tmp_path) == ["out", "precious"]


def test_a_body_that_builds_nothing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(OutputError), staged(tmp_path / "out", force=False):
        pass
    assert left(tmp_path) == []


@pytest.mark.parametrize("name", [".", "..", "/"])
def test_a_folder_that_always_exists_is_refused_as_output(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OutputError, match="expected the path of a new file or folder"), staged(Path(name), force=True):
        raise AssertionError("the body must not run")


def test_a_parent_that_is_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="file"), staged(tmp_path / "file" / "out", force=False):
        raise AssertionError("the body must not run")


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_modes_follow_the_umask(umask: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        with staged(tmp_path / "out", force=False) as draft:
            build(draft, "folder", "x")
    finally:
        os.umask(before)
    assert (tmp_path / "out" / "deep" / "file").stat().st_mode & 0o777 == 0o666 & ~umask
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o777 & ~umask


def test_a_small_file_is_never_written_over_another(tmp_path: Path) -> None:
    write_file(tmp_path / "x", b"first")
    with pytest.raises(OutputError, match="exists"):
        write_file(tmp_path / "x", b"second")
    assert (tmp_path / "x").read_bytes() == b"first"
