"""Make the GGUF metadata keys for architecture, hyperparameters, sampling and provenance, but not for the tokenizer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from exporter.errors import BadInput
from exporter.families.config import Settings
from exporter.families.llama_cpp import Architecture
from exporter.families.spec import DecoderSpec
from exporter.formats.gguf import writer
from exporter.formats.gguf.quantisation.file_types import NATIVE_FILE_TYPES
from exporter.formats.gguf.writer import Key, TensorEntry
from exporter.formats.rope import longrope_magnitude

#: GGML_QNT_VERSION in ggml.h.
QUANTIZATION_VERSION: Final = 2

#: llama.cpp's default for the base of the rotary frequencies.
_DEFAULT_THETA: Final = 10000.0

#: The context length that llama.cpp's converter writes for a theta that contains a fixed factor: configs of published
#: models have shorter lengths than the models were trained with.
_STRETCHED_CONTEXT: Final = 256 * 1024

#: YaRN's parameter names in config.json → key names in a GGUF.
_YARN: Final = {
    "beta_fast": "yarn_beta_fast",
    "beta_slow": "yarn_beta_slow",
    "attention_factor": "yarn_attn_factor",
}

_UNITS: Final = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K"))

#: Keys of generation_config.json → general.sampling.*, in the order of llama.cpp's converter.
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


def general_keys(arch: str, name: str, label: str, generation: Mapping[str, Any]) -> list[Key]:
    """Return the metadata keys ``general.*``, except ``general.file_type``.

    generation: the parsed generation_config.json, or {} if the file is missing.
    """
    keys = [writer.text("general.architecture", arch), writer.text("general.type", "model")]
    keys += _sampling_keys(generation)
    keys.append(writer.text("general.name", name))
    keys.append(writer.text("general.size_label", label))
    return keys


def _sampling_keys(generation: Mapping[str, Any]) -> list[Key]:
    keys: dict[str, Key] = {}
    if isinstance(sequence := generation.get("sequence"), str) and sequence:
        keys["sequence"] = writer.text("general.sampling.sequence", sequence)
    for source, (target, number_type) in _SAMPLING.items():
        value = generation.get(source)
        if value is None or target in keys:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise BadInput(f"generation_config.json: {source}: expected a number, found {value!r:.80}")
        make = writer.i32 if number_type is int else writer.f32
        keys[target] = make(f"general.sampling.{target}", number_type(value))
    return list(keys.values())


def size_label(parameters: int) -> str:
    """Format a parameter count as a label such as 135M or 1.2B, with at least two digits (GGUF's naming convention)."""
    scale, unit = next(((scale, unit) for scale, unit in _UNITS if parameters > scale), _UNITS[-1])
    digits = len(str(round(parameters / scale)).lstrip("0"))
    return f"{parameters / scale:.{max(2 - digits, 0)}f}{unit}"


def decoder_keys(row: Architecture, spec: DecoderSpec, file_type: str, *, head_length: bool) -> list[Key]:
    """Return the metadata keys ``{architecture}.*``, the file type key and the quantisation version key.

    head_length: whether config.json contains the width of an attention head.
    """
    keys = [key for group, members in _candidates(row, spec, file_type).items() if group in row.keys for key in members]
    if spec.rope and "rope.freq_base" not in row.keys and spec.rope.theta != _DEFAULT_THETA:
        # llama.cpp's converter omits the key for this architecture; llama.cpp would then compute with its default
        # theta.
        keys.append(writer.f32(f"{row.name}.rope.freq_base", spec.rope.theta))
    if row.head_length == "always" or (row.head_length == "stated" and head_length):
        for part in ("key", "value"):
            keys.append(writer.u32(f"{row.name}.attention.{part}_length", spec.attention.head_dim))
    keys += _long_rope(row.name, spec)
    keys.append(writer.u32("general.quantization_version", QUANTIZATION_VERSION))
    return keys


def _candidates(row: Architecture, spec: DecoderSpec, file_type: str) -> dict[str, list[Key]]:
    """Map each name that ``Architecture.keys`` can contain to the GGUF metadata keys that are written for the name."""
    arch, attention, rope, moe = row.name, spec.attention, spec.rope, spec.moe
    epsilon = "layer_norm_rms_epsilon" if spec.norm.type == "rms" else "layer_norm_epsilon"
    counts: dict[str, int | None] = {
        "block_count": spec.layers,
        "context_length": _STRETCHED_CONTEXT if rope and rope.stretched else spec.max_positions,
        "embedding_length": spec.hidden,
        "feed_forward_length": spec.mlp.inner,
        "attention.head_count": attention.heads,
        "attention.head_count_kv": attention.kv_heads,
        # Only Phi-3 has this key if the model has no sliding window; the value is then 0.
        "attention.sliding_window": attention.window or (0 if arch == "phi3" else None),
        "expert_count": moe.experts if moe else None,
        "expert_used_count": moe.top_k if moe else None,
        "expert_feed_forward_length": moe.inner if moe else None,
        "rope.dimension_count": rope.dims if rope else None,
        "rope.scaling.original_context_length": rope.original_positions if rope else None,
        "vocab_size": spec.vocab,
    }
    numbers: dict[str, float | None] = {
        "rope.freq_base": rope.theta if rope else None,
        "rope.freq_base_swa": (rope.local_theta or rope.theta) if rope else None,
        "attn_logit_softcapping": attention.softcap,
        "final_logit_softcapping": spec.logit_softcap,
        "attention.scale": attention.scale,
        "attention.clamp_kqv": attention.clip,
        "attention.layer_norm_rms_epsilon": spec.norm.eps,
        "attention.temperature_scale": attention.log_growth,
        "embedding_scale": spec.embed_scale,
        "residual_scale": spec.residual_scale,
        "logit_scale": 1 / spec.logit_scale if row.logit_scale_divides else spec.logit_scale,
    }
    out = {name: [writer.u32(f"{arch}.{name}", value)] for name, value in counts.items() if value is not None}
    out |= {name: [writer.f32(f"{arch}.{name}", value)] for name, value in numbers.items() if value is not None}
    out["norm"] = [writer.f32(f"{arch}.attention.{epsilon}", spec.norm.eps)]
    if attention.window is not None:
        pattern = [layer in attention.windowed for layer in range(spec.layers)]
        out["attention.sliding_window_pattern"] = [writer.truths(f"{arch}.attention.sliding_window_pattern", pattern)]
    out["use_parallel_residual"] = [writer.truth(f"{arch}.use_parallel_residual", spec.parallel)]
    out["rope.scaling.type"] = [writer.text(f"{arch}.rope.scaling.type", "none")]
    out["rope.scaling"] = _scaling(arch, spec)
    out["rope.scaling.yarn_log_multiplier"] = _log_multiplier(arch, spec)
    out["file_type"] = [writer.u32("general.file_type", NATIVE_FILE_TYPES[file_type])]
    return out


def _scaling(arch: str, spec: DecoderSpec) -> list[Key]:
    """Return the metadata keys for linear or YaRN rope scaling.

    For the rope types llama3 and longrope, a GGUF stores the rope factors as tensors, not as metadata keys.
    """
    rope = spec.rope
    if rope and rope.stretched:
        return [
            writer.text(f"{arch}.rope.scaling.type", "none"),
            writer.f32(f"{arch}.rope.scaling.factor", 1.0),
            writer.u32(f"{arch}.rope.scaling.original_context_length", _STRETCHED_CONTEXT),
        ]
    scaling = Settings((rope.scaling if rope else None) or {})
    rope_type, prefix = scaling.table.get("rope_type"), f"{arch}.rope.scaling"
    if rope is None or rope_type not in ("linear", "yarn"):
        return []
    keys = [writer.text(f"{prefix}.type", rope_type), writer.f32(f"{prefix}.factor", scaling.number("factor"))]
    if rope_type == "linear":
        return keys
    keys.append(writer.u32(f"{prefix}.original_context_length", rope.original_positions or spec.max_positions))
    for name, target in _YARN.items():
        if scaling.table.get(name) is not None:
            keys.append(writer.f32(f"{prefix}.{target}", scaling.number(name)))
    return keys


def _log_multiplier(arch: str, spec: DecoderSpec) -> list[Key]:
    value = ((spec.rope.scaling if spec.rope else None) or {}).get("mscale_all_dim")
    return [] if value is None else [writer.f32(f"{arch}.rope.scaling.yarn_log_multiplier", value)]


def _long_rope(arch: str, spec: DecoderSpec) -> list[Key]:
    rope = spec.rope
    if rope is None or rope.scaling is None or rope.scaling.get("rope_type") != "longrope":
        return []
    return [writer.f32(f"{arch}.rope.scaling.attn_factor", longrope_magnitude(rope, spec.max_positions))]


def size_class(entries: Sequence[TensorEntry]) -> str:
    """Return a model's size label, such as 1.2B, or 8x7B for a mixture of experts.

    In a label such as 8x7B, 8 is the number of experts, and 7B is the parameter count that the model would have with a
    single expert per layer.
    """
    shared, expert, counts = 0, 0, []
    for entry in entries:
        size = math.prod(entry.shape)
        if "_exps." in entry.name:
            counts.append(entry.shape[0])
            expert += size // entry.shape[0]
        else:
            shared += size
    return f"{sum(counts) // len(counts)}x{size_label(shared + expert)}" if counts else size_label(shared)


def provenance_keys(provenance: Mapping[str, str]) -> list[Key]:
    """Return the provenance of a GGUF (its base model, adapters, …) as metadata keys with the prefix ``ttexport.``."""
    return [writer.text(f"ttexport.{name}", value) for name, value in sorted(provenance.items())]


def model_name(path: Path) -> str:
    """Return the name of a model folder.

    For a snapshot folder in the Hugging Face cache, the repository's name is returned.
    """
    resolved = path.resolve()
    if resolved.parent.name == "snapshots" and resolved.parent.parent.name.startswith("models--"):
        return resolved.parent.parent.name.split("--")[-1]
    return resolved.name
