from __future__ import annotations

import json
import math
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from exporter.errors import (
    BadInput,
    LedgerError,
    NotExpressible,
    OutputError,
    TensorMismatch,
    UnreadableFile,
)
from exporter.formats.gguf import plan_gguf, write_gguf
from exporter.sources.gguf.file import GgufFile
from exporter.sources.gguf.header import GgufArray
from tests.formats.gguf.conftest import Write, merged
from tests.formats.gguf.models import SMOLLM, checkpoint, config, tokenizer_json
from tests.support.trained import NEW_TOKENS, TRAINED_IDS


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def embedding(path: Path, name: str = "token_embd.weight") -> np.ndarray:
    file = GgufFile.open(path)
    return file.rows(name, 0, file.tensors[name].n_rows)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return checkpoint(tmp_path / "base", config(), tokenizer_json(SMOLLM))


@pytest.fixture
def untied(tmp_path: Path) -> Path:
    return checkpoint(tmp_path / "base", config(tie_word_embeddings=False), tokenizer_json(SMOLLM))


@pytest.mark.parametrize("ftype", ["F32", "F16", "BF16", "Q8_0"])
def test_only_the_trained_rows_change(write: Write, tiny_tied: Path, tiny_adapter: Path, ftype: str) -> None:
    before, after = write(tiny_tied, ftype=ftype), write(tiny_tied, tiny_adapter, ftype=ftype)
    old, new = GgufFile.open(before), GgufFile.open(after)
    assert list(old.tensors) == list(new.tensors)
    changed = {
        name: set(np.flatnonzero((embedding(before, name) != embedding(after, name)).any(axis=1)).tolist())
        for name in old.tensors
    }
    assert changed.pop("token_embd.weight") == set(TRAINED_IDS)
    assert not any(changed.values())


def test_rows_of_head_and_embedding_change_on_an_untied_base(
    write: Write, tiny_untied: Path, tiny_both_adapter: Path
) -> None:
    before, after = write(tiny_untied), write(tiny_untied, tiny_both_adapter)
    for name in ("token_embd.weight", "output.weight"):
        rows = np.flatnonzero((embedding(before, name) != embedding(after, name)).any(axis=1))
        assert set(rows.tolist()) == set(TRAINED_IDS)
    assert not np.array_equal(embedding(after, "output.weight"), embedding(after))


def test_new_tokens_grow_matrix_and_vocabulary_together(
    write: Write, tiny_tied: Path, tiny_new_tokens_adapter: Path
) -> None:
    file = GgufFile.open(write(tiny_tied, tiny_new_tokens_adapter))
    tokens: GgufArray = file.metadata["tokenizer.ggml.tokens"]
    assert file.tensors["token_embd.weight"].shape[0] == tokens.count == file.metadata["llama.vocab_size"] == 515
    assert tokens.values()[-3:] == list(NEW_TOKENS)
    assert file.metadata["tokenizer.ggml.token_type"].values()[-3:] == [4, 4, 4]


def test_new_tokens_take_padding_rows(write: Write, tiny_padded: Path, tiny_padded_adapter: Path) -> None:
    file = GgufFile.open(write(tiny_padded, tiny_padded_adapter))
    assert file.metadata["tokenizer.ggml.tokens"].values()[512:] == [
        *NEW_TOKENS,
        *(f"[PAD{i}]" for i in range(515, 520)),
    ]
    assert file.metadata["tokenizer.ggml.token_type"].values()[512:] == [4] * 3 + [5] * 5


def test_two_runs_give_the_same_bytes(write: Write, tiny_tied: Path, tiny_adapter: Path) -> None:
    first, second = (write(tiny_tied, tiny_adapter, ftype="Q8_0") for _ in range(2))
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize("ftype", ["F32", "BF16", "Q8_0"])
def test_size_is_known_before_writing_and_progress_adds_up_to_it(tmp_path: Path, base: Path, ftype: str) -> None:
    layout, out = plan_gguf(merged(base), ftype), tmp_path / "out.gguf"
    written: list[int] = []
    write_gguf(layout, out, written.append)
    assert out.stat().st_size == layout.nbytes == sum(written)


