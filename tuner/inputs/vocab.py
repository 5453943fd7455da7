"""Find the ids of existing tokens, add new tokens to tokenizer and model, and initialise the new rows.

New tokens first use the padding rows of the embedding matrix, which are the rows beyond the tokenizer's last token. The
embedding matrix is enlarged only if it has too few padding rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch
from tokenizers import AddedToken
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from exporter.errors import BadInput
from exporter.sources.hf.by_llama_cpp.tokens import MatchedToken, looks_like_control, token_notes
from tuner.layers.tying import further_embedding, input_embedding, output_embedding, tied_module_names, unwrap

__all__ = ["add_tokens", "existing_token_id", "llama_cpp_notes", "start_rows"]

_CHUNK_ROWS: Final = 8192  # 21 MB of float32 at H=640; with chunks, statistics over V rows need no second matrix


def existing_token_id(tokenizer: PreTrainedTokenizerBase, token: str, rows: int) -> int:
    """Return the id of an existing token. token: the vocabulary entry, or a text that encodes to the token.

    rows: the number of rows of the embedding matrix. Raises: BadInput if the text is empty, encodes to two or more
    tokens, or encodes to the unknown token, or if the embedding matrix has no row for the id.
    """
    if not token:
        raise BadInput("--token: expected a token, found an empty text")
    token_id = tokenizer.get_vocab().get(token)
    if token_id is None:
        subtoken_ids = encode(tokenizer, token)
        if len(subtoken_ids) != 1:
            shown = " ".join(map(repr, tokenizer.convert_ids_to_tokens(subtoken_ids)))
            raise BadInput(
                f"--token {token!r}: expected a text that encodes to one token, found {len(subtoken_ids)} tokens "
                f"({shown}); use --new-token to add the text as a token"
            )
        token_id = subtoken_ids[0]
        if token_id == tokenizer.unk_token_id:
            raise BadInput(
                f"--token {token!r}: expected a text that encodes to a token of the vocabulary, found the unknown "
                "token; use --new-token to add the token"
            )
    if token_id >= rows:
        raise BadInput(
            f"--token {token!r}: expected an id below {rows}, the number of rows of the embedding, found {token_id}"
        )
    return int(token_id)


def llama_cpp_notes(
    tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int], ends: int | list[int] | None
) -> list[str]:
    """Return a sentence for each way in which llama.cpp will treat the taught tokens unlike transformers.

    token_ids: the ids of the taught tokens. ends: the id or ids at which transformers ends generation.
    """
    matched = [
        MatchedToken(token_id, token.content, token.normalized, token.special or looks_like_control(token.content))
        for token_id, token in tokenizer.added_tokens_decoder.items()
    ]
    end_ids = ends if isinstance(ends, list) else [] if ends is None else [ends]
    return token_notes(tokenizer.get_vocab(), matched, set(token_ids), end_ids)


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Return the token ids of ``text``, without beginning-of-sequence and end-of-sequence tokens."""
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def add_tokens(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tokens: Sequence[str],
    *,
    special: bool = False,
    init: str = "subtokens",
    descriptions: Mapping[str, str] | None = None,
    pad_to_multiple_of: int | None = None,
    seed: int = 0,
) -> list[int]:
    """Add ``tokens`` to the tokenizer and the model, both in place, and return the ids of the new tokens.

    special: whether decoding with ``skip_special_tokens`` skips the new tokens. init: method for computing the initial
    rows, an element of ``tuner.spec.INITS``. descriptions: maps a token to a descriptive text; the token's initial row
    is the mean of the rows of the text's tokens. pad_to_multiple_of: if the matrix must grow, the number of rows
    becomes a multiple of this number. The initial rows are written to the embedding and, if the head is untied, also to
    the head. Raises: BadInput if a token is empty, is repeated or already exists, or if a description belongs to a
    token that is not in ``tokens``.
    """
    descriptions = dict(descriptions or {})
    _check_new(tokenizer, tokens, descriptions)
    known = len(tokenizer)
    subtoken_ids = [encode(tokenizer, descriptions.get(token, token)) for token in tokens]
    tokenizer.add_tokens(
        [AddedToken(token, special=special, normalized=False) for token in tokens], special_tokens=special
    )
    vocab = tokenizer.get_vocab()
    token_ids = [vocab[token] for token in tokens]
    rows = embedding_rows(model)
    if token_ids and max(token_ids) >= rows:
        model.resize_token_embeddings(max(token_ids) + 1, pad_to_multiple_of=pad_to_multiple_of, mean_resizing=False)
    inits = [init if token not in descriptions else "subtokens" for token in tokens]
    for weight in _matrices(model):
        # Padding rows belong to no token, so the statistics cover only the rows of the tokenizer's tokens.
        start = start_rows(weight[: min(known, rows)], subtoken_ids, inits, seed=seed)
        with torch.no_grad():
            weight[token_ids] = start.to(weight.dtype)
    return token_ids


