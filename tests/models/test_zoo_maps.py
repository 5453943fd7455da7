"""The map of every type of the zoo's sample gives the parameters that transformers loads, element for element."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

from exporter.models.module_map import ModuleMap
from exporter.sources.hf.checkpoint import Checkpoint
from fixtures.zoo.build import load
from fixtures.zoo.names import SAMPLE
from fixtures.zoo.reference import is_tied
from tests.session.zoo import ZooCheckpoint
from tests.support.placed import parameter

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.mark.parametrize("name", SAMPLE)
def test_the_map_is_what_transformers_loads(name: str, zoo_checkpoint: ZooCheckpoint) -> None:
    folder = zoo_checkpoint(name)
    model, loading = load(folder, output_loading_info=True)
    checkpoint = Checkpoint.open(folder)
    modules = checkpoint.modules
    assert modules is not None
    assert differences(checkpoint, modules, model) == []
    ignored = [re.compile(pattern) for pattern in modules.architecture.facts.ignored]
    unloaded = {key for key in modules.groups if key not in model.state_dict()}
    assert {key for key in unloaded if not any(each.search(key) for each in ignored)} == loading["unexpected_keys"]
    paths = {id(module): path for path, module in reversed(list(model.named_modules(remove_duplicate=False)))}
    assert modules.architecture.embedding == paths[id(model.get_input_embeddings())]
    assert modules.architecture.head == paths.get(id(model.get_output_embeddings()))
    if checkpoint.tie.has_head:
        assert checkpoint.tie.tied == is_tied(model)


def differences(checkpoint: Checkpoint, modules: ModuleMap, model: Any) -> list[str]:
    """Return the parameters of ``model`` that the map does not give from the stored tensors."""
    owners: dict[int, list[str]] = {}
    state = model.state_dict(keep_vars=True)
    for name, value in state.items():
        owners.setdefault(id(value), []).append(name)
    wrong = []
    for name, value in state.items():
        actual = parameter(checkpoint, modules, name, value.shape)
        if actual is None:
            if not any(other in modules.groups for other in owners[id(value)]):
                wrong.append(f"{name} is not stored")
        elif not np.array_equal(actual, value.detach().float().numpy()):
            wrong.append(name)
    return wrong
