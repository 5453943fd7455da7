"""Models and adapters that tests share. In a quick run another process makes them, once: the tests import no torch."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import pytest

from tests.tiers.guard.sitecustomize import unguarded
from tests.tiers.imports import ROOT, sources

#: What most fixtures are made by.
LLAMA: Final = "fixtures.tiny.build_llama"
ROWS: Final = "fixtures.adapters.stock_rows"
NEW_ROWS: Final = "fixtures.adapters.stock_rows_new_tokens"
#: Where quick runs keep what they had made.
KEPT: Final = ROOT / ".tiny"
#: Packages whose versions may change what is made.
_PACKAGES: Final = ("numpy", "peft", "safetensors", "tokenizers", "torch", "transformers")


@dataclass(frozen=True)
class Make:
    """make(maker, name, ...): the folder ``name`` as the function ``maker`` of ``fixtures`` writes it. Read-only.

    kept: the folder of quick runs, None for a session that imports what it needs.
    """

    factory: pytest.TempPathFactory
    kept: Path | None

    def __call__(
        self, maker: str, name: str, *arguments: Sequence[object], base: Path | None = None, **settings: object
    ) -> Path:
        """Call ``maker`` with ``base``, if there is one, the folder, ``arguments`` and ``settings``."""
        if self.kept is None:
            folder = self.factory.mktemp("made") / name
            call(maker, folder, base, arguments, settings)
            return folder
        job = {"maker": maker, "base": base and str(base), "arguments": arguments, "settings": settings}
        text = json.dumps([job, _sources(maker), _versions()], sort_keys=True)
        folder = self.kept / hashlib.sha256(text.encode()).hexdigest()[:16] / name
        if not folder.is_dir():
            _make_elsewhere(job, folder)
        return folder


def call(maker: str, folder: Path, base: Path | None, arguments: Sequence[object], settings: Mapping[str, Any]) -> None:
    module, _, function = maker.rpartition(".")
    paths = [folder] if base is None else [base, folder]
    getattr(import_module(module), function)(*paths, *arguments, **settings)


def _make_elsewhere(job: Mapping[str, object], folder: Path) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as place:
        made = Path(place, folder.name)
        command = [sys.executable, "-m", "tests.session.made", str(made), json.dumps(job)]
        subprocess.run(command, cwd=ROOT, env=unguarded(os.environ), check=True, capture_output=True)
        if not folder.is_dir():  # another worker may have been faster
            made.rename(folder)


@cache
def _sources(maker: str) -> dict[str, str]:
    """Digest by file of the code that makes it."""
    files = sources(maker.rpartition(".")[0])
    return {str(path.relative_to(ROOT)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@cache
def _versions() -> dict[str, str]:
    return {name: version(name) for name in _PACKAGES}


@pytest.fixture(scope="session")
def make(tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config) -> Make:
    return Make(tmp_path_factory, KEPT if pytestconfig.getoption("--quick") else None)


def main(folder: str, text: str) -> None:
    job = json.loads(text)
    call(job["maker"], Path(folder), job["base"] and Path(job["base"]), job["arguments"], job["settings"])


if __name__ == "__main__":
    main(*sys.argv[1:])
