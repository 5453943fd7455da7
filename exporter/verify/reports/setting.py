"""Record the environment and the input files of a verification.

The recorded environment consists of package versions, the processor and the number of threads. The files of the
artifacts, the base and the adapters are recorded by their SHA-256 digests.
"""

from __future__ import annotations

import hashlib
import os
import platform
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from exporter.errors import reading
from exporter.packages import package_versions
from exporter.sources.gguf.split_files import GgufModel
from exporter.sources.peft.adapter import Adapter
from exporter.tensors import BLOCK_BYTES
from exporter.verify.expect.reference import Reference
from exporter.version import __version__

#: Packages with an influence on the figures of a report.
_PACKAGES: Final = (
    "gguf",
    "llama-cpp-python",
    "numpy",
    "onnxruntime",
    "peft",
    "safetensors",
    "tokenizers",
    "torch",
    "transformers",
)


def setting(reference: Reference, artifacts: Sequence[Path]) -> dict[str, Any]:
    """Return the environment, the reference and the file digests for a report.

    All files of ``artifacts`` are read to compute the digests. Peak memory: one block of a file, because files are
    hashed block by block.
    """
    base = reference.checkpoint
    return _setting(base.path.name, base.embedding_digest, reference.adapters, artifacts)


def setting_without_base(name: str, adapters: Sequence[Adapter], artifacts: Sequence[Path]) -> dict[str, Any]:
    """Return the environment, the reference and the file digests for a report whose base checkpoint is not available.

    name: name of the base model.
    """
    return _setting(name, None, adapters, artifacts)


def _setting(base: str, digest: str | None, adapters: Sequence[Adapter], artifacts: Sequence[Path]) -> dict[str, Any]:
    return {
        "environment": environment(),
        "reference": {
            "base": base,
            "embedding_sha256": digest,
            "adapters": [{"name": adapter.path.name, "sha256": file_digest(adapter.weights)} for adapter in adapters],
        },
        "files": [
            {"artifact": number, "file": name, "nbytes": path.stat().st_size, "sha256": file_digest(path)}
            for number, artifact in enumerate(artifacts)
            for name, path in _files(artifact)
        ],
    }


def environment() -> dict[str, Any]:
    """Return the versions of the relevant packages, and a description of the machine.

    If a package is not installed, the package's version is None.
    """
    return {
        "ttexport": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": _cpu(),
        "cpus": len(os.sched_getaffinity(0)),
        "threads": os.environ.get("OMP_NUM_THREADS"),
        "packages": package_versions(_PACKAGES),
    }


def file_digest(path: Path) -> str:
    """Return the SHA-256 digest of a file. Raises UnreadableFile if the file cannot be read."""
    digest = hashlib.sha256()
    with reading(path), path.open("rb") as file:
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def _files(artifact: Path) -> Iterator[tuple[str, Path]]:
    """Yield (path relative to the artifact, path on disk) for each file of an artifact, sorted by name.

    For a split GGUF file, all parts are yielded.
    """
    if artifact.is_file():
        yield from ((part.path.name, part.path) for part in GgufModel.open(artifact).files)
        return
    for path in sorted(artifact.rglob("*")):
        if path.is_file():
            yield path.relative_to(artifact).as_posix(), path


def _cpu() -> str:
    """Return the name of the processor.

    On Linux, the name is read from /proc, because Python's platform module does not return the processor name.
    """
    path = Path("/proc/cpuinfo")
    if path.is_file():
        for line in path.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
