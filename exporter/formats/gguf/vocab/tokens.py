"""The token table of a GGUF, which gives each embedding row a text, a type and, for SentencePiece, a score."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from exporter.errors import BadInput, NotExpressible
from exporter.sources.hf.by_llama_cpp.tokens import looks_like_control
from exporter.sources.hf.sentencepiece import CONTROL, NORMAL, UNUSED, USER_DEFINED

#: llama.cpp's converter's scores for rows without a token and for added tokens. llama.cpp does not use the scores.
PADDING_SCORE: Final = -10000.0
ADDED_SCORE: Final = -1000.0

#: Flags of an added token that change the text around the token.
FLAGS: Final = ("lstrip", "rstrip", "single_word")


@dataclass(frozen=True, slots=True)
class AddedToken:
    """A token that was added to the vocabulary of a tokenizer.

    flags: the names of the flags (lstrip, rstrip, single_word) that are set for the token. listed: whether
    tokenizer.json contains the token. stated: whether tokenizer_config.json or added_tokens.json states the token's id.
    """

    id: int
    text: str
    special: bool
    normalized: bool = False
    flags: tuple[str, ...] = ()
    listed: bool = False
    stated: bool = False

    def stored(self, *, byte_level: bool) -> tuple[str, int]:
        """Return the token's (text, type) as stored in a GGUF.

        byte_level: whether the tokenizer is a byte-level BPE, in which SentencePiece's mark for a space has no meaning.

        The type of an added token depends on the flag ``special`` and on whether the text looks like a control token.
        """
        if self.special or looks_like_control(self.text):
            return self.text, CONTROL
        if byte_level:
            return self.text, USER_DEFINED
        # llama.cpp searches the raw text for user-defined tokens. In the raw text, SentencePiece's mark is still a
        # space.
        return self.text.replace("\u2581", " "), USER_DEFINED


class TokenTable:
    """The token table of a GGUF, which contains a token for each embedding row.

    source: the tokenizer file, named in error messages. byte_level: whether the tokenizer is a byte-level BPE.
    """

    def __init__(self, rows: int, source: Path, *, byte_level: bool) -> None:
        """Create a token table in which all rows are unused."""
        self.source, self.byte_level = source, byte_level
        self.texts: list[str | None] = [None] * rows
        self.types = [UNUSED] * rows
        self.scores = [PADDING_SCORE] * rows

    def check_ids(self, ids: Sequence[int]) -> None:
        """Raise BadInput if a token id is not the index of an embedding row."""
        for token_id in (min(ids, default=0), max(ids, default=0)):
            if not 0 <= token_id < max(len(self.texts), 1):
                rows = len(self.texts)
                raise BadInput(
                    f"{self.source}: expected token ids below {rows} (the number of embedding rows), found {token_id}"
                )

    def put(self, token_id: int, text: str, type_: int, score: float = 0.0) -> None:
        """Set the token of an embedding row, replacing the row's previous token, if any."""
        self.texts[token_id], self.types[token_id], self.scores[token_id] = text, type_, score

    def put_all(self, vocab: Mapping[str, int], type_: int) -> None:
        """Set the tokens of all rows in ``vocab``, which maps token texts to ids.

        The scores of the rows stay unchanged.
        """
        texts, types = self.texts, self.types
        for text, token_id in vocab.items():
            texts[token_id] = text
            types[token_id] = type_

    def add(self, token: AddedToken) -> None:
        """Set the row of an added token to the token's text and type."""
        self.put(token.id, *token.stored(byte_level=self.byte_level), ADDED_SCORE)

    def complete(self) -> list[str]:
        """Return the texts of all embedding rows. An unused embedding row gets the text ``[PAD{id}]``.

        Raises NotExpressible for duplicate or empty token texts, because llama.cpp aborts when it loads a GGUF with
        duplicate or empty token texts.
        """
        complete = [f"[PAD{token_id}]" if text is None else text for token_id, text in enumerate(self.texts)]
        if len(set(complete)) != len(complete) or "" in complete:
            text, count = Counter(complete).most_common(1)[0]
            actual = f"{text!r} {count} times" if count > 1 else "an empty token"
            raise NotExpressible(f"gguf: {self.source}", f"llama.cpp needs unique, non-empty tokens, found {actual}")
        return complete


def with_rows(added: Sequence[AddedToken], rows: int) -> tuple[list[AddedToken], list[str]]:
    """Return (the added tokens without those that only settings name and that have no embedding row, notes).

    A token of tokenizer.json without an embedding row is kept; ``TokenTable.check_ids`` reports the token.
    """
    lost = [token for token in added if token.id >= rows and not (token.listed or token.stated)]
    notes = (
        _note(
            lost,
            f"transformers gives the token the id {lost[0].id}, but the model has only {rows} embedding rows, "
            "so the GGUF lacks the token",
        )
        if lost
        else []
    )
    return [token for token in added if token not in lost], notes


def flag_notes(added: Iterable[AddedToken], *, strips: bool = False) -> list[str]:
    """Return notes that list the added tokens with flags that a GGUF cannot represent.

    The flags of an added token affect the text around the token: for example, ``lstrip`` drops the spaces before the
    token. strips: whether llama.cpp applies the flag ``rstrip`` because of the model's name.
    """
    notes, added = [], list(added)
    for flag in (flag for flag in FLAGS if not (strips and flag == "rstrip")):
        notes += _note(
            [token for token in added if flag in token.flags], f"a GGUF has no metadata key for the flag {flag}"
        )
    return notes


def normalised_notes(added: Iterable[AddedToken]) -> list[str]:
    """Return a note if transformers matches added tokens in the normalised text, unlike llama.cpp."""
    normalized = [token for token in added if token.normalized]
    return _note(
        normalized,
        "transformers matches the token in the normalised text, but llama.cpp matches the token in the raw text",
    )


def _note(tokens: list[AddedToken], difference: str) -> list[str]:
    more = f" and {len(tokens) - 1} more" if len(tokens) > 1 else ""
    return [f"added token {tokens[0].text!r}{more}: {difference}"] if tokens else []


__all__ = [
    "ADDED_SCORE",
    "FLAGS",
    "NORMAL",
    "PADDING_SCORE",
    "AddedToken",
    "TokenTable",
    "flag_notes",
    "normalised_notes",
]
