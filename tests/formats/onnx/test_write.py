"""Planning and writing: the ledger, refusals, failures that leave nothing, and the same bytes every time."""

from __future__ import annotations

import os
import resource
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from exporter.errors import BadInput, LedgerError, NotExpressible, OutputError, TensorMismatch, UnreadableFile
from exporter.formats.onnx import plan_onnx, write_onnx
from exporter.sources.onnx.file import OnnxFile
from tests.formats.onnx.conftest import Change, Write, merged

EMBEDDING = "model.embed_tokens.weight"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_folder_holds_exactly_these_files(write: Write, tiny_tied: Path) -> None:
    assert contents(write(tiny_tied)).keys() == {
        "onnx/model.onnx",
        "onnx/model.onnx_data",
        "config.json",
        "generation_config.json",
        "genai_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    }


def test_layout_knows_the_size_before_anything_is_written(tiny_untied: Path, tmp_path: Path) -> None:
    layout = plan_onnx(merged(tiny_untied))
    seen: list[int] = []
    write_onnx(layout, tmp_path / "out", seen.append)
    assert (tmp_path / "out" / "onnx" / "model.onnx_data").stat().st_size == layout.nbytes == sum(seen)


_RUN = """
import sys
from pathlib import Path
from exporter.formats.onnx import plan_onnx, write_onnx
from exporter.merge.plan import plan_merge
from exporter.sources.peft.adapter import Adapter
from exporter.sources.hf.checkpoint import Checkpoint
merge = plan_merge(Checkpoint.open(Path(sys.argv[1])), [Adapter.open(Path(sys.argv[2]))])
write_onnx(plan_onnx(merge.model("F32")), Path(sys.argv[3]))
heavy = {"torch", "transformers", "onnxruntime"} & set(sys.modules)
sys.exit(f"imported {heavy}" if heavy else 0)
"""


def test_processes_with_other_hash_seeds_write_the_same_bytes_and_import_nothing_heavy(
    tiny_tied: Path, tiny_adapter: Path, tmp_path: Path
) -> None:
    for seed in ("1", "2"):
        command = [sys.executable, "-c", _RUN, str(tiny_tied), str(tiny_adapter), str(tmp_path / seed)]
        subprocess.run(command, check=True, env={**os.environ, "PYTHONHASHSEED": seed})
    assert contents(tmp_path / "1") == contents(tmp_path / "2")


def test_modes_follow_the_umask(tiny_tied: Path, tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_onnx(plan_onnx(merged(tiny_tied)), tmp_path / "out")
    finally:
        os.umask(before)
    modes = {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert modes == {0o640}


def test_empty_folder_is_filled_and_a_filled_one_is_left_alone(tiny_tied: Path, tmp_path: Path) -> None:
    layout = plan_onnx(merged(tiny_tied))
    (tmp_path / "empty").mkdir()
    write_onnx(layout, tmp_path / "empty")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes").write_text("mine")
    with pytest.raises(OutputError, match="found files in the folder"):
        write_onnx(layout, tmp_path / "full")
    assert contents(tmp_path / "full") == {"notes": b"mine"}


_LIMITED = """
import resource, signal, sys
from pathlib import Path
from exporter.errors import OutputError
from exporter.formats.onnx import plan_onnx, write_onnx
from exporter.merge.plan import plan_merge
from exporter.sources.hf.checkpoint import Checkpoint
layout = plan_onnx(plan_merge(Checkpoint.open(Path(sys.argv[1])), []).model("F32"))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (layout.nbytes - 1000, layout.nbytes - 1000))
try:
    write_onnx(layout, Path(sys.argv[2]))
except OutputError as exc:
    print(exc)
    sys.exit(exc.exit_code)
"""


@pytest.mark.parametrize("made_before", [False, True])
def test_full_device_is_reported_and_leaves_nothing(tiny_tied: Path, tmp_path: Path, made_before: bool) -> None:
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY
    out = tmp_path / "out"
    if made_before:
        out.mkdir()
    done = subprocess.run([sys.executable, "-c", _LIMITED, tiny_tied, out], capture_output=True, text=True)
    assert done.returncode == 7, done.stderr
    assert done.stdout.startswith(str(out))
    assert out.exists() == made_before
    assert not contents(out)


def test_checkpoint_that_shrinks_after_planning_leaves_nothing(tiny_tied: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(tiny_tied, tmp_path / "base"))
    layout = plan_onnx(merged(base))
    os.truncate(base / "model.safetensors", 20_000)
    with pytest.raises(UnreadableFile, match=r"model\.safetensors"):
        write_onnx(layout, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_unknown_tensor_stops_the_plan(change: Change, tiny_tied: Path) -> None:
    base = change(tiny_tied, tensors={"model.layers.0.mystery.weight": torch.zeros(4)})
    with pytest.raises(LedgerError, match=r"model\.layers\.0\.mystery\.weight"):
        plan_onnx(merged(base))


def test_stored_copy_of_a_tied_head_is_recorded_and_not_written(write: Write, change: Change, tiny_tied: Path) -> None:
    from safetensors.torch import load_file

    embedding = load_file(tiny_tied / "model.safetensors")[EMBEDDING]
    base = change(tiny_tied, tensors={"lm_head.weight": embedding.clone()})
    assert plan_onnx(merged(base)).dropped == {
        "lm_head.weight": "omitted, because the LM head is tied to the embedding"
    }
    file = OnnxFile.open(write(base))
    assert file.head == "embed_tokens.weight"
    assert "lm_head.weight" not in file.initialisers


def test_rotary_buffers_of_old_checkpoints_are_recorded_and_not_written(change: Change, tiny_tied: Path) -> None:
    name = "model.layers.1.self_attn.rotary_emb.inv_freq"
    base = change(tiny_tied, tensors={name: torch.ones(8)})
    assert plan_onnx(merged(base)).dropped == {name: "omitted, because every runtime computes this buffer itself"}


def test_missing_weight_is_named(change: Change, tiny_tied: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    with pytest.raises(TensorMismatch, match=name) as caught:
        plan_onnx(merged(change(tiny_tied, drop=(name,))))
    assert caught.value.found == "no tensor"


def test_weight_that_disagrees_with_the_config_is_named(change: Change, tiny_tied: Path) -> None:
    with pytest.raises(TensorMismatch, match=r"down_proj\.weight: expected shape \(64, 96\).*found \(64, 128\)"):
        plan_onnx(merged(change(tiny_tied, intermediate_size=96)))


def test_weights_that_are_not_float32_are_refused(tiny_tied: Path) -> None:
    with pytest.raises(NotExpressible, match="BF16"):
        plan_onnx(merged(tiny_tied, dtype=None))


def test_unknown_family_is_refused(change: Change, tiny_tied: Path) -> None:
    with pytest.raises(NotExpressible, match="model_type 'nosuch'"):
        plan_onnx(merged(change(tiny_tied, model_type="nosuch")))


@pytest.mark.parametrize(
    ("rope", "reason"),
    [
        ({"rope_type": "linear"}, "factor"),
        ({"rope_type": "llama3", "factor": 8.0, "high_freq_factor": 4.0}, "low_freq_factor"),
        (
            {"rope_type": "llama3", "factor": 8.0, "high_freq_factor": 1.0, "low_freq_factor": 1.0},
            "expected a value above",
        ),
    ],
)
def test_invalid_rope_table_is_refused(change: Change, tiny_tied: Path, rope: dict[str, object], reason: str) -> None:
    with pytest.raises(BadInput, match=reason):
        plan_onnx(merged(change(tiny_tied, rope_parameters={"rope_theta": 10000.0, **rope})))
