"""Which room may import which: a literal table, and every import of every file held against it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from exporter.cli.main import VERBS

ROOT = Path(__file__).parents[1]
FIRST_PARTY = ("exporter", "tuner", "ttexport", "fixtures", "tests", "benchmarks")
# From the bottom up. A row is a folder (its own files, none of its subfolders') or a single file of one. A file may
# import its own row and those before it.
LAYERS = (
    "exporter",
    "exporter.version",
    "exporter.lazy",
    "exporter.errors",
    "exporter.sizes",
    "exporter.options",
    "exporter.packages",
    "exporter.progress",
    "exporter.tensors",
    "exporter.io",
    "exporter.models.data",
    "exporter.models",
    "exporter.sources",
    "exporter.sources.journal",
    "exporter.sources.hf.by_llama_cpp",
    "exporter.sources.hf",
    "exporter.sources.peft.types",
    "exporter.sources.peft",
    "exporter.sources.places",
    "exporter.sources.gguf",
    "exporter.sources.onnx",
    "exporter.sources.hub",
    "exporter.sources.detect",
    "exporter.peft_modules",
    "exporter.ggml",
    "exporter.merge",
    "exporter.merge.by_peft",
    "exporter.merge.vocabulary",
    "exporter.merge.model",
    "exporter.merge.plan",
    "exporter.families.spec",
    "exporter.families.llama_cpp",
    "exporter.families.family",
    "exporter.families.config",
    "exporter.families.building_blocks",
    "exporter.families.rms_norm",
    "exporter.families.llama_like",
    "exporter.families.layer_norm",
    "exporter.families",
    "exporter.formats",
    "exporter.formats.footprint",
    "exporter.formats.target",
    "exporter.formats.slots",
    "exporter.formats.views",
    "exporter.formats.hf",
    "exporter.formats.gguf.writer",
    "exporter.formats.gguf.raw_keys",
    "exporter.formats.gguf.split",
    "exporter.formats.gguf.names",
    "exporter.formats.gguf.quantisation.file_types",
    "exporter.formats.gguf.quantisation.tensor_types",
    "exporter.formats.gguf.quantisation.imatrix",
    "exporter.formats.gguf.quantisation.tensors",
    "exporter.formats.gguf.vocab",
    "exporter.formats.gguf.metadata",
    "exporter.formats.gguf.in_llama_cpp",
    "exporter.formats.gguf.converter.location",
    "exporter.formats.gguf.converter.install",
    "exporter.formats.gguf",
    "exporter.formats.gguf.quantisation",
    "exporter.formats.gguf.converter",
    "exporter.formats.gguf.encoders",
    "exporter.formats.gguf.target",
    "exporter.formats.gguf_lora",
    "exporter.formats.onnx.weights",
    "exporter.formats.onnx.graph",
    "exporter.formats.onnx",
    "exporter.formats.onnx.trace",
    "exporter.formats.onnx.target",
    "exporter.formats.table",
    "exporter.verify",
    "exporter.verify.findings",
    "exporter.verify.report",
    "exporter.verify.tolerances",
    "exporter.verify.by_peft",
    "exporter.verify.expect",
    "exporter.verify.stored",
    "exporter.verify.values",
    "exporter.verify.folder",
    "exporter.verify.gguf",
    "exporter.verify.onnx",
    "exporter.verify.formats",
    "exporter.verify.runtimes",
    "exporter.verify.runtimes.tokens",
    "exporter.verify.options",
    "exporter.verify.running",
    "exporter.verify.tokenised",
    "exporter.verify.reports",
    "exporter.verify.run",
    "exporter.verify.request",
    "exporter.verify.patched",
    "exporter.inspection",
    "exporter.export",
    "exporter.patch.journal",
    "exporter.patch.evidence",
    "exporter.patch.rows",
    "exporter.patch.spec",
    "exporter.patch.plan",
    "exporter.patch.gguf",
    "exporter.patch.onnx",
    "exporter.patch",
    "exporter.release.facts",
    "exporter.release.documents",
    "exporter.release.tables",
    "exporter.release.spec",
    "exporter.release.jobs",
    "exporter.release.names",
    "exporter.release.making.store",
    "exporter.release.making.tools",
    "exporter.release.plan",
    "exporter.release.making",
    "exporter.release",
    "exporter.cli",
    "exporter.cli.verbs",
    "tuner.extra",
    "tuner.spec",
    "tuner.layers",
    "tuner.inputs",
    "tuner.training",
    "tuner",
    "ttexport",
)
# What a room must not know although it lies below: the checker its makers, readers and merge how files are staged, the
# tuner everything but the infrastructure.
CLOSED = {
    "exporter.verify": {"exporter.merge", "exporter.families", "exporter.formats"},
    "exporter.sources": {"exporter.io.staging"},
    "exporter.merge": {"exporter.io.staging"},
    "tuner": {
        row
        for row in LAYERS
        if row.startswith("exporter.")
        and row.split(".")[1] not in ("version", "lazy", "errors", "packages", "progress", "io")
        # Not "exporter.sources" either: closing it would close its subfolders, too.
        and row
        not in ("exporter.sources", "exporter.sources.hf", "exporter.sources.hf.by_llama_cpp", "exporter.sources.hub")
    },
}
# The one string that names the tuner, so that `ttexport tune` finds it.
DOOR_TO_TUNER = "exporter/cli/main.py"


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


FILES = sorted(path for package in ("exporter", "tuner", "ttexport") for path in (ROOT / package).rglob("*.py"))
MODULES = {module_of(path) for path in FILES}


def layer_of(module: str) -> str:
    """The row of ``module``: its own, else its folder's. Files of the root have rows of their own."""
    folder = module.rpartition(".")[0]
    row = module if module in LAYERS else folder
    if module not in MODULES or row not in LAYERS or row == "exporter" != module:
        raise LookupError(f"{module} is in no layer: give it a place in the table")
    return row


