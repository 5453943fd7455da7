from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from exporter.errors import LedgerError, UnreadableFile
from exporter.formats.hf.write import plan_hf, write_hf
from exporter.merge.plan import plan_merge
from exporter.sources.hf.checkpoint import INDEX, Checkpoint
from exporter.sources.peft.adapter import NO_ADAPTERS_DIGEST, Adapter, combined_digest
from fixtures import adapters as stock
from fixtures.corpus import PROMPTS
from tests.formats.merged import Merge, files, loaded, raw
from tests.sources.folders import EMBED, HEAD, checkpoint, matrix
from tests.support.trained import NEW_TOKENS, TRAINED_IDS


def unmerged(base: Path, rows: Path) -> Any:
    """Stock PEFT on the base in float32, with the adapter unmerged."""
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    size = len(AutoTokenizer.from_pretrained(rows))
    if size > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(size, mean_resizing=False)
    return PeftModel.from_pretrained(model, str(rows)).eval()


def logits(model: Any, ids: list[list[int]]) -> np.ndarray[Any, Any]:
    with torch.no_grad():
        return np.concatenate([model(torch.tensor([sequence])).logits[0].float().numpy() for sequence in ids])


def prompts(rows: Path, trained: tuple[int, ...]) -> list[list[int]]:
    """Token ids of the corpus' prompts, and a sequence of mostly trained tokens."""
    tokenizer: Any = AutoTokenizer.from_pretrained(rows)
    return [*(tokenizer(text).input_ids for text in PROMPTS), [5, *trained, 7, *trained]]


