"""List the versions of the tools that determine the bytes of an artifact: packages, and the build of llama.cpp."""

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

#: Packages that write tensors, graphs or headers, or that verify them.
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
#: The llama.cpp libraries that contain the quantiser.
_QUANTISER: Final = ("libggml-base*", "libggml-cpu*", "libllama.*")


def tools(digests: FileDigests) -> dict[str, str]:
    """Map the name of every installed tool to its version.

    The entry ``llama.cpp build`` contains the digest of the libraries of llama.cpp. ``machine`` → processor
    architecture.
    """
    versions = {"ttexport": __version__, "machine": platform.machine()}
    versions |= {name: version for name, version in package_versions(_PACKAGES).items() if version}
    if libraries := _libraries():
        build = {path.name: digest for path, digest in digests.of_all(libraries).items()}
        versions["llama.cpp build"] = f"sha256:{digest_of(json.dumps(build, sort_keys=True).encode())}"
    return versions


@cache
def source_digest() -> str:
    """Return the sha256 of this package's source code.

    A digest is needed in addition to the version number of ttexport, because in a development checkout the code can
    change while the version number stays the same.
    """
    root = Path(exporter.__file__).parent
    code = {path.relative_to(root).as_posix(): path.read_text() for path in files_below(root) if path.suffix == ".py"}
    return digest_of(json.dumps(code, sort_keys=True).encode())


def _libraries() -> list[Path]:
    folder = LLAMA_CPP.folder()
    if folder is None:
        return []
    return sorted({path for pattern in _QUANTISER for path in (folder / "lib").glob(pattern) if path.is_file()})
