from __future__ import annotations

import os
from pathlib import Path

import pytest

from exporter.errors import OutputError, UsageError
from tuner.training.folder import staged


def adapter(path: Path) -> Path:
    path.mkdir()
    (path / "adapter_config.json").write_text("old")
    return path


def test_a_failure_leaves_nothing_behind_and_the_old_adapter_alone(tmp_path: Path) -> None:
    out = adapter(tmp_path / "out")

    def fail() -> None:
        with staged(out, force=True) as folder:
            (folder / "adapter_config.json").write_text("new")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert (out / "adapter_config.json").read_text() == "old"
    assert os.listdir(tmp_path) == ["out"]


def test_the_folder_appears_only_when_it_is_complete(tmp_path: Path) -> None:
    out = tmp_path / "new" / "out"
    with staged(out, force=False) as folder:
        (folder / "file").write_text("x")
        assert not out.exists()
    assert os.listdir(out) == ["file"]
    assert os.listdir(out.parent) == ["out"]


def test_force_replaces_an_adapter_as_a_whole(tmp_path: Path) -> None:
    out = adapter(tmp_path / "out")
    with staged(out, force=True) as folder:
        (folder / "file").write_text("x")
    assert os.listdir(out) == ["file"]
    assert os.listdir(tmp_path) == ["out"]


def test_an_existing_output_is_refused(tmp_path: Path) -> None:
    out = adapter(tmp_path / "out")
    with pytest.raises(OutputError, match="out: exists already"), staged(out, force=False):
        pass


@pytest.mark.parametrize("kind", ["folder", "file", "dangling link"])
def test_force_does_not_replace_what_is_no_adapter(kind: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    if kind == "folder":
        out.mkdir()
    elif kind == "file":
        out.touch()
    else:
        out.symlink_to(tmp_path / "none")
    with pytest.raises(OutputError, match="is not an adapter folder"), staged(out, force=True):
        pass
    assert os.path.lexists(out)


def test_an_output_never_swallows_an_input(tmp_path: Path) -> None:
    base = adapter(tmp_path / "base")
    for out in (base, tmp_path):
        with pytest.raises(UsageError, match="would replace an input"), staged(out, force=True, inputs=(base,)):
            pass


def test_an_output_that_cannot_be_written_is_an_output_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError), staged(tmp_path / "file" / "out", force=False):
        pass


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_the_folder_follows_umask(umask: int, tmp_path: Path) -> None:
    old = os.umask(umask)
    try:
        with staged(tmp_path / "out", force=False):
            pass
    finally:
        os.umask(old)
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o777 & ~umask
