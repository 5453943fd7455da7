"""Describe the transformers class of a checkpoint, the class's nested models, and the renaming of stored tensors."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Final

from exporter.models.facts import (
    ClassFacts,
    Submodel,
    Transform,
    base_class,
    conversions_of,
    nested_config,
    type_facts,
    type_of_class,
)
from exporter.models.renaming import Renamer

#: Tasks in the order in which the class of a config without ``architectures`` is chosen.
_TASKS: Final = (
    "causal_lm",
    "image_text_to_text",
    "seq2seq",
    "multimodal_lm",
    "speech_seq2seq",
    "masked_lm",
    "pretraining",
)
_NUMBER: Final = re.compile(r"(?<=\.)\d+(?=\.|$)|^\d+(?=\.)")


def pattern_of(name: str) -> str:
    """Replace every numeric segment of the dotted name ``name`` by ``*``, as in the files in exporter/models/data."""
    return _NUMBER.sub("*", name)


@dataclass(frozen=True)
class Architecture:
    """The facts about a checkpoint's model class, combined with the facts about the nested models in the config."""

    name: str
    model_type: str
    facts: ClassFacts
    config: Mapping[str, Any]
    conversions: Mapping[str, Sequence[Transform]] = field(default_factory=dict)

    @classmethod
    def of(cls, config: Mapping[str, Any], name: str | None = None) -> Architecture | None:
        """Return the architecture for the model config ``config``, or None if no facts about the model class exist.

        name: the name of the model class. The default is the class in the config key ``architectures`` or, if the key
        is missing, the class that transformers loads for the model type.
        """
        listed = config.get("architectures")
        named = [item for item in (listed if isinstance(listed, list) else []) if isinstance(item, str)]
        candidates = [name] if name else named
        model_type = config.get("model_type")
        described = type_facts(model_type) if isinstance(model_type, str) else None
        if described is None and candidates and (outer := type_of_class(candidates[0])):
            described = type_facts(outer)
        if described is None and isinstance(model_type, str):
            from exporter.models.unlisted import unlisted_facts  # a lazy import: the module starts processes

            described = unlisted_facts(model_type)
        if described is None:
            return None
        if not name:
            candidates = [
                *named,
                *(described.tasks[task] for task in _TASKS if task in described.tasks),
                *sorted(described.classes),
            ]
        chosen = next((item for item in candidates if item in described.classes), None)
        if chosen is None:
            return None
        return cls(chosen, str(model_type), described.classes[chosen], config, described.conversions)

    @cached_property
    def submodels(self) -> list[Submodel]:
        """The nested models of the model. The class of a nested model depends on its model type in the config."""
        return list(_submodels(self.facts, self.config))

    @cached_property
    def _replaced(self) -> dict[str, Submodel]:
        """Maps module paths to those nested models whose class in the config differs from the class in ``facts``."""
        recorded = {path: name for path, name, _, _ in self.facts.submodels}
        return {sub.path: sub for sub in self.submodels if recorded.get(sub.path, sub.name) != sub.name}

    @property
    def embedding(self) -> str | None:
        """Module path of the input embedding, or None if the model has no input embedding for text."""
        path = self.facts.embedding
        for outer, sub in self._replaced.items():
            if path and path.startswith(f"{outer}."):
                facts = _class_facts(sub)
                return f"{outer}.{facts.embedding}" if facts and facts.embedding else path
        return path

    @property
    def head(self) -> str | None:
        """Module path of the output head, or None if the model has no head with a logit for every vocabulary entry."""
        return self.facts.head

    @cached_property
    def parameters(self) -> frozenset[str]:
        """The names of the model's parameters and buffers, as patterns with ``*`` for numbers."""
        names = {name for name in self.facts.parameters if not any(map(name.startswith, self._outer()))}
        for sub in self.submodels:
            facts = _class_facts(sub)
            names |= {f"{sub.path}.{name}" for name in facts.parameters} if facts else set()
        return frozenset(names)

    def _outer(self) -> list[str]:
        return [f"{path}." for path in self._replaced]

    @cached_property
    def ties(self) -> list[tuple[str, str]]:
        """Name patterns (tied parameter, source parameter) of all parameter pairs that are tied with this config."""
        renamed = self._rename_embedding
        return [
            (renamed(target), renamed(source))
            for tie in self.facts.ties
            if _flag(nested_config(self.config, tie.config), tie.default)
            for target, source in tie.pairs.items()
        ]

    def tied_with(self, parameter: str) -> list[tuple[str, str]]:
        """Return patterns (tied parameter, source parameter) of all pairs with the same flag as ``parameter``."""
        renamed, name = self._rename_embedding, pattern_of(parameter)
        pairs = [
            (tie.config, renamed(target), renamed(source))
            for tie in self.facts.ties
            for target, source in tie.pairs.items()
        ]
        places = {place for place, target, source in pairs if name in (target, source)}
        return [(target, source) for place, target, source in pairs if place in places]

    @cached_property
    def links(self) -> list[tuple[str, str]]:
        """Name patterns (tied parameter, source parameter) of all parameter pairs that the class can tie."""
        renamed = self._rename_embedding
        return [(renamed(target), renamed(source)) for tie in self.facts.ties for target, source in tie.pairs.items()]

    def states_tie(self, parameter: str) -> bool:
        """Whether the config sets the ``tie_word_embeddings`` flag that applies to ``parameter``."""
        name = pattern_of(parameter)
        return any(
            isinstance(nested_config(self.config, tie.config).get("tie_word_embeddings"), bool)
            for tie in self.facts.ties
            if name in map(self._rename_embedding, (*tie.pairs, *tie.pairs.values()))
        )

    @cached_property
    def tables(self) -> list[tuple[str, int, str]]:
        """Tuples (name pattern, axis, dotted config key of the axis size) for parameters with a vocabulary axis."""
        return [(self._rename_embedding(name), axis, key) for name, axis, key in self.facts.tables]

    def _rename_embedding(self, name: str) -> str:
        old, new = self.facts.embedding, self.embedding
        return f"{new}{name[len(old) :]}" if old and new and name.startswith(f"{old}.") else name

    def stores_in_out(self, module: str) -> bool:
        """Whether the weight of ``module`` has the shape (in, out) instead of (out, in)."""
        return pattern_of(module) in self.facts.transposed

    def renamers(self) -> list[Renamer]:
        """Return the compiled renamings and converters of the stored tensors, in the order used by transformers.

        The transforms of a nested model apply only to the tensors of the nested model. If a model contains a nested
        model of the same class or model type, the transforms of the class or model type are applied only once.
        """
        seen: dict[str, list[str]] = {}
        renamers: list[Renamer] = []
        own = Submodel("", self.name, "", self.model_type)
        for sub in (own, *self.submodels):
            if _enclosed(sub.path, seen.get(sub.name, [])):
                continue
            transforms = self._transforms(sub.name)
            by_class = transforms is not None
            if not by_class:
                if _enclosed(sub.path, seen.get(sub.model_type, [])):
                    continue
                transforms = self._transforms(sub.model_type)
            if transforms is None:
                continue
            scope = sub.path.removeprefix(self.facts.prefix).removeprefix(".") if sub.path else None
            renamers += [Renamer(transform, scope, self.facts.prefix) for transform in transforms]
            seen.setdefault(sub.name, []).append(sub.path)
            if not by_class:
                seen.setdefault(sub.model_type, []).append(sub.path)
        return renamers + [
            Renamer(transform, None, self.facts.prefix) for transform in self._transforms("legacy") or ()
        ]

    def _transforms(self, name: str) -> Sequence[Transform] | None:
        return self.conversions.get(name) if self.conversions else conversions_of(name)


