"""Measure how long ttexport needs to plan a merge for a mixture-of-experts checkpoint with more than 150,000 tensors.

The checkpoint has the tensor names of a Qwen3 mixture with 200 layers of 256 experts, in 20 shards with an index. The
tensors are tiny, because the time of planning does not depend on the sizes of tensors. The module map, which assigns
stored tensors to the parameters of the loaded model, is also measured separately.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from benchmarks._measure import TTEXPORT, Program, machine, show, verdict, whole_programs, write
from exporter.models.module_map import module_map

#: Maximum of the seconds of each measurement.
BAR_SECONDS = 2.0
LAYERS, EXPERTS, SHARDS = 200, 256, 20
HIDDEN, INNER, VOCAB = 8, 4, 16
MAP, LORA_PLAN = "module map", "plan of a LoRA"
_EXPERT = {"gate_proj": (INNER, HIDDEN), "up_proj": (INNER, HIDDEN), "down_proj": (HIDDEN, INNER)}
_LAYER = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (HIDDEN, HIDDEN),
    "self_attn.v_proj": (HIDDEN, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "self_attn.q_norm": (HIDDEN,),
    "self_attn.k_norm": (HIDDEN,),
    "mlp.gate": (EXPERTS, HIDDEN),
    "input_layernorm": (HIDDEN,),
    "post_attention_layernorm": (HIDDEN,),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="number of measured runs")
    options = parser.parse_args()
    before = machine()
    with tempfile.TemporaryDirectory(prefix="names-") as folder:
        base, adapter = checkpoint(Path(folder) / "base"), lora(Path(folder) / "adapter")
        config = json.loads((base / "config.json").read_text())
        names = list(stored_names())
        seconds = {MAP: [_seconds(lambda: module_map(config, names)) for _ in range(options.rounds)]}
        program = Program((*TTEXPORT, "plan", str(adapter), "--base", str(base)))
        measured = whole_programs({LORA_PLAN: program}, warm_up=1, rounds=options.rounds)
    seconds[LORA_PLAN] = measured[LORA_PLAN].seconds
    report(seconds, measured[LORA_PLAN].peak_bytes, len(names), before)


def report(seconds: Mapping[str, list[float]], peak_bytes: int, count: int, before: Mapping[str, Any]) -> None:
    cases = {name: {"seconds_median": median(values), "seconds": values} for name, values in seconds.items()}
    verdicts = {name: verdict(name, case["seconds_median"], BAR_SECONDS) for name, case in cases.items()}
    rows = [[name, f"{median(values):.2f}", f"{min(values):.2f}"] for name, values in seconds.items()]
    notes = [*(line for _, line in verdicts.values()), f"peak memory of the plan: {peak_bytes / 1e6:.0f} MB"]
    show(f"{count:,} names", ["measurement", "s, median", "s, least"], rows, notes=notes)
    document = {
        "names": count,
        "cases": cases,
        "plan_peak_bytes": peak_bytes,
        "bar_seconds": BAR_SECONDS,
        "met": {name: met for name, (met, _) in verdicts.items()},
        "machine": before,
        "after": machine(),
    }
    print(f"written: {write('names', document)}")


def _seconds(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def stored_names() -> Iterator[str]:
    """Yield the names of all tensors of the mixture-of-experts checkpoint."""
    yield from ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight")
    for layer in range(LAYERS):
        yield from (f"model.layers.{layer}.{module}.weight" for module in _LAYER)
        for expert in range(EXPERTS):
            yield from (f"model.layers.{layer}.mlp.experts.{expert}.{module}.weight" for module in _EXPERT)


def _shape(name: str) -> tuple[int, ...]:
    module = name.removesuffix(".weight")
    parts = {**_EXPERT, **_LAYER, "embed_tokens": (VOCAB, HIDDEN), "lm_head": (VOCAB, HIDDEN), "norm": (HIDDEN,)}
    return next(shape for ending, shape in parts.items() if module.endswith(ending))


def checkpoint(folder: Path) -> Path:
    """Write the mixture-of-experts checkpoint to ``folder`` and return the folder."""
    folder.mkdir()
    config = {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "hidden_size": HIDDEN,
        "moe_intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "head_dim": HIDDEN,
        "num_experts": EXPERTS,
        "vocab_size": VOCAB,
        "tie_word_embeddings": False,
    }
    (folder / "config.json").write_text(json.dumps(config))
    names = list(stored_names())
    size = -(-len(names) // SHARDS)
    weight_map = {}
    for number in range(SHARDS):
        shard = f"model-{number + 1:05}-of-{SHARDS:05}.safetensors"
        mine = names[number * size : (number + 1) * size]
        save_file({name: np.zeros(_shape(name), np.float16) for name in mine}, folder / shard, {"format": "pt"})
        weight_map |= dict.fromkeys(mine, shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def lora(folder: Path) -> Path:
    """Write a LoRA adapter for all attention projections, and return the folder."""
    folder.mkdir()
    tensors = {}
    for layer in range(LAYERS):
        for module in ("q_proj", "k_proj", "v_proj", "o_proj"):
            prefix = f"base_model.model.model.layers.{layer}.self_attn.{module}"
            tensors[f"{prefix}.lora_A.weight"] = np.ones((2, HIDDEN), np.float32)
            tensors[f"{prefix}.lora_B.weight"] = np.ones((HIDDEN, 2), np.float32)
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 4}
    config["target_modules"] = ["q_proj", "k_proj", "v_proj", "o_proj"]
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    return folder


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
