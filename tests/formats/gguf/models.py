"""Tiny llama checkpoints computed by arithmetic: no torch, no training, the same bytes on every machine.

Golden digests depend on them: after any change here they must be regenerated.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from exporter.sources.hf.safetensors import prepare
from exporter.tensors import Array, TensorSpec, cast
from fixtures.models.numbers import uniform

SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>")
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
BYTES_ONLY = {**BYTE_LEVEL, "use_regex": False}
DIGITS = {"type": "Digits", "individual_digits": True}
LLAMA3_EXPRESSION = (
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*"
    "|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
)


def split(expression: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated", "invert": False}


def sequence(*steps: Mapping[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", "pretokenizers": list(steps)}


SMOLLM = sequence(DIGITS, BYTE_LEVEL)
LLAMA3 = sequence(split(LLAMA3_EXPRESSION), BYTES_ONLY)
QWEN2 = sequence(split(LLAMA3_EXPRESSION.replace("{1,3}", "")), BYTES_ONLY)
GPT2 = BYTE_LEVEL


def byte_symbols() -> list[str]:
    """GPT-2's printable stand-ins for the 256 bytes, in its order."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [chr(byte) for byte in printable] + [chr(256 + index) for index in range(256 - len(printable))]


def tokenizer_json(pre_tokenizer: Mapping[str, Any], added: tuple[str, ...] = (), **changes: Any) -> dict[str, Any]:
    """300 tokens or so: specials, bytes, a few merges, then ``added`` as tokens that are not special."""
    words = ("Ġt", "he", "in", "Ġthe", "er", "ing", "Ġa", "01", "Ġ01")
    merges = [["Ġ", "t"], ["h", "e"], ["i", "n"], ["Ġt", "he"], ["e", "r"], ["in", "g"], ["Ġ", "a"], ["0", "1"]]
    merges.append(["Ġ", "01"])
    tokens = [*SPECIALS, *byte_symbols(), *words]
    flags = {"single_word": False, "lstrip": False, "rstrip": False}
    entries = [
        {"id": index, "content": text, **flags, "normalized": False, "special": True}
        for index, text in enumerate(SPECIALS)
    ]
    entries += [
        {"id": len(tokens) + index, "content": text, **flags, "normalized": True, "special": False}
        for index, text in enumerate(added)
    ]
    model: dict[str, Any] = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "fuse_unk": False,
        "byte_fallback": False,
    }
    model |= {"continuing_subword_prefix": None, "end_of_word_suffix": None, "ignore_merges": False}
    model |= changes.pop("model", {})
    model |= {"vocab": {text: index for index, text in enumerate(tokens)}, "merges": merges}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": entries,
        "normalizer": None,
        "pre_tokenizer": dict(pre_tokenizer),
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": model,
        **changes,
    }


def config(**changes: Any) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 3,
        "dtype": "bfloat16",
        "hidden_act": "silu",
        "hidden_size": 64,
        "intermediate_size": 96,
        "max_position_embeddings": 256,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-05,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
        "tie_word_embeddings": True,
        "vocab_size": 269,
        **changes,
    }


SETTINGS: dict[str, Any] = {
    "bos_token": "<|im_start|>",
    "eos_token": "<|im_end|>",
    "pad_token": "<|pad|>",
    "unk_token": "<|endoftext|>",
    "model_max_length": 256,
    "tokenizer_class": "PreTrainedTokenizerFast",
    "chat_template": "{% for m in messages %}{{ m['content'] }}{% endfor %}",
}