def task_classes(architecture: Architecture, parameter: str) -> list[str]:
    """Return the names of the other classes of the model type that have ``parameter``, such as a classifier's head."""
    described = type_facts(architecture.model_type)
    classes = described.classes if described else {}
    return [name for name in sorted(classes) if name != architecture.name and parameter in classes[name].parameters]


def _enclosed(path: str, seen: list[str]) -> bool:
    return any(not outer or path.startswith(f"{outer}.") for outer in seen)


def _flag(config: Mapping[str, Any], default: bool | None) -> bool:
    flag = config.get("tie_word_embeddings", default)
    return bool(flag)


def _class_facts(sub: Submodel) -> ClassFacts | None:
    described = type_facts(sub.model_type)
    return described.classes.get(sub.name) if described else None


def _submodels(facts: ClassFacts, config: Mapping[str, Any], outer: str = "", place: str = "") -> Iterator[Submodel]:
    replaced: list[str] = []
    for path, name, own_place, model_type in facts.submodels:
        if any(path.startswith(f"{parent}.") for parent in replaced):
            continue
        full_path, full_place = f"{outer}{path}", f"{place}.{own_place}".strip(".")
        actual = nested_config(config, full_place).get("model_type", model_type) if own_place else model_type
        base = base_class(actual) if isinstance(actual, str) and actual != model_type else None
        if base is None:
            yield Submodel(full_path, name, full_place, model_type)
            continue
        replaced.append(path)
        sub = Submodel(full_path, base, full_place, actual)
        yield sub
        nested = _class_facts(sub)
        if nested:
            yield from _submodels(nested, config, f"{full_path}.", full_place)