def lies_in(module: str, room: str) -> bool:
    return module == room or module.startswith(f"{room}.")


def imported(tree: ast.AST) -> Iterator[str]:
    """First-party modules that the code imports anywhere: in functions and under TYPE_CHECKING, too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import"
            # `from exporter import errors` names a module, `from exporter.errors import BadInput` does not.
            package = node.module or ""
            wholes = [f"{package}.{alias.name}" for alias in node.names]
            names = [whole if whole in MODULES else package for whole in wholes]
        else:
            continue
        yield from (name for name in names if name.split(".")[0] in FIRST_PARTY)


def faults(module: str, source: str) -> list[str]:
    mine = LAYERS.index(layer_of(module))
    closed = {room for keeper, rooms in CLOSED.items() if lies_in(module, keeper) for room in rooms}
    return [
        f"{module} imports {name}"
        for name in imported(ast.parse(source))
        if LAYERS.index(layer_of(name)) > mine or any(lies_in(name, room) for room in closed)
    ]


@pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(ROOT)) for path in FILES])
def test_imports_point_down(path: Path) -> None:
    assert faults(module_of(path), path.read_text()) == []


def test_every_row_holds_a_file() -> None:
    walked = {layer_of(module_of(path)) for path in FILES}
    assert set(LAYERS) - walked == set()


def test_a_room_is_small_enough_to_be_seen_at_a_glance() -> None:
    names = ("exporter", "tuner", "ttexport", "fixtures", "tests", "benchmarks")
    folders = {path.parent for name in names for path in (ROOT / name).rglob("*.py")}
    modules = {folder: len([path for path in folder.glob("*.py") if path.name != "__init__.py"]) for folder in folders}
    assert {folder: count for folder, count in modules.items() if count > 12} == {}


@pytest.mark.parametrize("folder", ["exporter", "tuner", "ttexport", "fixtures", "tests", "benchmarks"])
def test_a_file_is_short_enough_to_be_read_at_once(folder: str) -> None:
    lines = {path: len(path.read_text().splitlines()) for path in (ROOT / folder).rglob("*.py")}
    assert {path: count for path, count in lines.items() if count > 300} == {}


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("exporter.errors", "from exporter.tensors import cast"),
        ("exporter.tensors", "def f():\n    import exporter.sources.hf.safetensors"),
        (
            "exporter.sources.gguf.file",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from exporter import merge",
        ),
        ("exporter.sources.hf.checkpoint", "from exporter.sources.hub.locate import locate"),
        ("exporter.merge.plan", "from exporter.families.spec import Role"),
        ("exporter.merge.vocabulary.tokens", "from exporter.merge.plan import plan_merge"),
        ("exporter.verify.values.rows", "from exporter.merge.passes import ReplaceRows"),
        ("exporter.verify.run", "from exporter.formats import hf"),
        ("exporter.formats.hf.write", "from exporter.formats.table import FORMATS"),
        ("exporter.formats.onnx.weights.blocks", "from exporter.formats.onnx.graph import linear"),
        ("exporter.export.run", "from exporter.cli.text import printable"),
        ("exporter.cli.main", "import tuner.cli"),
        ("tuner.training.train", "from exporter.tensors import cast"),
        ("tuner.training.train", "from exporter.sources.gguf import file"),
        ("tuner.layers.layer", "from tuner.training.train import tune"),
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


@pytest.mark.parametrize("module", ["exporter.helpers", "exporter.newroom.file", "exporter.merge.newroom.file"])
def test_a_file_outside_the_layers_is_seen(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.test_layers.MODULES", MODULES | {module})
    with pytest.raises(LookupError, match="in no layer"):
        faults(module, "")


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
