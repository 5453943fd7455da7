"""Updates are read as stock PEFT applies them: parameter, rank, scaling and number of experts of every wrapper."""

from __future__ import annotations

import ast
import json
import warnings
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from safetensors.numpy import load_file, save_file

from exporter.errors import LedgerError, NotExpressible, TensorMismatch
from exporter.sources.peft.adapter import WEIGHTS, Adapter
from exporter.sources.peft.edits import LowRank
from exporter.sources.peft.folders import CONFIG
from exporter.sources.peft.low_rank import _DEFINED
from exporter.tensors import Array, read
from fixtures.peft_adapters import perturb
from tests.merge.tuned import LOGITS_MAX_ABS, difference, logits, merge, reloaded, require_verified

SHAPE: Final[dict[str, Any]] = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
}
EXPERTS: Final[dict[str, Any]] = {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2}
#: Stacks of experts with square matrices, except that a joined gate and up projection is twice as long as wide.
BASES: Final[dict[str, Any]] = {
    "mixtral": transformers.MixtralConfig(**SHAPE, num_local_experts=4),
    "qwen3_moe": transformers.Qwen3MoeConfig(**SHAPE, **EXPERTS),
    "olmoe": transformers.OlmoeConfig(**SHAPE, num_experts=4, num_experts_per_tok=2),
    "deepseek_v3": transformers.DeepseekV3Config(
        **{key: value for key, value in SHAPE.items() if key not in ("head_dim", "num_key_value_heads")},
        num_key_value_heads=2,
        moe_intermediate_size=8,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
        q_lora_rank=4,
        kv_lora_rank=4,
        qk_rope_head_dim=4,
        qk_nope_head_dim=4,
        v_head_dim=4,
    ),
    "gpt_oss": transformers.GptOssConfig(**SHAPE, num_local_experts=4, num_experts_per_tok=2),
}
TARGETS: Final[dict[str, dict[str, Any]]] = {
    "modules": {},
    "rank-stabilised": {"use_rslora": True},
    "everything": {"target_modules": "all-linear"},
    "pattern": {"rank_pattern": {"down_proj": 3, "q_proj": 5}, "alpha_pattern": {r".*1\.mlp.*down_proj": 7}},
}
#: The modules of each type that PEFT converts to parameters of a stack.
CONVERTED: Final = {
    "mixtral": ["w1", "w2", "w3", "q_proj"],
    "qwen3_moe": ["gate_proj", "up_proj", "down_proj", "gate", "q_proj"],
    "olmoe": ["gate_proj", "up_proj", "down_proj", "q_proj"],
    "deepseek_v3": ["gate_proj", "up_proj", "down_proj", "o_proj"],
}


def tuned(name: str, **settings: Any) -> Any:
    torch.manual_seed(0)
    model: Any = transformers.AutoModelForCausalLM.from_config(BASES[name], dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result: Any = get_peft_model(model, LoraConfig(**{"r": 2, "lora_alpha": 6, **settings}))
    perturb(result, 0)
    return result


def applied(model: Any) -> dict[tuple[str, str], tuple[int, int, float, Array]]:
    """(module, parameter) → (rank, experts, scaling, change of the weight) of every update that PEFT applies."""
    updates: dict[tuple[str, str], tuple[int, int, float, Array]] = {}
    layers: list[tuple[str, Any]] = [
        (path, module) for path, module in model.base_model.model.named_modules() if isinstance(module, LoraLayer)
    ]
    for path, layer in layers:
        by_name = isinstance(layer, ParamWrapper)
        updates[path.replace(".base_layer", ""), layer.parameter_name if by_name else "weight"] = (
            layer.r["default"],
            layer.num_experts if by_name else 1,
            layer.scaling["default"],
            layer.get_delta_weight("default").detach().numpy(),
        )
    return updates


def change(edit: LowRank, shape: tuple[int, ...], *, in_out: bool) -> Array:
    """The change of the weight, by the layout that LowRank documents."""
    down, up = read(edit.down), read(edit.up)
    if len(shape) == 2:
        product = up @ down
    else:
        by_expert = down.reshape(edit.experts, edit.rank, -1), up.reshape(len(up), edit.rank, edit.experts)
        product = np.einsum("eri,ore->eio" if in_out else "eri,ore->eoi", *by_expert)
    result: Array = product * edit.scaling
    return result


def require_read_as_applied(model: Any, folder: Path) -> None:
    model.save_pretrained(folder)
    edits = [edit for edit in Adapter.open(folder).edits if isinstance(edit, LowRank)]
    want = applied(model)
    assert {(edit.module, edit.parameter) for edit in edits} == want.keys()
    in_out = model.config.model_type == "gpt_oss"
    for edit in edits:
        rank, experts, scaling, value = want[edit.module, edit.parameter]
        assert (edit.rank, edit.experts) == (rank, experts)
        assert edit.scaling == pytest.approx(scaling)
        np.testing.assert_allclose(change(edit, value.shape, in_out=in_out), value, atol=1e-6)


@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("base", CONVERTED)
def test_target_modules_that_peft_converts_to_parameters(base: str, targets: str, tmp_path: Path) -> None:
    model = tuned(base, **{"target_modules": CONVERTED[base], **TARGETS[targets]})
    stored = model.peft_config["default"].target_parameters
    assert "gate_up_proj" in stored, "PEFT stores names without a module"
    require_read_as_applied(model, tmp_path)


@pytest.mark.parametrize(
    "parameters",
    [
        ["gate_up_proj", "down_proj"],
        ["experts.down_proj", "experts.gate_up_proj"],
        ["down_proj", "mlp.experts.gate_up_proj"],
        ["model.layers.1.mlp.experts.down_proj"],
        ["model.layers.1.mlp.experts.gate_up_proj", "layers.0.mlp.experts.down_proj"],
    ],
    ids=", ".join,
)
@pytest.mark.parametrize("base", ["mixtral", "gpt_oss"])
def test_target_parameters_by_short_and_by_long_names(base: str, parameters: list[str], tmp_path: Path) -> None:
    patterns = {"rank_pattern": {r".*\.gate_up_proj": 3}, "alpha_pattern": {"experts.down_proj": 5, "q_proj": 1}}
    require_read_as_applied(tuned(base, target_modules=["q_proj"], target_parameters=parameters, **patterns), tmp_path)


def test_routers_and_biases_of_stacks_are_parameters(tmp_path: Path) -> None:
    parameters = ["router.weight", "gate_up_proj_bias", "down_proj_bias", "gate_up_proj", "down_proj"]
    require_read_as_applied(tuned("gpt_oss", target_modules=[], target_parameters=parameters), tmp_path)


def test_the_modules_of_a_pattern_are_not_taken_for_owners_of_parameters(tmp_path: Path) -> None:
    model = tuned("mixtral", target_modules=r".*\.(q_proj|o_proj)", target_parameters=["down_proj"])
    require_read_as_applied(model, tmp_path)


def expect_parameters(folder: Path, parameters: list[str]) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | {"target_parameters": parameters, "rank_pattern": {}}))


