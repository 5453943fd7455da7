"""Names in the config match the modules that stock PEFT matches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, get_peft_model
from peft.utils.other import ModulesToSaveWrapper

from exporter.errors import UnreadableFile
from exporter.sources.peft.adapter import Adapter
from exporter.sources.peft.edits import FullModule
from exporter.sources.peft.matching import first_pattern, targets, wraps
from fixtures.models.tie_layouts import build
from tests.merge.tuned import reloaded
from tests.sources.peft.written import require_merged_as_trained, write

SAVED = (["norm"], ["layernorm"], ["1.mlp"], ["mlp"], ["head"], ["layers.0.input_layernorm", "m_head"])


def lora(**settings: Any) -> LoraConfig:
    return LoraConfig(**{"r": 2, "lora_alpha": 6, "target_modules": ["q_proj"], **settings})


@pytest.mark.parametrize("saved", SAVED, ids=str)
def test_modules_are_saved_by_the_end_of_their_path_as_in_peft(saved: list[str], tmp_path: Path) -> None:
    model = reloaded(build(tmp_path / "base", "llama", "untied"))
    names = [name for name, _ in model.named_modules() if name]
    tuned: Any = get_peft_model(model, lora(modules_to_save=saved)).base_model.model
    wrapped = {name for name, module in tuned.named_modules() if isinstance(module, ModulesToSaveWrapper)}
    inside = {name for name in names if any(f"{name}.".startswith(f"{outer}.") for outer in wrapped)}
    assert {name for name in names if any(wraps(entry, name) for entry in saved)} == inside != set()


@pytest.mark.parametrize("saved", SAVED, ids=str)
def test_saved_modules_are_merged_as_trained(saved: list[str], tmp_path: Path) -> None:
    written = write(tmp_path, lora(modules_to_save=saved))
    edits = [edit for edit in Adapter.open(written.adapter).edits if isinstance(edit, FullModule)]
    assert edits
    assert not any(edit.in_place for edit in edits)
    require_merged_as_trained(written, tmp_path / "out")


@pytest.mark.parametrize(
    ("target_modules", "module", "expected"),
    [
        (["q_proj"], "model.layers.0.self_attn.q_proj", True),
        (["proj"], "model.layers.0.self_attn.q_proj", False),
        (["self_attn.q_proj"], "self_attn.q_proj", True),
        (r".*\.1\..*_proj", "model.layers.1.mlp.up_proj", True),
        (r"layers", "model.layers.1.mlp.up_proj", False),
        ([], "q_proj", False),
    ],
)
def test_targets_are_matched_by_whole_segments_or_by_the_whole_pattern(
    target_modules: str | list[str], module: str, expected: bool
) -> None:
    assert targets(Path("c"), target_modules, module) is expected


def test_patterns_are_matched_from_the_start_of_a_segment() -> None:
    patterns = ["proj", r".*\.gate_up_proj", "0.*q_proj", "q_proj"]
    assert first_pattern(Path("c"), patterns, "layers.0.self_attn.q_proj") == "0.*q_proj"
    assert first_pattern(Path("c"), patterns, "layers.1.self_attn.q_proj") == "q_proj"
    assert first_pattern(Path("c"), patterns, "layers.1.mlp.experts.gate_up_proj") == r".*\.gate_up_proj"
    assert first_pattern(Path("c"), patterns, "layers.1.mlp.down_proj") is None


def test_a_pattern_that_is_not_a_regular_expression_is_refused() -> None:
    with pytest.raises(UnreadableFile, match=r"c: '\(': expected a regular expression"):
        targets(Path("c"), "(", "q_proj")
