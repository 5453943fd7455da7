"""Choose the name of the model in a GGUF (general.name), from which llama.cpp derives flags of the model's tokens.

If the name contains phi-3 or phi3, llama.cpp drops the whitespace after nearly every added token. transformers drops
the whitespace after a token with the flag ``rstrip``, for which a GGUF has no metadata key. Therefore, the name of a
model whose tokens have the flag contains phi-3, and no other name contains phi-3.
Source: "Handle per token attributes" in llama_vocab::impl::load.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from exporter.errors import NotExpressible
from exporter.formats.gguf.metadata import model_name
from exporter.sources.hf.tokenizer import added_tokens, read_tokenizer

#: Parts of a name from which llama.cpp derives flags of tokens, in any case, and the text that replaces each part.
_MISREAD: Final = ((re.compile("(phi)-?(3)", re.IGNORECASE), r"\1_\2"), (re.compile("(modern)-(bert)", re.I), r"\1_\2"))
_STRIPS: Final = re.compile("phi-?3", re.IGNORECASE)
#: Added tokens after which llama.cpp keeps the whitespace even if the name contains phi-3.
_KEPT: Final = frozenset({"<unk>", "<s>", "<|endoftext|>"})
#: Tokens without which llama.cpp cannot load a file whose name contains phi-3.
_NEEDED: Final = _KEPT | {"</s>"}


@dataclass(frozen=True, slots=True)
class GeneralName:
    """The value of general.name.

    strips: whether the name makes llama.cpp drop the whitespace after added tokens. exact: whether llama.cpp then drops
    the whitespace after exactly the tokens with the flag ``rstrip``.
    """

    text: str
    strips: bool = False
    exact: bool = False


def general_name(path: Path, files: Mapping[str, Path]) -> GeneralName:
    """Return the name to write for a model. path: the base checkpoint. files: the auxiliary files of the merged model.

    Raises NotExpressible if the base's tokens have the flag ``rstrip`` and new tokens lack the flag, because llama.cpp
    then treats the texts around either the base's tokens or the new tokens unlike transformers.
    """
    name, tokenizer = model_name(path), files.get("tokenizer.json")
    flags = _strip_flags(read_tokenizer(tokenizer)) if tokenizer else {}
    stripped = {text for text, flag in flags.items() if flag}
    if tokenizer is None or not _strips(flags, stripped):
        return GeneralName(_without(name))
    lacking = flags.keys() - stripped - _KEPT
    base = path / "tokenizer.json"
    if new := sorted(lacking - (added_tokens(base).keys() if base.is_file() else set())):
        raise NotExpressible(
            f"gguf: {tokenizer}",
            f"llama.cpp drops the whitespace after all added tokens of this model or after none, but the new token "
            f"{new[0]!r} has no flag rstrip, unlike the base's added tokens",
            instead="set rstrip to true for the new tokens in the adapter's tokenizer.json",
        )
    return GeneralName(name if _STRIPS.search(name) else f"{name}-phi-3", strips=True, exact=not lacking)


def _strips(flags: Mapping[str, bool], stripped: Set[str]) -> bool:
    """Whether a name with phi-3 gives the correct flag to more of the added tokens than a name without phi-3."""
    lacking = flags.keys() - stripped - _KEPT
    return flags.keys() >= _NEEDED and len(stripped - _KEPT) > len(lacking) and not stripped & _KEPT


def _strip_flags(content: Mapping[str, Any]) -> dict[str, bool]:
    """Map the text of each added token to the token's flag ``rstrip``."""
    entries = content.get("added_tokens") or []
    return {str(entry.get("content")): bool(entry.get("rstrip")) for entry in entries if isinstance(entry, dict)}


def _without(name: str) -> str:
    for part, replacement in _MISREAD:
        name = part.sub(replacement, name)
    return name
