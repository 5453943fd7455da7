"""The computation of merged modules, run in this process: the values of PEFT's merge, and inputs that do not fit."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
import torch
from peft import HiraConfig, IA3Config, LNTuningConfig, LoHaConfig, PeftModel, VeraConfig
from safetensors.torch import load_file, save_file

from exporter.cli.main import run
from exporter.errors import OutputError
from exporter.merge.by_peft.process import compute
from exporter.peft_modules.replacements import Replacement, replacements
from exporter.peft_modules.results import serve
from exporter.sources.hf.checkpoint import Checkpoint
from exporter.sources.peft.adapter import Adapter
from exporter.tensors import ByteRange, read
from fixtures.zoo.adapters import write
from fixtures.zoo.build import load
from tests.merge.tuned import Bench
from tests.session.zoo import ZooCheckpoint

pytestmark = pytest.mark.filterwarnings("ignore:Unsupported layer type")  # of PEFT, for layer norms
Capture = pytest.CaptureFixture[str]
JINA: Final = "jina_embeddings_v3:mlm"
WEIGHTS: Final = "adapter_model.safetensors"
MINIMAX: Final = "minimax_m3_vl"
#: Model of the zoo and PEFT's configuration, for each way in which a module applies or stores its weight.
LAYOUTS: Final[dict[str, tuple[str, Any]]] = {
    "linear with a bias": (JINA, LoHaConfig(r=2, target_modules=["o_proj"])),
    "slices of a fused tensor": (JINA, LoHaConfig(r=2, target_modules=["q_proj", "v_proj"])),
    "several stored tensors": (MINIMAX, LoHaConfig(r=2, target_modules=["shared_experts.gate_up_proj"])),
    "Conv1D": ("gpt2", IA3Config(target_modules=["c_attn"], feedforward_modules=[], fan_in_fan_out=True)),
    "vector": ("gpt2", LNTuningConfig(target_modules=["ln_1"])),
    "shared projections": (JINA, VeraConfig(r=2, target_modules=["o_proj"])),
}


def merged_by_peft(base: Path, adapter: Path) -> Any:
    model: Any = PeftModel.from_pretrained(load(base), adapter)
    return model.merge_and_unload()


def merge(base: Path, adapter: Path, out: Path) -> int:
    return run(["merge", str(adapter), "--base", str(base), "--via", "peft", "-o", str(out), "-q"])


@pytest.mark.parametrize("name", LAYOUTS)
def test_each_module_has_the_values_of_pefts_merge(name: str, zoo_checkpoint: ZooCheckpoint, tmp_path: Path) -> None:
    model, config = LAYOUTS[name]
    base = zoo_checkpoint(model)
    adapter = write(load(base), config, tmp_path / "adapter")
    wanted, before = merged_by_peft(base, adapter), load(base)
    names = [path for path, _ in before.named_modules() if path.endswith(tuple(config.target_modules))]
    computed = list(compute(base, adapter))
    assert len(computed) == len(names) > 0
    for path, parameters in zip(sorted(names), computed, strict=True):
        module = wanted.get_submodule(path)
        for parameter, value in parameters.items():
            want = getattr(module, parameter).double()
            assert torch.allclose(value, want, rtol=0, atol=1e-5 * float(want.abs().max())), (path, parameter)
        assert not torch.equal(before.get_submodule(path).weight, module.weight)


def test_a_module_of_several_stored_tensors_is_merged_by_peft(zoo_checkpoint: ZooCheckpoint, tmp_path: Path) -> None:
    base = zoo_checkpoint(MINIMAX)
    adapter = write(load(base), LAYOUTS["several stored tensors"][1], tmp_path / "adapter")
    assert merge(base, adapter, tmp_path / "out") == 0
    wanted, given = merged_by_peft(base, adapter).state_dict(), load(tmp_path / "out").state_dict()
    for name, value in wanted.items():
        assert torch.allclose(given[name], value, rtol=0, atol=1e-5 * float(value.abs().max())), name


def test_the_embedding_has_the_values_of_pefts_merge(bench: Bench, tmp_path: Path) -> None:
    base = bench.base("llama", "untied")
    config = HiraConfig(r=4, target_modules=["embed_tokens"])
    adapter = write(bench.model("llama", "untied"), config, tmp_path / "adapter")
    ((name, computed),) = next(compute(base, adapter)).items()
    wanted = merged_by_peft(base, adapter).get_input_embeddings().weight.double()
    assert name == "weight"
    assert torch.allclose(computed, wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))


def replaced(base: Path, adapter: Path) -> Replacement:
    """Return the edit of an adapter that changes one module."""
    opened = Adapter.open(adapter, via_peft=True)
    edits = replacements(Checkpoint.open(base), opened, process="exporter.merge.by_peft.process", dtype="F64")
    (edit,) = (edit for edit in edits if isinstance(edit, Replacement))
    return edit


@pytest.fixture(scope="module")
def loha(zoo_checkpoint: ZooCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = LoHaConfig(r=2, target_modules=["layers.1.self_attn.o_proj"])
    return write(load(zoo_checkpoint(JINA)), config, tmp_path_factory.mktemp("adapters") / "loha")


def test_the_process_saves_what_is_computed(
    loha: Path, zoo_checkpoint: ZooCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = zoo_checkpoint(JINA)
    monkeypatch.setattr(sys, "argv", ["process", str(base), str(loha), str(tmp_path)])
    serve(compute)
    saved = load_file(tmp_path / "0.safetensors")
    (computed,) = compute(base, loha)
    assert saved.keys() == computed.keys() == {"weight", "bias"}
    assert all(torch.equal(saved[name], computed[name]) for name in saved)
    assert [path.name for path in tmp_path.iterdir()] == ["0.safetensors"]
    tensor = replaced(base, loha).tensor
    np.testing.assert_array_equal(read(tensor), saved["weight"].numpy())
    (place,) = tensor.segments()
    assert isinstance(place, ByteRange)
    assert place.path.read_bytes()[place.offset_bytes :][: place.nbytes] == saved["weight"].numpy().tobytes()


def test_a_full_disk_is_noticed_before_anything_is_computed(
    loha: Path, zoo_checkpoint: ZooCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    usage = shutil.disk_usage(tmp_path)
    folders: list[Path] = []

    def full(folder: Path) -> Any:
        folders.append(Path(folder))
        return usage._replace(free=100)

    monkeypatch.setattr("exporter.peft_modules.results.shutil.disk_usage", full)
    with pytest.raises(OutputError, match=r"the merged modules need \d+ bytes, but only 100 bytes are free"):
        read(replaced(zoo_checkpoint(JINA), loha).tensor)
    assert [folder.name.startswith("ttexport-peft-") for folder in folders] == [True]


def damaged(base: Path, folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    folder.mkdir()
    for file in base.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    tensors = load_file(base / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


QKV: Final = "roberta.encoder.layers.1.mixer.Wqkv.weight"


def test_a_base_that_lacks_the_module_is_refused(
    loha: Path, zoo_checkpoint: ZooCheckpoint, tmp_path: Path, capsys: Capture
) -> None:
    assert merge(zoo_checkpoint("gpt2"), loha, tmp_path / "out") == 4
    assert "expected a module that exists in the base, such as transformer.wte, found " in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_vector_of_integers_is_refused(zoo_checkpoint: ZooCheckpoint, tmp_path: Path, capsys: Capture) -> None:
    adapter = write(load(zoo_checkpoint("gpt2")), LAYOUTS["vector"][1], tmp_path / "adapter")
    name = "transformer.h.0.ln_1.weight"
    base = damaged(
        zoo_checkpoint("gpt2"), tmp_path / "base", lambda tensors: tensors.update({name: tensors[name].int()})
    )
    assert merge(base, adapter, tmp_path / "out") == 4
    assert f"{name}: expected a weight of a floating-point dtype, found I32" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_fused_tensor_that_cannot_be_divided_is_refused(
    zoo_checkpoint: ZooCheckpoint, tmp_path: Path, capsys: Capture
) -> None:
    sound = zoo_checkpoint(JINA)
    adapter = write(load(sound), LoHaConfig(r=2, target_modules=["layers.1.self_attn.q_proj"]), tmp_path / "adapter")
    base = damaged(sound, tmp_path / "base", lambda tensors: tensors.update({QKV: tensors[QKV][:2].clone()}))
    assert merge(base, adapter, tmp_path / "out") == 4
    assert "found roberta.layers.1.self_attn.q_proj (" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_slice_of_a_fused_tensor_is_refused(zoo_checkpoint: ZooCheckpoint, tmp_path: Path, capsys: Capture) -> None:
    base = zoo_checkpoint(JINA)
    adapter = write(load(base), LAYOUTS["slices of a fused tensor"][1], tmp_path / "adapter")
    assert merge(base, adapter, tmp_path / "out") == 5
    assert "the base stores this module together with other modules in one tensor" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_convolution_is_refused(zoo_checkpoint: ZooCheckpoint, tmp_path: Path, capsys: Capture) -> None:
    base = zoo_checkpoint("whisper")
    adapter = write(load(base), LoHaConfig(r=2, target_modules=["conv1"]), tmp_path / "adapter")
    assert merge(base, adapter, tmp_path / "out") == 5
    assert "--via peft merges only vectors and matrices, but model.encoder.conv1 has" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_adapter_tensors_that_the_module_does_not_have_or_lacks_are_named(
    loha: Path, zoo_checkpoint: ZooCheckpoint, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "adapter_config.json").write_bytes((loha / "adapter_config.json").read_bytes())
    tensors = load_file(loha / WEIGHTS)
    key = next(key for key in tensors if key.endswith("hada_w1_a"))
    for content, problem in (
        ({name: tensors[name] for name in tensors if name != key}, "no tensor "),
        ({**tensors, f"{key}_more": tensors[key].clone()}, "an unknown tensor "),
    ):
        save_file(content, broken / WEIGHTS, {"format": "pt"})
        with pytest.raises(ValueError, match=rf"^{problem}.*hada_w1_a"):
            list(compute(zoo_checkpoint(JINA), broken))
