"""Reading ONNX files of any tool: ranges, rows, and hostile input."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from exporter.errors import BadInput, NotExpressible, UnreadableFile
from exporter.sources.onnx.file import OnnxFile
from exporter.sources.onnx.graph import BlockForm
from exporter.tensors import Array
from tests.sources.onnx.onnx_models import HEAD, HIDDEN, TABLE, VOCAB, save, tensor


def external(name: str, value: Array, **entries: object) -> TensorProto:
    """A tensor with its bytes in ``weights`` from byte 16 on; ``entries`` override its external data entries."""
    proto = TensorProto(name=name, data_type=helper.np_dtype_to_tensor_dtype(value.dtype), dims=value.shape)
    proto.data_location = TensorProto.EXTERNAL
    for key, entry in {"location": "weights", "offset": 16, "length": value.nbytes, **entries}.items():
        if entry is not None:
            proto.external_data.add(key=key, value=str(entry))
    return proto


LOOKUP = helper.make_node("Gather", ["table", "input_ids"], ["x"])
PRODUCT = helper.make_node("MatMul", ["x", "head"], ["logits"])


@pytest.fixture
def model(tmp_path: Path) -> Callable[..., Path]:
    """model(**entries): a model with its table as external data, and its ``entries`` overridden."""

    def build(**entries: object) -> Path:
        (tmp_path / "weights").write_bytes(bytes(16) + TABLE.tobytes())
        tensors = [external("table", TABLE, **entries), tensor("head", HEAD.T.copy())]
        return save(tmp_path / "model.onnx", [LOOKUP, PRODUCT], tensors)

    return build


def test_ranges_of_external_and_inline_initialisers(model: Callable[..., Path]) -> None:
    file = OnnxFile.open(model())
    table, head = file.initialisers["table"], file.initialisers["head"]
    assert (table.dtype, table.shape, table.nbytes) == ("F32", (VOCAB, HIDDEN), TABLE.nbytes)
    assert table.place is not None
    assert (table.place.path.name, table.place.offset_bytes, table.place.nbytes) == ("weights", 16, TABLE.nbytes)
    assert (head.shape, head.nbytes, head.place) == ((HIDDEN, VOCAB), HEAD.nbytes, None)
    assert (file.inputs, file.outputs) == (("input_ids",), ("logits",))


def test_rows_and_token_rows_read_what_they_name(model: Callable[..., Path]) -> None:
    file = OnnxFile.open(model(offset=None, length=None, checksum="0" * 40).parent)
    assert (file.embedding, file.head) == ("table", "head")
    assert file.token_axis == {"table": 0, "head": 1}
    shifted = np.frombuffer(bytes(16) + TABLE.tobytes(), np.float32)[: TABLE.size].reshape(TABLE.shape)
    assert np.array_equal(file.rows("table", 2, 5), shifted[2:5])
    assert np.array_equal(file.token_rows("table", 2, 5), shifted[2:5])
    assert np.array_equal(file.rows("head", 1, 3), HEAD.T[1:3])
    assert np.array_equal(file.token_rows("head", 1, 3), HEAD[1:3])


def test_token_rows_of_a_transposed_external_matrix(tmp_path: Path) -> None:
    (tmp_path / "weights").write_bytes(bytes(16) + HEAD.T.tobytes())
    tensors = [tensor("table", TABLE), external("head", HEAD.T.copy())]
    file = OnnxFile.open(save(tmp_path / "model.onnx", [LOOKUP, PRODUCT], tensors))
    assert np.array_equal(file.token_rows("head", 2, 6), HEAD[2:6])


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64, np.int8, np.uint8, np.int64, np.bool_])
def test_inline_values_of_every_usual_type(tmp_path: Path, dtype: type) -> None:
    value: Array = TABLE.astype(dtype)
    typed = helper.make_tensor("typed", helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), value.shape, value)
    file = OnnxFile.open(save(tmp_path / "model.onnx", [PRODUCT], [tensor("raw", value), typed]))
    for name in ("raw", "typed"):
        rows = file.rows(name, 0, VOCAB)
        assert rows.dtype == np.dtype(dtype)
        assert np.array_equal(rows, value)
        assert file.initialisers[name].nbytes == value.nbytes


def test_scalar_is_one_row(tmp_path: Path) -> None:
    file = OnnxFile.open(save(tmp_path / "model.onnx", [PRODUCT], [tensor("scalar", np.array(7, np.int64))]))
    assert file.rows("scalar", 0, 1).tolist() == [7]


def test_packed_types_are_listed_and_not_read(tmp_path: Path) -> None:
    packed = helper.make_tensor("packed", TensorProto.INT4, (3, 3), bytes(5), raw=True)
    file = OnnxFile.open(save(tmp_path / "model.onnx", [PRODUCT], [packed]))
    assert (file.initialisers["packed"].dtype, file.initialisers["packed"].nbytes) == ("I4", 5)
    with pytest.raises(NotExpressible, match="packed"):
        file.rows("packed", 0, 1)


@pytest.mark.parametrize(
    "location",
    ["", "/etc/passwd", "../weights", "a/../../weights", "..\\weights", "weights\0", "."],
)
def test_external_data_outside_the_folder_is_refused(model: Callable[..., Path], location: str) -> None:
    path = model(location=location)
    with pytest.raises(UnreadableFile, match=r"external data inside the folder|regular file"):
        OnnxFile.open(path)


@pytest.mark.parametrize(
    ("entries", "reason"),
    [
        ({"location": "elsewhere"}, "elsewhere: no such file"),
        ({"length": 4}, "table: expected 96 bytes of external data, found length 4"),
        ({"offset": 17}, "expected external data up to byte 113, found a file of only 112 bytes"),
        ({"offset": -1}, "expected a number of bytes, found '-1'"),
        ({"offset": "9" * 30}, "expected a number of bytes"),
        ({"offset": "१"}, "expected a number of bytes"),
        ({"length": "all"}, "expected a number of bytes, found 'all'"),
    ],
    ids=str,
)
def test_external_data_with_wrong_entries_is_refused(
    model: Callable[..., Path], entries: dict[str, object], reason: str
) -> None:
    path = model(**entries)
    with pytest.raises(UnreadableFile, match=reason):
        OnnxFile.open(path)


def test_pipe_as_external_data_is_refused_without_blocking(model: Callable[..., Path]) -> None:
    path = model(location="pipe")
    os.mkfifo(path.parent / "pipe")
    with pytest.raises(UnreadableFile, match="regular file"):
        OnnxFile.open(path)


def test_data_that_shrinks_after_opening_is_reported(model: Callable[..., Path]) -> None:
    file = OnnxFile.open(model())
    os.truncate(file.path.parent / "weights", 40)
    with pytest.raises(UnreadableFile, match="weights"):
        file.rows("table", 0, VOCAB)


def test_linked_data_file_is_read_as_hub_caches_store_it(model: Callable[..., Path], tmp_path: Path) -> None:
    path = model()
    (tmp_path / "weights").rename(tmp_path / "blob")
    (tmp_path / "weights").symlink_to("blob")
    assert np.array_equal(OnnxFile.open(path).rows("table", 0, VOCAB), TABLE)


def spoilt(**changes: Any) -> TensorProto:
    proto = tensor("w", TABLE)
    for key, value in changes.items():
        if key == "dims":
            del proto.dims[:]
            proto.dims.extend(value)
        else:
            setattr(proto, key, value)
    return proto


@pytest.mark.parametrize(
    ("proto", "reason"),
    [
        (spoilt(dims=[7, 4]), r"w: expected 112 bytes for F32 \[7, 4\], found 96 bytes"),
        (spoilt(dims=[-6, -4]), "expected axis lengths of 0 or more"),
        (spoilt(dims=[1 << 40, 1 << 40]), "found 96 bytes"),
        (spoilt(data_type=0), "expected a numeric element type, found type 0"),
        (spoilt(data_type=TensorProto.STRING), "expected a numeric element type"),
        (TensorProto(name="w", data_type=1, dims=[2], float_data=[1.0]), "found 1 numbers"),
    ],
    ids=["shape", "negative", "huge", "type", "text", "numbers"],
)
def test_inline_tensor_that_contradicts_itself_is_refused(tmp_path: Path, proto: TensorProto, reason: str) -> None:
    path = save(tmp_path / "model.onnx", [PRODUCT], [proto])
    with pytest.raises(UnreadableFile, match=reason):
        OnnxFile.open(path)


def test_duplicate_initialiser_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "model.onnx", [PRODUCT], [tensor("w", TABLE), tensor("w", HEAD)])
    with pytest.raises(UnreadableFile, match="w: expected a unique initialiser name, found the name twice"):
        OnnxFile.open(path)


@pytest.mark.parametrize("content", [b"", b"not an onnx model", b"\x08\x0b", bytes(1000)])
def test_bytes_that_are_not_a_model_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.onnx").write_bytes(content)
    with pytest.raises(UnreadableFile, match=r"model\.onnx: expected an ONNX model"):
        OnnxFile.open(tmp_path)


def test_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnreadableFile, match=r"expected model\*\.onnx or decoder"):
        OnnxFile.open(tmp_path)


def test_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnreadableFile, match="no such file"):
        OnnxFile.open(tmp_path / "nothing.onnx")


def test_flipped_bytes_are_read_or_refused_and_never_crash(model: Callable[..., Path]) -> None:
    path = model()
    sound, chance, refused = path.read_bytes(), random.Random(0), 0
    for _ in range(400):
        broken = bytearray(sound)
        for _ in range(chance.randint(1, 3)):
            broken[chance.randrange(len(broken))] = chance.randrange(256)
        path.write_bytes(broken)
        try:
            file = OnnxFile.open(path)
            for name, initialiser in file.initialisers.items():
                file.rows(name, 0, initialiser.shape[0] if initialiser.shape else 1)
        except (BadInput, NotExpressible):
            refused += 1
    assert 0 < refused < 400


def test_quantised_matrix_is_its_codes_scales_and_zero_points_row_by_row(tmp_path: Path) -> None:
    """GatherBlockQuantized reads (V, H / 32, bytes) with scales of another shape, MatMulNBits the same codes."""
    codes = np.arange(VOCAB * 2 * 32, dtype=np.uint8).reshape(VOCAB, 2, 32)
    scales = np.arange(VOCAB * 2, dtype=np.float32).reshape(VOCAB, 2)
    zeros = np.arange(VOCAB * 2, dtype=np.uint8).reshape(VOCAB, 2)
    blocked: dict[str, Any] = {"bits": 8, "block_size": 32, "domain": "com.microsoft"}
    nodes = [
        helper.make_node("Unsqueeze", ["s", "axis"], ["column"]),
        helper.make_node("Unsqueeze", ["z", "axis"], ["middle"]),
        helper.make_node("GatherBlockQuantized", ["w", "input_ids", "column", "middle"], ["x"], **blocked),
        helper.make_node("MatMulNBits", ["x", "w", "s", "z"], ["logits"], K=64, N=VOCAB, **blocked),
    ]
    tensors = [tensor("w", codes), tensor("s", scales), tensor("z", zeros), tensor("axis", np.array([2]))]
    path = save(tmp_path / "model.onnx", nodes, tensors)
    onnx.save(onnx.load(path), path, save_as_external_data=True, location="data", size_threshold=0)
    file = OnnxFile.open(path)
    assert (file.embedding, file.head, file.quantised) == ("w", "w", True)
    assert file.blocks["w"] == BlockForm(bits=8, size=32, scales="s", zero_points="z")
    want = np.concatenate([codes.reshape(VOCAB, -1), scales.view(np.uint8), zeros], axis=1)
    assert np.array_equal(file.token_bytes("w", 1, 4), want[1:4])
    data = (tmp_path / "data").read_bytes()
    places = file.token_places("w", 3)
    assert b"".join(data[place.offset_bytes :][: place.nbytes] for place in places) == want[3].tobytes()


def test_rows_inside_the_model_file_have_no_place(tmp_path: Path) -> None:
    nodes = [helper.make_node("Gather", ["w", "input_ids"], ["x"]), helper.make_node("MatMul", ["x", "h"], ["logits"])]
    file = OnnxFile.open(save(tmp_path / "model.onnx", nodes, [tensor("w", TABLE), tensor("h", HEAD.T)]))
    assert not file.quantised
    with pytest.raises(NotExpressible, match="not byte ranges"):
        file.token_places("w", 0)
