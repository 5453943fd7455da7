from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from exporter.errors import TTExportError, UsageError
from exporter.export.inputs import option_files
from exporter.export.run import plan_export, run_export
from exporter.export.spec import ExportSpec
from exporter.formats.gguf.options import GgufOptions
from exporter.formats.gguf_lora.options import GgufLoraOptions
from exporter.formats.table import FORMATS
from exporter.progress import Hooks
from exporter.verify.options import VerifyOptions
from fixtures.hostile.cases import copies


def digests(folder: Path) -> dict[str, str]:
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.rglob("*") if path.is_file()}


def export(adapter: Path, base: Path, out: Path, fmt: str = "hf") -> None:
    spec = ExportSpec(adapters=(adapter,), base=str(base), formats=(FORMATS[fmt].options(),), out=out, force=True)
    run_export(plan_export(spec), Hooks())


@pytest.mark.parametrize(
    "out",
    [
        "base",
        "adapter",
        ".",
        "base/model.safetensors",
        "base/config.json",
        "adapter/tokenizer.json",
        "adapter/../base",
        "link/model.safetensors",
    ],
)
@pytest.mark.parametrize("named", ["base", "link"])
def test_no_force_replaces_an_input(out: str, named: str, tiny_adapter: Path, tiny_tied: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    adapter, _ = copies(tiny_adapter, tiny_tied, home)
    (home / "link").symlink_to("base")
    before = digests(home)
    with pytest.raises(TTExportError, match="an output path that overwrites no input") as caught:
        export(adapter, home / named, home / out, "gguf")
    assert isinstance(caught.value, UsageError)
    assert digests(home) == before


def test_files_that_options_name_are_inputs() -> None:
    formats = (GgufOptions(types=("Q4_K_M",), imatrix=Path("imatrix.gguf")), GgufLoraOptions())
    verify = VerifyOptions(level="full", prompts=Path("prompts.txt"), report=Path("reports"))
    assert option_files(formats, verify) == {Path("imatrix.gguf"), Path("prompts.txt")}


@pytest.mark.parametrize("option", ["converter", "prompts"])
def test_no_force_replaces_a_file_of_an_option(
    option: str, tiny_adapter: Path, tiny_tied: Path, tmp_path: Path
) -> None:
    file = tmp_path / "file"
    file.write_text("Hello.\n")
    options = GgufOptions(converter=file if option == "converter" else None)
    verify = VerifyOptions(level="full", prompts=file if option == "prompts" else None)
    spec = ExportSpec(
        adapters=(tiny_adapter,), base=str(tiny_tied), formats=(options,), verify=verify, out=file, force=True
    )
    with pytest.raises(UsageError, match="an output path that overwrites no input"):
        run_export(plan_export(spec), Hooks())
    assert file.read_text() == "Hello.\n"


def test_a_link_that_is_an_input_is_not_replaced(tiny_adapter: Path, tiny_tied: Path, tmp_path: Path) -> None:
    adapter, base = copies(tiny_adapter, tiny_tied, tmp_path)
    (tmp_path / "link").symlink_to("base")
    with pytest.raises(UsageError, match="an output path that overwrites no input"):
        export(adapter, tmp_path / "link", tmp_path / "link")
    assert (tmp_path / "link").readlink() == Path("base")
    assert base.is_dir()


def test_a_new_name_inside_the_adapter_folder_is_fine_and_may_be_replaced(
    tiny_adapter: Path, tiny_tied: Path, tmp_path: Path
) -> None:
    adapter, base = copies(tiny_adapter, tiny_tied, tmp_path)
    before = digests(adapter)
    for _ in range(2):
        export(adapter, base, adapter / "merged")
    assert (adapter / "merged" / "model.safetensors").is_file()
    assert before.items() <= digests(adapter).items()
