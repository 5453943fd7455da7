"""--converter: a script of the user's choice writes the GGUF, and is not trusted."""

from __future__ import annotations

import json
import shutil
from importlib.metadata import version
from pathlib import Path

import pytest

from exporter.cli.main import run
from exporter.sources.gguf.file import GgufFile
from tests.marks import needs_llama_cpp

Capture = pytest.CaptureFixture[str]

# Takes the arguments of llama.cpp's script: CHECKPOINT --outfile FILE --outtype TYPE.
_STAND_IN = """
import sys
import tempfile
from pathlib import Path
from typing import Any
sys.path.insert(0, {root!r})
from exporter.formats.gguf import plan_gguf, write_gguf
from exporter.merge.plan import plan_merge
from exporter.sources.hf.checkpoint import Checkpoint
from tests.formats.gguf.converter.overlays import flattened
checkpoint, _, out, _, ftype = sys.argv[1:6]
source = {source!r} or flattened(Path(checkpoint), Path(tempfile.mkdtemp(), "flat"))
write_gguf(plan_gguf(plan_merge(Checkpoint.open(Path(source)), []).model(), ftype.upper()), Path(out))
"""


def script(path: Path, text: str, **names: str) -> Path:
    path.write_text(text.format(**names))
    return path


def stand_in(path: Path, source: Path | None = None) -> Path:
    root = Path(__file__).parents[2]
    return script(path / "convert.py", _STAND_IN, root=str(root), source=str(source or ""))


def merge(adapter: Path, base: Path, converter: Path, out: Path, *more: str) -> int:
    argv = ["merge", str(adapter), "--base", str(base), "--to", "gguf", "--converter", str(converter)]
    return run([*argv, "-o", str(out), *more])


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's cache folder, empty at first."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@needs_llama_cpp
def test_a_model_without_a_family_needs_an_installed_converter(
    tiny_adapter: Path, tiny_tied: Path, cache: Path, tmp_path: Path, capsys: Capture
) -> None:
    base = Path(shutil.copytree(tiny_tied, tmp_path / "base"))
    novel = {"model_type": "novel", "architectures": ["NovelForCausalLM"]}
    config = json.loads((base / "config.json").read_text()) | novel
    (base / "config.json").write_text(json.dumps(config))
    argv = ["--base", str(base), "--to", "gguf"]
    assert run(["plan", str(tiny_adapter), *argv]) == 5
    assert "run ttexport converter install once" in capsys.readouterr().err
    assert run(["merge", str(tiny_adapter), *argv, "--converter-arg=--fuse-qkv", "-o", str(tmp_path / "x.gguf")]) == 5
    assert "no converter is installed; run ttexport converter install" in capsys.readouterr().err
    place = cache / "ttexport" / "converter" / version("llama-cpp-python")
    place.mkdir(parents=True)
    shutil.move(stand_in(tmp_path), place / "convert_hf_to_gguf.py")
    assert run(["plan", str(tiny_adapter), *argv, "--json"]) == 0
    (target,) = json.loads(capsys.readouterr().out)["targets"]
    assert (target["maker"], target["estimated"]) == ("llama.cpp's converter", True)
    assert run(["plan", str(tiny_adapter), "--base", str(tiny_tied), "--to", "gguf", "--json"]) == 0
    (target,) = json.loads(capsys.readouterr().out)["targets"]
    assert (target["maker"], target["estimated"]) == ("ttexport's writer", False)
    assert run(["plan", str(tiny_adapter), *argv, "--pre-tokenizer", "smollm"]) == 5
    assert "chooses the pre-tokenizer itself" in capsys.readouterr().err


@needs_llama_cpp
def test_options_for_the_converter_choose_it_and_reach_it(
    tiny_adapter: Path, tiny_tied: Path, cache: Path, tmp_path: Path, capsys: Capture
) -> None:
    place = cache / "ttexport" / "converter" / version("llama-cpp-python")
    place.mkdir(parents=True)
    (place / "convert_hf_to_gguf.py").write_text("import sys; raise SystemExit(' '.join(sys.argv[-2:]))")
    argv = ["merge", str(tiny_adapter), "--base", str(tiny_tied), "--to", "gguf", "-o", str(tmp_path / "x.gguf")]
    assert run([*argv, "--converter-arg=--fuse-qkv", "--converter-arg=--metadata=FILE"]) == 4
    assert "exit status 1: --fuse-qkv --metadata=FILE" in capsys.readouterr().err
    for argument, words in (("fuse", "expected an option such as"), ("--outfile=x", "--outfile is an option that")):
        assert run([*argv, f"--converter-arg={argument}"]) == 2
        assert words in capsys.readouterr().err


