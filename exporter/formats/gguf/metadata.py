"""Everything in the header but tokenizer and tensors: architecture, hyperparameters, sampling, provenance."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from exporter.errors import BadInput
from exporter.families.config import Settings
from exporter.families.spec import DecoderSpec
from exporter.formats.gguf import writer
from exporter.formats.gguf.quantise import FILE_TYPES
from exporter.formats.gguf.writer import Key

#: GGML_QNT_VERSION in ggml.h.
_QUANTIZATION_VERSION: Final = 2

_UNITS: Final = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K"))

#: generation_config.json → general.sampling.*, in the order of llama.cpp's converter.
_SAMPLING: Final = {
    "top_k": ("top_k", int),
    "top_p": ("top_p", float),
    "min_p": ("min_p", float),
    "xtc_probability": ("xtc_probability", float),
    "xtc_threshold": ("xtc_threshold", float),
    "temperature": ("temp", float),
    "penalty_last_n": ("penalty_last_n", int),
    "penalty_repeat": ("penalty_repeat", float),
    "repetition_penalty": ("penalty_repeat", float),
    "mirostat": ("mirostat", int),
    "mirostat_tau": ("mirostat_tau", float),
    "mirostat_eta": ("mirostat_eta", float),
}


def general_keys(arch: str, name: str, parameters: int, generation: Mapping[str, Any]) -> list[Key]:
    """``general.*`` but for the file type. generation: the parsed generation_config.json, {} if there is none."""
    keys = [writer.text("general.architecture", arch), writer.text("general.type", "model")]
    keys += _sampling_keys(generation)
    keys.append(writer.text("general.name", name))
    keys.append(writer.text("general.size_label", size_label(parameters)))
    return keys


def _sampling_keys(generation: Mapping[str, Any]) -> list[Key]:
    keys: dict[str, Key] = {}
    if isinstance(sequence := generation.get("sequence"), str) and sequence:
        keys["sequence"] = writer.text("general.sampling.sequence", sequence)
    for source, (target, kind) in _SAMPLING.items():
        value = generation.get(source)
        if value is None or target in keys:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise BadInput(f"generation_config.json: {source}: expected a number, found {value!r:.80}")
        make = writer.i32 if kind is int else writer.f32
        keys[target] = make(f"general.sampling.{target}", kind(value))
    return list(keys.values())


def size_label(parameters: int) -> str:
    """A parameter count as people say it: 135M, 1.2B. Two digits at least, as in GGUF's naming convention."""
    scale, unit = next(((scale, unit) for scale, unit in _UNITS if parameters > scale), _UNITS[-1])
    digits = len(str(round(parameters / scale)).lstrip("0"))
    return f"{parameters / scale:.{max(2 - digits, 0)}f}{unit}"


def decoder_keys(arch: str, spec: DecoderSpec, file_type: str) -> list[Key]:
    """``{arch}.*``, the file type and the quantisation version."""
    attention, rope = spec.attention, spec.rope
    keys = [
        writer.u32(f"{arch}.block_count", spec.layers),
        writer.u32(f"{arch}.context_length", spec.max_positions),
        writer.u32(f"{arch}.embedding_length", spec.hidden),
        writer.u32(f"{arch}.feed_forward_length", spec.mlp.inner),
        writer.u32(f"{arch}.attention.head_count", attention.heads),
        writer.u32(f"{arch}.attention.head_count_kv", attention.kv_heads),
    ]
    scaling = rope.scaling or {}
    if scaling.get("rope_type") == "linear":
        keys.append(writer.text(f"{arch}.rope.scaling.type", "linear"))
        keys.append(writer.f32(f"{arch}.rope.scaling.factor", Settings(scaling).number("factor")))
    keys += [
        writer.f32(f"{arch}.rope.freq_base", rope.theta),
        writer.f32(f"{arch}.attention.layer_norm_rms_epsilon", spec.rms_eps),
        writer.u32(f"{arch}.attention.key_length", attention.head_dim),
        writer.u32(f"{arch}.attention.value_length", attention.head_dim),
        writer.u32("general.file_type", FILE_TYPES[file_type]),
        writer.u32(f"{arch}.vocab_size", spec.vocab),
        writer.u32(f"{arch}.rope.dimension_count", rope.dims),
        writer.u32("general.quantization_version", _QUANTIZATION_VERSION),
    ]
    return keys


def provenance_keys(provenance: Mapping[str, str]) -> list[Key]:
    """What the artifact was made from, under our own prefix."""
    return [writer.text(f"ttexport.{name}", value) for name, value in sorted(provenance.items())]


def model_name(path: Path) -> str:
    """The folder's name; in the hub's cache, where the folder is named by a commit, the repository's."""
    resolved = path.resolve()
    if resolved.parent.name == "snapshots" and resolved.parent.parent.name.startswith("models--"):
        return resolved.parent.parent.name.split("--")[-1]
    return resolved.name
