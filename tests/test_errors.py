from __future__ import annotations

import errno
import inspect
import json
import pickle
import re
from pathlib import Path

import pytest

from exporter import errors
from exporter.cli.main import run
from exporter.errors import (
    BadInput,
    LedgerError,
    MissingDependency,
    NotEquivalent,
    NotExpressible,
    OutputError,
    TensorMismatch,
    TTExportError,
    UnreadableFile,
    UsageError,
    in_tensor,
    reading,
    writing,
)

CLASSES = [value for _, value in inspect.getmembers(errors, inspect.isclass) if issubclass(value, TTExportError)]


def drawn() -> dict[str, tuple[str, int | None]]:
    """The tree of the module's docstring: class name → (parent's name, exit code if given)."""
    assert errors.__doc__
    tree: dict[str, tuple[str, int | None]] = {}
    stack: list[tuple[int, str]] = []
    for line in errors.__doc__.splitlines():
        if match := re.match(r"^([ │├└─]*)(\w+) {2,}(?:(\d) )?", line):
            depth, name, code = len(match[1]), match[2], match[3]
            stack = [entry for entry in stack if entry[0] < depth]
            tree[name] = (stack[-1][1] if stack else "Exception", int(code) if code else None)
            stack.append((depth, name))
    return tree


def test_the_drawn_tree_is_the_tree() -> None:
    tree = drawn()
    assert tree.keys() == {cls.__name__ for cls in CLASSES}
    for cls in CLASSES:
        parent, code = tree[cls.__name__]
        assert cls.__base__ is not None
        assert parent == cls.__base__.__name__
        assert code is None or code == cls.exit_code


def test_exit_codes_are_the_contract() -> None:
    contract = {UsageError: 2, NotEquivalent: 3, BadInput: 4, NotExpressible: 5, MissingDependency: 6, OutputError: 7}
    assert TTExportError.exit_code == 1
    for cls in CLASSES:
        branch = next((code for root, code in contract.items() if issubclass(cls, root)), 1)
        assert cls.exit_code == branch


def test_a_mismatch_names_file_tensor_expected_and_found() -> None:
    error = TensorMismatch("a/b.safetensors", "embed", expected="width 64", found=56, hint="another base")
    assert str(error) == "a/b.safetensors: embed: expected width 64, found 56 (another base)"
    assert (error.path, error.tensor, error.expected, error.found) == (Path("a/b.safetensors"), "embed", "width 64", 56)
    ledger = LedgerError("f", "t", expected="one rule", found="none")
    assert str(ledger) == "f: t: expected one rule, found none"


def test_not_expressible_names_an_alternative() -> None:
    assert str(NotExpressible("gguf", "no slot for it")) == "gguf: no slot for it"
    assert str(NotExpressible("gguf", "no slot for it", instead="use hf")) == "gguf: no slot for it; use hf"
    missing = MissingDependency("llama_cpp", needed_for="--runtime", install="ttexport[llamacpp]")
    assert "pip install 'ttexport[llamacpp]'" in str(missing)


@pytest.mark.parametrize(
    "error",
    [
        UsageError("a line"),
        BadInput("a line", path="a/b"),
        NotEquivalent("hf: not equivalent", {"passed": False}),
        UnreadableFile("a/b", "cut short"),
        TensorMismatch("a/b", "embed", expected=64, found=56, hint="another base"),
        LedgerError("f", "t", expected="one rule", found="none"),
        NotExpressible("gguf", "no slot for it", instead="use hf"),
        MissingDependency("ray", needed_for="--ray", install="ttexport[ray]"),
        OutputError("out", "no space left"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_error_keeps_its_attributes_between_processes(error: TTExportError) -> None:
    copy = pickle.loads(pickle.dumps(error))
    assert (type(copy), str(copy), vars(copy)) == (type(error), str(error), vars(error))


@pytest.mark.parametrize(
    ("number", "message"), [(errno.ENOENT, "no such file"), (errno.EACCES, "Permission denied"), (errno.EIO, "error")]
)
def test_an_os_error_of_an_input_names_the_file(number: int, message: str) -> None:
    with pytest.raises(UnreadableFile, match=message) as caught, reading(Path("in.json")):
        raise OSError(number, __import__("os").strerror(number))
    assert str(caught.value).startswith("in.json: ")
    assert isinstance(caught.value.__cause__, OSError)


def test_an_error_of_values_gets_file_and_tensor_once() -> None:
    with pytest.raises(BadInput) as caught, in_tensor(Path("out"), "outer"), in_tensor(Path("in"), "embed"):
        raise BadInput("rows 0 to 1: found NaN")
    assert (str(caught.value), caught.value.path) == ("in: embed: rows 0 to 1: found NaN", Path("in"))
    with pytest.raises(UnreadableFile, match=r"^a/b: cut short$"), in_tensor(Path("in"), "embed"):
        raise UnreadableFile("a/b", "cut short")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_named_in_the_message(number: int) -> None:
    with pytest.raises(OutputError, match=r"^out: no space left on the device$"), writing(Path("out")):
        raise OSError(number, "whatever")


def test_other_errors_pass_both_translations_unchanged() -> None:
    for translate in (reading, writing):
        with pytest.raises(BadInput, match="mine"), translate(Path("x")):
            raise BadInput("mine")


def test_the_command_line_turns_an_error_into_one_line_and_its_code(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = tmp_path / "two\nlines"
    code = run(["inspect", str(missing), "--json"])
    out, err = capsys.readouterr()
    assert code == BadInput.exit_code
    assert err.count("\n") == 1
    assert "Traceback" not in err
    assert json.loads(out)["error"]["exit_code"] == code
