"""Run the census, which tests merges of adapters for every text model type of transformers.

For each model type and head class, a separate process builds a tiny model and adapters of stock PEFT, and merges each
adapter. Merged Hugging Face checkpoints are compared with the base and the unmerged adapter in stock PEFT. GGUFs count
as exact if llama.cpp's logits equal those of the unmerged adapter, and ONNX models if ttexport's full verification
passes.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fixtures.zoo.recipes import Recipe

DOCS = Path(__file__).parents[2] / "docs" / "models.md"
_PREAMBLE = """# Models

`python -m benchmarks.census --docs` writes this page. It makes a tiny random checkpoint of every text-capable model
type and head class of transformers {version}, makes two adapters of it with stock PEFT {peft}, merges them, and
compares the merged checkpoint with the unmerged adapter: outputs (fp32; the largest difference is at most 1e-5 of the
largest output, or four times the rounding of PEFT's own merge where that is more), loaded weights, bytes of untouched
tensors, tie, and what the loader reports. Column `rows`: rows of the embedding. Column `LoRA`: low-rank updates of all
linear layers and stacked experts, rows, and two new tokens.

`exact`: nothing differs. `refused`: the merge ends with the exit code in brackets and the reason in the last column.
`as PEFT merges`: the outputs are those of PEFT's own merge, and PEFT computes others unmerged, because it leaves out a
module that shares a trained matrix. `PEFT itself cannot`: stock PEFT does not make, load or run the adapter.

Columns `gguf`: the GGUF has been made by ttexport's own writer or by llama.cpp's converter, and llama.cpp's logits are
compared with those of the unmerged adapter (mean KL divergence of at most 1e-6). The tokenizer of the tiny models is
none that llama.cpp's converter knows, so the census names its kind. An empty cell: not tried, for example because the
converter does not know the class.

A name such as `bert:mlm` is a model type and a head: `mlm` masked language model, `cls` sequence classification,
`tokens` token classification, `lm` the decoder alone, `encoder` no head. `+mtp` has the tensors of a further prediction
layer, `+head` stores the tied head as well, `+tied` and `+untied` have the other tie than the type's default.

"""


def main() -> int:
    """Run the census.

    Return 1 if a merge crashed, wrote wrong values, wrote a checkpoint that does not load, or failed ttexport's
    verification. Otherwise, return 0.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks.census", description=__doc__)
    parser.add_argument(
        "--only",
        metavar="NAME,...",
        help="model types, each with or without a head class, such as llama,bert:mlm; bert selects all heads of bert",
    )
    parser.add_argument(
        "--sample", action="store_true", help="test a fixed sample of models with all ways of storing weights"
    )
    parser.add_argument(
        "--matrix",
        action="store_true",
        help="merge adapters of every recipe, but only for models chosen to include all ways of storing weights",
    )
    parser.add_argument("--recipes", metavar="NAME;...", help="names of the recipes for --matrix; default: all recipes")
    parser.add_argument(
        "--to",
        default="hf",
        metavar="FORMAT,...",
        help="formats to merge to: hf (default), gguf (after ttexport converter install), onnx",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results of all merges to FILE")
    parser.add_argument(
        "--earlier",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="add the results that an earlier run wrote to FILE with --json; repeatable, and later results count",
    )
    parser.add_argument("--docs", action="store_true", help=f"write the results to docs/{DOCS.name}")
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count() or 1, help="maximum number of simultaneous processes"
    )
    parser.add_argument("--limit", type=int, default=180, help="maximum number of seconds per model")
    options = parser.parse_args()
    from benchmarks.census.pool import run_all
    from benchmarks.census.table import cell, counts, joined, markdown
    from benchmarks.census.trial import CRASH, GATE, UNLOADABLE, WRONG

    rows: list[dict[str, Any]] = []
    recipes = _recipes(options)
    runs = run_all(_names(options), options.to.split(","), jobs=options.jobs, limit=options.limit, recipes=recipes)
    for number, mine in enumerate(runs, 1):
        rows += mine
        results = ", ".join(f"{row['target']} {row['adapter']}: {cell(row)}" for row in mine)
        print(f"{number} {mine[0]['name']}: {results}", file=sys.stderr, flush=True)
        if options.json:
            options.json.write_text(json.dumps(sorted(rows, key=lambda row: str(row["name"])), indent=1))
    table = joined([*(json.loads(path.read_text()) for path in options.earlier), rows])
    print(markdown(table))
    print(counts(table))
    if options.docs:
        DOCS.write_text(_page(markdown(table), counts(table)))
    return int(any(row["result"] in (WRONG, UNLOADABLE, GATE, CRASH) for row in rows))


def _recipes(options: argparse.Namespace) -> Mapping[str, Recipe]:
    from benchmarks.census.trial import ADAPTERS
    from fixtures.zoo.recipes import RECIPES

    if not options.matrix:
        return ADAPTERS
    return {name: RECIPES[name] for name in (options.recipes.split(";") if options.recipes else RECIPES)}


def _names(options: argparse.Namespace) -> list[str]:
    from fixtures.zoo.names import NAMES, SAMPLE
    from fixtures.zoo.recipes import MODELS

    if not options.only:
        return list(MODELS if options.matrix else SAMPLE if options.sample else NAMES)
    asked = options.only.split(",")
    chosen = {name: [each for each in NAMES if name in (each, re.split("[:+]", each)[0])] for name in asked}
    if missing := [name for name, names in chosen.items() if not names]:
        raise SystemExit(
            f"--only: expected model types of transformers, with or without a head class, found {', '.join(missing)}"
        )
    return list(dict.fromkeys(each for name, names in chosen.items() for each in ([name] if name in NAMES else names)))


def _page(table: str, tally: str) -> str:
    import peft
    import transformers

    counted = "".join(f"- {line}\n" for line in tally.splitlines())
    return _PREAMBLE.format(version=transformers.__version__, peft=peft.__version__) + counted + "\n" + table


if __name__ == "__main__":
    # Before numeric libraries are imported: a process may be forked safely while it has one thread.
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
    sys.exit(main())
