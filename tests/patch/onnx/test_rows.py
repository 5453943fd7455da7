"""A patched folder has the bytes that merging and exporting anew would give, auxiliary files and metadata included."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest

from exporter.cli.main import run
from exporter.formats.onnx.weights.precision import PRECISIONS as TABLE
from fixtures import adapters
from tests.support.trained import NEW_TOKENS, TRAINED_IDS

Capture = pytest.CaptureFixture[str]
PRECISIONS = ("fp32", "fp16", "int8", "q4", "q4-sym", "q4f16", "q4f16-sym")
FILES = [stem for name in PRECISIONS for stem in TABLE[name].stems]
Bases = Callable[[str, str], Path]


def succeed(*arguments: object) -> None:
    assert run([*map(str, arguments), "-q"]) == 0


def options(*precisions: str, ops: str = "standard") -> list[str]:
    return ["--to", "onnx", "--onnx-ops", ops, *(argument for name in precisions for argument in ("--quant", name))]


def tree(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }


def assert_same(got: Path, want: Path) -> None:
    actual, expected = tree(got), tree(want)
    assert actual.keys() == expected.keys()
    assert [name for name in expected if actual[name] != expected[name]] == []


@pytest.fixture(scope="module")
def base_onnx(tiny_tied: Path, tiny_untied: Path, tmp_path_factory: pytest.TempPathFactory) -> Bases:
    """base_onnx("tied" or "untied", ops): the base alone in every precision; read-only."""
    folder = tmp_path_factory.mktemp("bases")

    def make(tie: str, ops: str) -> Path:
        path = folder / f"{tie}-{ops}"
        if not path.exists():
            base = {"tied": tiny_tied, "untied": tiny_untied}[tie]
            succeed("export", base, *options(*PRECISIONS, ops=ops), "--verify", "off", "-o", path)
        return path

    return make


@pytest.fixture(scope="module")
def row_adapters(
    tiny_adapter: Path,
    tiny_new_tokens_adapter: Path,
    tiny_both_adapter: Path,
    tiny_untied: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Path]:
    new = adapters.stock_rows_new_tokens(
        tiny_untied,
        tmp_path_factory.mktemp("adapter") / "new",
        NEW_TOKENS,
        TRAINED_IDS[:1],
        targets=adapters.HEAD_AND_EMBEDDING,
    )
    return {
        "tied-known": tiny_adapter,
        "tied-new": tiny_new_tokens_adapter,
        "untied-known": tiny_both_adapter,
        "untied-new": new,
    }


@pytest.mark.parametrize("tokens", ["known", "new"])
@pytest.mark.parametrize("tie", ["tied", "untied"])
@pytest.mark.parametrize("ops", ["standard", "ort"])
def test_patch_equals_merging_and_exporting_anew(
    base_onnx: Bases, row_adapters: dict[str, Path], tmp_path: Path, ops: str, tie: str, tokens: str
) -> None:
    adapter, base = row_adapters[f"{tie}-{tokens}"], base_onnx(tie, ops)
    before = tree(base)
    succeed("merge", adapter, *options(*PRECISIONS, ops=ops), "--verify", "off", "-o", tmp_path / "want")
    succeed("patch", base, adapter, "-o", tmp_path / "got", "--verify", "weights")
    assert_same(tmp_path / "got", tmp_path / "want")
    assert tree(base) == before


def test_two_names_of_one_data_file_stay_so(base_onnx: Bases, row_adapters: dict[str, Path], tmp_path: Path) -> None:
    base = Path(shutil.copytree(base_onnx("tied", "standard"), tmp_path / "base"))
    shared = base / "onnx" / "model_quantized.onnx_data"
    shared.unlink()
    shared.hardlink_to(base / "onnx" / "model_int8.onnx_data")
    for tokens in ("known", "new"):
        succeed("patch", base, row_adapters[f"tied-{tokens}"], "-o", tmp_path / tokens)
        int8, quantized = (tmp_path / tokens / "onnx" / f"model_{name}.onnx_data" for name in ("int8", "quantized"))
        assert int8.samefile(quantized)


def test_new_tokens_take_padding_rows_first(tiny_padded: Path, tiny_padded_adapter: Path, tmp_path: Path) -> None:
    succeed("export", tiny_padded, *options("fp32", "int8"), "-o", tmp_path / "base")
    succeed("merge", tiny_padded_adapter, *options("fp32", "int8"), "-o", tmp_path / "want")
    succeed("patch", tmp_path / "base", tiny_padded_adapter, "-o", tmp_path / "got", "--verify", "weights")
    assert_same(tmp_path / "got", tmp_path / "want")
    models = [onnx.load(tmp_path / folder / "onnx/model.onnx", load_external_data=False) for folder in ("base", "got")]
    assert models[0].graph == models[1].graph


@pytest.mark.parametrize("brings", ["special tokens", "generation config", "list of ends"])
def test_special_tokens_template_and_settings_of_the_adapter_travel_along(
    tiny_tied: Path, tmp_path: Path, brings: str
) -> None:
    adapter = adapters.stock_rows_new_tokens(tiny_tied, tmp_path / "adapter", ("<end>",), special=True)
    path = adapter / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token": "<end>"}))
    (adapter / "chat_template.jinja").write_text("{{ messages }}")
    if brings == "generation config":
        (adapter / "generation_config.json").write_text(json.dumps({"eos_token_id": [512, 2], "pad_token_id": 1}))
    if brings == "list of ends":
        (adapter / "generation_config.json").write_text(json.dumps({"eos_token_id": [512, 2]}))
    succeed("export", tiny_tied, *options("fp32"), "-o", tmp_path / "base")
    succeed("merge", adapter, *options("fp32"), "-o", tmp_path / "want")
    succeed("patch", tmp_path / "base", adapter, "-o", tmp_path / "got")
    assert_same(tmp_path / "got", tmp_path / "want")
    genai = json.loads((tmp_path / "got" / "genai_config.json").read_text())["model"]
    assert genai["vocab_size"] == 513
    assert 512 in (genai["eos_token_id"] if isinstance(genai["eos_token_id"], list) else [genai["eos_token_id"]])


def test_several_adapters_are_one_patch(tiny_tied: Path, tmp_path: Path) -> None:
    several = [adapters.stock_rows(tiny_tied, tmp_path / f"a{ids[0]}", ids, seed=ids[0]) for ids in ((5, 6), (7, 8))]
    succeed("export", tiny_tied, *options("q4"), "-o", tmp_path / "base")
    succeed("merge", *several, *options("q4"), "-o", tmp_path / "want")
    succeed("patch", tmp_path / "base", *several, "-o", tmp_path / "got")
    assert_same(tmp_path / "got", tmp_path / "want")


def test_other_files_of_the_folder_are_copied(base_onnx: Bases, row_adapters: dict[str, Path], tmp_path: Path) -> None:
    succeed("patch", base_onnx("tied", "standard"), row_adapters["tied-known"], "-o", tmp_path / "base")
    (tmp_path / "base" / "README.md").write_text("read me")
    (tmp_path / "base" / "onnx" / "notes.json").write_text("{}")
    (tmp_path / "base" / ".cache").mkdir()
    (tmp_path / "base" / ".cache" / "of another tool").write_text("")
    succeed("patch", tmp_path / "base", row_adapters["tied-known"], "-o", tmp_path / "got", "--verify", "weights")
    names = tree(tmp_path / "got").keys()
    assert {"README.md", "onnx/notes.json"} <= names
    assert not any(name.startswith(".cache") for name in names)


def test_plan_shows_what_a_patch_would_do_and_writes_nothing(
    base_onnx: Bases,
    row_adapters: dict[str, Path],
    tmp_path: Path,
    capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    base, adapter = str(base_onnx("tied", "standard")), str(row_adapters["tied-new"])
    capsys.readouterr()
    assert run(["plan", base, adapter, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["new_tokens"] == {str(512 + number): token for number, token in enumerate(NEW_TOKENS)}
    assert document["vocab"] == 515
    assert document["proof"] == "recorded digest"
    assert len(document["rows"]) == len(FILES)
    assert run(["plan", base, adapter]) == 0
    assert "<lamp>" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []
    assert run(["patch", base, adapter, "-o", "out", "-q"]) == 0
    assert document["targets"][0]["nbytes"] == sum(map(len, tree(tmp_path / "out").values()))


def test_a_report_names_the_model_and_matrix_of_every_row_check(
    base_onnx: Bases, row_adapters: dict[str, Path], tmp_path: Path, capsys: Capture
) -> None:
    arguments = [base_onnx("untied", "ort"), row_adapters["untied-known"], "-o", tmp_path / "out", "--json"]
    capsys.readouterr()  # what making the base printed
    assert run(["patch", *map(str, arguments)]) == 0
    (artifact,) = json.loads(capsys.readouterr().out)["artifacts"]
    names = [check["name"] for check in artifact["verification"]["checks"]]
    assert "model_q4f16: lm_head.weight rows" in names
    assert "special ids" in names
