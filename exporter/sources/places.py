"""Find the stored tensors of the modules that an adapter changes. Adapters use the module names of the loaded model.

If a table generated from transformers describes the model, the stored tensors are looked up in the table. For a model
that no table describes, the name of a tensor must begin with the path of its module, with or without the prefixes of
published checkpoints.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal

from exporter.models.architecture import pattern_of
from exporter.models.module_map import ModuleMap
from exporter.sources.hf.checkpoint import Checkpoint
from exporter.sources.hf.tie import EMBEDDINGS, HEADS, Vocabulary

if TYPE_CHECKING:
    from exporter.sources.peft.adapter import Adapter
    from exporter.sources.peft.edits import FullModule
    from exporter.sources.peft.parts import Part

Use = Literal["embedding", "head"]
EMBEDDING: Final = "embedding"
HEAD: Final = "head"

#: (start of the module's path, start of the stored name) in models that no table describes.
_RENAMED: Final = (
    ("model.language_model.", "language_model.model."),
    ("model.", ""),
    ("transformer.", ""),
    ("", "model."),
    ("", "transformer."),
)


@dataclass(frozen=True)
class Place:
    """Where a parameter of the loaded model is stored.

    name: name of the stored tensor that equals the parameter, or None if no single stored tensor does. parts: the
    stored tensors that contain parts of the parameter, if the parameter is not one stored tensor. module: the path of
    the module in the loaded model, or None if the model class lacks the module. shape: the shape of the parameter.
    """

    name: str | None
    parts: tuple[Part, ...] = ()
    module: str | None = None
    shape: tuple[int, ...] = ()


def use_of(checkpoint: Checkpoint, module: str) -> Use | None:
    """Return ``EMBEDDING`` if ``module`` is the input embedding, ``HEAD`` if ``module`` is the output head, else None.

    The result does not depend on whether the checkpoint stores a tensor for ``module``.
    """
    modules, tie = checkpoint.modules, checkpoint.tie
    if modules is None or modules.architecture.embedding is None:
        return _use_by_name(checkpoint, module)
    vocabulary = Vocabulary(modules)
    for name in modules.spellings(module, "weight"):
        pattern = pattern_of(name)
        if name == vocabulary.head:
            return HEAD
        if pattern == pattern_of(vocabulary.embedding):
            return EMBEDDING
        if name in modules.groups:
            return EMBEDDING if modules.stored_name(name) in (tie.embedding, *tie.copies) else None
        if pattern in vocabulary.linked:
            return EMBEDDING
    return None


def has_embedding_pair(checkpoint: Checkpoint) -> bool:
    """Whether encoder and decoder have separate embedding modules whose weights are tied."""
    modules = checkpoint.modules
    if modules is None or modules.architecture.embedding is None:
        return checkpoint.is_encoder_decoder
    vocabulary = Vocabulary(modules)
    heads = {pattern_of(vocabulary.head)} if vocabulary.head else set()
    return checkpoint.is_encoder_decoder and len(vocabulary.tied - heads) > 1


def is_never_run(checkpoint: Checkpoint, module: str) -> bool:
    """Whether ``module`` is an embedding module that only stores a matrix for encoder and decoder and is never run.

    The encoders and decoders of T5, BART and their relatives run embedding modules of their own, whose weights are tied
    to the weight of ``shared``. Therefore, a copy of ``shared`` or an update of ``shared`` that PEFT trained has no
    effect on the model.
    """
    modules = checkpoint.modules
    if modules is None or not has_embedding_pair(checkpoint):
        return False
    vocabulary = Vocabulary(modules)
    tied = {target for target, source in modules.architecture.ties if source == vocabulary.embedding}
    holds = vocabulary.embedding in modules.spellings(module, "weight")
    return holds and len(tied - {vocabulary.head}) > 1


def resized_originals(checkpoint: Checkpoint, adapter: Adapter) -> list[FullModule]:
    """Return the base's own embedding matrices that the user resized, if PEFT trained copies that are never run.

    An example is ``shared`` of T5 in ``modules_to_save``: the model runs with the new rows of the resized matrix.
    """
    n_rows = checkpoint.tensors[checkpoint.tie.embedding].spec.n_rows
    return [
        original
        for original in adapter.originals
        if original.tensor.spec.n_rows > n_rows and is_never_run(checkpoint, original.module)
    ]


def place_of(
    checkpoint: Checkpoint, module: str, parameter: str, expected: tuple[int, ...] | None = None
) -> Place | None:
    """Return the place where ``parameter`` of ``module`` is stored, or None if the checkpoint lacks the parameter.

    expected: the shape of the parameter, which some of transformers' conversions need, or None if the adapter does not
    determine the shape. Raises ValueError if transformers' conversion cannot be applied to the stored tensors.
    """
    modules = checkpoint.modules
    if modules is None:
        name = next((name for name in _spellings(f"{module}.{parameter}") if name in checkpoint.tensors), None)
        return Place(name, shape=checkpoint.tensors[name].spec.shape) if name else None
    full_name = modules.find(module, parameter) or modules.find_tied(module, parameter)
    if full_name is None:
        stored = modules.find_stored(module, parameter)
        return Place(stored, shape=checkpoint.tensors[stored].spec.shape) if stored else None
    path = full_name.removesuffix(f".{parameter}")
    if (name := modules.stored_name(full_name)) is not None:
        return Place(name, module=path, shape=checkpoint.tensors[name].spec.shape)
    return _placed(checkpoint, modules, full_name, path, expected)


def _placed(
    checkpoint: Checkpoint, modules: ModuleMap, parameter: str, path: str, expected: tuple[int, ...] | None
) -> Place | None:
    placed = modules.placed(parameter, lambda name: checkpoint.tensors[name].spec.shape, expected)
    if placed is None:
        return None
    from exporter.sources.peft.parts import Part  # a lazy import: few merges need the module

    parts = [Part(block, placed.shape, checkpoint.tensors[block.name].spec.shape) for block in placed.blocks]
    if placed.is_whole and parts[0].stored_shape == placed.shape:
        return Place(placed.blocks[0].name, module=path, shape=placed.shape)
    return Place(None, tuple(parts), module=path, shape=placed.shape)


def stored_name(checkpoint: Checkpoint, module: str, parameter: str) -> str | None:
    """Return the stored tensor that equals ``parameter`` of ``module``, or None if there is no such tensor."""
    try:
        place = place_of(checkpoint, module, parameter)
    except ValueError:  # stored tensors that a conversion does not fit are no unchanged parameter
        return None
    return place.name if place else None


def _spellings(name: str) -> Iterator[str]:
    yield name
    for start, stored in _RENAMED:
        if name.startswith(start):
            yield stored + name.removeprefix(start)


def _use_by_name(checkpoint: Checkpoint, module: str) -> Use | None:
    tie, last = checkpoint.tie, module.rpartition(".")[2]
    name = stored_name(checkpoint, module, "weight")
    if name is not None:
        return EMBEDDING if name in (tie.embedding, *tie.copies) else HEAD if name == tie.head else None
    # The module has no stored tensor: encoder and decoder share one embedding, and a tied head has no tensor.
    if last in (EMBEDDINGS if checkpoint.is_encoder_decoder else (tie.embedding.split(".")[-2],)):
        return EMBEDDING
    return HEAD if tie.head is None and last in HEADS else None
