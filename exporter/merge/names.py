"""Maps PEFT modules, named as in the loaded model, to the stored tensors of a checkpoint.

Most checkpoints use the module's own path. Old ones omit the prefix of the base model, and some wrappers were
restructured after their checkpoints had been published: transformers renames those on loading, and so does this module.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, Literal

from exporter.sources.hf.checkpoint import EMBEDDINGS, HEADS, Checkpoint

Use = Literal["embedding", "head"]
EMBEDDING: Final = "embedding"
HEAD: Final = "head"

#: Start of the module's path → start of the stored name. Source: transformers' conversion_mapping.
_RENAMED: Final = (
    ("model.language_model.", "language_model.model."),
    ("model.vision_tower.", "vision_tower."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
    ("lm_head.", "language_model.lm_head."),
    ("model.", ""),
    ("transformer.", ""),
    ("gpt_neox.", ""),
    ("", "model."),
    ("", "transformer."),
    ("", "gpt_neox."),
)


def stored_name(checkpoint: Checkpoint, module: str, parameter: str) -> str | None:
    """The tensor that holds ``parameter`` of ``module``, or None if the checkpoint stores none."""
    return next((name for name in _spellings(f"{module}.{parameter}") if name in checkpoint.tensors), None)


def _spellings(name: str) -> Iterator[str]:
    yield name
    for start, stored in _RENAMED:
        if name.startswith(start):
            yield stored + name.removeprefix(start)


def use_of(checkpoint: Checkpoint, module: str) -> Use | None:
    """Whether ``module`` is the input embedding or the output head, with a stored tensor of its own or without."""
    tie, last = checkpoint.tie, module.rpartition(".")[2]
    name = stored_name(checkpoint, module, "weight")
    if name is not None:
        return EMBEDDING if name in (tie.embedding, *tie.copies) else HEAD if name == tie.head else None
    # Not stored: both sides of an encoder-decoder share one embedding, and a tied head has no tensor.
    if last in (EMBEDDINGS if checkpoint.is_encoder_decoder else (tie.embedding.split(".")[-2],)):
        return EMBEDDING
    return HEAD if tie.head is None and last in HEADS else None
