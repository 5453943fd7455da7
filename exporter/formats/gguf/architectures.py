"""llama.cpp's architecture for each family: its name, its metadata keys, and the values hard-coded in llama.cpp.

A hard-coded value has no key, so a config with another value cannot be represented in a GGUF.
Sources: the model classes of llama.cpp's converter, and load_arch_hparams, load_arch_tensors and build_arch_graph of
each architecture.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Final, Literal

from exporter.errors import NotExpressible
from exporter.families.spec import DecoderSpec, Role, Rope, Slot

_SIZES: Final = frozenset({"block_count", "context_length", "embedding_length", "feed_forward_length"})
_PLAIN: Final = _SIZES | {"attention.head_count", "attention.head_count_kv", "norm", "rope.freq_base", "file_type"}
_LLAMA: Final = _PLAIN | {"rope.scaling", "vocab_size", "rope.dimension_count"}
_BASE: Final = _PLAIN | {"rope.scaling"}
_EXPERTS: Final = frozenset({"expert_count", "expert_used_count"})
_GEMMA: Final = _PLAIN - {"rope.freq_base"}

_QKV: Final = frozenset({Role.Q, Role.K, Role.V, Role.QKV})
_MOST: Final = _QKV | {Role.ATTN_OUT, Role.GATE, Role.UP, Role.DOWN}
_SEQUENTIAL: Final = frozenset({Role.ATTN_OUT, Role.UP, Role.DOWN})

Check = Callable[[DecoderSpec], str | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """A row of the table.

    keys: names below ``{name}.``; "norm" stands for the epsilon, "rope.scaling" for all keys of a scaling.
    head_length: whether the width of an attention head is written always, only if config.json states it, or never.
    interleaved: a rotary pair is two neighbouring rows of a head. head: whether the file may, must or cannot hold an
    untied LM head. biases: linears that may have a bias; needed: linears that must have one.
    scalings: supported rope types. square: the attention heads must fill the hidden size.
    check: verifies other hard-coded values; returns the reason for a refusal.
    """

    name: str
    keys: frozenset[str]
    head_length: Literal["always", "stated", "never"] = "stated"
    interleaved: bool = False
    head: Literal["may", "must", "never"] = "may"
    biases: frozenset[Role] = _QKV
    needed: frozenset[Role] = frozenset()
    scalings: frozenset[str] = frozenset({"linear", "yarn"})
    square: bool = False
    check: Check = lambda spec: None


def _no_rope_layers(spec: DecoderSpec) -> str | None:
    fixed = frozenset(range(3, spec.layers, 4))
    if spec.rope and spec.rope.skipped != fixed:
        return f"layers without positions: llama.cpp hard-codes {sorted(fixed)}, found {sorted(spec.rope.skipped)}"
    return None


def _gemma(large: int | None, period: int | None) -> Check:
    """large: the number of layers by which llama.cpp recognises the 27B model, which has another attention scale."""

    def check(spec: DecoderSpec) -> str | None:
        attention = spec.attention
        base = spec.hidden // attention.heads if spec.layers == large else attention.head_dim
        if abs(attention.scale * base**0.5 - 1) > 1e-6:
            return f"attention scale: llama.cpp hard-codes {base**-0.5:.6g} for this size, found {attention.scale:.6g}"
        fixed = frozenset(layer for layer in range(spec.layers) if (layer + 1) % period) if period else frozenset[int]()
        if attention.windowed != fixed and (attention.window is not None or period == 2):
            return f"layers with a window: llama.cpp hard-codes {sorted(fixed)}, found {sorted(attention.windowed)}"
        return None

    return check


def _gemma3(spec: DecoderSpec) -> str | None:
    if spec.attention.softcap is not None:
        return "attn_logit_softcapping is not supported by this architecture"
    return _gemma(62, 6)(spec)


def _qwen3_moe(spec: DecoderSpec) -> str | None:
    if spec.moe and not spec.moe.normalised:
        return "norm_topk_prob: llama.cpp always normalises the weights of the chosen experts, this config does not"
    return None


def _command_r(spec: DecoderSpec) -> str | None:
    """llama.cpp recognises Command R+ by its 64 layers, and reads norms of queries and keys for this model only."""
    if (spec.attention.qk_norm is not None) != (spec.layers >= 64):
        return f"use_qk_norm: llama.cpp decides it by the number of layers (64 or more), found {spec.layers} layers"
    return None


#: Family → architecture.
ARCHITECTURES: Final[Mapping[str, Architecture]] = {
    "llama": Architecture(
        name="llama",
        keys=_LLAMA,
        head_length="always",
        interleaved=True,
        biases=_MOST,
        scalings=frozenset({"linear", "llama3", "yarn"}),
    ),
    "mistral": Architecture(
        name="llama",
        keys=_LLAMA,
        head_length="always",
        interleaved=True,
        scalings=frozenset({"linear", "llama3", "yarn"}),
    ),
    "mixtral": Architecture(name="llama", keys=_LLAMA | _EXPERTS, interleaved=True),
    "qwen2": Architecture(name="qwen2", keys=_BASE, square=True),
    "qwen3": Architecture(name="qwen3", keys=_BASE, head_length="always"),
    "qwen3_moe": Architecture(
        name="qwen3moe", keys=_BASE | _EXPERTS | {"expert_feed_forward_length"}, check=_qwen3_moe
    ),
    "gemma": Architecture(
        name="gemma", keys=_GEMMA, head_length="always", head="never", scalings=frozenset(), check=_gemma(None, None)
    ),
    "gemma2": Architecture(
        name="gemma2",
        keys=_GEMMA | {"attention.sliding_window", "attn_logit_softcapping", "final_logit_softcapping"},
        head_length="always",
        head="never",
        scalings=frozenset(),
        check=_gemma(46, 2),
    ),
    "gemma3_text": Architecture(
        name="gemma3",
        keys=_BASE | {"rope.freq_base_swa", "attention.sliding_window", "final_logit_softcapping"},
        head_length="always",
        scalings=frozenset({"linear"}),
        check=_gemma3,
    ),
    "phi3": Architecture(
        name="phi3",
        keys=_PLAIN | {"rope.dimension_count", "rope.scaling.original_context_length", "attention.sliding_window"},
        head_length="never",
        scalings=frozenset({"longrope"}),
        square=True,
    ),
    "gpt2": Architecture(
        name="gpt2",
        keys=_PLAIN - {"attention.head_count_kv", "rope.freq_base"},
        head_length="never",
        biases=_SEQUENTIAL | _QKV,
        needed=_SEQUENTIAL,
        square=True,
    ),
    "gpt_neox": Architecture(
        name="gptneox",
        keys=_PLAIN - {"attention.head_count_kv", "rope.freq_base", "file_type"}
        | {"rope.dimension_count", "use_parallel_residual"},
        head_length="never",
        head="must",
        biases=_SEQUENTIAL | _QKV,
        needed=_SEQUENTIAL | {Role.QKV},
        scalings=frozenset(),
        square=True,
    ),
    "olmo2": Architecture(name="olmo2", keys=_BASE, head="must", square=True),
    "granite": Architecture(
        name="granite",
        keys=_LLAMA | {"attention.scale", "embedding_scale", "residual_scale", "logit_scale"},
        head_length="never",
        interleaved=True,
        biases=_MOST,
    ),
    "starcoder2": Architecture(
        name="starcoder2", keys=_BASE, biases=_SEQUENTIAL | _QKV, needed=_SEQUENTIAL, square=True
    ),
    "cohere": Architecture(
        name="command-r",
        keys=_PLAIN | {"logit_scale", "rope.scaling.type"},
        interleaved=True,
        head="never",
        scalings=frozenset(),
        square=True,
        check=_command_r,
    ),
    "stablelm": Architecture(
        name="stablelm",
        keys=_PLAIN - {"rope.freq_base"} | {"rope.dimension_count", "use_parallel_residual"},
        head_length="never",
        head="must",
        scalings=frozenset(),
        square=True,
    ),
    "smollm3": Architecture(
        name="smollm3",
        keys=_LLAMA,
        interleaved=True,
        check=_no_rope_layers,
    ),
}


def architecture(spec: DecoderSpec, *, tied: bool) -> Architecture:
    """The table row for a decoder. Raises NotExpressible, with the reason, if llama.cpp cannot represent it."""
    row = ARCHITECTURES[spec.family]
    if reason := _refusal(spec, row):
        raise NotExpressible(f"gguf: {row.name}", reason)
    if row.head == "must" and tied:
        raise NotExpressible(
            f"gguf: {row.name}",
            "llama.cpp requires an untied LM head here, and this model's head is tied",
            instead="--untie writes one",
        )
    if row.head == "never" and not tied:
        raise NotExpressible(
            f"gguf: {row.name}",
            "llama.cpp ties the LM head to the embedding here, and this model's head differs from its embedding",
            instead="--to hf and --to onnx can hold it",
        )
    return row


def _refusal(spec: DecoderSpec, row: Architecture) -> str | None:
    attention, rope = spec.attention, spec.rope
    rope_type = (rope.scaling or {}).get("rope_type") if rope else None
    if rope_type is not None and rope_type not in row.scalings:
        return f"rope type {rope_type!r} is not supported by this architecture"
    if rope and rope_type == "yarn" and (odd := _odd_yarn(rope)):
        return f"{odd} of rope type 'yarn': llama.cpp always scales attention as transformers does by default"
    width = spec.hidden // attention.heads
    if row.head_length == "never" and attention.head_dim != width:
        return f"head_dim: llama.cpp computes {width} here, found {attention.head_dim}"
    if row.square and attention.heads * attention.head_dim != spec.hidden:
        return f"heads of {attention.head_dim} times {attention.heads}: llama.cpp expects {spec.hidden} in total"
    if row.interleaved and rope and not rope.interleaved and rope.dims != attention.head_dim:
        return f"partial_rotary_factor: llama.cpp rotates whole heads here, found {rope.dims} of {attention.head_dim}"
    return row.check(spec)


def _odd_yarn(rope: Rope) -> str | None:
    """The first YaRN parameter that llama.cpp and transformers compute differently (a KL of 0.03 and more)."""
    table = rope.scaling or {}
    given = [
        name for name in ("attention_factor", "attn_factor", "extrapolation_factor") if table.get(name) is not None
    ]
    if table.get("mscale") and table.get("mscale_all_dim"):
        given.append("mscale")
    if table.get("truncate") is False:
        given.append("truncate")
    return given[0] if given else None


def check_biases(row: Architecture, slots: Collection[Slot]) -> None:
    """Raises NotExpressible for a linear's bias that llama.cpp does not read, or that it needs and the model lacks."""
    biased = {slot.role for slot in slots if slot.parameter == "bias"} & _MOST
    if extra := biased - row.biases:
        name = min(role.value for role in extra)
        raise NotExpressible(f"gguf: {row.name}", f"llama.cpp reads no bias for {name} here, and this model has one")
    if missing := row.needed - biased:
        name = min(role.value for role in missing)
        raise NotExpressible(f"gguf: {row.name}", f"llama.cpp needs a bias for {name} here, and this model has none")


def notes(spec: DecoderSpec, row: Architecture) -> list[str]:
    """Differences between llama.cpp's and transformers' results that do not prevent writing the model."""
    out = []
    attention = spec.attention
    ignored = attention.window is not None and (row.name == "phi3" or "attention.sliding_window" not in row.keys)
    if ignored and attention.window is not None and attention.window < spec.max_positions:
        out.append(f"llama.cpp applies no window here: texts of more than {attention.window} tokens give other logits")
    if spec.foreign_prefixes:
        out.append("the file holds the text model only: llama.cpp keeps the vision model in a separate file (mmproj)")
    if spec.mlp.activation == "gelu":
        out.append("llama.cpp computes the tanh approximation of GELU, the config asks for the exact GELU")
    return out
