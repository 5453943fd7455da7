"""Check the structure of a GGUF with the encoders of images and sounds, against the config of the tuned model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from exporter.sources.gguf.file import GgufFile, general_type
from exporter.sources.gguf.types import MAGIC
from exporter.verify.expect.reference import Reference
from exporter.verify.report import Check, Report, Skip

#: GGUF key → keys of an encoder's config, of which the first that the config has counts. Source: the class MmprojModel
#: of llama.cpp's converter.
_NUMBERS: Final = {
    "embedding_length": ("hidden_size", "embed_dim"),
    "feed_forward_length": ("intermediate_size",),
    "block_count": ("num_hidden_layers", "depth", "n_layers"),
    "attention.head_count": ("num_attention_heads", "num_heads"),
    "patch_size": ("patch_size",),
}
_WHY_NOT: Final = "ttexport does not know which tensors of the checkpoint a file with encoders contains"


def is_projector(path: Path) -> bool:
    """Whether ``path`` is a GGUF file with encoders of images or sounds, without a language model."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        if file.read(len(MAGIC)) != MAGIC:
            return False
    return general_type(path) == "mmproj"


def verify_projector(path: Path, reference: Reference, level: str, say: Callable[[str], None]) -> Report:
    """Check the metadata and the tensor names of the encoders. The values of the tensors are not compared."""
    say(f"checking the encoders in {path.name}")
    file = GgufFile.open(path)
    config = reference.checkpoint.config
    checks = [_check_encoders(file, config), _check_numbers(file, reference), _check_tensors(file, reference)]
    skipped = [Skip("weights", _WHY_NOT)] if level != "rows" else []
    if level == "full":
        skipped.append(Skip("logits", "encoders can be run only together with a GGUF of the text model"))
    return Report(artifact=path, format="gguf", level=level, checks=checks, facts={}, skipped=skipped)


def _check_encoders(file: GgufFile, config: Mapping[str, Any]) -> Check:
    """Check that the file is one that llama.cpp loads as encoders, with at least one encoder of the config."""
    wrong = []
    if (name := file.metadata.get("general.architecture")) != "clip":
        wrong.append(f"general.architecture: expected clip, found {name}")
    if not isinstance(file.metadata.get("clip.projector_type"), str):
        keys = ("clip.vision.projector_type", "clip.audio.projector_type")
        wrong += [] if any(key in file.metadata for key in keys) else ["clip.projector_type: expected a name"]
    stated = {"vision": "vision_config", "audio": "audio_config"}
    present = {modality for modality in stated if file.metadata.get(f"clip.has_{modality}_encoder") is True}
    if not present:
        wrong.append("clip.has_vision_encoder: expected an encoder of images or sounds, found none")
    more = (modality for modality in sorted(present) if not config.get(stated[modality]))
    wrong += [f"clip.has_{modality}_encoder: expected no encoder, found one" for modality in more]
    detail = wrong[0] if wrong else f"the file contains the encoders of {' and '.join(sorted(present))}"
    return Check(name="encoders", passed=not wrong, value=float(len(wrong)), limit=0.0, detail=detail)


def _check_numbers(file: GgufFile, reference: Reference) -> Check:
    """Check the sizes of the encoder of images, and that the encoder gives vectors of the text model's hidden size."""
    wrong = []
    vision = reference.checkpoint.config.get("vision_config")
    if file.metadata.get("clip.has_vision_encoder") is True and isinstance(vision, dict):
        for name, keys in _NUMBERS.items():
            want = next((vision[key] for key in keys if isinstance(vision.get(key), int)), None)
            stored = file.metadata.get(f"clip.vision.{name}")
            if want is not None and stored is not None and stored != want:
                wrong.append(f"clip.vision.{name}: expected {want}, found {stored}")
        width = file.metadata.get("clip.vision.projection_dim")
        if width != reference.hidden:
            wrong.append(f"clip.vision.projection_dim: expected {reference.hidden}, found {width}")
    detail = wrong[0] if wrong else "the sizes match the tuned model's config"
    return Check(name="encoder sizes", passed=not wrong, value=float(len(wrong)), limit=0.0, detail=detail)


def _check_tensors(file: GgufFile, reference: Reference) -> Check:
    """Check that every tensor belongs to an encoder or a projector, and that every layer of the encoder has tensors."""
    wrong = [f"{name}: expected no tensor of a text model" for name in _foreign(file)]
    layers = file.metadata.get("clip.vision.block_count")
    if file.metadata.get("clip.has_vision_encoder") is True and isinstance(layers, int):
        counts = [sum(name.startswith(f"v.blk.{number}.") for name in file.tensors) for number in range(layers)]
        wrong += [f"v.blk.{number}: expected tensors, found none" for number, count in enumerate(counts) if not count]
    total = sum(spec.nbytes for spec in (tensor.spec for tensor in reference.checkpoint.tensors.values()))
    stored = sum(tensor.nbytes for tensor in file.tensors.values())
    if not file.tensors or stored > 4 * total:
        wrong.append(f"expected at most the size of the checkpoint, found {stored} bytes of tensors")
    detail = wrong[0] if wrong else f"{len(file.tensors)} tensors belong to encoders and projectors"
    return Check(name="encoder tensors", passed=not wrong, value=float(len(wrong)), limit=0.0, detail=detail)


def _foreign(file: GgufFile) -> Iterator[str]:
    return (name for name in file.tensors if name.startswith(("blk.", "token_embd.", "output.", "output_norm.")))
