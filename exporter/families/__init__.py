"""The table of model families.

Each model family has its own module, its own entry in the table ``FAMILIES``, and its own test fixture.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from exporter.errors import NotExpressible
from exporter.families.family import Family
from exporter.families.layer_norm import cohere, cohere2, gpt2, gpt_neox, nemotron, olmo, stablelm, starcoder2
from exporter.families.llama_like import adjacent_pairs, arcee, hunyuan, ministral3, seed_oss
from exporter.families.rms_norm import exaone4, gemma, glm4, granite, llama, mistral, olmo2, olmo3, phi3, qwen, smollm3
from exporter.families.spec import DecoderSpec


def _by_type(*families: Family) -> dict[str, Family]:
    table = {family.model_type: family for family in families}
    assert len(table) == len(families), "two model families have the same model_type"
    return table


FAMILIES: Final[Mapping[str, Family]] = _by_type(
    llama.FAMILY,
    *mistral.FAMILIES,
    *qwen.FAMILIES,
    *gemma.FAMILIES,
    phi3.FAMILY,
    gpt2.FAMILY,
    gpt_neox.FAMILY,
    olmo2.FAMILY,
    granite.FAMILY,
    starcoder2.FAMILY,
    cohere.FAMILY,
    stablelm.FAMILY,
    smollm3.FAMILY,
    seed_oss.FAMILY,
    arcee.FAMILY,
    *adjacent_pairs.FAMILIES,
    *ministral3.FAMILIES,
    hunyuan.FAMILY,
    olmo3.FAMILY,
    exaone4.FAMILY,
    glm4.FAMILY,
    cohere2.FAMILY,
    olmo.FAMILY,
    nemotron.FAMILY,
)


#: Alternatives to suggest for a model without a family, by target.
_INSTEAD: Final = {
    "gguf": "run ttexport converter install once (or give --converter PATH), so that llama.cpp's converter can write "
    "the model, or use ttexport patch to write token rows into an existing GGUF",
}


def has_family(config: Mapping[str, Any], target: str) -> bool:
    """Whether the model of ``config`` belongs to a family that can be described for ``target`` ("gguf" or "onnx")."""
    return _family(config, target) is not None


def describe(config: Mapping[str, Any], target: str) -> DecoderSpec:
    """Describe the decoder of ``config`` (a parsed config.json) for ``target`` ("gguf" or "onnx").

    Raises NotExpressible for a model_type that belongs to no family, and BadInput for an invalid config.
    """
    family = _family(config, target)
    if family is None:
        model_type = config.get("model_type")
        known = ", ".join(name for name, row in FAMILIES.items() if target in row.targets)
        raise NotExpressible(
            target,
            f"model_type {model_type!r} is not a built-in model family (built-in: {known})",
            instead=_INSTEAD.get(target, "use --to hf to export this model"),
        )
    return family.describe(config)


def _family(config: Mapping[str, Any], target: str) -> Family | None:
    model_type = config.get("model_type")
    family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    return family if family and target in family.targets else None
