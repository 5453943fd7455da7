"""Choose an artifact's runtime, its run modes, and the rounding of the reference for the comparison."""

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
    """True if greedy decoding must choose the reference's tokens, as for checkpoints and float32 files.

    For a 16-bit file, llama.cpp rounds activations to the file's type.
    """
    return (artifact.storage == "F32" and not artifact.quantised) or artifact.format == "hf"


def reference_rounding(artifact: Artifact, reference: Reference) -> str:
    """The rounding of the reference for ``artifact``: a dtype, followed by " whole" to round also norms and biases.

    A checkpoint rounds norms and biases. A GGUF keeps norms and biases in float32.
    """
    if artifact.quantised:
        return "F32"
    if dtype := rounded_before(artifact, reference):
        return f"{dtype} whole"
    whole = artifact.format == "hf" and artifact.storage in HALVES
    return f"{artifact.storage} whole" if whole else artifact.storage


def graph_modes(artifact: Artifact) -> tuple[list[str], list[Skip]]:
    """Returns (run modes that the inputs of a graph support, skips for unsupported modes).

    Graphs from different tools have different inputs.
    """
    if artifact.encoder_embedding:
        return ["full", "cached", "right-padded"], []
    modes, skipped = ["full"], []
    if any(name.startswith("past_key_values.") for name in artifact.inputs):
        modes.append("cached")
    else:
        skipped.append(Skip("logits with cache", f"{artifact.path.name} takes no past_key_values"))
    if "attention_mask" in artifact.inputs:
        modes.append("padded" if "position_ids" in artifact.inputs else "right-padded")
    else:
        skipped.append(Skip("logits of a padded batch", f"{artifact.path.name} takes no attention_mask"))
    return modes, skipped


def choose_runtime(artifact: Artifact, reference: Reference) -> str:
    """The name of the runtime's module. Raises MissingDependency if no installed runtime can run a GGUF."""
    if artifact.format == "onnx":
        return "onnx_seq2seq" if artifact.encoder_embedding else "onnx_runtime"
    return "merged" if artifact.format == "hf" else _gguf_runtime(artifact, reference)


def _gguf_runtime(artifact: Artifact, reference: Reference) -> str:
    """Choose llama.cpp if installed, else the GGUF loader of transformers for supported models."""
    if installed("llama.cpp"):
        return "llamacpp"
    if reason := gguf_loader.unsupported_reason(reference):
        raise missing("llama.cpp", needed_for=f"running {artifact.path.name}: {reason}")
    return "gguf_in_transformers"
