"""Folders of other tools are recognised by their graphs, and become what those tools make of the merged model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import ModelProto, numpy_helper
from safetensors.numpy import load_file, save_file

from exporter.cli.main import run
from exporter.verify.runtimes.onnx_runtime import Session
from tests.formats.onnx.foreign import HEAD, rewritten
from tests.patch.onnx.test_rows import options, succeed, tree

Capture = pytest.CaptureFixture[str]
Folders = dict[str, Path]


@pytest.fixture(scope="module")
def exported(
    tiny_tied: Path, tiny_adapter: Path, tiny_new_tokens_adapter: Path, tmp_path_factory: pytest.TempPathFactory
) -> Folders:
    """The base, and the merged models with known and with new tokens, as ttexport writes them."""
    folder = tmp_path_factory.mktemp("exported")
    succeed("export", tiny_tied, *options("fp32"), "--verify", "off", "-o", folder / "base")
    succeed("merge", tiny_adapter, *options("fp32"), "--verify", "off", "-o", folder / "known")
    succeed("merge", tiny_new_tokens_adapter, *options("fp32"), "--verify", "off", "-o", folder / "new")
    return {name: folder / name for name in ("base", "known", "new")}


def content(folder: Path) -> bytes:
    """The bytes of a model with its weights, inside the file or not."""
    model = onnx.load(folder / "onnx" / "model.onnx")
    for tensor in model.graph.initializer:
        tensor.ClearField("external_data")
        tensor.ClearField("data_location")
    return bytes(model.SerializeToString(deterministic=True))


@pytest.mark.parametrize("tokens", ["known", "new"])
@pytest.mark.parametrize("inside", [True, False], ids=["inside", "two data files"])
@pytest.mark.parametrize("quant", [None, "q4", "q8"])
def test_a_patch_gives_what_the_tool_would_make_of_the_merged_model(
    exported: Folders,
    tiny_adapter: Path,
    tiny_new_tokens_adapter: Path,
    tmp_path: Path,
    quant: str | None,
    inside: bool,
    tokens: str,
) -> None:
    adapter = {"known": tiny_adapter, "new": tiny_new_tokens_adapter}[tokens]
    base = rewritten(exported["base"], tmp_path / "base", inside=inside, quant=quant)
    want = rewritten(exported[tokens], tmp_path / "want", inside=inside, quant=quant)
    succeed("patch", base, adapter, "-o", tmp_path / "got", "--verify", "weights")
    assert content(tmp_path / "got") == content(want)
    beside = [
        {n: c for n, c in tree(folder).items() if not n.startswith("onnx/")} for folder in (tmp_path / "got", want)
    ]
    assert beside[0] == beside[1]


@pytest.mark.parametrize("quant", [None, "q4", "q8"])
def test_a_patched_folder_of_another_tool_runs(
    exported: Folders, tiny_new_tokens_adapter: Path, tmp_path: Path, quant: str | None
) -> None:
    base = rewritten(exported["base"], tmp_path / "base", quant=quant)
    want = rewritten(exported["new"], tmp_path / "want", quant=quant)
    succeed("patch", base, tiny_new_tokens_adapter, "-o", tmp_path / "got")
    ids = np.array([[512, 5, 300, 514]])
    results = []
    for folder in (tmp_path / "got", want):
        session = Session(folder / "onnx" / "model.onnx")
        logits, _ = session.run(ids, np.ones_like(ids), np.arange(4)[None], session.empty_cache(1))
        results.append(logits)
    assert results[0].shape == (1, 4, 515)
    np.testing.assert_array_equal(results[0], results[1])


def test_growth_keeps_alignments_and_gaps_that_are_not_ours(
    exported: Folders, tiny_new_tokens_adapter: Path, tmp_path: Path
) -> None:
    base = rewritten(exported["base"], tmp_path / "base")
    succeed("patch", base, tiny_new_tokens_adapter, "-o", tmp_path / "got", "--verify", "weights")

    def offsets(folder: Path) -> dict[str, int]:
        model = onnx.load(folder / "onnx" / "model.onnx", load_external_data=False)
        places = {tensor.name: {e.key: e.value for e in tensor.external_data} for tensor in model.graph.initializer}
        return {name: int(entries.get("offset", 0)) for name, entries in places.items() if entries}

    old, new = offsets(base), offsets(tmp_path / "got")
    assert old.keys() == new.keys()
    assert any(new[name] != old[name] for name in old)
    assert all((new[name] - old[name]) % 65536 == 0 for name in old)


def changed(base: Path, change: object) -> None:
    path = base / "onnx" / "model.onnx"
    model = onnx.load(path)
    change(model)  # type: ignore[operator]
    onnx.save(model, path)


def test_a_head_that_the_config_unties_is_left_alone(exported: Folders, tiny_adapter: Path, tmp_path: Path) -> None:
    """A tied adapter holds its rows twice; an adapter of an older PEFT holds them once."""
    base = rewritten(exported["base"], tmp_path / "base", inside=True)
    adapter = Path(shutil.copytree(tiny_adapter, tmp_path / "once"))
    rows = {n: v for n, v in load_file(adapter / "adapter_model.safetensors").items() if "lm_head" not in n}
    save_file(rows, adapter / "adapter_model.safetensors")

    def heads() -> list[bytes]:
        stored = []
        for folder in (base, tmp_path / "got"):
            model = onnx.load(folder / "onnx" / "model.onnx")
            stored.append(next(tensor.raw_data for tensor in model.graph.initializer if tensor.name == HEAD))
        return stored

    succeed("patch", base, adapter, "-o", tmp_path / "got")
    assert len(set(heads())) == 2
    config = json.loads((base / "config.json").read_text()) | {"tie_word_embeddings": False}
    (base / "config.json").write_text(json.dumps(config))
    succeed("patch", base, adapter, "-o", tmp_path / "got", "--force")
    assert len(set(heads())) == 1


def refused(capsys: Capture, tmp_path: Path, code: int, message: str, *argv: object) -> None:
    capsys.readouterr()
    out = tmp_path / "refused"
    assert run(["patch", *map(str, argv), "-o", str(out)]) == code
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.err.count("\n") == 1
    assert printed.out == ""
    assert not out.exists()


def strange_ids(model: ModelProto) -> None:
    next(node for node in model.graph.node if node.op_type == "Gather").op_type = "GatherElements"


def strange_head(model: ModelProto) -> None:
    next(node for node in model.graph.node if node.name == "/lm_head/MatMul").op_type = "MatMulBnb4"


def integers(model: ModelProto) -> None:
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == HEAD)
    tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.int8), HEAD))


def smaller_head(model: ModelProto) -> None:
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == HEAD)
    tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor)[:, :500], HEAD))


def one_by_one(model: ModelProto) -> None:
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == HEAD)
    tensor.float_data.extend(numpy_helper.to_array(tensor).reshape(-1).tolist())
    tensor.ClearField("raw_data")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (strange_ids, "no recognisable embedding look-up by input_ids"),
        (strange_head, "no recognisable matrix that computes the logits"),
        (integers, "expected a float or 8-bit matrix, found a I8 tensor"),
        (smaller_head, "number of tokens in all vocabulary matrices, found 512"),
        (one_by_one, "expected the values of the tensor in raw_data"),
    ],
)
def test_graphs_that_are_not_recognised(
    exported: Folders, tiny_adapter: Path, tmp_path: Path, capsys: Capture, change: object, message: str
) -> None:
    base = rewritten(exported["base"], tmp_path / "base", inside=True)
    changed(base, change)
    refused(capsys, tmp_path, 5, message, base, tiny_adapter, "--trust-base")


def test_another_model_of_the_folder_that_is_not_recognised(
    exported: Folders, tiny_adapter: Path, tmp_path: Path, capsys: Capture
) -> None:
    base = Path(shutil.copytree(exported["base"], tmp_path / "base"))
    other = rewritten(exported["base"], tmp_path / "other", inside=True)
    changed(other, strange_head)
    shutil.copy(other / "onnx" / "model.onnx", base / "onnx" / "decoder_bnb4.onnx")
    refused(capsys, tmp_path, 5, "decoder_bnb4.onnx", base, tiny_adapter)


def test_a_row_beyond_the_one_scale_of_a_matrix(
    exported: Folders, tiny_adapter: Path, tmp_path: Path, capsys: Capture
) -> None:
    base = rewritten(exported["base"], tmp_path / "base", quant="q8")
    adapter = Path(shutil.copytree(tiny_adapter, tmp_path / "large"))
    rows = load_file(adapter / "adapter_model.safetensors")
    save_file({name: 100 * value for name, value in rows.items()}, adapter / "adapter_model.safetensors")
    refused(
        capsys,
        tmp_path,
        5,
        "of a new row exceeds the range of the matrix, in which all tokens share one scale",
        base,
        adapter,
    )


def test_a_bias_of_the_logits_cannot_grow(
    exported: Folders, tiny_adapter: Path, tiny_new_tokens_adapter: Path, tmp_path: Path, capsys: Capture
) -> None:
    def biased(model: ModelProto) -> None:
        model.graph.node[-1].output[0] = "product"
        model.graph.initializer.append(numpy_helper.from_array(np.zeros(512, np.float32), "bias"))
        model.graph.node.append(onnx.helper.make_node("Add", ["product", "bias"], ["logits"], "add"))

    base = rewritten(exported["base"], tmp_path / "base", inside=True)
    changed(base, biased)
    refused(capsys, tmp_path, 5, "bias: the vocabulary grows", base, tiny_new_tokens_adapter)
    succeed("patch", base, tiny_adapter, "-o", tmp_path / "known")


def test_another_base_is_refused_for_every_model_of_the_folder(
    exported: Folders, tiny_untied: Path, tiny_adapter: Path, tmp_path: Path, capsys: Capture
) -> None:
    foreign = rewritten(exported["base"], tmp_path / "foreign")
    for base, message in ((exported["base"], "a different base"), (foreign, "expected row 0 of")):
        other = Path(shutil.copytree(tiny_untied, tmp_path / "other", dirs_exist_ok=True))
        arrays = load_file(other / "model.safetensors")
        name = "model.embed_tokens.weight"
        arrays[name] = arrays[name] * np.asarray(1.01, arrays[name].dtype)
        save_file(arrays, other / "model.safetensors", {"format": "pt"})
        refused(capsys, tmp_path, 4, message, base, tiny_adapter, "--base", other)
        succeed("patch", base, tiny_adapter, "--trust-base", "--force", "-o", tmp_path / "trusted")


def test_options_that_do_not_apply_to_a_folder(
    exported: Folders, tiny_adapter: Path, tmp_path: Path, capsys: Capture
) -> None:
    base = exported["base"]
    refused(capsys, tmp_path, 2, "--dtype", base, tiny_adapter, "--dtype", "f16")
    refused(capsys, tmp_path, 2, "a folder with all ONNX models", base / "onnx" / "model.onnx", tiny_adapter)
    for out in (base, base / "onnx", base / "new", base.parent):
        assert run(["patch", str(base), str(tiny_adapter), "-o", str(out), "--force", "-q"]) == 2
        assert "an output path that overwrites no input" in capsys.readouterr().err


def test_tokens_without_a_tokenizer_or_a_row(
    exported: Folders, tiny_new_tokens_adapter: Path, tmp_path: Path, capsys: Capture
) -> None:
    adapter = Path(shutil.copytree(tiny_new_tokens_adapter, tmp_path / "adapter"))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (adapter / name).unlink()
    refused(
        capsys,
        tmp_path,
        4,
        "the folder of an adapter with new tokens must contain the tokenizer",
        exported["base"],
        adapter,
    )
    shutil.copytree(tiny_new_tokens_adapter, adapter, dirs_exist_ok=True)
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["token_indices"] = [300, 512, 514]
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    rows = load_file(adapter / "adapter_model.safetensors")
    save_file({name: value[[0, 1, 3]] for name, value in rows.items()}, adapter / "adapter_model.safetensors")
    refused(capsys, tmp_path, 4, "found no row for token 513", exported["base"], adapter)
