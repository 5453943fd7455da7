"""Adapters of every recipe, merged into models that store their weights in every way, compute as unmerged PEFT does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from exporter.cli.main import run
from fixtures import zoo
from fixtures.zoo.recipes import RECIPES
from fixtures.zoo.reference import reference

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.xdist_group("recipes")]

#: Pairs of a model and a recipe whose merge keeps the tie of embedding and head.
EXACT = (
    # Stacked, fused and transposed experts
    *(("mixtral", name) for name in ("DoRA", "patterns", "several")),
    *(("gpt_oss", name) for name in ("LoRA, rows, tokens", "biases", "rsLoRA")),
    *(("deepseek_v3+mtp", name) for name in ("DoRA", "saved head")),
    *(("llama4", name) for name in ("DoRA", "saved norms")),
    ("jamba", "DoRA"),
    ("jamba", "patterns"),
    ("qwen3_next", "saved both"),
    ("granitemoehybrid", "rsLoRA"),
    # Changed prefixes and nested ties
    *(("qwen2_vl+tied+head", name) for name in ("rows", "LoRA, rows, tokens")),
    ("qwen3_5", "embedding LoRA"),
    ("smolvlm", "saved embedding"),
    ("mistral3", "DoRA"),
    # Convolutions
    *(("glm4v_moe", name) for name in ("LoRA, rows, tokens", "rsLoRA")),
    # Tables with a row for each token
    *(("gemma3n_text", name) for name in ("padded tokens", "DoRA")),
    *(("gemma4_text", name) for name in ("padded tokens", "LoRA, rows, tokens")),
    # Encoders and encoder-decoders
    *(("bert:mlm+head", name) for name in ("rows", "padded tokens", "biases")),
    ("bert:cls", "LoRA, rows, tokens"),
    ("modernbert:mlm", "resized"),
    *(("whisper+untied", name) for name in ("saved embedding", "head LoRA")),
    *(("t5", name) for name in ("saved embedding", "embedding LoRA", "padded tokens")),
    ("bart", "embedding LoRA"),
    # Heads with a bias, and heads of other names
    *((name, "saved both, tokens") for name in ("phi", "gpt_neox", "bert:mlm+untied")),
    ("gptj", "resized"),
    ("mllama", "head LoRA"),
    ("gpt2", "DoRA"),
)
#: Pairs whose merge needs a separate head.
UNTIED = (
    *(("bert:mlm", name) for name in ("saved both, tokens", "embedding LoRA")),
    ("bart", "head LoRA"),
    *((name, "saved both, tokens") for name in ("t5", "bart")),
    ("whisper", "saved embedding"),
    ("gemma3n_text", "saved head"),
    ("qwen2_vl+tied", "embedding LoRA"),
)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    bases: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in bases:
            bases[name] = zoo.build(name, tmp_path_factory.mktemp("bases") / "base")
        return bases[name]

    return get


def difference(name: str, recipe_name: str, built: Callable[[str], Path], folder: Path, *words: str) -> zoo.Comparison:
    base, recipe = built(name), RECIPES[recipe_name]
    recipe.write(base, folder / "adapter")
    adapters = recipe.adapters(folder / "adapter")
    expected = reference(base, *adapters, vocab=recipe.vocab)
    arguments = ["merge", *map(str, adapters), "--base", str(base), "-o", str(folder / "merged"), "-q", *words]
    assert run(arguments) == 0
    return zoo.compare(base, adapters[0], folder / "merged", expected=expected, untied=bool(words))


@pytest.mark.parametrize(("name", "recipe"), EXACT, ids=str)
def test_the_merged_model_computes_as_the_unmerged_adapter(
    name: str, recipe: str, built: Callable[[str], Path], tmp_path: Path
) -> None:
    assert difference(name, recipe, built, tmp_path).faults == ()


@pytest.mark.parametrize(("name", "recipe"), UNTIED, ids=str)
def test_a_separate_head_computes_as_the_unmerged_adapter(
    name: str, recipe: str, built: Callable[[str], Path], tmp_path: Path
) -> None:
    assert difference(name, recipe, built, tmp_path, "--untie").faults == ()
