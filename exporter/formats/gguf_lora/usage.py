"""Make the usage example for the model card of a GGUF LoRA."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence

from exporter.formats.usage import PROMPT, ReleasedArtifact, Usage


def gguf_lora_usage(artifacts: Sequence[ReleasedArtifact], name: str) -> Iterator[Usage]:
    """Yield example code that runs llama.cpp with a GGUF of the base model and the GGUF LoRA."""
    path = shlex.quote(artifacts[0].path)
    comment = "# BASE.gguf is a GGUF of the base model without the adapter"
    yield Usage("llama.cpp with LoRA", "sh", f"{comment}\nllama-cli -m BASE.gguf --lora {path} -p '{PROMPT}'")
