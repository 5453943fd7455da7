from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from exporter.errors import BadInput, NotExpressible, TensorMismatch
from exporter.merge.model import MergedModel
from exporter.merge.plan import MergePlan, plan_merge
from exporter.sources.hf.checkpoint import Checkpoint
from exporter.sources.peft.adapter import Adapter
from exporter.tensors import Array, read
from fixtures import adapters as stock
from tests.sources.folders import EMBED, HEAD, NORM, adapter, checkpoint, matrix
from tests.support.trained import NEW_TOKENS, TRAINED_IDS

E, H = "model.embed_tokens", "lm_head"


def planned(base: Path, *adapters: Path) -> MergePlan:
    return plan_merge(Checkpoint.open(base), [Adapter.open(path) for path in adapters])


def merged(base: Path, *adapters: Path, dtype: str | None = None) -> MergedModel:
    return planned(base, *adapters).model(dtype)


def value(model: MergedModel, name: str) -> Array:
    return read(model.tensor(name))


def base_of(folder: Path, tensors: Mapping[str, Array] | None = None, tied: bool = True, **config: object) -> Path:
    stored = tensors or ({EMBED: matrix()} if tied else {EMBED: matrix(), HEAD: matrix(start=500)})
    return checkpoint(folder, stored, vocab_size=6, tie_word_embeddings=tied, **config)


def tokenizer(folder: Path, ids: Sequence[int]) -> None:
    vocab = {f"t{token_id}": token_id for token_id in ids}
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocab}, "added_tokens": []}))


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def rule_of(plan: MergePlan) -> dict[str, tuple[str, ...]]:
    return {entry.key.split(".")[-2]: entry.into for entry in plan.ledger_entries}


def test_tied_rows_are_applied_to_their_one_tensor_once(tiny_adapter: Path, tiny_tied: Path) -> None:
    assert rule_of(planned(tiny_tied, tiny_adapter)) == {"embed_tokens": (EMBED,), "lm_head": ()}


@pytest.mark.parametrize("modules", [(E,), (H,), (E, H)])
def test_rows_stored_once_or_twice_merge_to_the_same_on_a_tied_base(modules: tuple[str, ...], tmp_path: Path) -> None:
    rows = matrix(2, start=900)
    model = merged(base_of(tmp_path / "b"), adapter(tmp_path / "a", [4, 1], dict.fromkeys(modules, rows)))
    want = matrix()
    want[[4, 1]] = rows
    np.testing.assert_array_equal(value(model, EMBED), want)
    assert HEAD not in model.specs


def test_a_stored_copy_of_a_tied_head_gets_the_rows_too(tmp_path: Path) -> None:
    base = base_of(tmp_path / "b", {EMBED: matrix(), HEAD: matrix()})
    model = merged(base, adapter(tmp_path / "a", [4], dict.fromkeys((E, H), matrix(1, start=900))))
    np.testing.assert_array_equal(value(model, EMBED), value(model, HEAD))
    np.testing.assert_array_equal(value(model, HEAD)[4], matrix(1, start=900)[0])
    assert model.tie.tied


def test_untied_matrices_get_only_their_own_rows(tmp_path: Path) -> None:
    base = base_of(tmp_path / "b", tied=False)
    alone = merged(base, adapter(tmp_path / "a", [2], {E: matrix(1, start=900)}))
    np.testing.assert_array_equal(value(alone, HEAD), matrix(start=500))
    np.testing.assert_array_equal(value(alone, EMBED)[2], matrix(1, start=900)[0])
    both = merged(base, adapter(tmp_path / "both", [2], {E: matrix(1, start=900), H: matrix(1, start=700)}))
    np.testing.assert_array_equal(value(both, EMBED)[2], matrix(1, start=900)[0])
    np.testing.assert_array_equal(value(both, HEAD)[2], matrix(1, start=700)[0])


def test_a_tied_base_with_other_rows_for_its_head_is_not_expressible(tmp_path: Path) -> None:
    differing = adapter(tmp_path / "a", [2], {E: matrix(1, start=900), H: matrix(1, start=901)})
    with pytest.raises(
        NotExpressible, match=r"ties embedding and head, but .* embedding and head in different ways; use --untie"
    ):
        planned(base_of(tmp_path / "b"), differing)
    assert planned(base_of(tmp_path / "untied", tied=False), differing)


def test_rows_of_a_module_that_the_base_lacks_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TensorMismatch, match=r"expected a module that exists in the base, .* found model\.wte"):
        planned(base_of(tmp_path / "b"), adapter(tmp_path / "a", [2], {"model.wte": matrix(1)}))


