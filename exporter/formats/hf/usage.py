"""Make the usage example for the model card of a Hugging Face checkpoint."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence

from exporter.formats.usage import PROMPT, ReleasedArtifact, Usage


def checkpoint_usage(artifacts: Sequence[ReleasedArtifact], name: str) -> Iterator[Usage]:
    """Yield example code that runs a Hugging Face checkpoint with a transformers pipeline."""
    yield Usage(
        "transformers",
        "python",
        "from transformers import pipeline\n\n"
        f'generate = pipeline("text-generation", {json.dumps(f"./{artifacts[0].path}")})\n'
        f'print(generate("{PROMPT}", max_new_tokens=64))',
    )
