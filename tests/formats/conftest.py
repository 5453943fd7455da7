from __future__ import annotations

from pathlib import Path

import pytest

from exporter.formats.hf.write import plan_hf, write_hf
from exporter.merge.plan import plan_merge
from exporter.sources.hf.checkpoint import Checkpoint
from exporter.sources.peft.adapter import Adapter
from tests.formats.merged import Merge


@pytest.fixture
def merge(tmp_path: Path) -> Merge:
    """merge(base, *adapters, dtype=…): the folder of the merged checkpoint."""
    counter = iter(range(100))

    def run(base: Path, *adapters: Path, dtype: str | None = None) -> Path:
        out = tmp_path / f"merged-{next(counter)}"
        plan = plan_merge(Checkpoint.open(base), [Adapter.open(path) for path in adapters])
        write_hf(plan_hf(plan.model(dtype)), out)
        return out

    return run
