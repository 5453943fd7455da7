from __future__ import annotations

import shutil
from contextlib import suppress
from pathlib import Path

import pytest

from exporter.errors import OutputError
from exporter.io import staging
from exporter.io.staging import has_leftover, resumable, staging_folder


def interrupt(final: Path, *, keep: bool = True) -> None:
    with suppress(KeyboardInterrupt), resumable(final, force=False, resume=False) as stage:
        (stage.draft / "file").write_text("half")
        stage.keep = keep
        raise KeyboardInterrupt


def finish(final: Path, text: str, *, force: bool = False, resume: bool = False) -> None:
    with resumable(final, force=force, resume=resume) as stage:
        (stage.draft / "file").write_text(text)


def end_before_cleaning(final: Path, text: str, monkeypatch: pytest.MonkeyPatch, *, force: bool = False) -> None:
    """Like a process that dies right after the rename."""
    with monkeypatch.context() as patch:
        patch.setattr(staging, "_discard", lambda folder: None)
        finish(final, text, force=force)
    assert staging_folder(final).exists()


def test_a_kept_draft_is_resumed(tmp_path: Path) -> None:
    final = tmp_path / "out"
    interrupt(final)
    with resumable(final, force=False, resume=True) as stage:
        assert (stage.draft / "file").read_text() == "half"
        (stage.draft / "more").write_text("whole")
    assert sorted(path.name for path in final.iterdir()) == ["file", "more"]
    assert not staging_folder(final).exists()


def test_an_error_without_keep_leaves_nothing(tmp_path: Path) -> None:
    interrupt(tmp_path / "out", keep=False)
    assert list(tmp_path.iterdir()) == []


def test_a_leftover_is_neither_used_nor_removed_without_an_option(tmp_path: Path) -> None:
    final = tmp_path / "out"
    interrupt(final)
    with pytest.raises(OutputError, match="use --resume to continue or --force to start over"):
        finish(final, "new")
    assert (staging_folder(final) / "out" / "file").read_text() == "half"
    finish(final, "new", force=True)
    assert (final / "file").read_text() == "new"


def test_an_error_during_a_resumed_run_keeps_the_draft(tmp_path: Path) -> None:
    final = tmp_path / "out"
    interrupt(final)
    with pytest.raises(KeyboardInterrupt), resumable(final, force=False, resume=True):
        raise KeyboardInterrupt
    assert (staging_folder(final) / "out" / "file").read_text() == "half"


@pytest.mark.parametrize("force", [False, True])
def test_a_run_that_ended_right_after_the_rename_counts_as_promoted(
    force: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    final = tmp_path / "out"
    if force:
        finish(final, "old")
    end_before_cleaning(final, "new", monkeypatch, force=force)
    with resumable(final, force=False, resume=True) as stage:
        assert stage.promoted
    assert (final / "file").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_run_that_ended_during_its_clean_up_counts_as_promoted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(path: Path, *, missing_ok: bool = False) -> None:
        raise KeyboardInterrupt

    final = tmp_path / "out"
    with (
        monkeypatch.context() as patch,
        suppress(KeyboardInterrupt),
        resumable(final, force=False, resume=False) as stage,
    ):
        (stage.folder / "work").mkdir()
        patch.setattr(Path, "unlink", die)
    assert [path.name for path in staging_folder(final).iterdir()] == ["promoting"]  # removed last
    with resumable(final, force=False, resume=True) as stage:
        assert stage.promoted


def test_an_empty_staging_folder_is_no_leftover(tmp_path: Path) -> None:
    final = tmp_path / "out"
    assert not has_leftover(final)
    staging_folder(final).mkdir()
    assert not has_leftover(final)
    assert not staging_folder(final).exists()
    with resumable(final, force=False, resume=False):
        assert has_leftover(final)
    interrupt(tmp_path / "other")
    assert has_leftover(tmp_path / "other")


def test_a_leftover_beside_another_folder_of_that_name_is_not_promoted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    final = tmp_path / "out"
    end_before_cleaning(final, "new", monkeypatch)
    other = shutil.copytree(final, tmp_path / "other")
    shutil.rmtree(final)
    other.rename(final)
    with pytest.raises(OutputError, match="exists already"), resumable(final, force=False, resume=True):
        pass


def test_one_run_at_a_time(tmp_path: Path) -> None:
    final = tmp_path / "out"
    with (
        resumable(final, force=False, resume=False),
        pytest.raises(OutputError, match="another run is writing this output"),
        resumable(final, force=True, resume=True),
    ):
        pass
