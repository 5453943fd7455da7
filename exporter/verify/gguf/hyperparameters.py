"""What a config.json says of a model, by the names that GGUF has for it: the checker's own reading.

Only what the config states is known here: where it leaves a value to a class of transformers, there is none.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final

#: GGUF's name → where configs of the field state it; the first that is there counts.
_SPELLINGS: Final[Mapping[str, tuple[str, ...]]] = {
    "block_count": ("num_hidden_layers", "n_layer"),
    "context_length": ("max_position_embeddings", "n_positions", "n_ctx"),
    "embedding_length": ("hidden_size", "n_embd"),
    "feed_forward_length": ("intermediate_size", "n_inner"),
    "attention.head_count": ("num_attention_heads", "n_head"),
    "attention.head_count_kv": ("num_key_value_heads",),
    "attention.layer_norm_rms_epsilon": ("rms_norm_eps",),
    "attention.layer_norm_epsilon": ("layer_norm_eps", "layer_norm_epsilon", "norm_epsilon"),
    "expert_count": ("num_local_experts", "num_experts"),
    "expert_used_count": ("num_experts_per_tok",),
    "expert_feed_forward_length": ("moe_intermediate_size",),
    "attn_logit_softcapping": ("attn_logit_softcapping",),
    "final_logit_softcapping": ("final_logit_softcapping",),
    "attention.scale": ("attention_multiplier",),
    "embedding_scale": ("embedding_multiplier",),
    "residual_scale": ("residual_multiplier",),
    "logit_scale": ("logits_scaling", "logit_scale"),
    "use_parallel_residual": ("use_parallel_residual",),
}
#: They have as many key heads as heads, whatever else their configs say.
_UNGROUPED: Final = ("gpt2", "gpt_neox")
#: The others are tensors in a GGUF: longrope's two lists of factors, llama3's one.
_NAMED_SCALINGS: Final = ("linear", "yarn")


def hyperparameters(config: Mapping[str, Any]) -> dict[str, Any]:
    """GGUF's name below the architecture → value. None: the config says that there is none; absent: it does not say.

    config: the part of config.json that describes the text model.
    """
    found = {name: config[key] for name, keys in _SPELLINGS.items() for key in reversed(keys) if key in config}
    if found.get("feed_forward_length", 0) is None and "n_embd" in config:
        found["feed_forward_length"] = 4 * config["n_embd"]  # GPT-2's way to say so
    if config.get("model_type") in _UNGROUPED:
        found["attention.head_count_kv"] = found.get("attention.head_count")
    heads, hidden = found.get("attention.head_count"), found.get("embedding_length")
    width = config.get("head_dim")
    if not width and isinstance(heads, int) and isinstance(hidden, int) and heads > 0:
        width = hidden // heads
    if width is not None:
        found |= {"attention.key_length": width, "attention.value_length": width}
    if "sliding_window" in config:
        on = config.get("use_sliding_window") is not False
        found["attention.sliding_window"] = config["sliding_window"] if on else None
    return found | _rope(config, width, found.get("context_length"))


def _rope(config: Mapping[str, Any], width: Any, context: Any) -> dict[str, Any]:
    table = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(table, Mapping):
        return {}
    found: dict[str, Any] = {}
    local = config.get("rope_local_base_freq")
    if "full_attention" in table:
        # A table for each kind of layer: those with a window have a base of their own and no scaling.
        local = table.get("sliding_attention", {}).get("rope_theta", local)
        table = table["full_attention"]
    if local is not None:
        found["rope.freq_base_swa"] = local
    theta = table.get("rope_theta", config.get("rope_theta", config.get("rotary_emb_base")))
    if theta is not None:
        found["rope.freq_base"] = theta
    share = table.get("partial_rotary_factor", config.get("partial_rotary_factor", config.get("rotary_pct")))
    if width is not None:
        found["rope.dimension_count"] = int(width * (1.0 if share is None else share))
    kind = table.get("rope_type", table.get("type", "default"))
    found["rope.scaling.type"] = kind if kind in _NAMED_SCALINGS else None
    if kind in _NAMED_SCALINGS:
        found["rope.scaling.factor"] = table.get("factor")
    original = table.get("original_max_position_embeddings") or config.get("original_max_position_embeddings")
    if kind in ("yarn", "longrope"):
        found["rope.scaling.original_context_length"] = original or context
    elif original is not None:
        found["rope.scaling.original_context_length"] = original
    if kind == "yarn":
        found |= {f"rope.scaling.yarn_{key}": table[key] for key in ("beta_fast", "beta_slow") if table.get(key)}
    if kind == "longrope" and isinstance(context, int) and context > 1:
        found["rope.scaling.attn_factor"] = _growth(table, context, original or context)
    return found


def _growth(table: Mapping[str, Any], context: int, original: int) -> float:
    """How much longrope multiplies attention by, beyond the context it was trained for.

    Source: _compute_longrope_parameters in transformers.
    """
    if table.get("attention_factor") is not None:
        return float(table["attention_factor"])
    factor = table.get("factor") or context / original
    return math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
