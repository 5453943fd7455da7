"""Choose the runtime and the run modes for an artifact, and the rounding of the reference model."""

from __future__ import annotations

from typing import Final

from exporter.verify.expect.reference import Reference
from exporter.verify.report import Skip
from exporter.verify.running import gguf_loader
from exporter.verify.runtimes.installed import installed, missing
from exporter.verify.stored.artifact import Artifact
from exporter.verify.values.rows import rounded_before

HALVES: Final = ("F16", "BF16")


def greedy_must_match(artifact: Artifact) -> bool:
    """Whether greedy decoding with the artifact must choose the same tokens as with the reference model.

    For checkpoints and float32 files, greedily decoded tokens must equal the reference's tokens. With a 16-bit GGUF
    file, llama.cpp rounds activations to the file's 16-bit type, so greedily decoded tokens may differ.
    """
    return (artifact.storage == "F32" and not artifact.quantised) or artifact.format == "hf"


def reference_rounding(artifact: Artifact, reference: Reference) -> str:
    """Return the rounding for the reference model: a dtype, followed by " whole" if norms and biases are rounded too.

    In a 16-bit checkpoint, norms and biases are rounded to 16 bits like the matrices. In a GGUF file, norms and biases
    remain in float32.
    """
    if artifact.quantised:
        return "F32"
    if dtype := rounded_before(artifact, reference):
        return f"{dtype} whole"
    whole = artifact.format == "hf" and artifact.storage in HALVES
    return f"{artifact.storage} whole" if whole else artifact.storage


def graph_modes(artifact: Artifact) -> tuple[list[str], list[Skip]]:
    """Return the run modes that the inputs of an ONNX graph support, and a Skip for each unsupported run mode.

    ONNX graphs support different run modes, because export tools declare different graph inputs.
    """
    if artifact.encoder_embedding:
        return ["full", "cached", "right-padded"], []
    modes, skipped = ["full"], []
    if any(name.startswith("past_key_values.") for name in artifact.inputs):
        modes.append("cached")
    else:
        skipped.append(Skip("logits with cache", f"{artifact.path.name} has no past_key_values inputs"))
    if "attention_mask" in artifact.inputs:
        modes.append("padded" if "position_ids" in artifact.inputs else "right-padded")
    else:
        skipped.append(Skip("logits of a padded batch", f"{artifact.path.name} has no attention_mask input"))
    return modes, skipped


def choose_runtime(artifact: Artifact, reference: Reference) -> str:
    """Return the name of the module in ``exporter.verify.runtimes`` that runs ``artifact``.

    Raises MissingDependency if ``artifact`` is a GGUF file and no installed runtime can run the file.
    """
    if artifact.format == "onnx":
        return "onnx_seq2seq" if artifact.encoder_embedding else "onnx_runtime"
    return "merged" if artifact.format == "hf" else _gguf_runtime(artifact, reference)


def _gguf_runtime(artifact: Artifact, reference: Reference) -> str:
    """Return the runtime for GGUF files: llama.cpp if installed, or the GGUF loader of transformers.

    Raises MissingDependency if llama.cpp is not installed and the GGUF loader of transformers does not support the
    model.
    """
    if installed("llama.cpp"):
        return "llamacpp"
    if reason := gguf_loader.unsupported_reason(reference):
        raise missing("llama.cpp", needed_for=f"{reason}; running {artifact.path.name}")
    return "gguf_in_transformers"
