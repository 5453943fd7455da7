"""A GGUF patched in place: after any interruption, the file holds the old model or the new one."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from exporter.cli.main import run
from exporter.errors import UnreadableFile
from exporter.patch import journal
from exporter.sources.gguf.split_files import GgufModel
from exporter.sources.journal import journal_of

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def files(tiny_untied: Path, tiny_both_adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The bytes of a base, and of a patched copy of it."""
    folder = tmp_path_factory.mktemp("in-place")
    base, patched = folder / "base.gguf", folder / "patched.gguf"
    assert run(["export", str(tiny_untied), "--to", "gguf", "--quant", "Q8_0", "-q", "-o", str(base)]) == 0
    assert run(["patch", str(base), str(tiny_both_adapter), "-q", "-o", str(patched)]) == 0
    return {"base": base.read_bytes(), "patched": patched.read_bytes()}


@pytest.fixture
def base(files: dict[str, bytes], tmp_path: Path) -> Path:
    path = tmp_path / "m.gguf"
    path.write_bytes(files["base"])
    return path


def in_place(base: Path, adapter: Path, *options: str) -> int:
    return run(["patch", str(base), str(adapter), "--in-place", "-q", *options])


def test_in_place_gives_the_bytes_of_the_copy_in_the_same_file(
    base: Path, files: dict[str, bytes], tiny_both_adapter: Path
) -> None:
    inode = base.stat().st_ino
    assert in_place(base, tiny_both_adapter) == 0
    assert base.read_bytes() == files["patched"]
    assert base.stat().st_ino == inode
    assert [path.name for path in base.parent.iterdir()] == ["m.gguf"]
    assert in_place(base, tiny_both_adapter) == 0
    assert base.read_bytes() == files["patched"]


_KILLED = """
import os, signal, sys
left = int(sys.argv[1])
def counted(name):
    call = getattr(os, name)
    def run(*args, **kwargs):
        global left
        left -= 1
        if left == 0 and name == "pwrite":  # in the middle of a write
            call(args[0], bytes(args[1])[: len(args[1]) // 2], *args[2:])
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return call(*args, **kwargs)
    setattr(os, name, run)
for name in ("pwrite", "fsync", "rename", "unlink"):
    counted(name)
from exporter.cli.main import run
sys.exit(run(sys.argv[2:]))
"""


def killed_at(step: int, *arguments: object) -> bool:
    """Run a command that dies by SIGKILL at its ``step``-th call that changes the disk; False if it had fewer."""
    done = subprocess.run(
        [sys.executable, "-c", _KILLED, str(step), *map(str, arguments)], capture_output=True, text=True
    )
    assert done.returncode in (0, -9), done.stderr
    return done.returncode == -9


def test_a_kill_at_any_step_leaves_the_old_model_or_the_new_one(
    base: Path, files: dict[str, bytes], tiny_both_adapter: Path
) -> None:
    arguments = ["patch", base, tiny_both_adapter, "--in-place", "-q"]
    seen = set()
    step = 0
    while killed_at(step := step + 1, *arguments):
        interrupted = journal_of(base).exists()
        if interrupted:
            # Readers refuse the half-patched model.
            with pytest.raises(UnreadableFile, match="interrupted"):
                GgufModel.open(base)
            assert journal.recover(base)
        seen.add((interrupted, base.read_bytes() == files["patched"]))
        assert base.read_bytes() in files.values()
        assert in_place(base, tiny_both_adapter) == 0
        assert base.read_bytes() == files["patched"]
        assert not journal_of(base).exists()
        base.write_bytes(files["base"])
    assert step > 6  # journal, its folder, rows of two tensors, the model, the journal's end
    # Killed before the journal existed, while it existed, and after its removal.
    assert seen == {(False, False), (True, False), (False, True)}


def test_a_kill_during_recovery_is_recovered_too(base: Path, files: dict[str, bytes], tiny_both_adapter: Path) -> None:
    arguments = ["patch", base, tiny_both_adapter, "--in-place", "-q"]
    steps = next(step for step in range(1, 50) if killed_at(step, *arguments) and journal_of(base).exists())
    step = 0
    while True:
        base.write_bytes(files["base"])
        journal_of(base).unlink(missing_ok=True)
        assert killed_at(steps + 2, *arguments)
        if not killed_at(step := step + 1, *arguments):
            break
        if journal_of(base).exists():
            journal.recover(base)
        assert base.read_bytes() in files.values()
    assert base.read_bytes() == files["patched"]


