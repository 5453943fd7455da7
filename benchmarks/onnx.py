"""Compare ttexport with onnxruntime-genai's model builder.

The ONNX export of SmolLM2 and the speed of the exported model are measured.

ttexport is measured with the command that users run. torch.onnx.export takes minutes and is measured only in one round,
and only if the option ``--torch`` is given. torch.onnx.export is called with the arguments with which ttexport traces
models. To measure speed, the fp32 models run in ONNX Runtime on the CPU, first on a prompt of 128 tokens, then on one
token at a time. All ONNX Runtime sessions have the same options. The speed of an ONNX Runtime session varies with the
location of the weights in memory (27 to 33 ms per token for the same model), so every round opens new sessions in a
different order.

With one thread per session, which is the default, speed is measured in CPU seconds. With two threads per session,
another process on one of the cores would slow down both threads, because each thread waits for the other at the end of
every matrix product.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks._cases import apart
from benchmarks._measure import (
    TTEXPORT,
    Measured,
    Program,
    machine,
    ratio,
    serve,
    show,
    take_turns,
    verdict,
    whole_programs,
    write,
)

OURS, FUSED, GENAI, TORCH, SMALL, LARGE = (
    "ours",
    "ours, ort",
    "genai",
    "torch.onnx.export",
    "ours, 2 layers",
    "ours, 4 layers",
)
PREFILL, DECODE = 128, 16
#: Measured steps of a session, after one unmeasured step.
STEPS = 3
HEAD_WIDTH = 64  # the head width of SmolLM2, which genai's graph does not contain
# The bars: ratios of export time, export memory and tokens per second, and growth of memory if layers double.
FASTER_THAN_GENAI, FASTER_THAN_TORCH, MEMORY_OVER_GENAI, GROWTH = 3.0, 20.0, 0.6, 1.05
# Both models run the same kernels. On one core (Zen 4, ONNX Runtime 1.32), genai's prompt takes 340 ms: 313 ms for
# matrix products at 109 GFLOP/s, 18 ms for attention, 5 ms for norms and 3 ms for activations. Apart from the matrix
# products, the fastest kernels found take 22 ms, which would give 1.02 times genai's speed. In any graph, a token reads
# every weight once, at 20 GB/s.
SPEED: Mapping[str, float] = {OURS: 0.95, FUSED: 1.05}
#: Private memory of a session relative to the weights, all packed once. A second tied matrix would add a fifth.
PRIVATE_OVER_WEIGHTS = 1.1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="number of measured runs of each variant")
    parser.add_argument("--warm-up", type=int, default=1, help="number of unmeasured runs before the measured runs")
    parser.add_argument("--torch", action="store_true", help="also measure torch.onnx.export, which takes some minutes")
    parser.add_argument(
        "--threads", type=int, default=1, help="threads per ONNX Runtime session; 0 means one thread per core"
    )
    parser.add_argument("--worker", nargs=2, metavar=("MODEL", "PHASE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        return work(Path(options.worker[0]), options.worker[1], options.threads)
    with tempfile.TemporaryDirectory(prefix="onnx-") as name:
        folder = Path(name)
        bases = apart(_bases, folder)
        programs = _programs(bases, folder, torch=options.torch)
        exports = whole_programs(programs, warm_up=options.warm_up, rounds=options.rounds)
        runs = _run(bases[OURS], folder, options.rounds, options.threads)
    report(exports, runs, options.rounds, options.threads)
    return None


def _bases(folder: Path) -> dict[str, Path]:
    from benchmarks import _models
    from fixtures import smollm2

    large = {name: _models.checkpoint(folder / name, int(name.split()[-2])) for name in (SMALL, LARGE)}
    return {OURS: smollm2.checkpoint(), **large}


def _export(base: Path, out: Path, *options: str) -> Sequence[str]:
    return (*TTEXPORT, "--to", "onnx", str(base), "-o", str(out), "--verify", "off", "-q", *options)


def _genai(base: Path, out: Path) -> Sequence[str]:
    command = (sys.executable, "-m", "onnxruntime_genai.models.builder", "-p", "fp32", "-e", "cpu")
    return (*command, "-i", str(base), "-o", str(out), "-c", str(out.with_name("cache")))


def _programs(bases: Mapping[str, Path], folder: Path, *, torch: bool) -> dict[str, Program]:
    out = folder / "out"
    programs = {name: Program(_export(base, out), out) for name, base in bases.items()}
    programs[GENAI] = Program(_genai(bases[OURS], out), out)
    if torch:
        trace = """mkdir "$2" && exec "$0" -m exporter.formats.onnx.trace.decoder "$1" "$2" '{}'"""
        programs[TORCH] = Program(("sh", "-c", trace, sys.executable, str(bases[OURS]), str(out)), out, slow=True)
    return programs


def _run(base: Path, folder: Path, rounds: int, threads: int) -> dict[str, Measured]:
    import subprocess

    commands = {
        OURS: _export(base, folder / "standard"),
        FUSED: _export(base, folder / "ort", "--onnx-ops", "ort"),
        GENAI: _genai(base, folder / "genai"),
    }
    for command in commands.values():
        subprocess.run(command, check=True, capture_output=True)
    models = {OURS: "standard/onnx/model.onnx", FUSED: "ort/onnx/model.onnx", GENAI: "genai/model.onnx"}
    workers = {
        f"{name}: {phase}": ["-m", "benchmarks.onnx", f"--threads={threads}", "--worker", str(folder / model), phase]
        for phase in ("prefill", "decode")
        for name, model in models.items()
    }
    measured = {name: Measured() for name in workers}
    for turn in range(rounds):
        order = [*workers][turn % len(workers) :] + [*workers][: turn % len(workers)]
        for name, session in take_turns({name: workers[name] for name in order}, warm_up=1, rounds=STEPS).items():
            measured[name].add(session)
    return measured


def report(exports: Mapping[str, Measured], runs: Mapping[str, Measured], rounds: int, threads: int) -> None:
    ours, genai = exports[OURS], exports[GENAI]
    bars = [
        ("export speed relative to genai", ratio(genai.seconds, ours.seconds), FASTER_THAN_GENAI, True),
        ("peak memory of export relative to genai", ours.peak_bytes / genai.peak_bytes, MEMORY_OVER_GENAI, False),
        (
            "peak memory of export with 4 layers relative to 2 layers",
            exports[LARGE].peak_bytes / exports[SMALL].peak_bytes,
            GROWTH,
            False,
        ),
    ]
    if TORCH in exports:
        faster = ratio(exports[TORCH].seconds, ours.seconds)
        bars.append(("export speed relative to torch.onnx.export", faster, FASTER_THAN_TORCH, True))
    for name, bar in SPEED.items():
        for phase in ("prefill", "decode"):
            genais, mine = (_seconds(runs[f"{variant}: {phase}"], threads) for variant in (GENAI, name))
            speed = ratio(genais, mine)
            bars.append((f"{name}: tokens/s of {phase} relative to genai", speed, bar, True))
        facts = runs[f"{name}: decode"].facts
        share = facts["private_bytes"] / facts["weight_bytes"]
        bars.append(
            (
                f"{name}: private memory of a session relative to the size of the weights",
                share,
                PRIVATE_OVER_WEIGHTS,
                False,
            )
        )
    verdicts = [verdict(f"{name}:", value, bar, at_least=at_least)[1] for name, value, bar, at_least in bars]
    rows = [[*_figures(name, export), ""] for name, export in exports.items()]
    tokens = {"prefill": PREFILL, "decode": DECODE}
    for name, run in runs.items():
        speed = tokens[name.rpartition(" ")[2]] / median(_seconds(run, threads))
        rows.append([*_figures(name, run), f"{speed:.1f}"])
    columns = ["variant", "s, median", "CPU s", "peak MB", "tokens/s"]
    show(
        f"ONNX export and speed of SmolLM2 in float32, {rounds} rounds, {threads or 'all'} threads",
        columns,
        rows,
        notes=verdicts,
    )
    document = {
        "machine": machine(),
        "rounds": rounds,
        "threads": threads,
        "variants": {name: vars(measured) for name, measured in {**exports, **runs}.items()},
        "bars": [{"name": name, "value": value, "bar": bar} for name, value, bar, _ in bars],
    }
    print(f"written: {write('onnx', document)}")


def _seconds(measured: Measured, threads: int) -> Sequence[float]:
    return measured.cpu_seconds if threads == 1 else measured.seconds


def _figures(name: str, measured: Measured) -> list[str]:
    seconds, cpu_seconds = median(measured.seconds), median(measured.cpu_seconds)
    return [name, f"{seconds:.2f}", f"{cpu_seconds:.2f}", f"{measured.peak_bytes / 1e6:,.0f}"]


# --- the worker: only this part imports onnxruntime ---------------------------------------------------------------


def work(model: Path, phase: str, threads: int) -> None:
    import numpy as np
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    before = _private_bytes()
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    private = _private_bytes() - before
    inputs = {value.name: value for value in session.get_inputs()}
    outputs = [value.name for value in session.get_outputs()]
    empty = {
        name: np.zeros((1, value.shape[1], 0, HEAD_WIDTH), np.float32)
        for name, value in inputs.items()
        if name.startswith("past_key_values.")
    }
    ids = np.random.default_rng(0).integers(5, 40_000, (1, PREFILL + DECODE))

    def run(start: int, stop: int, cache: Mapping[str, Any]) -> dict[str, Any]:
        mask, positions = np.ones((1, stop), np.int64), np.arange(start, stop)[None]
        feeds = {"input_ids": ids[:, start:stop], "attention_mask": mask, "position_ids": positions, **cache}
        values = session.run(outputs, {name: value for name, value in feeds.items() if name in inputs})
        results = dict(zip(outputs, values, strict=True))
        return {name: results[name.replace("past_key_values", "present")] for name in empty}

    filled = run(0, PREFILL, empty)

    def prefill() -> Mapping[str, Any]:
        run(0, PREFILL, empty)
        return {}

    def decode() -> Mapping[str, Any]:
        cache = filled
        for position in range(PREFILL, PREFILL + DECODE):
            cache = run(position, position + 1, cache)
        return {}

    weights = sum(path.stat().st_size for path in model.parent.glob("model.onnx?data"))
    serve({"prefill": prefill, "decode": decode}[phase], private_bytes=private, weight_bytes=weights)


def _private_bytes() -> int:
    """Return the bytes of this process's anonymous memory, which excludes memory-mapped pages of the weights file."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
