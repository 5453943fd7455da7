"""Options of the format gguf-lora."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from exporter.formats.target import FormatOptions, dtype_option


@dataclass(frozen=True, kw_only=True)
class GgufLoraOptions(FormatOptions):
    """Options for writing only the adapter, as a GGUF LoRA for ``llama-cli --lora``."""

    section: ClassVar[str] = "gguf-lora"

    dtype: str | None = dtype_option()

    @property
    def label(self) -> str:
        """A short text that names the requested dtype."""
        return self.dtype or "f32"
