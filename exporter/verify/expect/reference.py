"""The reference that an artifact must equal, read from the base and the adapters on disk.

The checker computes a merge without the exporter's merge code. The checker has its own code for embedding rows and head
rows by token id, and for the rounding to a storage dtype.
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
    """A base checkpoint and unmerged adapters. Without adapters, the base is the reference.

    untie: True if the head of a tied base must have a separate tensor, even if embedding and head have equal values.
    """

    checkpoint: Checkpoint
    adapters: Sequence[Adapter]
    untie: bool = False

    @classmethod
    def open(cls, checkpoint: Path, adapters: Sequence[Path], *, untie: bool = False) -> Reference:
        """Read base and adapters from disk. Raises BadInput if base or adapters cannot be used."""
        return cls(Checkpoint.open(checkpoint), [Adapter.open(path) for path in adapters], untie)

    @cached_property
    def tensors(self) -> Mapping[str, Expected]:
        """Map the stored names of all tensors to expected values."""
        return expected(self.checkpoint, self.adapters)

    @property
    def embedding(self) -> Expected:
        """The input embedding."""
        return self.tensors[self.checkpoint.tie.embedding]

    @property
    def head(self) -> Expected:
        """The output head, even if the head has no separate tensor."""
        return self.tensors[self.checkpoint.tie.head or "lm_head"]

    @cached_property
    def tied(self) -> bool:
        """True if one tensor serves as embedding and head.

        The base must be tied, and the expected values must be equal.
        """
        return self.checkpoint.tie.tied and not self.untie and same_values(self.embedding, self.head)

    @property
    def computes(self) -> bool:
        """True if any tensor is a sum of base and updates, and not copied from a file."""
        return any(tensor.computed for tensor in self.tensors.values())

    @property
    def trained_ids(self) -> list[int]:
        """All token ids with a trained row, in ascending order."""
        return sorted(self.embedding.rows.keys() | self.head.rows.keys())

    @property
    def base_vocab(self) -> int:
        """Number of rows of the base's embedding."""
        return self.embedding.base.spec.n_rows

    @property
    def vocab(self) -> int:
        """Number of rows of the tuned model's embedding, including new tokens."""
        return max(self.embedding.n_rows, self.head.n_rows)

    @property
    def hidden(self) -> int:
        """Width of the embedding."""
        return self.embedding.base.spec.shape[1]

    @property
    def cache_shape(self) -> tuple[int, int]:
        """The pair (number of key-value heads, width of a head), for graphs without sizes of the cache."""
        config = self.checkpoint.text_config
        heads = config.get("num_attention_heads") or config.get("n_head") or 1
        return config.get("num_key_value_heads") or heads, config.get("head_dim") or self.hidden // heads

    @property
    def max_positions(self) -> int | None:
        """Maximum number of positions given in the config, or None. A position table has at most as many rows."""
        config = self.checkpoint.text_config
        stated = [config.get(name) for name in ("max_position_embeddings", "n_positions")]
        return next((count for count in stated if isinstance(count, int) and count > 1), None)

    @property
    def routed(self) -> bool:
        """True if the model is a mixture of experts."""
        config = self.checkpoint.text_config
        stated = [config.get(name) for name in ("num_local_experts", "num_experts", "n_routed_experts")]
        return any(isinstance(count, int) and count > 1 for count in stated)

    @property
    def start_token(self) -> int | None:
        """The start token of an encoder-decoder's decoder, or None."""
        token = self.checkpoint.config.get("decoder_start_token_id")
        return token if isinstance(token, int) else None

    @cached_property
    def auxiliary_files(self) -> Mapping[str, Path]:
        """Map file names to paths for the tuned model's tokenizer, chat template and generation config."""
        return tuned_files(self.checkpoint.auxiliary_files, [adapter.auxiliary_files for adapter in self.adapters])

    @cached_property
    def tokenizer(self) -> Mapping[str, Any]:
        """The parsed tokenizer.json of the tuned model, or {} without the file."""
        path = self.tokenizer_file()
        return read_tokenizer(path) if path else {}

    def tokenizer_file(self) -> Path | None:
        """The path of the tuned model's tokenizer.json, from an adapter or else from the base."""
        return self.auxiliary_files.get("tokenizer.json")
