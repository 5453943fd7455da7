"""Options that several verbs share, and how they become an ``ExportSpec``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from exporter.cli.sizes import size_option
from exporter.export.targets import FORMATS
from exporter.formats.target import DTYPES
from exporter.verify.runtimes.installed import NAMES

if TYPE_CHECKING:
    from exporter.export.spec import ExportSpec

_Command = TypeVar("_Command", bound=Callable[..., Any])

PATH = click.Path(path_type=Path)

require_option = click.option(
    "--require",
    multiple=True,
    type=click.Choice(NAMES),
    help="Runtime without which nothing is done: exit 6 if it is not installed. Repeatable.",
)

_EXPORT_OPTIONS = (
    click.option(
        "-o",
        "--out",
        type=PATH,
        help="File or folder to write; a folder for several artifacts. Default: here, named after the first input.",
    ),
    click.option(
        "--dtype", type=click.Choice(list(DTYPES)), help="Storage of unquantised tensors; default: as stored."
    ),
    click.option(
        "--quant",
        "quants",
        multiple=True,
        metavar="TYPE",
        help="Quantised GGUF, such as Q8_0 or Q4_K_M, a file each; int8, int4, int4-sym (no zero points) for ONNX, "
        "and by fp32, fp16, q4, q4f16, q4-sym, q4f16-sym more files in the same folder. Repeatable.",
    ),
    click.option(
        "--onnx-ops",
        type=click.Choice(["standard", "ort"]),
        default="standard",
        show_default=True,
        help="ort: fused operators that are faster, and that only ONNX Runtime has.",
    ),
    click.option("--imatrix", type=PATH, metavar="FILE", help="Importance matrix for llama.cpp's quantisations."),
    click.option("--token-embedding-type", metavar="TYPE", help="Of token_embd.weight, whatever --quant gives it."),
    click.option("--output-tensor-type", metavar="TYPE", help="Of output.weight, whatever --quant gives it."),
    click.option("--split-max-size", metavar="SIZE", help="Cut the GGUF into parts of at most so much: 2G, 500M."),
    click.option("--split-max-tensors", type=int, metavar="N", help="Cut the GGUF into parts of at most N tensors."),
    click.option(
        "--verify",
        "level",
        type=click.Choice(["auto", "full", "rows", "off"]),
        default="auto",
        show_default=True,
        help="rows: re-read the trained rows and the tie from disk. full: also run the artifact against transformers "
        "with PEFT, unmerged. auto: rows.",
    ),
    click.option("--prompts", type=PATH, help="Text file with a prompt a line, for --verify full."),
    click.option("--report", type=PATH, help="Folder for report.json, report.xml (JUnit) and report.html."),
    require_option,
    click.option("--pre-tokenizer", metavar="NAME", help="llama.cpp's name for the pre-tokenizer, if not recognised."),
    click.option(
        "--converter",
        type=PATH,
        help="llama.cpp's convert_hf_to_gguf.py, for models that no family here describes: it is run on the merged "
        "checkpoint, without network, and what it writes is verified.",
    ),
    click.option("--untie", is_flag=True, help="Give a tied head a tensor of its own."),
    size_option(
        "--memory", "memory_bytes", "Merged rows held at once while they are computed, such as 64MB; default: 256MiB."
    ),
    size_option(
        "--max-shard-size",
        "max_shard_bytes",
        "Split the weights of --to hf anew, at this size (5GB); default: as the base is split.",
    ),
    click.option("--force", is_flag=True, help="Replace an existing OUT."),
)
_TALK_OPTIONS = (
    click.option("--json", "as_json", is_flag=True, help="Print one JSON document on standard output."),
    click.option("-q", "--quiet", is_flag=True, help="No progress, no table."),
    click.option("-v", "--verbose", is_flag=True, help="A traceback with unexpected errors."),
)
to_option = click.option(
    "--to", "formats", type=click.Choice(list(FORMATS)), multiple=True, help="Format to write. Repeatable."
)
base_option = click.option(
    "--base",
    metavar="CHECKPOINT",
    help="Folder or hub id (org/name, org/name@revision); default: what the adapter names as its base.",
)


_PATCH_OPTIONS = (
    click.option("--trust-base", is_flag=True, help="Patch without a proof that BASE is the adapters' base."),
    click.option(
        "--in-place",
        is_flag=True,
        help="Change BASE itself. A journal beside it undoes a patch that was interrupted; where bytes would move, a "
        "whole new one takes its name instead.",
    ),
)


def patch_place_options(command: _Command) -> _Command:
    """Add --trust-base and --in-place."""
    return _add(command, _PATCH_OPTIONS)


def export_options(command: _Command) -> _Command:
    """Add the options of merge, export and plan."""
    return _add(command, (*_EXPORT_OPTIONS, *_TALK_OPTIONS))


def talk_options(command: _Command) -> _Command:
    """Add --json, -q and -v."""
    return _add(command, _TALK_OPTIONS)


def _add(command: _Command, options: tuple[Callable[[_Command], _Command], ...]) -> _Command:
    for option in reversed(options):
        command = option(command)
    return command


def export_spec(
    *,
    adapters: tuple[str, ...],
    base: str | None,
    formats: tuple[str, ...],
    level: str,
    prompts: Path | None,
    verbose: bool,
    **options: Any,
) -> ExportSpec:
    """The specification behind parsed options. ``auto`` verifies rows: a merge must cost what a copy costs."""
    # Here, because a patch has these options' module, too, and must not wait for the merge.
    from exporter.export.spec import ExportSpec
    from exporter.verify.running.prompts import read_prompts

    texts = tuple(read_prompts(prompts)) if prompts else ()
    return ExportSpec(
        adapters=adapters,
        base=base,
        formats=formats or ("hf",),
        level="rows" if level == "auto" else level,
        prompts=texts,
        **options,
    )
