"""Generate the data files in exporter/models/data from the installed version of transformers.

    python -m exporter.models.generate            # rewrites exporter/models/data
    python -m exporter.models.generate --check    # compares the data with the installed transformers

The command constructs a model of every class with a text head on torch's meta device, which allocates no weights, and
collects the facts from the model. Sources: transformers' ``conversion_mapping``, ``get_input_embeddings``,
``get_output_embeddings``, ``_tied_weights_keys`` and ``_keys_to_ignore_on_load_unexpected``.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

from exporter.models.architecture import pattern_of
from exporter.models.data import CLASSES, CONVERSIONS, FOLDER
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


def conversions() -> dict[str, list[dict[str, Any]]]:
    """Map every model type and class name in transformers' conversion table to the list of its transforms."""
    from transformers import conversion_mapping

    table = conversion_mapping._build_checkpoint_conversion_mapping()
    return {name: [_transform(item) for item in table[name]] for name in sorted(table)}


def _transform(item: Any) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "name": type(item).__name__,
        "sources": list(item._original_source_patterns),
        "targets": list(item._original_target_patterns),
    }
    if hasattr(item, "operations"):
        entry["operations"] = [{"name": type(op).__name__, **_plain(vars(op))} for op in item.operations]
    if hasattr(item, "offset"):
        entry["offset"] = item.offset
    return entry


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: list(value) if isinstance(value, tuple) else value for key, value in sorted(values.items())}


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
    }


def _with_facts(submodels: Sequence[tuple[str, Any]]) -> list[str]:
    return [path for path, sub in submodels if type(sub).__name__ in _described()]


def _ask(model: Any, method: str) -> Any:
    try:
        return getattr(model, method)()
    except (NotImplementedError, AttributeError):  # transformers raises either for a class without the module
        return None


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


def generate(workers: int = 2) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield a pair (file name, content) for every data file."""
    types = text_classes()
    yield (
        CONVERSIONS,
        {
            "transformers": importlib.import_module("transformers").__version__,
            "bases": {name: entry["base"] for name, entry in types.items() if entry["base"]},
            "conversions": conversions(),
        },
    )
    names = sorted({name for entry in types.values() for name in entry["classes"]})
    with ProcessPoolExecutor(workers) as pool:
        results = {name: (facts, error) for name, facts, error in pool.map(describe_class, names, chunksize=8)}
    described: dict[str, str] = {}
    for model_type, entry in types.items():
        classes = {name: results[name][0] for name in entry["classes"] if results[name][0]}
        unbuilt = {name: results[name][1] for name in entry["classes"] if results[name][1]}
        if entry["tasks"] and (unbuilt or any(facts["embedding"] for facts in classes.values() if facts)):
            described |= dict.fromkeys(classes, model_type)
            yield f"{model_type}.json", {"tasks": entry["tasks"], "unbuilt": unbuilt, "classes": classes}
    yield CLASSES, described


def _text(content: Mapping[str, Any]) -> str:
    """Return ``content`` as JSON with one line for each fact about a class, so that diffs are easy to review."""

    def lines(value: Any, depth: int) -> str:
        if depth == 0 or not isinstance(value, dict) or not value:
            return json.dumps(value, sort_keys=True, ensure_ascii=False)
        entries = (f"{json.dumps(key)}: {lines(value[key], depth - 1)}" for key in sorted(value))
        return "{\n" + ",\n".join(entries) + "\n}"

    return lines(content, 3) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the data files. With ``--check``, only check the data files, and return 1 if a data file is outdated."""
    parser = argparse.ArgumentParser(description="Generate exporter/models/data from the installed transformers.")
    parser.add_argument("--check", action="store_true", help="compare the data files instead of writing them")
    options = parser.parse_args(arguments)
    os.environ["HF_HUB_OFFLINE"] = "1"
    files = {name: _text(content) for name, content in generate()}
    present = {path.name: path for path in Path(str(FOLDER)).glob("*.json")}
    differing = [name for name in files if name not in present or present[name].read_text() != files[name]]
    differing += sorted(present.keys() - files.keys())
    if options.check:
        for name in differing:
            print(f"{name}: differs from transformers; run python -m exporter.models.generate", file=sys.stderr)
        return 1 if differing else 0
    for name in differing:
        if name in files:
            (Path(str(FOLDER)) / name).write_text(files[name])
        else:
            present[name].unlink()
    print(f"{len(files)} files, {len(differing)} changed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
