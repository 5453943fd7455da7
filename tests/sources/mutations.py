"""Mutated copies of sound files, for hypothesis."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from hypothesis import strategies as st

#: What parsers trip over: numbers at the ends of their ranges, other types, half a bracket, half a character.
WORDS: Final = (
    *(b"0", b"-1", b"1e3", b"1e999", b"NaN", b"9223372036854775808", b"null", b"true", b"[]", b"{}", b'""', b'"a"'),
    *(b"F16", b"[[", b"}}", b",", b"\xff", b"\\u0000", b"\\ud800", b"\xff" * 8, b"\0" * 8, b"\x7f"),
)


def mutated(sound: bytes, repair: Callable[[bytearray], None] | None = None) -> st.SearchStrategy[bytes]:
    """``sound`` with one to four pieces replaced. ``repair``, half the time: makes what lies behind them reachable."""
    piece = st.sampled_from(WORDS) | st.binary(max_size=4)
    cuts = st.lists(st.tuples(st.integers(0, len(sound) - 1), st.integers(0, 8), piece), min_size=1, max_size=4)

    def cut(plan: tuple[list[tuple[int, int, bytes]], bool]) -> bytes:
        content = bytearray(sound)
        for at, length, word in plan[0]:
            content[at : at + length] = word
        if repair is not None and plan[1]:
            repair(content)
        return bytes(content)

    return st.tuples(cuts, st.booleans()).map(cut)
