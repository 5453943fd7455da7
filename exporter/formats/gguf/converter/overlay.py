"""An overlay checkpoint: the merged checkpoint for llama.cpp's converter, without a copy of the unchanged tensors.

The overlay is a folder with symbolic links to the weight files of the base, a weight file with the changed tensors, an
index, the merged config and the merged tokenizer files. A base file that contains a changed tensor is linked as a
whole, so such a tensor is stored twice: with the base's values in the linked file, and with the merged values in the
overlay's own file. The index names the overlay's own file. llama.cpp's converter reads the weight files in the order of
their names, and a tensor of a later file replaces an equally named tensor of an earlier file
(``ModelBase.index_tensors``). The names are chosen so that the own file is the last file. The place of a tensor in the
converter's output depends on the first file with the tensor, so the order of the GGUF's tensors is the base's order.
The converter refuses a weight file with a tensor that the index lacks. If the merged model lacks a tensor of a base
file, the file's other tensors are therefore copied to the own file.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from exporter.errors import writing
from exporter.io.json_objects import as_json
from exporter.io.output import OutputFile
from exporter.io.staging import write_file
from exporter.merge.model import MergedModel
from exporter.progress import Progress, silent
from exporter.sources.hf.checkpoint import CONFIG, GENERATION_CONFIG, INDEX
from exporter.sources.hf.safetensors import FileTensor, prepare, read_tensors
from exporter.tensors import TensorSpec

_METADATA: Final = {"format": "pt"}


@dataclass(frozen=True)
class Overlay:
    """The plan of an overlay checkpoint.

    stored: the merged model in the base's dtypes. values: the merged model from which changed tensors are written,
    possibly in a wider dtype. linked: the base's weight files, in the order of their names. own: the names of the
    tensors in the overlay's own weight file.
    """

    stored: MergedModel
    values: MergedModel
    linked: tuple[Path, ...]
    own: tuple[str, ...]

    @property
    def own_specs(self) -> list[TensorSpec]:
        """The tensors of the overlay's own weight file."""
        return [self.values.specs[name] for name in self.own]

    @property
    def nbytes(self) -> int:
        """Number of tensor bytes that are written, without the linked files."""
        return sum(spec.nbytes for spec in self.own_specs)

    @property
    def shards(self) -> Mapping[str, Path | None]:
        """Return {name of a weight file of the overlay: linked file, or None for the own file}, in reading order."""
        files = [*self.linked, None] if self.own else [*self.linked]
        return {f"model-{number:05}-of-{len(files):05}.safetensors": file for number, file in enumerate(files, 1)}

    def index(self) -> dict[str, object]:
        """Return the content of ``model.safetensors.index.json``, which names one weight file for every tensor."""
        own = set(self.own)
        shard_of = {file: name for name, file in self.shards.items()}
        places = {
            name: shard_of[None] if name in own else shard_of[self.stored.where(name)] for name in self.stored.tensors
        }
        size = sum(spec.nbytes for name, spec in self.stored.specs.items() if name not in own) + self.nbytes
        return {"metadata": {"total_size": size}, "weight_map": dict(sorted(places.items()))}


def plan_overlay(stored: MergedModel, values: MergedModel) -> Overlay:
    """Plan the overlay of the merged model ``stored``. Reads the headers of the base's weight files, and no weights.

    values: the same merged model, in the dtype in which changed tensors are written.
    """
    unchanged = {
        name: tensor.place.path
        for name, tensor in stored.tensors.items()
        if isinstance(tensor, FileTensor) and tensor.spec.name == name
    }
    # Files of which every tensor changed are linked as well, because of the order of the tensors.
    of_base = {stored.where(name) for name in stored.tensors if stored.where(name).name == stored.shards[name]}
    files = of_base.union(unchanged.values())
    linked = {path for path in files if read_tensors(path).keys() <= stored.tensors.keys()}
    own = tuple(name for name in stored.tensors if unchanged.get(name) not in linked)
    written = frozenset(own)
    ledger = stored.ledger()
    for name in stored.tensors:
        ledger.take(name, "written to the overlay" if name in written else "linked")
    ledger.close()
    return Overlay(stored, values, tuple(sorted(linked, key=lambda path: (path.name, path))), own)


def write_overlay(overlay: Overlay, folder: Path, progress: Progress = silent) -> None:
    """Write the overlay to the new folder ``folder``. Peak memory: two blocks of tensor rows.

    Raises OutputError if the folder cannot be written, and UnreadableFile if a weight file of the base is truncated.
    """
    model = overlay.stored
    with writing(folder):
        folder.mkdir()
    for name, file in overlay.shards.items():
        if file is None:
            _write_own(overlay, folder / name, progress)
        else:
            _link(file, folder / name)
    write_file(folder / INDEX, as_json(overlay.index()))
    write_file(folder / CONFIG, as_json(model.config))
    if model.generation_config and GENERATION_CONFIG not in model.files:
        write_file(folder / GENERATION_CONFIG, as_json(model.generation_config))
    for name, file in sorted(model.files.items()):
        if name not in model.rewritten:
            _link(file, folder / name)
    for name, content in sorted(model.rewritten.items()):
        write_file(folder / name, content)


def _write_own(overlay: Overlay, path: Path, progress: Progress) -> None:
    header, places = prepare(overlay.own_specs, _METADATA)
    with OutputFile(path, progress, nbytes=len(header) + overlay.nbytes) as file:
        file.write(header)
        for spec, _ in places:
            file.write_segments(overlay.values.tensor(spec.name).segments(), spec.nbytes)


def _link(file: Path, link: Path) -> None:
    """Make ``link`` a symbolic link to ``file``, or a copy if the file system of ``link`` has no symbolic links."""
    with writing(link):
        link.parent.mkdir(parents=True, exist_ok=True)
        try:
            link.symlink_to(file.resolve())
        except OSError:
            shutil.copyfile(file, link)
