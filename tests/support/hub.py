"""``ttexport`` as a user of a local hub server runs it, with a cache of its own.

Every command runs in a fresh process, because huggingface_hub reads its endpoint and its cache folder when imported.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from fixtures.hub.server import Hub
from tests.support.processes import ROOT

_CODE: Final = "import sys; from exporter.cli.main import run; sys.exit(run(sys.argv[1:]))"
#: Ends of the names of variables that would bypass the local server, or hide bars that a user sees.
_UNWANTED: Final = ("_proxy", "hf_hub_disable_progress_bars")


@dataclass(frozen=True)
class Site:
    """A hub, and a user whose cache and working folder are below ``home``."""

    hub: Hub
    home: Path

    @property
    def work(self) -> Path:
        """The user's working folder."""
        folder = self.home / "work"
        folder.mkdir(exist_ok=True)
        return folder

    def run(
        self, *arguments: object, offline: bool = False, stderr: int = subprocess.PIPE
    ) -> subprocess.CompletedProcess[str]:
        """Run ``ttexport`` in the working folder; offline: with HF_HUB_OFFLINE."""
        kept = {key: value for key, value in os.environ.items() if not key.lower().endswith(_UNWANTED)}
        hub = {"HF_ENDPOINT": self.hub.url, "HF_HOME": str(self.home / "hf"), "HF_HUB_OFFLINE": str(int(offline))}
        environment = {**kept, **hub, "PYTHONPATH": str(ROOT), "HF_TOKEN": ""}
        command = [sys.executable, "-c", _CODE, *map(str, arguments)]
        return subprocess.run(command, cwd=self.work, env=environment, stdout=subprocess.PIPE, stderr=stderr, text=True)

    def left(self) -> list[str]:
        """Names in the working folder."""
        return sorted(path.name for path in self.work.iterdir())