def test_base_digest_is_recorded(write: Write, base: Path) -> None:
    model = merged(base)
    recorded = GgufFile.open(write(base)).metadata["ttexport.base.embedding_sha256"]
    assert recorded == model.provenance["base.embedding_sha256"]


def test_stored_head_of_a_tied_base_is_dropped_and_recorded(base: Path, write: Write) -> None:
    path = base / "model.safetensors"
    arrays = load_file(path)
    save_file(arrays | {"lm_head.weight": arrays["model.embed_tokens.weight"]}, path)
    assert plan_gguf(merged(base)).dropped == {
        "lm_head.weight": "omitted, because the LM head is tied to the embedding"
    }
    assert "output.weight" not in GgufFile.open(write(base)).tensors


def test_rotary_buffers_are_dropped_and_recorded(base: Path) -> None:
    path, name = base / "model.safetensors", "model.layers.0.self_attn.rotary_emb.inv_freq"
    save_file(load_file(path) | {name: np.zeros(8, np.float32)}, path)
    assert plan_gguf(merged(base)).dropped == {name: "omitted, because every runtime computes this buffer itself"}


def test_unknown_tensor_is_not_dropped_silently(base: Path) -> None:
    path = base / "model.safetensors"
    save_file(load_file(path) | {"model.layers.0.extra.weight": np.zeros((2, 2), np.float32)}, path)
    with pytest.raises(LedgerError, match=r"model\.layers\.0\.extra\.weight: expected one writer, found no writer"):
        plan_gguf(merged(base), "F32")


def test_missing_tensor_is_named(untied: Path) -> None:
    path = untied / "model.safetensors"
    arrays = load_file(path)
    del arrays["model.layers.1.mlp.up_proj.weight"]
    save_file(arrays, path)
    with pytest.raises(TensorMismatch, match=r"layers\.1\.mlp\.up_proj\.weight: expected shape \(96, 64\).*no tensor"):
        plan_gguf(merged(untied))


@pytest.mark.parametrize("change", [{"intermediate_size": 97}, {"num_key_value_heads": 4}, {"num_attention_heads": 8}])
def test_tensor_that_contradicts_the_config_is_named(base: Path, change: dict[str, int]) -> None:
    edit_config(base, head_dim=16, **change)
    with pytest.raises(TensorMismatch, match=r"expected shape .* according to config\.json"):
        plan_gguf(merged(base))


def test_unknown_family_is_refused_with_the_alternatives(base: Path) -> None:
    edit_config(base, model_type="novel")
    with pytest.raises(
        NotExpressible, match=r"model_type 'novel'.*converter install .*--converter PATH.*ttexport patch"
    ):
        plan_gguf(merged(base))


def test_type_that_is_not_written_is_refused(base: Path) -> None:
    with pytest.raises(NotExpressible, match="Q4_K_M"):
        plan_gguf(merged(base), "Q4_K_M")


def test_matrices_of_two_types_need_a_choice(base: Path, write: Write) -> None:
    path = base / "model.safetensors"
    arrays = load_file(path)
    arrays["model.embed_tokens.weight"] = arrays["model.embed_tokens.weight"].astype(np.float32)
    save_file(arrays, path)
    with pytest.raises(NotExpressible, match=r"BF16 and F32.*--dtype"):
        plan_gguf(merged(base))
    assert GgufFile.open(write(base, ftype="F16")).tensors["token_embd.weight"].type == "F16"


@pytest.mark.parametrize(("ftype", "value"), [("F16", 1e6), ("Q8_0", np.nan), ("Q8_0", np.inf), ("Q8_0", 1e8)])
def test_value_that_the_type_cannot_hold_is_refused(base: Path, tmp_path: Path, ftype: str, value: float) -> None:
    path = base / "model.safetensors"
    arrays = load_file(path)
    arrays["model.layers.1.mlp.down_proj.weight"][3, 5] = value
    save_file(arrays, path)
    with pytest.raises(BadInput, match=rf"model\.safetensors: model\.layers\.1\.mlp\.down_proj\.weight: .*{ftype}"):
        write_gguf(plan_gguf(merged(base), ftype), tmp_path / "out.gguf")
    assert not (tmp_path / "out.gguf").exists()


