"""Measure the errors that ``verify`` finds on valid artifacts, and compare each error with the limit of its check.

The limit of a check is right if the errors of all valid artifacts are below the limit and the errors of faulty
artifacts exceed the limit. The project's tests show that the errors of faulty artifacts exceed the limits. Every
artifact is made from a base and an adapter whose token rows were written by stock PEFT.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from benchmarks._measure import machine, show, write

if TYPE_CHECKING:
    from exporter.verify.report import Check

#: (gate, storage) → family → (value, limit) of each artifact.
Gates = dict[tuple[str, str], dict[str, list[tuple[float, float]]]]

TRAINED_IDS = (300, 17, 2)
#: Label → options of ``ttexport merge``.
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
    "onnx int4-sym": ("--to", "onnx", "--quant", "int4-sym"),
}


def main() -> None:
    from fixtures.models.families import FAMILIES

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("families", nargs="*", help="model families to measure; default: all families")
    parser.add_argument("--seeds", type=int, default=1, help="number of adapters for each family")
    options = parser.parse_args()
    gates: Gates = {}
    refused: list[str] = []
    with tempfile.TemporaryDirectory(prefix="tolerances-") as folder:
        for name in options.families or FAMILIES:
            for storage, checks in _measure(name, Path(folder) / name, options.seeds):
                refused += [f"{name}, {storage}: {check.name}" for check in checks if not check.passed]
                for check in checks:
                    if check.limit and check.value is not None:  # a limit of 0 is not a tolerance
                        gate = (check.name.rpartition(": ")[2], storage)
                        gates.setdefault(gate, {}).setdefault(name, []).append((check.value, check.limit))
            print(f"{name}: done", file=sys.stderr, flush=True)
            if gates:  # writing now keeps the results so far if a later family fails
                write("tolerances", document(gates, refused))
    report(gates, refused)


def _measure(name: str, folder: Path, seeds: int) -> Iterator[tuple[str, list[Check]]]:
    """Yield (label of the artifact's format and dtype, checks of the verification) for every artifact.

    All artifacts made with the same seed are verified against the same reference model.
    """
    from exporter.cli.main import run
    from exporter.verify.expect.reference import Reference
    from exporter.verify.run import verify
    from fixtures.adapters import stock_rows
    from fixtures.models import families

    base = families.build(name, folder / "base")
    for seed in range(seeds):
        adapter = stock_rows(base, folder / f"adapter-{seed}", TRAINED_IDS, seed=seed)
        # The tokenizer classes of some families save another pre-tokenizer.
        for token_file in ("tokenizer.json", "tokenizer_config.json"):
            (adapter / token_file).write_bytes((base / token_file).read_bytes())
        storages: dict[Path, str] = {}
        for storage, arguments in STORAGES.items():
            out = folder / f"{storage}-{seed}{'.gguf' if storage.startswith('gguf') else ''}"
            merge = ["merge", str(adapter), "--base", str(base), *arguments, "--verify", "off", "-q", "-o", str(out)]
            if run(merge) == 0:  # the command fails if the format cannot represent the family
                storages[out] = storage
        for report in verify(list(storages), Reference.open(base, [adapter]), level="full"):
            yield storages[report.artifact], list(report.checks)


def report(gates: Gates, refused: Sequence[str]) -> None:
    rows = []
    for (gate, storage), families in sorted(gates.items()):
        pairs = [pair for measured in families.values() for pair in measured]
        values = [value for value, _ in pairs]
        figures = [f"{median(values):.2g}", f"{max(values):.2g}", f"{max(limit for _, limit in pairs):.2g}"]
        worst = max(families, key=lambda name: max(value for value, _ in families[name]))
        share = max(value / limit for value, limit in pairs)
        rows.append([f"{gate}, {storage}", str(len(pairs)), *figures, f"{share:.2f}", worst])
    notes = [f"checks that fail on a valid artifact: {line}" for line in refused] or [
        "all checks passed on all artifacts"
    ]
    columns = ["check, storage", "artifacts", "median", "largest", "limit", "largest value / limit", "family"]
    show("Values of verify's checks on valid artifacts", columns, rows, notes=notes)
    print(f"written: {write('tolerances', document(gates, refused))}")


def document(gates: Gates, refused: Sequence[str]) -> dict[str, Any]:
    """Return a JSON document with the measured values and the limit of each check, by format and model family."""
    entries = [
        {"gate": gate, "storage": storage, "value, limit": families}
        for (gate, storage), families in sorted(gates.items())
    ]
    return {"machine": machine(), "refused": list(refused), "gates": entries}


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
