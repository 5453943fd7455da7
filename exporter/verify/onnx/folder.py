"""Check the config files in an ONNX folder, and the graph inputs and outputs of the models in the folder.

The checked config files are config.json, including the section transformers.js_config, and genai_config.json.
Applications that run ONNX models rely on the config files and on the names of graph inputs and outputs. A comparison of
logits does not detect errors in config files, because the verification runs the models without reading the config
files.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx

from exporter.io.json_objects import read_object
from exporter.sources.hf.checkpoint import auxiliary_files
from exporter.verify.expect.reference import Reference
from exporter.verify.folder.auxiliary_files import check_auxiliary_files
from exporter.verify.folder.configs import BROWSER, check_config
from exporter.verify.folder.special_ids import check_special_ids
from exporter.verify.gguf.hyperparameters import hyperparameters
from exporter.verify.report import Check, Skip
from exporter.verify.stored.artifact import Artifact

_GENAI: Final = "genai_config.json"
#: transformers.js derives the size of an axis from its name.
_AXES: Final = {
    "input_ids": ("batch_size", "sequence_length"),
    "attention_mask": ("batch_size", "total_sequence_length"),
    "position_ids": ("batch_size", "sequence_length"),
    "logits": ("batch_size", "sequence_length", None),
    "past_key_values": ("batch_size", None, "past_sequence_length", None),
    "present": ("batch_size", None, "total_sequence_length", None),
}
#: Key of genai_config.json → hyperparameter.
_DECODER: Final = {
    "hidden_size": "embedding_length",
    "num_attention_heads": "attention.head_count",
    "num_hidden_layers": "block_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_size": "attention.key_length",
}

_EPSILONS: Final = ("attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon")
_ATTENTION: Final = frozenset({"Attention", "GroupQueryAttention"})
#: Attribute of an attention node → hyperparameter.
_ATTRIBUTES: Final = {
    "q_num_heads": "attention.head_count",
    "num_heads": "attention.head_count",
    "kv_num_heads": "attention.head_count_kv",
}


def check_folder(folder: Path, models: Sequence[Artifact], reference: Reference) -> Iterator[Check | Skip]:
    """Check the config files and auxiliary files that all models in an ONNX folder share.

    If the artifact is a single model file in a folder without a config, the checks of config files and auxiliary files
    are skipped.
    """
    paths = [model.path for model in models]
    if not folder.is_dir() or not any((folder / name).is_file() for name in ("config.json", _GENAI)):
        if any(path.parent.name == "onnx" for path in paths) and folder.is_dir():
            yield Check(
                name="config",
                passed=False,
                detail="config.json: expected this file next to the folder onnx/, found no such file",
            )
            return
        yield Skip("configs", "the folder of the model file contains no config.json")
        return
    if (folder / "config.json").is_file():
        config = read_object(folder / "config.json")
        yield check_config(config, reference)
        yield check_special_ids(config, auxiliary_files(folder), reference)
        if all(path.parent.name == "onnx" for path in paths):
            yield _check_browser(config, sorted((folder / "onnx").glob("*.onnx")))
    elif any(path.parent.name == "onnx" for path in paths):
        yield Check(
            name="config",
            passed=False,
            detail="config.json: expected this file next to the folder onnx/, found no such file",
        )
    else:
        yield Skip(
            "config", "the folder is for onnxruntime-genai and contains genai_config.json instead of config.json"
        )
    yield from check_auxiliary_files(folder, reference)
    if (folder / _GENAI).is_file():
        yield _check_genai(folder, read_object(folder / _GENAI), reference)
    else:
        yield Skip("genai config", f"onnxruntime-genai cannot open the folder, because {_GENAI} is missing")


def _check_browser(config: Mapping[str, Any], paths: Sequence[Path]) -> Check:
    """Check that config.json lists the model files with external data, as transformers.js in a browser requires."""
    table = config.get(BROWSER)
    listed = table.get("use_external_data_format") if isinstance(table, Mapping) else None
    wanted = {path.name: 1 for path in paths if path.with_name(f"{path.name}_data").exists()}
    passed = listed == wanted
    detail = f"{BROWSER}: use_external_data_format: expected {wanted}, found {listed!r:.80}"
    return Check(
        name="browser config",
        passed=passed,
        detail="config.json lists all model files with external data" if passed else detail,
    )


def _check_genai(folder: Path, content: Mapping[str, Any], reference: Reference) -> Check:
    model = content.get("model")
    model = model if isinstance(model, Mapping) else {}
    decoder = model.get("decoder")
    decoder = decoder if isinstance(decoder, Mapping) else {}
    config = reference.checkpoint.text_config
    numbers = hyperparameters(config)
    wanted = {f"decoder.{key}": (decoder.get(key), numbers.get(name)) for key, name in _DECODER.items()}
    wanted["vocab_size"] = (model.get("vocab_size"), reference.vocab)
    wanted["context_length"] = (model.get("context_length"), reference.max_positions)
    wrong = [
        f"{key}: expected {want}, found {value!r:.60}"
        for key, (value, want) in wanted.items()
        if want is not None and value != want
    ]
    wrong += _wrong_ids(folder, model)
    name = decoder.get("filename")
    path = folder / name if isinstance(name, str) else None
    if path is None or not path.is_file():
        wrong.append(f"decoder.filename: expected the name of a file in the folder, found {name!r:.60}")
    else:
        wrong += _wrong_graph(path, decoder, content.get("search"))
    detail = f"{_GENAI}: {wrong[0]}" if wrong else f"{_GENAI} matches the base model's config and the graph"
    return Check(name="genai config", passed=not wrong, value=float(len(wrong)), limit=0.0, detail=detail)


def _wrong_ids(folder: Path, model: Mapping[str, Any]) -> Iterator[str]:
    """Yield a message for each special token id in genai_config.json that disagrees with the other config files.

    genai_config.json must contain the special token id from generation_config.json or, if missing there, from
    config.json. If neither generation_config.json nor config.json defines a padding id, the padding id in
    genai_config.json must equal the EOS id.
    """
    configs = [folder / name for name in ("config.json", "generation_config.json")]
    stated: dict[str, Any] = {}
    for path in configs:
        stated |= read_object(path) if path.is_file() else {}
    for role in ("bos", "eos", "pad"):
        want = stated.get(f"{role}_token_id")
        if role == "pad" and want is None:
            want = stated.get("eos_token_id")
            want = want[0] if isinstance(want, list) and want else want
        value = model.get(f"{role}_token_id")
        if stated and value != want:
            yield f"{role}_token_id: expected {want} (as in the other config files), found {value!r:.60}"


def _wrong_graph(path: Path, decoder: Mapping[str, Any], search: Any) -> Iterator[str]:
    graph = onnx.load(str(path), load_external_data=False).graph
    known = {value.name for value in (*graph.input, *graph.output)}
    layers = decoder.get("num_hidden_layers")
    for part in ("inputs", "outputs"):
        table = decoder.get(part)
        for key, name in table.items() if isinstance(table, Mapping) else ():
            last = (layers if type(layers) is int else 1) - 1
            if isinstance(name, str) and name.replace("%d", str(last)) not in known:
                yield f"decoder.{part}.{key}: expected the name of a graph input or output, found {name!r:.60}"
    shared = isinstance(search, Mapping) and search.get("past_present_share_buffer") is True
    fused = any(node.op_type == "GroupQueryAttention" for node in graph.node)
    if shared and not fused:
        yield "search.past_present_share_buffer: expected false (the graph appends to the KV cache), found true"


def check_graph(artifact: Artifact, reference: Reference) -> Iterator[Check | Skip]:
    """Check the inputs, outputs and node attributes of a model's graph against the base model's config."""
    model = onnx.load(str(artifact.path), load_external_data=False)
    if artifact.path.parent.name == "onnx" or model.producer_name == "ttexport":
        yield _check_interface(artifact, model.graph, reference)
    else:
        yield Skip(
            "interface",
            f"{artifact.path.name} is outside onnx/, and clients require fixed input and output names only in onnx/",
        )
    yield _check_numbers(model.graph, reference)


def _check_interface(artifact: Artifact, graph: onnx.GraphProto, reference: Reference) -> Check:
    """Check that the inputs, the outputs and the axes of a graph have the names that applications require.

    A graph must have inputs and outputs for the key cache and the value cache of every layer.
    """
    layers = hyperparameters(reference.checkpoint.text_config).get("block_count")
    stored = {tensor.name for tensor in graph.initializer}
    values = {value.name: value for value in (*graph.input, *graph.output) if value.name not in stored}
    wanted = {"input_ids", "attention_mask", "logits"}
    if type(layers) is int:
        ends = [f"{layer}.{part}" for layer in range(layers) for part in ("key", "value")]
        wanted |= {f"past_key_values.{end}" for end in ends} | {f"present.{end}" for end in ends}
    wrong = [
        f"{name}: expected a graph input or output with this name, found none"
        for name in sorted(wanted - values.keys())
    ]
    wrong += [
        f"{name}: clients do not use a graph input or output with this name"
        for name in sorted(values.keys() - wanted - _AXES.keys())
    ]
    for name, value in values.items() if artifact.path.parent.name == "onnx" else ():
        axes = [axis.dim_param for axis in value.type.tensor_type.shape.dim]
        named = _AXES.get(name.split(".")[0], ())
        if len(axes) != len(named) or any(want not in (None, got) for want, got in zip(named, axes, strict=True)):
            wrong.append(f"{name}: expected axes {list(named)}, found {axes}")
    detail = wrong[0] if wrong else f"{len(values)} graph inputs and outputs have the expected names"
    return Check(name="interface", passed=not wrong, value=float(len(wrong)), limit=0.0, detail=detail)


def _check_numbers(graph: onnx.GraphProto, reference: Reference) -> Check:
    """Check that the norm epsilons and the numbers of attention heads in the graph equal the values in config.json.

    A comparison of logits may not detect a wrong norm epsilon, because the epsilon may change the logits by less than
    rounding noise.
    """
    numbers = hyperparameters(reference.checkpoint.text_config)
    epsilons = [numbers[name] for name in _EPSILONS if name in numbers]
    wrong, count = [], 0
    for node in graph.node:
        for attribute in node.attribute:
            wanted = epsilons if attribute.name == "epsilon" else [numbers.get(_ATTRIBUTES.get(attribute.name, ""))]
            known = [want for want in wanted if want is not None]
            if not known or (attribute.name in _ATTRIBUTES and node.op_type not in _ATTENTION):
                continue
            count += 1
            value = attribute.f if attribute.type == onnx.AttributeProto.FLOAT else attribute.i
            if not any(np.float32(value) == np.float32(want) for want in known):
                wrong.append(f"{node.name}: {attribute.name}: expected {known[0]}, found {value:.6g}")
    detail = wrong[0] if wrong else f"{count} node attributes match config.json"
    return Check(name="graph numbers", passed=not wrong, value=float(len(wrong)), limit=0.0, detail=detail)
