"""Token rows are quantised without importances, in a merge, in a patch and in the check of both."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from exporter.cli.main import run
from exporter.sources.gguf.file import GgufFile
from fixtures.models import gguf_files
from tests.marks import needs_llama_cpp

LAYER = "blk.1.ffn_up.weight"
NAMES = (LAYER, "output.weight", "token_embd.weight")


@needs_llama_cpp
@pytest.mark.parametrize("tie", ["tied", "untied"])
def test_importances_of_the_vocabulary_change_no_row(
    tie: str,
    wide_tied: Path,
    wide_untied: Path,
    wide_adapters: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    base, adapter = {"tied": wide_tied, "untied": wide_untied}[tie], wide_adapters[f"{tie}-new"]
    skewed = np.geomspace(1e-3, 1e3, 256, dtype=np.float32)
    importances = gguf_files.write_imatrix(tmp_path / "i.gguf", dict.fromkeys(NAMES, skewed), calls=1)

    def write(verb: str, source: Path, name: str, *options: str) -> GgufFile:
        words = [verb, str(source), "--to", "gguf", "--quant", "Q4_K_M", *options, "-o", str(tmp_path / name)]
        assert run(words) == 0
        return GgufFile.open(tmp_path / name)

    plain = write("export", base, "plain.gguf")
    made = write("export", base, "base.gguf", "--imatrix", str(importances))
    same = {
        name: np.array_equal(made.rows(name, 0, 9), plain.rows(name, 0, 9)) for name in NAMES if name in made.tensors
    }
    assert same.pop(LAYER) is False
    assert all(same.values())
    capsys.readouterr()
    write("merge", adapter, "want.gguf", "--imatrix", str(importances))
    talk = capsys.readouterr()
    assert "the importances of output.weight are not used" in talk.out + talk.err
    patched = tmp_path / "got.gguf"
    assert (
        run(["patch", str(tmp_path / "base.gguf"), str(adapter), "-o", str(patched), "--verify", "weights", "-q"]) == 0
    )
    assert patched.read_bytes() == (tmp_path / "want.gguf").read_bytes()
