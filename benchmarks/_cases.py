"""Define the command-line options, measurements and results tables of the benchmarks that run whole commands."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

from benchmarks._measure import Measured, Program, machine, ratio, show, verdict, whole_programs

OURS = "ours"
T = TypeVar("T")


def case_parser(description: str | None, cases: Sequence[str]) -> argparse.ArgumentParser:
    """Return an argument parser with the options that all benchmarks with several cases have."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument(
        "--case", choices=cases, action="append", help="benchmark case to run; repeatable; default: all cases"
    )
    parser.add_argument("--rounds", type=int, default=5, help="number of measured runs of each variant")
    parser.add_argument("--warm-up", type=int, default=1, help="number of unmeasured runs before the measured runs")
    parser.add_argument("--folder", type=Path, help="folder for large files; default: the system's temporary folder")
    return parser


def apart(build: Callable[..., T], *arguments: Any) -> T:
    """Call ``build`` in a separate process, so that building large inputs does not raise the measured peak memory.

    Linux counts the peak memory of a parent process as part of the peak memory of its children.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as builder:
        return builder.submit(build, *arguments).result()


def measure_case(
    name: str, programs: Mapping[str, Program], options: argparse.Namespace
) -> tuple[dict[str, Any], dict[str, Measured]]:
    """Run the programs of a benchmark case alternately.

    Return the case's entry for the JSON results, and the measurements of each program.
    """
    before = machine()["load_1_5_15_min"]
    measured = whole_programs(programs, warm_up=options.warm_up, rounds=options.rounds)
    case = {
        "case": name,
        "load_before": before,
        "load_after": machine()["load_1_5_15_min"],
        "variants": {variant: figures(measurement) for variant, measurement in measured.items()},
    }
    return case, measured


def figures(measured: Measured) -> dict[str, Any]:
    return {
        "seconds_median": median(measured.seconds),
        "seconds_least": min(measured.seconds),
        "cpu_seconds_median": median(measured.cpu_seconds),
        "peak_bytes": measured.peak_bytes,
        "seconds": measured.seconds,
        "cpu_seconds": measured.cpu_seconds,
    }


def loads(cases: Sequence[Mapping[str, Any]]) -> str:
    """Return a line that lists the machine's load average before and after each benchmark case."""
    pairs = ", ".join(f"{case['load_before'][0]} → {case['load_after'][0]}" for case in cases)
    return f"load average (1 min) before → after each case: {pairs}"


def show_cases(
    title: str, cases: list[dict[str, Any]], bars: Mapping[str, Mapping[str, float]], *, at_least: Collection[str]
) -> None:
    """Print the results of the cases as a table, and record in ``bars_met`` which limits each case meets.

    bars: the limit (bar) of each measured figure; a bar is a minimum for figures in ``at_least``, and otherwise a
    maximum.
    """
    columns = ["case", "variant", "s, median", "s, least", "CPU s", "peak MB", "time / ours"]
    rows, verdicts = [], []
    for case in cases:
        ours = case["variants"][OURS]
        for name, variant in case["variants"].items():
            rows.append(
                [
                    f"{case['case']}{case.get('size', '')}" if name == OURS else "",
                    name,
                    f"{variant['seconds_median']:.2f}",
                    f"{variant['seconds_least']:.2f}",
                    f"{variant['cpu_seconds_median']:.2f}",
                    f"{variant['peak_bytes'] / 1e6:,.0f}",
                    f"{ratio(variant['seconds'], ours['seconds']):.2f}",
                ]
            )
        case["bars_met"] = {}
        for figure, bar in bars[case["case"]].items():
            met, line = verdict(f"{case['case']}: {figure}", case[figure], bar, at_least=figure in at_least)
            case["bars_met"][f"{figure} {bar:g}"] = met
            verdicts.append(line)
    show(title, columns, rows, notes=[loads(cases), *verdicts])
