"""``ttexport converter install``: which version is downloaded, what is kept of it, and when the verb refuses."""

from __future__ import annotations

import hashlib
import io
import subprocess
import tarfile
from pathlib import Path

import pytest

from exporter.cli.main import run
from exporter.errors import MissingDependency
from exporter.formats.gguf.converter import install
from exporter.packages import Requirement
from tests.conformance.download import pinned

Capture = pytest.CaptureFixture[str]
VERSION = "0.0.1"
ROOT = f"llama_cpp_python-{VERSION}"
MEMBERS = {
    "PKG-INFO": f"Metadata-Version: 2.1\nName: llama_cpp_python\nVersion: {VERSION}\n",
    "pyproject.toml": '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
    f'[project]\nname = "llama_cpp_python"\nversion = "{VERSION}"\n',
    "backend.py": "from pathlib import Path\n"
    "def prepare_metadata_for_build_wheel(folder, config_settings=None):\n"
    "    place = Path(folder, 'llama_cpp_python-0.0.1.dist-info')\n"
    "    place.mkdir()\n"
    "    (place / 'METADATA').write_text(Path('PKG-INFO').read_text())\n"
    "    (place / 'WHEEL').write_text('Wheel-Version: 1.0\\nGenerator: x\\nRoot-Is-Purelib: true\\n')\n"
    "    return place.name\n"
    "def build_wheel(*args, **more): raise SystemExit('nothing is built')\n",
    "vendor/llama.cpp/convert_hf_to_gguf.py": "print('converter')\n",
    "vendor/llama.cpp/conversion/__init__.py": "",
    "vendor/llama.cpp/gguf-py/gguf/__init__.py": "",
    "vendor/llama.cpp/src/llama.cpp": "int main;",
}


@pytest.fixture
def offered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder from which pip takes a source distribution of VERSION, which counts as the installed version."""
    folder = tmp_path / "offered"
    folder.mkdir()
    archive = folder / f"{ROOT}.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        for name, text in MEMBERS.items():
            member = tarfile.TarInfo(f"{ROOT}/{name}")
            member.size = len(text)
            tar.addfile(member, io.BytesIO(text.encode()))
    for name, value in {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(folder), "PIP_CONFIG_FILE": "/dev/null"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(install, "version", lambda name: VERSION)
    monkeypatch.setattr(install, "package_versions", lambda names: dict.fromkeys(names, VERSION))
    monkeypatch.setattr(Requirement, "require", lambda self, needed_for: None)
    monkeypatch.setitem(install.DIGESTS, VERSION, hashlib.sha256(archive.read_bytes()).hexdigest())
    return folder


def test_the_converter_of_the_installed_version_is_kept_in_the_cache(
    offered: Path, tmp_path: Path, capsys: Capture
) -> None:
    assert install.installed_converter() is None
    for _ in range(2):  # the second call replaces the first copy
        assert run(["converter", "install"]) == 0
        script = Path(capsys.readouterr().out.strip())
        assert script == install.installed_converter() == tmp_path / "cache/ttexport/converter" / VERSION / script.name
        kept = {str(path.relative_to(script.parent)) for path in script.parent.rglob("*") if path.is_file()}
        assert kept == {name.split("llama.cpp/")[1] for name in MEMBERS if "llama.cpp/" in name and "src" not in name}
        assert [path.name for path in script.parents[1].iterdir()] == [VERSION]


def test_an_archive_with_another_digest_is_refused(
    offered: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(install.DIGESTS, VERSION, "0" * 64)
    assert run(["converter", "install"]) == 7
    message = capsys.readouterr().err
    assert "pip could not download llama-cpp-python==0.0.1" in message
    assert "HASH" in message.upper()
    assert install.installed_converter() is None
    assert list((tmp_path / "cache/ttexport/converter").iterdir()) == []


def test_a_version_without_a_digest_is_refused(offered: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(install.DIGESTS, VERSION)
    monkeypatch.setattr(subprocess, "run", pytest.fail)
    assert run(["converter", "install"]) == 5
    message = capsys.readouterr().err
    assert "0.3.36), found 0.0.1" in message
    assert "--converter PATH" in message


def test_without_llama_cpp_python_there_is_no_version_to_install(
    offered: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(self: object, needed_for: str) -> None:
        raise MissingDependency("llama-cpp-python", needed_for=needed_for, install="ttexport[llamacpp]")

    monkeypatch.setattr(Requirement, "require", missing)
    assert run(["converter", "install"]) == 6
    assert "ttexport converter install needs llama-cpp-python" in capsys.readouterr().err


def test_the_version_of_the_tests_has_a_digest() -> None:
    assert len(install.DIGESTS[pinned()]) == 64
