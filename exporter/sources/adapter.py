"""A PEFT adapter folder, read into typed parts: what it sets, where, and from which tensor of which file.

Tensor keys (PEFT's ``get_peft_model_state_dict``): ``base_model.model.<module>.trainable_tokens_delta``. PEFT calls
the tensor a delta, but it is written with ``index_copy``: it holds **final rows**. A tied model has the rows twice,
under the embedding and under the head; older PEFT stored them once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from exporter.errors import BadInput, LedgerError, NotExpressible, TensorMismatch, UnreadableFile
from exporter.sources.checkpoint import read_json, side_files
from exporter.sources.safetensors import FileTensor, read_tensors
from exporter.tensors import FLOATS, Array, cast, read

WEIGHTS: Final = "adapter_model.safetensors"
CONFIG: Final = "adapter_config.json"
_PREFIX: Final = "base_model.model."
_ROWS: Final = ".trainable_tokens_delta"


@dataclass(frozen=True, slots=True)
class TokenRows:
    """Final values of some rows of ``module``'s weight.

    ``token_ids`` are distinct and ascending; ``rows`` has one row an id, shape (k, hidden), dtype as stored.
    """

    path: Path
    key: str
    module: str
    token_ids: tuple[int, ...]
    rows: Array


@dataclass(frozen=True)
class Adapter:
    """An adapter folder. Opening reads the config and its (small) tensors."""

    path: Path
    config: Mapping[str, Any]
    parts: Sequence[TokenRows]

    @classmethod
    def open(cls, path: Path) -> Adapter:
        """Read and check the folder.

        Raises BadInput for a folder that is no adapter or holds broken rows, LedgerError for a tensor that no rule
        takes, NotExpressible for an adapter kind that is not merged here.
        """
        if not (path / CONFIG).is_file():
            raise UnreadableFile(path / CONFIG, "expected a PEFT adapter, found no such file")
        config = read_json(path / CONFIG)
        _refuse_other_kinds(path, config)
        if not (path / WEIGHTS).is_file() and (path / "adapter_model.bin").exists():
            raise BadInput(
                f"{path / 'adapter_model.bin'}: expected {WEIGHTS}, found pickled weights, which are not read; "
                "load the adapter with PEFT and save it again with save_pretrained"
            )
        token_ids = _token_ids(path / CONFIG, config)
        tensors = read_tensors(path / WEIGHTS)
        parts = [_token_rows(path / WEIGHTS, tensor, token_ids) for tensor in tensors.values()]
        if not parts:
            raise UnreadableFile(path / WEIGHTS, f"expected a tensor ending in {_ROWS}, found no tensors")
        return cls(path, config, parts)

    @property
    def base_name(self) -> str | None:
        """What the adapter says it was trained on: a path or a hub id."""
        name = self.config.get("base_model_name_or_path")
        return name if isinstance(name, str) and name else None

    @property
    def side_files(self) -> dict[str, Path]:
        """Tokenizer files beside the adapter: name → path."""
        return side_files(self.path)


def _refuse_other_kinds(path: Path, config: Mapping[str, Any]) -> None:
    kind = config.get("peft_type")
    if not isinstance(kind, str):
        raise UnreadableFile(path / CONFIG, f"expected peft_type to name an adapter kind, found {kind!r:.80}")
    if kind != "TRAINABLE_TOKENS":
        raise NotExpressible(
            f"{path / CONFIG}: peft_type {kind}",
            "only TRAINABLE_TOKENS adapters are merged by this version",
            instead="merge it with PEFT's merge_and_unload() and export the checkpoint that comes out",
        )


def _token_ids(path: Path, config: Mapping[str, Any]) -> list[int]:
    ids = config.get("token_indices")
    if not isinstance(ids, list) or not all(type(item) is int for item in ids):
        raise UnreadableFile(path, f"token_indices: expected a list of integers, found {ids!r:.80}")
    if not ids:
        raise UnreadableFile(path, "token_indices: expected at least one token id, found an empty list")
    if min(ids) < 0:
        raise UnreadableFile(path, f"token_indices: expected ids of 0 or more, found {min(ids)}")
    ((commonest, times),) = Counter(ids).most_common(1)
    if times > 1:
        raise UnreadableFile(path, f"token_indices: expected each id once, found {commonest} {times} times")
    return ids


def _token_rows(path: Path, tensor: FileTensor, token_ids: list[int]) -> TokenRows:
    spec = tensor.spec
    if not (spec.name.startswith(_PREFIX) and spec.name.endswith(_ROWS)):
        raise LedgerError(path, spec.name, expected=f"{_PREFIX}<module>{_ROWS}", found="a tensor that no rule takes")
    if len(spec.shape) != 2 or spec.shape[0] != len(token_ids):
        expected = f"{len(token_ids)} rows, one for each of token_indices"
        raise TensorMismatch(path, spec.name, expected=expected, found=f"shape {spec.shape}")
    if spec.dtype not in FLOATS:
        raise TensorMismatch(path, spec.name, expected=f"a dtype of {', '.join(sorted(FLOATS))}", found=spec.dtype)
    rows = read(tensor)
    finite = np.isfinite(cast(rows, "F32") if spec.dtype != "F64" else rows).all(axis=1)
    if not finite.all():
        token_id = token_ids[int(np.flatnonzero(~finite)[0])]
        found = f"NaN or Inf in the row of token {token_id}"
        raise TensorMismatch(path, spec.name, expected="finite values", found=found)
    order = np.argsort(token_ids, kind="stable")
    module = spec.name[len(_PREFIX) : -len(_ROWS)]
    return TokenRows(path, spec.name, module, tuple(sorted(token_ids)), np.ascontiguousarray(rows[order]))
