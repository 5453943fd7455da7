"""Which heavy packages a file or a function imports, read from its code: nothing is imported to find out."""

from __future__ import annotations

import ast
import dis
from collections.abc import Callable, Collection, Iterable, Iterator
from functools import cache
from inspect import unwrap
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any, Final

from tests.tiers.guard.sitecustomize import HEAVY

ROOT: Final = Path(__file__).parents[2]
_FIRST_PARTY: Final = ("benchmarks", "exporter", "fixtures", "tests", "tuner")
_HELPERS: Final = ("fixtures", "tests")
#: Modules of other packages that import one of HEAVY.
_THROUGH: Final = ("accelerate", "safetensors.torch")

#: Modules that start processes: a start of Python takes longer than most quick tests.
_PROCESSES: Final = ("multiprocessing", "subprocess")

#: Modules in the order of the imports, the heavy one last; empty where nothing heavy is imported.
Chain = tuple[str, ...]


@cache
def heavy_file(path: Path) -> Chain:
    """What importing the file ``path`` leads to. Imports in functions and under TYPE_CHECKING do not happen then."""
    return _search(_at_import(path))


@cache
def heavy_function(function: Callable[..., Any]) -> Chain:
    """What a call of ``function`` leads to, through its own imports and the helpers that it names.

    Helpers are functions, and classes with all their methods, of tests and fixtures. The start of a process counts as
    heavy. Imports that shipped code makes when it is called are not followed: every command can make each of them.
    """
    todo, seen = list(_functions(function)), set()
    while todo:
        called = todo.pop()
        if called in seen:
            continue
        seen.add(called)
        named = {name: called.__globals__.get(name) for code in _codes(called.__code__) for name in code.co_names}
        processes = sorted(name for name, value in named.items() if name == "fork" or _is_of(value, _PROCESSES))
        if chain := _search(_in_code(called.__code__)) or tuple(processes[:1]):
            return (f"{called.__module__}.{called.__qualname__}", *chain)
        todo += [method for value in named.values() if _is_of(value, _HELPERS) for method in _functions(value)]
    return ()


def _is_of(value: object, packages: Collection[str]) -> bool:
    """Whether ``value`` is one of these modules, or a function or class of one."""
    name = getattr(value, "__name__", "") if isinstance(value, ModuleType) else getattr(value, "__module__", "")
    return str(name).partition(".")[0] in packages


def _functions(value: object) -> Iterator[FunctionType]:
    """The function itself, without decorators; of a class, its methods."""
    unwrapped = unwrap(value) if callable(value) else value
    if isinstance(unwrapped, FunctionType):
        yield unwrapped
    elif isinstance(unwrapped, type):
        yield from (member for member in vars(unwrapped).values() if isinstance(member, FunctionType))


def _search(names: Iterable[str]) -> Chain:
    """Breadth first, so that the chain is a shortest one."""
    chains: dict[str, Chain] = {name: (name,) for name in sorted(names)}
    todo = list(chains)
    for name in todo:  # grows
        if any(name == heavy or name.startswith(f"{heavy}.") for heavy in (*HEAVY, *_THROUGH)):
            return chains[name]
        new = [found for path in _files(name) for found in sorted(_at_import(path)) if found not in chains]
        chains |= {found: (*chains[name], found) for found in new}
        todo += dict.fromkeys(new)
    return ()


def sources(module: str) -> list[Path]:
    """The first-party files that are executed to import ``module``, sorted."""
    names = [module]
    files: dict[Path, None] = {}
    for name in names:  # grows
        new = [path for path in _files(name) if path not in files]
        files |= dict.fromkeys(new)
        names += [imported for path in new for imported in sorted(_at_import(path))]
    return sorted(files)


@cache
def _files(name: str) -> tuple[Path, ...]:
    """The first-party files that are executed to import ``name``: those of its packages, too."""
    parts = name.split(".")
    if parts[0] not in _FIRST_PARTY:
        return ()
    places = [ROOT.joinpath(*parts[:count]) for count in range(1, len(parts) + 1)]
    return tuple(
        file for place in places for file in (place.with_suffix(".py"), place / "__init__.py") if file.is_file()
    )


@cache
def _at_import(path: Path) -> frozenset[str]:
    """Names of modules in the imports that run with the file; of ``from a import b`` both a and a.b."""
    return frozenset(
        name
        for node in _executed(ast.parse(path.read_text(encoding="utf-8")))
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)]
            if isinstance(node, ast.ImportFrom)
            else ()
        )
    )


def _executed(node: ast.AST) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
            continue
        yield child
        yield from _executed(child)


def _codes(code: CodeType) -> Iterator[CodeType]:
    """``code`` and that of the functions in it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)


def _in_code(code: CodeType) -> Iterator[str]:
    for one in _codes(code):
        module = ""
        for instruction in dis.get_instructions(one):
            if instruction.opname == "IMPORT_NAME":
                module = str(instruction.argval)
                yield module
            elif instruction.opname == "IMPORT_FROM":
                yield f"{module}.{instruction.argval}"
        if {"importorskip", "import_module"}.intersection(one.co_names):
            yield from (constant for constant in one.co_consts if isinstance(constant, str))
