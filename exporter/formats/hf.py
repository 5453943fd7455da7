"""The Hugging Face writer: the base's shards with merged tensors in them, config, tokenizer files.

Sharded in, sharded out with the same split; raw bytes move where nothing was merged.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from exporter.formats.output import OutputFile, Progress, silent
from exporter.merge.model import MergedModel
from exporter.sources.files import read_file
from exporter.sources.safetensors import prepare
from exporter.staging import write_file
from exporter.tensors import TensorSpec

#: transformers refuses a file whose metadata does not name the framework.
_METADATA: Final = {"format": "pt"}
INDEX: Final = "model.safetensors.index.json"
GENERATION: Final = "generation_config.json"
SINGLE: Final = "model.safetensors"


@dataclass(frozen=True)
class HfLayout:
    """Which shard holds which tensors: file name → specs. Computed from shapes."""

    model: MergedModel
    shards: Mapping[str, list[TensorSpec]]

    @property
    def nbytes(self) -> int:
        """Bytes of all weights, without headers."""
        return sum(spec.nbytes for specs in self.shards.values() for spec in specs)


def plan_hf(model: MergedModel) -> HfLayout:
    """Lay the merged tensors out over the base's shards."""
    shards: dict[str, list[TensorSpec]] = {}
    ledger = model.ledger()
    for name, spec in model.specs.items():
        shard = model.shards[name]
        shards.setdefault(shard, []).append(spec)
        ledger.take(name, f"written to {shard}")
    ledger.close()
    return HfLayout(model, dict(sorted(shards.items())))


def write_hf(layout: HfLayout, out: Path, progress: Progress = silent) -> None:
    """Write the checkpoint into the folder ``out``, which must not exist. Memory: two row blocks.

    Raises OutputError, UnreadableFile (a shard that ends early).
    """
    model = layout.model
    out.mkdir()
    for shard, specs in layout.shards.items():
        header, places = prepare(specs, _METADATA)
        with OutputFile(out / shard, progress) as file:
            file.write(header)
            for spec, offset_bytes in places:
                assert file.nbytes == offset_bytes, f"{spec.name} is not where the header says"
                file.write_segments(model.tensor(spec.name).segments(), spec.nbytes)
    if list(layout.shards) != [SINGLE]:
        weight_map = {spec.name: shard for shard, specs in layout.shards.items() for spec in specs}
        index = {"metadata": {"total_size": layout.nbytes}, "weight_map": dict(sorted(weight_map.items()))}
        write_file(out / INDEX, as_json(index))
    write_file(out / "config.json", as_json(model.config))
    if model.generation_config and GENERATION not in model.files:
        write_file(out / GENERATION, as_json(model.generation_config))
    for name, path in sorted(model.files.items()):
        write_file(out / name, read_file(path))


def as_json(value: object) -> bytes:
    """JSON as transformers writes its configs: two spaces, insertion order, a newline at the end."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
