"""merge and export as users and release automation call them."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest

from exporter.cli.main import run
from exporter.merge.passes import ReplaceRows
from exporter.sources.gguf.file import GgufFile
from exporter.sources.hf.checkpoint import Checkpoint
from exporter.sources.onnx.file import OnnxFile
from exporter.tensors import Array
from fixtures.hostile.cases import HOSTILE, MENTIONS, PICKLE_MARKER
from tests.marks import needs_llama_cpp
from tests.support.documents import read_report
from tests.support.trained import NEW_TOKENS, TRAINED_IDS

Capture = pytest.CaptureFixture[str]
ALL_FORMATS = ("--to", "hf", "--to", "gguf", "--to", "onnx")


def digests(*folders: Path) -> dict[str, str]:
    files = [path for folder in folders for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture
def in_adapter(tiny_adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder is a copy of an adapter that names its base."""
    folder = Path(shutil.copytree(tiny_adapter, tmp_path / "lamp-adapter"))
    monkeypatch.chdir(folder)
    return folder


def test_merge_to_onnx_works_verbatim_in_an_adapter_folder(in_adapter: Path, capsys: Capture) -> None:
    assert run(["merge", "--to", "onnx"]) == 0
    assert capsys.readouterr().out == "lamp-adapter-onnx\n"
    assert OnnxFile.open(in_adapter / "lamp-adapter-onnx").embedding


def test_to_gguf_works_verbatim_in_an_adapter_folder(in_adapter: Path, capsys: Capture) -> None:
    assert run(["--to", "gguf"]) == 0
    assert capsys.readouterr().out == "lamp-adapter-BF16.gguf\n"
    assert GgufFile.open(in_adapter / "lamp-adapter-BF16.gguf").tensors["token_embd.weight"].type == "BF16"


