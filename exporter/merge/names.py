"""Maps the module names in an adapter, which are module names of the loaded model, to stored tensor names.

In most checkpoints, the name of a tensor begins with the path of its module. Old checkpoints omit the prefix of the
base model in tensor names. Some model classes in transformers were restructured after checkpoints had been published.
For restructured model classes, transformers renames the tensors on loading, and the functions below apply the renaming
of transformers.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, Literal

from exporter.sources.hf.checkpoint import EMBEDDINGS, HEADS, Checkpoint

Use = Literal["embedding", "head"]
EMBEDDING: Final = "embedding"
HEAD: Final = "head"

#: (start of the module's path, start of the stored name). Source: transformers' conversion_mapping.
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
    """Return the name of the tensor that stores ``parameter`` of ``module``, or None if no such tensor exists."""
    return next((name for name in _spellings(f"{module}.{parameter}") if name in checkpoint.tensors), None)


def _spellings(name: str) -> Iterator[str]:
    yield name
    for start, stored in _RENAMED:
        if name.startswith(start):
            yield stored + name.removeprefix(start)


def use_of(checkpoint: Checkpoint, module: str) -> Use | None:
    """Return ``EMBEDDING`` if ``module`` is the input embedding, ``HEAD`` if ``module`` is the output head, else None.

    The result does not depend on whether the checkpoint stores a tensor for ``module``.
    """
    tie, last = checkpoint.tie, module.rpartition(".")[2]
    name = stored_name(checkpoint, module, "weight")
    if name is not None:
        return EMBEDDING if name in (tie.embedding, *tie.copies) else HEAD if name == tie.head else None
    # The module has no stored tensor: encoder and decoder share one embedding, and a tied head has no tensor.
    if last in (EMBEDDINGS if checkpoint.is_encoder_decoder else (tie.embedding.split(".")[-2],)):
        return EMBEDDING
    return HEAD if tie.head is None and last in HEADS else None
