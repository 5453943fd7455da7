"""Variants: their files, which tensors they quantise, and their distance from fp32."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from exporter.errors import BadInput, NotExpressible
from exporter.formats.onnx import choose, plan_onnx
from exporter.formats.onnx.weights.precision import PRECISIONS
from exporter.sources.onnx.file import OnnxFile
from exporter.verify.running.metrics import compare, pool
from exporter.verify.runtimes.onnx_runtime import Session
from fixtures.corpus import LINES
from tests.formats.onnx.clients.test_client_files import settings
from tests.formats.onnx.conftest import Change, Write, merged, random_ids
from tests.formats.onnx.test_graph import differing
from tests.formats.onnx.test_write import contents
from tests.support.trained import TRAINED_IDS

ALL = ("fp32", "fp16", "int8", "q4", "q4-sym", "q4f16", "q4f16-sym")
QUANTISED = ("int8", "q4", "q4-sym", "q4f16", "q4f16-sym")


def names(dtype: str | None, *quants: str) -> list[str]:
    return [precision.name for precision in choose(dtype, quants)]


@pytest.mark.parametrize(
    ("dtype", "quants", "want"),
    [
        (None, (), ["fp32"]),
        ("F32", (), ["fp32"]),
        ("F16", (), ["fp16"]),
        (None, ("int8",), ["int8"]),
        (None, ("int4",), ["q4"]),
        ("F16", ("int4",), ["q4f16"]),
        (None, ("int4-sym",), ["q4-sym"]),
        ("F16", ("int4-sym",), ["q4f16-sym"]),
        (None, ("int4", "int8"), ["int8", "q4"]),
        (None, ("int4-sym", "int4"), ["q4", "q4-sym"]),
        (None, reversed(ALL), list(ALL)),
    ],
)
def test_options_name_variants(dtype: str | None, quants: Sequence[str], want: list[str]) -> None:
    assert names(dtype, *quants) == want


@pytest.mark.parametrize(
    ("dtype", "quants", "reason"),
    [("BF16", (), "no BF16 kernel"), (None, ("int3",), "int3"), ("F16", ("int8",), "int8 weights combined with f16")],
)
def test_a_precision_that_no_client_runs_is_refused(dtype: str | None, quants: tuple[str, ...], reason: str) -> None:
    with pytest.raises(NotExpressible, match=reason):
        choose(dtype, quants)


def test_onnx_runtime_has_no_bfloat16_kernel_for_a_product() -> None:
    """The reason for the refusal: once this fails, bf16 can be written."""
    import onnxruntime
    from onnx import TensorProto, helper

    values = [helper.make_tensor_value_info(name, TensorProto.BFLOAT16, [2, 2]) for name in "abc"]
    graph = helper.make_graph([helper.make_node("MatMul", ["a", "b"], ["c"])], "g", values[:2], values[2:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11)
    with pytest.raises(Exception, match="NOT_IMPLEMENTED"):
        onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


def test_variants_share_one_folder_and_one_set_of_configs(write: Write, tiny_tied: Path) -> None:
    folder = write(tiny_tied, quants=ALL)
    stems = ["model", "model_fp16", "model_int8", "model_quantized", "model_q4", "model_sym_q4"]
    stems += ["model_q4f16", "model_sym_q4f16"]
    names = {path.name for path in (folder / "onnx").iterdir()}
    assert names == {f"{stem}{end}" for stem in stems for end in (".onnx", ".onnx_data")}
    table = settings(folder, "config.json")["transformers.js_config"]
    assert table["use_external_data_format"] == {f"{stem}.onnx": 1 for stem in stems}
    assert table["kv_cache_dtype"] == {"fp16": "float16", "q4f16": "float16"}
    assert settings(folder, "genai_config.json")["model"]["decoder"]["filename"] == "onnx/model.onnx"
    alone = write(tiny_tied, quants=("q4",))
    assert settings(alone, "genai_config.json")["model"]["decoder"]["filename"] == "onnx/model_q4.onnx"
    assert (alone / "onnx" / "model_q4.onnx").read_bytes() == (folder / "onnx" / "model_q4.onnx").read_bytes()


def test_both_names_of_int8_hold_the_same_weights(write: Write, tiny_tied: Path) -> None:
    folder = write(tiny_tied, quants=("int8",)) / "onnx"
    int8, quantized = (folder / f"model_{name}.onnx_data" for name in ("int8", "quantized"))
    assert int8.read_bytes() == quantized.read_bytes()
    for stem in ("model_int8", "model_quantized"):
        onnx.load(folder / f"{stem}.onnx")  # refuses data with several hard links
        tensors = OnnxFile.open(folder / f"{stem}.onnx").initialisers.values()
        places = {tensor.place.path.name for tensor in tensors if tensor.place}
        assert places == {f"{stem}.onnx_data"}


@pytest.mark.parametrize("quant", ["fp16", *QUANTISED])
def test_inputs_and_outputs_are_float32_except_the_cache(write: Write, tiny_tied: Path, quant: str) -> None:
    graph = onnx.load(next((write(tiny_tied, quants=(quant,)) / "onnx").glob("*.onnx")), load_external_data=False).graph
    cache = onnx.TensorProto.FLOAT16 if PRECISIONS[quant].floats == "F16" else onnx.TensorProto.FLOAT
    types = {value.name: value.type.tensor_type.elem_type for value in [*graph.input, *graph.output]}
    assert types.pop("logits") == onnx.TensorProto.FLOAT
    assert {types.pop(name) for name in ("input_ids", "attention_mask", "position_ids")} == {onnx.TensorProto.INT64}
    assert set(types.values()) == {cache}


def test_onnx_accepts_the_fp16_graph_and_infers_every_shape_strictly(write: Write, tiny_untied: Path) -> None:
    path = write(tiny_untied, dtype="F16") / "onnx" / "model_fp16.onnx"
    onnx.checker.check_model(str(path), full_check=True)


@pytest.mark.parametrize("quant", QUANTISED)
def test_tied_matrix_is_quantised_once_and_read_by_both_uses(write: Write, tiny_tied: Path, quant: str) -> None:
    file = OnnxFile.open(next((write(tiny_tied, quants=(quant,)) / "onnx").glob("*.onnx")))
    assert file.embedding == file.head == "embed_tokens.weight"
    graph = onnx.load(file.path, load_external_data=False).graph
    users = [node.op_type for node in graph.node if "embed_tokens.weight" in node.input]
    assert users == ["GatherBlockQuantized", "MatMulNBits"]
    assert file.initialisers["embed_tokens.weight"].shape == (512, 2, 32)


@pytest.mark.parametrize("quant", ["int8", "q4", "q4-sym"])
def test_only_codes_and_scales_of_the_trained_rows_change(
    write: Write, tiny_tied: Path, tiny_adapter: Path, quant: str
) -> None:
    before, after = (OnnxFile.open(write(tiny_tied, *more, quants=(quant,))) for more in ((), (tiny_adapter,)))
    changed = differing(before, after)
    assert changed.keys() == {"embed_tokens.weight", "embed_tokens.scales"}
    assert set.union(*changed.values()) == set(TRAINED_IDS)


@pytest.mark.parametrize(
    ("quant", "inside"),
    [
        ("q4", {"self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj"}),
        ("q4-sym", {"mlp.gate_proj", "mlp.up_proj"}),
    ],
)
def test_mixed_precision_keeps_the_ends_and_the_sensitive_matrices_in_8_bits(
    write: Write, tmp_path: Path, quant: str, inside: set[str]
) -> None:
    from fixtures import tiny

    base = tiny.build_llama(tmp_path / "deep", layers=8)
    graph = OnnxFile.open(write(base, quants=(quant,))).parse().graph
    bits = {
        node.name: next(attribute.i for attribute in node.attribute if attribute.name == "bits")
        for node in graph.node
        if node.op_type == "MatMulNBits"
    }
    four = {name for name, value in bits.items() if value == 4}
    assert four == {f"layers.{layer}.{name}" for layer in range(1, 7) for name in inside}
    assert set(bits.values()) == {4, 8}


def test_matrix_whose_rows_are_no_whole_blocks_stays_in_floats(write: Write, change: Change, tiny_tied: Path) -> None:
    """An inner width of 112: gate and up read 64 values a row, down 112."""
    from safetensors.torch import load_file

    stored = load_file(tiny_tied / "model.safetensors")
    mlp = {name: value for name, value in stored.items() if ".mlp." in name}
    mlp = {name: value[:, :112] if "down" in name else value[:112] for name, value in mlp.items()}
    base = change(tiny_tied, tensors={name: value.contiguous() for name, value in mlp.items()}, intermediate_size=112)
    file = OnnxFile.open(write(base, quants=("int8",)))
    assert "layers.0.mlp.up_proj.scales" in file.initialisers
    assert file.initialisers["layers.0.mlp.down_proj.weight"].shape == (112, 64)
    assert np.isfinite(full(file.path, [random_ids(9, 512)])[0]).all()


def test_value_beyond_float16_is_named(change: Change, write: Write, tiny_tied: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    base = change(tiny_tied, tensors={name: torch.full((128, 64), 1e5, dtype=torch.bfloat16)})
    with pytest.raises(BadInput, match=rf"model\.safetensors: {name}: .*65504"):
        write(base, dtype="F16")


def test_layout_knows_the_size_of_every_variant(write: Write, tiny_tied: Path) -> None:
    layout = plan_onnx(merged(tiny_tied), choose(None, ALL))
    folder = write(tiny_tied, quants=ALL) / "onnx"
    assert layout.nbytes == sum(path.stat().st_size for path in folder.glob("*.onnx_data"))


_RUN = """
import sys
from pathlib import Path
from exporter.formats.onnx import choose, plan_onnx, write_onnx
from exporter.formats.onnx.weights.precision import PRECISIONS
from exporter.merge.plan import plan_merge
from exporter.sources.hf.checkpoint import Checkpoint
model = plan_merge(Checkpoint.open(Path(sys.argv[1])), []).model("F32")
write_onnx(plan_onnx(model, choose(None, PRECISIONS.keys() - {"fp32"}), ops="ort"), Path(sys.argv[2]))
heavy = {"torch", "transformers", "onnxruntime"} & set(sys.modules)
sys.exit(f"imported {heavy}" if heavy else 0)
"""


def test_every_variant_is_the_same_bytes_from_run_to_run_and_imports_nothing_heavy(
    tiny_untied: Path, tmp_path: Path
) -> None:
    for seed in ("1", "2"):
        command = [sys.executable, "-c", _RUN, str(tiny_untied), str(tmp_path / seed)]
        subprocess.run(command, check=True, env={**os.environ, "PYTHONHASHSEED": seed})
    assert contents(tmp_path / "1") == contents(tmp_path / "2")


def full(path: Path, sequences: Sequence[Sequence[int]]) -> list[np.ndarray]:
    session = Session(path)
    out = []
    for ids in sequences:
        positions = np.arange(len(ids))[None]
        logits, _ = session.run(np.array([ids]), np.ones_like(positions), positions, session.empty_cache(1))
        out.append(logits[0])
    return out


#: Limits for a real model: mean KL from fp32. Measured: 1e-5, 6.4e-3, and for 4 bits up
#: to 0.084 with zero points, 0.066 without, which take 4 bits for less.
SMOLLM2_KL = {"fp16": 1e-4, "int8": 2e-2, "q4": 1e-1, "q4-sym": 1e-1, "q4f16": 1e-1, "q4f16-sym": 1e-1}


@pytest.mark.smollm2
@pytest.mark.parametrize("ops", ["standard", "ort"])
def test_smollm2_stays_close_to_fp32_in_every_variant(
    write: Write, smollm2: Path, ops: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    texts = [" ".join(LINES[start : start + 4]) for start in range(0, len(LINES), 4)]
    sequences = [list(tokenizer(text)["input_ids"])[:48] for text in texts]
    folder = write(smollm2, quants=ALL, ops=ops) / "onnx"
    want = full(folder / "model.onnx", sequences)
    for name, limit in SMOLLM2_KL.items():
        path = folder / f"{PRECISIONS[name].stems[0]}.onnx"
        metrics = pool([compare(*pair) for pair in zip(want, full(path, sequences), strict=True)])
        megabytes = path.with_suffix(".onnx_data").stat().st_size / 1e6
        with capsys.disabled():
            values = f"mean KL {metrics.kl:.2g}, {metrics.misses} other top-1 tokens"
            print(f"\nSmolLM2 {ops} {name}: {megabytes:.0f} MB, {values}")
        assert metrics.kl <= limit, name
