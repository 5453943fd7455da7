"""Check the metadata of a GGUF against the config of the base model.

A comparison of logits may miss a wrong metadata value, because some metadata values affect only the logits of a few
texts. For example, a wrong sliding window, context length or rope scaling affects only the logits of long texts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

import numpy as np

from exporter.io.json_objects import read_object
from exporter.sources.gguf.header import GgufArray
from exporter.sources.gguf.split_files import GgufModel
from exporter.verify.expect.reference import Reference
from exporter.verify.gguf.hyperparameters import hyperparameters
from exporter.verify.gguf.layout import ARCHITECTURES
from exporter.verify.report import Check, Skip

#: llama.cpp's defaults for missing keys. Source: load_hparams in llama-model.cpp.
_DEFAULTS: Final[Mapping[str, Any]] = {
    "rope.freq_base": 10000.0,
    "rope.freq_base_swa": 10000.0,
    "rope.scaling.attn_factor": 1.0,
    "rope.scaling.type": None,
    "use_parallel_residual": None,
}
_GEMMA2_DEFAULTS: Final = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
#: Keys with a default from another key, for example from the width of a head or the number of heads.
_FOLLOWING: Final = frozenset({
    "attention.head_count_kv", "attention.key_length", "attention.value_length", "rope.dimension_count",
})  # fmt: skip
#: Architectures with a sliding window in llama.cpp. For any other architecture, the export reports the config's window.
_WINDOWED: Final = frozenset({"gemma2", "gemma3", "olmo2", "exaone4", "cohere2"})
#: Architectures in which llama.cpp reads which layers have a sliding window.
_PATTERNED: Final = frozenset({"olmo2", "exaone4"})
#: Keys that do not change results. A file may omit the keys.
_OPTIONAL: Final = frozenset({"rope.scaling.original_context_length", "expert_feed_forward_length"})
#: Keys that are not in the config, or that a different check compares.
_FREE: Final = frozenset({"vocab_size", "tensor_data_layout"})
#: generation_config.json → general.sampling. Source: gguf's Keys.General.Sampling*.
_SAMPLING: Final = {"temperature": "temp", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p"}


def check_settings(gguf: GgufModel, reference: Reference) -> Iterator[Check | Skip]:
    """Check the architecture, hyperparameters, vocabulary size and sampling settings in a GGUF's metadata."""
    model_type = reference.checkpoint.config.get("model_type")
    architecture = gguf.metadata.get("general.architecture")
    if model_type not in ARCHITECTURES:
        reason = f"the verification does not know which llama.cpp architecture matches model type {model_type!r:.60}"
        yield Skip("hyperparameters", reason)
    else:
        expected = ARCHITECTURES[model_type]
        passed = architecture == expected
        detail = (
            expected
            if passed
            else f"general.architecture: expected {expected} for model type {model_type}, found {architecture!r:.60}"
        )
        yield Check(name="architecture", passed=passed, detail=detail)
        if passed:
            yield from _check_keys(gguf, expected, reference)
    yield _check_sampling(gguf, reference)


def _check_keys(gguf: GgufModel, arch: str, reference: Reference) -> Iterator[Check | Skip]:
    wanted = hyperparameters(reference.checkpoint.text_config)
    stated = {key.removeprefix(f"{arch}."): value for key, value in gguf.metadata.items() if key.startswith(f"{arch}.")}
    wrong, count = [], 0
    for name, want in sorted(wanted.items()):
        if name not in stated and _is_optional(name, arch, stated, wanted):
            continue
        value = stated.get(name, _default(name, arch))
        count += 1
        if not _equal(value, want):
            wrong.append(f"{arch}.{name}: expected {want} (as in config.json), found {value}")
    if (size := stated.get("vocab_size", reference.vocab)) != reference.vocab:
        wrong.append(f"{arch}.vocab_size: expected {reference.vocab}, found {size}")
    detail = f"{count} hyperparameters match config.json" if not wrong else wrong[0]
    yield Check(name="hyperparameters", passed=not wrong, value=float(len(wrong)), limit=0.0, detail=detail)
    if unknown := sorted(stated.keys() - wanted.keys() - _FREE):
        yield Skip("hyperparameters", f"config.json contains no value for the GGUF keys {', '.join(unknown)}")


def _default(name: str, arch: str) -> Any:
    return (_GEMMA2_DEFAULTS if arch == "gemma2" else {}).get(name, _DEFAULTS.get(name))


def _is_optional(name: str, arch: str, stated: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    """Whether a GGUF may omit the key ``name``: llama.cpp's default is correct, or llama.cpp ignores the key."""
    if name in _FOLLOWING:
        hidden, heads = stated.get("embedding_length"), stated.get("attention.head_count")
        if name == "attention.head_count_kv":
            return bool(wanted[name] == heads)
        if not (isinstance(hidden, int) and isinstance(heads, int) and heads):
            return False
        return bool(wanted[name] == stated.get("attention.key_length", hidden // heads))
    if name == "attention.sliding_window":
        return arch not in _WINDOWED
    if name == "attention.sliding_window_pattern":
        return arch not in _PATTERNED
    if name in ("attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon"):
        # A config may contain two epsilons. The file contains the epsilon that the architecture reads.
        return any(key.endswith("epsilon") for key in stated)
    return name in _OPTIONAL or (arch == "stablelm" and name == "use_parallel_residual")


def _equal(value: Any, want: Any) -> bool:
    """Whether ``value`` from GGUF metadata equals ``want`` from config.json.

    Numbers are compared as float32, because a GGUF stores floating-point hyperparameters as float32. The GGUF value 0
    counts as equal to null in config.json, because llama.cpp's converter for phi3 writes 0 for a model without a
    sliding window.
    """
    if isinstance(value, GgufArray) or isinstance(want, list):
        return isinstance(value, GgufArray) and value.values() == want
    if isinstance(want, bool) or isinstance(value, bool) or isinstance(want, str) or isinstance(value, str):
        return bool(value == want) or (value == "none" and want is None)
    if want is None or value is None:
        return bool((value or None) == want)
    return bool(np.float32(value) == np.float32(want))


def _check_sampling(gguf: GgufModel, reference: Reference) -> Check:
    """Check that the sampling settings in the GGUF, such as temperature, equal those in generation_config.json."""
    path = reference.auxiliary_files.get("generation_config.json")
    advice = read_object(path) if path else {}
    wrong = []
    for key, name in _SAMPLING.items():
        value = gguf.metadata.get(f"general.sampling.{name}")
        if value is not None and not _equal(value, advice.get(key)):
            wrong.append(f"general.sampling.{name}: expected {advice.get(key)}, found {value}")
    detail = wrong[0] if wrong else "the sampling settings match generation_config.json"
    return Check(name="sampling", passed=not wrong, value=float(len(wrong)), limit=0.0, detail=detail)
