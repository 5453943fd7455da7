"""The table of output formats, in the order in which the formats are written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Final

from exporter.errors import NotExpressible
from exporter.formats.gguf.options import GgufOptions
from exporter.formats.gguf.usage import gguf_usage
from exporter.formats.gguf_lora.options import GgufLoraOptions
from exporter.formats.gguf_lora.usage import gguf_lora_usage
from exporter.formats.hf.options import HfOptions
from exporter.formats.hf.usage import checkpoint_usage
from exporter.formats.onnx.options import OnnxOptions
from exporter.formats.onnx.usage import onnx_usage
from exporter.formats.target import FormatOptions, Target
from exporter.formats.usage import UsageOf
from exporter.io.parallel import Budget
from exporter.sources.hf.full_precision import require_convertible

if TYPE_CHECKING:
    from exporter.merge.plan import MergePlan


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """Properties of an output format that the commands of ttexport use.

    options: the format's options class, whose attribute ``section`` is the format's name. planner: the function that
    plans an artifact, given as ``module:function``; the module is imported on first use. file: a template for the file
    name of a run's only artifact, with the placeholders ``{name}`` (the model's name) and ``{storage}`` (the dtype or
    quantisation). place: a template, with the placeholders of ``file``, for the path of the artifact in a folder with
    several artifacts. patchable: whether ``ttexport patch`` accepts the format's artifacts. adapter_only: whether an
    artifact contains the adapter without the base. keeps_quantisation: whether an artifact can contain a quantised
    base's matrices in their quantised form. library, tags: the values of ``library_name`` and ``tags`` in the metadata
    of a model card. usage: a function that returns the usage examples for a model card.
    """

    options: type[FormatOptions]
    planner: str
    file: str
    place: str
    patchable: bool = False
    adapter_only: bool = False
    keeps_quantisation: bool = False
    library: str
    tags: tuple[str, ...] = ()
    usage: UsageOf

    @property
    def name(self) -> str:
        """The format's name, as given to ``--to``."""
        return self.options.section

    @property
    def is_file(self) -> bool:
        """Whether an artifact of the format is a file rather than a folder."""
        return bool(Path(self.file).suffix)


def _by_name(*rows: Format) -> Mapping[str, Format]:
    table = {row.name: row for row in rows}
    assert len(table) == len(rows), "expected unique names of output formats, found a duplicate name"
    return table


FORMATS: Final = _by_name(
    Format(
        options=HfOptions,
        planner="exporter.formats.hf.target:plan_target",
        file="{name}-hf",
        place="hf",
        keeps_quantisation=True,
        library="transformers",
        usage=checkpoint_usage,
    ),
    Format(
        options=GgufOptions,
        planner="exporter.formats.gguf.target:plan_target",
        file="{name}-{storage}.gguf",
        place="gguf/{name}-{storage}.gguf",
        patchable=True,
        library="gguf",
        tags=("gguf",),
        usage=gguf_usage,
    ),
    Format(
        options=GgufLoraOptions,
        planner="exporter.formats.gguf_lora.target:plan_target",
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
        library="transformers.js",
        tags=("onnx",),
        usage=onnx_usage,
    ),
)


def plan_target(options: FormatOptions, merge: MergePlan, budget: Budget) -> Target:
    """Plan the artifact described by ``options``, which must be an element of ``FormatOptions.artifacts()``.

    The function reads tensor shapes only, no weights. If the format cannot represent the model, the field ``refusal``
    of the returned target contains the error. Raises BadInput for invalid inputs.
    """
    row = FORMATS[options.section]
    module, _, function = row.planner.partition(":")
    try:
        if not row.keeps_quantisation:
            require_convertible(merge.checkpoint, row.name)
        target: Target = getattr(import_module(module), function)(options, merge, budget)
    except NotExpressible as refusal:
        return Target(format=options.section, storage=options.label, refusal=refusal)
    return target
