"""The class ``Family``, whose instances are the entries of the table of model families."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from exporter.families.llama_cpp import Architecture
from exporter.families.spec import DecoderSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """A supported model type.

    describe: a function that turns a config into a DecoderSpec. llama_cpp: llama.cpp's architecture for the model type.
    targets: the formats that can be written from the DecoderSpec.
    """

    model_type: str
    describe: Callable[[Mapping[str, Any]], DecoderSpec]
    llama_cpp: Architecture
    targets: tuple[str, ...] = ("gguf", "onnx")
