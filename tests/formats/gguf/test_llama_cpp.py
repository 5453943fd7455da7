"""llama.cpp's logits on our files, compared with transformers' on the checkpoint."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from exporter.formats.gguf import plan_gguf, write_gguf
from exporter.tensors import Array
from fixtures.tiny import PROMPTS
from tests.formats.gguf.conftest import Write, merged

runtime = pytest.importorskip("tests.formats.gguf.runtime", reason="llama-cpp-python is not installed")


def mean_kl(reference: Array, other: Array) -> float:
    want = torch.from_numpy(reference).double().log_softmax(-1)
    got = torch.from_numpy(other).double().log_softmax(-1)
    return float((want.exp() * (want - got)).sum(-1).mean())


def reference(base: Path, adapter: Path | None, ids: list[int]) -> Array:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter).eval()
    with torch.no_grad():
        out: Array = model(torch.tensor([ids])).logits[0].numpy()
    return out


def prompt_ids(base: Path, extra: tuple[int, ...] = ()) -> list[int]:
    tokenizer = AutoTokenizer.from_pretrained(base)
    return [*tokenizer(" ".join(PROMPTS))["input_ids"], *extra]


@pytest.mark.parametrize("tied", [True, False])
def test_float32_file_computes_what_transformers_computes(
    write: Write, tied: bool, tiny_tied: Path, tiny_untied: Path
) -> None:
    base = tiny_tied if tied else tiny_untied
    ids = prompt_ids(base)
    want, got = reference(base, None, ids), runtime.logits(write(base, ftype="F32"), ids)
    assert mean_kl(want, got) <= 1e-6  # the limit of the format; rounding alone gives about 1e-12
    assert np.array_equal(want.argmax(-1), got.argmax(-1))


def test_merged_rows_compute_what_the_unmerged_adapter_computes(
    write: Write, tiny_untied: Path, tiny_both_adapter: Path
) -> None:
    ids = prompt_ids(tiny_untied, (300, 17, 2))
    out = write(tiny_untied).with_name("f32.gguf")
    write_gguf(plan_gguf(merged(tiny_untied, tiny_both_adapter, dtype="F32"), "F32"), out)
    want = reference(tiny_untied, tiny_both_adapter, ids)
    assert mean_kl(want, runtime.logits(out, ids)) <= 1e-6
    # The limit can fail: the base alone is far away.
    assert mean_kl(want, runtime.logits(write(tiny_untied, ftype="F32"), ids)) > 1e-3


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "linear", "factor": 2.5},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    ],
    ids=lambda scaling: str(scaling["rope_type"]),
)
def test_rope_scaling_computes_what_transformers_computes(
    write: Write, tmp_path: Path, tiny_tied: Path, scaling: dict[str, object]
) -> None:
    base = Path(shutil.copytree(tiny_tied, tmp_path / "scaled"))
    config = json.loads((base / "config.json").read_text())
    config["rope_parameters"] = {"rope_theta": 10000.0, **scaling}
    (base / "config.json").write_text(json.dumps(config))
    ids = prompt_ids(base)
    want = reference(base, None, ids)
    assert mean_kl(want, runtime.logits(write(base, ftype="F32"), ids)) <= 1e-6
    assert mean_kl(want, runtime.logits(write(tiny_tied, ftype="F32"), ids)) > 1e-4


@pytest.mark.smollm2
@pytest.mark.slow
@pytest.mark.parametrize(("ftype", "limit"), [("F32", 1e-6), ("BF16", 5e-4)])
def test_smollm2_computes_what_transformers_computes(write: Write, smollm2: Path, ftype: str, limit: float) -> None:
    ids = prompt_ids(smollm2)
    assert mean_kl(reference(smollm2, None, ids), runtime.logits(write(smollm2, ftype=ftype), ids)) <= limit
