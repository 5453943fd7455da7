"""``python -m tests.conformance.download FOLDER``: llama.cpp's converter of the version in constraints.txt."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from exporter.formats.gguf.converter.install import download_converter

ROOT = Path(__file__).parents[2]


def pinned() -> str:
    """The version of llama-cpp-python that the tests run with."""
    [version] = re.findall(r"^llama-cpp-python==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    return str(version)


if __name__ == "__main__":
    download_converter(pinned(), Path(sys.argv[1]).absolute())
