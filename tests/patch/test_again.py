"""An artifact records its adapters, and a patch does not silently keep the rows of other adapters."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from exporter.cli.main import run
from exporter.sources.gguf.file import GgufFile
from exporter.sources.onnx.file import OnnxFile
from exporter.sources.peft.adapter import Adapter
from fixtures import adapters
from tests.patch.test_defaults import assert_same

Capture = pytest.CaptureFixture[str]
FORMATS = ("gguf", "onnx")
KEY = "ttexport.adapters.sha256"


def succeed(*arguments: object) -> None:
    assert run([*map(str, arguments), "-q"]) == 0


def recorded(artifact: Path) -> str:
    if artifact.is_file():
        return str(GgufFile.open(artifact).metadata[KEY])
    return OnnxFile.open(artifact).metadata[KEY]


@pytest.fixture(scope="module")
def pair(tiny_tied: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two adapters with rows of different tokens."""
    folder = tmp_path_factory.mktemp("pair")
    return (
        adapters.stock_rows(tiny_tied, folder / "first", (5, 6)),
        adapters.stock_rows(tiny_tied, folder / "other", (7, 8), seed=1),
    )


@pytest.fixture(scope="module", params=FORMATS)
def tuned(
    request: pytest.FixtureRequest,
    tiny_tied: Path,
    pair: tuple[Path, Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[str, Path]:
    """(format, an artifact that the first adapter was patched into)"""
    folder, fmt = tmp_path_factory.mktemp("tuned"), str(request.param)
    succeed("export", tiny_tied, "--to", fmt, "-o", folder / "base.gguf")
    assert recorded(folder / "base.gguf") == "0" * 64
    succeed("patch", folder / "base.gguf", pair[0], "-o", folder / "tuned.gguf")
    return fmt, folder / "tuned.gguf"


def test_the_same_adapter_again_changes_nothing_and_is_noted(
    tuned: tuple[str, Path], pair: tuple[Path, Path], tmp_path: Path, capsys: Capture
) -> None:
    capsys.readouterr()
    assert run(["patch", str(tuned[1]), str(pair[0]), "-o", str(tmp_path / "again.gguf"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["proof"] == "recorded digest (already patched with the same adapters)"
    assert_same(tmp_path / "again.gguf", tuned[1])


def test_rows_of_other_adapters_are_not_kept_silently(
    tuned: tuple[str, Path], pair: tuple[Path, Path], tmp_path: Path, capsys: Capture
) -> None:
    fmt, artifact = tuned
    arguments: list[str] = ["patch", str(artifact), str(pair[1]), "-o", str(tmp_path / "both.gguf")]
    capsys.readouterr()
    assert run(arguments) == 4
    printed = capsys.readouterr().err
    assert f"{KEY}: expected an artifact without adapters or with the given adapters" in printed
    assert printed.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
    assert run([*arguments, "--trust-base"]) == 0
    assert "base: trusted (rows of other adapters kept)" in capsys.readouterr().err
    succeed("merge", *pair, "--to", fmt, "-o", tmp_path / "want.gguf")
    assert_same(tmp_path / "both.gguf", tmp_path / "want.gguf")


def test_a_record_that_is_no_digest(tiny_tied: Path, pair: tuple[Path, Path], tmp_path: Path, capsys: Capture) -> None:
    base = tmp_path / "base.gguf"
    succeed("export", tiny_tied, "--to", "gguf", "-o", base)
    base.write_bytes(base.read_bytes().replace(b"0" * 64, b"-" * 64))
    capsys.readouterr()
    for trust in ([], ["--trust-base"]):
        assert run(["patch", str(base), str(pair[0]), "-o", str(tmp_path / "out.gguf"), *trust]) == 4
        assert f"{base}: {KEY}: expected 64 hexadecimal digits, found '---" in capsys.readouterr().err


def test_the_digest_of_an_adapter_does_not_depend_on_its_place(pair: tuple[Path, Path], tmp_path: Path) -> None:
    first, second = (Adapter.open(path) for path in pair)
    tensors = load_file(first.weights)
    digests = {}
    for name, scale, ids in (("moved", 1, [5, 6]), ("values", 2, [5, 6]), ("tokens", 1, [5, 9])):
        (folder := tmp_path / name).mkdir()
        config = {**first.config, "token_indices": ids, "base_model_name_or_path": f"there/{name}"}
        (folder / "adapter_config.json").write_text(json.dumps(config, indent=scale))
        save_file({key: value * scale for key, value in tensors.items()}, folder / "adapter_model.safetensors")
        digests[name] = Adapter.open(folder).digest
    assert digests["moved"] == first.digest
    assert len({first.digest, second.digest, digests["values"], digests["tokens"]}) == 4


def test_a_first_patch_in_place_is_recorded_and_moves_no_byte(
    tiny_tied: Path, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    base = tmp_path / "base.gguf"
    succeed("export", tiny_tied, "--to", "gguf", "-o", base)
    before = base.stat().st_ino
    succeed("patch", base, pair[0], "-o", tmp_path / "copy.gguf")
    succeed("patch", base, pair[0], "--in-place")
    assert base.stat().st_ino == before
    assert_same(base, tmp_path / "copy.gguf")
    assert recorded(base) != "0" * 64
