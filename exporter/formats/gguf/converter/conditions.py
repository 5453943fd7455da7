"""The conditions under which models have a known fault of llama.cpp or of llama.cpp's converter.

A condition is a function of the fields of a text model's config, or of the shapes of the stored tensors. Source of the
conditions: llama.cpp's folders ``conversion`` and ``src/models``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

Config = Mapping[str, Any]
Shapes = Mapping[str, tuple[int, ...]]
Condition = Callable[[Config], bool]

_SCORES: Final = (
    "score_function",
    "scoring_func",
    "score_func",
    "moe_router_activation",
    "moe_router_activation_func",
    "expert_selection_fn",
)


def always(_config: Config) -> bool:
    """Apply to every model."""
    return True


def without(*keys: str) -> Condition:
    """Whether a config has none of ``keys``."""
    return lambda config: all(config.get(key) is None for key in keys)


def rope_of(config: Config) -> Mapping[str, Any]:
    """Return the parameters of the rotary embedding, or an empty mapping."""
    table = config.get("rope_parameters") or config.get("rope_scaling")
    return table if isinstance(table, dict) else {}


def unnamed_scores(config: Config) -> bool:
    """Whether the config does not name the function of the experts' scores."""
    # llama.cpp recognises GLM-4.7-Flash by the number of layers and the size of the vocabulary.
    known = config.get("num_hidden_layers") in (47, 48) and config.get("vocab_size") == 154880
    return without(*_SCORES)(config) and not known


def is_other_period(period: int, *, full_first: bool = False) -> Condition:
    """Whether the layers with a sliding window are others than those that llama.cpp assumes.

    llama.cpp assumes that one layer of each ``period`` layers has full attention: the first or the last.
    """

    def applies(config: Config) -> bool:
        full = 0 if full_first else period - 1
        types = config.get("layer_types") or []
        places = [name == "full_attention" for name in types]
        return bool(config.get("sliding_window")) and places != [index % period == full for index in range(len(types))]

    return applies


def exaone_windows(config: Config) -> bool:
    """Whether layers have a sliding window although the model has other than 64 layers."""
    windows = "sliding_attention" in (config.get("layer_types") or ())
    return windows and bool(config.get("sliding_window")) and config.get("num_hidden_layers") != 64


def partial_rotation(config: Config) -> bool:
    """Whether only a part of the dimensions of a head is rotated."""
    return bool(rope_of(config).get("partial_rotary_factor", 1.0) != 1.0)


def no_rotary_factor(config: Config) -> bool:
    """Whether the config does not say which part of the dimensions of a head is rotated."""
    return "partial_rotary_factor" not in rope_of(config) and config.get("partial_rotary_factor") is None


def untruncated_yarn(config: Config) -> bool:
    """Whether the bounds of YaRN's frequency ramp are not rounded."""
    rope = rope_of(config)
    return rope.get("rope_type", rope.get("type")) == "yarn" and rope.get("truncate") is False


def two_rope_bases(config: Config) -> bool:
    """Whether the types of layers have different values of rope_theta."""
    tables = [table for table in rope_of(config).values() if isinstance(table, dict)]
    return len({table.get("rope_theta") for table in tables}) > 1


def other_shared_width(config: Config) -> bool:
    """Whether the shared experts of ERNIE 4.5 have another width than llama.cpp assumes."""
    shared, heads = config.get("moe_num_shared_experts") or 0, config.get("num_key_value_heads") or 1
    return bool(shared) and config["intermediate_size"] // heads != shared * config["moe_intermediate_size"]


def other_sparsity(config: Config) -> bool:
    """Whether the sizes of Gemma 3n are others than those that llama.cpp assumes."""
    pattern, layers = list(config.get("activation_sparsity_pattern") or ()), config["num_hidden_layers"]
    shared = config.get("num_kv_shared_layers") or 0
    widths = (config.get("hidden_size_per_layer_input"), config.get("laurel_rank"), config.get("altup_num_inputs"))
    return (
        pattern != [0.95 if index < 10 else 0.0 for index in range(layers)]
        or widths != (256, 64, 4)
        or (shared and layers - shared != 20)
        or is_other_period(5)(config)
    )


def four_times(key: str) -> Condition:
    """Whether the width of the MLP is another one than four times the hidden size."""
    return lambda config: config.get(key) not in (None, 4 * config["hidden_size"])


def several_shared_heads(config: Config) -> bool:
    """Whether a Falcon model with one key-value head has another value of num_kv_heads."""
    old = config.get("multi_query") and not config.get("new_decoder_architecture")
    return bool(old) and config.get("num_kv_heads", 1) != 1


def other_image_ids(config: Config) -> bool:
    """Whether the image tokens of Chameleon have other ids than 4 to 8195."""
    table = config.get("vocabulary_map") or {}
    return sorted(number for name, number in table.items() if name.startswith("IMGIMG")) != list(range(4, 8196))


def has(*endings: str) -> Callable[[Shapes], bool]:
    """Whether a stored tensor has a name with one of ``endings``."""
    return lambda shapes: any(name.endswith(endings) for name in shapes)


def untransposed(shapes: Shapes) -> bool:
    """Whether the experts' matrices have the layout (outputs, inputs), in which transformers 5 saves them."""
    downs = [shape for name, shape in shapes.items() if name.endswith("mlp.experts.down_proj")]
    ups = [shape for name, shape in shapes.items() if name.endswith("mlp.experts.gate_up_proj")]
    return bool(downs and ups) and downs[0][-2] == ups[0][-1]
