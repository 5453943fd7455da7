"""Measure the time of a full verification of SmolLM2, and the combined peak memory of the verification's processes.

The merge command writes and verifies a checkpoint, a GGUF in bfloat16 and an ONNX model in float32. Then the command
``verify`` verifies the checkpoint, the GGUF and the ONNX model once more from disk. ``merge`` and ``verify`` run each
model in a separate process.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from statistics import median

from benchmarks._measure import TTEXPORT, Measured, Program, machine, show, verdict, whole_programs, write

MERGE, VERIFY = "merge --verify full", "verify"
# The bars for each command on two cores.
SECONDS, PEAK_BYTES = 60.0, 2.5e9
_FORMATS = ("--to", "hf", "--to", "gguf", "--to", "onnx")
_TRAINED_IDS = (5, 300, 4000, 20000)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="number of measured runs of each command")
    parser.add_argument("--warm-up", type=int, default=1, help="number of unmeasured runs before the measured runs")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="verify-") as name:
        programs = _programs(Path(name))
        measured = whole_programs(programs, warm_up=options.warm_up, rounds=options.rounds, tree=True)
    report(measured, options.rounds)


def _programs(folder: Path) -> dict[str, Program]:
    from fixtures import smollm2
    from fixtures.adapters import stock_rows

    base = smollm2.checkpoint()
    adapter = stock_rows(base, folder / "adapter", _TRAINED_IDS)
    merge = (*TTEXPORT, "merge", str(adapter), "--base", str(base), *_FORMATS, "-q")
    verify = (*TTEXPORT, "verify", str(folder / "made"), "--reference", str(base), "--adapter", str(adapter), "-q")
    subprocess.run((*merge, "--verify", "off", "-o", str(folder / "made")), check=True, stdout=subprocess.DEVNULL)
    out = folder / "out"
    return {MERGE: Program((*merge, "--verify", "full", "-o", str(out)), out), VERIFY: Program(verify)}


def report(measured: Mapping[str, Measured], rounds: int) -> None:
    rows, bars = [], []
    for name, command in measured.items():
        seconds = median(command.seconds)
        figures = [f"{seconds:.1f}", f"{min(command.seconds):.1f}", f"{median(command.cpu_seconds):.1f}"]
        rows.append([name, *figures, f"{command.peak_bytes / 1e6:,.0f}"])
        bars.append((f"{name}: seconds", seconds, SECONDS))
        bars.append((f"{name}: peak bytes of the process tree", command.peak_bytes, PEAK_BYTES))
    notes = [verdict(*bar)[1] for bar in bars]
    load = machine()["load_1_5_15_min"]
    columns = ["command", "s, median", "s, least", "CPU s", "peak MB of the process tree"]
    show(
        f"Full verification of three artifacts of SmolLM2, {rounds} rounds, load average {load}",
        columns,
        rows,
        notes=notes,
    )
    document = {
        "machine": machine(),
        "rounds": rounds,
        "variants": {name: vars(command) for name, command in measured.items()},
        "bars": [{"name": name, "value": value, "bar": bar} for name, value, bar in bars],
    }
    print(f"written: {write('verify', document)}")


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
