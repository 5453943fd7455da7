"""Build one model of the zoo, make adapters for it, merge each adapter, and compare the result with stock PEFT."""

from __future__ import annotations

import contextlib
import io
import json
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from benchmarks.census.converter import divergence
from exporter.cli.main import run
from exporter.errors import NotExpressible
from fixtures.zoo.adapters import lora_adapter, rows_adapter
from fixtures.zoo.build import build
from fixtures.zoo.compare import compare
from fixtures.zoo.names import NAMES
from fixtures.zoo.recipes import Inapplicable, Recipe
from fixtures.zoo.reference import PeftCannot, Reference, reference

ADAPTERS: Final[Mapping[str, Recipe]] = {"rows": Recipe(rows_adapter), "LoRA": Recipe(lora_adapter)}
#: Results, from the best to those that no merge can give.
EXACT, AS_PEFT, REFUSED, GATE, WRONG, UNLOADABLE, CRASH, PEFT, UNBUILT, INAPPLICABLE, UNTIED = (
    "exact",
    "as PEFT merges",
    "refused",
    "gate",
    "WRONG",
    "does not load",
    "crash",
    "PEFT itself cannot",
    "not built",
    "no such module",
    "exact with --untie",
)
_NOT_EQUIVALENT, _UNEXPECTED = 3, 1
_REASON_CHARS: Final = 400
#: The largest mean KL divergence of logits in llama.cpp that count as equal.
_EQUAL: Final = 1e-6


@dataclass
class Row:
    """A row of the census: the result of merging one adapter of one model to one format.

    exit_code: exit code of the merge command. difference: largest absolute difference between the outputs of the merged
    model and of stock PEFT. largest: largest absolute output. effect: largest absolute change of the outputs by the
    adapter.
    """

    name: str
    class_name: str
    adapter: str = ""
    target: str = ""
    result: str = CRASH
    exit_code: int | None = None
    reason: str = ""
    difference: float | None = None
    largest: float | None = None
    effect: float | None = None
    seconds: float = 0.0


def run_trial(
    name: str,
    folder: Path,
    targets: Iterable[str],
    out: Path,
    recipes: Mapping[str, Recipe] | None = None,
) -> None:
    """Merge every adapter of the model ``name`` to every format.

    Each result is written to the file ``out`` as a line of JSON.

    recipes: maps the names of adapters to recipes; by default, ``ADAPTERS``. Until a merge ends, the file contains a
    row that reports a crash in place of the merge's result.
    """
    rows: list[Row] = []

    def put(row: Row, *, again: bool = False) -> Row:
        if again:
            rows.remove(row)
        rows.append(row)
        out.write_text("".join(json.dumps(asdict(each)) + "\n" for each in rows))
        return row

    recipes = ADAPTERS if recipes is None else recipes
    class_name = NAMES[name]
    targets = list(targets)
    pending = [put(Row(name, class_name, adapter, target)) for adapter in recipes for target in targets]
    try:
        base = build(name, folder / "base")
    except Exception as exc:
        for row in pending:
            row.result, row.reason = UNBUILT, _cause(exc)
            put(row, again=True)
        return
    for adapter, recipe in recipes.items():
        mine = [row for row in pending if row.adapter == adapter]
        paths = recipe.adapters(folder / adapter)
        try:
            recipe.write(base, folder / adapter)
            expected = reference(base, *paths, vocab=recipe.vocab)
        except Exception as exc:
            for row in mine:
                row.result = INAPPLICABLE if isinstance(exc, Inapplicable) else PEFT
                row.reason = str(exc) if isinstance(exc, PeftCannot | Inapplicable) else _cause(exc)
                put(row, again=True)
            continue
        for row in mine:
            started = time.perf_counter()
            _merge(row, base, paths, folder / f"merged-{adapter}-{row.target}", expected)
            row.reason = " ".join(row.reason.split())[:_REASON_CHARS]
            row.seconds = round(time.perf_counter() - started, 2)
            put(row, again=True)


def _merge(row: Row, base: Path, adapters: Sequence[Path], merged: Path, expected: Reference) -> None:
    arguments = ["merge", *map(str, adapters), "--base", str(base), "--to", row.target, "-o", str(merged), "-q"]
    arguments += {"hf": [], "gguf": ["--verify", "off"]}.get(row.target, ["--verify", "full"])
    row.exit_code, talk = _run(arguments)
    untied = row.exit_code == NotExpressible.exit_code and "use --untie" in talk
    if untied:
        row.exit_code, talk = _run([*arguments, "--untie"])
    if row.exit_code:
        row.result = {_NOT_EQUIVALENT: GATE, _UNEXPECTED: CRASH}.get(row.exit_code, REFUSED)
        row.reason = talk.strip().replace(str(base.parent), "").rpartition("ttexport: ")[2]
        return
    exact = UNTIED if untied else EXACT
    if row.target == "gguf":
        value = divergence(merged, expected.ids.tolist(), expected.tuned)
        row.result = UNLOADABLE if isinstance(value, str) else exact if _is_equal(value) else WRONG
        if row.result == WRONG and _is_equal(divergence(merged, expected.ids.tolist(), expected.merged_outputs)):
            row.result = AS_PEFT
        row.reason = value if isinstance(value, str) else f"mean KL divergence {value:.1e}"
        return
    if row.target != "hf":
        row.result = exact
        return
    comparison = compare(base, adapters[0], merged, expected=expected, untied=untied)
    if comparison.exact:
        row.result = exact
    elif comparison.as_peft:
        row.result = AS_PEFT
    else:
        row.result = WRONG if comparison.loads else UNLOADABLE
    row.reason = "; ".join(comparison.faults[:3])
    row.difference, row.largest, row.effect = comparison.difference, comparison.largest, comparison.effect


def _is_equal(value: float | str) -> bool:
    return not isinstance(value, str) and value <= _EQUAL


def _run(arguments: Sequence[str]) -> tuple[int, str]:
    """Run a ttexport command and return (exit code, text on stderr)."""
    talk = io.StringIO()
    with contextlib.redirect_stderr(talk), contextlib.redirect_stdout(io.StringIO()):
        return run(list(arguments)), talk.getvalue()


def _cause(exc: BaseException) -> str:
    return " ".join(f"{type(exc).__name__}: {exc}".split())[:_REASON_CHARS]


def rows_of(out: Path) -> list[dict[str, Any]]:
    """Return the census rows in a file that ``run_trial`` wrote."""
    return [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
