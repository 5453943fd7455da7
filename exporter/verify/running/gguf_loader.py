"""Run GGUF files in the GGUF loader of transformers, as a second runtime in addition to llama.cpp.

A GGUF file must produce the same results in the GGUF loader of transformers as in llama.cpp.

The GGUF loader of transformers dequantises the file and computes in float32. The GGUF loader of transformers is many
times slower than llama.cpp, mainly because the loader converts the GGUF vocabulary. Because the GGUF loader of
transformers is slow, the loader runs only two sequences. Unless ``--require transformers-gguf`` is given, the loader
runs only one GGUF file per model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from exporter.errors import NotExpressible
from exporter.verify.expect.reference import Reference
from exporter.verify.report import Check
from exporter.verify.running.logits import Reader
from exporter.verify.running.metrics import Distance, compare, pool
from exporter.verify.tolerances import HF_ROUNDING_SHARE, LOADER_KL, LOADER_MAX_ABS

#: Name of the loader in ``--require``, in checks and in skips.
NAME: Final = "transformers-gguf"
#: Model types for which loader and checkpoint give equal results if the rotary embedding is not scaled. Measured in
#: float32 with transformers 5.23. The loader refuses most other model types and computes a few wrongly (KL up to 1.2).
_COMPUTED: Final = ("llama", "qwen2", "phi3", "stablelm")
#: Settings of StableLM that the loader does not read from a file. With such a setting, logits of a tiny model differ by
#: 3.4.
_NOT_READ: Final = ("qk_layernorm", "use_parallel_residual")


def unsupported_reason(reference: Reference) -> str | None:
    """Return the reason why the GGUF loader of transformers cannot run the model, or None if the loader supports it."""
    config = reference.checkpoint.text_config
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    model, rotation = config.get("model_type"), rope.get("rope_type", rope.get("type", "default"))
    if setting := next((setting_name for setting_name in _NOT_READ if config.get(setting_name)), None):
        return f"the GGUF loader of transformers does not support {model} models with the setting {setting}"
    if model in _COMPUTED and rotation == "default":
        return None
    return f"the GGUF loader of transformers does not support {model} models with rope type {rotation}"


def require_supported(reference: Reference) -> None:
    """Raise NotExpressible if the GGUF loader of transformers cannot run the model."""
    if reason := unsupported_reason(reference):
        raise NotExpressible(
            f"--require {NAME}", reason, instead="use --require llama.cpp to run the file in llama.cpp"
        )


def sequences_to_run(sequences: Sequence[Sequence[int]], trained: Sequence[Sequence[int]]) -> list[int]:
    """Return the index of the first sequence and, if any, the index of the first sequence with trained tokens."""
    return [0] if not trained else [0, len(sequences) - len(trained)]


def distance(reference: Reader, name: str, arrays: Reader, numbers: Sequence[int]) -> Distance:
    """Return the distance of the GGUF loader's logits from the logits that ``reference`` saved as ``name.N``.

    numbers: indices of the sequences to compare.
    """
    return pool(
        [compare(reference(f"{name}.{number}"), arrays(f"full.{position}")) for position, number in enumerate(numbers)]
    )


def check_exact(distance: Distance, rounding: float) -> Check:
    """Check that the GGUF loader's logits of an unquantised file equal the equally rounded reference model's logits.

    The tolerance is small, because the GGUF loader of transformers and the reference model use the same kernels.

    rounding: the largest change of a logit caused by rounding the merged matrices, or 0 if no matrix is merged.
    """
    limit = max(LOADER_MAX_ABS, HF_ROUNDING_SHARE * rounding)
    return Check.at_most(
        NAME, distance.max_abs, limit, f"maximum absolute logit difference over {distance.positions} positions"
    )


def check_quantised(distance: Distance) -> Check:
    """Check that GGUF loader and llama.cpp compute equal logits for a quantised file, up to rounding of activations."""
    detail = (
        f"mean KL from llama.cpp over {distance.positions} positions, "
        f"maximum absolute logit difference {distance.max_abs:.2g}"
    )
    return Check.at_most(NAME, distance.kl, LOADER_KL, detail)
