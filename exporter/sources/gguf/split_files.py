"""Opens a GGUF model that is a single file or is split into parts named ``NAME-00001-of-0000N.gguf``.

The first part of a split GGUF contains all metadata. Every tensor is stored in exactly one part. Source: gguf-split in
llama.cpp.
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
    """All files of one GGUF model, in the order of their part numbers.

    The first file contains the metadata of the whole model.
    """

    files: Sequence[GgufFile]

    @classmethod
    def open(cls, path: Path) -> GgufModel:
        """Open ``path``, and all other parts if ``path`` is the first part of a split GGUF.

        The method reads only the header of each file. Raises UnreadableFile if a part is missing, if a part's number in
        the metadata differs from the number in its file name, if a tensor occurs in two parts, or if an in-place patch
        of the model was interrupted.
        """
        refuse_interrupted(path)
        first = GgufFile.open(path)
        count = first.metadata.get(SPLIT_COUNT, 0)
        if type(count) is not int or not 1 < count <= 99999:
            return cls([first])
        match = _SPLIT_NAME.fullmatch(path.name)
        if match is None or int(match["count"]) != count:
            raise UnreadableFile(
                path,
                f"expected the file name NAME-00001-of-{count:05}.gguf for the first part of a split GGUF, "
                "found another file name",
            )
        names = [split_file_name(match["stem"], number, count) for number in range(count)]
        if path.name != names[0]:
            raise UnreadableFile(
                path, f"expected the first part of a split GGUF, found another part; give the path of {names[0]}"
            )
        files = [first, *(GgufFile.open(path.with_name(name)) for name in names[1:])]
        for number, file in enumerate(files):
            if (actual := file.metadata.get(SPLIT_NO)) != number or file.metadata.get(SPLIT_COUNT) != count:
                raise UnreadableFile(file.path, f"{SPLIT_NO}: expected {number} of {count}, found {actual}")
        total, stored = first.metadata.get(SPLIT_TENSORS), [name for file in files for name in file.tensors]
        if len(set(stored)) != len(stored) or total not in (None, len(stored)):
            raise UnreadableFile(
                path,
                f"{SPLIT_TENSORS}: expected {total or len(stored)} tensors with unique names, "
                f"found {len(stored)} tensors with {len(set(stored))} different names",
            )
        return cls(files)

    @property
    def path(self) -> Path:
        """Return the path of the first file, which is used as the path of the whole model."""
        return self.files[0].path

    @property
    def metadata(self) -> Mapping[str, Any]:
        """Return the metadata keys of the model with their values."""
        return self.files[0].metadata

    @cached_property
    def tensors(self) -> Mapping[str, GgufTensor]:
        """Return the tensors of all files of the model."""
        return {name: tensor for file in self.files for name, tensor in file.tensors.items()}

    def holder(self, name: str) -> GgufFile:
        """Return the file that contains the tensor ``name``."""
        return next(file for file in self.files if name in file.tensors)


def split_file_name(stem: str, number: int, count: int) -> str:
    """Return the file name that llama.cpp expects for the part with index ``number``, counted from 0."""
    return f"{stem}-{number + 1:05}-of-{count:05}.gguf"


def is_later_split_file(path: Path) -> bool:
    """Whether ``path`` is a part of a split GGUF, but not the first part, from which the model has to be opened."""
    match = _SPLIT_NAME.fullmatch(path.name)
    return match is not None and int(match["no"]) > 1


def split_file_stem(path: str) -> str | None:
    """Return ``NAME`` if ``path`` is ``NAME-00001-of-0000N.gguf``, or None if ``path`` is not a split file."""
    match = _SPLIT_NAME.fullmatch(path)
    return match["stem"] if match else None
