"""Usage example of a GGUF LoRA for model cards."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence

from exporter.formats.usage import PROMPT, ReleasedArtifact, Usage


def gguf_lora_usage(artifacts: Sequence[ReleasedArtifact], name: str) -> Iterator[Usage]:
    """Yield the code for running a GGUF LoRA with llama.cpp, on top of a GGUF of the base model."""
    path = shlex.quote(artifacts[0].path)
    comment = "# BASE.gguf is a GGUF of the base model without the adapter"
    yield Usage("llama.cpp with LoRA", "sh", f"{comment}\nllama-cli -m BASE.gguf --lora {path} -p '{PROMPT}'")
