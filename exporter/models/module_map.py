"""Map the parameters of the loaded model to the stored tensors of a checkpoint."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final

from exporter.models.architecture import Architecture, pattern_of
from exporter.models.facts import Transform
from exporter.models.renaming import Renamer, rename

if TYPE_CHECKING:
    from exporter.models.placement import Placed

#: A literal number in a pattern. A name that contains a different number does not match the pattern.
_LITERAL: Final = re.compile(r"(?<![\[{\\,])\\?\.\d|\(\?[!=]\d")
_NUMBERS: Final = re.compile(r"\.(\d+)(?![^.])")
#: The smallest placeholder for a number in a name. Placeholders are long, so that no name contains one by chance.
_STAND_IN: Final = 7_310_000
_STAND_INS: Final = re.compile(r"(73100\d\d)")


@dataclass
class Group:
    """The stored tensors from which transformers makes a parameter of the loaded model.

    transform: the converter, or None if the parameter is a renamed stored tensor. sources: pairs (number of the source
    pattern, stored name), in the order in which the converter reads the tensors. target: the index of the parameter
    among the parameters that the converter makes.
    """

    transform: Transform | None
    sources: list[tuple[int, str]] = field(default_factory=list)
    target: int = 0


@dataclass(frozen=True)
class ModuleMap:
    """A map from the full parameter names of the loaded model to the stored tensors of a checkpoint."""

    architecture: Architecture
    groups: Mapping[str, Group]

    @classmethod
    def of(cls, architecture: Architecture, names: Collection[str]) -> ModuleMap:
        """Map the parameters of ``architecture`` to the stored tensors ``names``, without reading tensor data."""
        renamers = architecture.renamers()
        for renamer in renamers:
            renamer.activate(names)
        groups: dict[str, Group] = {}
        for name, (parameter, converter) in _renamed(architecture, renamers, names):
            if converter is None:
                groups.setdefault(parameter, Group(None)).sources.append((0, name))
                continue
            renamer, source = converter
            group = groups.get(parameter)
            if group is None or group.transform is None:
                group = Group(renamer.transform)
                for number, target in enumerate(_targets(renamer, parameter)):
                    groups[target] = Group(renamer.transform, group.sources, number)
            group.sources.append((source, name))
        return cls(architecture, groups)

    @cached_property
    def parameter_of(self) -> dict[str, str]:
        """Map the name of each stored tensor to the name of the first parameter that contains the stored tensor."""
        names: dict[str, str] = {}
        for parameter, group in self.groups.items():
            for _, name in group.sources:
                names.setdefault(name, parameter)
        return names

    def stored_name(self, parameter: str) -> str | None:
        """Return the name of the stored tensor that equals ``parameter``, or None if there is no such tensor."""
        group = self.groups.get(parameter)
        return group.sources[0][1] if group and group.transform is None else None

    def placed(
        self, parameter: str, shape_of: Callable[[str], Sequence[int]], expected: Sequence[int] | None = None
    ) -> Placed | None:
        """Return ``parameter`` as a composition of stored tensors, or None if the checkpoint lacks ``parameter``.

        shape_of: a function that returns the shape of a stored tensor. expected: the parameter's shape, if known.
        Raises ValueError if transformers' converter cannot be applied to the stored tensors.
        """
        from exporter.models.operations import convert  # a lazy import: few merges need the module
        from exporter.models.placement import stored

        group = self.groups.get(parameter)
        if group is None:
            return None
        if group.transform is None:
            name = group.sources[0][1]
            return stored(name, shape_of(name))
        parts: dict[str, list[Placed]] = {}
        for number, name in group.sources:
            parts.setdefault(group.transform.sources[number], []).append(stored(name, shape_of(name)))
        return convert(group.transform, parts, self.architecture.config, expected).get(group.target)

    def find(self, module: str, parameter: str) -> str | None:
        """Return the loaded model's name of the adapter's ``module.parameter``, or None if there is no such parameter.

        An adapter may use parameter names that differ from the loaded model's names, for two reasons. The adapter may
        have been trained with a different class of the same model type, for example a class with or without the base
        model prefix, or the text model of a vision-language model. The adapter may also have been trained with a
        version of transformers whose module names equal the names of the stored tensors.
        """
        return next((name for name in self.spellings(module, parameter) if name in self.groups), None)

    def find_tied(self, module: str, parameter: str) -> str | None:
        """Return the stored parameter to which the config ties ``module.parameter``, or None if there is no tie."""
        for name in self.spellings(module, parameter):
            for pair in self.architecture.ties:
                if pattern_of(name) in pair:
                    partner = pair[1 - pair.index(pattern_of(name))]
                    if partner in self.groups:
                        return partner
        return None

    def loads(self, name: str) -> str:
        """Return the parameter into which transformers would load a stored tensor called ``name``."""
        return _parameter(self.architecture, self._renamers, name)[0]

    def find_stored(self, module: str, parameter: str) -> str | None:
        """Return the stored tensor that an adapter calls ``module.parameter``, or None if there is no such tensor.

        An adapter that was trained with an old version of transformers may name a stored tensor that newer versions
        fuse or stack with other tensors when the model is loaded.
        """
        name = f"{module}.{parameter}"
        prefix = self.architecture.facts.prefix
        for candidate in (name, f"{prefix}.{name}", name.removeprefix(f"{prefix}.")):
            if candidate in self.parameter_of:
                return candidate
        renamed, _ = rename(name, self._plain)
        return next((stored for stored, end in self._plainly_renamed.items() if end == renamed), None)

    @cached_property
    def _plain(self) -> list[Renamer]:
        return [renamer for renamer in self._renamers if not renamer.transform.operations]

    @cached_property
    def _plainly_renamed(self) -> dict[str, str]:
        converted = [group for group in self.groups.values() if group.transform is not None]
        names = {name for group in converted for _, name in group.sources}
        return {name: rename(name, self._plain)[0] for name in sorted(names)}

    def spellings(self, module: str, parameter: str) -> Iterator[str]:
        """Yield possible names of ``parameter`` of ``module`` in the model class, with the likeliest name first."""
        name = f"{module}.{parameter}"
        yield name
        yield _with_prefix(self.architecture, name)
        renamed, _ = rename(name, self._renamers)
        yield _with_prefix(self.architecture, renamed)
        for sub in self.architecture.submodels:
            if "text" in sub.place or sub.path.endswith("language_model"):
                yield f"{sub.path}.{name}"
                yield f"{sub.path}.{name.partition('.')[2]}"
        for segment in ("language_model.", "text_model."):
            if name.startswith(f"{segment}model."):
                yield f"model.{segment}{name.removeprefix(f'{segment}model.')}"
            if segment in name:
                short = name.replace(segment, "", 1)
                yield short
                yield _with_prefix(self.architecture, short)
                yield _with_prefix(self.architecture, short.replace("model.model.", "model."))

    @cached_property
    def _renamers(self) -> list[Renamer]:
        return self.architecture.renamers()


def _renamed(
    architecture: Architecture, renamers: Sequence[Renamer], names: Iterable[str]
) -> Iterator[tuple[str, tuple[str, tuple[Renamer, int] | None]]]:
    """Yield (stored name, (parameter, converter)) for all ``names``.

    Names that differ only in numbers are in numeric order. For speed, names that differ only in numbers are renamed
    together, because a checkpoint may contain 100,000 expert tensors.
    """
    if any(renamer.transform.offset or any(map(_LITERAL.search, renamer.transform.sources)) for renamer in renamers):
        for name in sorted(names, key=_natural):
            yield name, _parameter(architecture, renamers, name)
        return
    by_shape: dict[tuple[str, ...], list[tuple[tuple[int, ...], str]]] = {}
    for name in names:
        parts = _NUMBERS.split(f".{name}")  # the added dot also makes a number at the start match
        by_shape.setdefault(tuple(parts[::2]), []).append((tuple(map(int, parts[1::2])), name))
    for texts, entries in by_shape.items():
        stand_ins = [str(_STAND_IN + number) for number in range(len(texts) - 1)]
        joined = texts[0] + "".join(f".{number}{text}" for number, text in zip(stand_ins, texts[1:], strict=True))
        template, converter = _parameter(architecture, renamers, joined[1:])
        pieces = _STAND_INS.split(template)
        order = [int(number) - _STAND_IN for number in pieces[1::2]]
        pattern = "%d".join(text.replace("%", "%%") for text in pieces[::2])
        in_order = order == list(range(len(texts) - 1))
        for numbers, name in sorted(entries):
            yield name, (pattern % (numbers if in_order else tuple(numbers[at] for at in order)), converter)


def _parameter(
    architecture: Architecture, renamers: Sequence[Renamer], name: str
) -> tuple[str, tuple[Renamer, int] | None]:
    renamed, converter = rename(name, renamers)
    parameter = _with_prefix(architecture, renamed)
    known = architecture.parameters
    if pattern_of(parameter) not in known:
        unchanged = _with_prefix(architecture, name)
        if pattern_of(unchanged) in known:
            return unchanged, None
    return parameter, converter


def _with_prefix(architecture: Architecture, name: str) -> str:
    """Add or remove the base model prefix, so that ``name`` is a parameter name of the model class."""
    prefix, children = architecture.facts.prefix, architecture.facts.children
    if not prefix:
        return name
    known = architecture.parameters
    short = name.removeprefix(f"{prefix}.")
    if short != name and pattern_of(short) in known:
        return short
    longer = f"{prefix}.{name}"
    if pattern_of(longer) in known:
        return longer
    if pattern_of(name) in known:
        return name
    first = name.partition(".")[0]
    if first not in children:
        if first == prefix and short.partition(".")[0] in children:
            return short
        if prefix in children and any(item.startswith(f"{prefix}.{first}.") for item in known):
            return longer
    return name


def _targets(renamer: Renamer, parameter: str) -> list[str]:
    """Return the names of all parameters that a converter makes, given the name of the first parameter."""
    first = renamer.targets[0]
    start, _, end = parameter.partition(first)
    return [parameter] + [f"{start}{target}{end}" for target in renamer.targets[1:]]


def _natural(name: str) -> list[tuple[int, int, str]]:
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in name.split(".")]


def module_map(config: Mapping[str, Any], names: Collection[str], architecture: str | None = None) -> ModuleMap | None:
    """Map the parameters of the loaded model to stored tensors, or return None if no facts about the model class exist.

    config: the parsed config.json. names: the names of the stored tensors. architecture: the name of the class, or None
    to use the class named in the config. The function imports neither torch nor transformers.
    """
    described = Architecture.of(config, architecture)
    return ModuleMap.of(described, names) if described else None
