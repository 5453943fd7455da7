"""A folder of ONNX models patched in place: after any interruption, it holds the old models or the new ones."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from exporter.cli.main import run
from exporter.patch import journal
from exporter.sources.journal import journal_of
from fixtures import adapters
from tests.patch.gguf.test_in_place import killed_at
from tests.patch.onnx.test_rows import options, succeed, tree

Capture = pytest.CaptureFixture[str]
Trees = dict[str, dict[str, bytes]]


@pytest.fixture(scope="module")
def adapter(tiny_padded: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new end of text in a padding row, so that configs and tokenizer files change, and no weight moves."""
    folder = tmp_path_factory.mktemp("adapter") / "end"
    adapters.stock_rows_new_tokens(tiny_padded, folder, ("<end>",), (300, 17), special=True)
    path = folder / "tokenizer_config.json"
    path.write_text(path.read_text().replace('"eos_token": "<|im_end|>"', '"eos_token": "<end>"'))
    return folder


@pytest.fixture(scope="module")
def folders(tiny_padded: Path, adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("in-place")
    succeed("export", tiny_padded, *options("fp32", "int8"), "--verify", "off", "-o", folder / "base")
    (folder / "base" / "added_tokens.json").write_text("{}")  # removed: the adapter's tokenizer has no such file
    succeed("patch", folder / "base", adapter, "-o", folder / "patched")
    return {name: folder / name for name in ("base", "patched")}


@pytest.fixture
def base(folders: dict[str, Path], tmp_path: Path) -> Path:
    copy = Path(shutil.copytree(folders["base"], tmp_path / "m"))
    shared = copy / "onnx" / "model_quantized.onnx_data"
    shared.unlink()
    shared.hardlink_to(copy / "onnx" / "model_int8.onnx_data")
    return copy


def in_place(base: Path, adapter: Path, *arguments: str) -> int:
    return run(["patch", str(base), str(adapter), "--in-place", "-q", *arguments])


def test_in_place_gives_the_files_of_the_copy(base: Path, folders: dict[str, Path], adapter: Path) -> None:
    data = base / "onnx" / "model.onnx_data"
    inode = data.stat().st_ino
    assert "added_tokens.json" not in tree(folders["patched"])
    for _ in range(2):
        assert in_place(base, adapter) == 0
        assert tree(base) == tree(folders["patched"])
    assert data.stat().st_ino == inode
    assert [path.name for path in base.parent.iterdir()] == ["m"]


def test_a_kill_leaves_the_old_folder_or_the_new_one_and_the_next_run_undoes_it(
    base: Path, folders: dict[str, Path], adapter: Path, capsys: Capture
) -> None:
    old, new = tree(folders["base"]), tree(folders["patched"])
    seen, step = set(), 0
    while killed_at(step := step + 7, "patch", base, adapter, "--in-place", "-q"):
        interrupted = journal_of(base).exists()
        if interrupted:
            for path in (base, base / "onnx", base / "onnx" / "model.onnx"):
                assert run(["inspect", str(path)]) == 4
                assert "interrupted" in capsys.readouterr().err
            assert run(["plan", str(base), str(adapter)]) == 4
            assert journal.recover(base)
        assert tree(base) in (old, new)
        seen.add(interrupted)
        shutil.rmtree(base)
        shutil.copytree(folders["base"], base)
    assert True in seen
    steps = (step for step in range(7, 200, 7) if killed_at(step, "patch", base, adapter, "--in-place", "-q"))
    assert any(journal_of(base).exists() for _ in steps)
    assert run(["patch", str(base), str(adapter), "--in-place"]) == 0
    assert "an interrupted patch was undone" in capsys.readouterr().err
    assert tree(base) == new


@pytest.mark.parametrize("call", ["pwrite", "unlink", "ftruncate"])
def test_a_device_that_refuses_leaves_the_old_folder(
    base: Path, folders: dict[str, Path], adapter: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    calls, real = [], getattr(os, call)

    def refuse(*arguments: object, **options: object) -> object:
        calls.append(arguments)
        if len(calls) == (1 if call == "unlink" else 5):
            raise OSError(28, "No space left on device")
        return real(*arguments, **options)

    monkeypatch.setattr(os, call, refuse)
    assert in_place(base, adapter) == 7
    assert tree(base) == tree(folders["base"])
    assert not journal_of(base).exists()


def test_a_patch_that_fails_its_verification_is_undone(
    base: Path, folders: dict[str, Path], adapter: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    overwrite, calls = journal._overwrite, []

    def sloppy(path: Path, pieces: journal.Pieces) -> None:
        """Zeros the first time, which is the patch; later ones restore."""
        calls.append(path)
        overwrite(path, [(offset, bytes(len(data))) for offset, data in pieces] if len(calls) == 1 else pieces)

    monkeypatch.setattr(journal, "_overwrite", sloppy)
    assert in_place(base, adapter) == 3
    assert "rows differ" in capsys.readouterr().err
    assert tree(base) == tree(folders["base"])
    assert not journal_of(base).exists()


def test_growth_in_place_is_a_new_folder_under_the_old_name(
    tiny_tied: Path, tiny_new_tokens_adapter: Path, tmp_path: Path
) -> None:
    succeed("export", tiny_tied, *options("q4"), "-o", tmp_path / "m")
    succeed("patch", tmp_path / "m", tiny_new_tokens_adapter, "-o", tmp_path / "copy")
    assert in_place(tmp_path / "m", tiny_new_tokens_adapter) == 0
    assert tree(tmp_path / "m") == tree(tmp_path / "copy")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy", "m"]


def test_links_are_not_written_through(base: Path, adapter: Path, tmp_path: Path, capsys: Capture) -> None:
    """The hub's cache shares files between revisions by links."""
    data = base / "onnx" / "model.onnx_data"
    blob = Path(shutil.move(data, tmp_path / "blob"))
    data.symlink_to(blob)
    before = blob.read_bytes()
    assert in_place(base, adapter) == 4
    assert "found a symbolic link" in capsys.readouterr().err
    assert blob.read_bytes() == before
    assert run(["patch", str(base), str(adapter), "-q", "-o", str(tmp_path / "out")]) == 0
    assert not (tmp_path / "out" / "onnx" / "model.onnx_data").is_symlink()
