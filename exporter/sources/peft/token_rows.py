"""Builds edits from the token rows in an adapter file and the token ids in the adapter's config.

PEFT names the tensors of token rows "delta", but applies token rows with ``index_copy``, so the stored token rows are
**final rows** and not differences.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from exporter.errors import TensorMismatch, UnreadableFile
from exporter.sources.hf.safetensors import FileTensor
from exporter.sources.peft.edits import GATHER, TokenRows, first_not_finite, is_shard, require_floats
from exporter.sources.peft.matching import wraps
from exporter.tensors import read, same_bits

#: Maximum width of a row: four times the widest known model. A limit is needed because rows are read before the width
#: of the base is known.
_MAX_WIDTH: Final = 1 << 16


def token_rows(
    path: Path, config_path: Path, config: Mapping[str, Any], tensors: Sequence[tuple[str, FileTensor]]
) -> Iterator[TokenRows]:
    """Yield the edit that is built from each pair (module, tensor of token rows).

    The config contains a single list of token ids, or maps the ends of module names to lists of token ids. The map of
    token ids may lack a module that is tied to the embedding, for which PEFT stores a copy of the embedding's rows. A
    module that the map lacks has the token ids of the module whose rows are equal.

    Source: ``set_additional_trainable_modules`` in PEFT. Raises UnreadableFile for invalid token ids, and
    TensorMismatch for an invalid tensor.
    """
    name = "token_indices" if config["peft_type"] == "TRAINABLE_TOKENS" else "trainable_token_indices"
    stated = config.get(name)
    listed = [(module, tensor, _stated_ids(stated, module)) for module, tensor in tensors]
    for module, tensor, ids in listed:
        if ids is None and isinstance(stated, dict):
            ids = next((other for _, first, other in listed if other is not None and same_bits(first, tensor)), None)
            if ids is None:
                reason = f"expected token ids for {module}, found token ids only for {', '.join(map(str, stated))}"
                raise UnreadableFile(config_path, f"{name}: {reason:.200}")
        yield _edit(path, tensor, module, _checked(config_path, name, ids))


def _stated_ids(stated: object, module: str) -> object:
    if not isinstance(stated, dict):
        return stated
    return next((ids for end, ids in stated.items() if wraps(end, module)), None)


def _checked(path: Path, name: str, ids: object) -> list[int]:
    if not isinstance(ids, list) or not all(type(item) is int for item in ids):
        raise UnreadableFile(path, f"{name}: expected a list of integers, found {ids!r:.80}")
    if not ids:
        raise UnreadableFile(path, f"{name}: expected at least one token id, found an empty list")
    if min(ids) < 0:
        raise UnreadableFile(path, f"{name}: expected token ids of 0 or more, found {min(ids)}")
    ((commonest, times),) = Counter(ids).most_common(1)
    if times > 1:
        raise UnreadableFile(
            path, f"{name}: expected each token id once, but token id {commonest} occurs {times} times"
        )
    return ids


def _edit(path: Path, tensor: FileTensor, module: str, token_ids: list[int]) -> TokenRows:
    spec = tensor.spec
    if len(spec.shape) != 2 or spec.shape[0] != len(token_ids) or not spec.shape[1]:
        expected = f"{len(token_ids)} rows, one for each token id in the config"
        hint = GATHER if is_shard(spec.shape) else ""
        raise TensorMismatch(path, spec.name, expected=expected, found=f"shape {spec.shape}", hint=hint)
    if spec.shape[1] > _MAX_WIDTH:
        raise TensorMismatch(path, spec.name, expected=f"rows of at most {_MAX_WIDTH} numbers", found=spec.shape[1])
    require_floats(path, tensor)
    rows = read(tensor)
    if (wrong := first_not_finite(rows)) is not None:
        actual = f"NaN or Inf in the row of token {token_ids[wrong]}"
        raise TensorMismatch(path, spec.name, expected="finite values", found=actual)
    order = np.argsort(token_ids, kind="stable")
    return TokenRows(path, spec.name, module, tuple(sorted(token_ids)), np.ascontiguousarray(rows[order]))
