"""Compare the merge command with stock PEFT and with ``cp -r`` of the base, each run as a separate process.

ttexport is measured with the command that users run, including verification. The program for stock PEFT calls
from_pretrained, merge_and_unload and save_pretrained. The command of ttexport ends after the data is on disk. ``cp -r``
ends while the copied data is still in memory, so ``cp -r`` followed by a sync to disk is measured as well.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks._cases import OURS, apart, case_parser, measure_case, show_cases
from benchmarks._measure import TTEXPORT, Measured, Program, machine, ratio, write

CASES = ("smollm2", "rows", "lora")
UNVERIFIED, PEFT, COPY, SYNCED = "ours, --verify off", "PEFT", "cp -r", "cp -r, synced"
_PEFT = """
import sys
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, adapter, out = sys.argv[1:]
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype="auto"), adapter)
model.merge_and_unload().save_pretrained(out)
"""
# The bars: speed relative to PEFT, time relative to a copy, and peak memory.
BARS: Mapping[str, Mapping[str, float]] = {
    "smollm2": {"faster_than_peft": 6.0, "peak_bytes": 120e6},
    "rows": {"time_over_copy": 1.2, "peak_bytes": 300e6},
    "lora": {"faster_than_peft": 2.0, "peak_bytes": 600e6},
}


@dataclass(frozen=True)
class Case:
    """A benchmark case: the base and the adapter to merge, and the programs with which ``merge`` is compared."""

    name: str
    base: Path
    adapter: Path
    peers: Sequence[str]


def main() -> None:
    parser = case_parser(__doc__, CASES)
    parser.add_argument("--gigabytes", type=float, default=4.0, help="checkpoint size in GB for the case `rows`")
    parser.add_argument("--lora-gigabytes", type=float, default=2.0, help="checkpoint size in GB for the case `lora`")
    options = parser.parse_args()
    cases = []
    for name in options.case or CASES:
        with tempfile.TemporaryDirectory(prefix="merge-", dir=options.folder) as folder:
            cases.append(measure(apart(_build, name, Path(folder), options), Path(folder), options))
    report(cases, options.rounds)


def _build(name: str, folder: Path, options: argparse.Namespace) -> Case:
    if name == "smollm2":
        from fixtures import smollm2
        from fixtures.adapters import stock_rows

        base = smollm2.checkpoint()
        return Case(name, base, stock_rows(base, folder / "adapter", range(100, 116)), (PEFT, COPY, SYNCED))
    from benchmarks import _models

    gigabytes = options.gigabytes if name == "rows" else options.lora_gigabytes
    layers = _models.layers_for(gigabytes)
    _need(folder, gigabytes)
    base = _models.checkpoint(folder / "base", layers)
    if name == "rows":
        return Case(name, base, _models.row_adapter(folder / "adapter", base), (COPY, SYNCED))
    return Case(name, base, _models.lora_adapter(folder / "adapter", base, layers), (PEFT, COPY, SYNCED))


def _need(folder: Path, gigabytes: float) -> None:
    """Raise SystemExit if the free disk space in ``folder`` is less than 2.5 times the size of the base."""
    free = shutil.disk_usage(folder).free
    if free < (needed := 2.5 * gigabytes * 1e9):
        raise SystemExit(
            f"benchmark: {folder}: expected at least {needed / 1e9:.1f} GB of free space, found {free / 1e9:.1f} GB"
        )


def measure(case: Case, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Measure the merge command and the programs with which the merge command is compared.

    In each round, every program of the benchmark case runs once.
    """
    out = folder / "out"
    ours = (*TTEXPORT, "merge", str(case.adapter), "--base", str(case.base), "-o", str(out))
    programs = {OURS: Program(ours, out), UNVERIFIED: Program((*ours, "--verify", "off"), out)}
    commands = {
        PEFT: (sys.executable, "-c", _PEFT, str(case.base), str(case.adapter), str(out)),
        COPY: ("cp", "-r", str(case.base), str(out)),
        SYNCED: ("sh", "-c", 'cp -r "$0" "$1" && sync "$1"/*', str(case.base), str(out)),
    }
    programs |= {peer: Program(commands[peer], out) for peer in case.peers}
    result, measured = measure_case(case.name, programs, options)
    return {**result, "bytes": sum(path.stat().st_size for path in case.base.iterdir()), **ratios(measured)}


def ratios(measured: Mapping[str, Measured]) -> dict[str, float]:
    ours = measured[OURS]
    result = {
        "peak_bytes": float(ours.peak_bytes),
        "time_over_copy": ratio(ours.seconds, measured[COPY].seconds),
        "time_over_synced_copy": ratio(ours.seconds, measured[SYNCED].seconds),
    }
    if PEFT in measured:
        result["faster_than_peft"] = ratio(measured[PEFT].seconds, ours.seconds)
    return result


def report(cases: list[dict[str, Any]], rounds: int) -> None:
    for case in cases:
        case["size"] = f", {case['bytes'] / 1e9:.2f} GB"
    title = f"Merge to a Hugging Face checkpoint as a separate process, {rounds} rounds"
    show_cases(title, cases, BARS, at_least=("faster_than_peft",))
    print(f"written: {write('merge', {'machine': machine(), 'rounds': rounds, 'cases': cases})}")


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
