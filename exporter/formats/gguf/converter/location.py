"""Find the script and the source files of llama.cpp's converter in a folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Final

#: Name of the converter's script.
SCRIPT: Final = "convert_hf_to_gguf.py"
#: Folders beside the script with the Python packages that the script imports.
_PACKAGES: Final = ("conversion", "gguf-py")


def script_of(converter: Path) -> Path:
    """Return the script that ``converter``, a script or a folder with llama.cpp's script, names."""
    return converter / SCRIPT if converter.is_dir() else converter


def source_files(converter: Path) -> Mapping[str, Path]:
    """Map a name to the script and to each Python file beside the script that the script imports.

    The names do not depend on the folder of the script.
    """
    script = script_of(converter)
    imported = [path for name in _PACKAGES for path in sorted((script.parent / name).rglob("*.py"))]
    return {"script": script} | {path.relative_to(script.parent).as_posix(): path for path in imported}
