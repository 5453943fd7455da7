"""Collect the facts about one model class from a model of the class on torch's meta device, which allocates no weights.

Sources: transformers' ``get_input_embeddings``, ``get_output_embeddings``, ``set_output_embeddings``,
``_tied_weights_keys`` and ``_keys_to_ignore_on_load_unexpected``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any, Final

from exporter.models.architecture import pattern_of
from exporter.models.generate_settings import configs, constructible, quiet, without_timm

#: The auto mappings of transformers whose classes have an input embedding for text → task name in the data files.
_TASKS: Final = {
    "CAUSAL_LM": "causal_lm",
    "MASKED_LM": "masked_lm",
    "SEQ_TO_SEQ_CAUSAL_LM": "seq2seq",
    "IMAGE_TEXT_TO_TEXT": "image_text_to_text",
    "MULTIMODAL_LM": "multimodal_lm",
    "SPEECH_SEQ_2_SEQ": "speech_seq2seq",
    "SEQUENCE_CLASSIFICATION": "sequence_classification",
    "TOKEN_CLASSIFICATION": "token_classification",
    "QUESTION_ANSWERING": "question_answering",
    "MULTIPLE_CHOICE": "multiple_choice",
    "NEXT_SENTENCE_PREDICTION": "next_sentence_prediction",
    "PRETRAINING": "pretraining",
    "TEXT_ENCODING": "text_encoding",
    "RETRIEVAL": "retrieval",
}
#: The first of several vocabulary sizes that equal no other dimension of a model, to recognise vocabulary axes.
_FIRST_SIZE: Final = 1_000_003


def text_classes() -> dict[str, dict[str, Any]]:
    """Map every model type with a text head to ``{"tasks": {task: class}, "base": class, "classes": [class, ...]}``."""
    from transformers.models.auto import modeling_auto

    types: dict[str, dict[str, Any]] = {}
    for mapping, task in _TASKS.items():
        for model_type, names in getattr(modeling_auto, f"MODEL_FOR_{mapping}_MAPPING_NAMES").items():
            entry = types.setdefault(model_type, {"tasks": {}, "base": None, "classes": []})
            entry["tasks"][task] = _first(names)
            entry["classes"] += _listed(names)
    for model_type, names in modeling_auto.MODEL_MAPPING_NAMES.items():
        entry = types.setdefault(model_type, {"tasks": {}, "base": None, "classes": []})
        entry["base"] = _first(names)
        entry["classes"] += _listed(names)
    return {name: {**entry, "classes": sorted(set(entry["classes"]))} for name, entry in sorted(types.items())}


def _listed(names: str | Sequence[str]) -> list[str]:
    return [names] if isinstance(names, str) else list(names)


def _first(names: str | Sequence[str]) -> str:
    return _listed(names)[0]


def facts_of(name: str, *, complete: bool = False) -> dict[str, Any]:
    """Return the facts about the transformers class ``name``.

    complete: True to list the parameters of all nested models, False to list only the parameters of nested models whose
    class has no separate facts.
    """
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    cls = getattr(transformers, name)
    defaults = cls.config_class()
    config = constructible(cls)
    sizes = _mark_vocabularies(config)
    with without_timm(), torch.device("meta"):
        model = cls(config)
    state = model.state_dict(keep_vars=True)
    modules = {id(module): path for path, module in reversed(list(model.named_modules(remove_duplicate=False)))}
    embedding = modules.get(id(_ask(model, "get_input_embeddings")))
    places = {id(table): path for path, table in reversed(list(configs(config)))}
    submodels = [
        (path, module)
        for path, module in model.named_modules(remove_duplicate=False)
        if path and isinstance(module, transformers.PreTrainedModel)
    ]
    return {
        "prefix": model.base_model_prefix,
        "children": sorted({key.partition(".")[0] for key in state} | {path for path, _ in model.named_children()}),
        "embedding": embedding,
        "head": modules.get(id(_ask(model, "get_output_embeddings"))),
        "ties": list(_ties(model, submodels, places, defaults)),
        "tables": sorted(_tables(state, sizes)),
        "ignored": sorted(model._keys_to_ignore_on_load_unexpected or ()),
        "submodels": [
            [path, type(sub).__name__, places.get(id(sub.config), ""), sub.config.model_type or ""]
            for path, sub in submodels
        ],
        "transposed": sorted({pattern_of(path) for path, module in model.named_modules() if _stores_in_out(module)}),
        "parameters": _parameters(state, [] if complete else _with_facts(submodels)),
        **_bias_copies(model),
    }


def _with_facts(submodels: Sequence[tuple[str, Any]]) -> list[str]:
    return [path for path, sub in submodels if type(sub).__name__ in _described()]


def _ask(model: Any, method: str) -> Any:
    try:
        return getattr(model, method)()
    except (NotImplementedError, AttributeError):  # transformers raises either for a class without the module
        return None


def _bias_copies(model: Any) -> dict[str, list[str]]:
    """Return {"bias_copies": parameters that set_output_embeddings replaces by the new head's bias}; {} if none.

    The parameters of the head itself are not listed. The function changes ``model``. It calls ``set_output_embeddings``
    because ``resize_token_embeddings`` calls this method with the resized head.
    """
    import torch

    head = _ask(model, "get_output_embeddings")
    if getattr(head, "bias", None) is None:
        return {}
    resized = torch.nn.Linear(2, 2, device="meta")
    model.set_output_embeddings(resized)
    named = [(path, module) for path, module in model.named_modules(remove_duplicate=False) if module is not resized]
    copies = sorted(
        pattern_of(f"{path}.{name}".lstrip("."))
        for path, module in named
        for name, parameter in module.named_parameters(recurse=False)
        if parameter is resized.bias
    )
    return {"bias_copies": copies} if copies else {}


def _mark_vocabularies(config: Any) -> dict[int, str]:
    """Set every vocabulary size in ``config`` to a different number, and map each number to its dotted config key."""
    sizes: dict[int, str] = {}
    for path, table in configs(config):
        names = [key for key in vars(table) if "vocab_size" in key or key in ("n_vocab", "vocabulary_size")]
        for key in sorted({*names, *(["vocab_size"] if isinstance(getattr(table, "vocab_size", None), int) else [])}):
            if isinstance(getattr(table, key), int):
                size = _FIRST_SIZE + 14 * len(sizes)
                setattr(table, key, size)
                sizes[size] = f"{path}.{key}".lstrip(".")
    return sizes


def _ties(
    model: Any, submodels: Sequence[tuple[str, Any]], places: Mapping[int, str], defaults: Any
) -> Iterator[dict[str, Any]]:
    for path, module in [("", model), *submodels]:
        place = places.get(id(module.config), "")
        nested = defaults
        for key in filter(None, place.split(".")):
            nested = getattr(nested, key)
        default = getattr(nested, "tie_word_embeddings", None)
        module.config.tie_word_embeddings = True
        pairs = module.get_expanded_tied_weights_keys(all_submodels=False)
        prefix = f"{path}." if path else ""
        joined = {pattern_of(prefix + target): pattern_of(prefix + source) for target, source in sorted(pairs.items())}
        if joined:
            yield {"config": place, "default": default, "pairs": joined}


def _tables(state: Mapping[str, Any], sizes: Mapping[int, str]) -> set[tuple[str, int, str]]:
    return {
        (pattern_of(name), axis, sizes[size])
        for name, tensor in state.items()
        for axis, size in enumerate(tensor.shape)
        if size in sizes
    }


def _stores_in_out(module: Any) -> bool:
    """Whether the weight of ``module`` has the shape (in, out), as in GPT-2's Conv1D or in transposed expert stacks."""
    return type(module).__name__ == "Conv1D" or getattr(module, "is_transposed", False) is True


@lru_cache(maxsize=1)
def _described() -> frozenset[str]:
    """Names of all model classes whose facts are written to the data files."""
    return frozenset(name for entry in text_classes().values() if entry["tasks"] for name in entry["classes"])


def _parameters(state: Mapping[str, Any], submodels: Sequence[str]) -> list[str]:
    own = {pattern_of(key) for key in state if not any(key.startswith(f"{path}.") for path in submodels)}
    return sorted(own)


def describe_class(name: str, *, complete: bool = False) -> tuple[str, dict[str, Any] | None, str]:
    """Return (class name, facts about the class or None, error message if the class cannot be constructed, else "").

    complete: whether the facts also list the parameters of nested models.
    """
    try:
        with quiet():
            return name, facts_of(name, complete=complete), ""
    except Exception as exc:  # a class that cannot be constructed from its default config has no facts
        return name, None, f"{type(exc).__name__}: {str(exc).splitlines()[0] if str(exc) else ''}"
