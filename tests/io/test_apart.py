from __future__ import annotations

import os
from pathlib import Path

import pytest

from exporter.errors import UsageError
from exporter.io.apart import require_apart


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """home/base/weights, home/link → base, home/to-weights → base/weights, home/loop → itself; the current folder."""
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "weights").write_bytes(b"")
    (tmp_path / "link").symlink_to("base")
    (tmp_path / "to-weights").symlink_to("base/weights")
    (tmp_path / "loop").symlink_to("loop")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("absolute", [False, True])
@pytest.mark.parametrize("given", ["base/weights", "link/weights", "to-weights"])
@pytest.mark.parametrize("out", ["base/weights", "base", ".", "base/../base", "link/weights", "to-weights", "base/.."])
def test_an_input_or_a_folder_above_it_is_refused_by_every_name(
    home: Path, given: str, out: str, *, absolute: bool
) -> None:
    path = home / out if absolute else Path(out)
    with pytest.raises(UsageError) as caught:
        require_apart(path, [Path("../elsewhere"), Path(given)])
    assert (
        str(caught.value) == f"-o {path}: expected an output path that overwrites no input, "
        f"found a path that overwrites the input {given}"
    )


@pytest.mark.parametrize("out", ["base/new", "link/new", "weights", "new", "base/weights.new", "../base"])
def test_a_place_beside_the_inputs_is_fine(home: Path, out: str) -> None:
    require_apart(Path(out), [Path("base/weights"), home / "link" / "weights"])


def test_a_link_that_is_an_input_is_refused_though_its_target_would_stay(home: Path) -> None:
    with pytest.raises(UsageError, match=r"found a path that overwrites the input link/weights$"):
        require_apart(home / "link", [Path("link/weights")])


@pytest.mark.parametrize("out", ["base/new", "link/onnx/new", "link", "base", "."])
def test_no_output_lies_inside_a_folder_that_is_read_whole(home: Path, out: str) -> None:
    for base in (Path("base"), home / "link"):
        with pytest.raises(UsageError, match="an output path that overwrites no input"):
            require_apart(Path(out), [], whole=[base])
    require_apart(Path("new"), [], whole=[Path("base")])


def test_the_message_ends_with_the_hint(home: Path) -> None:
    with pytest.raises(UsageError, match=r"found a path that overwrites the input base \(another place\)$"):
        require_apart(home / "base", [Path("base")], hint="another place")


@pytest.mark.parametrize("name", ["loop", "loop/weights"])
def test_a_symlink_loop_is_left_to_its_reader(home: Path, name: str) -> None:
    require_apart(Path("new"), [Path(name)], whole=[Path(name)])
    require_apart(Path(name), [Path("base/weights")])
    with pytest.raises(UsageError):
        require_apart(home / name, [Path(name)])
    assert os.readlink("loop") == "loop"
