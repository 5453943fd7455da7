"""Assigns each edit to stored tensors. An edit is one change that an adapter makes to one parameter of the model."""

from __future__ import annotations

from dataclasses import replace

from exporter.errors import NotExpressible, TensorMismatch
from exporter.models.architecture import pattern_of, task_classes
from exporter.peft_modules.replacements import Replacement
from exporter.sources.hf.checkpoint import Checkpoint
from exporter.sources.peft.edits import Edit, FullModule, LowRank, TokenRows
from exporter.sources.peft.types.changes import ByPeft
from exporter.sources.places import EMBEDDING, Place, has_embedding_pair, place_of, use_of


def assign(checkpoint: Checkpoint, edit: Edit) -> dict[str, Edit]:
    """Return {destination: part of the edit that applies to the destination}; the bias of a LoRA update is ignored.

    A destination is ``EMBEDDING``, ``HEAD`` or the name of a stored tensor. Raises TensorMismatch if the base model
    lacks the module of the edit, and NotExpressible if the edit cannot be applied to the stored tensors.
    """
    assert not isinstance(edit, ByPeft), "merged_by_peft must first replace changes that only PEFT can merge"
    if isinstance(edit, Replacement) and edit.bias is not None:
        return {**assign(checkpoint, replace(edit, bias=None)), **assign(checkpoint, edit.bias)}
    parameter = "weight" if isinstance(edit, TokenRows) else edit.parameter
    use = use_of(checkpoint, edit.module) if parameter == "weight" else None
    if use is not None:
        reaches_both = isinstance(edit, TokenRows) or (isinstance(edit, FullModule) and edit.in_place)
        if use == EMBEDDING and not reaches_both and has_embedding_pair(checkpoint):
            refuse_one_side(edit)
        return {use: _oriented(checkpoint, edit, None)}
    _refuse_shared_layer(checkpoint, edit, parameter)
    place = _place(checkpoint, edit, parameter)
    if place is None:
        _refuse_new_head(checkpoint, edit)
        expected = f"a module that exists in the base, such as {checkpoint.tie.embedding.removesuffix('.weight')}"
        raise TensorMismatch(edit.path, edit.key, expected=expected, found=edit.module)
    edit = _oriented(checkpoint, edit, place.module)
    if place.name is not None:
        return {place.name: edit}
    return {part.block.name: _part_of(edit, place, number) for number, part in enumerate(place.parts)}


def _refuse_shared_layer(checkpoint: Checkpoint, edit: Edit, parameter: str) -> None:
    """Raise NotExpressible for an edit of a tensor that several layers share, such as a block of a Zamba model.

    PEFT trains a different update for each layer, but the checkpoint stores only one tensor for all these layers.
    """
    modules = checkpoint.modules
    if modules is None:
        return
    shared = {target for target, source in modules.architecture.ties if target == source}
    if shared and any(pattern_of(name) in shared for name in modules.spellings(edit.module, parameter)):
        raise NotExpressible(
            f"{edit.path}: {edit.key}",
            f"several layers of the base share the stored tensor of {edit.module}, "
            "but PEFT trains one update per layer",
            instead="list only modules without shared tensors in target_modules, and train again",
        )


def _refuse_new_head(checkpoint: Checkpoint, edit: Edit) -> None:
    """Raise NotExpressible if an adapter contains a task head (such as a classifier) that the base's class lacks."""
    modules = checkpoint.modules
    if modules is None or not isinstance(edit, FullModule) or edit.in_place:
        return
    head = edit.module.rpartition(".")[2]
    classes = task_classes(modules.architecture, f"{edit.module}.{edit.parameter}")
    if classes:
        load = f"{classes[0]}.from_pretrained(base, num_labels={edit.tensor.spec.n_rows})"
        raise NotExpressible(
            f"{edit.path}: {edit.key}",
            f"the adapter contains {head!r}, the head of {classes[0]}, but the base is a {modules.architecture.name}",
            instead=f"save the base with {load}.save_pretrained(folder), and merge onto that folder",
        )


def _place(checkpoint: Checkpoint, edit: Edit, parameter: str) -> Place | None:
    try:
        return place_of(checkpoint, edit.module, parameter, _expected_shape(edit))
    except ValueError as exc:
        raise TensorMismatch(
            edit.path, edit.key, expected="a module of the base", found=f"{edit.module} ({exc})"
        ) from exc


def _expected_shape(edit: Edit) -> tuple[int, ...] | None:
    """Return the shape of the parameter that the edit changes, or None if the edit does not determine the shape."""
    if isinstance(edit, FullModule):
        return edit.tensor.spec.shape
    if isinstance(edit, LowRank) and edit.experts > 1:
        return edit.experts, edit.up.spec.shape[0], edit.down.spec.shape[1]
    return None


def _oriented(checkpoint: Checkpoint, edit: Edit, module: str | None) -> Edit:
    """Return a copy of a low-rank update that records whether the module stores its weight as (in, out)."""
    if not isinstance(edit, LowRank) or checkpoint.modules is None or module is None:
        return edit
    return replace(edit, transposed=checkpoint.modules.architecture.stores_in_out(module))


def _part_of(edit: Edit, place: Place, number: int) -> Edit:
    part = place.parts[number]
    if isinstance(edit, LowRank):
        if edit.magnitude is not None and not part.covers_axis(-1):
            _refuse_part(
                edit,
                "the base stores each row of the weight in several tensors, but DoRA needs the norms of whole rows",
            )
        return replace(edit, part=part)
    if isinstance(edit, FullModule) and edit.tensor.spec.shape == place.shape and part.covers_stored:
        from exporter.sources.peft.parts import PartTensor  # a lazy import: few merges need the module

        return replace(edit, tensor=PartTensor.of(edit.tensor, part))
    return _refuse_part(edit, "the base stores this module together with other modules in one tensor")


def _refuse_part(edit: Edit, reason: str) -> Edit:
    raise NotExpressible(
        f"{edit.path}: {edit.key}", reason, instead="merge with PEFT's merge_and_unload() and save with transformers"
    )


def refuse_one_side(edit: Edit) -> None:
    """Raise NotExpressible, because the edit changes the embedding only in the encoder or only in the decoder."""
    raise NotExpressible(
        f"{edit.path}: {edit.key}",
        f"encoder and decoder use separate embedding modules, but PEFT trained only {edit.module}",
        instead="train the same token rows for embedding and head; PEFT then trains both embedding modules",
    )


def assign_bias(checkpoint: Checkpoint, edit: LowRank) -> dict[str, Edit]:
    """Return {name of a stored bias: part of the LoRA update whose bias vector is added to the stored bias}.

    Raises NotExpressible if the base model stores no bias for the module that the LoRA update changes.
    """
    place = _place(checkpoint, edit, "bias")
    if place is None:
        raise NotExpressible(
            f"{edit.path}: {edit.bias.spec.name if edit.bias else edit.key}",
            f"{edit.module} has no bias in the base, so there is no tensor to which the LoRA bias can be added",
            instead="train without lora_bias",
        )
    if place.name is not None:
        return {place.name: replace(edit, part=None)}
    return {part.block.name: replace(edit, part=part) for part in place.parts}
