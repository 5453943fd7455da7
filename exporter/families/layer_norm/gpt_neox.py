"""The decoder of GPT-NeoX and Pythia.

In GPT-NeoX, attention and MLP run in parallel. GPT-NeoX stores the query, key and value projections of a layer in a
single matrix, head by head.

Source: transformers' GPTNeoXConfig and GPTNeoXForCausalLM.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from exporter.families.building_blocks import heads, naming_scheme, rope
from exporter.families.config import Settings
from exporter.families.family import Family
from exporter.families.llama_cpp import PLAIN_KEYS, QKV, SEQUENTIAL, Architecture
from exporter.families.spec import Attention, DecoderSpec, Mlp, Norm, Role

_OUTSIDE: Final = {
    "gpt_neox.embed_in": Role.EMBED,
    "gpt_neox.final_layer_norm": Role.FINAL_NORM,
    "embed_out": Role.HEAD,
}
_LAYER: Final = {
    "input_layernorm": Role.ATTN_NORM,
    "attention.query_key_value": Role.QKV,
    "attention.dense": Role.ATTN_OUT,
    "post_attention_layernorm": Role.MLP_NORM,
    "mlp.dense_h_to_4h": Role.UP,
    "mlp.dense_4h_to_h": Role.DOWN,
}
_BIASES: Final = frozenset({Role.FINAL_NORM, Role.ATTN_NORM, Role.MLP_NORM, Role.UP, Role.DOWN})


def describe(config: Mapping[str, Any]) -> DecoderSpec:
    """Describe the decoder of a gpt_neox config.

    Raises BadInput for a missing or invalid config value, and NotExpressible for an unsupported model variant.
    """
    settings = Settings(config)
    count, _, head_dim = heads(Settings({**config, "num_key_value_heads": None}))
    layers = settings.layers()
    renamed = {"rotary_emb_base": "rope_theta", "rotary_pct": "partial_rotary_factor"}
    old = {new: config[name] for name, new in renamed.items() if name in config}
    biases = _BIASES | ({Role.QKV, Role.ATTN_OUT} if settings.flag("attention_bias", True) else set())
    return DecoderSpec(
        family="gpt_neox",
        vocab=settings.integer("vocab_size"),
        hidden=settings.integer("hidden_size"),
        layers=layers,
        max_positions=settings.integer("max_position_embeddings", 2048),
        norm=Norm(type="layer", eps=settings.number("layer_norm_eps", 1e-5)),
        rope=rope("gpt_neox", {**old, **config}, head_dim, partial=0.25),
        attention=Attention(heads=count, kv_heads=count, head_dim=head_dim, scale=head_dim**-0.5, qkv="heads"),
        mlp=Mlp(
            inner=settings.integer("intermediate_size"),
            activation=settings.activation("gpt_neox", "hidden_act", "gelu", ("gelu", "gelu_tanh")),
            gated=False,
        ),
        naming_schemes=(naming_scheme(layers, _LAYER, outside=_OUTSIDE, prefix="gpt_neox.layers.", biases=biases),),
        parallel=settings.flag("use_parallel_residual", True),
    )


FAMILY: Final = Family(
    model_type="gpt_neox",
    describe=describe,
    llama_cpp=Architecture(
        name="gptneox",
        keys=PLAIN_KEYS - {"attention.head_count_kv", "rope.freq_base", "file_type"}
        | {"rope.dimension_count", "use_parallel_residual"},
        head_length="never",
        head="must",
        biases=SEQUENTIAL | QKV,
        needed=SEQUENTIAL | {Role.QKV},
        scalings=frozenset(),
        square=True,
    ),
)
