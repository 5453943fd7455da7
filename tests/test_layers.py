from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from exporter.cli.main import VERBS
from exporter.formats.gguf import plan_gguf, write_gguf
from exporter.formats.onnx import choose, plan_onnx, write_onnx
from exporter.merge.plan import plan_merge
from exporter.sources.checkpoint import Checkpoint

ROOT = Path(__file__).parents[1]
FIRST_PARTY = ("exporter", "tuner", "fixtures", "tests", "benchmarks")
# From the bottom up. A module may import its own layer and those before it; a package is one layer.
LAYERS = (
    "exporter",
    "exporter.version",
    "exporter.errors",
    "exporter.tensors",
    "exporter.parallel",
    "exporter.staging",
    "exporter.sources",
    "exporter.ggml",
    "exporter.merge",
    "exporter.families",
    "exporter.formats",
    "exporter.footprint",
    "exporter.hooks",
    "exporter.targets",
    "exporter.verify",
    "exporter.inspection",
    "exporter.export",
    "exporter.patch",
    "exporter.release",
    "exporter.cli",
    "tuner",
)
# What a layer must not know although it lies below: the checker its makers, the merge its formats.
CLOSED = {
    "exporter.verify": {"exporter.merge", "exporter.families", "exporter.formats", "exporter.targets"}
    | {"exporter.footprint"},
    "exporter.sources": {"exporter.staging"},
    "exporter.merge": {"exporter.staging"},
    "tuner": set(LAYERS) - {"exporter", "exporter.version", "exporter.errors", "tuner"},
}
# The one string that names the tuner, so that `ttexport tune` finds it.
DOOR_TO_TUNER = "exporter/cli/main.py"


def layer_of(module: str) -> str:
    """The most specific layer that holds ``module``; modules directly below ``exporter`` must be listed themselves."""
    parts = module.split(".")
    name = ".".join(parts[:2]) if parts[0] == "exporter" else parts[0]
    if name not in LAYERS:
        raise LookupError(f"{module} is in no layer: give it a place in the table")
    return name


