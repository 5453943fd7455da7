"""onnxruntime-genai opens the folder unchanged and generates the tokens of transformers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from exporter.verify.runtimes.onnx_runtime import compute
from fixtures.corpus import PROMPTS
from tests.formats.onnx import reference
from tests.formats.onnx.conftest import Write

og: Any = pytest.importorskip("onnxruntime_genai", reason="onnxruntime-genai is not installed")

TOKENS = 32


def generate(model: Any, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    """Greedy continuations of a batch; genai pads the shorter prompts itself."""
    params = og.GeneratorParams(model)
    longest = max(map(len, prompts))
    length = longest + TOKENS
    params.set_search_options(batch_size=len(prompts), do_sample=False, max_length=length, min_length=length)
    generator = og.Generator(model, params)
    generator.append_tokens(np.array(prompts, np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    return [[int(token) for token in generator.get_sequence(row)][longest:] for row in range(len(prompts))]


def assert_generates_the_same(folder: Path, base: Path, adapter: Path, prompts: Sequence[str]) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(adapter)
    peft = reference.load(base, adapter)
    model = og.Model(str(folder))
    genai_tokenizer = og.Tokenizer(model)
    for prompt in prompts:
        ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        assert [int(token) for token in genai_tokenizer.encode(prompt)] == ids
        assert generate(model, [ids]) == [reference.greedy(peft, ids, TOKENS)]
    chat = [{"role": "user", "content": "How many ships?"}]
    want = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    got = genai_tokenizer.apply_chat_template(
        '[{"role": "user", "content": "How many ships?"}]', add_generation_prompt=True
    )
    assert got == want


@pytest.mark.parametrize("ops", ["standard", "ort"])
def test_tiny_model_generates_the_tokens_of_transformers(
    write: Write, tiny_tied: Path, tiny_adapter: Path, ops: str
) -> None:
    folder = write(tiny_tied, tiny_adapter, ops=ops)
    assert_generates_the_same(folder, tiny_tied, tiny_adapter, PROMPTS)
    search = json.loads((folder / "genai_config.json").read_text())["search"]
    assert search["past_present_share_buffer"] is (ops == "ort")


@pytest.mark.parametrize("ops", ["standard", "ort"])
@pytest.mark.parametrize("quant", ["fp16", "int8", "q4", "q4-sym", "q4f16", "q4f16-sym"])
def test_every_variant_generates_the_greedy_tokens_of_its_logits(
    write: Write, tiny_tied: Path, quant: str, ops: str
) -> None:
    folder = write(tiny_tied, quants=(quant,), ops=ops)
    saved: dict[str, Any] = {}
    path = folder / json.loads((folder / "genai_config.json").read_text())["model"]["decoder"]["filename"]
    prompt = [300, 17, 2, 40]
    job = {"artifact": path, "sequences": [prompt], "more": [], "greedy_prompts": [prompt], "greedy_tokens": TOKENS}
    compute(job | {"modes": [], "cache_shape": (0, 0)}, saved.__setitem__)
    assert generate(og.Model(str(folder)), [prompt]) == [saved["greedy.0"].tolist()]


@pytest.mark.parametrize("ops", ["standard", "ort"])
def test_batch_generates_the_tokens_of_each_prompt_alone(write: Write, tiny_tied: Path, ops: str) -> None:
    model = og.Model(str(write(tiny_tied, ops=ops)))
    prompts = [[300, 17, 2, 40], [9, 8, 7, 6]]
    assert generate(model, prompts) == [generate(model, [ids])[0] for ids in prompts]


@pytest.mark.smollm2
def test_smollm2_generates_the_tokens_of_transformers(write: Write, smollm2: Path, smollm2_adapter: Path) -> None:
    assert_generates_the_same(write(smollm2, smollm2_adapter), smollm2, smollm2_adapter, PROMPTS[:1])
