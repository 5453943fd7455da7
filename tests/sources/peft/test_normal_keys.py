"""Adapters that were saved from the state dict of a wrapped model are merged like those that PEFT saves."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Final

import pytest
from peft import LoraConfig, PeftConfig, TrainableTokensConfig
from safetensors.numpy import load_file, save_file

from exporter.cli.main import run
from exporter.errors import BadInput, LedgerError
from exporter.sources.peft.adapter import WEIGHTS, Adapter
from exporter.sources.peft.normal_keys import PREFIX, NormalKeys
from fixtures.peft_adapters import IDS
from tests.merge.tuned import LOGITS_MAX_ABS, attached, difference, logits, reloaded
from tests.sources.peft.written import Written, require_merged_as_trained, write

ROWS: Final = TrainableTokensConfig(token_indices=list(IDS))
KINDS: Final[dict[str, Callable[[], PeftConfig]]] = {
    "rows": lambda: TrainableTokensConfig(token_indices=list(IDS)),
    "LoRA": lambda: LoraConfig(
        r=2,
        lora_alpha=6,
        target_modules=["q_proj", "lm_head"],
        trainable_token_indices={"embed_tokens": list(IDS)},
        modules_to_save=["norm", "mlp"],
    ),
    "DoRA and biases": lambda: LoraConfig(
        r=2, use_dora=True, target_modules=["q_proj", "embed_tokens"], modules_to_save=["norm"]
    ),
}
#: What wraps the model → (how it changes a key, the words of the note).
WRAPPERS: Final[dict[str, tuple[Callable[[str], str], str]]] = {
    "torch.compile": (lambda key: f"_orig_mod.{key}", "contain _orig_mod.,"),
    "torch.compile of the base": (lambda key: key.replace(PREFIX, f"{PREFIX}_orig_mod."), "contain _orig_mod.,"),
    "DistributedDataParallel": (lambda key: f"module.{key}", "contain module.,"),
    "both": (lambda key: f"module._orig_mod.{key}", "contain _orig_mod., module.,"),
    "FSDP": (
        lambda key: key.replace("layers.0.", "layers.0._fsdp_wrapped_module.").replace(
            PREFIX, f"_fsdp_wrapped_module.{PREFIX}_fsdp_wrapped_module."
        ),
        "contain _fsdp_wrapped_module.,",
    ),
    "checkpointing": (
        lambda key: key.replace(f"{PREFIX}model.", f"{PREFIX}model._checkpoint_wrapped_module."),
        "contain _checkpoint_wrapped_module.,",
    ),
    "injection": (lambda key: key.removeprefix(PREFIX), "lack PEFT's prefix base_model.model."),
    "compiled injection": (lambda key: f"_orig_mod.{key.removeprefix(PREFIX)}", "lack PEFT's prefix"),
}


def rename(adapter: Path, change: Callable[[str], str]) -> None:
    stored = load_file(adapter / WEIGHTS)
    save_file({change(key): value for key, value in stored.items()}, adapter / WEIGHTS)


def edits_of(adapter: Path) -> list[tuple[str, ...]]:
    return sorted((type(edit).__name__, edit.module) for edit in Adapter.open(adapter).edits)


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("kind", KINDS)
def test_keys_of_a_wrapped_model_are_merged_as_trained(kind: str, wrapper: str, tmp_path: Path) -> None:
    change, note = WRAPPERS[wrapper]
    written = write(tmp_path, KINDS[kind]())
    want = edits_of(written.adapter)
    assert Adapter.open(written.adapter).notes == []
    before = load_file(written.adapter / WEIGHTS)
    rename(written.adapter, change)
    after = load_file(written.adapter / WEIGHTS)
    assert before.keys() != after.keys(), "the wrapper changes keys"
    opened = Adapter.open(written.adapter)
    assert edits_of(written.adapter) == want
    assert set(opened.normal.keys.values()) == before.keys()
    assert set(opened.keys) == after.keys()
    assert any(note in line for line in opened.notes), opened.notes
    require_merged_as_trained(written, tmp_path / "out")


@pytest.mark.parametrize("name", ["default", "my-adapter"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_name_of_the_adapter_is_no_part_of_a_module(kind: str, name: str, tmp_path: Path) -> None:
    written = write(tmp_path, KINDS[kind](), name=name)
    folder = written.adapter if name == "default" else written.adapter / name
    assert Adapter.open(written.adapter).path == folder
    require_merged_as_trained(written, tmp_path / "out")
    want, stored = edits_of(written.adapter), load_file(folder / WEIGHTS)
    named = {named_key(key, name): value for key, value in stored.items()}
    assert named.keys() != stored.keys()
    save_file(named, folder / WEIGHTS)
    opened = Adapter.open(written.adapter)
    assert edits_of(written.adapter) == want
    assert f"contain .{name}," in " ".join(opened.notes)
    require_merged_as_trained(written, tmp_path / "again")


def named_key(key: str, name: str) -> str:
    """The key in the state dict of the model, where ``name`` is the name of the adapter."""
    start, _, last = key.rpartition(".")
    if "lora_" in key or "trainable_" in key:
        return f"{start}.{name}.{last}" if last in ("weight", "bias") else f"{key}.{name}"
    for saved in ("norm", "mlp"):
        head, middle, tail = key.rpartition(f"{saved}.")
        if middle:
            return f"{head}{saved}.modules_to_save.{name}.{tail}"
    return key


def test_the_reference_of_verification_has_the_renamed_adapter(tmp_path: Path) -> None:
    """Stock PEFT ignores names that PEFT did not write, and computes the untuned model."""
    written = write(tmp_path, KINDS["LoRA"]())
    rename(written.adapter, WRAPPERS["FSDP"][0])
    model = attached(reloaded(written.base), [written.adapter])
    assert difference(logits(model), written.logits) <= LOGITS_MAX_ABS


def merge_by_command(written: Written, out: Path, *more: str) -> int:
    return run(["merge", str(written.adapter), "--base", str(written.base), "-o", str(out), *more])


def test_a_note_is_printed_to_stderr(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written = write(tmp_path, ROWS)
    assert merge_by_command(written, tmp_path / "plain") == 0
    assert "note:" not in capsys.readouterr().err
    rename(written.adapter, WRAPPERS["torch.compile"][0])
    assert merge_by_command(written, tmp_path / "out") == 0
    note = f"note: {written.adapter / WEIGHTS}: the names of tensors contain _orig_mod., which is not part of the names"
    assert [line for line in capsys.readouterr().err.splitlines() if line.startswith(note)]
    assert merge_by_command(written, tmp_path / "quiet", "-q") == 0
    assert capsys.readouterr().err == ""
    assert merge_by_command(written, tmp_path / "json", "--json", "-q") == 0
    assert len(json.loads(capsys.readouterr().out)["notes"]) == 1
    for verb in (["plan", str(written.adapter), "--base", str(written.base)], ["inspect", str(written.adapter)]):
        assert run([*verb, "--json"]) == 0
        assert "_orig_mod." in capsys.readouterr().out


def test_a_prefix_that_some_keys_lack_is_not_added() -> None:
    keys = NormalKeys.of(Path("a"), [f"{PREFIX}model.norm.weight", "model.norm.weight"])
    assert (dict(keys.keys), keys.differ) == ({key: key for key in keys.keys}, False)


def test_a_module_called_module_is_kept_where_not_all_keys_begin_with_it() -> None:
    stored = [f"{PREFIX}module.norm.weight", "module.norm.weight"]
    assert not NormalKeys.of(Path("a"), stored).differ


def test_tensors_of_two_adapters_in_a_file_are_refused() -> None:
    stored = [f"{PREFIX}q_proj.lora_A.{name}.weight" for name in ("first", "second")]
    with pytest.raises(BadInput, match="expected the tensors of one adapter, found the adapters first, second"):
        NormalKeys.of(Path("a"), stored)


def test_two_tensors_with_the_same_meaning_are_refused() -> None:
    stored = [f"{PREFIX}q_proj.lora_A.weight", f"{PREFIX}q_proj.lora_A.default.weight"]
    with pytest.raises(LedgerError, match=r"expected one tensor for the key .*q_proj\.lora_A\.weight, found also"):
        NormalKeys.of(Path("a"), stored)


def test_a_part_of_a_saved_module_is_not_taken_for_the_name_of_an_adapter() -> None:
    stored = [f"{PREFIX}score.modules_to_save.dense.weight", f"{PREFIX}score.modules_to_save.default.out.weight"]
    assert list(NormalKeys.of(Path("a"), stored).keys.values()) == [
        f"{PREFIX}score.modules_to_save.dense.weight",
        f"{PREFIX}score.modules_to_save.out.weight",
    ]
