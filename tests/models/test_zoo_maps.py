"""The map of every type of the zoo's sample gives the parameters that transformers loads, element for element."""

from __future__ import annotations

import pytest

from fixtures.zoo.build import load
from fixtures.zoo.names import SAMPLE
from tests.session.zoo import ZooCheckpoint
from tests.support.zoo_maps import map_faults

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.mark.parametrize("name", SAMPLE)
def test_the_map_is_what_transformers_loads(name: str, zoo_checkpoint: ZooCheckpoint) -> None:
    folder = zoo_checkpoint(name)
    model, loading = load(folder, output_loading_info=True)
    assert map_faults(folder, model, loading["unexpected_keys"]) == []
