from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from exporter.cli.main import run
from exporter.errors import OutputError
from exporter.io.digests import FileDigests
from exporter.release.making.store import Store
from tests.release.projects import Project, contents, methods
from tests.support.processes import ENV

RECIPE = {"made of": "this"}
MAKER = """
import sys
from pathlib import Path
from exporter.release.making.store import Store

def build(folder):
    print("building", flush=True)
    sys.stdin.readline()
    (folder / "file").write_text("content")

print(Store(Path(sys.argv[1])).get({"made of": "this"}, build)[1], flush=True)
"""


def build(folder: Path) -> None:
    (folder / "file").write_text("content")


def never(folder: Path) -> None:
    pytest.fail("the entry exists")


def make(folder: Path) -> Path:
    return Store(folder).get(RECIPE, build)[0] / "file"


def test_an_entry_is_made_once(tmp_path: Path) -> None:
    assert make(tmp_path).read_text() == "content"
    assert Store(tmp_path).get(dict(RECIPE), never)[1]
    assert not Store(tmp_path).get({"made of": "that"}, build)[1]


@pytest.mark.parametrize("how", ["changed", "cut", "gone", "more", "record gone", "record broken"])
def test_a_changed_entry_is_made_again(how: str, tmp_path: Path) -> None:
    file = make(tmp_path)
    record = file.parent.parent / "entry.json"
    if how == "changed":
        before = file.stat()
        file.write_text("kontent")
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    elif how == "cut":
        file.write_text("")
    elif how == "gone":
        file.unlink()
    elif how == "more":
        (file.parent / "other").write_text("")
    elif how == "record gone":
        record.unlink()
    else:
        record.write_text("{}")
    content, existed = Store(tmp_path).get(RECIPE, build)
    assert not existed
    assert [(path.name, path.read_text()) for path in content.iterdir()] == [("file", "content")]


def test_a_failed_build_leaves_no_entry(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        build(folder)
        raise OutputError(folder, "no space left on the device")

    with pytest.raises(OutputError):
        Store(tmp_path).get(RECIPE, fail)
    assert not Store(tmp_path).get(RECIPE, build)[1]


def test_one_of_two_runs_makes_the_entry_and_the_other_waits(tmp_path: Path) -> None:
    command = [sys.executable, "-c", MAKER, str(tmp_path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "env": ENV}
    with subprocess.Popen(command, **pipes) as first:  # type: ignore[call-overload]
        assert first.stdout.readline() == "building\n"
        with subprocess.Popen(command, **pipes) as second:  # type: ignore[call-overload]
            first.communicate("\n")
            assert second.communicate()[0] == "True\n"


def test_a_run_killed_while_it_makes_an_entry_does_not_block_others(tmp_path: Path) -> None:
    command = [sys.executable, "-c", MAKER, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=ENV) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == "building\n"
        first.kill()
    assert make(tmp_path).read_text() == "content"
    assert not list(tmp_path.rglob("*.partial"))


def test_a_damaged_artifact_of_the_base_does_not_reach_a_release(
    project: Project, undisturbed: Path, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    project.write("one", "two")
    assert project.release(tmp_path / "first", cache=cache) == 0
    for file in (cache / "artifacts").rglob("model.gguf"):
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)
    assert project.release(tmp_path / "second", cache=cache) == 0
    assert contents(tmp_path / "second") == contents(undisturbed)
    assert methods(tmp_path / "second")["one/gguf-Q8_0"] == "converted, patched"


def test_an_unwritable_cache_is_an_error_only_if_it_was_given(
    project: Project, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    project.write("one", formats="[hf]\n")
    assert run(["release", str(project.toml), "-o", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().err.startswith(
        f"the cache for artifacts of the base is disabled: {blocked}/ttexport/release: "
    )
    assert project.release(tmp_path / "other", cache=blocked / "cache") == 7
    assert f"{blocked}/cache: Not a directory" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_another_base_of_the_same_name_is_another_entry(project: Project, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    assert project.write("one").release(tmp_path / "first", cache=cache) == 0
    config = project.folder / "base" / "generation_config.json"
    config.write_text(config.read_text().replace("{", '{"top_k": 7,', 1))
    assert project.release(tmp_path / "second", cache=cache) == 0
    assert methods(tmp_path / "second")["gguf-Q8_0"] == "converted, patched"
    assert (
        contents(tmp_path / "second")["gguf/Lamp-107K-Q8_0.gguf"]
        != contents(tmp_path / "first")["gguf/Lamp-107K-Q8_0.gguf"]
    )


def test_a_file_is_hashed_again_once_it_has_changed(tmp_path: Path) -> None:
    file, kept = tmp_path / "file", tmp_path / "digests"
    file.write_text("old")
    old = FileDigests(kept).of(file)
    os.utime(file, ns=(0, 0))
    assert FileDigests(kept).of(file) == old
    before = file.stat()
    file.write_text("new")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert FileDigests(kept).of(file) != old
