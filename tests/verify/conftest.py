from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from exporter.cli.main import run


@dataclass(frozen=True)
class Tuned:
    """A tied base, rows for it, and clean artifacts of every format, all read-only."""

    base: Path
    adapter: Path
    hf: Path
    gguf: Path
    gguf_f32: Path
    q8_0: Path
    onnx: Path
    onnx_variants: Path

    def argv(self, artifact: Path) -> list[str]:
        return ["verify", str(artifact), "--reference", str(self.base), "--adapter", str(self.adapter), "-q"]


@pytest.fixture(scope="session")
def tuned(tiny_tied: Path, tiny_adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Tuned:
    out = tmp_path_factory.mktemp("artifacts")
    common = ["merge", str(tiny_adapter), "--base", str(tiny_tied), "--verify", "off", "-q"]
    assert run([*common, "--to", "hf", "-o", str(out / "hf")]) == 0
    assert run([*common, "--to", "gguf", "-o", str(out / "model-BF16.gguf")]) == 0
    assert run([*common, "--to", "gguf", "--dtype", "f32", "-o", str(out / "model-F32.gguf")]) == 0
    assert run([*common, "--to", "gguf", "--quant", "Q8_0", "-o", str(out / "model-Q8_0.gguf")]) == 0
    assert run([*common, "--to", "onnx", "-o", str(out / "onnx-folder")]) == 0
    variants = ["--dtype", "f16", "--quant", "fp16", "--quant", "int4", "--quant", "int4-sym"]
    assert run([*common, "--to", "onnx", *variants, "-o", str(out / "onnx-variants")]) == 0
    return Tuned(
        tiny_tied,
        tiny_adapter,
        out / "hf",
        out / "model-BF16.gguf",
        out / "model-F32.gguf",
        out / "model-Q8_0.gguf",
        out / "onnx-folder",
        out / "onnx-variants",
    )
