"""Install llama.cpp's converter into the user's cache folder, from the source distribution of llama-cpp-python.

The wheel of llama-cpp-python contains llama.cpp as compiled libraries only. The source distribution of the same version
also contains the converter of the same llama.cpp: the script, its package ``conversion``, and the matching ``gguf``
package. pip downloads the source distribution and compares its SHA-256 digest with the table ``DIGESTS``. Nothing is
compiled.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Final

from exporter.errors import MissingDependency, NotExpressible, OutputError, writing
from exporter.formats.gguf.converter.location import SCRIPT
from exporter.packages import LLAMA_CPP, package_versions

#: The command that installs the converter, for error messages.
INSTALL: Final = "ttexport converter install"
_DISTRIBUTION: Final = "llama-cpp-python"
#: Version of llama-cpp-python → SHA-256 digest of its source distribution on PyPI.
DIGESTS: Final = {
    "0.3.32": "b06502361770f82eb08b7f1a192eb084b9ead2b88fe32cda8c397a2782eabde6",
    "0.3.33": "369ba03d02caaef42c1ed07bbdc454f7436e47c7675b8b9757fa13fbac6acd92",
    "0.3.34": "d849d286d808284f1d3ec1bd6875572430d29d1f9574a010232caa4e9cef0e35",
    "0.3.35": "1139dbb54509074b70893fab8554e3b079aa9f4d312058ce4018ef0019e3de12",
    "0.3.36": "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e",
}
#: The parts of llama.cpp that the converter consists of.
_PARTS: Final = (SCRIPT, "conversion/", "gguf-py/gguf/")


def installed_converter() -> Path | None:
    """Return the path of the installed converter script of the installed llama-cpp-python, or None if there is none."""
    wanted = package_versions([_DISTRIBUTION])[_DISTRIBUTION]
    script = _place(wanted) / SCRIPT if wanted else None
    return script if script and script.is_file() else None


def install_converter() -> Path:
    """Install the converter of the installed llama-cpp-python into the user's cache folder.

    Returns the path of the converter's script. An existing copy is replaced. Raises MissingDependency if
    llama-cpp-python is not installed, and the errors of ``download_converter``.
    """
    LLAMA_CPP.require(INSTALL)
    wanted = version(_DISTRIBUTION)
    return download_converter(wanted, _place(wanted))


def download_converter(wanted: str, place: Path) -> Path:
    """Put the converter of the version ``wanted`` of llama-cpp-python into the folder ``place``.

    An existing folder is replaced. Returns the path of the converter's script. Raises NotExpressible if the table of
    digests lacks the version, MissingDependency if pip is not installed, and OutputError if pip fails or the folder
    cannot be written.
    """
    requirement = _requirement(wanted)
    try:
        version("pip")
    except PackageNotFoundError as exc:
        raise MissingDependency("pip", needed_for=INSTALL, install="pip") from exc
    with writing(place):
        place.parent.mkdir(parents=True, exist_ok=True)
    with writing(place), tempfile.TemporaryDirectory(prefix=f".{place.name}-", dir=place.parent) as scratch:
        draft = Path(scratch) / "converter"
        _extract(_download(requirement, Path(scratch), place), draft)
        shutil.rmtree(place, ignore_errors=True)
        draft.replace(place)
    return place / SCRIPT


def _place(of_version: str) -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "ttexport" / "converter" / of_version


def _requirement(wanted: str) -> str:
    if wanted not in DIGESTS:
        raise NotExpressible(
            INSTALL,
            f"expected a version of {_DISTRIBUTION} with a known digest ({', '.join(DIGESTS)}), found {wanted}",
            instead="install one of these versions, or name a convert_hf_to_gguf.py of llama.cpp with --converter PATH",
        )
    return f"{_DISTRIBUTION}=={wanted} --hash=sha256:{DIGESTS[wanted]}\n"


def _download(requirement: str, folder: Path, place: Path) -> Path:
    """Let pip download the source distribution into ``folder``, and return the path of the archive.

    place: the folder that the error message names.
    """
    pinned = folder / "requirement.txt"
    pinned.write_text(requirement)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--no-binary", _DISTRIBUTION, "--require-hashes", "-r", str(pinned), "-d", str(folder)]
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, check=False)
    archives = list(folder.glob("*.tar.gz"))
    if done.returncode or len(archives) != 1:
        errors = [line for line in done.stderr.decode(errors="replace").splitlines() if "ERROR" in line]
        reason = " ".join(errors[-1:]) or f"exit status {done.returncode}"
        raise OutputError(place, f"pip could not download {requirement.split()[0]}: {reason:.500}")
    return archives[0]


def _extract(distribution: Path, folder: Path) -> None:
    """Extract the converter, without the other parts of llama.cpp, from the archive ``distribution``."""
    with tarfile.open(distribution) as archive:
        for member in archive:
            root, _, name = member.name.partition("/vendor/llama.cpp/")
            if "/" not in root and name.startswith(_PARTS):
                member.name = name
                archive.extract(member, folder, filter="data")
