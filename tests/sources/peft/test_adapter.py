from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from exporter.errors import BadInput, LedgerError, NotExpressible, TensorMismatch, UnreadableFile
from exporter.merge.plan import plan_merge
from exporter.sources.hf.checkpoint import Checkpoint
from exporter.sources.peft.adapter import WEIGHTS, Adapter
from exporter.sources.peft.folders import CONFIG
from fixtures.hostile.cases import HOSTILE, MENTIONS, PICKLE_MARKER
from tests.sources.folders import PREFIX, ROWS, adapter, matrix
from tests.support.trained import TRAINED_IDS

EMBED, HEAD = "model.embed_tokens", "lm_head"


def test_rows_follow_their_ids_into_ascending_order(tiny_adapter: Path) -> None:
    opened = Adapter.open(tiny_adapter)
    stored = load_file(tiny_adapter / WEIGHTS)
    listed = json.loads((tiny_adapter / CONFIG).read_text())["token_indices"]
    assert listed == list(TRAINED_IDS) != sorted(listed)
    for edit in opened.rows:
        assert edit.token_ids == tuple(sorted(TRAINED_IDS))
        for token_id, row in zip(edit.token_ids, edit.rows, strict=True):
            np.testing.assert_array_equal(row, stored[edit.key][listed.index(token_id)])


def test_an_adapter_of_a_tied_model_stores_its_rows_twice(tiny_adapter: Path) -> None:
    embedding, head = sorted(Adapter.open(tiny_adapter).rows, key=lambda edit: edit.module, reverse=True)
    assert (embedding.module, head.module) == (EMBED, HEAD)
    np.testing.assert_array_equal(embedding.rows, head.rows)


@pytest.mark.parametrize("modules", [(EMBED,), (HEAD,), (EMBED, HEAD)])
def test_older_adapters_store_rows_once(modules: tuple[str, ...], tmp_path: Path) -> None:
    opened = Adapter.open(adapter(tmp_path / "a", [3, 1], {module: matrix(2) for module in modules}))
    assert {edit.module for edit in opened.edits} == set(modules)
    assert all(edit.key == f"{PREFIX}{edit.module}{ROWS}" for edit in opened.edits)


def test_an_adapter_of_an_untied_model_has_rows_for_both_matrices(tiny_both_adapter: Path) -> None:
    first, second = Adapter.open(tiny_both_adapter).rows
    assert {first.module, second.module} == {EMBED, HEAD}
    assert not np.array_equal(first.rows, second.rows)


def test_base_name_and_auxiliary_files_are_found(tiny_adapter: Path, tiny_tied: Path, tmp_path: Path) -> None:
    opened = Adapter.open(tiny_adapter)
    assert opened.base_name == str(tiny_tied)
    assert "tokenizer.json" in opened.auxiliary_files
    bare = Adapter.open(adapter(tmp_path / "a", [0], {EMBED: matrix(1)}))
    assert bare.base_name is None
    assert bare.auxiliary_files == {}


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, ml_dtypes.bfloat16])
def test_rows_keep_the_dtype_they_were_stored_in(dtype: type, tmp_path: Path) -> None:
    (edit,) = Adapter.open(adapter(tmp_path / "a", [5], {EMBED: matrix(1, dtype=dtype)})).rows
    assert edit.rows.dtype == dtype


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (None, "token_indices: expected a list of integers, found None"),
        ([1, "2"], "token_indices: expected a list of integers"),
        ([1, True], "token_indices: expected a list of integers"),
        ([1, 2.0], "token_indices: expected a list of integers"),
        ([], "at least one token id, found an empty list"),
        ([1, -1], "expected token ids of 0 or more, found -1"),
        ([7, 1, 7], "each token id once, but token id 7 occurs 2 times"),
    ],
)
def test_broken_ids_are_refused(ids: object, message: str, tmp_path: Path) -> None:
    folder = adapter(tmp_path / "a", [0, 1], {EMBED: matrix(2)}, token_indices=ids)
    with pytest.raises(UnreadableFile, match=message) as caught:
        Adapter.open(folder)
    assert caught.value.path == folder / CONFIG