@pytest.fixture(scope="session")
def untied_new_tokens(tiny_untied: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three new tokens and an existing one in both matrices of ``tiny_untied``."""
    return stock.stock_rows_new_tokens(
        tiny_untied,
        tmp_path_factory.mktemp("adapter") / "untied-new",
        NEW_TOKENS,
        TRAINED_IDS[:1],
        targets=stock.HEAD_AND_EMBEDDING,
    )


@pytest.mark.parametrize(
    ("base", "rows", "trained"),
    [
        ("tiny_tied", "tiny_adapter", TRAINED_IDS),
        ("tiny_untied", "tiny_untied_adapter", TRAINED_IDS),
        ("tiny_untied", "tiny_both_adapter", TRAINED_IDS),
        ("tiny_tied", "tiny_new_tokens_adapter", (TRAINED_IDS[0], 512, 513, 514)),
        ("tiny_padded", "tiny_padded_adapter", (512, 513, 514)),
        ("tiny_untied", "untied_new_tokens", (TRAINED_IDS[0], 512, 513, 514)),
    ],
)
def test_logits_equal_those_of_stock_peft_unmerged(
    base: str, rows: str, trained: tuple[int, ...], merge: Merge, request: pytest.FixtureRequest
) -> None:
    base_folder, adapter_folder = request.getfixturevalue(base), request.getfixturevalue(rows)
    out = merge(base_folder, adapter_folder, dtype="F32")
    ids = prompts(adapter_folder, trained)
    model = loaded(out)
    assert model.dtype == torch.float32
    peft = unmerged(base_folder, adapter_folder)
    got, want = logits(model, ids), logits(peft, ids)
    assert got.shape == want.shape
    # The limit of the contract; the rows are exact, only the order of summation differs.
    assert np.abs(got - want).max() <= 1e-5
    with peft.disable_adapter():
        assert np.abs(got - logits(peft, ids)).max() > 1e-2, "the adapter changes nothing here"


@pytest.mark.parametrize(("base", "rows"), [("tiny_tied", "tiny_adapter"), ("tiny_untied", "tiny_both_adapter")])
def test_the_tie_survives_as_it_was(base: str, rows: str, merge: Merge, request: pytest.FixtureRequest) -> None:
    base_folder = request.getfixturevalue(base)
    out = merge(base_folder, request.getfixturevalue(rows))
    assert Checkpoint.open(out).tensors.keys() == Checkpoint.open(base_folder).tensors.keys()
    assert Checkpoint.open(out).tie == Checkpoint.open(base_folder).tie
    model = loaded(out)
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    assert (embedding.data_ptr() == head.data_ptr()) == (base == "tiny_tied")


def test_untrained_values_are_bit_identical(tiny_untied: Path, tiny_both_adapter: Path, merge: Merge) -> None:
    before, after = raw(tiny_untied), raw(merge(tiny_untied, tiny_both_adapter))
    assert before.keys() == after.keys()
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {EMBED, HEAD}
    width = 64 * 2
    for name in changed:
        rows = {n for n in range(512) if before[name][n * width :][:width] != after[name][n * width :][:width]}
        assert rows == set(TRAINED_IDS)


def test_without_adapters_the_weights_are_a_copy(tiny_tied: Path, merge: Merge) -> None:
    assert raw(merge(tiny_tied)) == raw(tiny_tied)


def test_a_stale_index_beside_a_single_file_is_not_copied(tmp_path: Path, merge: Merge) -> None:
    base = checkpoint(tmp_path / "b", {EMBED: matrix()})
    (base / INDEX).write_text('{"weight_map": {"gone": "gone.safetensors"}}')
    out = merge(base)
    assert not (out / INDEX).exists()
    assert Checkpoint.open(out).tensors.keys() == {EMBED}


def test_auxiliary_files_are_written_along(tiny_tied: Path, tiny_new_tokens_adapter: Path, merge: Merge) -> None:
    out = merge(tiny_tied, tiny_new_tokens_adapter)
    tokenizer, trained = (AutoTokenizer.from_pretrained(path) for path in (out, tiny_new_tokens_adapter))
    assert tokenizer.get_vocab() == trained.get_vocab()
    assert tokenizer.chat_template == trained.chat_template
    chat = [{"role": "user", "content": f"Light the {NEW_TOKENS[0]}"}]
    assert str(tokenizer.apply_chat_template(chat, tokenize=False)).count(NEW_TOKENS[0]) == 1
    assert tokenizer(NEW_TOKENS[0]).input_ids == [512]
    generation, base = (GenerationConfig.from_pretrained(path) for path in (out, tiny_tied))
    assert generation.eos_token_id == base.eos_token_id == tokenizer.eos_token_id
    assert loaded(out).config.vocab_size == len(tokenizer)


def test_named_chat_templates_are_written_along(tiny_tied: Path, tmp_path: Path, merge: Merge) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_tied, base)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = {"default": "{{ messages }}", "tool_use": "{{ tools }}"}
    tokenizer.save_pretrained(base)
    assert AutoTokenizer.from_pretrained(merge(base)).chat_template == tokenizer.chat_template


@pytest.mark.parametrize(("name", "dtype"), [("F32", "float32"), ("F16", "float16"), (None, "bfloat16")])
def test_the_config_names_the_dtype_that_is_stored(
    name: str | None, dtype: str, tiny_tied: Path, tiny_adapter: Path, merge: Merge
) -> None:
    out = merge(tiny_tied, tiny_adapter, dtype=name)
    assert {tensor.spec.dtype for tensor in Checkpoint.open(out).tensors.values()} == {name or "BF16"}
    assert str(loaded(out, dtype="auto").dtype) == f"torch.{dtype}"


def test_the_rest_of_the_config_is_the_bases(tiny_tied: Path, tiny_adapter: Path, merge: Merge) -> None:
    before, after = (
        json.loads((path / "config.json").read_text()) for path in (tiny_tied, merge(tiny_tied, tiny_adapter))
    )
    assert after == before
    assert list(after) == list(before)


def test_the_same_inputs_give_the_same_bytes(tiny_tied: Path, tiny_new_tokens_adapter: Path, merge: Merge) -> None:
    assert files(merge(tiny_tied, tiny_new_tokens_adapter)) == files(merge(tiny_tied, tiny_new_tokens_adapter))


def test_the_order_of_adapters_does_not_matter(tiny_tied: Path, tmp_path: Path, merge: Merge) -> None:
    first, second = (stock.stock_rows(tiny_tied, tmp_path / str(ids[0]), ids) for ids in [(3, 400), (20,)])
    assert files(merge(tiny_tied, first, second)) == files(merge(tiny_tied, second, first))


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_every_file_follows_the_umask(umask: int, tiny_tied: Path, tiny_adapter: Path, merge: Merge) -> None:
    before = os.umask(umask)
    try:
        out = merge(tiny_tied, tiny_adapter)
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in out.iterdir()} == {0o666 & ~umask}


def test_the_library_finds_the_format_that_it_requires(tiny_tied: Path, merge: Merge) -> None:
    from safetensors import safe_open

    with safe_open(merge(tiny_tied, dtype="F32") / "model.safetensors", "np") as file:
        assert file.metadata()["format"] == "pt"


def test_merged_weights_record_their_provenance(tiny_tied: Path, tiny_adapter: Path, merge: Merge) -> None:
    from safetensors import safe_open

    digest = hashlib.sha256(raw(tiny_tied)[EMBED]).hexdigest()
    with safe_open(merge(tiny_tied, tiny_adapter) / "model.safetensors", "np") as file:
        tuned = combined_digest(NO_ADAPTERS_DIGEST, [Adapter.open(tiny_adapter)])
        expected = {"format": "pt", "ttexport.adapters.sha256": tuned, "ttexport.base.embedding_sha256": digest}
        assert file.metadata() == expected


def test_merged_tensors_lie_within_their_pages_as_in_the_base(
    tiny_tied: Path, tiny_adapter: Path, merge: Merge
) -> None:
    before, after = (Checkpoint.open(path).tensors for path in (tiny_tied, merge(tiny_tied, tiny_adapter)))
    assert list(before) == list(after)
    assert {(after[name].place.offset_bytes - before[name].place.offset_bytes) % 4096 for name in before} == {0}


def test_the_layout_promises_the_bytes_that_are_written(
    tiny_tied: Path, tiny_new_tokens_adapter: Path, merge: Merge
) -> None:
    plan = plan_merge(Checkpoint.open(tiny_tied), [Adapter.open(tiny_new_tokens_adapter)])
    out = merge(tiny_tied, tiny_new_tokens_adapter)
    assert plan_hf(plan.model()).nbytes == sum(tensor.place.nbytes for tensor in Checkpoint.open(out).tensors.values())


def test_a_base_that_shrinks_while_it_is_copied_is_named(tmp_path: Path) -> None:
    base = checkpoint(tmp_path / "b", {EMBED: matrix()})
    layout = plan_hf(plan_merge(Checkpoint.open(base), []).model())
    os.truncate(base / "model.safetensors", (base / "model.safetensors").stat().st_size - 5)
    with pytest.raises(UnreadableFile, match=r"model\.safetensors: expected 5 more bytes"):
        write_hf(layout, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_plan_that_loses_a_tensor_is_stopped(tiny_tied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = plan_merge(Checkpoint.open(tiny_tied), []).model()
    lost = {name: spec for name, spec in model.specs.items() if name != "model.norm.weight"}
    monkeypatch.setattr(type(model), "specs", lost)
    with pytest.raises(LedgerError, match=r"model\.norm\.weight: expected one writer, found no writer"):
        plan_hf(replace(model))
