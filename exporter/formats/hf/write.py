"""Write a Hugging Face checkpoint: the weight shards with the merged tensors, the config, and the tokenizer files.

If the base checkpoint is sharded, the merged checkpoint is divided into the same shards, and unchanged tensors are
copied as raw bytes. A shard in which no tensor changed is byte-identical to the base's shard. The metadata of a shard
with changed tensors contains the provenance (base model, adapters, …).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from exporter.io.files import read_file
from exporter.io.json_objects import as_json
from exporter.io.output import OutputFile
from exporter.io.staging import write_file
from exporter.merge.model import MergedModel
from exporter.progress import Progress, silent
from exporter.sources.hf.checkpoint import CONFIG, GENERATION_CONFIG, INDEX, WEIGHTS
from exporter.sources.hf.safetensors import FileTensor, prepare, read_tensors
from exporter.tensors import ByteRange, TensorSpec

#: Metadata of every file: transformers refuses a safetensors file without the framework in the metadata.
_METADATA: Final = {"format": "pt"}


@dataclass(frozen=True)
class Shard:
    """A weight file of a checkpoint.

    specs: the tensors of the weight file, in the base's order. whole: the weight file of the base that can be copied
    unchanged, or None if there is no such file.
    """

    specs: list[TensorSpec]
    whole: ByteRange | None = None


@dataclass(frozen=True)
class HfLayout:
    """The planned checkpoint. ``shards`` maps file names to weight files."""

    model: MergedModel
    shards: Mapping[str, Shard]

    @property
    def nbytes(self) -> int:
        """Size of all weights in bytes, without the headers of the weight files."""
        return sum(spec.nbytes for shard in self.shards.values() for spec in shard.specs)

    def index(self) -> dict[str, object]:
        """Return the content of ``model.safetensors.index.json``, in the format that transformers writes.

        The index contains the number of parameters, in which tied parameters are counted once.
        """
        duplicates = self.model.tie.duplicates
        parameters = sum(math.prod(spec.shape) for name, spec in self.model.specs.items() if name not in duplicates)
        weight_map = {spec.name: name for name, shard in self.shards.items() for spec in shard.specs}
        return {
            "metadata": {"total_parameters": parameters, "total_size": self.nbytes},
            "weight_map": dict(sorted(weight_map.items())),
        }


def plan_hf(model: MergedModel, max_shard_bytes: int | None = None) -> HfLayout:
    """Distribute the tensors over shards: as in the base by default, or over new shards of at most ``max_shard_bytes``.

    A tensor larger than ``max_shard_bytes`` gets its own shard. The function reads only the headers of the base's
    files.
    """
    split = _resplit(model, max_shard_bytes) if max_shard_bytes else _split_of_base(model)
    ledger = model.ledger()
    for shard, specs in split.items():
        for spec in specs:
            ledger.take(spec.name, f"written to {shard}")
    ledger.close()
    return HfLayout(model, {name: Shard(specs, _whole(model, specs)) for name, specs in sorted(split.items())})


def _split_of_base(model: MergedModel) -> dict[str, list[TensorSpec]]:
    shards: dict[str, list[TensorSpec]] = {}
    for name, spec in model.specs.items():
        shards.setdefault(model.shards[name], []).append(spec)
    return shards


def _resplit(model: MergedModel, max_shard_bytes: int) -> dict[str, list[TensorSpec]]:
    """Distribute the tensors, in the base's order, over new shards with the file names that transformers uses."""
    shards: list[list[TensorSpec]] = [[]]
    filled = 0
    for spec in model.specs.values():
        if shards[-1] and filled + spec.nbytes > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(spec)
        filled += spec.nbytes
    if len(shards) == 1:
        return {WEIGHTS: shards[0]}
    return {f"model-{number:05}-of-{len(shards):05}.safetensors": specs for number, specs in enumerate(shards, 1)}


def _whole(model: MergedModel, specs: list[TensorSpec]) -> ByteRange | None:
    """Return the base's weight file that contains exactly the tensors ``specs``, or None if there is no such file.

    If the merge changes one of the tensors ``specs``, the function returns None.
    """
    tensors = {spec.name: model.tensors[spec.name] for spec in specs}
    path = model.where(specs[0].name)
    if not all(isinstance(tensor, FileTensor) and tensor.place.path == path for tensor in tensors.values()):
        return None
    stored = read_tensors(path)
    end = max(tensor.place.offset_bytes + tensor.place.nbytes for tensor in stored.values())
    return ByteRange(path, 0, end) if stored == tensors else None


def write_hf(layout: HfLayout, out: Path, progress: Progress = silent) -> None:
    """Write the checkpoint ``layout`` to the new folder ``out``. Peak memory: two blocks of tensor rows.

    Raises OutputError if the checkpoint cannot be written, and UnreadableFile if a shard of the base is truncated.
    """
    model = layout.model
    out.mkdir()
    with ThreadPoolExecutor(1) as executor:
        provenance = executor.submit(
            lambda: model.provenance
        )  # computing a digest of the base's embedding takes a while
        for name, shard in layout.shards.items():
            if shard.whole:
                with OutputFile(out / name, progress, nbytes=shard.whole.nbytes) as file:
                    file.copy(shard.whole)
            else:
                _write_shard(model, shard, out / name, progress, provenance)
    if list(layout.shards) != [WEIGHTS]:
        write_file(out / INDEX, as_json(layout.index()))
    write_file(out / CONFIG, as_json(model.config))
    if model.generation_config and GENERATION_CONFIG not in model.files:
        write_file(out / GENERATION_CONFIG, as_json(model.generation_config))
    for name, path in sorted(model.files.items()):
        if name not in model.rewritten:
            write_file(out / name, read_file(path))
    for name, content in sorted(model.rewritten.items()):
        write_file(out / name, content)


def _write_shard(
    model: MergedModel, shard: Shard, path: Path, progress: Progress, provenance: Future[Mapping[str, str]]
) -> None:
    like = model.place(shard.specs[0].name).offset_bytes
    header, places = prepare(shard.specs, _metadata(model.provenance_shape), like_offset_bytes=like)
    with OutputFile(path, progress, nbytes=len(header) + sum(spec.nbytes for spec in shard.specs)) as file:
        file.write(header)
        for spec, offset_bytes in places:
            assert file.nbytes == offset_bytes, f"{spec.name}: expected offset {offset_bytes}, found {file.nbytes}"
            file.write_segments(model.tensor(spec.name).segments(), spec.nbytes)
        final, _ = prepare(shard.specs, _metadata(provenance.result()), like_offset_bytes=like)
        assert len(final) == len(header), "expected a safetensors header of the planned length, found another length"
        file.begin_with(final)


def _metadata(provenance: Mapping[str, str]) -> dict[str, str]:
    return _METADATA | {f"ttexport.{key}": value for key, value in sorted(provenance.items())}
