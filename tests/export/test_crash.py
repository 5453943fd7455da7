"""A merge that is killed, runs out of space, or meets another one: OUT is absent or complete, inputs are unchanged."""

from __future__ import annotations

import hashlib
import os
import random
import resource
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pytest

from exporter.cli.main import run
from fixtures.hostile import rawtensors
from fixtures.hostile.cases import BASE_WEIGHTS, copies
from tests.support.processes import ENV, TTEXPORT

#: Makes the merge take some time; that of the tiny model alone would end before it can be interrupted.
PADDING_BYTES: Final = 48 << 20
#: Fractions of the bytes written before the kill: from none to all.
MOMENTS: Final = (0.0, *sorted(random.Random(4).uniform(0.0, 1.0) for _ in range(18)), 1.0)

Digests = dict[str, str]


def digests(folder: Path) -> Digests:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@dataclass(frozen=True)
class Job:
    """A merge: its inputs with their digests, and the digests of an undisturbed run's output."""

    home: Path
    inputs: Digests
    result: Digests

    def arguments(self, out: Path, *more: str) -> list[str]:
        return ["merge", str(self.home / "adapter"), "--base", str(self.home / "base"), "-q", "-o", str(out), *more]

    def start(self, out: Path, *more: str, file_nbytes: int | None = None) -> subprocess.Popen[str]:
        """The merge as a process; ``file_nbytes``: the longest file that it may write."""

        def limit() -> None:
            if file_nbytes is not None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (file_nbytes, file_nbytes))

        command = [*TTEXPORT, *self.arguments(out, *more)]
        pipe = subprocess.PIPE
        return subprocess.Popen(command, env=ENV, preexec_fn=limit, stdout=pipe, stderr=pipe, text=True)

    def require_untouched_inputs(self) -> None:
        assert digests(self.home) == self.inputs


def staging(out: Path) -> Path:
    return out.with_name(f".{out.name}.partial")


def wait_for_output(process: subprocess.Popen[str], out: Path) -> None:
    """Return when the merge has begun to write."""
    while not staging(out).exists():
        assert process.poll() is None, process.communicate()[1]


def wait_for_bytes(process: subprocess.Popen[str], nbytes: float) -> None:
    """Return when the merge has written ``nbytes``, or has ended. Source: proc_pid_io(5)."""
    while process.poll() is None:
        try:
            counts = dict(line.split(": ") for line in Path(f"/proc/{process.pid}/io").read_text().splitlines())
        except OSError:  # the process has ended
            return
        if int(counts["wchar"]) >= nbytes:
            return


@pytest.fixture(scope="module")
def job(tiny_adapter: Path, tiny_tied: Path, tmp_path_factory: pytest.TempPathFactory) -> Job:
    home, out = tmp_path_factory.mktemp("crash") / "in", tmp_path_factory.mktemp("crash") / "undisturbed"
    _, base = copies(tiny_adapter, tiny_tied, home)
    noise = random.Random(0).randbytes(PADDING_BYTES)
    rawtensors.replace(base / BASE_WEIGHTS, {"model.padding": ("U8", (PADDING_BYTES,), noise)})
    before = digests(home)
    process = Job(home, before, {}).start(out)
    stderr = process.communicate()[1]
    assert process.returncode == 0, stderr
    return Job(home, before, digests(out))


@pytest.mark.parametrize("previous", ["absent", "replaced"])
def test_a_killed_merge_leaves_nothing_or_everything_and_the_next_merge_cleans_up(
    job: Job, previous: str, tmp_path: Path
) -> None:
    hit = 0
    for number, moment in enumerate(MOMENTS):
        if number % 2 == (previous == "absent"):
            continue
        out = tmp_path / "out"
        options = []
        if previous == "replaced":
            options = ["--force"]
            out.mkdir()
            (out / "old").write_text("whole")
        old = digests(out)
        process = job.start(out, *options)
        wait_for_output(process, out)
        wait_for_bytes(process, moment * PADDING_BYTES)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        hit += staging(out).exists()
        assert out.exists() or previous == "absent"
        assert not out.exists() or digests(out) in (old, job.result)
        job.require_untouched_inputs()
        assert run([*job.arguments(out), "--force"]) == 0
        assert digests(out) == job.result
        assert [path.name for path in tmp_path.iterdir()] == ["out"]
        shutil.rmtree(out)
    assert hit, "no kill came before the end: the test shows nothing"


@contextmanager
def small_disk(folder: Path, nbytes: int) -> Iterator[Path]:
    """A file system of ``nbytes`` in memory. Skips the test if this user may not mount one."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={nbytes}", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("only root may mount a small file system")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        (PADDING_BYTES // 2, "are free"),  # known before a byte is written
        (-(16 << 10), "no space left on the device"),  # the weights fit, the tokenizer behind them does not
    ],
)
def test_a_full_disk_is_exit_7_and_leaves_nothing(job: Job, missing: int, message: str, tmp_path: Path) -> None:
    weights = (job.home / "base" / BASE_WEIGHTS).stat().st_size
    with small_disk(tmp_path / "disk", weights - missing) as disk:
        process = job.start(disk / "out")
        stderr = process.communicate()[1]
        assert process.returncode == 7, stderr
        assert message in stderr
        assert stderr.count("\n") == 1
        assert list(disk.iterdir()) == []
    job.require_untouched_inputs()


@pytest.mark.parametrize("previous", ["absent", "replaced"])
def test_a_limit_of_the_file_size_is_exit_7_and_leaves_the_previous_output(
    job: Job, previous: str, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    if previous == "replaced":
        out.mkdir()
        (out / "old").write_text("whole")
    old, listed = digests(out), sorted(tmp_path.iterdir())
    process = job.start(out, "--force", file_nbytes=PADDING_BYTES // 3)
    stderr = process.communicate()[1]
    assert process.returncode == 7, stderr
    assert str(BASE_WEIGHTS) in stderr
    assert stderr.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == listed
    assert digests(out) == old
    job.require_untouched_inputs()


def test_a_second_merge_into_the_same_place_is_refused(job: Job, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = job.start(out)
    wait_for_output(first, out)
    first.send_signal(signal.SIGSTOP)
    second = job.start(out, "--force")
    stderr = second.communicate()[1]
    first.send_signal(signal.SIGCONT)
    assert second.returncode == 7, stderr
    assert stderr == f"ttexport: {out}: another run is writing this output\n"
    assert (first.communicate()[1], first.returncode) == ("", 0)
    assert digests(out) == job.result
    assert os.listdir(tmp_path) == ["out"]


def test_one_of_two_merges_that_start_together_wins(job: Job, tmp_path: Path) -> None:
    out = tmp_path / "out"
    both = [job.start(out), job.start(out)]
    stderr = [process.communicate()[1] for process in both]
    assert sorted(process.returncode for process in both) == [0, 7], stderr
    (line,) = filter(None, stderr)
    assert line.startswith(f"ttexport: {out}: ")
    assert any(
        reason in line for reason in ("another run is writing this output", "exists already", "another run finished")
    )
    assert digests(out) == job.result
    assert os.listdir(tmp_path) == ["out"]
