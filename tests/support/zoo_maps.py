"""A loaded model of the zoo and the map of its checkpoint, compared in everything that the map says."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from exporter.errors import TTExportError
from exporter.models.architecture import pattern_of
from exporter.models.module_map import ModuleMap
from exporter.sources.hf.checkpoint import Checkpoint
from fixtures.zoo.reference import is_tied
from tests.support.placed import parameter


def map_faults(folder: Path, model: Any, unexpected: set[str]) -> list[str]:
    """Return where the map of the checkpoint ``folder`` differs from ``model``, as transformers loaded it.

    unexpected: the names of the tensors that transformers reported as unexpected.
    """
    checkpoint = Checkpoint.open(folder)
    modules = checkpoint.modules
    if modules is None:
        return ["no table describes the model"]
    try:
        return [*_values(checkpoint, modules, model), *_rest(checkpoint, modules, model, unexpected)]
    except (TTExportError, ValueError) as exc:
        return [f"{type(exc).__name__}: {exc}"]


def _values(checkpoint: Checkpoint, modules: ModuleMap, model: Any) -> Iterator[str]:
    """Yield the parameters of ``model`` that the map does not assemble from the stored tensors."""
    state = model.state_dict(keep_vars=True)
    stored = {id(value) for name, value in state.items() if name in modules.groups}
    for name, value in state.items():
        actual = parameter(checkpoint, modules, name, value.shape)
        if actual is not None and not np.array_equal(actual, value.detach().float().numpy()):
            yield f"{name}: other values"
        if actual is None and id(value) not in stored:
            yield f"{name}: not stored"


def _rest(checkpoint: Checkpoint, modules: ModuleMap, model: Any, unexpected: set[str]) -> Iterator[str]:
    architecture, state = modules.architecture, model.state_dict()
    ignored = [re.compile(pattern) for pattern in architecture.facts.ignored]
    unloaded = {key for key in modules.groups if key not in state}
    if {key for key in unloaded if not any(each.search(key) for each in ignored)} != unexpected:
        yield "other tensors than those that transformers does not load"
    paths = {id(module): path for path, module in reversed(list(model.named_modules(remove_duplicate=False)))}
    if architecture.embedding != paths[id(model.get_input_embeddings())]:
        yield f"{architecture.embedding}: not the embedding"
    if architecture.head != paths.get(id(model.get_output_embeddings())):
        yield f"{architecture.head}: not the head"
    pairs = model.all_tied_weights_keys.items()
    if {(pattern_of(target), pattern_of(source)) for target, source in pairs} != set(architecture.ties):
        yield f"other ties than {dict(pairs)}"
    if checkpoint.tie.has_head and checkpoint.tie.tied != is_tied(model):
        yield "another tie"
