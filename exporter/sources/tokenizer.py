"""tokenizer.json as far as merging needs it: which ids have a token.

Decoded by a schema that names the ids alone: merges and the rest are passed over without becoming objects, which
keeps a vocabulary of 262,144 below the memory of the merge that it is for.
"""

from __future__ import annotations

import re
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Final

import msgspec

from exporter.errors import UnreadableFile
from exporter.sources.files import read_file

#: Twice the largest vocabulary known, and four times its text, which may take four bytes a character: a hostile file
#: must not turn its bytes into more objects than that.
_MAX_TOKENS: Final = 1 << 19
_MAX_VOCAB_BYTES: Final = 32 << 20
_Id = Annotated[int, msgspec.Meta(ge=0)]


class _Piece(msgspec.Struct, array_like=True, gc=False):
    """One [piece, score] of a unigram vocabulary: that it is there is all that counts."""


class _Token(msgspec.Struct, gc=False):
    id: _Id


class _Model(msgspec.Struct):
    vocab: msgspec.Raw


class _Tokenizer(msgspec.Struct):
    model: _Model
    added_tokens: msgspec.Raw = msgspec.Raw(b"[]")


def token_ids(path: Path) -> set[int]:
    """Every id that ``path`` (a tokenizer.json) gives to a token, added tokens included.

    Memory: the file and its vocabulary. Raises UnreadableFile for what is no tokenizer of the tokenizers library.
    """
    text = read_file(path)
    try:
        tokenizer = msgspec.json.decode(text, type=_Tokenizer)
        vocab = _decode(path, tokenizer.model.vocab, "model.vocab", dict[str, _Id] | list[_Piece])
        added = _decode(path, tokenizer.added_tokens, "added_tokens", list[_Token])
    except (ValueError, RecursionError) as exc:
        raise UnreadableFile(path, f"expected a tokenizer of the tokenizers library: {exc}") from exc
    # a unigram vocabulary is in the order of its ids
    return set(vocab.values() if isinstance(vocab, dict) else range(len(vocab))) | {token.id for token in added}


def _decode(path: Path, raw: msgspec.Raw, what: str, schema: Any) -> Any:
    """``raw`` by ``schema``; its items are counted by their commas before one of them is made."""
    view = memoryview(raw)
    if view.nbytes > _MAX_VOCAB_BYTES:
        raise UnreadableFile(path, f"{what}: expected at most {_MAX_VOCAB_BYTES} bytes, found {view.nbytes}")
    if next(islice(re.finditer(b",", view), _MAX_TOKENS, None), None):
        raise UnreadableFile(path, f"{what}: expected at most {_MAX_TOKENS} tokens, found more")
    try:
        return msgspec.json.decode(raw, type=schema)
    except msgspec.ValidationError as exc:
        raise UnreadableFile(path, f"{what}: {exc}") from exc
