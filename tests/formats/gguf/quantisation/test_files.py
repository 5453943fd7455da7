"""Whole files in llama.cpp's file types, compared with files that llama.cpp quantises by itself."""

from __future__ import annotations

import ctypes
import importlib.util
import os
from pathlib import Path

import llama_cpp
import numpy as np
import pytest

from exporter.cli.main import run
from exporter.errors import UnreadableFile
from exporter.formats.gguf import GgufLayout, write_gguf
from exporter.formats.gguf import target as target_module
from exporter.formats.gguf.options import GgufOptions
from exporter.formats.gguf.quantisation.file_types import FILE_TYPES
from exporter.formats.gguf.quantisation.imatrix import read_imatrix
from exporter.formats.gguf.target import plan_target
from exporter.formats.target import FolderScratch
from exporter.io.parallel import Budget
from exporter.merge.plan import plan_merge
from exporter.progress import Progress
from exporter.sources.gguf.file import GgufFile
from exporter.sources.hf.checkpoint import Checkpoint
from fixtures.models import gguf_files
from tests.formats.gguf import runtime

Capture = pytest.CaptureFixture[str]


def export(base: Path, out: Path, *options: str) -> Path:
    assert run(["export", str(base), "--to", "gguf", "-q", "-o", str(out), *options]) == 0
    return out


def by_llama_cpp(source: Path, out: Path, name: str) -> Path:
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{name}")
    assert llama_cpp.llama_model_quantize(str(source).encode(), str(out).encode(), ctypes.byref(params)) == 0
    return out


@pytest.mark.parametrize("name", ["Q4_0", "Q4_K_M", "Q5_K_M", "Q6_K", "IQ4_XS", "Q2_K", "TQ1_0"])
def test_file_has_the_bytes_of_llama_cpps(wide_untied: Path, tmp_path: Path, name: str) -> None:
    assert runtime  # its import switches llama.cpp's log off
    source = export(wide_untied, tmp_path / "bf16.gguf")
    want = by_llama_cpp(source, tmp_path / "want.gguf", name)
    assert export(wide_untied, tmp_path / "got.gguf", "--quant", name).read_bytes() == want.read_bytes()


def test_the_table_of_file_types_is_llama_cpps() -> None:
    for name, file_type in FILE_TYPES.items():
        full = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M"}.get(name, name)
        assert getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{full}") == file_type.number


