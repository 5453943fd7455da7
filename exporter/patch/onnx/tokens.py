"""Determines the vocabulary size of a patched ONNX folder, and finds the tokens that the patch adds.

Raises an error if the ids in the tokenizer or in the adapters' rows do not fit the vocabulary matrices.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from exporter.patch.rows import RowEdits, patched_vocab
from exporter.sources.hf.checkpoint import auxiliary_files
from exporter.sources.hf.tokenizer import added_tokens, token_ids

_TOKENIZER = "tokenizer.json"


def vocab_size(folder: Path, edits: Sequence[RowEdits], n_rows: int, files: Mapping[str, Path]) -> int:
    """Return the vocabulary size after patching. Raises TensorMismatch or BadInput if a token id is too large.

    n_rows: number of vocabulary rows before patching. files: maps the name of each tokenizer file of the patched folder
    to the path of the file to copy.
    """
    tokenizer = files.get(_TOKENIZER)
    n_tokens = max(token_ids(tokenizer), default=-1) + 1 if tokenizer else 0
    return patched_vocab(edits, n_rows, n_tokens, tokenizer=tokenizer, rows_in=folder)


def new_tokens(folder: Path, files: Mapping[str, Path], n_rows: int, vocab: int) -> dict[int, str]:
    """Return the tokens that the patch adds to the folder's tokenizer, as a dict from token id to text.

    If the folder contains no tokenizer, all tokens with ids from ``n_rows`` on count as new.
    """
    after, before = files.get(_TOKENIZER), auxiliary_files(folder).get(_TOKENIZER)
    if after is None or after == before:
        return {}
    known = token_ids(before) if before else set(range(n_rows))
    texts = {token_id: text for text, token_id in added_tokens(after).items()}
    return {token_id: text for token_id, text in sorted(texts.items()) if token_id not in known and token_id < vocab}
