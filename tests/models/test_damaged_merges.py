"""Facts that only merges need count: with a damaged fact, a merge is refused or differs from PEFT's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path

import pytest

from exporter.cli.main import run
from fixtures import zoo
from tests.session.zoo import ZooCheckpoint
from tests.support.damaged_data import Damage, DamageData, with_fact

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
BERT, GPT_OSS = "BertForMaskedLM", "GptOssForCausalLM"
MERGE_DAMAGES: Mapping[str, tuple[str, str, Damage]] = {
    "a transposed module is missing": ("gpt2", "gpt2", with_fact("GPT2LMHeadModel", "transposed", [])),
    "transposed experts are missing": ("gpt_oss", "gpt_oss", with_fact(GPT_OSS, "transposed", [])),
    "a module is transposed that is not": (
        "llama+tied",
        "llama",
        with_fact("LlamaForCausalLM", "transposed", ["model.layers.*.self_attn.q_proj"]),
    ),
    "a table is missing": (
        "bert:mlm",
        "bert",
        lambda content: content["classes"][BERT].update(
            tables=[table for table in content["classes"][BERT]["tables"] if "bias" not in table[0]]
        ),
    ),
    "a table has another axis": (
        "bert:mlm",
        "bert",
        lambda content: content["classes"][BERT].update(
            tables=[[name, axis + ("bias" in name), key] for name, axis, key in content["classes"][BERT]["tables"]]
        ),
    ),
    "a table has another key": (
        "gemma4_text",
        "gemma4_text",
        lambda content: content["classes"]["Gemma4ForCausalLM"].update(
            tables=[
                [name, axis, "vocab_size" if "per_layer" in name else key]
                for name, axis, key in content["classes"]["Gemma4ForCausalLM"]["tables"]
            ]
        ),
    ),
    "a replaced bias is missing": ("bert:mlm+untied", "bert", with_fact(BERT, "bias_copies", [])),
    "a tie is missing": ("llama+tied", "llama", with_fact("LlamaForCausalLM", "ties", [])),
}


@pytest.fixture(scope="module")
def lora(zoo_checkpoint: ZooCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return an adapter of all linear layers, rows and two new tokens of a name of the zoo."""
    return cache(lambda name: zoo.lora_adapter(zoo_checkpoint(name), tmp_path_factory.mktemp("lora")))


def merge_is_exact(base: Path, adapter: Path, out: Path) -> bool:
    if run(["merge", str(adapter), "--base", str(base), "-o", str(out), "-q"]) != 0:
        return False
    return zoo.compare(base, adapter, out).exact


@pytest.mark.parametrize("case", MERGE_DAMAGES)
def test_a_damaged_fact_is_a_merge_unlike_pefts(
    case: str,
    zoo_checkpoint: ZooCheckpoint,
    lora: Callable[[str], Path],
    damage: DamageData,
    tmp_path: Path,
) -> None:
    name, model_type, change = MERGE_DAMAGES[case]
    base = zoo_checkpoint(name)
    assert merge_is_exact(base, lora(name), tmp_path / "sound")
    damage(f"{model_type}.json", change)
    assert not merge_is_exact(base, lora(name), tmp_path / "damaged")