def test_several_quantisations_share_one_intermediate_that_is_removed(
    wide_tied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[Path] = []

    def counting(layout: GgufLayout, path: Path, progress: Progress) -> None:
        written.append(path)
        write_gguf(layout, path, progress)

    monkeypatch.setattr(target_module, "write_gguf", counting)
    export(wide_tied, tmp_path / "out", "--quant", "Q4_K_M", "--quant", "Q8_0", "--quant", "Q6_K")
    assert [path.name for path in written] == ["unquantised-BF16.gguf", "tied-Q8_0.gguf"]
    assert sorted(path.name for path in (tmp_path / "out" / "gguf").iterdir()) == [
        "tied-Q4_K_M.gguf",
        "tied-Q6_K.gguf",
        "tied-Q8_0.gguf",
    ]


def test_types_of_embedding_and_head_can_be_chosen(wide_untied: Path, tmp_path: Path) -> None:
    options = ["--quant", "Q4_0", "--token-embedding-type", "Q5_K", "--output-tensor-type", "BF16"]
    file = GgufFile.open(export(wide_untied, tmp_path / "m.gguf", *options))
    assert file.tensors["token_embd.weight"].type == "Q5_K"
    assert file.tensors["output.weight"].type == "BF16"
    assert file.tensors["blk.0.attn_q.weight"].type == "Q4_0"


def test_rows_that_do_not_fill_blocks_fall_back_as_llama_cpp_does(tiny_tied: Path, tmp_path: Path) -> None:
    want = by_llama_cpp(export(tiny_tied, tmp_path / "bf16.gguf"), tmp_path / "want.gguf", "Q4_K_M")
    got = export(tiny_tied, tmp_path / "got.gguf", "--quant", "Q4_K_M")
    assert got.read_bytes() == want.read_bytes()
    assert GgufFile.open(got).tensors["blk.0.attn_q.weight"].type == "Q5_0"


def test_progress_adds_up_to_what_was_promised(wide_tied: Path, tmp_path: Path) -> None:
    plan = plan_merge(Checkpoint.open(wide_tied), [])
    target = plan_target(GgufOptions(types=("Q6_K",)), plan, Budget())
    for name in ("first", "second"):  # the second uses the unquantised file of the first
        reported: list[int] = []
        target.make(tmp_path / f"{name}.gguf", reported.append, FolderScratch(tmp_path))
        assert sum(reported) == target.work_nbytes
    size = (tmp_path / "first.gguf").stat().st_size
    assert abs(size / target.nbytes - 1) < 0.02  # the types differ from layer to layer


@pytest.mark.parametrize("form", ["gguf", "legacy"])
def test_importance_matrix_reaches_llama_cpp(wide_tied: Path, tmp_path: Path, form: str) -> None:
    names = [name for name in GgufFile.open(export(wide_tied, tmp_path / "b.gguf")).tensors if "blk" in name]
    sums = {name: np.linspace(0.1, 9, 512 if "down" in name else 256, dtype=np.float32) for name in names}
    path = tmp_path / f"importance.{form}"
    {"gguf": gguf_files.write_imatrix, "legacy": gguf_files.write_legacy_imatrix}[form](path, sums, calls=4)
    assert np.array_equal(read_imatrix(path).values[names[0]], sums[names[0]] / 4)
    plain = export(wide_tied, tmp_path / "plain.gguf", "--quant", "Q4_K_S")
    file = GgufFile.open(export(wide_tied, tmp_path / "m.gguf", "--quant", "Q4_K_S", "--imatrix", str(path)))
    assert file.metadata["quantize.imatrix.file"] == path.name
    assert file.metadata["quantize.imatrix.entries_count"] == len(sums)
    name = "blk.1.ffn_up.weight"
    assert not np.array_equal(file.rows(name, 0, 9), GgufFile.open(plain).rows(name, 0, 9))


def test_few_bits_work_with_an_importance_matrix(wide_tied: Path, tmp_path: Path) -> None:
    names = [name for name in GgufFile.open(export(wide_tied, tmp_path / "b.gguf")).tensors if "blk" in name]
    sums = {name: np.ones(512 if "down" in name else 256, np.float32) for name in names}
    gguf_files.write_imatrix(tmp_path / "i.gguf", sums, calls=1)
    out = export(wide_tied, tmp_path / "m.gguf", "--quant", "IQ2_XXS", "--imatrix", str(tmp_path / "i.gguf"))
    assert GgufFile.open(out).tensors["blk.1.ffn_up.weight"].type == "IQ2_XXS"


@pytest.mark.parametrize(
    ("tensor_type", "imatrix", "code", "reason"),
    [
        ("iq1_s", False, 5, "needs importances, and token rows are quantised without importances"),
        ("IQ2_XS", True, 5, "needs importances, and token rows are quantised without importances"),
        ("I32", False, 2, "found 'I32'"),
        ("Q8_K", False, 2, "found 'Q8_K'"),
    ],
)
def test_a_type_that_would_abort_llama_cpp_is_refused_before_it_runs(
    wide_tied: Path, tmp_path: Path, capsys: Capture, tensor_type: str, imatrix: bool, code: int, reason: str
) -> None:
    argv = ["export", str(wide_tied), "--to", "gguf", "--quant", "Q4_K_M", "--token-embedding-type", tensor_type]
    if imatrix:
        gguf_files.write_imatrix(tmp_path / "i.gguf", {"token_embd.weight": np.ones(256, np.float32)}, calls=1)
        argv += ["--imatrix", str(tmp_path / "i.gguf")]
    assert run([*argv, "-o", str(tmp_path / "m.gguf")]) == code
    assert reason in capsys.readouterr().err
    assert not (tmp_path / "m.gguf").exists()


def test_types_may_be_written_in_lower_case(wide_untied: Path, tmp_path: Path) -> None:
    options = ("--quant", "q4_k_m", "--token-embedding-type", "q5_0", "--output-tensor-type", "f16")
    tensors = GgufFile.open(export(wide_untied, tmp_path / "m.gguf", *options)).tensors
    types = {name: tensors[name].type for name in ("token_embd.weight", "output.weight", "blk.0.attn_q.weight")}
    assert types == {"token_embd.weight": "Q5_0", "output.weight": "F16", "blk.0.attn_q.weight": "Q4_K"}


@pytest.mark.parametrize("data", [b"", b"GGUF", b"\1\0\0\0\xff\xff\0\0abc", b"\0\0\0\0"])
def test_broken_importance_matrix_is_bad_input(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "i").write_bytes(data)
    with pytest.raises(UnreadableFile, match=str(tmp_path / "i")):
        read_imatrix(tmp_path / "i")


def test_a_failed_quantiser_is_reported_in_one_line_and_leaves_nothing(
    wide_tied: Path, tmp_path: Path, capsys: Capture
) -> None:
    """An importance matrix of the wrong width makes llama.cpp fail in the middle of the file."""
    gguf_files.write_imatrix(tmp_path / "i.gguf", {"blk.1.ffn_up.weight": np.ones(64, np.float32)}, calls=1)
    argv = ["export", str(wide_tied), "--to", "gguf", "--quant", "Q4_K_M", "--imatrix", str(tmp_path / "i.gguf")]
    assert run([*argv, "-o", str(tmp_path / "m.gguf"), "-q"]) == 5
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "imatrix size 64 is different from tensor size 256" in error
    assert [path.name for path in tmp_path.iterdir()] == ["i.gguf"]


def test_an_abort_of_the_library_ends_only_its_own_process(
    wide_tied: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    dying = tmp_path / "dying.py"
    dying.write_text("import os, sys\nprint('GGML_ASSERT(false) failed', file=sys.stderr, flush=True)\nos.abort()\n")
    monkeypatch.setattr("exporter.formats.gguf.quantisation.files._WORKER", "dying")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    argv = ["export", str(wide_tied), "--to", "gguf", "--quant", "Q4_K_M", "-o", str(tmp_path / "m.gguf"), "-q"]
    assert run(argv) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "SIGABRT" in error
    assert "GGML_ASSERT(false) failed" in error
    assert [path.name for path in tmp_path.iterdir()] == ["dying.py"]


def test_without_llama_cpp_the_error_names_the_package_to_install(
    wide_tied: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "llama_cpp" else find_spec(name))
    argv = ["export", str(wide_tied), "--to", "gguf", "-o", str(tmp_path / "m.gguf"), "-q"]
    assert run([*argv, "--quant", "Q4_K_M"]) == 6
    assert "pip install 'ttexport[llamacpp]'" in capsys.readouterr().err
    assert run([*argv, "--quant", "Q8_0", "--verify", "rows"]) == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Q4_K_M", "Q6_K"])
def test_quantised_file_passes_the_full_verification(wide_adapters: dict[str, Path], tmp_path: Path, name: str) -> None:
    argv = ["merge", str(wide_adapters["tied-known"]), "--to", "gguf", "--quant", name, "-o", str(tmp_path / "m.gguf")]
    assert run([*argv, "--verify", "full", "-q"]) == 0
