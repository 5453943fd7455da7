"""Tiny models with random weights, one per architecture that differs in its embedding or head."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import tuner

VOCAB = 67
HIDDEN = 16
IDS = [3, 60, 5, 17]  # deliberately not sorted


def build(architecture: str, *, tied: bool = True, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {
        "vocab_size": VOCAB,
        "tie_word_embeddings": tied,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
    }
    if architecture == "gpt2":
        off: dict[str, Any] = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        return GPT2LMHeadModel(GPT2Config(n_embd=HIDDEN, n_layer=2, n_head=2, n_positions=64, **off, **sizes))
    if architecture == "t5":
        small: dict[str, Any] = {"d_model": HIDDEN, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
        config = T5Config(dropout_rate=0.0, initializer_factor=0.3, **small, **sizes)
        config.decoder_start_token_id = 2
        return T5ForConditionalGeneration(config)
    common: dict[str, Any] = {
        "hidden_size": HIDDEN,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        **sizes,
    }
    if architecture == "gemma3":
        return Gemma3ForCausalLM(Gemma3TextConfig(num_key_value_heads=1, head_dim=8, **common))
    return LlamaForCausalLM(LlamaConfig(num_key_value_heads=2, max_position_embeddings=64, **common))


def batch(seed: int) -> Tensor:
    return torch.randint(0, VOCAB, (2, 12), generator=torch.Generator().manual_seed(seed))


def rows_of(model: Any) -> dict[str, Tensor]:
    """Return the trained rows by the name of their layer, each parameter once."""
    return {
        name: parameter.detach().clone()
        for name, parameter in model.named_parameters()
        if "trainable_tokens_delta" in name
    }


def perturb(model: Any, adapter: str = "default", seed: int = 0) -> None:
    """Move the rows of ``adapter`` away from the base's."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(f"trainable_tokens_delta.{adapter}"):
                parameter.add_(torch.randn(parameter.shape, generator=generator))


def logits_of(model: Any, x: Tensor | None = None) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(input_ids=batch(0) if x is None else x).logits
        return logits


def ours(architecture: str = "llama", *, tied: bool = True, **options: Any) -> Any:
    config = tuner.TrainableTokensConfig(**{"token_indices": IDS, "task_type": "CAUSAL_LM", **options})
    return tuner.get_peft_model(build(architecture, tied=tied), config)


def theirs(architecture: str = "llama", *, tied: bool = True, **options: Any) -> Any:
    config = peft.TrainableTokensConfig(**{"token_indices": IDS, "task_type": "CAUSAL_LM", **options})
    return peft.get_peft_model(build(architecture, tied=tied), config)


def saved(model: Any, path: Path) -> Path:
    model.save_pretrained(path, save_embedding_layers=False)
    return path


def embedding(model: Any) -> Any:
    return model.get_base_model().get_input_embeddings()
