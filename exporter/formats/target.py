"""One artifact to write: its format's own plan, or why the format cannot hold the model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from exporter.errors import NotExpressible
from exporter.formats.gguf.split import Split
from exporter.io.parallel import Budget
from exporter.progress import Progress

#: ``--dtype`` → safetensors spelling.
DTYPES: Final = {"f32": "F32", "f16": "F16", "bf16": "BF16"}


@dataclass(frozen=True, kw_only=True)
class Wish:
    """What the user asked of a format. ``dtype`` in safetensors spelling, None for as stored.

    quants: what one artifact is to hold; only ONNX takes several, as files of one folder.
    """

    dtype: str | None = None
    quants: tuple[str, ...] = ()
    onnx_ops: str = "standard"
    pre_tokenizer: str | None = None
    budget: Budget = field(default_factory=Budget)
    max_shard_bytes: int | None = None
    converter: Path | None = None
    imatrix: Path | None = None
    token_embedding_type: str | None = None
    output_tensor_type: str | None = None
    split: Split | None = None
    #: Unquantised GGUF files by dtype, which the quantisations of one command share.
    intermediates: dict[str | None, Any] = field(default_factory=dict)

    @property
    def quant(self) -> str | None:
        """The one quantisation of a GGUF file."""
        return self.quants[0] if self.quants else None


@dataclass(frozen=True, kw_only=True)
class Target:
    """``write(path, progress)`` makes the artifact at ``path``; None if ``refusal`` says why there can be none.

    ``notes`` are sentences on what the format cannot say of this model, though it holds it. ``nbytes`` is about the
    size where ``estimated``; ``work_nbytes`` what is written on the way to it, where that is more; ``peak_nbytes``
    about the memory of writing it. ``parts``: the artifact may be files beside its path, named after it. ``way``: how
    the graph comes about, of a format that knows more than one way.
    """

    format: str
    storage: str
    nbytes: int = 0
    work_nbytes: int | None = None
    peak_nbytes: int = 0
    estimated: bool = False
    parts: bool = False
    write: Callable[[Path, Progress], None] | None = None
    refusal: NotExpressible | None = None
    notes: Sequence[str] = ()
    way: str | None = None
    place: str = ""  # below OUT; empty: OUT itself

    def told(self) -> dict[str, Any]:
        """What ``plan`` says of it in JSON, apart from its name and place."""
        return {
            "expressible": self.refusal is None,
            "reason": str(self.refusal) if self.refusal else None,
            "nbytes": self.nbytes,
            "peak_nbytes": self.peak_nbytes,
            "estimated": self.estimated,
            "way": self.way,
            "notes": list(self.notes),
        }
