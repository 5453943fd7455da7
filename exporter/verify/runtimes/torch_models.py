"""Compute logits and greedy tokens of a language model in fp32, for the runtimes that use transformers.

In an encoder-decoder, the encoder and the decoder receive the same sequences. For greedy decoding with an
encoder-decoder, the encoder receives the prompt and the decoder receives the start token.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import transformers

from exporter.tensors import Array

#: Values of ``quant_method`` whose quantisers in transformers have the setting ``dequantize``.
_DEQUANTISED = ("fp8", "mxfp4")


def quiet() -> None:
    """Silence warnings and progress bars, because the last line on stderr is reported as the reason for a failure."""
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def load_checkpoint(path: str) -> Any:
    """Load the language model at ``path`` in fp32 and in evaluation mode.

    FP8 and MXFP4 matrices are dequantised, because the FP8 and MXFP4 kernels need a GPU.

    Raises ValueError if the checkpoint has missing tensors, unexpected tensors or tensors with a wrong shape.
    """
    config = transformers.AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    auto: Any = transformers.AutoModelForSeq2SeqLM if config.is_encoder_decoder else transformers.AutoModelForCausalLM
    quantised = getattr(config, "quantization_config", None)
    if isinstance(quantised, dict) and quantised.get("quant_method") in _DEQUANTISED:
        quantised["dequantize"] = True
    loaded: Any = auto.from_pretrained(
        path,
        config=config,
        dtype=torch.float32,
        output_loading_info=True,
        local_files_only=True,
        trust_remote_code=False,
    )
    model, info = loaded
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[problem]:
            raise ValueError(f"{path}: transformers reports {problem}: {', '.join(sorted(map(str, info[problem])))}")
    return (_dequantised(model) if quantised else model).eval()


@torch.no_grad()
def _dequantised(model: Any) -> Any:
    """Convert all parameters to fp32, and round all matrices except embedding and head to bfloat16.

    bfloat16 is the dtype of the dequantised matrices in transformers. If the reference is later rounded to bfloat16,
    the dequantised matrices stay unchanged.
    """
    model = model.float()
    outer = {id(module.weight) for module in (model.get_input_embeddings(), model.get_output_embeddings())}
    for parameter in model.parameters():
        if parameter.ndim > 1 and id(parameter) not in outer:
            parameter.copy_(parameter.to(torch.bfloat16))
    return model


@torch.no_grad()
def save_logits(model: Any, sequences: Sequence[Sequence[int]], name: str, save: Callable[[str, Array], None]) -> None:
    """Save the logits of sequence N as ``name.N``, a float32 array of shape (positions, vocabulary)."""
    for number, ids in enumerate(sequences):
        tokens = torch.tensor([list(ids)])
        both = {"decoder_input_ids": tokens} if model.config.is_encoder_decoder else {}
        logits = model(input_ids=tokens, use_cache=False, **both).logits[0]
        save(f"{name}.{number}", logits.float().numpy())


@torch.no_grad()
def save_greedy(model: Any, prompts: Sequence[Sequence[int]], tokens: int, save: Callable[[str, Array], None]) -> None:
    """Decode greedily after each prompt with the KV cache, and save the chosen tokens for prompt N as ``greedy.N``."""
    for number, prompt in enumerate(prompts):
        chosen = (_answer if model.config.is_encoder_decoder else _continue)(model, prompt, tokens)
        save(f"greedy.{number}", np.array(chosen, np.int64))


def _continue(model: Any, prompt: Sequence[int], tokens: int) -> list[int]:
    ids, cache = torch.tensor([list(prompt)]), None
    chosen: list[int] = []
    for _ in range(tokens):
        out = model(input_ids=ids, past_key_values=cache, use_cache=True)
        ids, cache = out.logits[:, -1].argmax(-1, keepdim=True), out.past_key_values
        chosen.append(int(ids))
    return chosen


def _answer(model: Any, prompt: Sequence[int], tokens: int) -> list[int]:
    encoded = model.get_encoder()(input_ids=torch.tensor([list(prompt)]))
    ids, cache = torch.tensor([[model.config.decoder_start_token_id]]), None
    chosen: list[int] = []
    for _ in range(tokens):
        out = model(encoder_outputs=encoded, decoder_input_ids=ids, past_key_values=cache, use_cache=True)
        ids, cache = out.logits[:, -1].argmax(-1, keepdim=True), out.past_key_values
        chosen.append(int(ids))
    return chosen


@torch.no_grad()
def save_greedy_margins(
    model: Any, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], name: str, save: Callable[[str, Array], None]
) -> None:
    """Score tokens that a different runtime chose greedily, with one forward pass over the prompt and these tokens.

    For pair N (prompt, chosen tokens), the array ``name.best.N`` has the best token at each step, and the array
    ``name.behind.N`` has the best token's logit minus the chosen token's logit.
    """
    for number, (prompt, chosen) in enumerate(pairs):
        steps = _steps(model, prompt, chosen).float()
        best = steps.max(dim=-1)
        behind = best.values - steps[torch.arange(len(chosen)), torch.tensor(list(chosen))]
        save(f"{name}.best.{number}", best.indices.numpy())
        save(f"{name}.behind.{number}", behind.double().numpy())


def _steps(model: Any, prompt: Sequence[int], chosen: Sequence[int]) -> torch.Tensor:
    """Return, for each chosen token, the logits at the preceding position, with shape (tokens, vocabulary)."""
    if model.config.is_encoder_decoder:
        ids = torch.tensor([[model.config.decoder_start_token_id, *chosen[:-1]]])
        logits: torch.Tensor = model(input_ids=torch.tensor([list(prompt)]), decoder_input_ids=ids).logits[0]
        return logits
    logits = model(input_ids=torch.tensor([[*prompt, *chosen]]), use_cache=False).logits[0]
    return logits[len(prompt) - 1 : -1]
