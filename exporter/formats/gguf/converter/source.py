"""Read from the converter's Python source code, without importing it, what the converter needs for a model.

llama.cpp's converter consists of a script and of the package ``conversion`` beside the script. The dict
``TEXT_MODEL_MAP`` of the package maps each supported architecture to a module, and a class of the module is registered
for the architecture. Older scripts have no package; for these scripts, nothing is known before the script runs.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

from exporter.errors import UnreadableFile, reading

_PACKAGE: Final = "conversion"
#: Tables from architectures to modules, for text models and for encoders of images and sounds.
TEXT_MODELS: Final = "TEXT_MODEL_MAP"
PROJECTORS: Final = "MMPROJ_MODEL_MAP"
_SENTENCEPIECE: Final = "_set_vocab_sentencepiece"


@dataclass(frozen=True)
class ModelClass:
    """Facts about the class of the converter that converts an architecture.

    skips_prediction_layers: whether the option ``--no-mtp`` is supported. reads_sentencepiece: whether the class reads
    the file ``tokenizer.model`` if the file exists. needs_sentencepiece: whether the class cannot do without that file.
    """

    skips_prediction_layers: bool
    reads_sentencepiece: bool
    needs_sentencepiece: bool


def text_architecture(config: Mapping[str, Any]) -> str | None:
    """Return the architecture for which the converter looks up a class, or None if the config names none.

    Source: the function ``get_model_architecture`` of the converter.
    """
    nested = config.get("text_config")
    for table in (nested if isinstance(nested, dict) else {}, config):
        names = table.get("architectures")
        if isinstance(names, list) and names and isinstance(names[0], str):
            return names[0]
    return None


@lru_cache(maxsize=4)
def architectures(script: Path, table_name: str = TEXT_MODELS) -> Mapping[str, str] | None:
    """Map the architectures in the table ``table_name`` of the converter ``script`` to their modules.

    Returns None if the script has no table of architectures. Raises UnreadableFile if the table cannot be parsed.
    """
    path = script.parent / _PACKAGE / "__init__.py"
    if not path.is_file():
        return None
    for node in _parse(path).body:
        match node:
            case ast.AnnAssign(target=ast.Name(id=name), value=ast.Dict() as table) if name == table_name:
                return {str(key): str(module) for key, module in ast.literal_eval(table).items()}
    return None


@lru_cache(maxsize=64)
def model_class(script: Path, architecture: str) -> ModelClass | None:
    """Return facts about the class for ``architecture``, or None if the source code does not tell.

    Raises UnreadableFile if a module of the converter cannot be parsed.
    """
    module = (architectures(script) or {}).get(architecture)
    if module is None:
        return None
    folder = script.parent / _PACKAGE
    registered = (node for node in _classes(folder, module).values() if _is_registered(node, architecture))
    if (made := next(registered, None)) is None:
        return None
    lineage = list(_lineage(folder, module, made.name))
    vocabulary = next((step for node in lineage for step in node.body if _is_function(step, "set_vocab")), None)
    text = ast.unparse(vocabulary) if vocabulary else ""
    return ModelClass(
        next((flag for node in lineage for flag in _flags(node, "supports_mtp_export")), False),
        _SENTENCEPIECE in text,
        isinstance(vocabulary, ast.FunctionDef) and any(_is_call(step, _SENTENCEPIECE) for step in vocabulary.body),
    )


@lru_cache(maxsize=64)
def _parse(path: Path) -> ast.Module:
    try:
        with reading(path):
            return ast.parse(path.read_bytes())
    except (SyntaxError, ValueError) as exc:
        raise UnreadableFile(path, f"expected Python source code of llama.cpp's converter: {exc}") from exc


def _classes(folder: Path, module: str) -> dict[str, ast.ClassDef]:
    path = folder / f"{module}.py"
    body = _parse(path).body if path.is_file() else []
    return {node.name: node for node in body if isinstance(node, ast.ClassDef)}


def _lineage(folder: Path, module: str, name: str) -> Iterator[ast.ClassDef]:
    """Yield the class ``name`` and its bases, depth first, which is the order in which simple classes inherit."""
    node = _classes(folder, module).get(name)
    if node is None:
        for step in _parse(folder / f"{module}.py").body:
            if isinstance(step, ast.ImportFrom) and step.level and step.module and _imports(step, name):
                yield from _lineage(folder, step.module, name)
        return
    yield node
    for base in node.bases:
        if isinstance(base, ast.Name):
            yield from _lineage(folder, module, base.id)


def _imports(node: ast.ImportFrom, name: str) -> bool:
    return any(alias.name == name for alias in node.names)


def _is_registered(node: ast.ClassDef, architecture: str) -> bool:
    calls = [step for step in node.decorator_list if isinstance(step, ast.Call)]
    registering = [call for call in calls if isinstance(call.func, ast.Attribute) and call.func.attr == "register"]
    names = [argument for call in registering for argument in call.args]
    return any(isinstance(name, ast.Constant) and name.value == architecture for name in names)


def _is_function(node: ast.stmt, name: str) -> bool:
    return isinstance(node, ast.FunctionDef) and node.name == name


def _is_call(node: ast.stmt, method: str) -> bool:
    call = node.value if isinstance(node, ast.Expr) else None
    return isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.func.attr == method


def _flags(node: ast.ClassDef, name: str) -> Iterator[bool]:
    """Yield the value that the class body gives the attribute ``name``, if it does."""
    for step in node.body:
        targets = (
            step.targets if isinstance(step, ast.Assign) else [step.target] if isinstance(step, ast.AnnAssign) else []
        )
        value = step.value if isinstance(step, ast.Assign | ast.AnnAssign) else None
        named = any(isinstance(target, ast.Name) and target.id == name for target in targets)
        if named and isinstance(value, ast.Constant):
            yield bool(value.value)
