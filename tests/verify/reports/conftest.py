from __future__ import annotations

from pathlib import Path

import pytest

from exporter.cli.main import run
from tests.verify.conftest import Tuned
from tests.verify.damage import corruptions


@pytest.fixture(scope="session")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("Tell me <b>a story</b> of the lamp.<|im_end|>\nThe ship is late & lost.\n")
    return path


@pytest.fixture(scope="session")
def report(tuned: Tuned, prompts: Path, models: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A read-only folder with the reports of three sound artifacts and one with a wrong norm."""
    out = tmp_path_factory.mktemp("verified")
    (out / "gguf").mkdir()
    (out / "hf").symlink_to(tuned.hf)
    (out / "onnx").symlink_to(tuned.onnx)
    (out / "gguf" / "q8_0.gguf").symlink_to(tuned.q8_0)
    broken = corruptions.copy(tuned.gguf_f32, out)
    corruptions.gguf_scale_f32(broken, "blk.1.ffn_norm.weight", 1.02)
    broken.rename(out / "gguf" / "broken.gguf")
    argv = [*tuned.argv(out), "--prompts", str(prompts), "--report", str(out / "report")]
    assert run(argv) == 3
    return out / "report"
