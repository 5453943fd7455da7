"""Every option of merge in every place: as a flag, as a key of release.toml, as an argument, and in the docs."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import ttexport
from exporter.cli.options import format_groups
from exporter.cli.verbs.export import export
from exporter.cli.verbs.merge import merge
from exporter.errors import UsageError
from exporter.export.spec import MergeOptions
from exporter.formats.gguf.options import GgufOptions
from exporter.formats.hf.options import HfOptions
from exporter.formats.onnx.options import OnnxOptions
from exporter.options import Option, OptionError, Options, ValueType, as_flag, as_key
from exporter.release.spec import read_spec
from exporter.verify.options import VerifyOptions
from tests.support.options_page import PAGE, render

GROUPS: list[type[Options]] = [*format_groups(), VerifyOptions, MergeOptions]
EVERY = [(group, entry) for group in GROUPS for entry in group.options().values()]
NAMES = [f"{group.section or 'top'}.{entry.key}" for group, entry in EVERY]
#: What else a group needs so that its rules take the value.
BESIDE: dict[str, dict[str, Any]] = {
    "imatrix": {"types": ["Q4_K_M"]},
    "token-embedding-type": {"types": ["Q4_K_M"]},
    "output-tensor-type": {"types": ["Q4_K_M"]},
    "prompts": {"level": "full"},
}


def value_of(entry: Option) -> Any:
    """A value that ``entry`` takes, as TOML has it, and that is not its default."""
    texts = {"types": "Q8_0", "token-embedding-type": "Q6_K", "output-tensor-type": "F16"}
    text = {**texts, "converter-arguments": "--fuse-qkv"}.get(entry.key, "int8")
    values: dict[ValueType, Any] = {ValueType.SIZE: "2G", ValueType.COUNT: 3, ValueType.SWITCH: True}
    values[ValueType.PATH] = "some.file"
    value = values.get(entry.type, entry.choices[-1] if entry.choices else text)
    return [value] if entry.repeatable else value


def toml(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else repr(value)


@pytest.mark.parametrize(("group", "entry"), EVERY, ids=NAMES)
def test_every_option_is_a_flag_of_merge_and_export(group: type[Options], entry: Option) -> None:
    for command in (merge, export):
        page = CliRunner().invoke(command, ["--help"], terminal_width=1000).output
        assert f"{entry.flag} " in page
        assert entry.help in page


@pytest.mark.parametrize(("group", "entry"), EVERY, ids=NAMES)
def test_every_option_is_a_key_of_release_toml(group: type[Options], entry: Option, tmp_path: Path) -> None:
    keys = {**BESIDE.get(entry.key, {}), entry.key: value_of(entry)}
    lines = "".join(f"{key} = {toml(value)}\n" for key, value in keys.items())
    table = f"[{group.section}]\n{lines}" if group.section else ""
    rest = "" if issubclass(group, ttexport.HfOptions) else "[hf]\n"
    path = tmp_path / "release.toml"
    path.write_text(
        f'name = "Lamp"\nversion = "1"\nbase = "org/base"\n{"" if group.section else lines}'
        f'models.one.adapters = ["org/one"]\n{table}{rest}'
    )
    spec = read_spec(path)
    options = [*spec.formats, spec.verify, spec.merge]
    (read,) = [one for one in options if type(one) is group]
    want = group.parse({names(group)[key]: placed(group, key, value, tmp_path) for key, value in keys.items()})
    assert {key: getattr(read, names(group)[key]) for key in keys} == {
        key: getattr(want, names(group)[key]) for key in keys
    }
    assert getattr(read, entry.name) != entry_default(group, entry)


@pytest.mark.parametrize(("group", "entry"), EVERY, ids=NAMES)
def test_every_option_is_an_argument_of_a_public_class(group: type[Options], entry: Option) -> None:
    public = getattr(ttexport, group.__name__)
    assert public is group
    assert entry.name in {field.name for field in dataclasses.fields(public)}
    assert group.__name__ in ttexport.__all__


def test_every_option_is_documented_as_it_is() -> None:
    assert PAGE.read_text() == render(), "python -m tests.support.options_page writes it"


def names(group: type[Options]) -> dict[str, str]:
    return {entry.key: name for name, entry in group.options().items()}


def placed(group: type[Options], key: str, value: Any, folder: Path) -> Any:
    """Paths of a file start at its folder."""
    return folder / value if group.options()[names(group)[key]].type is ValueType.PATH else value


def entry_default(group: type[Options], entry: Option) -> Any:
    return {field.name: field.default for field in dataclasses.fields(group)}[entry.name]


@pytest.mark.parametrize(
    ("group", "values", "flag", "key"),
    [
        (
            GgufOptions,
            {"imatrix": "i"},
            "--imatrix: an importance matrix needs a quantised type below Q8_0 in --quant",
            "gguf.types",
        ),
        (
            GgufOptions,
            {"types": ["Q4_0"], "output_tensor_type": "Q9"},
            "--output-tensor-type: expected a ggml type",
            "gguf.",
        ),
        (
            GgufOptions,
            {"converter": "c", "pre_tokenizer": "p"},
            "--pre-tokenizer: this option cannot be combined with --conv",
            "gguf.conv",
        ),
        (
            GgufOptions,
            {"dtype": "f16", "types": ["f32"]},
            "--quant: expected only quantised types if --dtype is given",
            "gguf.dtype",
        ),
        (GgufOptions, {"split_max_size": "many"}, "--split-max-size: expected a size such as", "gguf.split-max-size"),
        (HfOptions, {"dtype": "f8"}, "--dtype: expected f32, f16, bf16, found 'f8'", "hf.dtype"),
        (OnnxOptions, {"precisions": ["q4", "Q4"]}, "--quant: expected each value once", "onnx.precisions"),
        (OnnxOptions, {"precisions": "q4"}, "--quant: expected a list, found 'q4'", "onnx.precisions"),
        (VerifyOptions, {"prompts": "p"}, "--prompts: needs --verify full", "verify.level full"),
        (
            VerifyOptions,
            {"level": "off", "report": "r"},
            "--report: cannot be combined with --verify off",
            "verify.level off",
        ),
        (MergeOptions, {"untie": 1}, "--untie: expected true or false, found 1", "untie"),
    ],
)
def test_a_rule_is_worded_by_the_field_and_spelled_as_flag_and_as_key(
    group: type[Options], values: dict[str, Any], flag: str, key: str
) -> None:
    with pytest.raises(OptionError) as caught:
        group.parse(values)
    assert isinstance(caught.value, UsageError)
    assert caught.value.worded(as_flag).startswith(flag)
    assert key in caught.value.worded(as_key)
    assert "--" not in caught.value.worded(as_key)


def test_one_group_asks_for_one_artifact_a_type_and_leaves_out_what_it_does_not_use() -> None:
    options = GgufOptions(types=("BF16", "q8_0", "Q4_K_M"), imatrix=Path("i"), token_embedding_type="q6_k")
    plain, q8, q4 = options.artifacts()
    assert plain == GgufOptions(types=("bf16",))
    assert q8 == GgufOptions(types=("Q8_0",), token_embedding_type="Q6_K")
    assert q4 == GgufOptions(types=("Q4_K_M",), imatrix=Path("i"), token_embedding_type="Q6_K")
    assert GgufOptions().artifacts() == (GgufOptions(),)


@pytest.mark.parametrize("verb", ["merge", "export"])
def test_a_flag_that_no_chosen_format_has_is_refused(verb: str, tmp_path: Path) -> None:
    from exporter.cli.main import run

    for flag, value, formats in (("--onnx-ops", "ort", ["gguf"]), ("--quant", "Q8_0", ["hf"])):
        to = [word for fmt in formats for word in ("--to", fmt)]
        assert run([verb, str(tmp_path), *to, flag, value]) == 2


def test_options_that_do_nothing_in_a_plan_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from exporter.cli.main import run

    for flag in ("--verify=full", "--prompts=x", "--report=x", "--force"):
        assert run(["plan", str(tmp_path), flag]) == 2
        assert flag.partition("=")[0] in capsys.readouterr().err
