"""Generate the data files in exporter/models/data from the installed version of transformers.

    python -m exporter.models.generate            # rewrites exporter/models/data
    python -m exporter.models.generate --check    # compares the data with the installed transformers

The command collects the facts about every class with a text head, and the conversions of stored tensors. Source of the
conversions: transformers' ``conversion_mapping``.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from exporter.models.data import CLASSES, CONVERSIONS, FOLDER
from exporter.models.generate_class import describe_class, text_classes


def conversions() -> dict[str, list[dict[str, Any]]]:
    """Map every model type and class name in transformers' conversion table to the list of its transforms."""
    from transformers import conversion_mapping

    table = conversion_mapping._build_checkpoint_conversion_mapping()
    return {name: [_transform(item) for item in table[name]] for name in sorted(table)}


def _transform(item: Any) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "name": type(item).__name__,
        "sources": list(item._original_source_patterns),
        "targets": list(item._original_target_patterns),
    }
    if hasattr(item, "operations"):
        entry["operations"] = [{"name": type(op).__name__, **_plain(vars(op))} for op in item.operations]
    if hasattr(item, "offset"):
        entry["offset"] = item.offset
    return entry


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: list(value) if isinstance(value, tuple) else value for key, value in sorted(values.items())}


def generate(workers: int = 2) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield a pair (file name, content) for every data file."""
    types = text_classes()
    yield (
        CONVERSIONS,
        {
            "transformers": importlib.import_module("transformers").__version__,
            "bases": {name: entry["base"] for name, entry in types.items() if entry["base"]},
            "conversions": conversions(),
        },
    )
    names = sorted({name for entry in types.values() for name in entry["classes"]})
    with ProcessPoolExecutor(workers) as pool:
        results = {name: (facts, error) for name, facts, error in pool.map(describe_class, names, chunksize=8)}
    described: dict[str, str] = {}
    for model_type, entry in types.items():
        classes = {name: results[name][0] for name in entry["classes"] if results[name][0]}
        unbuilt = {name: results[name][1] for name in entry["classes"] if results[name][1]}
        if entry["tasks"] and (unbuilt or any(facts["embedding"] for facts in classes.values() if facts)):
            described |= dict.fromkeys(classes, model_type)
            yield f"{model_type}.json", {"tasks": entry["tasks"], "unbuilt": unbuilt, "classes": classes}
    yield CLASSES, described


def _text(content: Mapping[str, Any]) -> str:
    """Return ``content`` as JSON with one line for each fact about a class, so that diffs are easy to review."""

    def lines(value: Any, depth: int) -> str:
        if depth == 0 or not isinstance(value, dict) or not value:
            return json.dumps(value, sort_keys=True, ensure_ascii=False)
        entries = (f"{json.dumps(key)}: {lines(value[key], depth - 1)}" for key in sorted(value))
        return "{\n" + ",\n".join(entries) + "\n}"

    return lines(content, 3) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the data files. With ``--check``, only check the data files, and return 1 if a data file is outdated."""
    parser = argparse.ArgumentParser(description="Generate exporter/models/data from the installed transformers.")
    parser.add_argument("--check", action="store_true", help="compare the data files instead of writing them")
    options = parser.parse_args(arguments)
    os.environ["HF_HUB_OFFLINE"] = "1"
    files = {name: _text(content) for name, content in generate()}
    present = {path.name: path for path in Path(str(FOLDER)).glob("*.json")}
    differing = [name for name in files if name not in present or present[name].read_text() != files[name]]
    differing += sorted(present.keys() - files.keys())
    if options.check:
        for name in differing:
            print(f"{name}: differs from transformers; run python -m exporter.models.generate", file=sys.stderr)
        return 1 if differing else 0
    for name in differing:
        if name in files:
            (Path(str(FOLDER)) / name).write_text(files[name])
        else:
            present[name].unlink()
    print(f"{len(files)} files, {len(differing)} changed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
