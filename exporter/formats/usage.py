"""Define the dataclasses for the usage examples in model cards.

Each example runs an artifact with one client, such as llama.cpp.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from exporter.sources.gguf.split_files import split_file_stem

#: The prompt of all usage examples.
PROMPT: Final = "Hello!"


@dataclass(frozen=True, slots=True)
class ReleasedArtifact:
    """An artifact of a release, with paths relative to the folder of the model card.

    path: the path of the artifact's file or folder, or of the first part of a split GGUF. files: the sorted paths of
    all files of the artifact. All paths use forward slashes.
    """

    path: str
    storage: str
    files: Sequence[str]

    @property
    def is_split(self) -> bool:
        """Whether the artifact is a split GGUF."""
        return split_file_stem(self.path) is not None


@dataclass(frozen=True, slots=True)
class Usage:
    """A code block of a model card. language: the language tag of the Markdown code block, such as "python"."""

    client: str
    language: str
    code: str


#: A function that makes the code blocks for all artifacts of a format. The second argument is the model's name.
UsageOf = Callable[[Sequence[ReleasedArtifact], str], Iterator[Usage]]
