"""Edits that few adapters contain: rows of other tables, two names of one tensor, values outside a range, no head."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import pytest
import torch
from peft import LoraConfig, PeftModel, TrainableTokensConfig
from safetensors.torch import load_file, save_file
from torch import nn

from fixtures import zoo
from fixtures.zoo.adapters import NEW_IDS, write
from fixtures.zoo.build import load
from fixtures.zoo.shrink import VOCAB
from tests.merge.test_fused import lora, merge, require_as_peft_merges
from tests.session.zoo import ZooCheckpoint
from tests.sources.folders import EMBED, adapter, checkpoint, matrix

Capture = pytest.CaptureFixture[str]
WEIGHTS: Final = "adapter_model.safetensors"


def changed(folder: Path, **factors: float) -> None:
    """Multiply the first tensor of an adapter whose name contains ``name`` by a factor. factors: name → factor."""
    tensors = load_file(folder / WEIGHTS)
    for name, factor in factors.items():
        key = next(key for key in tensors if name in key)
        tensors[key] = tensors[key] * factor
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})


def require_refusal(code: int, reason: str, *arguments: Path, capsys: Capture, options: tuple[str, ...] = ()) -> None:
    base, out, *adapters = arguments
    assert merge(base, out, *adapters, options=options) == code
    assert reason in capsys.readouterr().err
    assert not out.exists()


def test_rows_of_the_positions_are_merged_as_peft_merges(
    zoo_checkpoint: ZooCheckpoint, tmp_path: Path, capsys: Capture
) -> None:
    base = zoo_checkpoint("gpt2")
    model = load(base)
    count = model.config.n_positions
    rows = write(model, TrainableTokensConfig(token_indices=[3, count - 1], target_modules=["wpe"]), tmp_path / "rows")
    assert merge(base, tmp_path / "out", rows) == 0
    require_as_peft_merges(base, rows, tmp_path / "out")
    shorter = tmp_path / "shorter"
    model = load(base)
    model.transformer.wpe = nn.Embedding(count - 1, model.config.n_embd)
    model.config.n_positions = count - 1
    model.save_pretrained(shorter)
    reason = f"expected token ids below {count - 1}, the number of rows of transformer.wpe.weight, found {count - 1}"
    require_refusal(4, reason, shorter, tmp_path / "other", rows, capsys=capsys)


def test_the_bias_of_bart_s_logits_grows_by_zeros(zoo_checkpoint: ZooCheckpoint, tmp_path: Path) -> None:
    base = zoo_checkpoint("bart")
    tuned = zoo.lora_adapter(base, tmp_path / "adapter")
    assert merge(base, tmp_path / "out", tuned, options=("--verify", "weights")) == 0
    before, after = (
        load_file(folder / "model.safetensors")["final_logits_bias"] for folder in (base, tmp_path / "out")
    )
    assert torch.equal(after[:, :VOCAB], before)
    assert after[:, VOCAB:].tolist() == [[0.0] * len(NEW_IDS)]


def test_an_update_of_the_embedding_of_the_encoder_alone_is_refused(
    zoo_checkpoint: ZooCheckpoint, tmp_path: Path, capsys: Capture
) -> None:
    base = zoo_checkpoint("t5")
    tuned = lora(base, tmp_path / "adapter", target_modules=["encoder.embed_tokens"])
    require_refusal(5, "PEFT trained only encoder.embed_tokens", base, tmp_path / "out", tuned, capsys=capsys)


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        ({"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}, "embed_tokens.weight"),
        ({"target_modules": ["embed_tokens"]}, "lora_embedding_B"),
    ],
    ids=["saved", "update"],
)
def test_two_names_of_one_tensor_must_have_the_same_values(
    settings: dict[str, Any], part: str, zoo_checkpoint: ZooCheckpoint, tmp_path: Path, capsys: Capture
) -> None:
    base = zoo_checkpoint("llava")
    tuned = lora(base, tmp_path / "adapter", **settings)
    tensors = load_file(tuned / WEIGHTS)
    twice = {key.replace("model.language_model.", "language_model.model."): tensors[key] for key in tensors}
    both = {**tensors, **{key: value.clone() for key, value in twice.items() if "embed_tokens" in key}}
    save_file(both, tuned / WEIGHTS, {"format": "pt"})
    if part == "embed_tokens.weight":
        assert merge(base, tmp_path / "same", tuned) == 0
        table = next(name for name in load_file(base / "model.safetensors") if name.endswith("embed_tokens.weight"))
        saved = next(value for key, value in tensors.items() if key.endswith(part))
        assert torch.equal(load_file(tmp_path / "same" / "model.safetensors")[table], saved)
    changed(tuned, **{part: 2.0})
    require_refusal(5, "the values differ from", base, tmp_path / "out", tuned, capsys=capsys)


def test_sums_and_values_outside_the_range_are_refused(
    zoo_checkpoint: ZooCheckpoint, tmp_path: Path, capsys: Capture
) -> None:
    base, half = zoo_checkpoint("llama"), tmp_path / "half"
    load(base).half().save_pretrained(half)
    name = "model.layers.0.self_attn.q_proj.weight: rows 0 to 63"
    large = lora(base, tmp_path / "large", target_modules=["q_proj"])
    changed(large, lora_B=1e7)
    require_refusal(4, f"{name}: expected values up to 65504", half, tmp_path / "out", large, capsys=capsys)
    endless = lora(base, tmp_path / "endless", target_modules=["q_proj"])
    changed(endless, lora_A=1e30, lora_B=1e30)
    with pytest.warns(RuntimeWarning, match="overflow"):
        require_refusal(4, f"{name}: expected a finite sum", base, tmp_path / "out", endless, capsys=capsys)
    no_number = lora(base, tmp_path / "no number", target_modules=["q_proj"], modules_to_save=["input_layernorm"])
    changed(no_number, input_layernorm=float("nan"))
    reason = "input_layernorm.weight: rows 0 to 63: expected finite values, found NaN or Inf"
    require_refusal(4, reason, base, tmp_path / "out", no_number, capsys=capsys)


def test_a_model_without_a_head_has_nothing_to_untie(
    zoo_checkpoint: ZooCheckpoint, tmp_path: Path, capsys: Capture
) -> None:
    base = zoo_checkpoint("bert:encoder")
    tuned = lora(base, tmp_path / "adapter", target_modules=["query"])
    reason = "--untie: the model has no output head; merge without --untie"
    require_refusal(5, reason, base, tmp_path / "out", tuned, capsys=capsys, options=("--untie",))


def test_the_untied_head_of_an_unknown_model_gets_the_usual_name(tmp_path: Path) -> None:
    base = checkpoint(tmp_path / "base", {EMBED: matrix()}, vocab_size=6, tie_word_embeddings=True)
    modules = {"model.embed_tokens": matrix(1, start=900), "lm_head": matrix(1, start=800)}
    rows = adapter(tmp_path / "rows", [2], modules)
    assert merge(base, tmp_path / "out", rows, options=("--untie",)) == 0
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert written.keys() == {EMBED, "lm_head.weight"}
    assert written[EMBED][2].tolist() == matrix(1, start=900)[0].tolist()
    assert written["lm_head.weight"][2].tolist() == matrix(1, start=800)[0].tolist()


def test_a_resized_vocabulary_has_one_matrix_for_a_tied_head(
    zoo_checkpoint: ZooCheckpoint, tmp_path: Path, capsys: Capture
) -> None:
    base = zoo_checkpoint("llama+tied")
    model = load(base)
    model.resize_token_embeddings(VOCAB, mean_resizing=False)
    tuned = write(model, LoraConfig(r=2, target_modules=["q_proj"]), tmp_path / "adapter")
    matrix_of = load(base).get_input_embeddings().weight.detach() * 2
    names = [f"base_model.model.{name}.weight" for name in ("model.embed_tokens", "lm_head")]
    for factor in (1.0, 3.0):
        tensors = {**load_file(tuned / WEIGHTS), names[0]: matrix_of.clone(), names[1]: matrix_of * factor}
        save_file(tensors, tuned / WEIGHTS, {"format": "pt"})
        if factor == 1:
            assert merge(base, tmp_path / "same", tuned) == 0
            given = load(tmp_path / "same").get_output_embeddings().weight
            assert torch.equal(given, matrix_of)
    reason = "expected the values of the tied tensor base_model.model.model.embed_tokens.weight, found different values"
    require_refusal(4, reason, base, tmp_path / "out", tuned, capsys=capsys)


class Experts(nn.Module):
    """A stack of matrices that are applied to a vector one after the other."""

    def __init__(self, rows: int, columns: int) -> None:
        """``rows``, ``columns``: the shape of each matrix."""
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, rows, columns))

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        return value @ self.up.sum(0)


@pytest.mark.parametrize("columns", [4, 5])
def test_only_the_shape_of_a_stack_shows_the_orientation_in_an_unknown_model(
    columns: int, tmp_path: Path, capsys: Capture
) -> None:
    torch.manual_seed(0)
    model: Any = nn.Sequential(Experts(4, columns))
    stack = model[0].up.detach().clone()
    tensors = {EMBED: matrix(), "0.up": stack.numpy()}
    base = checkpoint(tmp_path / "base", tensors, vocab_size=6, tie_word_embeddings=True)
    tuned = write(model, LoraConfig(r=2, target_modules=[], target_parameters=["0.up"]), tmp_path / "adapter")
    if columns == 4:
        reason = "0.up is a stack of square matrices, so the shapes do not show which axis is the input"
        require_refusal(5, reason, base, tmp_path / "out", tuned, capsys=capsys)
        return
    assert merge(base, tmp_path / "out", tuned) == 0
    given = load_file(tmp_path / "out" / "model.safetensors")["0.up"]
    fresh: Any = nn.Sequential(Experts(4, columns))
    fresh[0].up.data = stack.clone()
    wanted = PeftModel.from_pretrained(fresh, tuned).merge_and_unload()[0].up
    assert torch.allclose(given, wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))
    assert not torch.allclose(given, stack, atol=1e-2)


def test_factors_of_a_base_of_another_shape_are_refused(
    zoo_checkpoint: ZooCheckpoint, tmp_path: Path, capsys: Capture
) -> None:
    base = zoo_checkpoint("gpt2")
    tuned = lora(base, tmp_path / "adapter", target_modules=["c_attn"], fan_in_fan_out=True, use_dora=True)
    tensors = load_file(tuned / WEIGHTS)
    renamed = {key.replace(".attn.c_attn.", ".ln_1."): value for key, value in tensors.items() if "magn" not in key}
    vector = tmp_path / "vector"
    vector.mkdir()
    (vector / "adapter_config.json").write_bytes((tuned / "adapter_config.json").read_bytes())
    save_file(renamed, vector / WEIGHTS, {"format": "pt"})
    reason = "expected LoRA factors that fit transformer.h.0.ln_1.weight of shape (64,)"
    require_refusal(4, reason, base, tmp_path / "out", vector, capsys=capsys)
    key = next(key for key in tensors if "magnitude" in key)
    save_file({**tensors, key: tensors[key][:64].clone()}, tuned / WEIGHTS, {"format": "pt"})
    require_refusal(4, f"{key}: expected 192 magnitudes, found 64", base, tmp_path / "out", tuned, capsys=capsys)
