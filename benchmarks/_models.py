"""Write large llama checkpoints and adapters with random bfloat16 values for benchmarks, without using torch.

Transformers and PEFT can load the checkpoints. Random values suffice, because the time of a merge does not depend on
the values of the tensors.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

HIDDEN, INNER, KV, VOCAB = 2048, 8192, 512, 128_256
SHARD_BYTES = 1_000_000_000
LINEARS: Mapping[str, tuple[int, int]] = {  # module → (out, in)
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (KV, HIDDEN),
    "self_attn.v_proj": (KV, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INNER, HIDDEN),
    "mlp.up_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
}
NORMS = ("input_layernorm", "post_attention_layernorm")
_EMBED_BYTES = 2 * VOCAB * HIDDEN
_LAYER_BYTES = 2 * sum(out * into for out, into in LINEARS.values())


def layers_for(gigabytes: float) -> int:
    """Return the number of layers, at least 1, with which a tied model's weights have about ``gigabytes`` GB."""
    return max(1, round((gigabytes * 1e9 - _EMBED_BYTES) / _LAYER_BYTES))


def checkpoint(folder: Path, layers: int) -> Path:
    """Write a llama checkpoint with a tied head, in shards of at most 1 GB, and return the folder.

    The shards have the file names that ``save_pretrained`` would choose.
    """
    folder.mkdir(parents=True)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": layers,
        "num_attention_heads": 32,
        "num_key_value_heads": KV // 64,
        "vocab_size": VOCAB,
        "tie_word_embeddings": True,
        "rms_norm_eps": 1e-5,
        "dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    shards = _split(layers)
    pool = (np.random.default_rng(0).standard_normal(1 << 24, np.float32) * 0.02).astype(ml_dtypes.bfloat16)
    weight_map = {}
    for number, shapes in enumerate(shards, 1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        weight_map.update(dict.fromkeys(shapes, name))
        tensors = {tensor: np.resize(np.roll(pool, 31 * n), shape) for n, (tensor, shape) in enumerate(shapes.items())}
        save_file(tensors, folder / name, {"format": "pt"})
    total = sum(2 * int(np.prod(shape)) for shapes in shards for shape in shapes.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    return folder


def _split(layers: int) -> list[dict[str, tuple[int, ...]]]:
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB, HIDDEN), "model.norm.weight": (HIDDEN,)}
    for layer in range(layers):
        shapes |= {f"model.layers.{layer}.{module}.weight": shape for module, shape in LINEARS.items()}
        shapes |= {f"model.layers.{layer}.{module}.weight": (HIDDEN,) for module in NORMS}
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    filled = 0
    for name, shape in shapes.items():
        nbytes = 2 * int(np.prod(shape))
        if filled + nbytes > SHARD_BYTES:
            shards.append({})
            filled = 0
        shards[-1][name] = shape
        filled += nbytes
    return shards


def tokenizer(folder: Path) -> None:
    """Write a byte-level BPE tokenizer with ``VOCAB`` tokens, whose texts are arbitrary."""
    tokens = {f"token{number}": number for number in range(VOCAB)}
    content = {
        "version": "1.0",
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {"type": "BPE", "vocab": tokens, "merges": [], "byte_fallback": False},
    }
    (folder / "tokenizer.json").write_text(json.dumps(content))


def row_adapter(folder: Path, base: Path, count: int = 16) -> Path:
    """Write an adapter with the rows of ``count`` tokens, spread over the vocabulary, in PEFT's format."""
    ids = np.linspace(0, VOCAB - 1, count).astype(int).tolist()
    rows = np.random.default_rng(1).standard_normal((count, HIDDEN), np.float32)
    config = {"peft_type": "TRAINABLE_TOKENS", "task_type": "CAUSAL_LM", "token_indices": ids}
    key = "base_model.model.model.embed_tokens.trainable_tokens_delta"
    return _adapter(folder, base, config | {"target_modules": ["embed_tokens"]}, {key: rows})


def lora_adapter(folder: Path, base: Path, layers: int, rank: int = 16) -> Path:
    """Write a LoRA adapter for every linear layer, in PEFT's format."""
    generator = np.random.default_rng(2)
    tensors = {}
    for layer in range(layers):
        for module, (out, into) in LINEARS.items():
            prefix = f"base_model.model.model.layers.{layer}.{module}"
            tensors[f"{prefix}.lora_A.weight"] = generator.standard_normal((rank, into), np.float32) * 0.02
            tensors[f"{prefix}.lora_B.weight"] = generator.standard_normal((out, rank), np.float32) * 0.02
    modules = [module.rpartition(".")[2] for module in LINEARS]
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": 32, "target_modules": modules}
    return _adapter(folder, base, config, tensors)


def _adapter(folder: Path, base: Path, config: dict[str, object], tensors: Mapping[str, np.ndarray]) -> Path:
    folder.mkdir(parents=True)
    config |= {"base_model_name_or_path": str(base), "inference_mode": True}
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2))
    save_file(dict(tensors), folder / "adapter_model.safetensors", {"format": "pt"})
    return folder
