"""Our export rewritten as by other tools: other names, an untied head, weights in other places.

Quantised by onnxruntime's tools, like the folders of ``onnx-community``.
"""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path

import numpy as np
import onnx
from onnx import ModelProto, helper, numpy_helper
from onnx.external_data_helper import set_external_data

EMBEDDING = "model.embed_tokens.weight"
HEAD = "onnx::MatMul_1234"


def rewritten(source: Path, out: Path, *, inside: bool = False, quant: str | None = None) -> Path:
    """A copy of an exported folder, of a tied model in fp32, with a ``model.onnx`` as another tool might write it.

    The head becomes a MatMul on a transposed copy of the embedding. inside: weights in the model file; else in two
    data files, at odd offsets. quant: "q4" or "q8", by onnxruntime.
    """
    shutil.copytree(source, out, ignore=shutil.ignore_patterns("*.onnx*"))
    model = onnx.load(source / "onnx" / "model.onnx")
    del model.metadata_props[:]
    _untie_head(model)
    if quant:
        model = _quantised(model, quant, out)
    path = out / "onnx" / "model.onnx"
    if not inside:
        for number in range(2):  # an odd tensor at the start of each file, so that nothing after it is aligned
            odd = numpy_helper.from_array(np.arange(100, dtype=np.int8), f"odd.{number}")
            model.graph.initializer.insert(number, odd)
        for number, tensor in enumerate(model.graph.initializer):
            if len(tensor.raw_data) > 64:
                set_external_data(tensor, "model.onnx_data" + ("_1" if number % 3 == 0 else ""))
    onnx.save(model, path)
    return out


def _untie_head(model: ModelProto) -> None:
    graph = model.graph
    by_name = {tensor.name: tensor for tensor in graph.initializer}
    tied = by_name["embed_tokens.weight"]
    head = numpy_helper.from_array(np.ascontiguousarray(numpy_helper.to_array(tied).T), HEAD)
    makers = {output: node for node in graph.node for output in node.output}
    joined = makers["logits"]
    product = makers[joined.input[0]]
    hidden = makers[product.input[0]].input[0]
    removed = {
        "lm_head.rows",
        "lm_head",
        "lm_head.lengths",
        "lm_head.shape",
        "lm_head.joined",
        product.name,
        joined.name,
    }
    kept = [node for node in graph.node if node.name not in removed]
    kept.append(helper.make_node("MatMul", [hidden, HEAD], ["logits"], "/lm_head/MatMul"))
    for node in kept:
        for number, name in enumerate(node.input):
            if name == tied.name:
                node.input[number] = EMBEDDING
    tied.name = EMBEDDING
    used = {name for node in kept for name in node.input}
    tensors = [tensor for tensor in graph.initializer if tensor.name in used]
    del graph.node[:], graph.value_info[:], graph.initializer[:]
    graph.node.extend(kept)
    graph.initializer.extend([*tensors, head])


def _quantised(model: ModelProto, quant: str, out: Path) -> ModelProto:
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    if quant == "q4":
        quantiser = MatMulNBitsQuantizer(model, block_size=32, is_symmetric=False)
        quantiser.process()
        quantised: ModelProto = quantiser.model.model
        return quantised
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        onnx.save(model, out / "fp32.onnx")
        quantize_dynamic(
            out / "fp32.onnx", out / "q8.onnx", weight_type=QuantType.QUInt8, op_types_to_quantize=["MatMul", "Gather"]
        )
    quantised = onnx.load(out / "q8.onnx")
    for name in ("fp32.onnx", "q8.onnx"):
        (out / name).unlink()
    return quantised
