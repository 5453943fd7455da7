"""Check the cosine and sine tables for rotary embeddings in an ONNX graph.

The rotary tables need a separate check, because a comparison of logits uses short texts and therefore only the first
rows of the tables.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

import numpy as np

from exporter.sources.onnx.file import OnnxFile
from exporter.tensors import Array
from exporter.verify.expect.reference import Reference
from exporter.verify.gguf.hyperparameters import hyperparameters
from exporter.verify.gguf.layout import generated
from exporter.verify.report import Check, Skip
from exporter.verify.tolerances import ROTARY_ABS, ROTARY_PER_RADIAN

_TABLES: Final = {"cos": np.cos, "sin": np.sin}
_KNOWN: Final = ("default", "linear", "llama3")


def is_rotary(name: str) -> bool:
    """Whether ``name`` is the name of a cosine or sine table for rotary embeddings."""
    return name.rpartition(".")[2] in ("cos_cache", "sin_cache", "cos_cached", "sin_cached")


def check_rotary(file: OnnxFile, reference: Reference) -> Iterator[Check | Skip]:
    """Compare every row of every rotary table with cosines and sines computed in float64 from the config."""
    names = [name for name in file.initialisers if is_rotary(name)]
    if not names:
        return
    config = reference.checkpoint.text_config
    known = list(_frequencies(config))
    if not known:
        yield Skip("rotary tables", "the verification does not know the frequencies for the rope type in config.json")
        return
    wrong, worst = [], 0.0
    for name in names:
        table = file.rows(name, 0, file.initialisers[name].shape[0]).astype(np.float64)
        stored = file.initialisers[name].dtype
        matching = [steps for steps in known if len(steps) == table.shape[1]]
        deviation = min((_deviation(name, table, steps, stored) for steps in matching), default=np.inf)
        worst = max(worst, deviation)
        wrong += [name] if not deviation <= 1.0 else []
    detail = (
        f"{wrong[0]}: the rotary table does not match the rope frequencies in config.json"
        if wrong
        else f"all positions of {len(names)} rotary tables match config.json"
    )
    yield Check(name="rotary tables", passed=not wrong, value=worst, limit=1.0, detail=detail)


def _deviation(name: str, table: Array, steps: Array, stored: str) -> float:
    """Return the largest deviation of an element of a rotary table, as a multiple of the element's tolerance."""
    angles = np.arange(len(table))[:, None] * steps
    function = "cos" if "cos" in name.rpartition(".")[2] else "sin"
    allowed = ROTARY_ABS[stored] + ROTARY_PER_RADIAN * angles
    return float((np.abs(table - _TABLES[function](angles)) / allowed).max())


def _frequencies(config: Mapping[str, Any]) -> Iterator[Array]:
    """Yield arrays of rotary frequencies in radians per position, with one frequency per pair of rotary dimensions.

    The first yielded array contains the rotary frequencies of layers with full attention. If the config defines a
    separate rope base for layers with a sliding window, a second array with the frequencies of these layers is yielded.
    """
    numbers = hyperparameters(config)
    dims, theta = numbers.get("rope.dimension_count"), numbers.get("rope.freq_base")
    table = config.get("rope_parameters") or config.get("rope_scaling") or {}
    table = table.get("full_attention", table)
    rope_type = table.get("rope_type", table.get("type", "default"))
    if dims is None or theta is None or rope_type not in _KNOWN:
        return
    plain = np.arange(0, dims, 2) / dims
    factor = numbers.get("rope.scaling.factor") or 1.0
    divided = next(iter(generated(config).values())).astype(np.float64) if rope_type == "llama3" else factor
    yield theta**-plain / divided
    if local := numbers.get("rope.freq_base_swa"):
        yield local**-plain
