"""What an adapter records about its base, compared with the given base: only contradictions are reported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from exporter.errors import BadInput
from exporter.sources.hf.checkpoint import Checkpoint
from exporter.sources.hub.base_check import check_base
from exporter.sources.hub.locate import Located
from exporter.sources.peft.adapter import Adapter
from fixtures.adapters import load
from fixtures.models.tie_layouts import VOCAB
from fixtures.peft_adapters import RECIPES, build_adapter
from tests.merge.tuned import Bench

COMMIT, OTHER_COMMIT = "0123456789abcdef0123456789abcdef01234567", "89abcdef0123456789abcdef0123456789abcdef"
SAVED = ("new rows, embedding saved", "lora and new rows, embedding saved", "new rows of both, embedding saved")


def check(base: Path, *adapters: Path, trust: bool = False, located: Located | None = None) -> tuple[str, ...]:
    opened = [Adapter.open(adapter) for adapter in adapters]
    return check_base(located or Located(base), Checkpoint.open(base), opened, trust=trust)


def shifted(base: Path, out: Path) -> Path:
    """Another base of the same shape."""
    model = load(base)
    for parameter in model.parameters():
        parameter.data += 0.01
    model.save_pretrained(out)
    return out


def edit_config(adapter: Path, **changes: Any) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("layout", ["tied", "untied"])
@pytest.mark.parametrize("kind", SAVED)
def test_a_saved_frozen_matrix_must_begin_with_the_rows_of_the_base(
    kind: str, layout: str, bench: Bench, tmp_path: Path
) -> None:
    base, adapter = bench.base("llama", layout), bench.adapter("llama", layout, kind)
    assert check(base, adapter) == ()
    other = shifted(base, tmp_path / "other")
    with pytest.raises(
        BadInput, match=r"found other values in \d+ of \d+ compared rows: .*trained on a different base"
    ):
        check(other, adapter)
    assert all("compared rows" in warning for warning in check(other, adapter, trust=True))


def test_a_matrix_that_may_have_been_trained_as_a_whole_is_no_evidence(bench: Bench, tmp_path: Path) -> None:
    base = bench.base("llama", "tied")
    assert check(shifted(base, tmp_path / "other"), bench.adapter("llama", "tied", "lora, embedding saved")) == ()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_training_in_another_dtype_is_no_contradiction(dtype: str, bench: Bench, tmp_path: Path) -> None:
    base = bench.base("llama", "tied")
    model = load(base, dtype=getattr(torch, dtype))
    adapter = build_adapter(model, tmp_path / "adapter", "llama", RECIPES[SAVED[0]])
    assert check(base, adapter) == ()
    shrunk = load_file(adapter / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in shrunk.values()} & {torch.float16, torch.bfloat16}


def test_rows_that_were_initialised_before_the_training_are_no_contradiction(bench: Bench, tmp_path: Path) -> None:
    base = bench.base("llama", "tied")
    model = load(base)
    model.get_input_embeddings().weight.data[:5] = 0.5
    assert check(base, build_adapter(model, tmp_path / "adapter", "llama", RECIPES[SAVED[0]])) == ()


def test_padding_rows_that_a_resize_removed_are_not_compared(bench: Bench, tmp_path: Path) -> None:
    model = load(bench.base("llama", "tied"))
    model.resize_token_embeddings(4 * VOCAB, mean_resizing=False)
    model.save_pretrained(tmp_path / "padded")
    adapter = build_adapter(model, tmp_path / "adapter", "llama", RECIPES[SAVED[0]])
    assert check(tmp_path / "padded", adapter) == ()


@pytest.mark.parametrize(
    ("recorded", "repo", "commit", "contradicts"),
    [
        (COMMIT, "org/base", COMMIT, False),
        (OTHER_COMMIT, "org/base", COMMIT, True),
        (OTHER_COMMIT, "org/other", COMMIT, False),
        (OTHER_COMMIT, None, None, False),
        ("main", "org/base", COMMIT, False),
        (None, "org/base", COMMIT, False),
    ],
)
def test_commits_are_compared_where_both_are_known(
    recorded: str | None, repo: str | None, commit: str | None, contradicts: bool, bench: Bench, tmp_path: Path
) -> None:
    base = bench.base("llama", "tied")
    adapter = build_adapter(bench.model("llama", "tied"), tmp_path / "adapter", "llama", RECIPES["rows"])
    edit_config(adapter, base_model_name_or_path="org/base", revision=recorded)
    located = Located(base, repo, commit)
    if not contradicts:
        assert check(base, adapter, located=located) == ()
        return
    with pytest.raises(BadInput, match=f"revision: expected the commit {COMMIT} of org/base, found {OTHER_COMMIT}"):
        check(base, adapter, located=located)
    assert len(check(base, adapter, located=located, trust=True)) == 1


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "{",
        '{"base": "x"}',
        '{"base": "x", "base_digest": "short", "base_tensor": {"name": "w"}}',
        '{"base": 1, "base_digest": "' + "0" * 64 + '", "base_tensor": []}',
    ],
)
def test_a_train_json_of_another_tool_is_not_a_record(text: str, bench: Bench, tmp_path: Path) -> None:
    base = bench.base("llama", "tied")
    adapter = build_adapter(bench.model("llama", "tied"), tmp_path / "adapter", "llama", RECIPES["rows"])
    (adapter / "train.json").write_text(text)
    assert check(base, adapter) == ()
