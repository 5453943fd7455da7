"""Adapters that only PEFT can merge, without the option or beside other adapters, and types that nobody can merge."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from exporter.cli.main import run
from exporter.errors import BadInput, MissingDependency, NotExpressible
from exporter.export.run import plan_export
from exporter.export.spec import ExportSpec, MergeOptions
from exporter.packages import Requirement
from exporter.sources.peft.adapter import Adapter
from exporter.sources.peft.types.table import MERGED
from fixtures.peft_adapters import RECIPES, build_adapter
from fixtures.peft_types import BY_PEFT
from tests.merge.tuned import Bench

Capture = pytest.CaptureFixture[str]
CANNOT = {
    "PROMPT_TUNING": "before the input",
    "MULTITASK_PROMPT_TUNING": "before the input",
    "P_TUNING": "before the input",
    "CPT": "before the input",
    "PREFIX_TUNING": "keys and values",
    "ADAPTION_PROMPT": "keys and values",
    "CARTRIDGE": "keys and values",
    "XLORA": "depend on the input",
    "POLY": "depend on the task",
    "BEFT": "does not know",
}


@pytest.fixture(scope="module")
def loha(bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_adapter(bench.model("llama", "tied"), tmp_path_factory.mktemp("a") / "loha", "llama", BY_PEFT["loha"])


def edited(adapter: Path, **settings: object) -> Path:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    return adapter


def copied(adapter: Path, place: Path) -> Path:
    place.mkdir()
    for file in adapter.iterdir():
        (place / file.name).write_bytes(file.read_bytes())
    return place


@pytest.mark.parametrize("verb", ["merge", "plan"])
def test_without_the_option_the_line_names_the_option(
    verb: str, loha: Path, bench: Bench, tmp_path: Path, capsys: Capture
) -> None:
    base, out = bench.base("llama", "tied"), tmp_path / "out"
    assert run([verb, str(loha), "--base", str(base), "-o", str(out), "-q"]) == 5
    assert "--via peft" in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize("peft_type", sorted(MERGED))
def test_every_type_that_peft_merges_names_the_option(peft_type: str, loha: Path, tmp_path: Path) -> None:
    adapter = edited(copied(loha, tmp_path / "copy"), peft_type=peft_type)
    with pytest.raises(NotExpressible, match=f"peft_type {peft_type}: .*--via peft"):
        Adapter.open(adapter)


@pytest.mark.parametrize("method", ["pissa", "olora", "pissa_niter_4", "corda", "loftq"])
def test_an_initialisation_that_changes_the_base_is_merged_only_if_it_is_repeatable(
    method: str, bench: Bench, tmp_path: Path
) -> None:
    model = bench.model("llama", "tied")
    adapter = edited(build_adapter(model, tmp_path / "a", "llama", RECIPES["lora"]), init_lora_weights=method)
    repeatable = method in ("pissa", "olora")
    with pytest.raises(NotExpressible) as caught:
        Adapter.open(adapter)
    assert ("--via peft" in str(caught.value)) == repeatable
    if not repeatable:
        with pytest.raises(NotExpressible, match=f"init_lora_weights {method}"):
            Adapter.open(adapter, via_peft=True)


@pytest.mark.parametrize("via_peft", [True, False])
@pytest.mark.parametrize("peft_type", CANNOT)
def test_a_type_that_cannot_be_merged_names_the_cause(
    peft_type: str, via_peft: bool, loha: Path, tmp_path: Path
) -> None:
    adapter = edited(copied(loha, tmp_path / "copy"), peft_type=peft_type)
    with pytest.raises(NotExpressible, match=f"peft_type {peft_type}: .*{CANNOT[peft_type]}") as caught:
        Adapter.open(adapter, via_peft=via_peft)
    assert "--via peft" not in str(caught.value)


def test_a_second_adapter_of_a_merged_module_is_refused(loha: Path, bench: Bench, tmp_path: Path) -> None:
    lora = build_adapter(bench.model("llama", "tied"), tmp_path / "lora", "llama", RECIPES["lora"])
    base = str(bench.base("llama", "tied"))
    for adapters in ((loha, lora), (lora, loha)):
        spec = ExportSpec(adapters=adapters, base=base, out=tmp_path / "out", merge=MergeOptions(via="peft"))
        with pytest.raises(BadInput, match="one after the other"):
            plan_export(spec)


@pytest.mark.parametrize("change", ["missing", "unknown", "shape"])
def test_tensors_that_peft_does_not_fit_into_the_base_are_refused(
    change: str, loha: Path, bench: Bench, tmp_path: Path, capsys: Capture
) -> None:
    adapter = copied(loha, tmp_path / "copy")
    tensors = load_file(adapter / "adapter_model.safetensors")
    key = next(name for name in tensors if name.endswith("hada_w1_a"))
    value = tensors.pop(key)
    if change == "unknown":
        tensors |= {key: value, f"{key}_more": value.clone()}
    if change == "shape":
        tensors[key] = value[1:].contiguous()
    save_file(tensors, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    base, out = bench.base("llama", "tied"), tmp_path / "out"
    assert run(["merge", str(adapter), "--base", str(base), "--via", "peft", "-o", str(out), "-q"]) == 4
    assert "hada_w1_a" in capsys.readouterr().err
    assert not out.exists()


def test_without_peft_the_line_names_the_packages(
    loha: Path, bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Requirement, "is_installed", lambda self: "peft" not in self.modules)
    base = str(bench.base("llama", "tied"))
    spec = ExportSpec(adapters=(loha,), base=base, out=tmp_path / "out", merge=MergeOptions(via="peft"))
    with pytest.raises(MissingDependency, match="--via peft needs peft, torch and transformers; run pip install"):
        plan_export(spec)
