"""Artifacts written by other tools, without any of this project's code."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import MODEL_ARCH, GGUFWriter, LlamaFileType, TokenType, get_tensor_name_map
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer


def merge(base: Path, adapter: Path | None, out: Path) -> Path:
    """PEFT's merge, saved by transformers; without an adapter, the base, which lacks the rows."""
    model: Any = AutoModelForCausalLM.from_pretrained(base)
    if adapter:
        model = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    model.save_pretrained(out)
    tokenizer: Any = AutoTokenizer.from_pretrained(base)
    tokenizer.save_pretrained(out)
    return out


def genai(merged: Path, out: Path, precision: str) -> Path:
    """onnxruntime-genai's builder: no position_ids, packed projections, a transposed head shared with the embedding."""
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-p", precision, "-e", "cpu"]
    command += ["-i", str(merged), "-o", str(out), "-c", str(out.with_name("cache"))]
    subprocess.run(command, check=True, capture_output=True)
    return out


#: Run in its own process: torch's exporter leaves patches in torch and prints many warnings.
_TRACE = """
import sys, torch
from transformers import AutoModelForCausalLM
source, target = sys.argv[1:]
class Logits(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, attn_implementation="eager")
    def forward(self, input_ids):
        return self.model(input_ids=input_ids, use_cache=False).logits
axes = {"input_ids": {0: torch.export.Dim("batch"), 1: torch.export.Dim("tokens")}}
example = torch.zeros(2, 5, dtype=torch.int64)
torch.onnx.export(Logits().eval(), (example,), target, input_names=["input_ids"], output_names=["logits"],
                  dynamic_shapes=axes, dynamo=True, external_data=True)
"""


def torch_export(merged: Path, out: Path) -> Path:
    """torch.onnx.export of the bare model: token ids in, logits out, no cache and no mask."""
    out.mkdir()
    command = [sys.executable, "-c", _TRACE, str(merged), str(out / "model.onnx")]
    subprocess.run(command, check=True, capture_output=True)
    return out


def gguf_package(merged: Path, out: Path) -> Path:
    """A Llama in float32, written with a few lines of code and the gguf package."""
    model: Any = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)
    config = model.config
    writer = GGUFWriter(out, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    writer.add_file_type(LlamaFileType.ALL_F32)
    _add_tokenizer(writer, merged)
    names = get_tensor_name_map(MODEL_ARCH.LLAMA, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, value in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        data = value.numpy()
        for part, count in heads.items():
            if f".{part}." in name:  # ggml rotates neighbouring elements, transformers the two halves of a head
                data = data.reshape(count, 2, -1, data.shape[1]).swapaxes(1, 2).reshape(data.shape)
        gguf_name = names.get_name(name, (".weight",))
        assert gguf_name is not None, name
        writer.add_tensor(gguf_name, np.ascontiguousarray(data))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


def _add_tokenizer(writer: GGUFWriter, merged: Path) -> None:
    document = json.loads((merged / "tokenizer.json").read_text())
    added = {token["id"]: token for token in document["added_tokens"]}
    texts = {number: text for text, number in document["model"]["vocab"].items()}
    texts |= {number: token["content"] for number, token in added.items()}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list([texts[number] for number in sorted(texts)])
    control = {number for number, token in added.items() if token["special"]}
    writer.add_token_types([TokenType.CONTROL if number in control else TokenType.NORMAL for number in sorted(texts)])
    writer.add_token_merges(
        [" ".join(pair) if isinstance(pair, list) else pair for pair in document["model"]["merges"]]
    )
    gguf.SpecialVocab(merged, load_merges=False).add_to_gguf(writer)
