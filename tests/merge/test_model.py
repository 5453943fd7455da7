from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from exporter import tensors
from exporter.merge import model as merge_model
from exporter.merge.model import MergedTensor
from exporter.merge.passes import Cast, ReplaceRows
from exporter.merge.plan import plan_merge
from exporter.sources.hf.checkpoint import Checkpoint
from exporter.sources.hf.safetensors import FileTensor
from exporter.sources.peft.adapter import Adapter
from exporter.tensors import Array, ByteRange, LazyTensor, TensorSpec, blocks, read
from tests.merge.test_fused import lora, merge, require_as_peft_merges
from tests.session.zoo import ZooCheckpoint
from tests.sources.folders import EMBED, matrix
from tests.support.trained import TRAINED_IDS

STORED = 12
Cases = st.tuples(st.sets(st.integers(0, STORED - 1)).map(sorted), st.integers(0, 4), st.sampled_from([None, "F16"]))
Make = Callable[[tuple[list[int], int, str | None]], tuple[MergedTensor, Array]]


@pytest.fixture(scope="session")
def build_tensor(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """(ids, number of new rows, dtype) → (a merged tensor of a file, its expected value)."""
    path = tmp_path_factory.mktemp("merged") / "x"
    stored = matrix(STORED)
    path.write_bytes(b"before" + stored.tobytes() + b"after")
    source = FileTensor(TensorSpec("x", "F32", stored.shape), ByteRange(path, 6, stored.nbytes))

    def build(case: tuple[list[int], int, str | None]) -> tuple[MergedTensor, Array]:
        ids, grown, dtype = case
        ids = [*ids, *range(STORED, STORED + grown)]
        numpy_dtype = np.dtype(np.float16 if dtype else np.float32)
        rows = matrix(len(ids), start=1000).astype(numpy_dtype)
        want = np.concatenate([stored, np.zeros((grown, 4), np.float32)]).astype(numpy_dtype)
        want[ids] = rows
        replace = [ReplaceRows(tuple(ids), rows, STORED + grown)] if ids else []
        return MergedTensor("x", source, [*([Cast(dtype)] if dtype else []), *replace]), want

    return build


def joined(tensor: LazyTensor) -> bytes:
    """The bytes of all segments, ranges read from their files."""
    content = b""
    for segment in tensor.segments():
        if isinstance(segment, ByteRange):
            content += segment.path.read_bytes()[segment.offset_bytes :][: segment.nbytes]
        else:
            content += segment.tobytes()
    return content


@given(Cases, st.data())
def test_any_slice_is_the_slice_of_the_whole(
    build_tensor: Make, case: tuple[list[int], int, str | None], data: st.DataObject
) -> None:
    tensor, want = build_tensor(case)
    assert tensor.spec.shape == want.shape
    np.testing.assert_array_equal(read(tensor), want)
    start = data.draw(st.integers(0, len(want)))
    stop = data.draw(st.integers(start, len(want)))
    rows = tensor.rows(start, stop)
    assert rows.dtype == want.dtype
    np.testing.assert_array_equal(rows, want[start:stop])


@given(Cases, st.integers(1, 200))
def test_segments_and_blocks_are_the_whole_at_any_block_size(
    build_tensor: Make, case: tuple[list[int], int, str | None], block_nbytes: int
) -> None:
    tensor, want = build_tensor(case)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(merge_model, "TOUCHED_BYTES", block_nbytes)
        assert joined(tensor) == want.tobytes()
        arrays = [segment for segment in tensor.segments() if not isinstance(segment, ByteRange)]
    assert all(array.nbytes <= max(block_nbytes, tensor.spec.row_nbytes) for array in arrays)
    np.testing.assert_array_equal(np.concatenate([rows for _, rows in blocks(tensor, block_nbytes)]), want)


def test_rows_that_nothing_touches_stay_ranges_of_the_file(build_tensor: Make) -> None:
    tensor, _ = build_tensor(([2, 3, 7], 1, None))
    sizes = [segment.nbytes if isinstance(segment, ByteRange) else segment.shape for segment in tensor.segments()]
    width = 16
    assert sizes == [2 * width, (2, 4), 3 * width, (1, 4), 4 * width, (1, 4)]
    first = next(iter(tensor.segments()))
    assert isinstance(first, ByteRange)
    assert first.offset_bytes == 6


def test_a_merge_reads_little_more_than_the_rows_it_changes(
    tiny_adapter: Path, tiny_tied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = plan_merge(Checkpoint.open(tiny_tied), [Adapter.open(tiny_adapter)]).model()
    read_bytes = 0
    sound = FileTensor.rows

    def counting(self: FileTensor, start: int, stop: int) -> Array:
        nonlocal read_bytes
        rows = sound(self, start, stop)
        read_bytes += rows.nbytes
        return rows

    monkeypatch.setattr(FileTensor, "rows", counting)
    for name in model.specs:
        list(model.tensor(name).segments())
    assert read_bytes == len(TRAINED_IDS) * model.specs[EMBED].row_nbytes


def test_a_tensor_without_a_pass_is_the_stored_tensor(tiny_adapter: Path, tiny_tied: Path) -> None:
    checkpoint = Checkpoint.open(tiny_tied)
    model = plan_merge(checkpoint, [Adapter.open(tiny_adapter)]).model()
    merged = [name for name in model.specs if model.tensor(name) is not checkpoint.tensors[name]]
    assert merged == [EMBED]


def test_a_pass_with_another_result_than_its_spec_is_an_error(build_tensor: Make) -> None:
    class WrongSpec(Cast):
        def out_spec(self, spec: TensorSpec) -> TensorSpec:
            return spec

    tensor, _ = build_tensor(([], 0, None))
    with pytest.raises(AssertionError, match=r"expected TensorSpec.*, found float16"):
        MergedTensor("x", tensor.source, [WrongSpec("F16")]).rows(0, 2)


def test_a_tensor_without_data_has_no_segments_to_loop_over(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.touch()
    empty = FileTensor(TensorSpec("x", "F32", (1 << 36, 0)), ByteRange(path, 0, 0))
    assert joined(MergedTensor("x", empty, [Cast("F16")])) == b""
    assert tensors.read(empty).shape == (1 << 36, 0)


@pytest.mark.parametrize(
    ("model", "settings"),
    [
        ("llama", {"target_modules": ["layers.0.self_attn.q_proj"]}),
        ("llama", {"target_modules": ["layers.0.self_attn.q_proj"], "use_dora": True}),
        ("mixtral", {"target_modules": ["layers.0.self_attn.q_proj"], "modules_to_save": ["layers.1.mlp.experts"]}),
    ],
    ids=["LoRA", "DoRA", "saved experts"],
)
def test_an_adapter_that_is_saved_again_is_read_anew_in_the_same_process(
    model: str, settings: dict[str, Any], zoo_checkpoint: ZooCheckpoint, tmp_path: Path
) -> None:
    base = zoo_checkpoint(model)
    for seed in range(2):
        adapter = lora(base, tmp_path / "adapter", seed=seed, **settings)
        out = tmp_path / str(seed)
        assert merge(base, out, adapter, options=("--verify", "weights")) == 0
        require_as_peft_merges(base, adapter, out)