def imported(tree: ast.AST) -> Iterator[str]:
    """First-party modules that the code imports anywhere: in functions and under TYPE_CHECKING, too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import"
            # `from exporter import errors` names a module, `from exporter.errors import BadInput` does not.
            package = node.module or ""
            names = [f"{package}.{alias.name}" for alias in node.names] if "." not in package else [package]
        else:
            continue
        yield from (name for name in names if name.split(".")[0] in FIRST_PARTY)


def faults(module: str, source: str) -> list[str]:
    mine = layer_of(module)
    wrong = []
    for name in imported(ast.parse(source)):
        other = layer_of(name)
        if LAYERS.index(other) > LAYERS.index(mine) or other in CLOSED.get(mine, ()):
            wrong.append(f"{module} imports {name}")
    return wrong


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


FILES = sorted(path for package in ("exporter", "tuner") for path in (ROOT / package).rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(ROOT)) for path in FILES])
def test_imports_point_down(path: Path) -> None:
    assert faults(module_of(path), path.read_text()) == []


def test_every_room_is_walked() -> None:
    walked = {layer_of(module_of(path)) for path in FILES}
    assert set(LAYERS) - walked == set()


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("exporter.errors", "from exporter.tensors import cast"),
        ("exporter.tensors", "def f():\n    import exporter.sources.safetensors"),
        (
            "exporter.sources.gguf",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from exporter import merge",
        ),
        ("exporter.merge.plan", "from exporter.families.spec import Role"),
        ("exporter.verify.rows", "from exporter.merge.passes import ReplaceRows"),
        ("exporter.verify.run", "from exporter.formats import hf"),
        ("exporter.formats.hf", "from exporter.targets import Wish"),
        ("exporter.export", "from exporter.cli.text import size"),
        ("exporter.cli.main", "import tuner.cli"),
        ("tuner.train", "from exporter.tensors import cast"),
        ("tuner.train", "from exporter.sources import checkpoint"),
    ],
)
def test_an_import_that_points_up_is_seen(module: str, source: str) -> None:
    assert faults(module, source)


@pytest.mark.parametrize(
    "source", ["from exporter.newroom import x", "import tests.conftest", "from fixtures import tiny"]
)
def test_an_import_from_outside_the_layers_is_seen(source: str) -> None:
    with pytest.raises(LookupError, match="in no layer"):
        faults("exporter.cli.main", source)


def test_a_file_outside_the_layers_is_seen() -> None:
    with pytest.raises(LookupError, match="in no layer"):
        faults("exporter.helpers", "")


def test_a_relative_import_is_seen() -> None:
    with pytest.raises(AssertionError, match="relative"):
        faults("exporter.merge.plan", "from .passes import Cast")


def test_the_exporter_names_the_tuner_in_one_table_only() -> None:
    naming = [
        str(path.relative_to(ROOT))
        for path in FILES
        if path.is_relative_to(ROOT / "exporter")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith("tuner")
    ]
    assert naming == [DOOR_TO_TUNER]
    assert [verb for verb, module in VERBS.items() if module.startswith("tuner")] == ["tune"]


HEAVY = ("torch", "transformers", "peft", "onnxruntime", "onnx", "onnx_ir", "llama_cpp")
REPORTING = ("jinja2", "junitparser", "matplotlib")
PROBE = f"""
import json, sys
from exporter.cli.main import run
code = run(sys.argv[1:])
print(json.dumps([code, [name for name in {(*HEAVY, *REPORTING)!r} if name in sys.modules]]), file=sys.stderr)
"""


def run_and_list(*words: object) -> tuple[int, list[str]]:
    """Exit code, and which heavy packages the process of a command ended with."""
    command = [sys.executable, "-c", PROBE, *map(str, words)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    code, loaded = json.loads(done.stderr.splitlines()[-1])
    return code, loaded


def test_help_and_version_import_nothing_heavy() -> None:
    assert run_and_list("--help") == (0, [])
    assert run_and_list("merge", "--help") == (0, [])


@pytest.mark.parametrize("target", ["hf", "gguf"])
def test_a_merge_imports_nothing_heavy(target: str, tiny_adapter: Path, tiny_tied: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run_and_list("merge", tiny_adapter, "--base", tiny_tied, "--to", target, "-o", out) == (0, [])
    assert out.exists()


def test_a_patch_imports_nothing_heavy(tiny_adapter: Path, tiny_tied: Path, tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    write_gguf(plan_gguf(plan_merge(Checkpoint.open(tiny_tied), []).model(), "Q8_0"), file)
    for words in (["-o", tmp_path / "out.gguf"], ["--in-place"]):
        assert run_and_list("patch", file, tiny_adapter, *words) == (0, [])


def test_a_patch_of_onnx_models_parses_them_and_imports_nothing_else_heavy(
    tiny_adapter: Path, tiny_tied: Path, tmp_path: Path
) -> None:
    base = tmp_path / "onnx"
    layout = plan_onnx(plan_merge(Checkpoint.open(tiny_tied), []).model("F32"), choose(None, ["int8", "q4"]))
    write_onnx(layout, base)
    for words in (["-o", tmp_path / "out"], ["--in-place"]):
        assert run_and_list("patch", base, tiny_adapter, *words) == (0, ["onnx"])
    assert run_and_list("plan", base, tiny_adapter) == (0, ["onnx"])


def test_a_report_is_drawn_without_what_runs_models(tiny_adapter: Path, tiny_tied: Path, tmp_path: Path) -> None:
    words = ["--report", tmp_path / "report", "-o", tmp_path / "out"]
    assert run_and_list("merge", tiny_adapter, "--base", tiny_tied, *words) == (0, list(REPORTING))


def test_a_plan_imports_nothing_heavy(tiny_adapter: Path, tiny_tied: Path, tmp_path: Path) -> None:
    targets = ["--to", "hf", "--to", "gguf", "-o", tmp_path / "out"]
    assert run_and_list("plan", tiny_adapter, "--base", tiny_tied, *targets) == (0, [])


def test_inspecting_imports_nothing_heavy(tiny_adapter: Path, tiny_tied: Path, tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    write_gguf(plan_gguf(plan_merge(Checkpoint.open(tiny_tied), []).model(), None), file)
    for path in (tiny_adapter, tiny_tied, file):
        assert run_and_list("inspect", path) == (0, [])


def test_the_probe_sees_what_a_command_imports(tiny_adapter: Path, tiny_tied: Path, tmp_path: Path) -> None:
    _, loaded = run_and_list("merge", tiny_adapter, "--base", tiny_tied, "--to", "onnx", "-o", tmp_path / "onnx")
    assert "onnx_ir" in loaded or "onnx" in loaded
