"""Checks of a GGUF's metadata against the reference's config: what the runtime is told beside the weights.

Logits show a wrong number only on texts that feel it: a window or a context that is too short, a missing scaling.
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

#: Numbers with which llama.cpp computes where a file has none. Source: load_hparams in llama-model.cpp.
_DEFAULTS: Final[Mapping[str, Any]] = {
    "rope.freq_base": 10000.0,
    "rope.freq_base_swa": 10000.0,
    "rope.scaling.attn_factor": 1.0,
    "rope.scaling.type": None,
    "use_parallel_residual": None,
}
_GEMMA2_DEFAULTS: Final = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
#: Without these llama.cpp takes what another key says: the width of a head, the number of heads.
_FOLLOWING: Final = frozenset({
    "attention.head_count_kv", "attention.key_length", "attention.value_length", "rope.dimension_count",
})  # fmt: skip
#: Architectures in whose code there is a window; in others a window of the config is told of when the file is made.
_WINDOWED: Final = frozenset({"gemma2", "gemma3"})
#: A file may leave these out, and llama.cpp computes the same.
_OPTIONAL: Final = frozenset({"rope.scaling.original_context_length", "expert_feed_forward_length"})
#: Keys that say how the others are to be read; other checks look at the tokens.
_FREE: Final = frozenset({"vocab_size", "tensor_data_layout"})
#: generation_config.json → general.sampling. Source: gguf's Keys.General.Sampling*.
_SAMPLING: Final = {"temperature": "temp", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p"}


def check_settings(parts: GgufModel, reference: Reference) -> Iterator[Check | Skip]:
    """The architecture and every key below it, the size of the vocabulary, and the advice on sampling."""
    kind = reference.checkpoint.config.get("model_type")
    found = parts.metadata.get("general.architecture")
    if kind not in ARCHITECTURES:
        yield Skip("hyperparameters", f"what llama.cpp has for model type {kind!r:.60} is not known here")
    else:
        want = ARCHITECTURES[kind]
        passed = found == want
        detail = want if passed else f"general.architecture: expected {want} for {kind}, found {found!r:.60}"
        yield Check(name="architecture", passed=passed, detail=detail)
        if passed:
            yield from _check_keys(parts, want, reference)
    yield _check_sampling(parts, reference)


def _check_keys(parts: GgufModel, arch: str, reference: Reference) -> Iterator[Check | Skip]:
    wanted = hyperparameters(reference.checkpoint.text_config)
    stated = {
        key.removeprefix(f"{arch}."): value for key, value in parts.metadata.items() if key.startswith(f"{arch}.")
    }
    wrong, count = [], 0
    for name, want in sorted(wanted.items()):
        if name not in stated and _may_miss(name, arch, stated, wanted):
            continue
        value = stated.get(name, _default(name, arch))
        count += 1
        if not _equal(value, want):
            wrong.append(f"{arch}.{name}: expected {want} as config.json says, found {value}")
    if (size := stated.get("vocab_size", reference.vocab)) != reference.vocab:
        wrong.append(f"{arch}.vocab_size: expected {reference.vocab}, found {size}")
    detail = f"{count} numbers as config.json says" if not wrong else wrong[0]
    yield Check(name="hyperparameters", passed=not wrong, value=float(len(wrong)), limit=0.0, detail=detail)
    if unknown := sorted(stated.keys() - wanted.keys() - _FREE):
        yield Skip("hyperparameters", f"config.json does not say what {', '.join(unknown)} should be")


def _default(name: str, arch: str) -> Any:
    return (_GEMMA2_DEFAULTS if arch == "gemma2" else {}).get(name, _DEFAULTS.get(name))


def _may_miss(name: str, arch: str, stated: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    """Whether a key that is not there leaves llama.cpp with what the config says, or with what it has in its code."""
    if name in _FOLLOWING:
        hidden, heads = stated.get("embedding_length"), stated.get("attention.head_count")
        if name == "attention.head_count_kv":
            return bool(wanted[name] == heads)
        if not (isinstance(hidden, int) and isinstance(heads, int) and heads):
            return False
        return bool(wanted[name] == stated.get("attention.key_length", hidden // heads))
    if name == "attention.sliding_window":
        return arch not in _WINDOWED
    if name in ("attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon"):
        # A config may state both kinds; the file has the one that the architecture reads.
        return any(other.endswith("epsilon") for other in stated)
    return name in _OPTIONAL or (arch == "stablelm" and name == "use_parallel_residual")


def _equal(found: Any, want: Any) -> bool:
    """Numbers as float32, in which GGUF keeps them; phi3's converter writes 0 for no window."""
    if isinstance(found, GgufArray):
        return False
    if isinstance(want, bool) or isinstance(found, bool) or isinstance(want, str) or isinstance(found, str):
        return bool(found == want) or (found == "none" and want is None)
    if want is None or found is None:
        return bool((found or None) == want)
    return bool(np.float32(found) == np.float32(want))


def _check_sampling(parts: GgufModel, reference: Reference) -> Check:
    """What the generation config advises, where the file repeats it."""
    path = reference.auxiliary_files.get("generation_config.json")
    advice = read_object(path) if path else {}
    wrong = []
    for key, name in _SAMPLING.items():
        found = parts.metadata.get(f"general.sampling.{name}")
        if found is not None and not _equal(found, advice.get(key)):
            wrong.append(f"general.sampling.{name}: expected {advice.get(key)}, found {found}")
    detail = wrong[0] if wrong else "as generation_config.json advises"
    return Check(name="sampling", passed=not wrong, value=float(len(wrong)), limit=0.0, detail=detail)
