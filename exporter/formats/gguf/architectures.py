"""Check that llama.cpp can run a decoder, and list the reasons why its results may differ from transformers' results.

The properties of llama.cpp's architectures are defined in ``exporter/families/llama_cpp.py`` and in the modules of the
model families.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Final

from exporter.errors import NotExpressible
from exporter.families import FAMILIES
from exporter.families.llama_cpp import MOST_LINEARS, Architecture
from exporter.families.spec import DecoderSpec, Rope, Slot

#: Largest distance of an attention factor from YaRN's default, which llama.cpp always uses. Configs round the default.
_NEAR: Final = 1e-6


def architecture(spec: DecoderSpec, *, tied: bool) -> Architecture:
    """Return the llama.cpp architecture that matches a decoder.

    Raises NotExpressible if llama.cpp cannot represent the decoder.
    """
    row = FAMILIES[spec.family].llama_cpp
    if reason := _refusal(spec, row):
        raise NotExpressible(f"gguf: {row.name}", reason)
    if row.head == "must" and tied:
        raise NotExpressible(
            f"gguf: {row.name}",
            "llama.cpp requires an untied LM head for this architecture, but the LM head of this model is tied",
            instead="use --untie to write an untied LM head",
        )
    if row.head == "never" and not tied:
        raise NotExpressible(
            f"gguf: {row.name}",
            "llama.cpp ties the LM head of this architecture to the embedding, but this model has an untied LM head",
            instead="use --to hf or --to onnx to export this model",
        )
    return row


def _refusal(spec: DecoderSpec, row: Architecture) -> str | None:
    attention, rope = spec.attention, spec.rope
    rope_type = (rope.scaling or {}).get("rope_type") if rope else None
    if rope_type is not None and rope_type not in row.scalings:
        return f"llama.cpp does not support rope type {rope_type!r} for this architecture"
    if rope and rope_type == "yarn" and (odd := _odd_yarn(rope, row)):
        return f"YaRN parameter {odd}: llama.cpp supports only the default attention scaling of transformers"
    width = spec.hidden // attention.heads
    if row.head_length == "never" and attention.head_dim != width:
        return f"head_dim: llama.cpp computes {width} for this architecture, but this model has {attention.head_dim}"
    if row.square and attention.heads * attention.head_dim != spec.hidden:
        return (
            f"head_dim: llama.cpp requires that heads * head_dim equals the hidden size ({spec.hidden}), "
            f"found {attention.heads} * {attention.head_dim}"
        )
    if row.interleaved and rope and not rope.interleaved and rope.dims != attention.head_dim:
        return (
            f"partial_rotary_factor: llama.cpp rotates all {attention.head_dim} dimensions of a head, "
            f"but this model rotates only {rope.dims} dimensions"
        )
    return row.check(spec)


def _odd_yarn(rope: Rope, row: Architecture) -> str | None:
    """Return the first YaRN parameter in the config that llama.cpp and transformers apply differently, or None.

    A parameter counts as applied differently if it causes a KL divergence of 0.03 or more between the outputs of
    llama.cpp and of transformers.
    """
    table = rope.scaling or {}
    given = [name for name in ("attn_factor", "extrapolation_factor") if table.get(name) is not None]
    factor, scale = table.get("factor"), table.get("attention_factor")
    if scale is not None and not (
        isinstance(factor, int | float) and factor > 1 and abs(scale - 0.1 * math.log(factor) - 1) < _NEAR
    ):
        given.insert(0, "attention_factor")
    if "rope.scaling.yarn_log_multiplier" in row.keys:
        # llama.cpp reads mscale_all_dim for this architecture, and assumes that mscale is 1.
        if table.get("mscale_all_dim") and table.get("mscale") != 1:
            given.append("mscale")
    elif table.get("mscale") and table.get("mscale_all_dim"):
        given.append("mscale")
    if table.get("truncate") is False:
        given.append("truncate")
    return given[0] if given else None


def check_biases(row: Architecture, slots: Collection[Slot]) -> None:
    """Check that llama.cpp can load a decoder that has exactly the biases of this model.

    Raises NotExpressible if the model has a bias that llama.cpp does not read, or lacks a bias that llama.cpp requires.
    """
    biased = {slot.role for slot in slots if slot.parameter == "bias"} & MOST_LINEARS
    if extra := biased - row.biases:
        name = min(role.value for role in extra)
        raise NotExpressible(f"gguf: {row.name}", f"this model has a bias for {name}, but llama.cpp ignores this bias")
    if missing := row.needed - biased:
        name = min(role.value for role in missing)
        raise NotExpressible(f"gguf: {row.name}", f"this model has no bias for {name}, but llama.cpp requires a bias")


def notes(spec: DecoderSpec, row: Architecture) -> list[str]:
    """Return notes on the ways in which llama.cpp's results will differ from transformers' results."""
    out = []
    attention = spec.attention
    ignored = attention.window is not None and (row.name == "phi3" or "attention.sliding_window" not in row.keys)
    if ignored and attention.window is not None and attention.window < spec.max_positions:
        out.append(
            "llama.cpp ignores the sliding window of this architecture, "
            f"so texts of more than {attention.window} tokens give other logits than in transformers"
        )
    if spec.foreign_prefixes:
        out.append(
            "the GGUF contains only the text model, because llama.cpp needs the vision model in a separate mmproj file"
        )
    if spec.mlp.activation == "gelu":
        out.append("llama.cpp computes the tanh approximation of GELU, but the config specifies the exact GELU")
    return out
