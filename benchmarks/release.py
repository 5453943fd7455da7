"""Measure how much faster the artifacts of a second adapter are made than those of the first adapter in one release.

The release contains two adapters of one base, each merged to hf, gguf (bf16, Q8_0, Q4_K_M) and onnx (fp32, int4). Every
round starts with an empty artifact cache, so only the jobs of the second adapter can reuse files of the base. The job
times are read from the release's run.json and exclude verification and hashing. The releases are verified at a level
that compares only token rows and runs no model.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks._measure import TTEXPORT, machine, show, verdict, write
from fixtures import smollm2, tiny
from fixtures.adapters import stock_rows

#: Minimum ratio of the time for the first adapter's artifacts to the time for the second adapter's artifacts.
BAR = 5.0
_IDS = {"first": (2, 33, 300, 42), "second": (5, 9, 301, 77)}
_TOML = """
name = "Lamp"
version = "1.0"
base = "{base}"
models.first.adapters = ["first"]
models.second.adapters = ["second"]
hf = {{}}
gguf.types = ["bf16", "Q8_0", "Q4_K_M"]
onnx.precisions = ["fp32", "int4"]
verify.level = "rows"
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=("smollm2", "tiny"), default="smollm2")
    parser.add_argument("--rounds", type=int, default=3, help="number of measured releases")
    parser.add_argument("--folder", type=Path, help="folder for the releases; default: the system's temporary folder")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="release-", dir=options.folder) as home:
        folder = Path(home)
        base = smollm2.checkpoint() if options.model == "smollm2" else tiny.build_llama(folder / "base")
        for seed, (name, ids) in enumerate(_IDS.items()):
            stock_rows(base, folder / name, ids, seed=seed)
        (folder / "release.toml").write_text(_TOML.format(base=base))
        before = machine()
        rounds = [_round(folder) for _ in range(options.rounds)]
    jobs = [name.removeprefix("first/") for name in rounds[0] if name.startswith("first/")]
    cases = [_case(job, [job], rounds) for job in jobs] + [_case("all", jobs, rounds)]
    rows = [[case["job"], f"{case['first']:.2f}", f"{case['second']:.2f}", f"{case['ratio']:.1f}"] for case in cases]
    met, line = verdict("all: first / second", cases[-1]["ratio"], BAR, at_least=True)
    show(f"{options.model}: seconds per job", ["job", "first", "second", "first / second"], rows, notes=[line])
    document = {"model": options.model, "cases": cases, "bar": BAR, "met": met, "machine": before, "after": machine()}
    print(write("release", document))


def _round(folder: Path) -> dict[str, float]:
    """Make one release with an initially empty artifact cache, and map each job's name to its duration in seconds."""
    with tempfile.TemporaryDirectory(dir=folder) as place:
        out = Path(place) / "out"
        arguments = ["release", folder / "release.toml", "-o", out, "--cache", Path(place) / "cache", "-q"]
        subprocess.run([*TTEXPORT, *map(str, arguments)], check=True, stdout=subprocess.DEVNULL)
        jobs: dict[str, Any] = json.loads((out / "run.json").read_text())["jobs"]
    return {name: facts["seconds"] for name, facts in jobs.items() if "method" in facts}


def _case(name: str, jobs: list[str], rounds: list[dict[str, float]]) -> dict[str, Any]:
    """Return the median time of ``jobs`` for each of the two adapters, and the median ratio of the two times.

    Each ratio is computed from times of the same round.
    """
    first, second = ([sum(seconds[f"{model}/{job}"] for job in jobs) for seconds in rounds] for model in _IDS)
    ratios = [mine / other for mine, other in zip(first, second, strict=True)]
    return {"job": name, "first": median(first), "second": median(second), "ratio": median(ratios), "ratios": ratios}


if __name__ == "__main__":
    main()
