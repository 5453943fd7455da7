"""ONNX Runtime computes with codes by their definition: (code - zero point) * scale."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import GraphProto, ModelProto, NodeProto, helper, numpy_helper

from exporter.sources.onnx.file import OnnxFile
from exporter.tensors import Array
from fixtures.models import families
from tests.formats.onnx.conftest import Write, random_ids
from tests.formats.onnx.test_logits import worst
from tests.formats.onnx.weights.test_precision import full

#: A single token runs another kernel.
SEQUENCES = [random_ids(40, 512, 0), random_ids(7, 512, 1), [5]]
#: Sums of float32 in another order. Measured over all cases: 3e-6 for the single token, 0 for the others.
MAX_ABS = 2e-5
BLOCK = 32


def graphs(graph: GraphProto) -> Iterator[GraphProto]:
    """The graph and its nested graphs: a loop runs the experts."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from graphs(attribute.g)


def number(node: NodeProto, key: str) -> int:
    value: int = next(attribute.i for attribute in node.attribute if attribute.name == key)
    return value


def unpacked(codes: Array, bits: int) -> Array:
    """(…, bytes) → (…, numbers): of two 4-bit codes in a byte the first is the lower half."""
    if bits == 8:
        return codes.astype(np.float64)
    return np.stack([codes & 15, codes >> 4], axis=-1).reshape(*codes.shape[:-1], -1).astype(np.float64)


def by_hand(stored: dict[str, Array], module: str, bits: int, middle: int) -> Array:
    """The dequantised values of ``module``, in the codes' shape. middle: the zero point if none are stored."""
    codes, scales = stored[f"{module}.weight"], stored[f"{module}.scales"]
    numbers = unpacked(codes, bits)
    zeros: Array | int = middle
    if f"{module}.zero_points" in stored:
        zeros = unpacked(stored[f"{module}.zero_points"], bits)[:, : scales.shape[1], None]
    blocks = (numbers.reshape(len(codes), -1, BLOCK) - zeros) * scales[:, :, None]
    values: Array = blocks.reshape(numbers.shape).astype(np.float32)
    return values


def in_floats(path: Path, out: Path, *, off_by: int = 0) -> Path:
    """The model of ``path`` with its codes dequantised here. off_by: added to the middle of symmetric codes."""
    model: ModelProto = onnx.load(path)
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    nodes = [node for graph in graphs(model.graph) for node in graph.node if node.domain == "com.microsoft"]
    for node in nodes:
        if node.op_type not in ("MatMulNBits", "GatherBlockQuantized"):
            continue
        at = node.op_type == "MatMulNBits"
        bits, module = number(node, "bits"), node.input[at].removesuffix(".weight")
        value = by_hand(stored, module, bits, (1 << (bits - 1)) + off_by)
        value = value.reshape(len(value), -1).T if at else value
        name = f"{node.name}.by_hand"
        model.graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(value), name))
        inputs = [node.input[0], name] if at else [name, node.input[1]]
        node.CopyFrom(helper.make_node("MatMul" if at else "Gather", inputs, node.output, node.name))
    onnx.save(model, out)
    return out


def without_rounding(path: Path) -> Path:
    """The model with float32 activations, which it would otherwise round to 8 bits."""
    model = onnx.load(path, load_external_data=False)
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "accuracy_level":
                attribute.i = 1
    out = path.with_name("unrounded.onnx")
    onnx.save(model, out)
    return out


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return families.build("mixtral", tmp_path_factory.mktemp("experts") / "base", dtype="float32")


@pytest.mark.parametrize("ops", ["standard", "ort"])
@pytest.mark.parametrize("quant", ["int8", "q4", "q4-sym"])
@pytest.mark.parametrize("base", ["tiny_tied", "tiny_untied", "mixtral"])
def test_a_model_computes_with_its_dequantised_values(
    write: Write, request: pytest.FixtureRequest, tmp_path: Path, base: str, quant: str, ops: str
) -> None:
    path = OnnxFile.open(write(request.getfixturevalue(base), quants=(quant,), ops=ops)).path
    want = full(in_floats(path, tmp_path / "model.onnx"), SEQUENCES)
    assert worst(full(without_rounding(path), SEQUENCES), want) <= MAX_ABS


def test_another_zero_point_would_be_noticed(write: Write, tiny_tied: Path, tmp_path: Path) -> None:
    path = OnnxFile.open(write(tiny_tied, quants=("q4-sym",))).path
    want = full(in_floats(path, tmp_path / "model.onnx", off_by=1), SEQUENCES)
    assert worst(full(without_rounding(path), SEQUENCES), want) > 100 * MAX_ABS


@pytest.mark.parametrize("ops", ["standard", "ort"])
def test_symmetric_codes_have_no_zero_points(write: Write, tiny_tied: Path, ops: str) -> None:
    file = OnnxFile.open(write(tiny_tied, quants=("q4-sym",), ops=ops))
    assert file.path.name == "model_sym_q4.onnx"
    products = [node for node in file.parse().graph.node if node.op_type == "MatMulNBits"]
    assert {number(node, "bits") for node in products} == {4, 8}
    assert {len(node.input) for node in products} == {3}
    assert not any("zero_points" in name for name in file.initialisers)
