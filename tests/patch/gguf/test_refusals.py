"""Every refusal of patch has one line and its exit code, and leaves nothing behind."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from exporter.cli.main import run
from exporter.formats.gguf import writer
from exporter.formats.gguf.raw_keys import raw_keys
from exporter.formats.gguf.writer import Key, TensorEntry
from exporter.sources.gguf.file import GgufFile
from exporter.sources.gguf.split_files import GgufModel
from exporter.sources.peft.adapter import Adapter
from exporter.verify.patched.gguf import Before, check_patched
from fixtures import adapters

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def tied(tiny_tied: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(tiny_tied, tmp_path_factory.mktemp("gguf") / "tied.gguf")


@pytest.fixture(scope="module")
def untied(tiny_untied: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(tiny_untied, tmp_path_factory.mktemp("gguf") / "untied.gguf")


def export(base: Path, out: Path) -> Path:
    assert run(["export", str(base), "--to", "gguf", "-q", "-o", str(out)]) == 0
    return out


def refused(capsys: Capture, tmp_path: Path, code: int, message: str, *argv: object) -> None:
    out = tmp_path / "out"
    out.mkdir(exist_ok=True)
    capsys.readouterr()
    assert run(["patch", *map(str, argv), "-o", str(out / "x.gguf")]) == code
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.err.count("\n") == 1
    assert printed.out == ""
    assert list(out.iterdir()) == []


def test_an_adapter_with_more_than_rows(tied: Path, tiny_tied: Path, tmp_path: Path, capsys: Capture) -> None:
    adapter = Path(shutil.copytree(adapters.stock_rows(tiny_tied, tmp_path / "rows", (5,)), tmp_path / "lora"))
    config = json.loads((adapter / "adapter_config.json").read_text())
    config |= {
        "peft_type": "LORA",
        "trainable_token_indices": [5],
        "r": 2,
        "lora_alpha": 2,
        "target_modules": ["q_proj"],
    }
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    path = adapter / "adapter_model.safetensors"
    rows = next(value for name, value in load_file(path).items() if "embed_tokens" in name)
    start = "base_model.model.model"
    factors = {
        f"{start}.layers.0.self_attn.q_proj.lora_A.weight": np.ones((2, 64), np.float32),
        f"{start}.layers.0.self_attn.q_proj.lora_B.weight": np.ones((64, 2), np.float32),
    }
    key = f"{start}.embed_tokens.token_adapter.trainable_tokens_delta"
    save_file({key: rows, **factors}, path)
    refused(capsys, tmp_path, 5, "ttexport merge", tied, adapter)
    save_file({key: rows}, path)
    assert run(["patch", str(tied), str(adapter), "-o", str(tmp_path / "ok.gguf"), "-q"]) == 0


def test_rows_of_head_and_embedding_that_differ_on_a_tied_file(
    tied: Path, tiny_both_adapter: Path, tmp_path: Path, capsys: Capture
) -> None:
    refused(capsys, tmp_path, 5, "--untie", tied, tiny_both_adapter, "--trust-base")


def test_a_row_that_two_adapters_set(tied: Path, tiny_tied: Path, tmp_path: Path, capsys: Capture) -> None:
    first = adapters.stock_rows(tiny_tied, tmp_path / "first", (5, 6))
    other = adapters.stock_rows(tiny_tied, tmp_path / "other", (6, 7), seed=1)
    refused(
        capsys, tmp_path, 4, "expected each token row to be set once, found two rows for token 6", tied, first, other
    )


def test_tokens_without_a_tokenizer(tied: Path, tiny_new_tokens_adapter: Path, tmp_path: Path, capsys: Capture) -> None:
    adapter = Path(shutil.copytree(tiny_new_tokens_adapter, tmp_path / "bare"))
    (adapter / "tokenizer.json").unlink()
    refused(capsys, tmp_path, 4, "must contain the tokenizer with the new tokens", tied, adapter)


def test_new_tokens_without_a_row_in_the_head(untied: Path, tiny_untied: Path, tmp_path: Path, capsys: Capture) -> None:
    adapter = adapters.stock_rows_new_tokens(tiny_untied, tmp_path / "new", ("<lamp>",))
    refused(capsys, tmp_path, 4, "output.weight: expected the adapters to set every new row", untied, adapter)


def test_a_tokenizer_of_another_base(tied: Path, tiny_adapter: Path, tmp_path: Path, capsys: Capture) -> None:
    adapter = Path(shutil.copytree(tiny_adapter, tmp_path / "other"))
    path = adapter / "tokenizer.json"
    content = json.loads(path.read_text())
    content["added_tokens"][2]["content"] = "<other>"
    path.write_text(json.dumps(content))
    refused(capsys, tmp_path, 4, ": expected the text '", tied, adapter)


def test_rows_of_another_width(tied: Path, tmp_path: Path, tiny_adapter: Path, capsys: Capture) -> None:
    adapter = Path(shutil.copytree(tiny_adapter, tmp_path / "narrow"))
    path = adapter / "adapter_model.safetensors"
    save_file({name: np.ascontiguousarray(value[:, :32]) for name, value in load_file(path).items()}, path)
    refused(capsys, tmp_path, 4, "expected rows of width 64, found 32", tied, adapter)


def test_a_file_that_is_no_gguf(tiny_tied: Path, tiny_adapter: Path, tmp_path: Path, capsys: Capture) -> None:
    refused(capsys, tmp_path, 5, "only a .gguf file or a folder of ONNX models can be patched", tiny_tied, tiny_adapter)
    refused(capsys, tmp_path, 4, "expected a .gguf file", tiny_adapter / "adapter_model.safetensors", tiny_adapter)
    refused(capsys, tmp_path, 4, "found no such file or folder", tmp_path / "none.gguf", tiny_adapter)


def test_the_base_as_output(tied: Path, tiny_adapter: Path, tmp_path: Path, capsys: Capture) -> None:
    before = tied.read_bytes()
    assert run(["patch", str(tied), str(tiny_adapter), "-o", str(tied), "--force"]) == 2
    assert "--in-place" in capsys.readouterr().err
    assert tied.read_bytes() == before


@pytest.mark.parametrize(
    ("what", "check"),
    [
        ("trained row", "token_embd.weight rows"),
        ("neighbour", "untouched"),
        ("first row of another tensor", "untouched"),
        ("metadata", "metadata"),
        ("shape", "tensors"),
    ],
)
def test_every_check_of_a_patch_can_close(
    what: str, check: str, tied: Path, tiny_adapter: Path, tmp_path: Path
) -> None:
    out = tmp_path / "x.gguf"
    assert run(["patch", str(tied), str(tiny_adapter), "-o", str(out), "-q"]) == 0
    parts, opened = GgufModel.open(tied), [Adapter.open(tiny_adapter)]
    befores = [Before.read(parts, opened, "BF16", every=every) for every in (False, True)]
    assert all(result.passed for before in befores for result in check_patched(out, before))
    file = GgufFile.open(out)
    data, embedding = bytearray(out.read_bytes()), file.tensors["token_embd.weight"]
    if what == "trained row":
        data[embedding.offset_bytes + 300 * embedding.row_nbytes] ^= 1
    elif what == "neighbour":
        data[embedding.offset_bytes + 301 * embedding.row_nbytes] ^= 1
    elif what == "first row of another tensor":
        data[file.tensors["blk.1.ffn_up.weight"].offset_bytes] ^= 1
    elif what == "metadata":
        at = data.index(b"llama.context_length") + len("llama.context_length") + 4
        data[at] ^= 1
    else:
        at = data.index(b"blk.0.attn_q.weight") + len("blk.0.attn_q.weight") + 4
        data[at : at + 16] = data[at : at + 16][:4] + bytes(4) + data[at + 8 : at + 16]
        data[at], data[at + 8] = 32, 128  # 64 x 64 read as 128 x 32
    out.write_bytes(data)
    for before in befores:
        assert [result.name for result in check_patched(out, before) if not result.passed][:1] == [check]


def rewritten(source: Path, out: Path, name: str, key: Key) -> Path:
    """A copy of a GGUF with another value of one key."""
    file = GgufFile.open(source)
    keys = [key if stored.name == name else stored for stored in raw_keys(file)]
    entries = [TensorEntry(tensor.name, tensor.type, tensor.shape) for tensor in file.tensors.values()]
    out.write_bytes(writer.header(keys, entries)[0] + source.read_bytes()[file.data_offset :])
    return out


def test_a_list_of_types_that_is_shorter_than_the_vocabulary(
    tied: Path, tiny_new_tokens_adapter: Path, tmp_path: Path, capsys: Capture
) -> None:
    name = "tokenizer.ggml.token_type"
    base = rewritten(tied, tmp_path / "base.gguf", name, writer.i32s(name, [1] * 100))
    refused(capsys, tmp_path, 4, "token_type: expected 512 items", base, tiny_new_tokens_adapter)


def test_a_vocab_size_that_is_no_number_is_left_alone(
    tied: Path, tiny_new_tokens_adapter: Path, tmp_path: Path
) -> None:
    name = "llama.vocab_size"
    base = rewritten(tied, tmp_path / "base.gguf", name, writer.text(name, "many"))
    assert run(["patch", str(base), str(tiny_new_tokens_adapter), "-o", str(tmp_path / "out.gguf"), "-q"]) == 0
    assert GgufFile.open(tmp_path / "out.gguf").metadata[name] == "many"
