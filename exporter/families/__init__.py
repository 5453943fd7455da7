"""The table of families. A family is one file, one row here, one fixture."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from exporter.errors import NotExpressible
from exporter.families import llama
from exporter.families.spec import DecoderSpec, Family


def _by_type(*families: Family) -> dict[str, Family]:
    table = {family.model_type: family for family in families}
    assert len(table) == len(families), "a model_type stands twice in the table"
    return table


FAMILIES: Final[Mapping[str, Family]] = _by_type(
    Family("llama", llama.describe),
)


def describe(config: Mapping[str, Any], target: str) -> DecoderSpec:
    """The decoder that ``config`` (a parsed config.json) describes, for ``target`` ("gguf", "onnx").

    Raises NotExpressible for a model_type without a family, BadInput for a broken config.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise NotExpressible(
            target,
            f"model_type {model_type!r} has no family here (known: {', '.join(FAMILIES)})",
            instead="merge with --to hf and convert the result with the target's own tools",
        )
    return FAMILIES[model_type].describe(config)
