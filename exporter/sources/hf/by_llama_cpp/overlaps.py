"""Find pairs of added tokens that transformers and llama.cpp match differently where the two tokens overlap in a text.

transformers matches added tokens from left to right, and the longest of several tokens that begin at the same place.
Tokens with the flag ``normalized`` are matched last. llama.cpp searches the whole text for the longest token (in bytes
of UTF-8), then for the second longest token, and so on.
Sources: ``AddedVocabulary::extract_and_normalize`` in the tokenizers library, and ``tokenizer_st_partition`` in
llama.cpp.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Final

#: Number of pairs that are returned, and number of candidates that are examined.
_MOST_PAIRS: Final = 4
_MOST_CANDIDATES: Final = 2000


def contested(normalized: Mapping[str, bool], texts: Collection[str]) -> list[tuple[str, str]]:
    """Return up to four pairs (left token, right token) that are matched differently where the tokens overlap.

    normalized: maps the text of each added token to its flag ``normalized``. texts: only pairs with a token in
    ``texts`` are returned.
    """
    pairs: list[tuple[str, str]] = []
    for number, (left, right, joined) in enumerate(_overlaps(normalized, texts)):
        if len(pairs) == _MOST_PAIRS or number == _MOST_CANDIDATES:
            break
        expected = from_left(joined, normalized)
        # The order in which llama.cpp searches for tokens of equal length is not defined.
        orders = (longest_first(joined, normalized), longest_first(joined, normalized, backwards=True))
        if (left, right) not in pairs and any(order != expected for order in orders):
            pairs.append((left, right))
    return pairs


def _overlaps(normalized: Mapping[str, bool], texts: Collection[str]) -> Iterator[tuple[str, str, str]]:
    """Yield (left token, right token, a text in which the two tokens overlap), with at least one token in ``texts``.

    A token that contains the right token counts as the left token only if the right token is matched first.
    """
    begins, taught_begins = _by_beginning(normalized), _by_beginning(texts)
    for left in normalized:
        following = begins if left in texts else taught_begins
        for start in range(1, len(left)):
            for right in following.get(left[start:], ()):
                yield left, right, left[:start] + right
    inner_lengths = {len(token) for token, flag in normalized.items() if not flag}
    for outer, flag in normalized.items():
        for length in sorted(inner_lengths) if flag else ():
            for start in range(len(outer) - length + 1):
                inner = outer[start : start + length]
                if not normalized.get(inner, True) and (inner in texts or outer in texts):
                    yield outer, inner, outer


def _by_beginning(tokens: Collection[str]) -> dict[str, list[str]]:
    """Map every proper beginning of a token to the tokens that begin so."""
    out: dict[str, list[str]] = {}
    for token in tokens:
        for end in range(1, len(token)):
            out.setdefault(token[:end], []).append(token)
    return out


def from_left(text: str, normalized: Mapping[str, bool]) -> list[str]:
    """Split a text at added tokens as the tokenizers library does."""
    pieces = _split_from_left(text, {token for token, flag in normalized.items() if not flag})
    last = {token for token, flag in normalized.items() if flag}
    return [part for piece in pieces for part in ([piece] if piece in normalized else _split_from_left(piece, last))]


def _split_from_left(text: str, tokens: Collection[str]) -> list[str]:
    pieces, begin, at = [], 0, 0
    while at < len(text):
        token = next((text[at:end] for end in range(len(text), at, -1) if text[at:end] in tokens), None)
        if token is None:
            at += 1
            continue
        pieces += [text[begin:at], token]
        begin = at = at + len(token)
    return [piece for piece in [*pieces, text[begin:]] if piece]


def longest_first(text: str, tokens: Collection[str], *, backwards: bool = False) -> list[str]:
    """Split a text at added tokens as llama.cpp does.

    backwards: whether tokens of equal length are searched in descending instead of ascending order of their texts.
    """
    parts = {text[start:end] for start in range(len(text)) for end in range(start + 1, len(text) + 1)}
    searched = sorted((part for part in parts if part in tokens), reverse=backwards)
    searched.sort(key=lambda part: -len(part.encode()))
    pieces: list[str] = [text]
    for token in searched:
        split: list[str] = []
        for piece in pieces:
            if piece in searched:
                split.append(piece)
                continue
            between = piece.split(token)
            for number, part in enumerate(between):
                split += [token] * (number > 0) + [part] * bool(part)
        pieces = split
    return pieces
