"""The table of formats, in the order in which the formats are written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Final

from exporter.errors import NotExpressible
from exporter.formats.gguf.options import GgufLoraOptions, GgufOptions
from exporter.formats.hf.options import HfOptions
from exporter.formats.onnx.options import OnnxOptions
from exporter.formats.target import FormatOptions, Target
from exporter.formats.usage import UsageOf, checkpoint_usage, gguf_lora_usage, gguf_usage, onnx_usage
from exporter.io.parallel import Budget

if TYPE_CHECKING:
    from exporter.merge.plan import MergePlan


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """Properties of a format that the command-line verbs use.

    options: the format's options class; the class's section is the format's name. planner: the module and the function
    that turn a group of options and a merge into a ``Target``; the module is imported on first use. file: the file name
    of an artifact written alone, with the placeholders ``{name}`` (of the model) and ``{storage}``. place: the path of
    an artifact in a folder of several artifacts, with the same placeholders. patchable: ``ttexport patch`` accepts the
    format's artifacts. runtimes: the runtimes that a verification runs the artifacts with. adapter_only: an artifact
    contains the adapter without the base. library, tags: metadata of model cards on the Hugging Face hub. usage: makes
    the usage examples of a model card.
    """

    options: type[FormatOptions]
    planner: str
    file: str
    place: str
    patchable: bool = False
    runtimes: tuple[str, ...] = ()
    adapter_only: bool = False
    library: str
    tags: tuple[str, ...] = ()
    usage: UsageOf

    @property
    def name(self) -> str:
        """The format's name, as given to ``--to``."""
        return self.options.section

    @property
    def is_file(self) -> bool:
        """Whether an artifact is a file, not a folder."""
        return bool(Path(self.file).suffix)


def _by_name(*rows: Format) -> Mapping[str, Format]:
    table = {row.name: row for row in rows}
    assert len(table) == len(rows), "two formats have the same name"
    return table


FORMATS: Final = _by_name(
    Format(
        options=HfOptions,
        planner="exporter.formats.hf.target:plan_target",
        file="{name}-hf",
        place="hf",
        runtimes=("transformers",),
        library="transformers",
        usage=checkpoint_usage,
    ),
    Format(
        options=GgufOptions,
        planner="exporter.formats.gguf.target:plan_target",
        file="{name}-{storage}.gguf",
        place="gguf/{name}-{storage}.gguf",
        patchable=True,
        runtimes=("llama.cpp", "transformers-gguf"),
        library="gguf",
        tags=("gguf",),
        usage=gguf_usage,
    ),
    Format(
        options=GgufLoraOptions,
        planner="exporter.formats.gguf.target:plan_lora_target",
        file="{name}-lora.gguf",
        place="gguf-lora/{name}.gguf",
        adapter_only=True,
        library="gguf",
        tags=("gguf", "lora"),
        usage=gguf_lora_usage,
    ),
    Format(
        options=OnnxOptions,
        planner="exporter.formats.onnx.target:plan_target",
        file="{name}-onnx",
        place="onnx",
        patchable=True,
        runtimes=("onnxruntime",),
        library="transformers.js",
        tags=("onnx",),
        usage=onnx_usage,
    ),
)


def plan_target(options: FormatOptions, merge: MergePlan, budget: Budget) -> Target:
    """Lay out the artifact of ``options``, an element of ``FormatOptions.artifacts()``. Reads tensor shapes only.

    If the format cannot represent the model, the target has a ``refusal``. Raises BadInput for invalid inputs.
    """
    module, _, function = FORMATS[options.section].planner.partition(":")
    try:
        target: Target = getattr(import_module(module), function)(options, merge, budget)
    except NotExpressible as refusal:
        return Target(format=options.section, storage=options.label, refusal=refusal)
    return target
