"""A patched file of the related families has the bytes of the merged file."""

from __future__ import annotations

from pathlib import Path

import pytest

from exporter.cli.main import run
from fixtures.models.families import build
from fixtures.models.related_families import RELATED
from tests.conformance.gguf import row_adapter


@pytest.mark.parametrize("name", RELATED)
def test_patch_equals_merge(name: str, tmp_path: Path) -> None:
    base = build(name, tmp_path / "base")
    adapter = row_adapter(base, tmp_path / "adapter")
    before, got, want = (tmp_path / f"{stem}.gguf" for stem in ("before", "got", "want"))
    for arguments in (
        ["export", base, "--to", "gguf", "-o", before],
        ["merge", adapter, "--to", "gguf", "-o", want],
        ["patch", before, adapter, "-o", got],
    ):
        assert run([*map(str, arguments), "-q"]) == 0
    assert got.read_bytes() == want.read_bytes() != before.read_bytes()
