"""An overlay checkpoint: the merged checkpoint for llama.cpp's converter, without a copy of the unchanged tensors.

The overlay is a folder with symbolic links to the weight files of the base, a weight file with the changed tensors, an
index, the merged config and the merged tokenizer files. A base file that contains a changed tensor is linked as a
whole, so such a tensor is stored twice: with the base's values in the linked file, and with the merged values in the
overlay's own file, which the index names. llama.cpp's converter reads the weight files in the order of their names, and
a tensor of a later file replaces an equally named tensor of an earlier file (``ModelBase.index_tensors``). The own file
therefore gets the last name. The order of the GGUF's tensors depends on the first file with each tensor, so it is the
base's order. For the same reason, a base file of which every tensor changed is replaced by an own file in its place.
A base file with a tensor that the merged model lacks is also replaced by an own file, because the converter refuses
tensors that the index lacks.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Final

from exporter.errors import writing
from exporter.io.json_objects import as_json, read_object
from exporter.io.output import OutputFile
from exporter.io.staging import write_file
from exporter.merge.model import MergedModel
from exporter.merge.vocabulary.templates import is_template, template_setting
from exporter.progress import Progress, silent
from exporter.sources.hf.checkpoint import CONFIG, GENERATION_CONFIG, INDEX, TOKENIZER_CONFIG
from exporter.sources.hf.safetensors import FileTensor, prepare, read_tensors

_METADATA: Final = {"format": "pt"}


@dataclass(frozen=True)
class Overlay:
    """The plan of an overlay checkpoint.

    stored: the merged model in the base's dtypes. values: the merged model from which the overlay's own files are
    written, possibly in a wider dtype. contents: for each weight file of the overlay, in the order in which the
    converter reads the files, either the base's file to link, or the names of the tensors of an own file.
    """

    stored: MergedModel
    values: MergedModel
    contents: tuple[Path | tuple[str, ...], ...]

    @property
    def own(self) -> tuple[str, ...]:
        """The names of all tensors in the overlay's own files."""
        return tuple(name for content in self.contents if isinstance(content, tuple) for name in content)

    @property
    def nbytes(self) -> int:
        """Number of tensor bytes that are written, without the linked files."""
        return sum(self.values.specs[name].nbytes for name in self.own)

    @property
    def shards(self) -> Mapping[str, Path | tuple[str, ...]]:
        """Return ``contents`` as a dict from the name of each weight file of the overlay to its content."""
        count = len(self.contents)
        return {
            f"model-{number:05}-of-{count:05}.safetensors": content for number, content in enumerate(self.contents, 1)
        }

    @cached_property
    def weight_map(self) -> Mapping[str, str]:
        """Map the name of every tensor to the weight file from which the converter takes the tensor."""
        places: dict[str, str] = {}
        for shard, content in self.shards.items():
            places |= dict.fromkeys(read_tensors(content) if isinstance(content, Path) else content, shard)
        return dict(sorted(places.items()))

    def index(self) -> dict[str, object]:
        """Return the content of ``model.safetensors.index.json``."""
        own = frozenset(self.own)
        size = sum((self.values if name in own else self.stored).specs[name].nbytes for name in self.weight_map)
        return {"metadata": {"total_size": size}, "weight_map": self.weight_map}


def plan_overlay(stored: MergedModel, values: MergedModel) -> Overlay:
    """Plan the overlay of the merged model ``stored``. Reads the headers of the base's weight files, and no weights.

    values: the same merged model, in the dtype in which the overlay's own files are written.
    """
    by_file: dict[str, list[str]] = {}
    for name in stored.tensors:
        by_file.setdefault(stored.shards[name], []).append(name)
    contents: list[Path | tuple[str, ...]] = []
    changed: list[str] = []
    for _, names in sorted(by_file.items()):
        unchanged = {name: place for name in names if (place := _unchanged(stored, name))}
        paths = set(unchanged.values())
        if len(paths) == 1 and all(read_tensors(path).keys() <= stored.tensors.keys() for path in paths):
            contents += paths
            changed += [name for name in names if name not in unchanged]
        else:
            contents.append(tuple(names))
    overlay = Overlay(stored, values, (*contents, tuple(changed)) if changed else tuple(contents))
    ledger = stored.ledger()
    for name, shard in overlay.weight_map.items():
        ledger.take(name, f"in {shard} of the overlay")
    ledger.close()
    return overlay


def _unchanged(model: MergedModel, name: str) -> Path | None:
    """Return the weight file that contains the merged tensor ``name`` under that name, or None if none does."""
    tensor = model.tensors[name]
    return tensor.place.path if isinstance(tensor, FileTensor) and tensor.spec.name == name else None


def write_overlay(overlay: Overlay, folder: Path, progress: Progress = silent) -> None:
    """Write the overlay to the new folder ``folder``. Peak memory: two blocks of tensor rows.

    Raises OutputError if the folder cannot be written, and UnreadableFile if a weight file of the base is truncated.
    """
    model = overlay.stored
    with writing(folder):
        folder.mkdir()
    for name, content in overlay.shards.items():
        if isinstance(content, Path):
            _link(content, folder / name)
        else:
            _write_own(overlay.values, content, folder / name, progress)
    write_file(folder / INDEX, as_json(overlay.index()))
    write_file(folder / CONFIG, as_json(model.config))
    if model.generation_config and GENERATION_CONFIG not in model.files:
        write_file(folder / GENERATION_CONFIG, as_json(model.generation_config))
    contents = {**model.rewritten, **_templates(model)}
    for name, file in sorted(model.files.items()):
        if name not in contents and not is_template(name, processor=True):
            _link(file, folder / name)
    for name, text in sorted(contents.items()):
        if not is_template(name, processor=True):
            write_file(folder / name, text)


def _templates(model: MergedModel) -> dict[str, bytes]:
    """Return a tokenizer_config.json that contains all chat templates of the merged model, by name.

    If a model has chat templates in several places, transformers and llama.cpp's converter choose different templates.
    The converter prefers tokenizer_config.json, and ignores named templates in separate files without a default.
    Returns {} if the merged model's tokenizer_config.json contains these templates.
    """
    path = model.files.get(TOKENIZER_CONFIG)
    stated = template_setting(model.templates) if model.templates else None
    config = read_object(path) if path else {}
    if config.get("chat_template") == stated:
        return {}
    return {TOKENIZER_CONFIG: as_json({**config, "chat_template": stated})}


def _write_own(model: MergedModel, names: Sequence[str], path: Path, progress: Progress) -> None:
    specs = [model.specs[name] for name in names]
    header, places = prepare(specs, _METADATA)
    with OutputFile(path, progress, nbytes=len(header) + sum(spec.nbytes for spec in specs)) as file:
        file.write(header)
        for spec, _ in places:
            file.write_segments(model.tensor(spec.name).segments(), spec.nbytes)


def _link(file: Path, link: Path) -> None:
    """Make ``link`` a symbolic link to ``file``, or a copy if the file system of ``link`` has no symbolic links."""
    with writing(link):
        link.parent.mkdir(parents=True, exist_ok=True)
        try:
            link.symlink_to(file.resolve())
        except OSError:
            shutil.copyfile(file, link)
