"""Compute the sha256 of files and of the tensors in the files. Each hashing thread needs one MiB of memory."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Final, TypeVar

from exporter.errors import BadInput, UnreadableFile
from exporter.io.files import opened
from exporter.release.documents.manifest import FileEntry, is_inside
from exporter.sources.gguf.file import GgufFile
from exporter.sources.hf.checkpoint import PROCESSOR_FILES, TEMPLATE, VOCABULARIES
from exporter.sources.hf.safetensors import read_tensors
from exporter.tensors import ByteRange

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")
#: Files that git and the hub's client add to a repository. No runtime reads these files.
FOREIGN: Final = (".git", ".gitattributes", ".cache/huggingface")
_BLOCK_BYTES: Final = 1 << 20
#: Number of threads. Hashing is limited by the processor and reading by the disk, so more threads would only wait.
_WORKERS: Final = 4

_KINDS_BY_NAME: Final = {
    "config.json": "config",
    "generation_config.json": "config",
    "genai_config.json": "config",
    **dict.fromkeys(sorted(PROCESSOR_FILES), "config"),
    TEMPLATE: "chat template",
    **dict.fromkeys(VOCABULARIES, "tokenizer"),
    "merges.txt": "tokenizer",
    "tokenizer_config.json": "tokenizer",
    "special_tokens_map.json": "tokenizer",
    "added_tokens.json": "tokenizer",
    "README.md": "model card",
    "Modelfile": "modelfile",
}
_KINDS_BY_SUFFIX: Final = {
    ".safetensors": "weights",
    ".onnx": "model",
    ".onnx_data": "weights",
    ".gguf": "model",
    ".json": "data",
}


def file_kind(path: str) -> str:
    """Return the kind of a file in a release, such as "weights" or "tokenizer", according to the file name."""
    name = Path(path).name
    return _KINDS_BY_NAME.get(name) or _KINDS_BY_SUFFIX.get(Path(path).suffix, "other")


def list_files(folder: Path) -> list[str]:
    """Return the sorted paths, with "/" as separator, of all files, broken links and empty folders below ``folder``.

    Files that git or the hub's client adds, such as ``.gitattributes``, are omitted.
    """
    paths = []
    for parent, folders, files in os.walk(folder):
        here = Path(parent).relative_to(folder)
        if here.parts and not folders and not files:
            paths.append(here.as_posix())
        folders[:] = [name for name in folders if (here / name).as_posix() not in FOREIGN]
        links = [name for name in folders if (Path(parent) / name).is_symlink()]
        names = [name for name in [*files, *links] if (here / name).as_posix() not in FOREIGN]
        paths += [(here / name).as_posix() for name in names]
    return sorted(paths)


def entries(folder: Path, paths: Iterable[str]) -> list[FileEntry]:
    """Hash the files at ``paths`` below ``folder``.

    For each file, the sha256 of the whole file and the sha256 of each tensor in the file are computed.

    Raises UnreadableFile if a path is not a regular file or if a file's header does not match its content, and BadInput
    if a checksum file cannot represent a file name.
    """
    names = list(paths)
    for path in names:
        if not is_inside(path):
            raise BadInput(
                f"{folder}: expected file names of printable characters without backslashes, found {path!r:.80}"
            )
    return in_threads(partial(entry, folder), names)


def in_threads(job: Callable[[_Item], _Result], items: Iterable[_Item]) -> list[_Result]:
    """Run ``job`` for every element of ``items`` in threads, and return the results in the order of ``items``.

    Threads speed up hashing, because hashing and reading release the GIL.
    """
    with ThreadPoolExecutor(_WORKERS) as pool:
        return list(pool.map(job, items))


def entry(folder: Path, path: str) -> FileEntry:
    """Return (size of the file in bytes, digest of the file, map of tensor names to the digests of the tensors)."""
    size, digest = file_digest(folder / path)
    return FileEntry(path=path, kind=file_kind(path), size=size, sha256=digest, tensors=tensor_digests(folder / path))


def file_digest(path: Path) -> tuple[int, str]:
    """Return (size in bytes, sha256) of the file at ``path``."""
    with opened(path) as (file, size):
        return size, hashlib.file_digest(file, "sha256").hexdigest()


def tensor_digests(path: Path) -> dict[str, str]:
    """Map the name of each tensor to the sha256 of the tensor's stored bytes, sorted by name.

    The result is empty for a file without tensors.
    """
    return dict(sorted(_tensor_digests(path)))


def _tensor_digests(path: Path) -> Iterator[tuple[str, str]]:
    if path.suffix == ".safetensors":
        for name, stored in read_tensors(path).items():
            yield name, _range_digest(stored.place)
    elif path.suffix == ".gguf":
        for name, tensor in GgufFile.open(path).tensors.items():
            yield name, _range_digest(ByteRange(path, tensor.offset_bytes, tensor.nbytes))
    elif path.suffix == ".onnx":
        from exporter.sources.onnx.file import OnnxFile  # this module imports onnx, which other formats do not need

        graph = OnnxFile.open(path)
        for name, initialiser in graph.initialisers.items():
            if initialiser.place is None:
                yield name, hashlib.sha256(graph.inline_bytes(name)).hexdigest()
            else:
                yield name, _range_digest(initialiser.place)


def _range_digest(place: ByteRange) -> str:
    digest, buffer, done = hashlib.sha256(), bytearray(_BLOCK_BYTES), 0
    with opened(place.path) as (file, _):
        while done < place.nbytes:
            view = memoryview(buffer)[: place.nbytes - done]
            nbytes = os.preadv(file.fileno(), [view], place.offset_bytes + done)
            if nbytes == 0:
                raise UnreadableFile(
                    place.path, f"the file ends {place.nbytes - done} bytes before the end of the tensor"
                )
            digest.update(view[:nbytes])
            done += nbytes
    return digest.hexdigest()