def written(folder: Path) -> Path:
    tuned("mixtral", target_modules=[], target_parameters=["gate_up_proj", "down_proj"]).save_pretrained(folder)
    return folder


def test_parameters_in_an_unknown_order_are_refused(tmp_path: Path) -> None:
    folder = written(tmp_path)
    expect_parameters(folder, ["experts.inner", "experts.outer"])
    with pytest.raises(NotExpressible, match="the keys do not show which update belongs to which parameter"):
        Adapter.open(folder)


def test_classes_define_parameters_in_the_known_order() -> None:
    """The order decides which update belongs to which parameter; a new class of transformers may have another order."""
    orders = set()
    for path in (Path(transformers.__file__).parent / "models").glob("*/modeling_*.py"):
        source = path.read_text()
        if "down_proj" in source or "w2" in source:
            classes = [node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)]
            orders |= {tuple(name for name in defined(node) if name in _DEFINED) for node in classes}
    assert {("gate_up_proj", "down_proj"), ("w1", "v1", "w2"), ("up_proj", "down_proj")} <= orders
    assert {order for order in orders if list(order) != sorted(order, key=_DEFINED.index)} == set()


def defined(node: ast.ClassDef) -> list[str]:
    """Names of the parameters that a class assigns, in order."""
    names = [
        part.targets[0].attr
        for part in ast.walk(node)
        if isinstance(part, ast.Assign)
        and isinstance(part.targets[0], ast.Attribute)
        and isinstance(part.value, ast.Call)
        and ast.unparse(part.value.func).endswith("Parameter")
    ]
    return list(dict.fromkeys(names))


def test_more_named_parameters_than_updates_are_refused(tmp_path: Path) -> None:
    folder = written(tmp_path)
    expect_parameters(folder, ["gate_up_proj", "up_proj", "down_proj"])
    with pytest.raises(LedgerError, match="each of the parameters gate_up_proj, up_proj, down_proj, found upd"):
        Adapter.open(folder)


@pytest.mark.parametrize("rank", [3, 16])
def test_a_rank_that_does_not_divide_the_factors_is_refused(rank: int, tmp_path: Path) -> None:
    folder = written(tmp_path)
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | {"r": rank}))
    with pytest.raises(
        TensorMismatch, match=f"expected rank {rank}, as in the config, in both factors for each expert"
    ):
        Adapter.open(folder)


@pytest.mark.parametrize("suffix", ["lora_A.weight", "lora_B.weight"])
def test_a_missing_factor_is_refused(suffix: str, tmp_path: Path) -> None:
    weights = written(tmp_path) / WEIGHTS
    stored = load_file(weights)
    del stored[next(key for key in stored if key.endswith(f".base_layer.{suffix}"))]
    save_file(stored, weights)
    with pytest.raises(LedgerError, match="expected lora_A and lora_B of model"):
        Adapter.open(tmp_path)


@pytest.mark.parametrize("targets", ["modules", "rank-stabilised"])
@pytest.mark.parametrize("base", ["mixtral", "qwen3_moe"])
def test_experts_by_target_modules_are_merged_as_trained(base: str, targets: str, tmp_path: Path) -> None:
    names = [name for name in CONVERTED[base] if name != "gate"]
    model = tuned(base, target_modules=names, **TARGETS[targets]).eval()
    want = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    model.unload().save_pretrained(tmp_path / "base")
    merged = reloaded(merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "out"))
    assert difference(logits(merged), want) <= LOGITS_MAX_ABS
    assert difference(logits(reloaded(tmp_path / "base")), want) > 0.01
    require_verified(tmp_path / "out", tmp_path / "base", [tmp_path / "adapter"])
