"""Environment and inputs of a verification.

The environment has versions, processor and threads. The inputs have digests of artifacts, base and adapters.
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
    """Environment, reference and file digests for a report, without the time of day.

    Reads all files of ``artifacts``. Memory: one block of a file.
    """
    base = reference.checkpoint
    return _setting(base.path.name, base.embedding_digest, reference.adapters, artifacts)


def setting_without_base(name: str, adapters: Sequence[Adapter], artifacts: Sequence[Path]) -> dict[str, Any]:
    """Environment, reference and file digests for a report without a base checkpoint.

    name: name of the base.
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
    """Versions of packages and a description of the machine. The version of a missing package is None."""
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
    """SHA-256 digest of a file. Raises UnreadableFile if the file cannot be read."""
    digest = hashlib.sha256()
    with reading(path), path.open("rb") as file:
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def _files(artifact: Path) -> Iterator[tuple[str, Path]]:
    """Yield (path in the artifact, path of the file) in the order of names. A split GGUF gives all its parts."""
    if artifact.is_file():
        yield from ((part.path.name, part.path) for part in GgufModel.open(artifact).files)
        return
    for path in sorted(artifact.rglob("*")):
        if path.is_file():
            yield path.relative_to(artifact).as_posix(), path


def _cpu() -> str:
    """The name of the processor. On Linux, only /proc has the name."""
    path = Path("/proc/cpuinfo")
    if path.is_file():
        for line in path.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
