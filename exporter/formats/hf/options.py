"""Command-line options for writing Hugging Face checkpoints."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from exporter.formats.target import FormatOptions, dtype_option
from exporter.options import ValueType, option


@dataclass(frozen=True, kw_only=True)
class HfOptions(FormatOptions):
    """Options for writing a checkpoint folder that transformers loads.

    max_shard_size: maximum size of a shard in bytes.
    """

    section: ClassVar[str] = "hf"

    dtype: str | None = dtype_option()
    max_shard_size: int | None = option(
        None,
        "Split the weights into shards of at most SIZE bytes. Default: the shards of the base model.",
        type=ValueType.SIZE,
        metavar="SIZE",
    )

    @property
    def label(self) -> str:
        """A short text that names the requested dtype."""
        return self.dtype or "as stored"
