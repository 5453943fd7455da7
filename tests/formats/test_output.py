from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from exporter.errors import OutputError, UnreadableFile
from exporter.formats import output
from exporter.formats.output import OutputFile
from exporter.tensors import ByteRange
from tests.sources.folders import matrix

ROOT = Path(__file__).parents[2]
SOURCE = bytes(range(256)) * 40


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "source"
    path.write_bytes(SOURCE)
    return path


def refuse_kernel_copy(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def refused(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "copy_file_range", refused)


def test_bytes_arrays_and_ranges_come_out_in_order(source: Path, tmp_path: Path) -> None:
    values = matrix(dtype=ml_dtypes.bfloat16)
    seen: list[int] = []
    with OutputFile(tmp_path / "out", seen.append) as file:
        file.write(b"head")
        file.write(np.arange(3, dtype=np.int32).data)
        file.write(values[:, ::2])
        file.write(np.array(0.5, np.float32))
        file.write(np.zeros((0, 3), np.float32))
        file.write_segments([ByteRange(source, 10, 20), values, ByteRange(source, 0, 0)], 20 + values.nbytes)
        file.pad_to(64)
        size = file.nbytes
    want = b"head" + np.arange(3, dtype=np.int32).tobytes() + values[:, ::2].tobytes() + np.float32(0.5).tobytes()
    want += SOURCE[10:30] + values.tobytes()
    want += bytes(-len(want) % 64)
    assert (tmp_path / "out").read_bytes() == want
    assert size == sum(seen) == len(want)


@pytest.mark.parametrize("number", [errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP])
@pytest.mark.parametrize("chunk", [7, 1 << 20])
def test_without_the_kernels_copy_the_bytes_are_the_same(
    number: int, chunk: int, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(output, "_COPY_BYTES", chunk)
    refuse_kernel_copy(monkeypatch, number)
    with OutputFile(tmp_path / "out") as file:
        file.write_segments([ByteRange(source, 3, 999), ByteRange(source, 5000, 1000)], 1999)
    assert (tmp_path / "out").read_bytes() == SOURCE[3:1002] + SOURCE[5000:6000]


def test_a_kernel_that_copies_a_little_at_a_time_copies_all(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sound = os.copy_file_range
    monkeypatch.setattr(os, "copy_file_range", lambda a, b, n, offset: sound(a, b, min(n, 37), offset))
    with OutputFile(tmp_path / "out") as file:
        file.write_segments([ByteRange(source, 1, 5000)], 5000)
    assert (tmp_path / "out").read_bytes() == SOURCE[1:5001]


def test_a_device_that_takes_a_little_at_a_time_gets_all(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sound = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: sound(fd, data[:37]))
    refuse_kernel_copy(monkeypatch, errno.EXDEV)
    with OutputFile(tmp_path / "out") as file:
        file.write(SOURCE)
        file.write(matrix(50))
        file.write_segments([ByteRange(source, 1, 5000)], 5000)
    assert (tmp_path / "out").read_bytes() == SOURCE + matrix(50).tobytes() + SOURCE[1:5001]


@pytest.mark.parametrize("kernel", [True, False])
def test_a_source_that_ends_early_is_refused_and_nothing_is_left(
    kernel: bool, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not kernel:
        refuse_kernel_copy(monkeypatch, errno.EXDEV)

    def write() -> None:
        with OutputFile(tmp_path / "out") as file:
            file.write_segments([ByteRange(source, len(SOURCE) - 10, 11)], 11)

    with pytest.raises(UnreadableFile, match="expected 1 more bytes at 10240, found the end") as caught:
        write()
    assert caught.value.path == source
    assert not (tmp_path / "out").exists()


def test_a_full_disk_is_an_output_error_on_either_way(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse_kernel_copy(monkeypatch, errno.ENOSPC)

    def write() -> None:
        with OutputFile(tmp_path / "out") as file:
            file.write_segments([ByteRange(source, 0, 10)], 10)

    with pytest.raises(OutputError, match="no space left on the device"):
        write()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("promised", [15, 17])
def test_a_tensor_that_is_not_as_long_as_promised_is_caught(promised: int, source: Path, tmp_path: Path) -> None:
    def write() -> None:
        with OutputFile(tmp_path / "out") as file:
            file.write_segments([ByteRange(source, 0, 8), matrix(1, 2)], promised)

    with pytest.raises(AssertionError, match=f"{promised} bytes were promised, 16 came"):
        write()
    assert not (tmp_path / "out").exists()


def test_an_existing_file_is_refused_and_kept(tmp_path: Path) -> None:
    (tmp_path / "out").write_bytes(b"old")
    with pytest.raises(OutputError, match="exists"), OutputFile(tmp_path / "out"):
        raise AssertionError("the body must not run")
    assert (tmp_path / "out").read_bytes() == b"old"


def test_the_mode_follows_the_umask(tmp_path: Path) -> None:
    for umask in (0o022, 0o077):
        before = os.umask(umask)
        try:
            with OutputFile(tmp_path / f"{umask}") as file:
                file.write(b"x")
        finally:
            os.umask(before)
        assert (tmp_path / f"{umask}").stat().st_mode & 0o777 == 0o666 & ~umask


LIMITED = """
import errno, os, resource, sys
limit = int(sys.argv[1])
if sys.argv[2] == "no kernel copy":
    def refused(*_): raise OSError(errno.EXDEV, "refused")
    os.copy_file_range = refused
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
from exporter.cli.main import run
sys.exit(run(sys.argv[3:]))
"""


@pytest.mark.parametrize("kernel", ["kernel copy", "no kernel copy"])
@pytest.mark.parametrize("limit", [100, 70_000, 150_000])
def test_a_limit_of_the_file_size_ends_a_merge_with_exit_7_and_nothing_left(
    kernel: str, limit: int, tiny_adapter: Path, tiny_tied: Path, tmp_path: Path
) -> None:
    words = ["merge", tiny_adapter, "--base", tiny_tied, "-o", tmp_path / "out"]
    command = [sys.executable, "-B", "-c", LIMITED, str(limit), kernel, *map(str, words)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == OutputError.exit_code
    assert "Traceback" not in done.stderr
    assert [line for line in done.stderr.splitlines() if line.startswith("ttexport: ")]
    assert list(tmp_path.iterdir()) == []
