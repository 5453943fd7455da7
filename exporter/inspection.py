"""Describe an input model or adapter as plain data, with general facts and a list of tensors."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exporter.errors import reading
from exporter.sources.detect import detect
from exporter.sources.gguf.split_files import GgufModel
from exporter.sources.hf.checkpoint import Checkpoint
from exporter.sources.hf.safetensors import read_tensors
from exporter.sources.hub.locate import Located, is_adapter
from exporter.sources.onnx.folder import encoder_of, model_files
from exporter.sources.peft.adapter import Adapter
from exporter.sources.peft.edits import LowRank
from exporter.tensors import FLOATS, TensorSpec

if TYPE_CHECKING:
    from exporter.sources.onnx.file import OnnxFile


def inspect_path(located: Located) -> dict[str, Any]:
    """Describe an adapter, checkpoint, .gguf file or ONNX folder as a dict ``{"kind", "facts", "tensors"}``.

    Raises BadInput. For an ONNX folder, the dict also has the key "models", which lists every model file. For an ONNX
    folder, the keys "facts" and "tensors" describe the first model file.
    """
    path = located.path
    if is_adapter(path):
        return _document("adapter", located, *_adapter(path))
    path_format = detect(path)
    if path_format == "hf":
        return _document("checkpoint", located, *_checkpoint(path))
    if path_format == "gguf":
        return _document("gguf", located, *_gguf(path))
    return _document("onnx", located, *_onnx(path)) | {"models": _onnx_models(path)}


def _document(
    content: str, located: Located, facts: Mapping[str, Any], tensors: Iterable[Mapping[str, Any]]
) -> dict[str, Any]:
    hub = {"repo": located.repo, "revision": located.revision} if located.repo else {}
    return {
        "kind": content,
        "facts": {"path": str(located.path), "kind": content, **hub, **facts},
        "tensors": list(tensors),
    }


def _adapter(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    adapter = Adapter.open(path, via_peft=True)
    ids = sorted({token_id for edit in adapter.rows for token_id in edit.token_ids})
    updates = [edit for edit in adapter.edits if isinstance(edit, LowRank)]
    facts: dict[str, Any] = {"peft type": adapter.config["peft_type"], "base": adapter.base_name or "not named"}
    if ids:
        facts |= {"tokens": len(ids), "token ids": ids}
    if updates:
        facts["updates"] = len(updates)
        facts["ranks"] = sorted({update.rank for update in updates})
        facts["DoRA"] = any(update.magnitude for update in updates)
    facts["modules"] = sorted({edit.module for edit in adapter.edits})
    facts["tokenizer files"] = sorted(adapter.auxiliary_files)
    if adapter.notes:
        facts["notes"] = adapter.notes
    stored = read_tensors(adapter.weights)
    return facts, [_from_spec(tensor.spec) for tensor in stored.values()]


def _checkpoint(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    checkpoint = Checkpoint.open(path)
    tie, specs = checkpoint.tie, [tensor.spec for tensor in checkpoint.tensors.values()]
    head = "tied to the embedding" if tie.tied else tie.head
    if tie.tied and tie.head:
        head = f"{tie.head}, which is a copy of the embedding"
    facts = {
        "model type": checkpoint.config.get("model_type", "not named"),
        "parameters": sum(math.prod(spec.shape) for spec in specs),
        "bytes": sum(spec.nbytes for spec in specs),
        "shards": len({tensor.place.path for tensor in checkpoint.tensors.values()}),
        "quantised": checkpoint.quantisation.method if checkpoint.quantisation else "no",
        "embedding": tie.embedding,
        "head": head,
        "vocabulary": checkpoint.tensors[tie.embedding].spec.n_rows,
        "embedding sha256": checkpoint.embedding_digest,
        "auxiliary files": sorted(checkpoint.auxiliary_files),
    }
    return facts, [_from_spec(spec) for spec in specs]


def _gguf(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    model = GgufModel.open(path)
    facts: dict[str, Any] = {"version": model.files[0].version, "files": len(model.files)}
    for key, value in model.metadata.items():
        facts[key] = f"{value.count} items" if hasattr(value, "count") and not isinstance(value, str) else value
    if "token_embd.weight" in model.tensors:  # a LoRA or a projector has no embedding
        facts["head"] = "output.weight" if "output.weight" in model.tensors else "tied to token_embd.weight"
    return facts, [_tensor(tensor.name, tensor.type, tensor.shape, tensor.nbytes) for tensor in model.tensors.values()]


def _onnx(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    from exporter.sources.onnx.file import OnnxFile  # imported here: the import is slow, and only ONNX needs the module

    file = OnnxFile.open(path)
    facts = {
        "file": _below(path, file.path),
        "inputs": list(file.inputs),
        "outputs": list(file.outputs),
        "embedding": file.embedding,
        "head": "tied to the embedding" if file.head == file.embedding else file.head,
    }
    tensors = file.initialisers.items()
    return facts, [_tensor(name, tensor.dtype, tensor.shape, tensor.nbytes) for name, tensor in tensors]


def _onnx_models(path: Path) -> list[dict[str, Any]]:
    """Return a dict ``{"file", "precision", "nbytes"}`` for each ONNX model file.

    The value of "nbytes" includes the external data of the model file.
    """
    from exporter.sources.onnx.file import OnnxFile

    models = []
    for model_path in (file for model in model_files(path) for file in (encoder_of(model), model) if file):
        file = OnnxFile.open(model_path)
        data = {tensor.place.path for tensor in file.initialisers.values() if tensor.place}
        with reading(model_path):
            nbytes = sum(stored.stat().st_size for stored in {model_path, *data})
        models.append({"file": _below(path, model_path), "precision": _precision(file), "nbytes": nbytes})
    return models


def _precision(file: OnnxFile) -> str:
    """Return a text such as "int4 x 32, F16", which lists the block formats and the dtypes, the largest share first."""
    sizes = Counter[str]()
    for tensor in file.initialisers.values():
        if len(tensor.shape) > 1 and (not file.block_formats or tensor.dtype in FLOATS):  # codes are in block_formats
            sizes[tensor.dtype] += tensor.nbytes
    return ", ".join([*file.block_formats, *(dtype for dtype, _ in sizes.most_common())])


def _below(path: Path, file: Path) -> str:
    return file.name if file == path else file.relative_to(path).as_posix()


def _from_spec(spec: TensorSpec) -> dict[str, Any]:
    return _tensor(spec.name, spec.dtype, spec.shape, spec.nbytes)


def _tensor(name: str, dtype: str, shape: tuple[int, ...], nbytes: int) -> dict[str, Any]:
    return {"name": name, "type": dtype, "shape": list(shape), "nbytes": nbytes}