def tensors(config: Mapping[str, Any], *, biases: bool = False) -> dict[str, tuple[int, ...]]:
    """Name → shape of a llama with this config."""
    hidden, inner, heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    head_dim = config.get("head_dim", hidden // heads)
    q, kv = heads * head_dim, config["num_key_value_heads"] * head_dim
    out: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config["vocab_size"], hidden)}
    if not config["tie_word_embeddings"]:
        out["lm_head.weight"] = (config["vocab_size"], hidden)
    out["model.norm.weight"] = (hidden,)
    linears = {"self_attn.q_proj": (q, hidden), "self_attn.k_proj": (kv, hidden), "self_attn.v_proj": (kv, hidden)}
    linears |= {"self_attn.o_proj": (hidden, q), "mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden)}
    linears["mlp.down_proj"] = (hidden, inner)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        out[f"{prefix}.input_layernorm.weight"] = out[f"{prefix}.post_attention_layernorm.weight"] = (hidden,)
        for name, shape in linears.items():
            out[f"{prefix}.{name}.weight"] = shape
            if biases:
                out[f"{prefix}.{name}.bias"] = shape[:1]
    return out


def values(shape: tuple[int, ...], dtype: str, seed: int) -> Array:
    """Numbers in (-1, 1) from an integer hash, with exact halves and zeros among them, rounded to ``dtype``."""
    fraction = uniform((int(np.prod(shape)),), seed)
    fraction[::37] = 0
    fraction[::41] = 0.5
    return cast(fraction.reshape(shape), dtype)


def write_safetensors(path: Path, arrays: Mapping[str, Array], dtype: str) -> None:
    head, places = prepare([TensorSpec(name, dtype, value.shape) for name, value in arrays.items()])
    with path.open("wb") as file:
        file.write(head)
        for spec, _ in places:
            file.write(arrays[spec.name].tobytes())


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


def checkpoint(
    path: Path,
    config: Mapping[str, Any],
    tokenizer: Mapping[str, Any],
    *,
    settings: Mapping[str, Any] = SETTINGS,
    generation: Mapping[str, Any] | None = None,
    dtype: str = "BF16",
    biases: bool = False,
    shards: int = 1,
) -> Path:
    """Write a checkpoint folder; tensors go to the shards in turn, so that their order is not the file's."""
    path.mkdir(parents=True)
    shapes = tensors(config, biases=biases)
    arrays = {name: values(shape, dtype, seed) for seed, (name, shape) in enumerate(shapes.items())}
    if shards == 1:
        write_safetensors(path / "model.safetensors", arrays, dtype)
    else:
        names = [f"model-{index + 1:05}-of-{shards:05}.safetensors" for index in range(shards)]
        where = {name: names[index % shards] for index, name in enumerate(arrays)}
        for shard in names:
            shard_arrays = {name: value for name, value in arrays.items() if where[name] == shard}
            write_safetensors(path / shard, shard_arrays, dtype)
        write_json(path / "model.safetensors.index.json", {"metadata": {}, "weight_map": where})
    write_json(path / "config.json", config)
    write_json(path / "tokenizer.json", tokenizer)
    write_json(path / "tokenizer_config.json", settings)
    if generation is not None:
        write_json(path / "generation_config.json", generation)
    return path


def template(single: list[str], pair: list[str]) -> dict[str, Any]:
    def piece(name: str) -> dict[str, Any]:
        piece_type = "Sequence" if name in ("A", "B") else "SpecialToken"
        return {piece_type: {"id": name, "type_id": 0}}

    ids = {
        text: {"id": text, "ids": [SPECIALS.index(text)], "tokens": [text]} for text in {*single, *pair} - {"A", "B"}
    }
    return {
        "type": "TemplateProcessing",
        "single": [piece(name) for name in single],
        "pair": [piece(name) for name in pair],
        "special_tokens": ids,
    }


def tied(path: Path) -> Path:
    return checkpoint(path, config(), tokenizer_json(SMOLLM))


def untied(path: Path) -> Path:
    """Sharded, with padding rows, BOS by template."""
    bos = template(["<|im_start|>", "A"], ["<|im_start|>", "A", "<|im_start|>", "B"])
    tokenizer = tokenizer_json(SMOLLM, post_processor=bos)
    return checkpoint(path, config(tie_word_embeddings=False, vocab_size=275), tokenizer, shards=3)


def llama3(path: Path) -> Path:
    """Llama 3.2's rope scaling, Llama 3's tokenizer, head_dim, sampling defaults, several EOS tokens."""
    rope = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0, "low_freq_factor": 1.0}
    rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 128}
    generation = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 40, "repetition_penalty": 1.1}
    post = {
        "type": "Sequence",
        "processors": [BYTE_LEVEL, template(["<|im_start|>", "A"], ["<|im_start|>", "A", "<|im_start|>", "B"])],
    }
    tokenizer = tokenizer_json(LLAMA3, model={"ignore_merges": True}, post_processor=post)
    changes: dict[str, Any] = {"head_dim": 32, "rope_parameters": rope, "eos_token_id": [2, 0]}
    return checkpoint(path, config(**changes), tokenizer, generation=generation)


def linear(path: Path) -> Path:
    """Old-style config with linear scaling, biases, float16, GPT-2's pre-tokenizer, an EOS token by template."""
    changes = {"rope_scaling": {"type": "linear", "factor": 2.5}, "rope_theta": 20000.0, "rope_parameters": None}
    table = {key: value for key, value in config(**changes).items() if key != "rope_parameters"}
    table |= {"attention_bias": True, "mlp_bias": True, "dtype": "float16"}
    ends = template(["A", "<|endoftext|>"], ["A", "<|endoftext|>", "B", "<|endoftext|>"])
    settings = {**SETTINGS, "add_bos_token": False, "add_prefix_space": False}
    tokenizer = tokenizer_json(GPT2, post_processor=ends)
    return checkpoint(path, table, tokenizer, settings=settings, dtype="F16", biases=True)


def added(path: Path) -> Path:
    """Added tokens, Qwen2's pre-tokenizer, several chat templates, rows that do not fill Q8_0's blocks."""
    extra = ("<lamp>", "<|ship|>", "fog bank", "naïve")
    templates = [{"name": "default", "template": "a"}, {"name": "tool use", "template": "b"}]
    tokenizer = tokenizer_json(QWEN2, extra, normalizer={"type": "NFC"})
    changes = {"hidden_size": 48, "vocab_size": 273}
    return checkpoint(path, config(**changes), tokenizer, settings={**SETTINGS, "chat_template": templates})


#: name → (builder, file types to compare)
CASES: Mapping[str, tuple[Callable[[Path], Path], tuple[str, ...]]] = {
    "tied": (tied, ("F32", "F16", "BF16", "Q8_0")),
    "untied": (untied, ("BF16", "Q8_0")),
    "llama3": (llama3, ("BF16", "F32")),
    "linear": (linear, ("F16", "Q8_0")),
    "added": (added, ("BF16", "Q8_0")),
}
