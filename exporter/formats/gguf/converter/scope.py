"""Refuse models whose GGUF ttexport cannot verify: encoders, classifiers, and encoder-decoders."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from exporter.errors import NotExpressible
from exporter.formats.gguf.converter.source import text_architecture

#: Endings of the classes that compute logits of the next token.
_GENERATING: Final = ("ForCausalLM", "ForConditionalGeneration", "LMHeadModel")


def refuse_unverifiable(config: Mapping[str, Any], name: str) -> None:
    """Raise NotExpressible if a model is no decoder that computes logits of the next token.

    config: the content of config.json. name: names the model in the error message.
    """
    architecture = text_architecture(config)
    if architecture is None:
        return
    if config.get("is_encoder_decoder"):
        reason = "llama.cpp runs encoder and decoder apart"
    elif not architecture.endswith(_GENERATING):
        reason = "the model has no logits of the next token"
    else:
        return
    raise NotExpressible(
        f"gguf: {name}",
        f"{architecture}: {reason}, so ttexport cannot compare llama.cpp's results with those of transformers",
        instead="use --to hf or --to onnx",
    )
