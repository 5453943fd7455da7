"""Check before a conversion what llama.cpp's converter needs for a model, and choose the options that the model needs.

Everything here is known from the config, the names of the tensors and the converter's source code.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

from exporter.errors import BadInput, NotExpressible
from exporter.formats.gguf.converter.source import architectures, model_class, text_architecture
from exporter.merge.model import MergedModel
from exporter.packages import Requirement

#: Packages that every run of the converter imports.
_PACKAGES: Final = Requirement(("torch", "transformers", "yaml"), "torch, transformers and PyYAML", "ttexport")
_SENTENCEPIECE: Final = Requirement(("sentencepiece",), "sentencepiece", "sentencepiece")
_TOKENIZER_MODEL: Final = "tokenizer.model"
#: The converter's option for models without their extra prediction layers.
WITHOUT_PREDICTION_LAYERS: Final = "--no-mtp"
#: Options of the converter that contradict the option above, or repeat it.
_CHOSEN: Final = ("--mtp", "--no-mtp", "--no-nextn", "--dspark")
_PREDICTION: Final = re.compile(r"(^|\.)(mtp|nextn)([._]|$)")
_LAYER: Final = re.compile(r"(?:^|\.)layers\.(\d+)\.")


def required_arguments(script: Path, model: MergedModel, given: Iterable[str]) -> tuple[str, ...]:
    """Check what the converter ``script`` needs for ``model``, and return the options that the model needs.

    given: the options that the user passes to the converter.
    Raises NotExpressible if the converter does not support the architecture, MissingDependency if a Python package is
    missing, and BadInput if the checkpoint lacks a file of the tokenizer.
    """
    require_packages()
    architecture = text_architecture(model.config)
    known = architectures(script)
    if known is None or architecture is None:
        return ()
    if architecture not in known:
        raise NotExpressible(
            f"gguf: {model.path}",
            f"llama.cpp's converter does not support the architecture {architecture}",
            instead="use --to hf to keep the checkpoint's format, or ttexport patch to write token rows into an "
            "existing GGUF",
        )
    made = model_class(script, architecture)
    if made is None:
        return ()
    has_model = _TOKENIZER_MODEL in model.files
    if made.needs_sentencepiece and not has_model:
        raise BadInput(
            f"{model.path}: {_TOKENIZER_MODEL}: expected the file, which llama.cpp's converter needs for "
            f"{architecture}, found none; copy the file from the published model",
            path=model.path,
        )
    if made.reads_sentencepiece and has_model:
        _SENTENCEPIECE.require(f"llama.cpp's converter for {architecture} with {_TOKENIZER_MODEL}")
    chosen = any(argument in _CHOSEN for argument in given)
    if made.skips_prediction_layers and not chosen and not has_prediction_layers(model.config, model.tensors):
        return (WITHOUT_PREDICTION_LAYERS,)
    return ()


def require_packages() -> None:
    """Raise MissingDependency if a package that every run of the converter imports is missing."""
    _PACKAGES.require("llama.cpp's converter")


def has_prediction_layers(config: Mapping[str, Any], names: Iterable[str]) -> bool:
    """Whether tensors of extra prediction layers are among ``names``.

    The tensors have names with ``mtp`` or ``nextn``, or belong to a layer whose number is at least the number of hidden
    layers. transformers drops such tensors when a model is loaded and saved again.
    """
    nested = config.get("text_config")
    tables = (nested if isinstance(nested, dict) else {}, config)
    count = next((table["num_hidden_layers"] for table in tables if "num_hidden_layers" in table), None)
    for name in names:
        layer = _LAYER.search(name)
        if _PREDICTION.search(name) or (layer and isinstance(count, int) and int(layer[1]) >= count):
            return True
    return False
