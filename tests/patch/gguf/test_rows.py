"""A patched GGUF has the bytes that merging, converting and quantising anew would give."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from exporter.cli.main import run
from exporter.formats.gguf import writer
from exporter.formats.gguf.raw_keys import raw_keys
from exporter.formats.gguf.writer import Key, TensorEntry
from exporter.patch.gguf.evidence import base_dtype
from exporter.sources.gguf.file import GgufFile
from exporter.sources.gguf.split_files import GgufModel
from fixtures import adapters
from tests.support.trained import NEW_TOKENS, TRAINED_IDS

Capture = pytest.CaptureFixture[str]
TYPES = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_K_M", "Q5_K_M", "Q6_K", "IQ4_XS")
Bases = Callable[[str, str], Path]


def succeed(*arguments: object) -> None:
    assert run([*map(str, arguments), "-q"]) == 0


@pytest.fixture(scope="module")
def base_gguf(wide_tied: Path, wide_untied: Path, tmp_path_factory: pytest.TempPathFactory) -> Bases:
    """base_gguf("tied" or "untied", type): the base alone; read-only."""
    folder = tmp_path_factory.mktemp("bases")

    def make(tie: str, quant: str) -> Path:
        path = folder / f"{tie}-{quant}.gguf"
        if not path.exists():
            base = {"tied": wide_tied, "untied": wide_untied}[tie]
            succeed("export", base, "--to", "gguf", "--quant", quant, "-o", path)
        return path

    return make


@pytest.mark.parametrize("tokens", ["known", "new"])
@pytest.mark.parametrize("tie", ["tied", "untied"])
@pytest.mark.parametrize("quant", TYPES)
def test_patch_equals_merging_and_quantising_anew(
    base_gguf: Bases, wide_adapters: dict[str, Path], tmp_path: Path, quant: str, tie: str, tokens: str
) -> None:
    adapter, base = wide_adapters[f"{tie}-{tokens}"], base_gguf(tie, quant)
    before = base.read_bytes()
    succeed("merge", adapter, "--to", "gguf", "--quant", quant, "-o", tmp_path / "want.gguf")
    succeed("patch", base, adapter, "-o", tmp_path / "got.gguf", "--verify", "weights")
    assert (tmp_path / "got.gguf").read_bytes() == (tmp_path / "want.gguf").read_bytes()
    assert base.read_bytes() == before


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
@pytest.mark.parametrize("quant", [None, "Q4_K_M"])
def test_rows_are_rounded_as_the_merge_rounded_them(
    wide_tied: Path, wide_adapters: dict[str, Path], tmp_path: Path, dtype: str, quant: str | None
) -> None:
    options = ["--to", "gguf", "--dtype", dtype, *(["--quant", quant] if quant else [])]
    adapter = wide_adapters["tied-new"]
    succeed("export", wide_tied, *options, "-o", tmp_path / "base.gguf")
    succeed("merge", adapter, *options, "-o", tmp_path / "want.gguf")
    succeed("patch", tmp_path / "base.gguf", adapter, "-o", tmp_path / "got.gguf")
    assert (tmp_path / "got.gguf").read_bytes() == (tmp_path / "want.gguf").read_bytes()


def rewrite(source: Path, out: Path, keys: Callable[[list[Key]], list[Key]], **options: int) -> Path:
    """A copy of a GGUF with other keys: as another tool would have written it."""
    file = GgufFile.open(source)
    entries = [TensorEntry(tensor.name, tensor.type, tensor.shape) for tensor in file.tensors.values()]
    alignment = options.get("alignment", 32)
    head, _ = writer.header(keys(raw_keys(file)), entries, **options)
    body = b""
    for tensor in file.tensors.values():
        data = file.rows(tensor.name, 0, tensor.n_rows).tobytes()
        body += data + b"\0" * (-len(data) % alignment)
    out.write_bytes(head + body)
    return out


def foreign(keys: list[Key]) -> list[Key]:
    return [key for key in keys if not key.name.startswith("ttexport.")]


@pytest.mark.parametrize("quant", ["F16", "Q8_0", "Q4_K_M"])
def test_a_file_of_another_tool_is_proved_by_its_rows(
    base_gguf: Bases, wide_adapters: dict[str, Path], tmp_path: Path, quant: str
) -> None:
    base = rewrite(base_gguf("tied", quant), tmp_path / "base.gguf", foreign)
    adapter, want = wide_adapters["tied-new"], tmp_path / "want.gguf"
    succeed("merge", adapter, "--to", "gguf", "--quant", quant, "-o", want)
    succeed("patch", base, adapter, "-o", tmp_path / "got.gguf")
    assert (tmp_path / "got.gguf").read_bytes() == rewrite(want, tmp_path / "w.gguf", foreign).read_bytes()


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_the_dtype_of_the_base_shows_in_its_norms(wide_tied: Path, tmp_path: Path, dtype: str) -> None:
    option = {"F32": "f32", "F16": "f16", "BF16": "bf16"}[dtype]
    generator = np.random.default_rng(0)
    base = Path(shutil.copytree(wide_tied, tmp_path / "base"))
    arrays = load_file(base / "model.safetensors")
    norms = {n: (1 + generator.normal(size=v.shape) / 9).astype(np.float32) for n, v in arrays.items() if v.ndim == 1}
    save_file(
        {n: v.astype(np.float32) for n, v in arrays.items()} | norms, base / "model.safetensors", {"format": "pt"}
    )
    succeed("merge", "--help")
    succeed("export", base, "--to", "hf", "--dtype", option, "-o", tmp_path / "stored")
    succeed("export", tmp_path / "stored", "--to", "gguf", "--quant", "Q8_0", "-o", tmp_path / "m.gguf")
    plain = rewrite(tmp_path / "m.gguf", tmp_path / "plain.gguf", foreign)
    assert base_dtype(GgufModel.open(plain)) == dtype


def test_another_base_is_refused(
    base_gguf: Bases, wide_adapters: dict[str, Path], wide_untied: Path, tmp_path: Path, capsys: Capture
) -> None:
    base, adapter = base_gguf("tied", "Q8_0"), wide_adapters["tied-known"]
    other = Path(shutil.copytree(wide_untied, tmp_path / "other"))
    for path in (base, rewrite(base, tmp_path / "plain.gguf", foreign)):
        arrays = load_file(other / "model.safetensors")
        arrays["model.embed_tokens.weight"] = arrays["model.embed_tokens.weight"] * np.asarray(
            1.01, arrays["model.embed_tokens.weight"].dtype
        )
        save_file(arrays, other / "model.safetensors", {"format": "pt"})
        argv = ["patch", str(path), str(adapter), "-o", str(tmp_path / "got.gguf"), "-q"]
        assert run([*argv, "--base", str(other)]) == 4
        assert capsys.readouterr().err.count("\n") == 1
        assert not (tmp_path / "got.gguf").exists()
    assert run([*argv, "--trust-base"]) == 0


def test_without_a_base_at_hand_the_file_must_be_trusted(
    base_gguf: Bases, wide_adapters: dict[str, Path], tmp_path: Path, capsys: Capture
) -> None:
    adapter = Path(shutil.copytree(wide_adapters["tied-known"], tmp_path / "adapter"))
    config = json.loads((adapter / "adapter_config.json").read_text()) | {"base_model_name_or_path": "some/where"}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    argv = ["patch", str(base_gguf("tied", "Q8_0")), str(adapter), "-o", str(tmp_path / "got.gguf"), "-q"]
    assert run(argv) == 4
    assert "--trust-base" in capsys.readouterr().err
    assert run([*argv, "--trust-base"]) == 0


def test_any_architecture_alignment_and_version_keep_what_they_are(
    base_gguf: Bases, wide_adapters: dict[str, Path], tmp_path: Path
) -> None:
    """A made-up architecture with scores, another alignment and GGUF version 2: only rows and tokens change."""

    def strange(keys: list[Key]) -> list[Key]:
        scores = struct.pack("<IIQ", 9, 6, 512) + np.arange(512, dtype="<f4").tobytes()
        out = [Key(key.name.replace("llama.", "strange."), key.encoded) for key in foreign(keys)]
        out[0] = writer.text("general.architecture", "strange")
        return [*out, writer.u32("general.alignment", 64), Key("tokenizer.ggml.scores", scores)]

    base = rewrite(base_gguf("untied", "Q6_K"), tmp_path / "base.gguf", strange, alignment=64, version=2)
    succeed("patch", base, wide_adapters["untied-new"], "-o", tmp_path / "got.gguf", "--verify", "weights")
    old, new = GgufFile.open(base), GgufFile.open(tmp_path / "got.gguf")
    assert (new.version, new.alignment) == (2, 64)
    assert new.metadata["strange.vocab_size"] == 515
    assert new.metadata["tokenizer.ggml.tokens"].values() == [
        *old.metadata["tokenizer.ggml.tokens"].values(),
        *NEW_TOKENS,
    ]
    assert new.metadata["tokenizer.ggml.scores"].values() == [*map(float, range(512)), -1000.0, -1000.0, -1000.0]
    assert list(new.tensors) == list(old.tensors)


def test_new_tokens_take_unused_rows_first(tiny_padded: Path, tiny_padded_adapter: Path, tmp_path: Path) -> None:
    succeed("export", tiny_padded, "--to", "gguf", "-o", tmp_path / "base.gguf")
    succeed("merge", tiny_padded_adapter, "--to", "gguf", "-o", tmp_path / "want.gguf")
    succeed("patch", tmp_path / "base.gguf", tiny_padded_adapter, "-o", tmp_path / "got.gguf")
    assert (tmp_path / "got.gguf").read_bytes() == (tmp_path / "want.gguf").read_bytes()


def test_special_tokens_and_template_of_the_adapter_are_written(tiny_tied: Path, tmp_path: Path) -> None:
    adapter = adapters.stock_rows_new_tokens(tiny_tied, tmp_path / "adapter", ("<end>",), special=True)
    path = adapter / "tokenizer_config.json"
    settings = json.loads(path.read_text()) | {"eos_token": "<end>"}
    path.write_text(json.dumps(settings))
    (adapter / "chat_template.jinja").write_text("{{ messages }}")
    succeed("export", tiny_tied, "--to", "gguf", "-o", tmp_path / "base.gguf")
    succeed("merge", adapter, "--to", "gguf", "-o", tmp_path / "want.gguf")
    succeed("patch", tmp_path / "base.gguf", adapter, "-o", tmp_path / "got.gguf")
    assert (tmp_path / "got.gguf").read_bytes() == (tmp_path / "want.gguf").read_bytes()
    metadata = GgufFile.open(tmp_path / "got.gguf").metadata
    assert metadata["tokenizer.ggml.eos_token_id"] == 512
    assert metadata["tokenizer.chat_template"] == "{{ messages }}"


@pytest.mark.parametrize("names", [("chat_template", "tool use"), ("tool use",), ("chat_template",)])
def test_the_adapters_chat_templates_replace_all_templates_of_the_file(
    names: tuple[str, ...], tiny_tied: Path, tiny_adapter: Path, tmp_path: Path
) -> None:
    def store(folder: Path, *names: str) -> Path:
        (folder / "chat_template.jinja").unlink()
        (folder / "additional_chat_templates").mkdir()
        for name in names:
            place = folder if name == "chat_template" else folder / "additional_chat_templates"
            (place / f"{name}.jinja").write_text(f"{folder.name} {name}")
        return folder

    base = store(Path(shutil.copytree(tiny_tied, tmp_path / "base")), "chat_template", "rag")
    adapter = store(Path(shutil.copytree(tiny_adapter, tmp_path / "adapter")), *names)
    succeed("export", base, "--to", "gguf", "-o", tmp_path / "base.gguf")
    succeed("merge", adapter, "--base", base, "--to", "gguf", "-o", tmp_path / "want.gguf")
    succeed("patch", tmp_path / "base.gguf", adapter, "--base", base, "-o", tmp_path / "got.gguf")
    assert (tmp_path / "got.gguf").read_bytes() == (tmp_path / "want.gguf").read_bytes()
    assert "tokenizer.chat_template.rag" not in GgufFile.open(tmp_path / "got.gguf").metadata


def test_a_head_that_repeats_the_embedding_gets_the_rows_too(
    tiny_tied: Path, tiny_adapter: Path, tmp_path: Path
) -> None:
    """Some converters store a tied matrix twice; an adapter of an older PEFT holds its rows once."""
    succeed("export", tiny_tied, "--to", "gguf", "-o", tmp_path / "tied.gguf")
    file = GgufFile.open(tmp_path / "tied.gguf")
    embedding = file.tensors["token_embd.weight"]
    entries = [TensorEntry(tensor.name, tensor.type, tensor.shape) for tensor in file.tensors.values()]
    entries.append(TensorEntry("output.weight", embedding.type, embedding.shape))
    head, _ = writer.header(raw_keys(file), entries)
    body = (tmp_path / "tied.gguf").read_bytes()[file.data_offset :]
    again = file.rows("token_embd.weight", 0, embedding.n_rows).tobytes()
    (tmp_path / "twice.gguf").write_bytes(head + body + again)
    adapter = Path(shutil.copytree(tiny_adapter, tmp_path / "once"))
    rows = {
        name: value for name, value in load_file(adapter / "adapter_model.safetensors").items() if "lm_head" not in name
    }
    save_file(rows, adapter / "adapter_model.safetensors")
    succeed("patch", tmp_path / "twice.gguf", adapter, "-o", tmp_path / "got.gguf")
    got = GgufFile.open(tmp_path / "got.gguf")
    for token_id in TRAINED_IDS:
        both = [got.rows(name, token_id, token_id + 1).tobytes() for name in ("token_embd.weight", "output.weight")]
        assert both[0] == both[1] != file.rows("token_embd.weight", token_id, token_id + 1).tobytes()


def test_plan_shows_what_a_patch_would_do_and_writes_nothing(
    base_gguf: Bases, wide_adapters: dict[str, Path], tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    base, adapter = str(base_gguf("tied", "Q6_K")), str(wide_adapters["tied-new"])
    capsys.readouterr()
    assert run(["plan", base, adapter, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["new_tokens"] == {str(512 + number): token for number, token in enumerate(NEW_TOKENS)}
    assert not document["in_place"]
    assert run(["plan", base, adapter]) == 0
    assert "<lamp>" in capsys.readouterr().out
    assert run(["plan", base, adapter, "--quant", "Q4_0"]) == 2
    assert "--quant does not apply to a patch" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    assert run(["patch", base, adapter, "-o", "out.gguf", "-q"]) == 0
    assert document["targets"][0]["nbytes"] == (tmp_path / "out.gguf").stat().st_size


@pytest.mark.smollm2
@pytest.mark.slow
@pytest.mark.parametrize("quant", ["Q8_0", "Q4_K_M"])
def test_smollm2_with_new_tokens_is_patched_to_the_byte(smollm2: Path, tmp_path: Path, quant: str) -> None:
    """The converter writes a flag for its size of vocabulary alone; the grown model has no such flag."""
    adapter = adapters.stock_rows_new_tokens(smollm2, tmp_path / "adapter", ("<lamp>", "<ship>"), (2, 33))
    succeed("export", smollm2, "--to", "gguf", "--quant", quant, "-o", tmp_path / "base.gguf")
    succeed("merge", adapter, "--to", "gguf", "--quant", quant, "-o", tmp_path / "want.gguf")
    succeed("patch", tmp_path / "base.gguf", adapter, "-o", tmp_path / "got.gguf")
    assert (tmp_path / "got.gguf").read_bytes() == (tmp_path / "want.gguf").read_bytes()