def test_the_next_run_reports_that_it_undid_an_interrupted_one(
    base: Path, files: dict[str, bytes], tiny_both_adapter: Path, capsys: Capture
) -> None:
    arguments = ["patch", base, tiny_both_adapter, "--in-place"]
    assert any(killed_at(step, *arguments) and journal_of(base).exists() for step in range(1, 50))
    assert run(["inspect", str(base)]) == 4
    assert "interrupted" in capsys.readouterr().err
    assert run([*map(str, arguments)]) == 0
    assert "an interrupted patch was undone" in capsys.readouterr().err
    assert base.read_bytes() == files["patched"]


@pytest.mark.parametrize("damage", ["cut", "changed", "other file"])
def test_a_journal_that_does_not_fit_is_refused(
    base: Path, files: dict[str, bytes], tiny_both_adapter: Path, capsys: Capture, damage: str
) -> None:
    arguments = ["patch", base, tiny_both_adapter, "--in-place", "-q"]
    assert any(killed_at(step, *arguments) and journal_of(base).exists() for step in range(1, 50))
    data = bytearray(journal_of(base).read_bytes())
    if damage == "cut":
        del data[-7:]
    elif damage == "changed":
        data[-7] ^= 1
    else:
        base.write_bytes(files["base"] + b"\0")
    journal_of(base).write_bytes(data)
    before = base.read_bytes()
    assert run([*map(str, arguments)]) == 4
    assert "journal" in capsys.readouterr().err
    assert base.read_bytes() == before


def test_a_patch_that_fails_its_verification_is_undone(
    base: Path, files: dict[str, bytes], tiny_both_adapter: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    overwrite, calls = journal._overwrite, []

    def sloppy(path: Path, pieces: list[tuple[int, bytes]]) -> None:
        """Zeros the first time, which is the patch; the second is the restoration."""
        calls.append(path)
        overwrite(path, [(offset, bytes(len(data))) for offset, data in pieces] if len(calls) == 1 else pieces)

    monkeypatch.setattr(journal, "_overwrite", sloppy)
    assert in_place(base, tiny_both_adapter) == 3
    assert "rows differ" in capsys.readouterr().err
    assert base.read_bytes() == files["base"]
    assert not journal_of(base).exists()


def test_a_full_device_leaves_the_old_model(
    base: Path, files: dict[str, bytes], tiny_both_adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def refuse(fd: int, data: bytes, offset: int) -> int:
        calls.append(offset)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")
        return pwrite(fd, data, offset)

    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", refuse)
    assert in_place(base, tiny_both_adapter) == 7
    assert base.read_bytes() == files["base"]
    assert not journal_of(base).exists()


def test_a_second_patch_of_the_same_file_is_refused(
    base: Path, files: dict[str, bytes], tiny_both_adapter: Path
) -> None:
    with base.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert in_place(base, tiny_both_adapter) == 7
    assert base.read_bytes() == files["base"]


def test_growth_in_place_is_a_new_file_under_the_old_name(
    tiny_tied: Path, tiny_new_tokens_adapter: Path, tmp_path: Path
) -> None:
    base, copy = tmp_path / "m.gguf", tmp_path / "copy.gguf"
    assert run(["export", str(tiny_tied), "--to", "gguf", "-q", "-o", str(base)]) == 0
    assert run(["patch", str(base), str(tiny_new_tokens_adapter), "-q", "-o", str(copy)]) == 0
    old = base.read_bytes()
    arguments = ["patch", base, tiny_new_tokens_adapter, "--in-place", "-q"]
    step = 0
    while killed_at(step := step + 1, *arguments):
        assert base.read_bytes() in (old, copy.read_bytes())
        if base.read_bytes() != old:
            break
    assert in_place(Path(shutil.copy(copy, base)), tiny_new_tokens_adapter) == 0
    base.write_bytes(old)
    assert in_place(base, tiny_new_tokens_adapter) == 0
    assert base.read_bytes() == copy.read_bytes()


def test_in_place_and_out_contradict_each_other(base: Path, tiny_both_adapter: Path, capsys: Capture) -> None:
    assert in_place(base, tiny_both_adapter, "-o", "x.gguf") == 2
    assert in_place(base, tiny_both_adapter, "--base", "b", "--trust-base") == 2
    assert capsys.readouterr().err.count("\n") == 2
