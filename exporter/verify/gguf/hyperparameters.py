"""Read the hyperparameters in a config.json, and return them under GGUF key names, without using the exporter's code.

The verification does not know hyperparameters that config.json omits because transformers defines the default in code.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final

#: GGUF name → keys of config.json for the value. The first key in the config counts.
_SPELLINGS: Final[Mapping[str, tuple[str, ...]]] = {
    "block_count": ("num_hidden_layers", "n_layer"),
    "context_length": ("max_position_embeddings", "n_positions", "n_ctx"),
    "embedding_length": ("hidden_size", "n_embd"),
    "feed_forward_length": ("intermediate_size", "n_inner"),
    "attention.head_count": ("num_attention_heads", "n_head"),
    "attention.head_count_kv": ("num_key_value_heads",),
    "attention.layer_norm_rms_epsilon": ("rms_norm_eps", "norm_eps"),
    "attention.layer_norm_epsilon": ("layer_norm_eps", "layer_norm_epsilon", "norm_epsilon", "norm_eps"),
    "expert_count": ("num_local_experts", "num_experts"),
    "expert_used_count": ("num_experts_per_tok",),
    "expert_feed_forward_length": ("moe_intermediate_size",),
    "attn_logit_softcapping": ("attn_logit_softcapping",),
    "final_logit_softcapping": ("final_logit_softcapping",),
    "attention.scale": ("attention_multiplier",),
    "attention.clamp_kqv": ("clip_qkv",),
    "embedding_scale": ("embedding_multiplier",),
    "residual_scale": ("residual_multiplier",),
    "logit_scale": ("logits_scaling", "logit_scale"),
    "use_parallel_residual": ("use_parallel_residual",),
}
#: Model types with equal numbers of key heads and query heads, even if a config contains a different number.
_UNGROUPED: Final = ("gpt2", "gpt_neox")
#: Rope scalings with keys in a GGUF. A GGUF stores longrope as two tensors of factors and llama3 as one tensor.
_NAMED_SCALINGS: Final = ("linear", "yarn")


def hyperparameters(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a dict from GGUF key, without the architecture prefix, to the value of the hyperparameter in ``config``.

    A value is None if the config disables the feature that the key describes, for example the sliding window. A key is
    absent from the result if ``config`` contains no value for the hyperparameter.

    config: the part of config.json that describes the text model.
    """
    numbers = {name: config[key] for name, keys in _SPELLINGS.items() for key in reversed(keys) if key in config}
    if numbers.get("feed_forward_length", 0) is None and "n_embd" in config:
        numbers["feed_forward_length"] = 4 * config["n_embd"]  # the default of GPT-2
    if config.get("model_type") in _UNGROUPED:
        numbers["attention.head_count_kv"] = numbers.get("attention.head_count")
    heads, hidden = numbers.get("attention.head_count"), numbers.get("embedding_length")
    width = config.get("head_dim")
    if not width and isinstance(heads, int) and isinstance(hidden, int) and heads > 0:
        width = hidden // heads
    if width is not None:
        numbers |= {"attention.key_length": width, "attention.value_length": width}
    if "sliding_window" in config:
        enabled = config.get("use_sliding_window") is not False
        numbers["attention.sliding_window"] = config["sliding_window"] if enabled else None
        if enabled and config["sliding_window"] and isinstance(types := config.get("layer_types"), list):
            pattern = [layer_type == "sliding_attention" for layer_type in types]
            numbers["attention.sliding_window_pattern"] = pattern
    return numbers | _rope(config, width, numbers.get("context_length"))


def _stretched(theta: Any, alpha: Any, width: Any) -> dict[str, Any]:
    """Return the keys for a theta that is multiplied by a fixed factor, as llama.cpp's converter writes them.

    Source of the formula: the function compute_ntk_alpha_rope_parameters in transformers.
    """
    context = 256 * 1024
    return {
        "rope.freq_base": theta * alpha ** (width / (width - 2)),
        "rope.scaling.factor": 1.0,
        "rope.scaling.original_context_length": context,
        "context_length": context,
    }


def _rope(config: Mapping[str, Any], width: Any, context: Any) -> dict[str, Any]:
    table = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(table, Mapping):
        return {}
    numbers: dict[str, Any] = {}
    local = config.get("rope_local_base_freq")
    if "full_attention" in table:
        # The config has one table per type of layer. Layers with a sliding window have a separate base and no scaling.
        local = table.get("sliding_attention", {}).get("rope_theta", local)
        table = table["full_attention"]
    if local is not None:
        numbers["rope.freq_base_swa"] = local
    theta = table.get("rope_theta", config.get("rope_theta", config.get("rotary_emb_base")))
    if theta is not None:
        numbers["rope.freq_base"] = theta
    share = table.get("partial_rotary_factor", config.get("partial_rotary_factor", config.get("rotary_pct")))
    if width is not None:
        numbers["rope.dimension_count"] = int(width * (1.0 if share is None else share))
    rope_type = table.get("rope_type", table.get("type", "default"))
    numbers["rope.scaling.type"] = rope_type if rope_type in _NAMED_SCALINGS else None
    if rope_type in _NAMED_SCALINGS:
        numbers["rope.scaling.factor"] = table.get("factor")
    if rope_type == "dynamic" and table.get("alpha"):
        return numbers | _stretched(theta or 10000.0, table["alpha"], width)
    original = table.get("original_max_position_embeddings") or config.get("original_max_position_embeddings")
    if rope_type in ("yarn", "longrope"):
        numbers["rope.scaling.original_context_length"] = original or context
    elif original is not None:
        numbers["rope.scaling.original_context_length"] = original
    if rope_type == "yarn":
        numbers |= {f"rope.scaling.yarn_{key}": table[key] for key in ("beta_fast", "beta_slow") if table.get(key)}
        if table.get("attention_factor"):
            numbers["rope.scaling.yarn_attn_factor"] = table["attention_factor"]
        numbers["rope.scaling.yarn_log_multiplier"] = table.get("mscale_all_dim")
        numbers["attention.temperature_scale"] = table.get("llama_4_scaling_beta")
    if rope_type == "longrope" and isinstance(context, int) and context > 1:
        numbers["rope.scaling.attn_factor"] = _attention_factor(table, context, original or context)
    return numbers


def _attention_factor(table: Mapping[str, Any], context: int, original: int) -> float:
    """Return longrope's attention factor for contexts that exceed the original context length.

    Source of the formula: the function _compute_longrope_parameters in transformers.
    """
    if table.get("attention_factor") is not None:
        return float(table["attention_factor"])
    factor = table.get("factor") or context / original
    return math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
