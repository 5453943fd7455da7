"""Which stored tensor a PEFT module is: modules are named as they are in memory, tensors as they lie on disk.

Most checkpoints use the module's own path. Old ones leave out the prefix of the base model, and some wrappers were
regrouped after their checkpoints had been published: transformers renames those when it loads them, and so do we.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, Literal

from exporter.sources.hf.checkpoint import EMBEDDINGS, HEADS, Checkpoint

Use = Literal["embedding", "head"]

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
    """Whether ``module`` is a use of the input embedding or the output head, stored under its own name or not."""
    tie, last = checkpoint.tie, module.rpartition(".")[2]
    name = stored_name(checkpoint, module, "weight")
    if name is not None:
        return "embedding" if name in (tie.embedding, *tie.copies) else "head" if name == tie.head else None
    # Not stored: the sides of an encoder-decoder share one embedding, and a tied head has no tensor.
    if last in (EMBEDDINGS if checkpoint.is_encoder_decoder else (tie.embedding.split(".")[-2],)):
        return "embedding"
    return "head" if tie.head is None and last in HEADS else None
