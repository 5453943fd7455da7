"""Make usage examples for model cards of GGUF files. Each example runs llama.cpp or Ollama."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from typing import Final

from exporter.formats.usage import PROMPT, ReleasedArtifact, Usage

#: Name of the file that ``ollama create`` reads.
MODELFILE: Final = "Modelfile"
#: File types in the order in which a model card recommends GGUF files: the smallest file type with almost no loss
#: first, then file types of similar size.
_PREFERRED: Final = ("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "F16", "BF16", "F32")


def preferred_gguf(artifacts: Sequence[ReleasedArtifact]) -> list[ReleasedArtifact]:
    """Sort GGUF ``artifacts`` by file type, with the most recommended file type first."""

    def rank(artifact: ReleasedArtifact) -> tuple[int, str]:
        storage = artifact.storage.upper()
        return _PREFERRED.index(storage) if storage in _PREFERRED else len(_PREFERRED), artifact.path

    return sorted(artifacts, key=rank)


def gguf_usage(artifacts: Sequence[ReleasedArtifact], name: str) -> Iterator[Usage]:
    """Yield example code that runs a GGUF with llama.cpp and, if at least one GGUF is not split, with Ollama.

    The example for llama.cpp runs the GGUF with the most recommended file type. The example for Ollama uses the file
    ``Modelfile`` in the folder of the model card.
    """
    preferred = preferred_gguf(artifacts)[0]
    yield Usage("llama.cpp", "sh", f"llama-cli -m {shlex.quote(preferred.path)} -p '{PROMPT}'")
    if not all(artifact.is_split for artifact in artifacts):
        model = _ollama_name(name)
        yield Usage("Ollama", "sh", f"ollama create {model} -f {MODELFILE}\nollama run {model} '{PROMPT}'")


def _ollama_name(name: str) -> str:
    """Turn ``name`` into a valid Ollama model name: lower case letters and digits, separated by ``-_.``."""
    letters = [letter if letter.isascii() and (letter.isalnum() or letter in "-_.") else "-" for letter in name]
    return "".join(letters).strip("-_.").lower() or "model"