@pytest.mark.parametrize("target", [NORM, "steps.weight"])
def test_only_floating_point_matrices_take_rows(target: str, tmp_path: Path) -> None:
    tensors = {EMBED: matrix(), NORM: matrix(1).reshape(-1), "steps.weight": matrix(dtype=np.int32)}
    rows = adapter(tmp_path / "a", [1], {target.removesuffix(".weight"): matrix(1)})
    with pytest.raises(TensorMismatch, match=f"{target}: expected a floating-point matrix"):
        planned(base_of(tmp_path / "b", tensors), rows)


def test_two_adapters_with_disjoint_rows_are_both_applied_in_either_order(tmp_path: Path) -> None:
    base = base_of(tmp_path / "b")
    first = adapter(tmp_path / "first", [5, 0], {E: matrix(2, start=700)})
    second = adapter(tmp_path / "second", [3], {E: matrix(1, start=900), H: matrix(1, start=900)})
    want = matrix()
    want[[5, 0]], want[3] = matrix(2, start=700), matrix(1, start=900)
    for order in ((first, second), (second, first)):
        np.testing.assert_array_equal(value(merged(base, *order), EMBED), want)


@pytest.mark.parametrize("module", [E, H])
def test_adapters_that_set_the_same_row_are_refused(module: str, tmp_path: Path) -> None:
    first = adapter(tmp_path / "first", [5, 0], {E: matrix(2, start=700)})
    second = adapter(tmp_path / "second", [3, 5], {module: matrix(2, start=900)})
    with pytest.raises(BadInput, match=r"second/.*found that .*first/.* also sets the row of token 5"):
        planned(base_of(tmp_path / "b"), first, second)
    with pytest.raises(BadInput, match="also sets the row of token 0"):
        planned(base_of(tmp_path / "c"), first, first)


def test_new_tokens_grow_matrix_and_config(tiny_new_tokens_adapter: Path, tiny_tied: Path) -> None:
    plan = planned(tiny_tied, tiny_new_tokens_adapter)
    model = plan.model()
    assert plan.vocab == 512 + len(NEW_TOKENS)
    assert model.specs[EMBED].shape == (plan.vocab, 64)
    assert model.config["vocab_size"] == plan.vocab
    assert model.files["tokenizer.json"].parent == tiny_new_tokens_adapter
    assert Checkpoint.open(tiny_tied).config["vocab_size"] == 512, "the base's config is unchanged"


def test_padding_rows_are_used_before_the_matrix_grows(tiny_padded_adapter: Path, tiny_padded: Path) -> None:
    plan = planned(tiny_padded, tiny_padded_adapter)
    assert plan.vocab == Checkpoint.open(tiny_padded).tensors[EMBED].spec.n_rows == 520
    stored = load_file(tiny_padded_adapter / "adapter_model.safetensors")
    rows = next(rows for key, rows in stored.items() if "embed_tokens" in key)
    got = value(plan.model(), EMBED)[512:515]
    np.testing.assert_array_equal(got, rows.astype(ml_dtypes.bfloat16))


def test_a_nested_config_grows_with_its_text_model(tmp_path: Path) -> None:
    base = base_of(tmp_path / "b", text_config={"vocab_size": 6})
    rows = adapter(tmp_path / "a", [6], {E: matrix(1)})
    tokenizer(rows, range(7))
    plan = planned(base, rows)
    config = plan.model().config
    assert (config["vocab_size"], config["text_config"]["vocab_size"]) == (7, 7)
    assert plan.checkpoint.text_config["vocab_size"] == 6, "the base's config is unchanged"


def test_growing_needs_a_tokenizer_with_the_new_tokens(tmp_path: Path) -> None:
    base = base_of(tmp_path / "b")
    rows = adapter(tmp_path / "a", [6], {E: matrix(1)})
    with pytest.raises(
        TensorMismatch,
        match=r"below 6, .*found 6 \(the folder of an adapter with new tokens must contain the tokenizer",
    ):
        planned(base, rows)
    tokenizer(rows, range(6))
    with pytest.raises(TensorMismatch, match=r"below 6, .*found 6"):
        planned(base, rows)
    tokenizer(rows, range(7))
    assert planned(base, rows).vocab == 7


@pytest.mark.parametrize("token_id", [8, 2**62])
def test_growing_needs_every_new_row(token_id: int, tmp_path: Path) -> None:
    rows = adapter(tmp_path / "a", [6, token_id], {E: matrix(2)})
    tokenizer(rows, [*range(7), token_id])
    with pytest.raises(BadInput, match=r"expected the adapters to set the new rows .*found no row for token 7"):
        planned(base_of(tmp_path / "b"), rows)


