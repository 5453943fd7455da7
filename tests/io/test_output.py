from __future__ import annotations

import errno
import itertools
import os
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from exporter.errors import OutputError, UnreadableFile
from exporter.io import chunks, kernel, output
from exporter.io.output import OutputFile
from exporter.progress import Progress, silent
from exporter.tensors import ByteRange
from tests.sources.folders import matrix

SOURCE = np.random.default_rng(0).bytes(300_000)
# How bytes can reach the disk: past the page cache, by the kernel, through this process.
METHODS = ("direct", "kernel", "process")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "source"
    path.write_bytes(SOURCE)
    return path


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes files of a few kilobytes take the code path of large files."""
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 8192)


@pytest.fixture(params=METHODS)
def method(request: pytest.FixtureRequest, small_chunks: None, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every method that a file system may support, over many chunks."""
    if request.param != "direct":
        monkeypatch.setattr(kernel, "open_direct", lambda path: None)
    if request.param == "process":
        refuse(monkeypatch, "copy_file_range", errno.EXDEV)
    return str(request.param)


def refuse(monkeypatch: pytest.MonkeyPatch, call: str, number: int) -> None:
    def refused(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, call, refused)


def mixed(source: Path, out: Path, progress: Progress = silent) -> bytes:
    """Write bytes, arrays and ranges of many lengths and offsets to ``out``; returns the expected content."""
    values = matrix(700, dtype=ml_dtypes.bfloat16)
    want = b""
    with OutputFile(out, progress) as file:
        for start, nbytes in [(3, 999), (5000, 0), (1002, 70_001), (200_000, 100_000), (0, 8192), (8192, 8192), (7, 1)]:
            file.write(b"head")
            file.write_segments([ByteRange(source, start, nbytes), values[:, ::2]], nbytes + values.nbytes // 2)
            want += b"head" + SOURCE[start : start + nbytes] + values[:, ::2].tobytes()
        file.write(np.array(0.5, np.float32))
        file.write(np.zeros((0, 3), np.float32))
        file.pad_to(64)
        size = file.nbytes
    want += np.float32(0.5).tobytes()
    want += bytes(-len(want) % 64)
    assert size == len(want)
    return want


def test_bytes_arrays_and_ranges_come_out_in_order(method: str, source: Path, tmp_path: Path) -> None:
    seen: list[int] = []
    want = mixed(source, tmp_path / "out", seen.append)
    assert (tmp_path / "out").read_bytes() == want
    assert sum(seen) == len(want)


def test_a_file_of_one_chunk_is_the_same(source: Path, tmp_path: Path) -> None:
    want = mixed(source, tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == want


def test_the_beginning_may_be_written_last(
    method: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: write(fd, data[:4096], offset))
    with OutputFile(tmp_path / "out") as file:
        file.write(bytes(10_000))
        file.copy(ByteRange(source, 0, 50_000))
        file.begin_with(SOURCE[100_000:110_000])
    assert (tmp_path / "out").read_bytes() == SOURCE[100_000:110_000] + SOURCE[:50_000]


@pytest.mark.parametrize("number", [errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_kernel_without_copy_file_range_is_tried_once(
    number: int, small_chunks: None, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel, "open_direct", lambda path: None)
    monkeypatch.setattr(chunks, "_WORKERS", 1)
    calls = []

    def refused(*arguments: int) -> int:
        calls.append(arguments)
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "copy_file_range", refused)
    with OutputFile(tmp_path / "out") as file:
        file.copy(ByteRange(source, 0, len(SOURCE)))
    assert (tmp_path / "out").read_bytes() == SOURCE
    assert len(calls) == 1


def test_a_file_system_that_refuses_a_direct_write_gets_a_plain_write(
    small_chunks: None, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sound_open, sound_write = kernel.open_direct, os.pwrite
    direct: list[int | None] = []

    def opening(path: Path) -> int | None:
        direct.append(sound_open(path))
        return direct[-1]

    monkeypatch.setattr(kernel, "open_direct", opening)

    def refusing(fd: int, data: memoryview, offset: int) -> int:
        if fd in direct:
            raise OSError(errno.EINVAL, "alignment")
        return sound_write(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", refusing)
    want = mixed(source, tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == want


def test_calls_that_move_a_little_at_a_time_move_all(
    method: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy, write, read = os.copy_file_range, os.pwrite, os.preadv
    counter = itertools.count(1)

    def some(nbytes: int) -> int:
        return min(nbytes, 1 + next(counter) % 5000)

    if method == "kernel":
        monkeypatch.setattr(os, "copy_file_range", lambda a, b, n, *offsets: copy(a, b, some(n), *offsets))
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: write(fd, data[: some(len(data))], offset))
    monkeypatch.setattr(os, "preadv", lambda fd, views, offset: read(fd, [views[0][: some(len(views[0]))]], offset))
    want = mixed(source, tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == want


@pytest.mark.parametrize("before", [10, 100_000])
def test_a_source_that_ends_early_is_refused_and_nothing_is_left(
    before: int, method: str, source: Path, tmp_path: Path
) -> None:
    def write() -> None:
        with OutputFile(tmp_path / "out") as file:
            file.copy(ByteRange(source, len(SOURCE) - before, before + 1))

    with pytest.raises(UnreadableFile, match="expected 1 more bytes at offset 300000, found the end") as caught:
        write()
    assert caught.value.path == source
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("nbytes", [10, 100_000])
def test_a_full_disk_is_an_output_error_with_every_method(
    nbytes: int, method: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse(monkeypatch, "pwrite", errno.ENOSPC)
    if method != "process":
        refuse(monkeypatch, "copy_file_range", errno.ENOSPC)

    def write() -> None:
        with OutputFile(tmp_path / "out") as file:
            file.copy(ByteRange(source, 0, nbytes))

    with pytest.raises(OutputError, match="no space left on the device"):
        write()
    assert not (tmp_path / "out").exists()


Shared = list[tuple[int, int, int]]


@pytest.fixture
def sharing(small_chunks: None, monkeypatch: pytest.MonkeyPatch) -> Shared:
    """A file system that shares ranges, like Btrfs and XFS. Lists them: (offset in the source, offset, length)."""
    shared: Shared = []

    def clone(fd: int, offset: int, source: int, source_offset: int, nbytes: int) -> bool:
        assert not (offset | source_offset | nbytes) % 4096, "the kernel refuses ranges that are not whole blocks"
        shared.append((source_offset, offset, nbytes))
        return os.pwrite(fd, os.pread(source, nbytes, source_offset), offset) == nbytes

    monkeypatch.setattr(output, "_CLONE_FROM_BYTES", 16_384)
    monkeypatch.setattr(kernel, "clone", clone)
    return shared


def test_neighbouring_ranges_are_shared_as_one(sharing: Shared, source: Path, tmp_path: Path) -> None:
    seen: list[int] = []
    with OutputFile(tmp_path / "out", seen.append) as file:
        file.write(b"x" * 104)
        for start in range(8296, 250_000, 10_000):
            file.copy(ByteRange(source, start, 10_000))
        file.write(b"y")
    assert sharing == [(12288, 4096, 245_760)]
    assert (tmp_path / "out").read_bytes() == b"x" * 104 + SOURCE[8296:258_296] + b"y"
    assert sum(seen) == 250_105


def test_a_range_with_another_alignment_is_copied(sharing: Shared, source: Path, tmp_path: Path) -> None:
    want = mixed(source, tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == want
    assert sharing == []


def test_a_file_system_that_does_not_share_copies(
    small_chunks: None, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[object] = []
    monkeypatch.setattr(output, "_CLONE_FROM_BYTES", 16_384)

    def refused(*arguments: int) -> bool:
        calls.append(arguments)
        return False

    monkeypatch.setattr(kernel, "clone", refused)
    with OutputFile(tmp_path / "out") as file:
        for start in (0, 100_000, 0):
            file.copy(ByteRange(source, start, 90_112))
    assert (tmp_path / "out").read_bytes() == SOURCE[:90_112] + SOURCE[100_000:190_112] + SOURCE[:90_112]
    assert len(calls) == 1


@pytest.mark.parametrize("planned", [15, 17])
def test_a_tensor_of_another_length_than_planned_is_an_error(planned: int, source: Path, tmp_path: Path) -> None:
    def write() -> None:
        with OutputFile(tmp_path / "out") as file:
            file.write_segments([ByteRange(source, 0, 8), matrix(1, 2)], planned)

    with pytest.raises(AssertionError, match=f"expected {planned} bytes, wrote 16"):
        write()
    assert not (tmp_path / "out").exists()


def test_a_file_of_another_length_than_planned_is_an_error(tmp_path: Path) -> None:
    def write() -> None:
        with OutputFile(tmp_path / "out", nbytes=4) as file:
            file.write(b"abc")

    with pytest.raises(AssertionError, match="expected 4 bytes, wrote 3"):
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
