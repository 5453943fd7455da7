"""Every entry of the generated data counts: with a damaged entry, the map differs from what transformers loads."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from exporter.models.data import CONVERSIONS
from fixtures.zoo.build import load
from tests.session.zoo import ZooCheckpoint
from tests.support.damaged_data import Damage, DamageData, with_fact
from tests.support.zoo_maps import map_faults

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
Loaded = Callable[[str], tuple[Path, Any, set[str]]]


def drop_flag(folder: Path) -> None:
    """Leave the tie to the default of the class."""
    config = json.loads((folder / "config.json").read_text())
    del config["tie_word_embeddings"]
    (folder / "config.json").write_text(json.dumps(config))


def add_prefix(folder: Path) -> None:
    """Store the tensors under the names of a class with a head."""
    path = folder / "model.safetensors"
    save_file({f"bert.{name}": value for name, value in load_file(path).items()}, path, metadata={"format": "pt"})


#: Name → (name of the zoo, change of the checkpoint).
VARIANTS: Mapping[str, tuple[str, Callable[[Path], None]]] = {
    "gpt2 without a flag": ("gpt2", drop_flag),
    "bert:encoder with a prefix": ("bert:encoder", add_prefix),
}


@pytest.fixture(scope="module")
def loaded(zoo_checkpoint: ZooCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    """Return (folder, loaded model, unexpected tensors) of a name of the zoo."""

    @cache
    def load_once(name: str) -> tuple[Path, Any, set[str]]:
        built, change = VARIANTS.get(name, (name, None))
        folder = zoo_checkpoint(built)
        if change:
            folder = shutil.copytree(folder, tmp_path_factory.mktemp("variant") / "base")
            change(folder)
        model, loading = load(folder, output_loading_info=True)
        return folder, model, loading["unexpected_keys"]

    return load_once


def transform(content: Any, key: str, source: str) -> dict[str, Any]:
    listed: list[dict[str, Any]] = content["conversions"][key]
    return next(entry for entry in listed if entry["sources"][0] == source)


def without(key: str, source: str) -> Damage:
    """A transform is missing."""
    return lambda content: content["conversions"][key].remove(transform(content, key, source))


def with_field(key: str, source: str, field: str, value: Any) -> Damage:
    """A transform has another source, target or offset."""
    return lambda content: transform(content, key, source).update({field: value})


def with_operation(key: str, source: str, number: int, **values: Any) -> Damage:
    """An operation has another axis or flag."""
    return lambda content: transform(content, key, source)["operations"][number].update(values)


def without_operation(key: str, source: str, number: int) -> Damage:
    return lambda content: transform(content, key, source)["operations"].pop(number)


def text_model(content: Any) -> list[str]:
    return next(sub for sub in content["classes"][ARIA]["submodels"] if sub[2] == "text_config")


EXPERTS, DOWN = ".experts.*.w1.weight", ".experts.*.w2.weight"
CONVERSION_DAMAGES: Mapping[str, tuple[str, Damage]] = {
    "a renaming is missing": ("mixtral", without("mixtral", ".block_sparse_moe.")),
    "a renaming has another target": (
        "mixtral",
        with_field("mixtral", ".block_sparse_moe.", "targets", [".moe."]),
    ),
    "a renaming has another source": (
        "mixtral",
        with_field("mixtral", ".block_sparse_moe.", "sources", [".block_moe."]),
    ),
    "a renaming of a nested model is missing": ("aria", without("aria_text", r"mlp\.experts\.fc1\.weight")),
    "a converter is missing": ("mixtral", without("mixtral", DOWN)),
    "a converter has another target": (
        "mixtral",
        with_field("mixtral", DOWN, "targets", [".experts.up_proj"]),
    ),
    "the sources of a converter are swapped": (
        "mixtral",
        with_field("mixtral", EXPERTS, "sources", [".experts.*.w3.weight", EXPERTS]),
    ),
    "a source of a converter is missing": ("mixtral", with_field("mixtral", EXPERTS, "sources", [EXPERTS])),
    "stacking has another axis": ("mixtral", with_operation("mixtral", DOWN, 0, dim=1)),
    "concatenation has another axis": ("mixtral", with_operation("mixtral", EXPERTS, 1, dim=2)),
    "concatenation is missing": ("mixtral", without_operation("mixtral", EXPERTS, 1)),
    "stacking is missing": ("mixtral", without_operation("mixtral", EXPERTS, 0)),
    "a transposition has other axes": (
        "ernie4_5_vl_moe",
        with_operation("ernie4_5_vl_moe", "mlp.gate.weight", 0, dim1=0),
    ),
    "the targets of experts are swapped": (
        "ernie4_5_vl_moe",
        with_field(
            "ernie4_5_vl_moe",
            "experts.*.down_proj.weight",
            "targets",
            ["vision_moe.experts.down_proj", "text_moe.experts.down_proj"],
        ),
    ),
    "experts are concatenated along another axis": (
        "ernie4_5_vl_moe",
        with_operation("ernie4_5_vl_moe", "experts.*.gate_proj.weight", 0, concat_dim=2),
    ),
    "experts are stacked along another axis": (
        "ernie4_5_vl_moe",
        with_operation("ernie4_5_vl_moe", "experts.*.gate_proj.weight", 0, stack_dim=1),
    ),
    "interleaving is inverted": (
        "inkling_mm_model",
        with_operation("inkling_mm_model", "shared_w13_weight", 0, inverse=True),
    ),
    "interleaving has another axis": (
        "inkling2_text",
        with_operation("inkling2_text", r"mlp\.experts\.w13_weight", 0, dim=2),
    ),
    "chunks have another axis": (
        "inkling_mm_model",
        with_operation("inkling_mm_model", "shared_w13_weight", 1, dim=0),
    ),
    "the targets of chunks are swapped": (
        "inkling_mm_model",
        with_field("inkling_mm_model", "shared_w13_weight", "targets", ["up_proj", "gate_proj"]),
    ),
    "an offset of layers is missing": (
        "inkling2_text",
        with_field("inkling2_text", r"attn_res\.attn_queries\.(\d+)", "offset", 0),
    ),
    "rope has no permutation": ("step3p7", without_operation("step3p5_vision", r"attn\.in_proj_weight", 1)),
    "rope is inverted": (
        "step3p7",
        with_operation("step3p5_vision", r"attn\.in_proj_weight", 1, inverse=True),
    ),
    "rope permutes another projection": (
        "step3p7",
        with_operation("step3p5_vision", r"attn\.in_proj_weight", 1, permute_layer_names=["v_proj"]),
    ),
    "rope takes the heads of another config": (
        "step3p7",
        with_operation("step3p5_vision", r"attn\.in_proj_weight", 1, subconfig_key=None),
    ),
    "the conversions of a class are missing": (
        "qwen2_vl+tied",
        lambda content: content["conversions"].pop("Qwen2VLForConditionalGeneration"),
    ),
    "the conversions of a model type are missing": (
        "mixtral",
        lambda content: content["conversions"].pop("mixtral"),
    ),
}
BERT, ARIA = "BertForMaskedLM", "AriaForConditionalGeneration"
FACT_DAMAGES: Mapping[str, tuple[str, str, Damage]] = {
    "a tie is missing": ("llama+tied", "llama", with_fact("LlamaForCausalLM", "ties", [])),
    "a tie has another default": (
        "gpt2 without a flag",
        "gpt2",
        lambda content: content["classes"]["GPT2LMHeadModel"]["ties"][0].update(default=False),
    ),
    "a tie has its flag in another config": (
        "gemma3+untied",
        "gemma3",
        lambda content: content["classes"]["Gemma3ForConditionalGeneration"]["ties"][0].update(config="text_config"),
    ),
    "another embedding": ("bert:mlm", "bert", with_fact(BERT, "embedding", "bert.embeddings.position_embeddings")),
    "another head": ("bert:mlm", "bert", with_fact(BERT, "head", "cls.predictions.transform.dense")),
    "no head": ("bert:mlm", "bert", with_fact(BERT, "head", None)),
    "another prefix of the base model": (
        "bert:encoder with a prefix",
        "bert",
        with_fact("BertModel", "prefix", "model"),
    ),
    "ignored tensors are missing": (
        "qwen3_next+mtp",
        "qwen3_next",
        with_fact("Qwen3NextForCausalLM", "ignored", []),
    ),
    "a class is missing": ("bert:cls", "bert", lambda content: content["classes"].pop("BertForSequenceClassification")),
    "a nested model is missing": (
        "aria",
        "aria",
        lambda content: content["classes"][ARIA]["submodels"].remove(text_model(content)),
    ),
    "a nested model has another path": (
        "aria",
        "aria",
        lambda content: text_model(content).__setitem__(0, "model.text_model"),
    ),
    "a nested model has another model type": (
        "step3p7",
        "step3p7",
        lambda content: [
            sub.__setitem__(3, "step3p7")
            for sub in content["classes"]["Step3p7ForConditionalGeneration"]["submodels"]
            if sub[2] == "vision_config"
        ],
    ),
}


@pytest.mark.parametrize("case", CONVERSION_DAMAGES)
def test_a_damaged_conversion_is_a_difference(case: str, loaded: Loaded, damage: DamageData) -> None:
    name, change = CONVERSION_DAMAGES[case]
    assert map_faults(*loaded(name)) == []
    damage(CONVERSIONS, change)
    assert map_faults(*loaded(name)) != []


@pytest.mark.parametrize("case", FACT_DAMAGES)
def test_a_damaged_fact_is_a_difference(case: str, loaded: Loaded, damage: DamageData) -> None:
    name, model_type, change = FACT_DAMAGES[case]
    assert map_faults(*loaded(name)) == []
    damage(f"{model_type}.json", change)
    assert map_faults(*loaded(name)) != []
