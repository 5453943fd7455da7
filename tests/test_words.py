"""Words that the project does not use: each has a plain one in docs/glossary.md or in the table below."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("exporter", "tuner", "ttexport", "fixtures", "benchmarks")
PAGES = ("README.md", "CONTRIBUTING.md", "docs/glossary.md")
# Dropped word (a regular expression) → what to write instead.
DROPPED = {
    r"told|tells": "recorded, reported, printed",
    r"whoever": "a noun",
    r"wish(es)?": "options",
    r"booked|bookings?": "ledger entry",
    r"judge[ds]?|judging": "verify, compare",
    r"drown(ed|s)?": "below the quantisation noise",
    r"strangers?": "unknown tensors",
    r"twins?": "duplicates",
    r"side[ _]files?": "auxiliary files",
    r"splittings?": "pre-tokenizer",
    r"favourites?": "top-1",
    r"who": "a noun",
}
# Names that say nothing: what is it?
EMPTY_NAMES = frozenset({"told", "one", "found", "kind", "said"})
# The error classes name their two halves so; a manifest has that key.
NAMED_ON_PURPOSE = {"exporter/errors.py": {"found"}, "exporter/release/documents/manifest.py": {"kind"}}
# Texts that a model reads: their words are their own.
PROSE = ("exporter/verify/running/control_texts.py", "fixtures/corpus.py")

_DROPPED = {re.compile(rf"\b(?:{word})\b", re.IGNORECASE): instead for word, instead in DROPPED.items()}
FILES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
WORDED = [path for path in FILES if str(path.relative_to(ROOT)) not in PROSE]


def texts(source: str) -> Iterator[tuple[int, str]]:
    """(line, text) of every string and comment, and of every name."""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type in (tokenize.STRING, tokenize.COMMENT, tokenize.NAME):
            yield token.start[0], token.string.replace("_", " ") if token.type == tokenize.NAME else token.string


def dropped(source: str) -> list[str]:
    return [
        f"line {line}: {match[0]!r}: write {instead}"
        for line, text in texts(source)
        for pattern, instead in _DROPPED.items()
        if (match := pattern.search(text))
    ]


def empty_names(source: str) -> set[str]:
    """Variables, parameters, functions and fields that are called nothing."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Name(id=name, ctx=ast.Store()) | ast.arg(arg=name):
                names.add(name)
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                names.add(name)
    return names & EMPTY_NAMES


@pytest.mark.parametrize("path", WORDED, ids=[str(path.relative_to(ROOT)) for path in WORDED])
def test_dropped_words_stay_out(path: Path) -> None:
    assert dropped(path.read_text()) == []


@pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(ROOT)) for path in FILES])
def test_names_say_what_the_thing_is(path: Path) -> None:
    assert empty_names(path.read_text()) - NAMED_ON_PURPOSE.get(str(path.relative_to(ROOT)), set()) == set()


@pytest.mark.parametrize("page", PAGES)
def test_dropped_words_stay_out_of_the_pages(page: str) -> None:
    # The glossary's last column holds the words themselves.
    lines = [line.rpartition("|")[0].rpartition("|")[0] if "|" in line else line for line in lines_of(page)]
    hits = [(number, match[0]) for number, line in enumerate(lines, 1) for p in _DROPPED if (match := p.search(line))]
    assert hits == []


def lines_of(page: str) -> list[str]:
    lines = (ROOT / page).read_text().splitlines()
    return lines if page == "docs/glossary.md" else [line.replace("|", " ") for line in lines]


@pytest.mark.parametrize(
    "source",
    ['"""Who reads it is told."""', "x = 1  # a wish", "def judge():\n    pass", "side_files = 3", "'Strangers'"],
)
def test_a_dropped_word_is_seen(source: str) -> None:
    assert dropped(source)


@pytest.mark.parametrize(
    "source", ["one = 1", "[kind for kind in ()]", "def f(found): ...", "class A:\n    told: int = 1"]
)
def test_an_empty_name_is_seen(source: str) -> None:
    assert empty_names(source)