def _check_new(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[str], descriptions: Mapping[str, str]) -> None:
    vocab = tokenizer.get_vocab()
    for index, token in enumerate(tokens):
        if not token:
            raise BadInput("--new-token: expected a token, found an empty text")
        if token in vocab:
            raise BadInput(
                f"--new-token {token!r}: expected a new token, found an existing token (id {vocab[token]}); "
                "use --token to train an existing token"
            )
        if token in tokens[:index]:
            raise BadInput(f"--new-token {token!r}: expected distinct tokens, found the same token twice")
    if others := sorted(descriptions.keys() - set(tokens)):
        raise BadInput(
            f"--describe {others[0]!r}: expected a token that is also given with --new-token, found another token"
        )


def embedding_rows(model: PreTrainedModel) -> int:
    """Return the number of rows of the model's input embedding matrix.

    Raises: BadInput if the model has no input embedding.
    """
    return len(_weight(_embedding(model)))


def _embedding(model: PreTrainedModel) -> nn.Module:
    embedding = input_embedding(model)
    if embedding is None:
        raise BadInput(f"{type(model).__name__}: expected a model with an input embedding, found no input embedding")
    return unwrap(embedding)


def _weight(module: nn.Module) -> Tensor:
    weight = unwrap(module).weight
    assert isinstance(weight, Tensor)
    return weight


def _matrices(model: PreTrainedModel) -> list[Tensor]:
    """Return the matrices with a row per token: the embedding, an untied head, and Gemma's per-layer embedding."""
    embedding, head = _embedding(model), output_embedding(model)
    matrices = [_weight(embedding)]
    if head is not None and all(_named(model, name) is not head for name in tied_module_names(model)):
        matrices.append(_weight(head))
    further = further_embedding(model)
    return matrices if further is None else [*matrices, _weight(further)]


def _named(model: nn.Module, name: str) -> nn.Module:
    return model.get_submodule(name)


def start_rows(matrix: Tensor, subtoken_ids: Sequence[Sequence[int]], inits: Sequence[str], *, seed: int) -> Tensor:
    """Return the initial rows of n new tokens as a float32 tensor (n, H), one row per init method in ``inits``.

    matrix: the (V, H) rows of the V existing tokens. subtoken_ids: for each new token, the ids of the tokens whose rows
    are averaged by the init method "subtokens"; if the list of ids is empty, the mean of all rows is used.
    """
    generator = torch.Generator().manual_seed(seed)
    mean: Tensor | None = None
    rows: list[Tensor] = []
    n_samples = list(inits).count("sample")
    samples = iter(_sample(matrix, n_samples, generator)) if n_samples else iter(())
    for ids, init in zip(subtoken_ids, inits, strict=True):
        if init == "sample":
            rows.append(next(samples))
        elif init == "zeros":
            rows.append(torch.zeros(matrix.shape[1], device=matrix.device))
        elif init == "subtokens" and (inside := [token_id for token_id in ids if token_id < len(matrix)]):
            rows.append(matrix[inside].detach().float().mean(0))
        else:
            mean = matrix.detach().mean(0, dtype=torch.float32) if mean is None else mean
            rows.append(mean)
    return torch.stack(rows) if rows else torch.zeros(0, matrix.shape[1], device=matrix.device)


def _sample(matrix: Tensor, count: int, generator: torch.Generator) -> Any:
    """Draw ``count`` random rows (count, H) from the normal distribution fitted to the rows of ``matrix``.

    The distribution has the mean and covariance of the rows of ``matrix``. Peak memory: the (H, H) covariance matrix
    plus one chunk of rows. The covariance matrix is factorised with an eigendecomposition. A Cholesky decomposition
    would fail if ``matrix`` has fewer rows than columns, because the covariance is then singular.
    """
    mean = matrix.detach().mean(0, dtype=torch.float32)
    covariance = torch.zeros(matrix.shape[1], matrix.shape[1], device=matrix.device)
    for chunk in matrix.detach().split(_CHUNK_ROWS):
        centred = chunk.float() - mean
        covariance.addmm_(centred.t(), centred)
    covariance /= max(len(matrix) - 1, 1)
    values, vectors = torch.linalg.eigh(covariance)
    noise = torch.randn(count, len(values), generator=generator).to(mean.device)
    return mean + (noise * values.clamp(min=0).sqrt()) @ vectors.t()
