"""Cases of a benchmark over whole programs: the figures of each variant, one table, and which bars were met."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from statistics import median
from typing import Any

from benchmarks._measure import Measured, ratio, show

OURS = "ours"


def figures(one: Measured) -> dict[str, Any]:
    return {
        "seconds_median": median(one.seconds),
        "seconds_least": min(one.seconds),
        "cpu_seconds_median": median(one.cpu_seconds),
        "peak_bytes": one.peak_bytes,
        "seconds": one.seconds,
        "cpu_seconds": one.cpu_seconds,
    }


def show_cases(
    title: str, cases: list[dict[str, Any]], bars: Mapping[str, Mapping[str, float]], *, at_least: Collection[str]
) -> None:
    """Print them, and note in each which bars it met: figures ``at_least`` reach theirs, all others stay below it."""
    columns = ["case", "variant", "s, median", "s, least", "CPU s", "peak MB", "against ours"]
    rows, verdicts = [], []
    for one in cases:
        ours = one["variants"][OURS]
        for name, variant in one["variants"].items():
            rows.append(
                [
                    f"{one['case']}{one.get('size', '')}" if name == OURS else "",
                    name,
                    f"{variant['seconds_median']:.2f}",
                    f"{variant['seconds_least']:.2f}",
                    f"{variant['cpu_seconds_median']:.2f}",
                    f"{variant['peak_bytes'] / 1e6:,.0f}",
                    f"{ratio(variant['seconds'], ours['seconds']):.2f}",
                ]
            )
        one["bars_met"] = {}
        for figure, bar in bars[one["case"]].items():
            met = one[figure] >= bar if figure in at_least else one[figure] <= bar
            one["bars_met"][f"{figure} {bar:g}"] = met
            verdicts.append(f"{one['case']}: {figure} {one[figure]:.4g}, bar {bar:g}: {'met' if met else 'MISSED'}")
    load = ", ".join(f"{one['load_before'][0]} → {one['load_after'][0]}" for one in cases)
    show(title, columns, rows, notes=[f"load (1 min) before → after each case: {load}", *verdicts])
