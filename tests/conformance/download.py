"""``python -m tests.conformance.download FOLDER``: llama.cpp's converter from the pinned source distribution.

pip downloads the distribution and compares its digest. Its metadata is prepared, and nothing is compiled.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Final

#: The distribution with its digest, as pip takes it.
REQUIREMENT: Final = Path(__file__).with_name("llama-cpp.txt")
#: What the converter needs of llama.cpp.
_PARTS: Final = ("convert_hf_to_gguf.py", "conversion/", "gguf-py/gguf/")


def main(folder: Path) -> None:
    """Put the converter into ``folder``, instead of what is there. Raises CalledProcessError if pip fails."""
    with tempfile.TemporaryDirectory() as place:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        command += ["--no-binary", "llama-cpp-python", "--require-hashes", "-r", str(REQUIREMENT), "-d", place]
        subprocess.run(command, check=True)
        [distribution] = Path(place).glob("*.tar.gz")
        shutil.rmtree(folder, ignore_errors=True)
        with tarfile.open(distribution) as archive:
            for member in archive:
                root, _, name = member.name.partition("/vendor/llama.cpp/")
                if "/" not in root and name.startswith(_PARTS):
                    member.name = name
                    archive.extract(member, folder, filter="data")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
