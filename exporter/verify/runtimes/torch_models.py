"""Compute logits and greedy tokens of a language model in fp32, for the runtimes that use transformers.

In an encoder-decoder, the encoder and the decoder receive the same sequences. For greedy decoding with an
encoder-decoder, the encoder receives the prompt and the decoder receives the start token.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np
import torch
import transformers

from exporter.tensors import Array

#: Outputs of transformers' models in the order of preference.
_OUTPUTS: Final = ("logits", "prediction_logits", "last_hidden_state")
#: Values of ``quant_method`` whose quantisers in transformers have the setting ``dequantize``.
_DEQUANTISED = ("fp8", "mxfp4")


def quiet() -> None:
    """Turn off warnings and progress bars, because the last line on stderr is reported as the reason for a failure."""
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def load_checkpoint(path: str) -> Any:
    """Load the language model at ``path`` in fp32 and in evaluation mode.

    FP8 and MXFP4 matrices are dequantised, because the FP8 and MXFP4 kernels need a GPU.

    Raises ValueError if the checkpoint has missing tensors, unexpected tensors or tensors with a wrong shape.
    """
    config = transformers.AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    auto = model_class(config)
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

    bfloat16 is the dtype of the dequantised matrices in transformers. Because the matrices are rounded to bfloat16
    here, a later rounding of the reference to bfloat16 does not change the matrices.
    """
    model = model.float()
    outer = {id(module.weight) for module in (model.get_input_embeddings(), model.get_output_embeddings())}
    for parameter in model.parameters():
        if parameter.ndim > 1 and id(parameter) not in outer:
            parameter.copy_(parameter.to(torch.bfloat16))
    return model


@torch.no_grad()
def save_logits(model: Any, sequences: Sequence[Sequence[int]], name: str, save: Callable[[str, Array], None]) -> None:
    """Save the logits of sequence N as ``name.N``, a float32 array of shape (positions, vocabulary).

    The array of a model without logits contains the last hidden state, with shape (positions, hidden).
    """
    for number, ids in enumerate(sequences):
        output = model(**arguments(model, torch.tensor([list(ids)])))
        save(f"{name}.{number}", values(output, len(ids)).numpy())


@torch.no_grad()
def save_greedy(model: Any, prompts: Sequence[Sequence[int]], tokens: int, save: Callable[[str, Array], None]) -> None:
    """Decode greedily after each prompt with the KV cache, and save the chosen tokens for prompt N as ``greedy.N``.

    The arrays of a model that does not generate text are empty.
    """
    continued = _answer if model.config.is_encoder_decoder else _continue
    generates = decodes(model)
    for number, prompt in enumerate(prompts):
        chosen = continued(model, prompt, tokens) if generates else []
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
    """Compute scores for tokens that a different runtime chose greedily, in one forward pass over prompt and tokens.

    For pair N (prompt, chosen tokens), the array ``name.best.N`` contains the token with the highest logit at each
    step, and ``name.behind.N`` contains the highest logit minus the chosen token's logit.
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


def model_class(config: Any) -> Any:
    """Return the class named in ``config.architectures`` or, if unknown, an AutoModel class for language models."""
    named = (config.architectures or [None])[0]
    listed = getattr(transformers, named, None) if isinstance(named, str) else None
    if listed is not None:
        return listed
    return transformers.AutoModelForSeq2SeqLM if config.is_encoder_decoder else transformers.AutoModelForCausalLM


def plain(model: Any) -> Any:
    """Return the transformers model inside ``model`` if ``model`` is a PeftModel, and ``model`` itself if not."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def decodes(model: Any) -> bool:
    """Whether the model generates text from token ids with a cache of keys and values."""
    inner = plain(model)
    names = inspect.signature(inner.forward).parameters
    starts = not inner.config.is_encoder_decoder or getattr(inner.config, "decoder_start_token_id", None) is not None
    return starts and bool(inner.can_generate()) and inner.main_input_name == "input_ids" and "past_key_values" in names


def arguments(model: Any, tokens: torch.Tensor) -> dict[str, Any]:
    """Return the arguments of one forward pass over ``tokens`` with shape (1, positions).

    An encoder-decoder model reads the tokens in the encoder and in the decoder. A speech model receives silence as
    audio input and the tokens as decoder input.
    """
    inner = plain(model)
    names = inspect.signature(inner.forward).parameters
    listens, end = inner.main_input_name == "input_features", getattr(inner.config, "eos_token_id", None)
    if inner.config.is_encoder_decoder and inner.get_output_embeddings() is None and isinstance(end, int):
        tokens = torch.cat([tokens, torch.tensor([[end]])], dim=1)  # a classifier reads the state of the last token
    given: dict[str, Any] = {} if listens else {"input_ids": tokens}
    if "use_cache" in names:
        given["use_cache"] = False
    if "decoder_input_ids" in names and (inner.config.is_encoder_decoder or listens):
        given["decoder_input_ids"] = tokens
    if listens:
        shape = (1, inner.config.num_mel_bins, 2 * inner.config.max_source_positions)
        given["input_features"] = torch.zeros(shape)
    return given


def values(output: Any, positions: int) -> torch.Tensor:
    """Return the logits or, for a model without logits, the last hidden state, as float32 of shape (positions, values).

    A classifier computes one row of logits for the whole text, and this row is repeated for every position.
    """
    name = next(name for name in _OUTPUTS if getattr(output, name, None) is not None)
    first: torch.Tensor = getattr(output, name)[0].float()
    return first if first.ndim > 1 else first.expand(positions, -1)
