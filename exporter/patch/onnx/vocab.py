"""How many rows the matrices have after patching; tokenizer, rows and matrices must agree on it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from exporter.errors import BadInput, TensorMismatch
from exporter.patch.rows import Wanted
from exporter.sources.hf.checkpoint import auxiliary_files
from exporter.sources.hf.tokenizer import added_tokens, token_ids

_TOKENIZER = "tokenizer.json"


def require_agreement(folder: Path, wanted: Sequence[Wanted], held: int, files: Mapping[str, Path]) -> int:
    """The size of the vocabulary. held: rows before. files: tokenizer files after patching.

    Raises TensorMismatch for rows of tokens that neither matrix nor tokenizer has, BadInput for a tokenizer that names
    more than there is.
    """
    tokenizer = files.get(_TOKENIZER)
    known = max(token_ids(tokenizer), default=-1) + 1 if tokenizer else 0
    first = max(wanted, key=lambda one: one.highest_trained)
    if first.highest_trained >= max(held, known):
        part = next(iter(first.where.values()))
        hint = "new tokens need the tokenizer that names them beside the adapter"
        expected = f"token ids below {max(held, known)} (rows in {folder})"
        raise TensorMismatch(part.path, part.key, expected=expected, found=first.highest_trained, hint=hint)
    vocab = max(held, *(one.highest + 1 for one in wanted))
    if known > vocab:
        raise BadInput(f"{tokenizer}: expected token ids below {vocab} (rows in {folder}), found {known - 1}")
    return vocab


def new_tokens(folder: Path, files: Mapping[str, Path], held: int, vocab: int) -> dict[int, str]:
    """Id → text of the tokens that the folder's tokenizer did not have; without one, those behind its rows."""
    after, before = files.get(_TOKENIZER), auxiliary_files(folder).get(_TOKENIZER)
    if after is None or after == before:
        return {}
    known = token_ids(before) if before else set(range(held))
    texts = {token_id: text for text, token_id in added_tokens(after).items()}
    return {token_id: text for token_id, text in sorted(texts.items()) if token_id not in known and token_id < vocab}
