"""Refuse models that llama.cpp's converter or llama.cpp itself is known to get wrong.

Each row of ``FAULTS`` names classes of transformers and a condition on the config. For these models, the converter
stops, llama.cpp does not load the GGUF, or llama.cpp computes other logits than transformers. The faults were found
with tiny models and llama-cpp-python ``VERSION``. A test runs the converter and llama.cpp for each row, and fails when
llama.cpp no longer has the fault.

transformers 5 does not write some keys of config.json that published checkpoints have and that the converter reads.
Such a key is missing from checkpoints that transformers 5 has saved.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from exporter.errors import NotExpressible
from exporter.formats.gguf.converter.conditions import (
    Condition,
    Config,
    Shapes,
    always,
    exaone_windows,
    four_times,
    has,
    is_other_period,
    no_rotary_factor,
    other_image_ids,
    other_shared_width,
    other_sparsity,
    partial_rotation,
    rope_of,
    several_shared_heads,
    two_rope_bases,
    unnamed_scores,
    untransposed,
    untruncated_yarn,
    without,
)
from exporter.formats.gguf.converter.source import text_architecture

#: The version of llama-cpp-python in which the faults were found.
VERSION: Final = "0.3.36"
_OTHER_FORMAT: Final = "use --to hf or --to onnx"


@dataclass(frozen=True)
class Fault:
    """A fault of llama.cpp or of llama.cpp's converter.

    architectures: classes of transformers. applies, stored: whether a model has the fault, by the fields of the text
    model's config and by the shapes of the stored tensors. reason: what is wrong. instead: what the user can do.
    """

    architectures: tuple[str, ...]
    applies: Condition
    reason: str
    instead: str = _OTHER_FORMAT
    stored: Callable[[Shapes], bool] = lambda _shapes: True


def fault_of(config: Config, shapes: Shapes) -> Fault | None:
    """Return the first row of ``FAULTS`` that applies to a model, or None.

    config: the content of config.json. shapes: the shapes of the stored tensors, by name.
    """
    nested = config.get("text_config")
    fields = {**config, **nested} if isinstance(nested, dict) else config
    architecture = text_architecture(config)
    for fault in FAULTS:
        if architecture in fault.architectures and fault.applies(fields) and fault.stored(shapes):
            return fault
    return None


def refuse_faults(config: Config, shapes: Shapes, name: str) -> None:
    """Raise NotExpressible if a row of ``FAULTS`` applies to a model.

    config, shapes: as for ``fault_of``. name: names the model in the error message.
    """
    if fault := fault_of(config, shapes):
        raise NotExpressible(
            f"gguf: {name}",
            f"{text_architecture(config)}: {fault.reason} (as of llama-cpp-python {VERSION})",
            instead=fault.instead,
        )


def _missing(key: str, *architectures: str) -> Fault:
    return Fault(
        architectures,
        without(key),
        f"llama.cpp's converter reads the key {key} of config.json, which transformers 5 does not write",
        f"copy the key {key} from the config.json of the published model",
    )


#: The known faults. A row without a condition holds for every model of the class.
FAULTS: Final[tuple[Fault, ...]] = (
    Fault(
        (
            "DeepseekV3ForCausalLM",
            "DeepseekV32ForCausalLM",
            "Dots1ForCausalLM",
            "ExaoneMoeForCausalLM",
            "Glm4MoeLiteForCausalLM",
            "GlmMoeDsaForCausalLM",
            "MiniMaxM2ForCausalLM",
        ),
        unnamed_scores,
        "llama.cpp's converter reads scoring_func of config.json, which transformers 5 does not write; without the "
        "key, llama.cpp computes the experts' scores with softmax, or does not load the GGUF",
        'copy the key scoring_func from the config.json of the published model ("sigmoid")',
    ),
    _missing("route_norm", "AfmoeForCausalLM"),
    _missing("rotary_pct", "Cohere2ForCausalLM"),
    _missing("num_hash_layers", "DeepseekV4ForCausalLM"),
    _missing("scoring_func", "Dots3NoteForCausalLM", "Dots3NoteForConditionalGeneration"),
    _missing("head_dim", "FalconH1ForCausalLM"),
    _missing("first_k_dense_replace", "Glm4MoeLiteForCausalLM"),
    _missing("linear_attn_config", "Glm5NextForConditionalGeneration"),
    _missing("moe_intermediate_size", "HunYuanMoEV1ForCausalLM"),
    _missing("hybrid_layer_pattern", "MiMoV2FlashForCausalLM"),
    _missing("rotary_dim", "MiniMaxM2ForCausalLM"),
    _missing("n_shared_experts", "MiniMaxM3SparseForConditionalGeneration"),
    _missing("num_attention_groups", "Step3p7ForConditionalGeneration"),
    Fault(
        ("GraniteMoeHybridForCausalLM",),
        lambda config: "full_attention" in (config.get("layer_types") or ()),
        "llama.cpp's converter knows the layer types attention and mamba, but transformers 5 writes full_attention and "
        "linear_attention",
        "copy the key layer_types from the config.json of the published model",
    ),
    Fault(
        ("Glm4vForConditionalGeneration", "GlmOcrForConditionalGeneration", "SolarOpenForCausalLM"),
        no_rotary_factor,
        "llama.cpp's converter assumes partial_rotary_factor 0.5 if config.json lacks the key, but transformers "
        "assumes 1.0",
        "add the key partial_rotary_factor to rope_parameters of config.json",
    ),
    Fault(
        ("AfmoeForCausalLM",),
        lambda config: not config.get("mup_enabled"),
        "llama.cpp always multiplies the embedding by the square root of the hidden size, but mup_enabled is false",
    ),
    Fault(
        ("AfmoeForCausalLM", "Cohere2ForCausalLM"),
        is_other_period(4),
        "llama.cpp assumes that every fourth layer has full attention and that all others have a sliding window",
    ),
    Fault(
        ("LagunaForCausalLM",),
        is_other_period(4, full_first=True),
        "llama.cpp assumes that the first of four layers has full attention and that all others have a sliding window",
    ),
    Fault(
        ("Exaone4ForCausalLM", "Exaone4_5_ForConditionalGeneration"),
        exaone_windows,
        "llama.cpp applies sliding windows to models of exactly 64 layers only",
    ),
    Fault(
        ("Llama4ForCausalLM", "Llama4ForConditionalGeneration"),
        lambda config: config.get("attention_chunk_size") not in (None, 8192),
        "llama.cpp assumes attention_chunk_size 8192",
    ),
    Fault(
        ("GptOssForCausalLM",),
        untruncated_yarn,
        "llama.cpp rounds the bounds of YaRN's frequency ramp, but rope_parameters has truncate = false",
    ),
    Fault(
        ("BambaForCausalLM",),
        partial_rotation,
        "llama.cpp's converter reorders all dimensions of a head for the rotary embedding, but the model rotates only "
        "a part of the dimensions",
    ),
    Fault(
        ("MellumForCausalLM",),
        two_rope_bases,
        "llama.cpp rotates layers with a sliding window with the rope_theta of the layers with full attention",
    ),
    Fault(
        ("Gemma3nForCausalLM", "Gemma3nForConditionalGeneration"),
        other_sparsity,
        "llama.cpp assumes the sizes of the published models: activation sparsity 0.95 in the first 10 layers, 20 "
        "layers with a cache of their own, full attention in every fifth layer, hidden_size_per_layer_input 256, "
        "laurel_rank 64 and altup_num_inputs 4",
    ),
    Fault(
        ("HunYuanVLForConditionalGeneration",),
        lambda config: len(rope_of(config).get("mrope_section") or rope_of(config).get("xdrope_section") or ()) > 3,
        "llama.cpp does not rotate the dimensions of the fourth section of the rotary embedding of a text",
    ),
    Fault(
        ("Ernie4_5_MoeForCausalLM",),
        other_shared_width,
        "llama.cpp's converter assumes that shared experts have the width intermediate_size / num_key_value_heads",
    ),
    Fault(
        ("PhiForCausalLM",),
        four_times("intermediate_size"),
        "llama.cpp's converter assumes that intermediate_size is four times hidden_size",
    ),
    Fault(
        ("FalconForCausalLM",),
        four_times("ffn_hidden_size"),
        "llama.cpp's converter assumes that ffn_hidden_size is four times hidden_size",
    ),
    Fault(
        ("FalconForCausalLM",),
        several_shared_heads,
        "llama.cpp's converter reads num_kv_heads although multi_query models have a single key-value head",
        "set num_kv_heads to 1 in config.json",
    ),
    Fault(
        ("NemotronHForCausalLM",),
        lambda config: "mlp" in (config.get("layers_block_type") or ()),
        "llama.cpp's converter does not know layers of the type mlp in layers_block_type",
    ),
    Fault(
        ("ChameleonForConditionalGeneration",),
        other_image_ids,
        "llama.cpp assumes that the token ids 4 to 8195 are those of image tokens",
    ),
    Fault(
        ("BitNetForCausalLM",),
        always,
        "llama.cpp's converter does not know the names that transformers gives to the weights, and would round the "
        "weights to -1, 0 and 1",
    ),
    Fault(
        ("GraniteSpeechForConditionalGeneration", "GraniteSpeechPlusForConditionalGeneration"),
        always,
        "llama.cpp's converter lists the class, but has no converter of the text model for the class",
    ),
    Fault(
        ("HYV4ForCausalLM",),
        always,
        "llama.cpp's converter does not know the names of the hyper-connections that transformers 5 writes",
        stored=has("hc_head_base", "hc_head_base.weight"),
    ),
    Fault(
        ("KimiLinearForCausalLM",),
        always,
        "llama.cpp's converter does not know the names that transformers 5 gives to the MLP of dense layers",
        stored=has("block_sparse_moe.down_proj.weight"),
    ),
    Fault(
        ("Qwen3VLMoeForConditionalGeneration",),
        always,
        "llama.cpp's converter transposes the experts' matrices, but transformers 5 saved them transposed",
        "use the published checkpoint as the base",
        stored=untransposed,
    ),
    Fault(
        ("Gemma4ForCausalLM", "Gemma4ForConditionalGeneration", "Gemma4UnifiedForConditionalGeneration"),
        lambda config: config.get("final_logit_softcapping") is None,
        "llama.cpp assumes final_logit_softcapping 30 if config.json has no value",
    ),
    Fault(
        ("Gemma4UnifiedForConditionalGeneration",),
        without("expert_intermediate_size", "moe_intermediate_size"),
        "llama.cpp's converter requires moe_intermediate_size, also of models without experts",
    ),
    Fault(
        ("Qwen4ExpForCausalLM", "Qwen4ExpForConditionalGeneration"),
        always,
        "llama.cpp's logits differ from those of transformers; llama.cpp marks its graph of this class for "
        "reimplementation",
    ),
)
