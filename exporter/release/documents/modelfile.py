"""Render the Modelfile from which Ollama loads a GGUF of the release.

The Modelfile has no TEMPLATE, because Ollama reads the chat template from the GGUF. A chat template that was translated
into Ollama's own template language might render prompts differently. The Modelfile lists the stop strings, which end a
reply, because some versions of Ollama do not read stop strings from the GGUF.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from exporter.formats.gguf.options import GgufOptions
from exporter.formats.gguf.usage import MODELFILE, preferred_gguf
from exporter.release.documents.artifacts import artifacts_of
from exporter.release.documents.manifest import Manifest
from exporter.sources.gguf.file import GgufFile
from exporter.sources.gguf.header import GgufArray

NAME: Final = MODELFILE
_ENDS: Final = ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id")
_TOKENS: Final = "tokenizer.ggml.tokens"


def to_bytes(folder: Path, manifest: Manifest, model: str) -> bytes | None:
    """Render the Modelfile of ``model`` (a key of the manifest's models).

    Return None if the release contains no GGUF of the model, or only GGUFs that are split into several files. Ollama
    cannot load a split GGUF. folder: the release folder, which must already contain the GGUF, because the tokens that
    end a reply are read from the GGUF's header. Raises UnreadableFile.
    """
    artifacts = artifacts_of(manifest, model, GgufOptions.section)
    files = preferred_gguf([artifact for artifact in artifacts if not artifact.is_split])
    if not files:
        return None
    entry = manifest.models[model]
    lines = [f"# {entry.name}, {files[0].storage}. The chat template is that of the GGUF."]
    lines += [f"FROM ./{files[0].path}", *(f"# FROM ./{file.path}" for file in files[1:])]
    metadata = GgufFile.open(folder / entry.folder / files[0].path).metadata
    tokens = metadata.get(_TOKENS)
    texts = tokens.values() if isinstance(tokens, GgufArray) else []
    lines += [f"PARAMETER stop {text}" for text in stops(texts, metadata)]
    return ("\n".join(lines) + "\n").encode()


def stops(tokens: Sequence[str], metadata: Mapping[str, Any]) -> Iterator[str]:
    """Yield the end-of-text, end-of-turn and end-of-message tokens that the GGUF's ``metadata`` names, each in quotes.

    Tokens with quotes or control characters are omitted, because the Modelfile format has no escape sequences.
    """
    ids = dict.fromkeys(metadata[key] for key in _ENDS if isinstance(metadata.get(key), int))
    for text in (tokens[token_id] for token_id in ids if 0 <= token_id < len(tokens)):
        if text.isprintable() and '"' not in text and text:
            yield f'"{text}"'
