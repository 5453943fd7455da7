from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from exporter.errors import OutputError, UsageError
from tuner.training.folder import staged_adapter


def adapter(path: Path) -> Path:
    path.mkdir()
    (path / "adapter_config.json").write_text("old")
    return path


def test_a_failure_leaves_nothing_behind_and_the_old_adapter_alone(tmp_path: Path) -> None:
    out = adapter(tmp_path / "out")

    def fail() -> None:
        with staged_adapter(out, force=True) as folder:
            (folder / "adapter_config.json").write_text("new")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert (out / "adapter_config.json").read_text() == "old"
    assert os.listdir(tmp_path) == ["out"]


def test_the_folder_appears_only_when_it_is_complete(tmp_path: Path) -> None:
    out = tmp_path / "new" / "out"
    with staged_adapter(out, force=False) as folder:
        (folder / "file").write_text("x")
        assert not out.exists()
    assert os.listdir(out) == ["file"]
    assert os.listdir(out.parent) == ["out"]


def test_force_replaces_an_adapter_as_a_whole(tmp_path: Path) -> None:
    out = adapter(tmp_path / "out")
    with staged_adapter(out, force=True) as folder:
        (folder / "file").write_text("x")
    assert os.listdir(out) == ["file"]
    assert os.listdir(tmp_path) == ["out"]


def test_force_replaces_a_link_to_an_adapter_and_not_the_adapter(tmp_path: Path) -> None:
    elsewhere = adapter(tmp_path / "elsewhere")
    out = tmp_path / "out"
    out.symlink_to(elsewhere)
    with staged_adapter(out, force=True) as folder:
        (folder / "file").write_text("x")
    assert not out.is_symlink()
    assert os.listdir(out) == ["file"]
    assert os.listdir(elsewhere) == ["adapter_config.json"]
    assert sorted(os.listdir(tmp_path)) == ["elsewhere", "out"]


def test_an_existing_output_is_refused(tmp_path: Path) -> None:
    out = adapter(tmp_path / "out")
    with pytest.raises(OutputError, match="out: the output exists already"), staged_adapter(out, force=False):
        pass


def test_an_output_that_another_run_is_writing_is_refused(tmp_path: Path) -> None:
    with (
        staged_adapter(tmp_path / "out", force=False),
        pytest.raises(OutputError, match="another run is writing this output"),
        staged_adapter(tmp_path / "out", force=False),
    ):
        pass


@pytest.mark.parametrize("occupant", ["folder", "file", "dangling link"])
def test_force_does_not_replace_anything_but_an_adapter(occupant: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    if occupant == "folder":
        out.mkdir()
    elif occupant == "file":
        out.touch()
    else:
        out.symlink_to(tmp_path / "none")
    with pytest.raises(OutputError, match="the output is not an adapter folder"), staged_adapter(out, force=True):
        pass
    assert os.path.lexists(out)


def test_an_output_never_replaces_an_input(tmp_path: Path) -> None:
    base = adapter(tmp_path / "base")
    for out in (base, tmp_path):
        with (
            pytest.raises(UsageError, match="expected an output path that overwrites no input"),
            staged_adapter(out, force=True, inputs=(base,)),
        ):
            pass


def test_an_output_that_cannot_be_written_is_an_output_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError), staged_adapter(tmp_path / "file" / "out", force=False):
        pass


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_folders_and_files_follow_umask(umask: int, tmp_path: Path) -> None:
    old = os.umask(umask)
    try:
        with staged_adapter(tmp_path / "out", force=False) as folder:
            (folder / "sub").mkdir()
            os.close(os.open(folder / "sub" / "private", os.O_CREAT, 0o600))
    finally:
        os.umask(old)
    modes = [stat.S_IMODE((tmp_path / "out" / name).stat().st_mode) for name in (".", "sub", "sub/private")]
    assert modes == [0o777 & ~umask, 0o777 & ~umask, 0o666 & ~umask]
