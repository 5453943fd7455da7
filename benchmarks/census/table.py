"""Formats the results of the census as tables for the terminal and for docs/models.md."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from benchmarks.census.trial import CRASH, EXACT, GATE, REFUSED, UNLOADABLE, WRONG

_FAULTS = (WRONG, UNLOADABLE, GATE, CRASH)


def cell(row: Mapping[str, Any]) -> str:
    """Return a short description of the result that ``row`` of the census contains."""
    result = row["result"]
    if result == REFUSED:
        return f"refused ({row['exit_code']})"
    return f"**{result}**" if result in _FAULTS else str(result)


def joined(runs: Iterable[Iterable[Mapping[str, Any]]]) -> list[Mapping[str, Any]]:
    """Return the rows of several runs of the census. Of equal merges, the result of the last run counts."""
    rows = {(row["name"], row["adapter"], row["target"]): row for run in runs for row in run}
    return list(rows.values())


def columns(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return the column headings: each pair of format and adapter that occurs in the rows of the census."""
    return list(dict.fromkeys(f"{row['target']} {row['adapter']}" for row in rows))


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return a Markdown table with one line per model: class, results by format and adapter, reasons for failures."""
    names = sorted({row["name"] for row in rows})
    heads = columns(rows)
    lines = [f"| type | class | {' | '.join(heads)} | reason |", "|---" * (len(heads) + 3) + "|"]
    for name in names:
        mine = {f"{row['target']} {row['adapter']}": row for row in rows if row["name"] == name}
        results = [cell(mine[head]) if head in mine else "" for head in heads]
        reasons = dict.fromkeys(row["reason"] for row in mine.values() if row["result"] != EXACT and row.get("reason"))
        reason = "<br>".join(_plain(text) for text in reasons)
        class_name = next(iter(mine.values()))["class_name"]
        lines.append(f"| {name} | {class_name} | {' | '.join(results)} | {reason} |")
    return "\n".join(lines) + "\n"


def _plain(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")


def counts(rows: Iterable[Mapping[str, Any]]) -> str:
    """Return one line per pair of format and adapter, which lists how often each result occurs."""
    rows = list(rows)
    lines = []
    for head in columns(rows):
        tally = Counter(row["result"] for row in rows if f"{row['target']} {row['adapter']}" == head)
        lines.append(f"{head}: " + ", ".join(f"{number} {result}" for result, number in tally.most_common()))
    return "\n".join(lines)
