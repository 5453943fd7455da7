"""Modelfile: how Ollama loads a GGUF of the release.

There is no TEMPLATE in it: Ollama reads the chat template that the GGUF holds, and a translation to its own language
could only differ. The texts at which a reply ends are told, for not every version takes them from the GGUF.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from exporter.release.documents.manifest import ArtifactEntry, Manifest
from exporter.sources.gguf.file import GgufFile
from exporter.sources.gguf.header import GgufArray

NAME: Final = "Modelfile"
#: Which of several GGUF files Ollama is given: the smallest that loses next to nothing, then its neighbours.
_PREFERRED: Final = ("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "F16", "BF16", "F32")
_ENDS: Final = ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id")
#: The end of the name of a split file.
PART: Final = re.compile(r"-\d{5}(?=-of-\d{5}\.gguf$)")
_TOKENS: Final = "tokenizer.ggml.tokens"


def to_bytes(folder: Path, manifest: Manifest, model: str) -> bytes | None:
    """The Modelfile of ``model`` (a key of the manifest's models).

    None where there is no GGUF for it that is one file: Ollama does not join parts. ``folder`` is the
    release's: the header of the GGUF says which tokens end a reply.
    """
    files = [one for one in ranked_files(manifest, model) if not PART.search(one.path)]
    if not files:
        return None
    below = manifest.models[model].folder
    paths = [one.path.removeprefix(f"{below}/") if below else one.path for one in files]
    lines = [f"# {manifest.models[model].name}, {files[0].storage}. The chat template is that of the GGUF."]
    lines += [f"FROM ./{paths[0]}", *(f"# FROM ./{path}" for path in paths[1:])]
    metadata = GgufFile.open(folder / files[0].path).metadata
    tokens = metadata.get(_TOKENS)
    words = tokens.values() if isinstance(tokens, GgufArray) else []
    lines += [f"PARAMETER stop {text}" for text in stops(words, metadata)]
    return ("\n".join(lines) + "\n").encode()


def ranked_files(manifest: Manifest, model: str) -> list[ArtifactEntry]:
    """The GGUF artifacts of ``model``, the preferred one first."""
    found = [one for one in manifest.artifacts if one.model == model and one.format == "gguf"]
    return sorted(found, key=lambda one: (_rank(one.storage), one.path))


def _rank(storage: str) -> int:
    upper = storage.upper()
    return _PREFERRED.index(upper) if upper in _PREFERRED else len(_PREFERRED)


def stops(tokens: Sequence[str], metadata: Mapping[str, Any]) -> Iterator[str]:
    """Those of ``tokens`` that end a text or a turn, quoted. What Modelfiles cannot quote is left out: no escapes."""
    ids = dict.fromkeys(metadata[key] for key in _ENDS if isinstance(metadata.get(key), int))
    for word in (tokens[token] for token in ids if 0 <= token < len(tokens)):
        if word.isprintable() and '"' not in word and word:
            yield f'"{word}"'
