"""Read the generated facts about transformers' model classes."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final

import msgspec

from exporter.models.data import CLASSES, CONVERSIONS, FOLDER

_MODEL_TYPE: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


class TieFacts(msgspec.Struct, frozen=True):
    """Parameters that a class ties if its config says so.

    config: dotted path of the config with the flag ``tie_word_embeddings``, or "" for the model's own config. default:
    the flag's value if the config file contains no flag. pairs: maps the pattern of a tied parameter to the pattern of
    the parameter whose values it has.
    """

    config: str
    default: bool | None
    pairs: Mapping[str, str]


class ClassFacts(msgspec.Struct, frozen=True):
    """Facts about a model class. In the names of parameters and modules, ``*`` stands for a number.

    prefix: transformers' ``base_model_prefix``. children: names of the top-level modules and parameters. embedding,
    head: module paths of the input embedding and of the output head, or None. tables: (parameter, axis, config key) of
    every parameter with one entry per token along the axis; the config key contains the number of entries. ignored:
    patterns of stored tensors that the class does not load. submodels: (module path, class, path of its config, model
    type) of every nested model. transposed: modules whose weights are stored as (in, out). parameters: the names of all
    parameters and buffers that do not belong to a nested model.
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


class Operation(msgspec.Struct, frozen=True):
    """An operation of a converter, with the fields of transformers' class of the same name."""

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
    """A renaming (without operations) or a converter of stored tensors, as in transformers' conversion table."""

    name: str
    sources: Sequence[str]
    targets: Sequence[str]
    operations: Sequence[Operation] = ()
    offset: int = 0


class TypeFacts(msgspec.Struct, frozen=True):
    """Facts about a model type. tasks: maps each task, such as causal_lm, to the class that transformers loads.

    conversions: maps class names and model types to transforms, for a model type that the generated tables lack.
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
    """Return the transforms that transformers registers under a class name or a model type, or None."""
    return _conversions().conversions.get(name)


def base_class(model_type: str) -> str | None:
    """Return the name of the class that transformers' AutoModel loads for ``model_type``, or None."""
    return _conversions().bases.get(model_type)


@lru_cache(maxsize=16)
def type_facts(model_type: str) -> TypeFacts | None:
    """Return the facts about a model type, or None if transformers had no such type when the facts were generated."""
    path = FOLDER / f"{model_type}.json"
    if not _MODEL_TYPE.fullmatch(model_type) or path.name in (CONVERSIONS, CLASSES) or not path.is_file():
        return None
    return msgspec.json.decode(path.read_bytes(), type=TypeFacts)


@lru_cache(maxsize=1)
def _classes() -> Mapping[str, str]:
    return msgspec.json.decode((FOLDER / CLASSES).read_bytes(), type=dict[str, str])


def type_of_class(name: str) -> str | None:
    """Return the model type under which transformers lists the class ``name``, or None.

    The text models of some vision-language models have a class but no entry of their own in transformers' tables.
    """
    return _classes().get(name)


@dataclass(frozen=True, slots=True)
class Submodel:
    """A model nested in another model. place: the dotted path of its config."""

    path: str
    name: str
    place: str
    model_type: str


def nested_config(config: Mapping[str, Any], place: str) -> Mapping[str, Any]:
    """Return the config at the dotted path ``place``, or {} if ``config`` contains no such config."""
    table: Any = config
    for key in filter(None, place.split(".")):
        table = table.get(key) if isinstance(table, dict) else None
    return table if isinstance(table, dict) else {}
