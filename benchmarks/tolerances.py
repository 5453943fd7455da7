"""What the numeric gates of ``verify`` measure on sound artifacts: every family, every storage, against each limit.

A limit is right if the largest value stays below it and a fault does not; the tests show the latter. Every artifact is
merged from rows of stock PEFT, and judged by the command that users run.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks._measure import machine, show, write

TRAINED_IDS = (300, 17, 2)
#: Label → options of merge.
STORAGES: dict[str, Sequence[str]] = {
    "hf": ("--to", "hf"),
    "gguf F32": ("--to", "gguf", "--dtype", "f32"),
    "gguf F16": ("--to", "gguf", "--dtype", "f16"),
    "gguf BF16": ("--to", "gguf", "--dtype", "bf16"),
    "gguf Q8_0": ("--to", "gguf", "--quant", "Q8_0"),
    "gguf Q4_0": ("--to", "gguf", "--quant", "Q4_0"),
    "onnx fp32": ("--to", "onnx"),
    "onnx fp16": ("--to", "onnx", "--dtype", "f16"),
    "onnx int8": ("--to", "onnx", "--quant", "int8"),
    "onnx int4": ("--to", "onnx", "--quant", "int4"),
}


def main() -> None:
    from fixtures.families import FAMILIES

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("families", nargs="*", help="names of tiny models; default: all")
    parser.add_argument("--seeds", type=int, default=1, help="adapters of each family")
    options = parser.parse_args()
    found: dict[tuple[str, str], list[tuple[float, float]]] = {}
    refused: list[str] = []
    with tempfile.TemporaryDirectory(prefix="tolerances-") as folder:
        for name in options.families or FAMILIES:
            for storage, checks in _measure(name, Path(folder) / name, options.seeds):
                refused += [f"{name}, {storage}: {check['name']}" for check in checks if not check["passed"]]
                for check in checks:
                    if check["limit"]:  # a limit of 0 is no tolerance
                        gate = (check["name"].rpartition(": ")[2], storage)
                        found.setdefault(gate, []).append((check["value"], check["limit"]))
    report(found, refused)


def _measure(name: str, folder: Path, seeds: int) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    from exporter.cli.main import run
    from fixtures import families
    from fixtures.adapters import stock_rows

    base = families.build(name, folder / "base")
    for seed in range(seeds):
        adapter = stock_rows(base, folder / f"adapter-{seed}", TRAINED_IDS, seed=seed)
        for token_file in ("tokenizer.json", "tokenizer_config.json"):  # some families' classes save another splitting
            (adapter / token_file).write_bytes((base / token_file).read_bytes())
        for storage, words in STORAGES.items():
            out = folder / f"{storage}-{seed}{'.gguf' if storage.startswith('gguf') else ''}"
            merge = ["merge", str(adapter), "--base", str(base), *words, "--verify", "off", "-q", "-o", str(out)]
            if run(merge):
                continue  # this format has no place for the family
            report = folder / f"report-{storage}-{seed}"
            verify = ["verify", str(out), "--reference", str(base), "--adapter", str(adapter), "-q"]
            run([*verify, "--report", str(report)])
            [artifact] = json.loads((report / "report.json").read_text())["artifacts"]
            yield storage, artifact["checks"]


def report(found: dict[tuple[str, str], list[tuple[float, float]]], refused: Sequence[str]) -> None:
    rows = []
    for (gate, storage), pairs in sorted(found.items()):
        values, share = [value for value, _ in pairs], max(value / limit for value, limit in pairs)
        figures = [f"{median(values):.2g}", f"{max(values):.2g}", f"{max(limit for _, limit in pairs):.2g}"]
        rows.append([f"{gate}, {storage}", str(len(pairs)), *figures, f"{share:.2f}"])
    notes = [f"a sound artifact was refused: {line}" for line in refused] or ["no sound artifact was refused"]
    columns = ["gate, storage", "artifacts", "median", "largest", "limit", "largest share of its limit"]
    show("Gates of verify on sound artifacts", columns, rows, notes=notes)
    values = [{"gate": gate, "storage": storage, "value, limit": pairs} for (gate, storage), pairs in found.items()]
    print(f"written: {write('tolerances', {'machine': machine(), 'refused': list(refused), 'gates': values})}")


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
