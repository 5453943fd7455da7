"""What made the bytes: versions of the packages that have a say in them, and the build of llama.cpp."""

from __future__ import annotations

import json
import platform
from functools import cache
from pathlib import Path
from typing import Final

import exporter
from exporter.io.digests import FileDigests, digest_of, files_below
from exporter.packages import LLAMA_CPP, package_versions
from exporter.version import __version__

#: Packages that write tensors, graphs or headers, and that verify them.
_PACKAGES: Final = (
    "gguf",
    "llama-cpp-python",
    "ml_dtypes",
    "numpy",
    "onnx",
    "onnx_ir",
    "onnxruntime",
    "peft",
    "safetensors",
    "tokenizers",
    "torch",
    "transformers",
)
#: The libraries in which llama.cpp rounds.
_QUANTISER: Final = ("libggml-base*", "libggml-cpu*", "libllama.*")


def tools(digests: FileDigests) -> dict[str, str]:
    """Name → version of what is installed; ``llama.cpp build`` is a digest of its libraries, ``machine`` their kind."""
    found = {"ttexport": __version__, "machine": platform.machine()}
    found |= {name: version for name, version in package_versions(_PACKAGES).items() if version}
    if libraries := _libraries():
        held = {path.name: digest for path, digest in digests.of_all(libraries).items()}
        found["llama.cpp build"] = f"sha256:{digest_of(json.dumps(held, sort_keys=True).encode())}"
    return found


@cache
def source_digest() -> str:
    """sha256 of this package's own code: a checkout that somebody works on is another tool at every save."""
    root = Path(exporter.__file__).parent
    code = {path.relative_to(root).as_posix(): path.read_text() for path in files_below(root) if path.suffix == ".py"}
    return digest_of(json.dumps(code, sort_keys=True).encode())


def _libraries() -> list[Path]:
    folder = LLAMA_CPP.folder()
    if folder is None:
        return []
    return sorted({path for pattern in _QUANTISER for path in (folder / "lib").glob(pattern) if path.is_file()})
