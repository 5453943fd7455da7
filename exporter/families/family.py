"""A row of the family table."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from exporter.families.llama_cpp import Architecture
from exporter.families.spec import DecoderSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One model type. describe: reads its config. llama_cpp: how a GGUF holds it.

    targets: the formats that can hold the model by its decoder alone.
    """

    model_type: str
    describe: Callable[[Mapping[str, Any]], DecoderSpec]
    llama_cpp: Architecture
    targets: tuple[str, ...] = ("gguf", "onnx")
