"""Plan the file ``mmproj-NAME.gguf``: the encoders of images and sounds, which llama.cpp loads beside a GGUF.

llama.cpp's converter writes the file with the option ``--mmproj``, from the overlay of the merged checkpoint.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from exporter.errors import NotExpressible, UnreadableFile
from exporter.formats.gguf.converter.location import script_of
from exporter.formats.gguf.converter.needs import require_packages
from exporter.formats.gguf.converter.overlay import plan_overlay
from exporter.formats.gguf.converter.plan import ConverterLayout
from exporter.formats.gguf.converter.run import Conversion
from exporter.formats.gguf.converter.source import PROJECTORS, architectures
from exporter.formats.gguf.in_llama_cpp.general_name import general_name
from exporter.io.parallel import Budget
from exporter.merge.model import MergedModel
from exporter.merge.plan import MergePlan

#: Parts of a config that describe an encoder of images or sounds.
_ENCODERS: Final = ("vision_config", "audio_config", "whisper_config")
#: Names of the tensors of a text model, as stored in a checkpoint with encoders.
_TEXT: Final = re.compile(r"(^|\.)(language_model|text_model|lm_head)\.|^(model\.)?(layers|embed_tokens|norm)\.")


def plan_projector(
    merge: MergePlan, converter: Path, ftype: str, *, arguments: Sequence[str] = (), budget: Budget | None = None
) -> ConverterLayout:
    """Plan the encoders of a model in the file type ``ftype`` (F32, F16, BF16 or Q8_0). Reads tensor shapes only.

    converter: llama.cpp's script, or a folder with the script. arguments: options that the user passes to the script.
    Raises NotExpressible if the model has no encoder or if the converter does not support the encoder, UnreadableFile
    if the script does not exist, and MissingDependency if a Python package is missing.
    """
    script = script_of(converter)
    if not script.is_file():
        raise UnreadableFile(script, "expected llama.cpp's convert_hf_to_gguf.py, but the file does not exist")
    model = merge.model(None, budget)
    if not any(isinstance(model.config.get(name), dict) for name in _ENCODERS):
        raise NotExpressible(
            f"gguf: {model.path}", f"--mmproj: the config has none of {', '.join(_ENCODERS)}", instead="omit --mmproj"
        )
    require_packages()
    architecture = _architecture(model.config)
    known = architectures(script.resolve(), PROJECTORS)
    if known is not None and architecture not in known:
        reason = f"--mmproj: llama.cpp's converter does not support the encoders of {architecture}"
        raise NotExpressible(f"gguf: {model.path}", reason, instead="omit --mmproj to write the text model alone")
    conversion = Conversion(script.resolve(), ftype, ("--mmproj", *arguments), model.path, str(architecture))
    return ConverterLayout(plan_overlay(model, model), conversion, (), general_name(model.path, model.files))


def projector_nbytes(model: MergedModel) -> int:
    """Estimate the size in bytes of the encoders: the tensors of ``model`` without those of the text model."""
    return sum(spec.nbytes for name, spec in model.specs.items() if not _TEXT.search(name))


def _architecture(config: Mapping[str, Any]) -> str | None:
    """Return the architecture for which the converter looks up a class, or None if the config names none.

    Source: the function ``get_model_architecture`` of the converter.
    """
    vision = config.get("vision_config")
    for table in (vision if isinstance(vision, dict) else {}, config):
        names = table.get("architectures")
        if isinstance(names, list) and names and isinstance(names[0], str):
            return names[0]
    return None
