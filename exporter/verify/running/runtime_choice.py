"""Which runtime an artifact runs in, in which ways, and what it is held to there."""

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
    """llama.cpp rounds activations to a 16-bit file's type, so only fp32 GGUF has to choose the same tokens."""
    return (artifact.kind == "F32" and not artifact.quantised) or artifact.format == "hf"


def reference_rounding(artifact: Artifact, reference: Reference) -> str:
    """The rounding of the reference that ``artifact`` is held to: a checkpoint rounds norms and biases, too."""
    if artifact.quantised:
        return "F32"
    if dtype := rounded_before(artifact, reference):
        return f"{dtype} whole"
    whole = artifact.format == "hf" and artifact.kind in HALVES
    return f"{artifact.kind} whole" if whole else artifact.kind


def graph_modes(artifact: Artifact) -> tuple[list[str], list[Skip]]:
    """What a graph can be asked for by its inputs, and what not; it need not be one of ours."""
    if artifact.encoder_embedding:
        return ["full", "cached", "right-padded"], []
    ways, skipped = ["full"], []
    if any(name.startswith("past_key_values.") for name in artifact.inputs):
        ways.append("cached")
    else:
        skipped.append(Skip("logits with cache", f"{artifact.path.name} takes no past_key_values"))
    if "attention_mask" in artifact.inputs:
        ways.append("padded" if "position_ids" in artifact.inputs else "right-padded")
    else:
        skipped.append(Skip("logits of a padded batch", f"{artifact.path.name} takes no attention_mask"))
    return ways, skipped


def choose_runtime(artifact: Artifact, reference: Reference) -> str:
    """The module of the runtime. Raises MissingDependency for a GGUF that nothing which is installed can run."""
    if artifact.format == "onnx":
        return "onnx_seq2seq" if artifact.encoder_embedding else "onnx_runtime"
    return "merged" if artifact.format == "hf" else _gguf_runtime(artifact, reference)


def _gguf_runtime(artifact: Artifact, reference: Reference) -> str:
    """llama.cpp where it is installed, else transformers' own GGUF loader for models that it computes rightly."""
    if installed("llama.cpp"):
        return "llamacpp"
    if why := gguf_loader.unable(reference):
        raise missing("llama.cpp", needed_for=f"running {artifact.path.name}: {why}")
    return "gguf_in_transformers"