def test_checkpoint_truncated_after_planning_leaves_no_file(base: Path, tmp_path: Path) -> None:
    layout = plan_gguf(merged(base))
    path = base / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(UnreadableFile, match=r"model\.safetensors"):
        write_gguf(layout, tmp_path / "out.gguf")
    assert not (tmp_path / "out.gguf").exists()


def test_existing_file_is_not_touched(base: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    out.write_text("mine")
    with pytest.raises(OutputError):
        write_gguf(plan_gguf(merged(base)), out)
    assert out.read_text() == "mine"


_LIMITED = """
import resource, signal, sys
from pathlib import Path
from exporter.errors import OutputError
from exporter.formats.gguf import plan_gguf, write_gguf
from exporter.merge.plan import plan_merge
from exporter.sources.hf.checkpoint import Checkpoint
layout = plan_gguf(plan_merge(Checkpoint.open(Path(sys.argv[1])), []).model(), sys.argv[3])
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (layout.nbytes - 1000, layout.nbytes - 1000))
try:
    write_gguf(layout, Path(sys.argv[2]))
except OutputError as exc:
    print(exc)
    heavy = {"torch", "transformers", "onnxruntime", "onnx", "gguf"} & set(sys.modules)
    sys.exit(f"imported {heavy}" if heavy else 7)
"""


@pytest.mark.parametrize("ftype", ["BF16", "Q8_0"])
def test_full_device_is_reported_and_leaves_no_file(base: Path, tmp_path: Path, ftype: str) -> None:
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY
    out = tmp_path / "out.gguf"
    done = subprocess.run([sys.executable, "-c", _LIMITED, base, out, ftype], capture_output=True, text=True)
    assert done.returncode == 7, done.stderr
    assert done.stdout.startswith(str(out))
    assert not out.exists()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"max_position_embeddings": 1 << 40}, "max_position_embeddings: expected a positive 31-bit integer"),
        ({"rope_parameters": {"rope_type": "linear", "factor": "two"}}, "factor: expected a number"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": -8}}, "factor: expected a number above 0"),
        (
            {"rope_parameters": {"rope_type": "llama3", "low_freq_factor": 4.0}},
            "high_freq_factor: expected a value above",
        ),
    ],
    ids=["context", "linear", "llama3", "thresholds"],
)
def test_invalid_number_is_bad_input(base: Path, change: dict[str, object], reason: str) -> None:
    edit_config(base, **change)
    with pytest.raises(BadInput, match=reason):
        plan_gguf(merged(base))


@pytest.mark.parametrize(
    ("name", "data", "reason"),
    [
        ("generation_config.json", b'{"top_k": "many"}', "top_k: expected a number"),
        ("generation_config.json", b'{"top_k": 1e30}', "top_k: expected a number in the range of i32"),
        ("chat_template.jinja", b"\xff", "UTF-8"),
        ("tokenizer_config.json", b'{"chat_template": "\\ud800"}', "surrogate"),
        ("tokenizer_config.json", b"[]", "JSON object"),
    ],
)
def test_broken_auxiliary_file_is_bad_input(base: Path, name: str, data: bytes, reason: str) -> None:
    if name.startswith("chat"):
        (base / "tokenizer_config.json").write_bytes(b'{"bos_token": "<|im_start|>"}')
    (base / name).write_bytes(data)
    with pytest.raises(BadInput, match=reason):
        plan_gguf(merged(base))


@pytest.mark.parametrize(("head_dim", "factor"), [(64, 32.0), (128, 8.0)], ids=["llama-3.2-1b", "llama-3.1-8b"])
def test_llama3_factors_equal_torchs_to_the_bit(tmp_path: Path, write: Write, head_dim: int, factor: float) -> None:
    rope = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": factor, "low_freq_factor": 1.0}
    rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    table = config(head_dim=head_dim, rope_parameters=rope)
    file = GgufFile.open(write(checkpoint(tmp_path / "base", table, tokenizer_json(SMOLLM))))
    freqs = 1.0 / (500000.0 ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim))
    waves = 2 * math.pi / freqs
    smooth = (8192 / waves - 1.0) / (4.0 - 1.0)
    want = torch.where(waves > 8192, factor, 1 / ((1 - smooth) / factor + smooth))
    want = torch.where(waves < 8192 / 4, 1.0, want)
    assert file.dequantize_rows("rope_freqs.weight", 0, 1)[0].tolist() == want.tolist()
