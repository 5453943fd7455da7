"""--converter: a script of the user's choice writes the GGUF, and is not trusted."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import transformers

from exporter.cli.main import run
from exporter.sources.gguf.file import GgufFile
from fixtures.adapters import stock_rows
from fixtures.models import families
from fixtures.tiny import build_tokenizer
from tests.conformance.gguf import TRAINED_IDS, required_converter

Capture = pytest.CaptureFixture[str]

# Takes the arguments of llama.cpp's script: CHECKPOINT --outfile FILE --outtype TYPE.
_STAND_IN = """
import sys
from pathlib import Path
from typing import Any
sys.path.insert(0, {root!r})
from exporter.formats.gguf import plan_gguf, write_gguf
from exporter.merge.plan import plan_merge
from exporter.sources.hf.checkpoint import Checkpoint
checkpoint, _, out, _, ftype = sys.argv[1:]
source = {source!r} or checkpoint
write_gguf(plan_gguf(plan_merge(Checkpoint.open(Path(source)), []).model(), ftype.upper()), Path(out))
"""

# llama.cpp's script with a fixed pre-tokenizer, because it does not know the hash of a tiny tokenizer.
_LLAMA_CPP = """
import sys
root = {root!r}
sys.path[:0] = [root, root + "/gguf-py"]
import conversion.base
conversion.base.TextModel.get_vocab_base_pre = lambda self, tokenizer: "smollm"
import convert_hf_to_gguf
convert_hf_to_gguf.main()
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


@pytest.mark.converter
def test_a_model_without_a_family_goes_through_llama_cpps_converter(tmp_path: Path, capsys: Capture) -> None:
    root = required_converter()
    base = tmp_path / "olmo"
    sizes: dict[str, Any] = {
        "vocab_size": families.VOCAB,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
    }
    config = transformers.OlmoConfig(**sizes, num_attention_heads=4, bos_token_id=1, eos_token_id=2, pad_token_id=3)
    transformers.OlmoForCausalLM(config).save_pretrained(base)
    build_tokenizer(families.VOCAB).save_pretrained(base)
    adapter, out = stock_rows(base, tmp_path / "adapter", TRAINED_IDS), tmp_path / "olmo.gguf"
    argv = ["merge", str(adapter), "--base", str(base), "--to", "gguf", "-o", str(out)]
    assert run(argv) == 5
    assert "--converter PATH" in capsys.readouterr().err
    converted = script(tmp_path / "convert.py", _LLAMA_CPP, root=str(root))
    assert run([*argv, "--converter", str(converted), "--verify", "full", "--json"]) == 0
    (artifact,) = json.loads(capsys.readouterr().out)["artifacts"]
    assert artifact["verification"]["passed"]
    assert artifact["nbytes"] == out.stat().st_size
    assert GgufFile.open(out).metadata["general.architecture"] == "olmo"


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
    assert merge(tiny_adapter, tiny_tied, made, out, "--quant", "Q4_K_M") == 5
    assert "the converter supports only the file types F32, F16, Q8_0, BF16, not Q4_K_M" in capsys.readouterr().err
    assert merge(tiny_adapter, tiny_tied, made, out, "--pre-tokenizer", "smollm") == 2
    assert merge(tiny_adapter, tiny_tied, made, out, "--quant", "Q8_0", "--output-tensor-type", "F16") == 2
    argv = ["merge", str(tiny_adapter), "--base", str(tiny_tied), "--to", "onnx", "--converter", str(made)]
    assert run(argv) == 2
    assert not out.exists()
