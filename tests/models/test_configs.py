"""Configs that name other models than the usual ones: other nested models, unknown types, and hostile values."""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from exporter.cli.main import run
from exporter.models.architecture import Architecture
from exporter.models.module_map import module_map
from exporter.sources.hf.checkpoint import Checkpoint
from exporter.sources.places import place_of
from fixtures.zoo.build import config_of, load
from fixtures.zoo.weights import fill
from tests.session.zoo import ZooCheckpoint
from tests.support.zoo_maps import map_faults

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
DEEP: Any = 0
for _ in range(200):
    DEEP = [DEEP]
HOSTILE = (
    "../x",
    "../../../../etc/passwd",
    "llama/../llama",
    "classes",
    "conversions",
    "",
    "a\0b",
    "x" * 5000,
    7,
    -1.5,
    None,
    True,
    ["llama"],
    {"model_type": "llama"},
    DEEP,
)


@pytest.mark.parametrize("text", ["mistral", "qwen2", "gemma2", "mixtral", "qwen3_moe"])
def test_the_map_follows_the_text_model_that_the_config_names(text: str, tmp_path: Path) -> None:
    import transformers

    outer = config_of("llava")
    config = transformers.LlavaConfig(
        vision_config=outer.vision_config,
        text_config=config_of(text),
        image_token_index=outer.image_token_id,
        image_seq_length=outer.image_seq_length,
    )
    model = transformers.LlavaForConditionalGeneration(config).float()
    fill(model)
    model.save_pretrained(tmp_path)
    loaded, loading = load(tmp_path, output_loading_info=True)
    assert map_faults(tmp_path, loaded, loading["unexpected_keys"]) == []


def test_an_unknown_model_type_has_no_map_and_is_read_by_names(tiny_tied: Path, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(with_config(tiny_tied, tmp_path / "base", model_type="novel", architectures=["Novel"]))
    assert checkpoint.modules is None
    assert checkpoint.tie.embedding == "model.embed_tokens.weight"
    place = place_of(checkpoint, "model.layers.0.self_attn.q_proj", "weight")
    assert place is not None
    assert place.name == "model.layers.0.self_attn.q_proj.weight"
    assert place_of(checkpoint, "model.layers.0.self_attn.x_proj", "weight") is None


def test_an_unknown_class_of_a_known_type_is_read_as_the_usual_class() -> None:
    described = Architecture.of({"model_type": "llama", "architectures": ["NovelForCausalLM"]})
    assert described is not None
    assert described.name == "LlamaForCausalLM"


def test_a_text_model_without_an_entry_of_its_own_is_found_by_its_class() -> None:
    described = Architecture.of({"model_type": "novel", "architectures": ["LlamaModel"]})
    assert described is not None
    assert (described.name, described.embedding) == ("LlamaModel", "embed_tokens")


def with_config(base: Path, folder: Path, **values: Any) -> Path:
    shutil.copytree(base, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **values}))
    return folder


@pytest.mark.parametrize("key", ["model_type", "architectures", "text_config", "tie_word_embeddings"])
@pytest.mark.parametrize("number", range(len(HOSTILE)))
def test_a_hostile_value_is_bad_input_or_ignored(
    key: str, number: int, tiny_tied: Path, tiny_adapter: Path, tmp_path: Path
) -> None:
    value = HOSTILE[number]
    for changes in ({key: value}, {key: [value]}, {key: {key: value, "model_type": value}}):
        folder = with_config(tiny_tied, tmp_path / str(len(list(tmp_path.iterdir()))), **changes)
        assert run(["plan", str(tiny_adapter), "--base", str(folder)]) in (0, 4)


@pytest.mark.parametrize("value", HOSTILE, ids=range(len(HOSTILE)))
def test_a_hostile_nested_config_is_ignored(value: Any, zoo_checkpoint: ZooCheckpoint) -> None:
    checkpoint = Checkpoint.open(zoo_checkpoint("mistral3"))
    names = checkpoint.tensors.keys()
    text = checkpoint.config["text_config"]
    for changed in (
        value,
        {"model_type": value},
        {**text, "model_type": value},
        {**text, "num_attention_heads": value},
    ):
        mapped = module_map({**checkpoint.config, "text_config": changed}, names)
        assert mapped is not None
        assert mapped.architecture.embedding == "model.language_model.embed_tokens"
        assert mapped.groups.keys() == checkpoint.modules.groups.keys()  # type: ignore[union-attr]


@pytest.mark.parametrize("name", ["mixtral", "ernie4_5_vl_moe", "inkling_mm_model", "step3p7"])
@pytest.mark.parametrize("shape", [(), (3,), (0,), (2, 0), (0, 2), (7, 5), (1, 1, 1, 1)], ids=str)
def test_hostile_shapes_give_a_parameter_or_a_value_error(
    name: str, shape: tuple[int, ...], zoo_checkpoint: ZooCheckpoint
) -> None:
    modules = Checkpoint.open(zoo_checkpoint(name)).modules
    assert modules is not None
    for parameter, group in modules.groups.items():
        first = group.sources[0][1]
        for others in (shape, (*shape, 2), shape[:-1]):
            with contextlib.suppress(ValueError):
                modules.placed(parameter, lambda stored: shape if stored == first else others)  # noqa: B023
