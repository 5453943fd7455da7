"""Read the facts about transformers' model classes from the generated data files."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final

import msgspec

from exporter.models.data import CLASSES, CONVERSIONS, FOLDER

_MODEL_TYPE: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")


class TieFacts(msgspec.Struct, frozen=True):
    """Parameters that a model class ties if ``tie_word_embeddings`` is true in the config.

    config: dotted path of the nested config that contains ``tie_word_embeddings``, or "" for the top-level config.
    default: the value of ``tie_word_embeddings`` if the config file does not contain the key. pairs: maps the name
    pattern of each tied parameter to the name pattern of the source parameter.
    """

    config: str
    default: bool | None
    pairs: Mapping[str, str]


class ClassFacts(msgspec.Struct, frozen=True):
    """Facts about a model class, in which ``*`` stands for any number in the name of a parameter or module.

    prefix: transformers' ``base_model_prefix``. children: names of the top-level modules and parameters. embedding,
    head: module paths of the input embedding and of the output head, or None. tables: a tuple (parameter, axis, config
    key of the vocabulary size) for every parameter with a vocabulary axis. ignored: patterns of stored tensors that the
    class does not load. submodels: a tuple (module path, class, path of the nested config, model type) for every nested
    model. transposed: modules whose weights have the shape (in, out) instead of (out, in). parameters: the names of all
    parameters and buffers that do not belong to a nested model. bias_copies: the parameters that transformers replaces
    by the bias of the head when it resizes the vocabulary.
    """

    prefix: str
    children: Sequence[str]
    embedding: str | None
    head: str | None
    ties: Sequence[TieFacts]
    tables: Sequence[tuple[str, int, str]]
    ignored: Sequence[str]
    submodels: Sequence[tuple[str, str, str, str]]
    transposed: Sequence[str]
    parameters: Sequence[str]
    bias_copies: Sequence[str] = ()


class Operation(msgspec.Struct, frozen=True):
    """An operation of a weight converter of transformers, such as a concatenation.

    The fields are the attributes of the transformers class called ``name``.
    """

    name: str
    dim: int = 0
    dim0: int = 0
    dim1: int = 1
    check_dims: bool = False
    inverse: bool = False
    num_shards_attribute: str | None = None
    subconfig_key: str | None = None
    permute_layer_names: Sequence[str] | None = None
    stack_dim: int = 0
    concat_dim: int = 1


class Transform(msgspec.Struct, frozen=True):
    """An entry of transformers' conversion table: either a renaming, or a converter, which has operations."""

    name: str
    sources: Sequence[str]
    targets: Sequence[str]
    operations: Sequence[Operation] = ()
    offset: int = 0


class TypeFacts(msgspec.Struct, frozen=True):
    """Facts about a model type. tasks: maps each task, such as causal_lm, to the class that AutoModel loads.

    conversions: for a model type that is missing in the data files, maps class names and model types to transforms,
    which rename or convert stored tensors.
    """

    tasks: Mapping[str, str]
    unbuilt: Mapping[str, str]
    classes: Mapping[str, ClassFacts]
    conversions: Mapping[str, Sequence[Transform]] = {}


class _Conversions(msgspec.Struct, frozen=True):
    transformers: str
    bases: Mapping[str, str]
    conversions: Mapping[str, Sequence[Transform]]


@lru_cache(maxsize=1)
def _conversions() -> _Conversions:
    return msgspec.json.decode((FOLDER / CONVERSIONS).read_bytes(), type=_Conversions)


def transformers_version() -> str:
    """Return the version of transformers from which the facts were generated."""
    return _conversions().transformers


def conversions_of(name: str) -> Sequence[Transform] | None:
    """Return the transforms that transformers registers for the class or model type ``name``, or None if none exist."""
    return _conversions().conversions.get(name)


def base_class(model_type: str) -> str | None:
    """Return the name of the class that AutoModel loads for ``model_type``, or None if AutoModel has no such class."""
    return _conversions().bases.get(model_type)


@lru_cache(maxsize=16)
def type_facts(model_type: str) -> TypeFacts | None:
    """Return the facts about ``model_type``, or None if the data files contain no facts about ``model_type``."""
    path = FOLDER / f"{model_type}.json"
    if not _MODEL_TYPE.fullmatch(model_type) or path.name in (CONVERSIONS, CLASSES) or not path.is_file():
        return None
    return msgspec.json.decode(path.read_bytes(), type=TypeFacts)


@lru_cache(maxsize=1)
def _classes() -> Mapping[str, str]:
    return msgspec.json.decode((FOLDER / CLASSES).read_bytes(), type=dict[str, str])


def type_of_class(name: str) -> str | None:
    """Return the model type of the transformers class ``name``, or None if the data files do not list the class.

    The result may be the model type of an enclosing model, because transformers' tables do not list the text models of
    some vision-language models separately.
    """
    return _classes().get(name)


@dataclass(frozen=True, slots=True)
class Submodel:
    """A model nested in another model. place: the dotted path of the nested model's config."""

    path: str
    name: str
    place: str
    model_type: str


def nested_config(config: Mapping[str, Any], place: str) -> Mapping[str, Any]:
    """Return the nested config at the dotted path ``place``, or {} if ``config`` has no nested config at the path."""
    table: Any = config
    for key in filter(None, place.split(".")):
        table = table.get(key) if isinstance(table, dict) else None
    return table if isinstance(table, dict) else {}
