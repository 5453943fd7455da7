"""The table of families. A family is one file, one row of this table, one fixture."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from exporter.errors import NotExpressible
from exporter.families.layer_norm import cohere, gpt2, gpt_neox, stablelm, starcoder2
from exporter.families.rms_norm import gemma, granite, llama, mistral, olmo2, phi3, qwen, smollm3
from exporter.families.spec import DecoderSpec, Family


def _by_type(*families: Family) -> dict[str, Family]:
    table = {family.model_type: family for family in families}
    assert len(table) == len(families), "a model_type is in the table twice"
    return table


FAMILIES: Final[Mapping[str, Family]] = _by_type(
    Family("llama", llama.describe),
    Family("mistral", mistral.describe),
    Family("mixtral", mistral.describe_mixtral),
    Family("qwen2", qwen.describe_qwen2),
    Family("qwen3", qwen.describe_qwen3),
    Family("qwen3_moe", qwen.describe_qwen3_moe),
    Family("gemma", gemma.describe_gemma),
    Family("gemma2", gemma.describe_gemma2),
    Family("gemma3_text", gemma.describe_gemma3),
    # An ONNX folder has the whole model's config, by which clients would look for the vision tower.
    Family("gemma3", gemma.describe_gemma3_multimodal, targets=("gguf",)),
    Family("phi3", phi3.describe),
    Family("gpt2", gpt2.describe),
    Family("gpt_neox", gpt_neox.describe),
    Family("olmo2", olmo2.describe),
    Family("granite", granite.describe),
    Family("starcoder2", starcoder2.describe),
    Family("cohere", cohere.describe),
    Family("stablelm", stablelm.describe),
    Family("smollm3", smollm3.describe),
)


#: Alternatives for a model without a family, by target.
_INSTEAD: Final = {
    "gguf": "--converter PATH runs llama.cpp's own convert_hf_to_gguf.py on the merged checkpoint, "
    "and `ttexport patch` puts token rows into a GGUF that exists already",
}


def describe(config: Mapping[str, Any], target: str) -> DecoderSpec:
    """The spec of the decoder of ``config`` (a parsed config.json) for ``target`` ("gguf", "onnx").

    Raises NotExpressible for a model_type without a family, BadInput for a broken config.
    """
    model_type = config.get("model_type")
    family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if family is None or target not in family.targets:
        known = ", ".join(name for name, row in FAMILIES.items() if target in row.targets)
        raise NotExpressible(
            target,
            f"model_type {model_type!r} has no family here (known: {known})",
            instead=_INSTEAD.get(target, "--to hf can hold it"),
        )
    return family.describe(config)
