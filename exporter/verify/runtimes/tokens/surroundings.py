"""Generate texts that contain given tokens at the start, at the end, in words, beside spaces and beside each other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

#: Texts around a token, which stands for ``{}``.
SURROUNDINGS: Final = (
    "{}",
    "{} The ship sails",
    "{}The ship sails",
    "A ship sails {}",
    "A ship sails{}",
    "ships{}sail",
    "a ship {} sails",
    "a ship  {}  sails",
    "a ship\n{}\n sails",
    "{}{}",
    "{} {}",
)
#: A text with several surroundings, for tokens beyond the limit.
_COMBINED: Final = "{} ships{}sail {} {}"
#: Number of tokens that get a text for every surrounding, and number of tokens that get a text at all.
_MOST_TOKENS: Final = 200
_MOST_COMBINED: Final = 4000


def surrounded(tokens: Sequence[str]) -> Iterator[str]:
    """Yield texts with every token of ``tokens``, and texts in which two tokens touch or overlap.

    If there are more than 200 tokens, each further token occurs in a single text with several surroundings. If there
    are more than 4,200 tokens, the last tokens do not occur.
    """
    first = tokens[:_MOST_TOKENS]
    for token in first:
        for surrounding in SURROUNDINGS:
            yield surrounding.replace("{}", token)
    for left, right in zip(first, [*first[1:], *first[:1]], strict=True):
        yield f"{left}{right} {left} {right}{left}"
    yield from _overlaps(first)
    for token in tokens[_MOST_TOKENS : _MOST_TOKENS + _MOST_COMBINED]:
        yield _COMBINED.replace("{}", token)


def _overlaps(tokens: Sequence[str]) -> Iterator[str]:
    """Yield a text for each pair of tokens of which the left one ends with the beginning of the right one."""
    for left in tokens:
        for right in tokens:
            sizes = range(min(len(left), len(right)) - 1, 0, -1)
            if size := next((size for size in sizes if left.endswith(right[:size])), 0):
                yield f"a {left}{right[size:]} b"
