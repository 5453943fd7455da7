"""The table of tokens that a GGUF holds: a text, a type and, for SentencePiece, a score for each row of the matrix."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from exporter.errors import BadInput, NotExpressible, UnreadableFile
from exporter.io.json_objects import read_object
from exporter.sources.hf.sentencepiece import CONTROL, NORMAL, UNUSED, USER_DEFINED

#: Scores of rows without a token and of added tokens. llama.cpp compares neither; its converter writes these.
PADDING_SCORE: Final = -10000.0
ADDED_SCORE: Final = -1000.0

_FLAGS: Final = ("lstrip", "rstrip", "single_word")


@dataclass(frozen=True, slots=True)
class AddedToken:
    """A token beside the model's own. flags: those of ``_FLAGS`` that are set. stated: tokenizer_config.json has it."""

    id: int
    text: str
    special: bool
    normalized: bool = False
    flags: tuple[str, ...] = ()
    stated: bool = False

    @property
    def stored(self) -> tuple[str, int]:
        """Text and type in a GGUF; the type follows from its flag and its looks."""
        if self.special or _looks_special(self.text):
            return self.text, CONTROL
        # llama.cpp looks for these in the text as it comes, so SentencePiece's mark must be a space already.
        return self.text.replace("\u2581", " "), USER_DEFINED


class TokenTable:
    """Tokens by id, for ``rows`` rows of the matrix. ``source`` is the file to name in messages."""

    def __init__(self, rows: int, source: Path) -> None:
        """Every row begins as one that no token names."""
        self.source = source
        self.texts: list[str | None] = [None] * rows
        self.types = [UNUSED] * rows
        self.scores = [PADDING_SCORE] * rows

    def check_ids(self, ids: Sequence[int]) -> None:
        """Raises BadInput for an id outside the matrix."""
        for token_id in (min(ids, default=0), max(ids, default=0)):
            if not 0 <= token_id < max(len(self.texts), 1):
                rows = len(self.texts)
                raise BadInput(
                    f"{self.source}: expected token ids below {rows} (rows of the embedding), found {token_id}"
                )

    def put(self, token_id: int, text: str, kind: int, score: float = 0.0) -> None:
        """Name a row, whatever it was before."""
        self.texts[token_id], self.types[token_id], self.scores[token_id] = text, kind, score

    def put_all(self, vocab: Mapping[str, int], kind: int) -> None:
        """Name a row each, text → id; no scores. A loop of its own: vocabularies have a quarter of a million tokens."""
        texts, types = self.texts, self.types
        for text, token_id in vocab.items():
            texts[token_id] = text
            types[token_id] = kind

    def add(self, token: AddedToken) -> None:
        """Name a row by an added token."""
        self.put(token.id, *token.stored, ADDED_SCORE)

    def complete(self) -> list[str]:
        """All texts; rows that no token names become ``[PAD{id}]``.

        Raises NotExpressible where two rows have one text or one has none: llama.cpp ends the process on such a file.
        """
        complete = [f"[PAD{token_id}]" if text is None else text for token_id, text in enumerate(self.texts)]
        if len(set(complete)) != len(complete) or "" in complete:
            twice, count = Counter(complete).most_common(1)[0]
            found = f"{twice!r} {count} times" if count > 1 else "an empty token"
            raise NotExpressible(
                f"gguf: {self.source}", f"llama.cpp needs every token to have a text of its own, found {found}"
            )
        return complete


def added_tokens(
    files: Mapping[str, Path], content: Mapping[str, Any], settings: Mapping[str, Any]
) -> list[AddedToken]:
    """Added tokens, by id: of tokenizer.json (``content``), else tokenizer_config.json, else added_tokens.json.

    settings: the parsed tokenizer_config.json. Raises UnreadableFile for entries that are no tokens.
    """
    decoder = settings.get("added_tokens_decoder") or {}
    stated: dict[int, AddedToken] = {}
    if not isinstance(decoder, dict):
        raise UnreadableFile(
            files["tokenizer_config.json"], f"added_tokens_decoder: expected a table, found {decoder!r:.80}"
        )
    for key, entry in decoder.items():
        token = _token(files["tokenizer_config.json"], entry, key, stated=True)
        stated[token.id] = token
    found: dict[int, AddedToken] = {}
    if path := files.get("added_tokens.json"):
        for text, token_id in read_object(path).items():
            token = _token(path, {"content": text}, token_id, stated=True)
            found[token.id] = token
    found |= stated
    if content:
        path = files["tokenizer.json"]
        entries = content.get("added_tokens") or []
        if not isinstance(entries, list):
            raise UnreadableFile(path, f"added_tokens: expected a list, found {entries!r:.80}")
        for entry in entries:
            token_id = entry.get("id") if isinstance(entry, dict) else None
            token = _token(path, entry, token_id, stated=token_id in stated)
            found[token.id] = token
    return [found[token_id] for token_id in sorted(found)]


def _token(path: Path, entry: Any, token_id: Any, *, stated: bool) -> AddedToken:
    if isinstance(token_id, str) and token_id.isdecimal():
        token_id = int(token_id)
    if not isinstance(entry, dict) or type(token_id) is not int or not isinstance(entry.get("content"), str):
        raise UnreadableFile(path, f"added tokens: expected tokens with id and content, found {entry!r:.80}")
    flags = tuple(flag for flag in _FLAGS if entry.get(flag))
    return AddedToken(
        token_id, entry["content"], bool(entry.get("special")), bool(entry.get("normalized")), flags, stated
    )


def flag_notes(added: Iterable[AddedToken]) -> list[str]:
    """Flags that llama.cpp has no place for. They change how text around such a token is split."""
    notes, added = [], list(added)
    for flag in _FLAGS:
        notes += _note([token for token in added if flag in token.flags], f"{flag} has no place in a GGUF")
    return notes


def normalised_notes(added: Iterable[AddedToken]) -> list[str]:
    """Tokens that transformers looks for in the normalised text, llama.cpp in the text as it comes."""
    found = [token for token in added if token.normalized]
    return _note(found, "transformers looks for it after its normalizer has put marks for spaces, llama.cpp before")


def _note(tokens: list[AddedToken], what: str) -> list[str]:
    more = f" and {len(tokens) - 1} more" if len(tokens) > 1 else ""
    return [f"added token {tokens[0].text!r}{more}: {what}"] if tokens else []


def _looks_special(token: str) -> bool:
    """Tokens that are control tokens by their looks, whatever their flag says: llama.cpp's converter has this rule."""
    return (
        token in ("<pad>", "<mask>", "<2mass>", "[@BOS@]")
        or (token.startswith("<|") and token.endswith("|>"))
        or (token.startswith("<\uff5c") and token.endswith("\uff5c>"))
        or (token.startswith("<unused") and token.endswith(">"))
    )


__all__ = [
    "ADDED_SCORE",
    "NORMAL",
    "PADDING_SCORE",
    "AddedToken",
    "TokenTable",
    "added_tokens",
    "flag_notes",
    "normalised_notes",
]
