"""What an artifact has to equal, read from the base and the adapters on disk.

This is the checker's own account of a merge, written without the maker's code: rows by token id for the embedding
and for the head, and the rounding that a storage dtype declares.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from exporter.errors import BadInput
from exporter.sources.adapter import Adapter
from exporter.sources.checkpoint import Checkpoint
from exporter.tensors import Array, cast


@dataclass(frozen=True)
class Reference:
    """A base checkpoint and adapters, unmerged. ``adapters`` may be empty: then the base itself is the reference."""

    checkpoint: Checkpoint
    adapters: Sequence[Adapter]

    @classmethod
    def open(cls, checkpoint: Path, adapters: Sequence[Path]) -> Reference:
        """Read both from disk. Raises BadInput for inputs that cannot be used."""
        return cls(Checkpoint.open(checkpoint), [Adapter.open(path) for path in adapters])

    @cached_property
    def embedding_rows(self) -> Mapping[int, Array]:
        """Token id → trained row (hidden,) of the input embedding, as stored in the adapters."""
        tie = self.checkpoint.tie
        return self._rows(tie.embedding, *([tie.head or "lm_head"] if tie.tied else []))

    @cached_property
    def head_rows(self) -> Mapping[int, Array]:
        """Token id → trained row of the output head: the embedding's where they are tied."""
        tie = self.checkpoint.tie
        return self.embedding_rows if tie.tied else self._rows(str(tie.head))

    @property
    def trained_ids(self) -> list[int]:
        """Every token id with a trained row, ascending."""
        return sorted(self.embedding_rows.keys() | self.head_rows.keys())

    @property
    def base_vocab(self) -> int:
        """Rows of the base's embedding."""
        return self.checkpoint.tensors[self.checkpoint.tie.embedding].spec.n_rows

    @property
    def vocab(self) -> int:
        """Rows of the tuned model's embedding: new tokens lie beyond the base's."""
        return max([self.base_vocab, *(token_id + 1 for token_id in self.trained_ids)])

    @property
    def hidden(self) -> int:
        """Width of the embedding."""
        return self.checkpoint.tensors[self.checkpoint.tie.embedding].spec.shape[1]

    def base_rows(self, name: str, start: int, stop: int, dtype: str) -> Array:
        """Rows [start, stop) of the base's tensor ``name``, rounded to ``dtype``."""
        return cast(self.checkpoint.tensors[name].rows(start, stop), dtype)

    def tokenizer_file(self) -> Path | None:
        """The tokenizer.json that the tuned model uses: an adapter's, else the base's."""
        for adapter in self.adapters:
            if "tokenizer.json" in adapter.side_files:
                return adapter.side_files["tokenizer.json"]
        return self.checkpoint.side_files.get("tokenizer.json")

    def _rows(self, *names: str) -> dict[int, Array]:
        """The rows of all adapters for tensors ``names``, which share their values."""
        modules = {name.removesuffix(".weight") for name in names}
        rows: dict[int, Array] = {}
        for adapter in self.adapters:
            for part in adapter.parts:
                for token_id, row in zip(part.token_ids, part.rows, strict=True) if part.module in modules else ():
                    if token_id in rows and not np.array_equal(rows[token_id], row):
                        raise BadInput(
                            f"{part.path}: {part.key}: expected one value for the row of token {token_id}, found two"
                        )
                    rows[token_id] = row
        return rows
