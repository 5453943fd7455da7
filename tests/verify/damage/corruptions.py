"""Small faults in copies of sound artifacts, each known from practice."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import onnx

from exporter.sources.gguf.file import GgufFile
from exporter.sources.hf.checkpoint import Checkpoint
from exporter.sources.onnx.file import OnnxFile
from exporter.tensors import Array, cast
from fixtures.hostile import rawtensors


def poke(path: Path, offset_bytes: int, content: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset_bytes)
        file.write(content)


def copy(artifact: Path, out: Path) -> Path:
    target = out / artifact.name
    return Path(shutil.copytree(artifact, target) if artifact.is_dir() else shutil.copyfile(artifact, target))


def base_row(base: Path, token_id: int) -> Array:
    checkpoint = Checkpoint.open(base)
    return checkpoint.tensors[checkpoint.tie.embedding].rows(token_id, token_id + 1)


def gguf_row_to_base(path: Path, base: Path, token_id: int) -> None:
    tensor = GgufFile.open(path).tensors["token_embd.weight"]
    row = cast(base_row(base, token_id), tensor.type)
    poke(path, tensor.offset_bytes + token_id * tensor.row_nbytes, row.tobytes())


def gguf_flip(path: Path, name: str, at: int) -> None:
    """Flip the lowest bit of one byte of a tensor."""
    file = GgufFile.open(path)
    tensor = file.tensors[name]
    value = file.rows(name, 0, tensor.n_rows).reshape(-1)[at]
    poke(path, tensor.offset_bytes + at, bytes([int(value) ^ 1]))


def gguf_scale_f32(path: Path, name: str, factor: float) -> None:
    file = GgufFile.open(path)
    value = file.rows(name, 0, file.tensors[name].n_rows).view(np.float32) * np.float32(factor)
    poke(path, file.tensors[name].offset_bytes, value.tobytes())


def gguf_set_number(path: Path, key: str, value: float) -> None:
    """Overwrite a float32 metadata value in place: key, type number 6, value."""
    content = path.read_bytes()
    at = content.index(key.encode() + (6).to_bytes(4, "little")) + len(key) + 4
    poke(path, at, np.float32(value).tobytes())


def hf_row_to_base(folder: Path, base: Path, token_id: int) -> None:
    tensor = Checkpoint.open(folder).tensors["model.embed_tokens.weight"]
    place = tensor.place
    poke(place.path, place.offset_bytes + token_id * tensor.spec.row_nbytes, base_row(base, token_id).tobytes())


def hf_flip(folder: Path, name: str, at: int) -> None:
    place = Checkpoint.open(folder).tensors[name].place
    poke(place.path, place.offset_bytes + at, bytes([place.path.read_bytes()[place.offset_bytes + at] ^ 1]))


def hf_stale_head(folder: Path, base: Path) -> None:
    """Store a head beside the tied embedding, with the base's rows."""
    checkpoint = Checkpoint.open(base)
    spec = checkpoint.tensors["model.embed_tokens.weight"].spec
    value = checkpoint.tensors[spec.name].rows(0, spec.n_rows)
    rawtensors.replace(folder / "model.safetensors", {"lm_head.weight": (spec.dtype, spec.shape, value.tobytes())})


def hf_config(folder: Path, **values: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def onnx_row_to_base(folder: Path, base: Path, token_id: int) -> None:
    file = OnnxFile.open(folder)
    assert file.embedding
    tensor = file.initialisers[file.embedding]
    assert tensor.place
    row = cast(base_row(base, token_id), "F32")
    poke(tensor.place.path, tensor.place.offset_bytes + token_id * row.nbytes, row.tobytes())


def onnx_flip(path: Path, name: str, at: int) -> None:
    """Flip the highest bit of one byte of an initialiser of a model file."""
    place = OnnxFile.open(path).initialisers[name].place
    assert place
    content = place.path.read_bytes()[place.offset_bytes + at]
    poke(place.path, place.offset_bytes + at, bytes([content ^ 128]))


def onnx_shift_queries(path: Path) -> None:
    """Rotate every query by one more position if a single token is computed with a cache."""
    model = onnx.load(path, load_external_data=False)
    for node in model.graph.node:
        if node.op_type == "RotaryEmbedding" and node.name.endswith("q_rotated"):
            node.input[3] = "moved"
    shift = [
        onnx.helper.make_node("Shape", ["position_ids"], ["length"], start=1, end=2),
        onnx.helper.make_node("Equal", ["length", "one"], ["alone"]),
        onnx.helper.make_node("Cast", ["alone"], ["step"], to=onnx.TensorProto.INT64),
        onnx.helper.make_node("Add", ["position_ids", "step"], ["moved"]),
    ]
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([1]), "one"))
    nodes = [*shift, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    onnx.save(model, path)


def onnx_stale_head(folder: Path, base: Path) -> None:
    """Give the head its own initialiser with the base's rows, as an exporter that unties silently does."""
    file = OnnxFile.open(folder)
    assert file.embedding
    checkpoint = Checkpoint.open(base)
    spec = checkpoint.tensors["model.embed_tokens.weight"].spec
    stale = cast(checkpoint.tensors[spec.name].rows(0, spec.n_rows), "F32")
    model = onnx.load(file.path, load_external_data=False)
    model.graph.initializer.append(onnx.numpy_helper.from_array(stale, "stale_head"))
    readers = [node for node in model.graph.node if file.embedding in node.input and node.op_type != "Gather"]
    assert len(readers) == 1
    readers[0].input[list(readers[0].input).index(file.embedding)] = "stale_head"
    onnx.save(model, file.path)


def onnx_set_attribute(folder: Path, op_type: str, name: str, value: float) -> None:
    path = OnnxFile.open(folder).path
    model = onnx.load(path, load_external_data=False)
    nodes = [node for node in model.graph.node if node.op_type == op_type]
    assert nodes
    for node in nodes:
        attribute = next(entry for entry in node.attribute if entry.name == name)
        attribute.CopyFrom(onnx.helper.make_attribute(name, value))
    onnx.save(model, path)