def test_the_converter_uses_its_own_gguf_package(
    tiny_adapter: Path, tiny_tied: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_LOCAL_GGUF", "1")
    made = script(tmp_path / "fail.py", "import os; raise SystemExit(f'local: {{os.environ.get(\"NO_LOCAL_GGUF\")}}')")
    assert merge(tiny_adapter, tiny_tied, made, tmp_path / "x.gguf") == 4
    assert "exit status 1: local: None" in capsys.readouterr().err


@pytest.mark.models
@needs_llama_cpp
def test_a_converted_file_is_quantised(tiny_adapter: Path, tiny_tied: Path, tmp_path: Path, capsys: Capture) -> None:
    place = tmp_path / "place"
    place.mkdir()
    made, out = stand_in(tmp_path), place / "lamp.gguf"
    types = ["--quant", "Q4_0", "--output-tensor-type", "Q8_0", "--token-embedding-type", "Q5_0"]
    assert merge(tiny_adapter, tiny_tied, made, out, *types, "--json") == 0
    (artifact,) = json.loads(capsys.readouterr().out)["artifacts"]
    assert artifact["verification"]["passed"]
    tensors = GgufFile.open(out).tensors
    assert tensors["token_embd.weight"].type == "Q5_0"
    assert [path.name for path in place.iterdir()] == ["lamp.gguf"]
    argv = ["merge", str(tiny_adapter), "--base", str(tiny_tied), "--to", "gguf", "-o", str(tmp_path / "own.gguf")]
    assert run([*argv, *types, "-q"]) == 0
    own = GgufFile.open(tmp_path / "own.gguf")
    assert {name: (one.type, one.shape) for name, one in own.tensors.items()} == {
        name: (one.type, one.shape) for name, one in tensors.items()
    }


def test_the_script_gets_the_merged_checkpoint_which_is_removed_afterwards(
    tiny_adapter: Path, tiny_tied: Path, tmp_path: Path
) -> None:
    place = tmp_path / "place"
    place.mkdir()
    out = place / "lamp.gguf"
    assert merge(tiny_adapter, tiny_tied, stand_in(tmp_path), out, "--quant", "Q8_0") == 0
    assert GgufFile.open(out).tensors["token_embd.weight"].type == "Q8_0"
    assert [path.name for path in place.iterdir()] == ["lamp.gguf"]


def test_several_formats_beside_a_converted_one(tiny_adapter: Path, tiny_tied: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert merge(tiny_adapter, tiny_tied, stand_in(tmp_path), out, "--to", "hf") == 0
    (file,) = (out / "gguf").iterdir()
    assert GgufFile.open(file).tensors["token_embd.weight"].type == "BF16"
    assert (out / "hf" / "model.safetensors").is_file()


def test_a_script_that_loses_the_rows_fails_the_verification(
    tiny_adapter: Path, tiny_tied: Path, tmp_path: Path, capsys: Capture
) -> None:
    place = tmp_path / "place"
    place.mkdir()
    base = Path(shutil.copytree(tiny_tied, tmp_path / "base"))
    assert merge(tiny_adapter, tiny_tied, stand_in(tmp_path, base), place / "lamp.gguf") == 3
    assert "not equivalent" in capsys.readouterr().err
    assert list(place.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("raise SystemExit('this model is not supported')", "exit status 1: this model is not supported"),
        ("print('done')", "the converter script wrote no GGUF file: no output on stderr"),
        (
            "import socket; socket.create_connection(('127.0.0.1', 9))",
            "exit status 1: PermissionError: the converter runs without network",
        ),
    ],
)
def test_a_script_that_fails_is_exit_4_with_its_last_line(
    tiny_adapter: Path, tiny_tied: Path, tmp_path: Path, capsys: Capture, text: str, message: str
) -> None:
    place = tmp_path / "place"
    place.mkdir()
    assert merge(tiny_adapter, tiny_tied, script(tmp_path / "fail.py", text), place / "lamp.gguf", "-q") == 4
    assert capsys.readouterr().err == f"ttexport: {tmp_path / 'fail.py'}: {message}\n"
    assert list(place.iterdir()) == []


def test_the_option_is_refused_where_it_does_not_apply(
    tiny_adapter: Path, tiny_tied: Path, tmp_path: Path, capsys: Capture
) -> None:
    made, out = stand_in(tmp_path), tmp_path / "out"
    assert merge(tiny_adapter, tiny_tied, tmp_path / "none.py", out) == 4
    assert "none.py: expected llama.cpp's convert_hf_to_gguf.py, but the file does not exist" in capsys.readouterr().err
    assert merge(tiny_adapter, tiny_tied, made, out, "--pre-tokenizer", "smollm") == 2
    argv = ["merge", str(tiny_adapter), "--base", str(tiny_tied), "--to", "onnx", "--converter", str(made)]
    assert run(argv) == 2
    assert not out.exists()