def test_two_adapters_may_share_the_new_rows(tmp_path: Path) -> None:
    first, second = (adapter(tmp_path / str(n), [n], {E: matrix(1, start=n)}) for n in (6, 7))
    for folder in (first, second):
        tokenizer(folder, range(8))
    got = value(merged(base_of(tmp_path / "b"), first, second), EMBED)
    np.testing.assert_array_equal(got, np.concatenate([matrix(), matrix(1, start=6), matrix(1, start=7)]))


def test_growing_an_untied_base_needs_rows_for_its_head(tmp_path: Path) -> None:
    base = base_of(tmp_path / "b", tied=False)
    half = adapter(tmp_path / "half", [6], {E: matrix(1)})
    full = adapter(tmp_path / "full", [6], {E: matrix(1), H: matrix(1, start=50)})
    for folder in (half, full):
        tokenizer(folder, range(7))
    with pytest.raises(BadInput, match=f"{HEAD}: expected the adapters to set the new rows"):
        planned(base, half)
    model = merged(base, full)
    assert model.specs[EMBED].shape == model.specs[HEAD].shape == (7, 4)
    np.testing.assert_array_equal(value(model, HEAD)[6], matrix(1, start=50)[0])


def test_a_tokenizer_with_more_tokens_than_rows_is_refused(tmp_path: Path) -> None:
    rows = adapter(tmp_path / "a", [6], {E: matrix(1)})
    tokenizer(rows, range(9))
    with pytest.raises(
        BadInput, match=r"tokenizer\.json: expected token ids below 7, .*found 7 for the token 't7' and 1 more"
    ):
        planned(base_of(tmp_path / "b"), rows)


ODD_ROWS = np.array([[1 + 2**-8, 1 + 3 * 2**-8, -(1 + 2**-8 + 2**-20), 2**-135]], np.float32)


@pytest.mark.parametrize("stored", [ml_dtypes.bfloat16, np.float16, np.float32])
def test_rows_are_rounded_once_to_the_stored_dtype(stored: type, tmp_path: Path) -> None:
    base = base_of(tmp_path / "b", {EMBED: matrix(dtype=stored)})
    got = value(merged(base, adapter(tmp_path / "a", [3], {E: ODD_ROWS})), EMBED)
    np.testing.assert_array_equal(got[3], ODD_ROWS[0].astype(stored))
    np.testing.assert_array_equal(np.delete(got, 3, 0), np.delete(matrix(dtype=stored), 3, 0))


def test_rows_are_not_rounded_to_a_wider_dtype(tmp_path: Path) -> None:
    base = checkpoint(tmp_path / "b", {EMBED: matrix(dtype=ml_dtypes.bfloat16)}, dtype="bfloat16")
    model = merged(base, adapter(tmp_path / "a", [3], {E: ODD_ROWS}), dtype="F32")
    np.testing.assert_array_equal(value(model, EMBED)[3], ODD_ROWS[0])
    assert model.config["dtype"] == "float32"


def test_a_row_that_the_stored_dtype_cannot_hold_is_refused(tmp_path: Path) -> None:
    base = base_of(tmp_path / "b", {EMBED: matrix(dtype=np.float16)})
    rows = adapter(tmp_path / "a", [4, 2], {E: np.array([[0, 0, 0, 0], [0, 65520, 0, 0]], np.float32)})
    with pytest.raises(
        TensorMismatch, match=r"expected values in the range of F16, found a value outside the range .*token 2"
    ):
        merged(base, rows)
    assert merged(base_of(tmp_path / "wide"), rows)


def test_a_base_that_float16_cannot_hold_is_refused_by_file_and_tensor(tmp_path: Path) -> None:
    base = base_of(tmp_path / "b", {EMBED: matrix(start=65500)})
    with pytest.raises(BadInput, match=r"model\.safetensors: model\.embed_tokens\.weight: rows 0 to 5: .*F16"):
        value(merged(base, dtype="F16"), EMBED)


def test_merging_stock_rows_equals_what_peft_merges(tiny_adapter: Path, tiny_tied: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_tied), str(tiny_adapter))
    want = peft.merge_and_unload().get_input_embeddings().weight.float().numpy(force=True)
    got = value(merged(tiny_tied, tiny_adapter), EMBED).astype(np.float32)
    np.testing.assert_array_equal(got, want)
    base = value(merged(tiny_tied), EMBED).astype(np.float32)
    assert set(np.flatnonzero((got != base).any(axis=1))) == set(TRAINED_IDS)


def test_a_merge_does_not_modify_its_inputs(tiny_untied: Path, tmp_path: Path) -> None:
    rows = stock.stock_rows(tiny_untied, tmp_path / "a", TRAINED_IDS, targets=stock.HEAD_AND_EMBEDDING)
    before = digests(tiny_untied), digests(rows)
    model = merged(tiny_untied, rows, dtype="F32")
    for name in model.specs:
        value(model, name)
    assert (digests(tiny_untied), digests(rows)) == before
