"""Merging as whole processes: ours against stock PEFT, and against ``cp -r`` of the base.

Ours is the command that users run, verification included; PEFT is from_pretrained, merge_and_unload, save_pretrained.
``cp -r`` leaves its copy in memory, ours is on the disk when it ends: ``cp -r`` with a sync is measured beside it.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from benchmarks._cases import OURS, figures, show_cases
from benchmarks._measure import Measured, Program, machine, ratio, whole_programs, write

CASES = ("smollm2", "rows", "lora")
UNVERIFIED, PEFT, COPY, SYNCED = "ours, --verify off", "PEFT", "cp -r", "cp -r, synced"
_TTEXPORT = (sys.executable, "-c", "import sys; from exporter.cli import main; sys.exit(main())")
_PEFT = """
import sys
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, adapter, out = sys.argv[1:]
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype="auto"), adapter)
model.merge_and_unload().save_pretrained(out)
"""
# The bars: how many times faster than PEFT, how many times the time of a copy, and peak memory.
BARS: Mapping[str, Mapping[str, float]] = {
    "smollm2": {"faster_than_peft": 6.0, "peak_bytes": 120e6},
    "rows": {"time_over_copy": 1.2, "peak_bytes": 300e6},
    "lora": {"faster_than_peft": 2.0, "peak_bytes": 600e6},
}


@dataclass(frozen=True)
class Case:
    """What to merge, and against whom."""

    name: str
    base: Path
    adapter: Path
    peers: Sequence[str]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case", choices=CASES, action="append", help="only this one; repeatable")
    parser.add_argument("--rounds", type=int, default=5, help="measured runs of each variant")
    parser.add_argument("--warm-up", type=int, default=1, help="runs before the measured ones")
    parser.add_argument("--gigabytes", type=float, default=4.0, help="size of the checkpoint of `rows`")
    parser.add_argument("--lora-gigabytes", type=float, default=2.0, help="size of the checkpoint of `lora`")
    parser.add_argument("--folder", type=Path, help="where the large files go; default: the temporary folder")
    options = parser.parse_args()
    cases = []
    for name in options.case or CASES:
        with tempfile.TemporaryDirectory(prefix="merge-", dir=options.folder) as folder:
            # In a process of its own: the peak memory of a child begins with that of the process that starts it.
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as builder:
                case = builder.submit(_build, name, Path(folder), options).result()
            cases.append(measure(case, Path(folder), options.warm_up, options.rounds))
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
    """Base and one output at a time, and some air."""
    free = shutil.disk_usage(folder).free
    if free < (needed := 2.5 * gigabytes * 1e9):
        raise SystemExit(f"benchmark: needs {needed / 1e9:.1f} GB in {folder}, {free / 1e9:.1f} GB are free")


def measure(case: Case, folder: Path, warm_up: int, rounds: int) -> dict[str, Any]:
    """Run ours and the peers; all figures of a case come from the same rounds."""
    before = machine()["load_1_5_15_min"]
    out = folder / "out"
    ours = (*_TTEXPORT, "merge", str(case.adapter), "--base", str(case.base), "-o", str(out))
    programs = {OURS: Program(ours, out), UNVERIFIED: Program((*ours, "--verify", "off"), out)}
    commands = {
        PEFT: (sys.executable, "-c", _PEFT, str(case.base), str(case.adapter), str(out)),
        COPY: ("cp", "-r", str(case.base), str(out)),
        SYNCED: ("sh", "-c", 'cp -r "$0" "$1" && sync "$1"/*', str(case.base), str(out)),
    }
    programs |= {peer: Program(commands[peer], out) for peer in case.peers}
    measured = whole_programs(programs, warm_up=warm_up, rounds=rounds)
    return {
        "case": case.name,
        "bytes": sum(path.stat().st_size for path in case.base.iterdir()),
        "load_before": before,
        "load_after": machine()["load_1_5_15_min"],
        "variants": {name: figures(one) for name, one in measured.items()},
        **ratios(measured),
    }


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
    for one in cases:
        one["size"] = f", {one['bytes'] / 1e9:.2f} GB"
    title = f"Merging to a Hugging Face checkpoint, whole processes, {rounds} rounds"
    show_cases(title, cases, BARS, at_least=("faster_than_peft",))
    print(f"written: {write('merge', {'machine': machine(), 'rounds': rounds, 'cases': cases})}")


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
