"""Render the Modelfile from which Ollama loads a GGUF of the release.

The Modelfile has no TEMPLATE, because Ollama reads the chat template from the GGUF. A chat template translated into
Ollama's own template language might differ from the original. The Modelfile lists the stop strings, which end a reply,
because some versions of Ollama do not read stop strings from the GGUF.
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

    Return None if the model has no GGUF in a single file. Ollama cannot load a GGUF that is split into two or more
    files. folder: the release folder with the GGUF; the tokens that end a reply are read from the header of the GGUF.
    Raises UnreadableFile.
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
    """Return the elements of ``tokens`` that end a text or a turn, each in quotes.

    Tokens that would need escaping are omitted, because the Modelfile format has no escapes.
    """
    ids = dict.fromkeys(metadata[key] for key in _ENDS if isinstance(metadata.get(key), int))
    for text in (tokens[token_id] for token_id in ids if 0 <= token_id < len(tokens)):
        if text.isprintable() and '"' not in text and text:
            yield f'"{text}"'
