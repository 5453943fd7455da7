"""A GGUF model on disk: one file, or split files named ``NAME-00001-of-0000N.gguf``.

The first file holds all metadata; every file has tensors of its own (llama.cpp's gguf-split).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final

from exporter.errors import UnreadableFile
from exporter.sources.gguf.file import GgufFile
from exporter.sources.gguf.header import GgufTensor
from exporter.sources.journal import refuse_interrupted

SPLIT_NO: Final = "split.no"
SPLIT_COUNT: Final = "split.count"
SPLIT_TENSORS: Final = "split.tensors.count"
_SPLIT_NAME: Final = re.compile(r"(?P<stem>.+)-(?P<no>\d{5})-of-(?P<count>\d{5})\.gguf")


@dataclass(frozen=True)
class GgufModel:
    """All files of one model, in order; the first holds the metadata."""

    files: Sequence[GgufFile]

    @classmethod
    def open(cls, path: Path) -> GgufModel:
        """Open ``path`` and, if it is the first file of a split model, the other files; reads headers only.

        Raises UnreadableFile for a file that is missing, has another number than its name, or repeats a tensor, and
        for a model with an interrupted in-place patch.
        """
        refuse_interrupted(path)
        first = GgufFile.open(path)
        count = first.metadata.get(SPLIT_COUNT, 0)
        if type(count) is not int or not 1 < count <= 99999:
            return cls([first])
        match = _SPLIT_NAME.fullmatch(path.name)
        if match is None or int(match["count"]) != count:
            raise UnreadableFile(path, f"expected the name NAME-00001-of-{count:05}.gguf, found another")
        names = [split_file_name(match["stem"], number, count) for number in range(count)]
        if path.name != names[0]:
            raise UnreadableFile(path, f"expected the first file, {names[0]}, found another")
        files = [first, *(GgufFile.open(path.with_name(name)) for name in names[1:])]
        for number, file in enumerate(files):
            if (actual := file.metadata.get(SPLIT_NO)) != number or file.metadata.get(SPLIT_COUNT) != count:
                raise UnreadableFile(file.path, f"{SPLIT_NO}: expected {number} of {count}, found {actual}")
        total, stored = first.metadata.get(SPLIT_TENSORS), [name for file in files for name in file.tensors]
        if len(set(stored)) != len(stored) or total not in (None, len(stored)):
            raise UnreadableFile(path, f"{SPLIT_TENSORS}: expected {total} tensors, each once, found {len(stored)}")
        return cls(files)

    @property
    def path(self) -> Path:
        """The first file, which stands for the model."""
        return self.files[0].path

    @property
    def metadata(self) -> Mapping[str, Any]:
        """The model's keys."""
        return self.files[0].metadata

    @cached_property
    def tensors(self) -> Mapping[str, GgufTensor]:
        """Every tensor of every file."""
        return {name: tensor for file in self.files for name, tensor in file.tensors.items()}

    def holder(self, name: str) -> GgufFile:
        """The file that holds tensor ``name``."""
        return next(file for file in self.files if name in file.tensors)


def split_file_name(stem: str, number: int, count: int) -> str:
    """The name of file ``number``, counted from 0, as llama.cpp expects it."""
    return f"{stem}-{number + 1:05}-of-{count:05}.gguf"


def is_later_split_file(path: Path) -> bool:
    """Whether ``path`` is named as a split file other than the first, which does not stand for the model."""
    match = _SPLIT_NAME.fullmatch(path.name)
    return match is not None and int(match["no"]) > 1


def split_file_stem(path: str) -> str | None:
    """``NAME`` of a path ``NAME-00001-of-0000N.gguf``; None if the path is not that of a split file."""
    match = _SPLIT_NAME.fullmatch(path)
    return match["stem"] if match else None
