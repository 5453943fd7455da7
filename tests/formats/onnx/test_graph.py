"""The graph: valid by ONNX's checker, readable, portable, and each weight stored once."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from transformers import AutoConfig

from exporter.sources.hf.safetensors import read_tensors
from exporter.sources.onnx.file import OnnxFile
from exporter.tensors import cast, read
from tests.formats.onnx.conftest import Write
from tests.support.trained import TRAINED_IDS

CACHE = ["batch_size", 2, "past_sequence_length", 16]
PRESENT = ["batch_size", 2, "total_sequence_length", 16]


def shape(value: onnx.ValueInfoProto) -> list[str | int]:
    return [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]


def differing(first: OnnxFile, second: OnnxFile) -> dict[str, set[int]]:
    """Initialiser → rows that differ, for those that do."""
    out = {}
    for name, tensor in first.initialisers.items():
        count = tensor.shape[0] if tensor.shape else 1
        left, right = first.rows(name, 0, count), second.rows(name, 0, count)
        if rows := {row for row in range(count) if not np.array_equal(left[row : row + 1], right[row : row + 1])}:
            out[name] = rows
    return out


@pytest.mark.parametrize("name", ["tiny_tied", "tiny_untied"])
def test_onnx_accepts_graph_and_infers_every_shape_strictly(
    write: Write, request: pytest.FixtureRequest, name: str
) -> None:
    path = write(request.getfixturevalue(name)) / "onnx" / "model.onnx"
    onnx.checker.check_model(str(path), full_check=True)
    model = onnx.load(path, load_external_data=False)
    inferred = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)
    known = {value.name for value in [*inferred.graph.value_info, *inferred.graph.output]}
    assert {output for node in model.graph.node for output in node.output} <= known


def test_inputs_and_outputs_have_the_names_and_dims_that_clients_resolve(write: Write, tiny_tied: Path) -> None:
    graph = onnx.load(write(tiny_tied) / "onnx" / "model.onnx", load_external_data=False).graph
    assert {value.name: shape(value) for value in graph.input} == {
        "input_ids": ["batch_size", "sequence_length"],
        "attention_mask": ["batch_size", "total_sequence_length"],
        "position_ids": ["batch_size", "sequence_length"],
        **{f"past_key_values.{layer}.{part}": CACHE for layer in (0, 1) for part in ("key", "value")},
    }
    assert {value.name: shape(value) for value in graph.output} == {
        "logits": ["batch_size", "sequence_length", 512],
        **{f"present.{layer}.{part}": PRESENT for layer in (0, 1) for part in ("key", "value")},
    }
    assert graph.output[0].name == "logits"


def test_only_standard_operators_of_opset_23(write: Write, tiny_tied: Path) -> None:
    model = onnx.load(write(tiny_tied) / "onnx" / "model.onnx", load_external_data=False)
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 23)]
    assert model.ir_version == 11
    assert {node.domain for node in model.graph.node} == {""}


def test_fused_graph_uses_operators_of_onnx_runtime_where_they_are_faster(write: Write, tiny_tied: Path) -> None:
    model = onnx.load(write(tiny_tied, ops="ort") / "onnx" / "model.onnx", load_external_data=False)
    assert {(entry.domain, entry.version) for entry in model.opset_import} == {("", 23), ("com.microsoft", 1)}
    fused = [node.op_type for node in model.graph.node if node.domain]
    # Two layers: each residual sum is read by a norm.
    assert Counter(fused) == {"GroupQueryAttention": 2, "SkipSimplifiedLayerNormalization": 4, "FusedMatMul": 1}
    names = [node.name for node in model.graph.node]
    assert len(set(names)) == len(names)


def test_graph_is_what_optimum_loads_as_a_causal_language_model(write: Write, tiny_tied: Path) -> None:
    """ORTModelForCausalLM pairs past_key_values.N.key with present.N.key and takes the cache's shape from the config.

    Source: optimum-onnx, ORTModelForCausalLM, by reading its source; it cannot be installed beside transformers 5.
    """
    folder = write(tiny_tied)
    session = onnxruntime.InferenceSession(folder / "onnx" / "model.onnx", providers=["CPUExecutionProvider"])
    inputs = {value.name: value for value in session.get_inputs()}
    outputs = [value.name for value in session.get_outputs()]
    config = AutoConfig.from_pretrained(folder)
    past = [name for name in inputs if name.startswith("past_key_values")]
    assert past == [f"past_key_values.{n}.{part}" for n in range(config.num_hidden_layers) for part in ("key", "value")]
    assert outputs == ["logits", *(name.replace("past_key_values", "present") for name in past)]
    assert inputs.keys() - set(past) == {"input_ids", "attention_mask", "position_ids"}
    heads = config.num_key_value_heads
    assert all(inputs[name].shape[1::2] == [heads, config.head_dim] for name in past)
    assert {inputs[name].type for name in past} == {"tensor(float)"}


def test_nodes_and_values_carry_the_module_path(write: Write, tiny_tied: Path) -> None:
    graph = onnx.load(write(tiny_tied) / "onnx" / "model.onnx", load_external_data=False).graph
    nodes = [node.name for node in graph.node]
    assert len(set(nodes)) == len(nodes)
    by_name = {node.name: node for node in graph.node}
    assert by_name["layers.1.self_attn.q_proj"].op_type == "MatMul"
    assert list(by_name["layers.1.self_attn.q_proj"].output) == ["layers.1.self_attn.q_proj"]
    assert "layers.1.self_attn.q_proj.weight" in by_name["layers.1.self_attn.q_proj"].input
    roots = {name.split(".")[0] for name in nodes}
    assert roots == {"mask", "embed_tokens", "layers", "norm", "lm_head"}


@pytest.mark.parametrize(("ops", "product"), [("standard", "Gemm"), ("ort", "FusedMatMul")])
def test_tied_weight_is_one_initialiser_stored_once(write: Write, tiny_tied: Path, ops: str, product: str) -> None:
    folder = write(tiny_tied, ops=ops)
    file = OnnxFile.open(folder)
    assert file.embedding == file.head == "embed_tokens.weight"
    users = [
        node.op_type
        for node in onnx.load(file.path, load_external_data=False).graph.node
        if "embed_tokens.weight" in node.input
    ]
    assert users == ["Gather", product]
    row = file.rows("embed_tokens.weight", 300, 301).tobytes()
    assert (folder / "onnx" / "model.onnx_data").read_bytes().count(row) == 1


def test_untied_head_is_a_separate_initialiser(write: Write, tiny_untied: Path) -> None:
    file = OnnxFile.open(write(tiny_untied))
    assert (file.embedding, file.head) == ("embed_tokens.weight", "lm_head.weight")
    stored = read_tensors(tiny_untied / "model.safetensors")
    for name, source in (("embed_tokens.weight", "model.embed_tokens.weight"), ("lm_head.weight", "lm_head.weight")):
        assert np.array_equal(file.rows(name, 0, 512), cast(read(stored[source]), "F32"))


def test_every_stored_value_is_that_of_the_checkpoint(write: Write, tiny_sharded: Path) -> None:
    file = OnnxFile.open(write(tiny_sharded))
    stored = {
        name.removeprefix("model."): cast(read(tensor), "F32")
        for shard in sorted(tiny_sharded.glob("*.safetensors"))
        for name, tensor in read_tensors(shard).items()
    }
    for name, want in stored.items():
        value = file.rows(name, 0, file.initialisers[name].shape[0])
        assert np.array_equal(value.T if name.endswith("_proj.weight") else value, want), name
    external = {name for name, tensor in file.initialisers.items() if tensor.place}
    assert external == stored.keys() | {"rotary_emb.cos_cache", "rotary_emb.sin_cache"}


def test_only_the_trained_rows_change(write: Write, tiny_tied: Path, tiny_adapter: Path) -> None:
    before, after = OnnxFile.open(write(tiny_tied)), OnnxFile.open(write(tiny_tied, tiny_adapter))
    assert differing(before, after) == {"embed_tokens.weight": set(TRAINED_IDS)}


def test_new_tokens_add_rows(write: Write, tiny_tied: Path, tiny_new_tokens_adapter: Path) -> None:
    file = OnnxFile.open(write(tiny_tied, tiny_new_tokens_adapter))
    assert file.initialisers["embed_tokens.weight"].shape == (515, 64)


def test_data_file_has_neither_overlaps_nor_unexplained_bytes(write: Write, tiny_untied: Path) -> None:
    file = OnnxFile.open(write(tiny_untied))
    places = sorted((tensor.place.offset_bytes, tensor.nbytes) for tensor in file.initialisers.values() if tensor.place)
    data = (file.path.parent / "model.onnx_data").read_bytes()
    end = 0
    for offset, nbytes in places:
        assert offset >= end
        assert offset % (4096 if nbytes >= 65536 else 64) == 0
        assert not any(data[end:offset])
        end = offset + nbytes
    assert end == len(data)


def test_provenance_is_in_the_metadata(write: Write, tiny_tied: Path) -> None:
    file = OnnxFile.open(write(tiny_tied))
    assert len(file.metadata["ttexport.base.embedding_sha256"]) == 64