def test_a_repeated_id_is_found_among_many(tmp_path: Path) -> None:
    # A search by counting each id would take hours here.
    folder = adapter(tmp_path / "a", [*range(300_000), 299_999], {EMBED: matrix(1)})
    with pytest.raises(UnreadableFile, match="token id 299999 occurs 2 times"):
        Adapter.open(folder)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (matrix(3), r"expected 2 rows, one for each token id in the config, found shape \(3, 4\)"),
        (matrix(1, 8).reshape(8), "expected 2 rows"),
        (matrix(2, dtype=np.int32), "expected one of the dtypes BF16, F16, F32, F64, found I32"),
        (np.array([[1, 2], [3, np.nan]], np.float32), "expected finite values, found NaN or Inf in the row of token 4"),
        (
            np.array([[1, -np.inf], [3, 4]], np.float16),
            "expected finite values, found NaN or Inf in the row of token 9",
        ),
    ],
)
def test_broken_rows_are_refused_by_tensor(rows: np.ndarray, message: str, tmp_path: Path) -> None:
    folder = adapter(tmp_path / "a", [9, 4], {EMBED: rows})
    with pytest.raises(TensorMismatch, match=message) as caught:
        Adapter.open(folder)
    assert caught.value.tensor == f"{PREFIX}{EMBED}{ROWS}"
    assert caught.value.path == folder / WEIGHTS


@pytest.mark.parametrize("name", ["model.embed_tokens.trainable_tokens_delta", f"{PREFIX}{EMBED}.lora_A.weight"])
def test_a_tensor_that_no_rule_takes_is_refused(name: str, tmp_path: Path) -> None:
    folder = adapter(tmp_path / "a", [0], {EMBED: matrix(1)})
    save_file(load_file(folder / WEIGHTS) | {name: matrix(1)}, folder / WEIGHTS)
    with pytest.raises(LedgerError, match="a tensor that no merge rule handles") as caught:
        Adapter.open(folder)
    assert caught.value.tensor == name


def test_an_adapter_without_tensors_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnreadableFile, match="found a file without tensors"):
        Adapter.open(adapter(tmp_path / "a", [0], {}))


@pytest.mark.parametrize("peft_type", ["LOHA", "IA3"])
def test_other_peft_types_are_not_expressible_and_name_an_alternative(peft_type: str, tmp_path: Path) -> None:
    folder = adapter(tmp_path / "a", [0], {EMBED: matrix(1)}, peft_type=peft_type)
    with pytest.raises(NotExpressible, match=f"peft_type {peft_type}: .*merge_and_unload"):
        Adapter.open(folder)


@pytest.mark.parametrize("peft_type", [None, 5, ["LORA"]])
def test_a_config_without_a_peft_type_is_refused(peft_type: object, tmp_path: Path) -> None:
    with pytest.raises(UnreadableFile, match="peft_type: expected the name of an adapter type"):
        Adapter.open(adapter(tmp_path / "a", [0], {EMBED: matrix(1)}, peft_type=peft_type))


@pytest.mark.parametrize("name", HOSTILE)
def test_every_hostile_input_is_refused_in_one_line_that_names_the_fault(
    name: str, tiny_adapter: Path, tiny_tied: Path, tmp_path: Path
) -> None:
    folder, base = HOSTILE[name](tiny_adapter, tiny_tied, tmp_path)
    with pytest.raises(BadInput) as caught:
        plan_merge(Checkpoint.open(base), [Adapter.open(folder)])
    message = str(caught.value)
    assert caught.value.exit_code == 4
    assert "\n" not in message
    assert str(tmp_path) in message
    assert "expected" in message or "no such file" in message or "not valid JSON" in message
    for word in MENTIONS[name]:
        assert word.lower() in message.replace(str(tmp_path), "").lower()
    assert not (tmp_path / PICKLE_MARKER).exists()


def test_the_sound_pair_behind_the_hostile_ones_is_accepted(tiny_adapter: Path, tiny_tied: Path) -> None:
    assert plan_merge(Checkpoint.open(tiny_tied), [Adapter.open(tiny_adapter)]).ledger_entries