def test_all_formats_in_one_go_with_one_report(
    tiny_adapter: Path, tiny_tied: Path, tmp_path: Path, capsys: Capture
) -> None:
    out = tmp_path / "out"
    argv = ["merge", str(tiny_adapter), "--base", str(tiny_tied), *ALL_FORMATS]
    before = digests(tiny_adapter, tiny_tied)
    assert run([*argv, "-o", str(out), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert [artifact["format"] for artifact in document["artifacts"]] == ["hf", "gguf", "onnx"]
    assert all(artifact["verification"]["passed"] for artifact in document["artifacts"])
    assert all(Path(artifact["path"]).exists() for artifact in document["artifacts"])
    assert read_report(out)["passed"]
    assert digests(tiny_adapter, tiny_tied) == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_two_runs_in_two_folders_give_the_same_bytes(tiny_adapter: Path, tiny_tied: Path, tmp_path: Path) -> None:
    def export(out: Path) -> dict[str, str]:
        argv = ["merge", str(tiny_adapter), "--base", str(tiny_tied), *ALL_FORMATS, "-q"]
        assert run([*argv, "--quant", "Q8_0", "-o", str(out)]) == 0
        return {str(Path(path).relative_to(out)): digest for path, digest in digests(out).items()}

    assert export(tmp_path / "one") == export(tmp_path / "elsewhere" / "two")


def test_new_tokens_grow_every_format(tiny_new_tokens_adapter: Path, tiny_tied: Path, tmp_path: Path) -> None:
    argv = ["merge", str(tiny_new_tokens_adapter), "--base", str(tiny_tied), *ALL_FORMATS]
    assert run([*argv, "-q", "-o", str(tmp_path / "out")]) == 0
    checkpoint = Checkpoint.open(tmp_path / "out" / "hf")
    rows = Checkpoint.open(tiny_tied).config["vocab_size"] + len(NEW_TOKENS)
    assert checkpoint.config["vocab_size"] == rows
    assert checkpoint.tensors["model.embed_tokens.weight"].spec.n_rows == rows
    gguf = GgufFile.open(next((tmp_path / "out" / "gguf").glob("*.gguf")))
    assert gguf.tensors["token_embd.weight"].shape[0] == rows
    assert gguf.metadata["tokenizer.ggml.tokens"].values()[-len(NEW_TOKENS) :] == list(NEW_TOKENS)
    onnx = OnnxFile.open(tmp_path / "out" / "onnx")
    assert onnx.initialisers[str(onnx.embedding)].shape[0] == rows


def test_quant_is_repeatable_from_one_command(tiny_adapter: Path, tiny_tied: Path, tmp_path: Path) -> None:
    argv = ["merge", str(tiny_adapter), "--base", str(tiny_tied), "--to", "hf", "--to", "gguf", "--quant", "Q8_0"]
    assert run([*argv, "--quant", "F16", "-q", "-o", str(tmp_path / "out")]) == 0
    names = sorted(path.name for path in (tmp_path / "out" / "gguf").iterdir())
    assert names == ["rows-F16.gguf", "rows-Q8_0.gguf"]


@needs_llama_cpp
def test_quant_is_for_the_format_that_knows_it_in_any_case(
    tiny_adapter: Path, tiny_tied: Path, tmp_path: Path, capsys: Capture
) -> None:
    argv = ["plan", str(tiny_adapter), "--base", str(tiny_tied), "--to", "gguf", "--to", "onnx", "--json"]
    argv += [argument for quant in ("q8_0", "f16", "fp16", "INT8", "Q4_K_M") for argument in ("--quant", quant)]
    assert run(argv) == 0
    targets = json.loads(capsys.readouterr().out)["targets"]
    assert [target["storage"] for target in targets] == ["Q8_0", "F16", "Q4_K_M", "fp16, int8"]


def test_a_checkpoint_exports_without_any_adapter(tiny_untied: Path, tmp_path: Path) -> None:
    assert run(["export", "--to", "gguf", str(tiny_untied), "-o", str(tmp_path / "m.gguf"), "-q"]) == 0
    assert "output.weight" in GgufFile.open(tmp_path / "m.gguf").tensors


@pytest.mark.parametrize("fmt", ["hf", "gguf", "onnx"])
@pytest.mark.parametrize("name", HOSTILE)
def test_bad_input_is_exit_4_and_one_line(
    name: str, fmt: str, tiny_adapter: Path, tiny_tied: Path, tmp_path: Path, capsys: Capture
) -> None:
    adapter, base = HOSTILE[name](tiny_adapter, tiny_tied, tmp_path / "in")
    before = digests(tmp_path / "in")
    (tmp_path / "out").mkdir()
    assert run(["merge", str(adapter), "--base", str(base), "--to", fmt, "-o", str(tmp_path / "out" / "x")]) == 4
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("ttexport: ")
    assert captured.out == ""
    for text in MENTIONS[name]:
        assert text.casefold() in captured.err.casefold()
    assert list((tmp_path / "out").iterdir()) == []
    assert digests(tmp_path / "in") == before
    assert not (tmp_path / "in" / PICKLE_MARKER).exists()


def test_a_merge_that_loses_a_row_is_not_promoted(
    tiny_adapter: Path, tiny_tied: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The maker is broken on purpose; the checker, which shares no code with it, stops the merge."""

    def forgetful(self: ReplaceRows, start: int, block: Array) -> Array:
        return block

    monkeypatch.setattr(ReplaceRows, "apply", forgetful)
    for fmt in ("hf", "gguf", "onnx"):
        out = tmp_path / fmt
        argv = ["merge", str(tiny_adapter), "--base", str(tiny_tied), "--to", fmt, "-o", str(out), "-q"]
        assert run(argv) == 3
        assert "embedding rows" in capsys.readouterr().err
        assert list(tmp_path.iterdir()) == []


def test_an_existing_output_is_kept_unless_forced(
    tiny_adapter: Path, tiny_tied: Path, tmp_path: Path, capsys: Capture
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("precious")
    argv = ["merge", str(tiny_adapter), "--base", str(tiny_tied), "-o", str(out), "-q"]
    assert run(argv) == 7
    assert "--force" in capsys.readouterr().err
    assert (out / "mine.txt").read_text() == "precious"
    assert run([*argv, "--force"]) == 0
    assert not (out / "mine.txt").exists()
    assert Checkpoint.open(out).tensors
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_force_does_not_lose_the_old_artifact_to_a_failure(
    tiny_adapter: Path, tiny_tied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "m.gguf"
    argv = ["merge", str(tiny_adapter), "--base", str(tiny_tied), "--to", "gguf", "-o", str(out), "-q"]
    assert run(argv) == 0
    before = out.read_bytes()

    def forgetful(self: ReplaceRows, start: int, block: Array) -> Array:
        return block

    monkeypatch.setattr(ReplaceRows, "apply", forgetful)
    assert run([*argv, "--force"]) == 3
    assert out.read_bytes() == before


@pytest.mark.parametrize(
    ("argv", "code", "message"),
    [
        (["frobnicate"], 2, "No such command"),
        (["merge", "--to", "tflite"], 2, "tflite"),
        (["merge", "{adapter}", "--base", "{base}", "--to", "hf", "--quant", "Q8_0"], 2, "--quant"),
        (["merge", "{adapter}", "--base", "{base}", "--to", "hf", "--to", "hf"], 2, "--to"),
        (["export", "{base}", "--base", "{base}"], 2, "--base"),
        (["patch", "x.gguf", "{adapter}", "-o", "y"], 4, "x.gguf"),
        (["patch", "x.gguf", "{adapter}"], 2, "-o OUT"),
        (["merge", "{adapter}", "--base", "{base}", "--to", "onnx", "--dtype", "bf16", "-o", "x"], 5, "BF16"),
        (["merge", "{adapter}", "--base", "{base}", "--to", "gguf", "--quant", "Q9_X", "-o", "x"], 5, "Q9_X"),
        (["merge", "{adapter}", "--base", "{base}", "--to", "gguf", "--quant", "int8", "-o", "x"], 5, "INT8"),
        (["merge", "{adapter}", "--base", "{base}", "--to", "onnx", "--quant", "Q4_K_M", "-o", "x"], 5, "q4_k_m"),
        (["merge", "{adapter}", "--to", "gguf", "--quant", "Q4_0", "--quant", "q4_0"], 2, "each value once"),
        pytest.param(
            ["merge", "{adapter}", "--base", "{base}", "--to", "gguf", "--quant", "IQ2_XXS", "-o", "x"],
            5,
            "--imatrix",
            marks=needs_llama_cpp,
        ),
        (["merge", "{adapter}", "--to", "gguf", "--quant", "Q8_0", "--imatrix", "i"], 2, "--imatrix"),
        (["merge", "{adapter}", "--to", "hf", "--output-tensor-type", "Q6_K"], 2, "--output-tensor-type"),
        (["merge", "{adapter}", "--to", "gguf", "--quant", "Q4_0", "--token-embedding-type", "q6"], 2, "found 'q6'"),
        (["merge", "{adapter}", "--to", "onnx", "--pre-tokenizer", "llama-bpe"], 2, "--pre-tokenizer: needs --to gguf"),
        (["merge", "{adapter}", "--prompts", "{base}/config.json"], 2, "--prompts: needs --verify full"),
        (["merge", "{base}"], 4, "adapter_config.json"),
        (["merge", "{adapter}", "--base", "/nowhere"], 4, "/nowhere"),
        (["inspect", "/nowhere"], 4, "/nowhere"),
        (["verify", "{base}", "--reference", "/nowhere"], 4, "/nowhere"),
        (
            ["merge", "{adapter}", "--base", "{base}", "--verify", "full", "--prompts", "/nowhere.txt"],
            4,
            "/nowhere.txt",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_every_refusal_has_its_exit_code_and_one_line(
    argv: list[str], code: int, message: str, tiny_adapter: Path, tiny_tied: Path, tmp_path: Path,
    capsys: Capture, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    filled = [argument.format(adapter=tiny_adapter, base=tiny_tied) for argument in argv]
    assert run(filled) == code
    stderr = capsys.readouterr().err
    assert message in stderr
    assert stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
    assert run([*filled, "--json"]) == code
    assert json.loads(capsys.readouterr().out)["error"]["exit_code"] == code


def test_a_full_disk_is_exit_7_before_anything_is_written(
    tiny_adapter: Path, tiny_tied: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    assert run(["merge", str(tiny_adapter), "--base", str(tiny_tied), "-o", str(tmp_path / "x")]) == 7
    assert "1000 bytes are free" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_inspect_reads_what_merge_wrote(tiny_adapter: Path, tiny_tied: Path, tmp_path: Path, capsys: Capture) -> None:
    argv = ["merge", str(tiny_adapter), "--base", str(tiny_tied), *ALL_FORMATS]
    assert run([*argv, "-o", str(tmp_path / "out"), "-q"]) == 0
    capsys.readouterr()
    gguf = next((tmp_path / "out" / "gguf").iterdir())
    expected_kinds = {tiny_adapter: "adapter", tiny_tied: "checkpoint", gguf: "gguf", tmp_path / "out" / "onnx": "onnx"}
    for path, kind in expected_kinds.items():
        assert run(["inspect", str(path), "--json"]) == 0
        document = json.loads(capsys.readouterr().out)
        assert document["kind"] == kind
        assert document["tensors"]
        assert run(["inspect", str(path)]) == 0
        assert kind in capsys.readouterr().out
    assert run(["inspect", str(tiny_adapter), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["facts"]["token ids"] == sorted(TRAINED_IDS)


def test_an_interrupt_leaves_nothing_and_is_exit_130(
    tiny_adapter: Path, tiny_tied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(self: ReplaceRows, start: int, block: Array) -> Array:
        raise KeyboardInterrupt

    monkeypatch.setattr(ReplaceRows, "apply", interrupted)
    assert run(["merge", str(tiny_adapter), "--base", str(tiny_tied), "-o", str(tmp_path / "x")]) == 130
    assert list(tmp_path.iterdir()) == []
