"""The reference that an artifact must equal, read from the base and the adapters on disk.

The checker works out a merge by itself, without the exporter's merge code: rows by token id for the embedding and for
the head, and the rounding to a storage dtype.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from exporter.sources.hf.checkpoint import Checkpoint
from exporter.sources.hf.tokenizer import read_tokenizer
from exporter.sources.peft.adapter import Adapter
from exporter.verify.expect.files import tuned_files
from exporter.verify.expect.tensors import Expected, expected, same_values


@dataclass(frozen=True)
class Reference:
    """A base checkpoint and adapters, unmerged. ``adapters`` may be empty: then the base itself is the reference.

    untie: the head of a tied base must have a tensor of its own even if it has the same values.
    """

    checkpoint: Checkpoint
    adapters: Sequence[Adapter]
    untie: bool = False

    @classmethod
    def open(cls, checkpoint: Path, adapters: Sequence[Path], *, untie: bool = False) -> Reference:
        """Read base and adapters from disk. Raises BadInput for inputs that cannot be used."""
        return cls(Checkpoint.open(checkpoint), [Adapter.open(path) for path in adapters], untie)

    @cached_property
    def tensors(self) -> Mapping[str, Expected]:
        """Stored name → expected values."""
        return expected(self.checkpoint, self.adapters)

    @property
    def embedding(self) -> Expected:
        """The input embedding."""
        return self.tensors[self.checkpoint.tie.embedding]

    @property
    def head(self) -> Expected:
        """The output head, also if it has no tensor of its own."""
        return self.tensors[self.checkpoint.tie.head or "lm_head"]

    @cached_property
    def tied(self) -> bool:
        """Whether one tensor serves embedding and head: the base ties them, and their expected values are equal."""
        return self.checkpoint.tie.tied and not self.untie and same_values(self.embedding, self.head)

    @property
    def computes(self) -> bool:
        """Whether any tensor is computed, and not copied from a file."""
        return any(tensor.computed for tensor in self.tensors.values())

    @property
    def trained_ids(self) -> list[int]:
        """Every token id with a trained row, ascending."""
        return sorted(self.embedding.rows.keys() | self.head.rows.keys())

    @property
    def base_vocab(self) -> int:
        """Rows of the base's embedding."""
        return self.embedding.base.spec.n_rows

    @property
    def vocab(self) -> int:
        """Rows of the tuned model's embedding, with new tokens after those of the base."""
        return max(self.embedding.n_rows, self.head.n_rows)

    @property
    def hidden(self) -> int:
        """Width of the embedding."""
        return self.embedding.base.spec.shape[1]

    @property
    def cache_shape(self) -> tuple[int, int]:
        """(heads of keys and values, width of a head), for graphs that do not state them."""
        config = self.checkpoint.text_config
        heads = config.get("num_attention_heads") or config.get("n_head") or 1
        return config.get("num_key_value_heads") or heads, config.get("head_dim") or self.hidden // heads

    @property
    def max_positions(self) -> int | None:
        """Largest number of positions that the config states, or None: a position table has no more rows."""
        config = self.checkpoint.text_config
        stated = [config.get(name) for name in ("max_position_embeddings", "n_positions")]
        return next((count for count in stated if isinstance(count, int) and count > 1), None)

    @property
    def routed(self) -> bool:
        """Whether the model is a mixture of experts."""
        config = self.checkpoint.text_config
        stated = [config.get(name) for name in ("num_local_experts", "num_experts", "n_routed_experts")]
        return any(isinstance(count, int) and count > 1 for count in stated)

    @property
    def start_token(self) -> int | None:
        """The token from which the decoder of an encoder-decoder starts, or None."""
        token = self.checkpoint.config.get("decoder_start_token_id")
        return token if isinstance(token, int) else None

    @cached_property
    def auxiliary_files(self) -> Mapping[str, Path]:
        """Tokenizer, chat template and generation config of the tuned model: name → path."""
        return tuned_files(self.checkpoint.auxiliary_files, [adapter.auxiliary_files for adapter in self.adapters])

    @cached_property
    def tokenizer(self) -> Mapping[str, Any]:
        """The parsed tokenizer.json that the tuned model uses; {} if it has none."""
        path = self.tokenizer_file()
        return read_tokenizer(path) if path else {}

    def tokenizer_file(self) -> Path | None:
        """The tokenizer.json that the tuned model uses: an adapter's, else the base's."""
        return self.auxiliary_files.get("tokenizer.json")
