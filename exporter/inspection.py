"""What a path holds, as plain data: facts and tensors. Headers only, no weights but an adapter's own rows."""

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
from exporter.tensors import FLOATS

if TYPE_CHECKING:
    from exporter.sources.onnx.file import OnnxFile


def inspect_path(located: Located) -> dict[str, Any]:
    """``{"kind", "facts", "tensors"}`` of an adapter, checkpoint, .gguf file or ONNX folder. Raises BadInput.

    Of ONNX also "models", every model file in the order of ``model_files``; facts and tensors are those of the first.
    """
    path = located.path
    if is_adapter(path):
        return _document("adapter", located, *_adapter(path))
    reader = {"hf": _checkpoint, "gguf": _gguf}
    kind = detect(path)
    if kind == "onnx":
        return _document(kind, located, *_onnx(path)) | {"models": _onnx_models(path)}
    return _document({"hf": "checkpoint"}.get(kind, kind), located, *reader[kind](path))


def _document(
    kind: str, located: Located, facts: Mapping[str, Any], tensors: Iterable[Mapping[str, Any]]
) -> dict[str, Any]:
    hub = {"repo": located.repo, "revision": located.revision} if located.repo else {}
    return {"kind": kind, "facts": {"path": str(located.path), "kind": kind, **hub, **facts}, "tensors": list(tensors)}


def _adapter(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    adapter = Adapter.open(path)
    ids = sorted({token_id for edit in adapter.rows for token_id in edit.token_ids})
    updates = [edit for edit in adapter.edits if isinstance(edit, LowRank)]
    facts: dict[str, Any] = {"peft type": adapter.config["peft_type"], "base": adapter.base_name or "not named"}
    if ids:
        facts |= {"tokens": len(ids), "token ids": ids}
    if updates:
        facts["updates"] = len(updates)
        facts["ranks"] = sorted({edit.rank for edit in updates})
        facts["DoRA"] = any(edit.magnitude for edit in updates)
    facts["modules"] = sorted({edit.module for edit in adapter.edits})
    facts["tokenizer files"] = sorted(adapter.auxiliary_files)
    stored = read_tensors(adapter.weights)
    tensors = [_tensor(one.spec.name, one.spec.dtype, one.spec.shape, one.spec.nbytes) for one in stored.values()]
    return facts, tensors


def _checkpoint(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    checkpoint = Checkpoint.open(path)
    tie, specs = checkpoint.tie, [tensor.spec for tensor in checkpoint.tensors.values()]
    head = "tied to the embedding" if tie.tied else tie.head
    if tie.tied and tie.head:
        head = f"{tie.head}, a stored copy of the embedding"
    facts = {
        "model type": checkpoint.config.get("model_type", "not named"),
        "parameters": sum(math.prod(spec.shape) for spec in specs),
        "bytes": sum(spec.nbytes for spec in specs),
        "shards": len({tensor.place.path for tensor in checkpoint.tensors.values()}),
        "embedding": tie.embedding,
        "head": head,
        "vocabulary": checkpoint.tensors[tie.embedding].spec.n_rows,
        "embedding sha256": checkpoint.embedding_digest,
        "side files": sorted(checkpoint.auxiliary_files),
    }
    return facts, [_tensor(spec.name, spec.dtype, spec.shape, spec.nbytes) for spec in specs]


def _gguf(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    file = GgufModel.open(path)
    facts: dict[str, Any] = {"version": file.files[0].version, "files": len(file.files)}
    for key, value in file.metadata.items():
        facts[key] = f"{value.count} items" if hasattr(value, "count") and not isinstance(value, str) else value
    if "token_embd.weight" in file.tensors:  # a LoRA or a projector has none
        facts["head"] = "output.weight" if "output.weight" in file.tensors else "tied to token_embd.weight"
    tensors = [_tensor(one.name, one.type, one.shape, one.nbytes) for one in file.tensors.values()]
    return facts, tensors


def _onnx(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    from exporter.sources.onnx.file import OnnxFile  # parses protobuf: only ONNX waits for it

    file = OnnxFile.open(path)
    facts = {
        "file": _below(path, file.path),
        "inputs": list(file.inputs),
        "outputs": list(file.outputs),
        "embedding": file.embedding,
        "head": "tied to the embedding" if file.head == file.embedding else file.head,
    }
    tensors = [_tensor(name, one.dtype, one.shape, one.nbytes) for name, one in file.initialisers.items()]
    return facts, tensors


def _onnx_models(path: Path) -> list[dict[str, Any]]:
    """``{"file", "precision", "nbytes"}`` of each model file; nbytes: with its external data."""
    from exporter.sources.onnx.file import OnnxFile

    models = []
    for part in (one for model in model_files(path) for one in (encoder_of(model), model) if one):
        file = OnnxFile.open(part)
        held = {part, *(one.place.path for one in file.initialisers.values() if one.place)}
        with reading(part):
            nbytes = sum(one.stat().st_size for one in held)
        models.append({"file": _below(path, part), "precision": _precision(file), "nbytes": nbytes})
    return models


def _precision(file: OnnxFile) -> str:
    """How matrices are stored, told by the graph: "int4 x 32, int8 x 32, F16"; dtypes with the most bytes first."""
    sizes = Counter[str]()
    for one in file.initialisers.values():
        if len(one.shape) > 1 and (not file.block_formats or one.dtype in FLOATS):  # codes are told as blocks
            sizes[one.dtype] += one.nbytes
    return ", ".join([*file.block_formats, *(dtype for dtype, _ in sizes.most_common())])


def _below(path: Path, file: Path) -> str:
    return file.name if file == path else file.relative_to(path).as_posix()


def _tensor(name: str, kind: str, shape: tuple[int, ...], nbytes: int) -> dict[str, Any]:
    return {"name": name, "type": kind, "shape": list(shape), "nbytes": nbytes}
