"""tokenizer.json as far as merging needs it: which ids have a token."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from exporter.errors import UnreadableFile
from exporter.sources.checkpoint import read_json


def token_ids(path: Path) -> set[int]:
    """Every id that ``path`` (a tokenizer.json) gives to a token, added tokens included.

    Raises UnreadableFile for a file that is no tokenizer of the tokenizers library.
    """
    content = read_json(path, max_nbytes=1 << 30)
    model, added = content.get("model"), content.get("added_tokens", [])
    vocab = model.get("vocab") if isinstance(model, Mapping) else None
    if isinstance(vocab, Mapping):
        ids = list(vocab.values())
    elif isinstance(vocab, list):  # unigram: [piece, score] in the order of their ids
        ids = list(range(len(vocab)))
    else:
        raise UnreadableFile(path, f"model.vocab: expected a table of tokens, found {type(vocab).__name__}")
    if not isinstance(added, list) or not all(isinstance(token, Mapping) for token in added):
        raise UnreadableFile(path, f"added_tokens: expected a list of tokens, found {added!r:.80}")
    ids += [token.get("id") for token in added]
    if not all(type(item) is int and item >= 0 for item in ids):
        raise UnreadableFile(path, "expected integer token ids of 0 or more, found another value")
    return set(ids)
