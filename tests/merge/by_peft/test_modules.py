"""One module at a time in memory, a mixture of experts, other formats, half precision, and damaged artifacts."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from exporter.errors import NotEquivalent
from exporter.export.run import plan_export, run_export
from exporter.export.spec import ExportSpec, MergeOptions
from exporter.formats.gguf.options import GgufOptions
from exporter.formats.onnx.options import OnnxOptions
from exporter.peft_modules.layers import unmerged_layers
from exporter.progress import Hooks
from exporter.sources.hf.checkpoint import Checkpoint
from exporter.sources.peft.adapter import Adapter
from exporter.verify.expect.reference import Reference
from exporter.verify.options import VerifyOptions
from exporter.verify.run import verify
from fixtures.models.tie_layouts import VOCAB, tokenizer
from fixtures.peft_adapters import build_adapter, perturb
from fixtures.peft_types import BY_PEFT
from tests.merge.by_peft.test_merge import export, require_equal
from tests.merge.tuned import Bench, attached, logits, reloaded


def storages(layer: Any) -> int:
    return int(layer.get_base_layer().weight.untyped_storage().nbytes())


def deep_llama(path: Path, layers: int) -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=24, num_hidden_layers=layers, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, bos_token_id=1, eos_token_id=1,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(path)
    return model


def test_only_one_module_of_many_is_in_memory(tmp_path: Path) -> None:
    model = deep_llama(tmp_path / "base", 16)
    build_adapter(model, tmp_path / "adapter", "llama", BY_PEFT["oft"])
    seen: list[weakref.ref[Any]] = []
    checkpoint, adapter = Checkpoint.open(tmp_path / "base"), Adapter.open(tmp_path / "adapter", via_peft=True)
    for _, _, layer in unmerged_layers(checkpoint, adapter):
        seen.append(weakref.ref(layer))
        del layer
        assert sum(reference() is not None for reference in seen) <= 2
    assert len(seen) == 32


def test_modules_with_shared_projections_have_their_weights_one_at_a_time(tmp_path: Path) -> None:
    model = deep_llama(tmp_path / "base", 16)
    build_adapter(model, tmp_path / "adapter", "llama", BY_PEFT["vera"])
    seen: list[Any] = []
    checkpoint, adapter = Checkpoint.open(tmp_path / "base"), Adapter.open(tmp_path / "adapter", via_peft=True)
    for _, _, layer in unmerged_layers(checkpoint, adapter):
        seen.append(layer)
        assert storages(layer) > 8
        assert sum(storages(other) > 8 for other in seen) == 1
    assert len(seen) == 32


@pytest.mark.parametrize("name", ["loha", "oft", "vera", "ia3"])
def test_the_attention_of_a_mixture_of_experts(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=4, bos_token_id=1, eos_token_id=1,
    )  # fmt: skip
    model: Any = transformers.MixtralForCausalLM(config).eval()
    perturb(model, 1)
    base = tmp_path / "base"
    model.save_pretrained(base)
    tokenizer().save_pretrained(base)
    recipe = BY_PEFT[name]
    settings = {"target_modules": ["q_proj", "o_proj"], "feedforward_modules": ["o_proj"]}

    def config_of(family: Any) -> Any:
        made = recipe.config(family)
        for key, value in settings.items():
            if hasattr(made, key):
                setattr(made, key, set(value))
        return made

    adapter = build_adapter(model, tmp_path / "adapter", "llama", type(recipe)(config_of))
    export(base, adapter, tmp_path / "out", level="weights")
    unmerged = logits(attached(reloaded(base), [adapter]))
    require_equal(logits(reloaded(tmp_path / "out")), unmerged, logits(model))


@pytest.mark.parametrize("options", [GgufOptions(), OnnxOptions()], ids=["gguf", "onnx"])
def test_other_formats_hold_the_merged_values(options: Any, tiny_tied: Path, tmp_path: Path) -> None:
    adapter = build_adapter(reloaded(tiny_tied), tmp_path / "adapter", "llama", BY_PEFT["loha"])
    merge, level = MergeOptions(via="peft"), VerifyOptions(level="full")
    out = tmp_path / "out"
    spec = ExportSpec(adapters=(adapter,), base=str(tiny_tied), formats=(options,), out=out, merge=merge, verify=level)
    (report,) = run_export(plan_export(spec), Hooks())
    assert all(check.passed for check in report.checks)
    assert report.profile is not None, "the artifact was run"


@pytest.mark.parametrize("name", ["oft", "randlora", "ia3", "pissa"])
def test_each_value_of_a_half_precision_base_is_rounded_once(name: str, bench: Bench, tmp_path: Path) -> None:
    base = bench.base("llama", "untied", dtype="bfloat16")
    adapter = build_adapter(reloaded(base), tmp_path / "adapter", "llama", BY_PEFT[name])
    report = export(base, adapter, tmp_path / "out", level="weights")
    assert {check.name for check in report.checks} >= {"updates", "other tensors"}
    dtypes = {tensor.dtype for tensor in load_file(tmp_path / "out" / "model.safetensors").values()}
    assert dtypes == {torch.bfloat16}


@pytest.mark.parametrize("name", ["hra", "vera", "ln tuning"])
def test_a_wrong_value_in_a_merged_module_is_noticed(name: str, bench: Bench, tmp_path: Path) -> None:
    base = bench.base("llama", "untied")
    adapter = build_adapter(bench.model("llama", "untied"), tmp_path / "adapter", "llama", BY_PEFT[name])
    export(base, adapter, tmp_path / "out", level="rows")
    weights = tmp_path / "out" / "model.safetensors"
    tensors = load_file(weights)
    changed = "input_layernorm" if name == "ln tuning" else "q_proj"
    tensors[f"model.layers.1.self_attn.{changed}.weight".replace("self_attn.input", "input")][5:6] += 1e-3
    save_file(tensors, weights, metadata={"format": "pt"})
    (report,) = verify([tmp_path / "out"], Reference.open(base, [adapter]), level="weights")
    assert [check.name for check in report.checks if not check.passed] == ["updates"]


def test_the_gate_of_an_export_can_close(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The expected values come from another adapter, as if the merge had applied the wrong factors."""
    base, model = bench.base("llama", "tied"), bench.model("llama", "tied")
    adapter = build_adapter(model, tmp_path / "adapter", "llama", BY_PEFT["loha"])
    other = build_adapter(model, tmp_path / "other", "llama", BY_PEFT["loha"], seed=1)
    opened = Reference.open(base, [other])
    monkeypatch.setattr("exporter.export.run.reference_of", lambda merge, untie: opened)
    with pytest.raises(NotEquivalent, match="updates"):
        export(base, adapter, tmp_path / "out", level="rows")
    assert not (tmp_path / "out").exists()
