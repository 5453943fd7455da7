from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from exporter.errors import UnreadableFile
from exporter.io.files import opened, read_exactly, read_file


def test_a_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "blob").write_bytes(b"content")
    (tmp_path / "link").symlink_to("blob")
    assert read_file(tmp_path / "link") == b"content"


def pipe(path: Path) -> None:
    os.mkfifo(path)


def loop(path: Path) -> None:
    path.symlink_to(path.name)


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def bound_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as endpoint:
        endpoint.bind(os.path.relpath(path))  # relative, because the length of a socket's path is limited


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (pipe, "expected a regular file, found a pipe"),
        (device, "expected a regular file, found a device"),
        (Path.mkdir, "directory"),
        (bound_socket, "No such device or address"),
        (loop, "symbolic links"),
        (lambda path: path.symlink_to("nowhere"), "no such file"),
    ],
)
def test_a_special_file_is_refused_without_blocking(
    make: object, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert callable(make)
    make(tmp_path / "x")
    with pytest.raises(UnreadableFile, match=message):
        read_file(tmp_path / "x")


def test_a_file_that_ends_early_gives_its_remaining_bytes(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"four")
    with opened(tmp_path / "x") as (file, size):
        assert size == 4
        assert read_exactly(file, 3) == b"fou"
        assert read_exactly(file, 9) == b"r"


def test_a_file_beyond_its_limit_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "x").open("wb") as file:
        file.truncate(1 << 40)  # sparse: reading it would need all memory
    with pytest.raises(UnreadableFile, match="expected a file of at most 67108864 bytes, found 1099511627776 bytes"):
        read_file(tmp_path / "x")
