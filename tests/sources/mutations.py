"""Mutated copies of sound files, for hypothesis."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from hypothesis import strategies as st

#: Inputs that break parsers: numbers at the limits of their ranges, other types, unbalanced brackets, lone surrogates.
PIECES: Final = (
    *(b"0", b"-1", b"1e3", b"1e999", b"NaN", b"9223372036854775808", b"null", b"true", b"[]", b"{}", b'""', b'"a"'),
    *(b"F16", b"[[", b"}}", b",", b"\xff", b"\\u0000", b"\\ud800", b"\xff" * 8, b"\0" * 8, b"\x7f"),
)


def mutated(sound: bytes, repair: Callable[[bytearray], None] | None = None) -> st.SearchStrategy[bytes]:
    """``sound`` with one to four pieces replaced. repair: applied half the time, to reach later checks."""
    piece = st.sampled_from(PIECES) | st.binary(max_size=4)
    replacements = st.lists(st.tuples(st.integers(0, len(sound) - 1), st.integers(0, 8), piece), min_size=1, max_size=4)

    def mutate(plan: tuple[list[tuple[int, int, bytes]], bool]) -> bytes:
        content = bytearray(sound)
        for at, length, new in plan[0]:
            content[at : at + length] = new
        if repair is not None and plan[1]:
            repair(content)
        return bytes(content)

    return st.tuples(replacements, st.booleans()).map(mutate)
