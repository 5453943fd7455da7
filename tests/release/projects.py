"""Folders with a release.toml, a tiny base and its adapters, and helpers that read the releases made from them."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from exporter.cli.main import run

#: The only file that may differ between two runs of one release.
RUN: Final = "run.json"
FORMATS: Final = """
[hf]
[gguf]
types = ["bf16", "Q8_0"]
[onnx]
precisions = ["fp32"]
"""
ROWS: Final = """
[verify]
level = "rows"
"""


@dataclass(frozen=True)
class Project:
    """``folder`` holds base, adapters and release.toml."""

    folder: Path

    @property
    def toml(self) -> Path:
        return self.folder / "release.toml"

    def write(self, *adapters: str, formats: str = FORMATS, verify: str = ROWS, more: str = "") -> Project:
        """Write a release.toml with a model for each of ``adapters``, named like the adapter."""
        models = "".join(f'[models.{name}]\nadapters = ["{name}"]\n' for name in adapters)
        self.toml.write_text(f'name = "Lamp"\nversion = "1.0"\nbase = "base"\n{more}{models}{formats}{verify}')
        return self

    def copy(self, to: Path) -> Project:
        return Project(shutil.copytree(self.folder, to))

    def release(self, out: Path, *options: object, cache: Path | None = None) -> int:
        """Run the command; return its exit code."""
        store = ["--cache", cache] if cache else ["--no-cache"]
        return run(["release", *map(str, [self.toml, "-o", out, "-q", *store, *options])])


def contents(folder: Path) -> dict[str, str]:
    """Name → digest of every file except run.json."""
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    return {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items() if name != RUN}


def jobs_of(out: Path) -> dict[str, Mapping[str, Any]]:
    """Job → its entry in run.json, without verifications."""
    jobs: dict[str, Mapping[str, Any]] = json.loads((out / RUN).read_text())["jobs"]
    return {name: facts for name, facts in jobs.items() if "method" in facts}


def methods(out: Path) -> dict[str, str]:
    return {name: facts["method"] for name, facts in jobs_of(out).items()}
