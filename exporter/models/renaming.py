"""Translate names of stored tensors to parameter names of the loaded model, as transformers does during loading.

Sources: ``WeightTransform``, ``GroupWeightRename``, ``Inkling2IndexOffsetWeightRename`` and ``rename_source_key`` in
transformers' module core_model_loading, and ``get_model_conversion_mapping`` in the module conversion_mapping.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final

from exporter.models.facts import Transform

#: A lookahead or lookbehind assertion, which must be removed from a replacement text.
_ASSERTION: Final = re.compile(r"\(\?.+?\)?\)")
_GROUP: Final = re.compile(r"\(.+?\)")
_WORD_END: Final = re.compile(r"[a-zA-Z0-9]$")


@dataclass(frozen=True)
class Match:
    """The new name of a stored tensor. source: the number of the source pattern that matched the stored name."""

    name: str
    source: int


@dataclass
class Renamer:
    """A compiled renaming or converter for the tensors of a model or of a nested model.

    scope: the path of the nested model to whose tensors the transform applies, or None for all tensors. prefix: the
    base model prefix of the outermost model. Names of stored tensors may lack the base model prefix. active: for a
    group of renamings, whether the first pattern of the group matches a stored tensor. If the first pattern matches no
    stored tensor, the other renamings of the group are ignored.
    """

    transform: Transform
    scope: str | None
    prefix: str
    active: bool = True
    targets: list[str] = field(init=False)
    _compiled: re.Pattern[str] = field(init=False)

    def __post_init__(self) -> None:
        groups = [_replacement(target)[1] for target in self.transform.targets]
        group = next(filter(None, groups), None)
        self.targets = [_replacement(target)[0] for target in self.transform.targets]
        self._compiled = re.compile("|".join(self._branches(group)))

    def _branches(self, group: str | None) -> Iterable[str]:
        sources, targets = self.transform.sources, self.transform.targets
        patterns = []
        for number, source in enumerate(sources):
            if group and r"\1" in source:
                source = source.replace(r"\1", group, 1)
            if len(sources) == len(targets) and targets[number].startswith("^") and not source.startswith("^"):
                source = f"^{source}"
            patterns.append((number, source))
        for number, source in sorted(patterns, key=lambda item: -len(item[1])):
            pattern = source.replace("*.", r".*\.")
            yield f"(?P<g{number}>{pattern}{'(?!' + chr(92) + 'w)' if _WORD_END.search(pattern) else ''})"

    def rename(self, name: str) -> Match | None:
        """Return the match with the new name, or None if the transform does not apply to the stored tensor ``name``."""
        start = self._scope(name)
        if start is None:
            return None
        rest = name[len(start) :]
        match = self._compiled.search(rest)
        if match is None:
            return None
        label = next(label for label, value in match.groupdict().items() if value is not None)
        number = int(label[1:])
        grouped = self.transform.name == "GroupWeightRename"
        if grouped and number != 0 and not self.active:
            return None
        replacement = self.targets[number if grouped else 0]
        first = self._compiled.groupindex[label]
        if self.transform.offset:
            replacement = replacement.replace(r"\1", str(int(match[first + 1]) + self.transform.offset))
        elif grouped:
            replacement = re.sub(r"\\(\d+)", lambda number: match[first + int(number[1])], replacement)
        elif r"\1" in replacement:
            replacement = replacement.replace(r"\1", match[first + 1])
        return Match(start + rest.replace(match[0], replacement, 1), number)

    def _scope(self, name: str) -> str | None:
        if self.scope is None:
            return ""
        scope = f"{self.scope}." if self.scope else ""
        prefix = f"{self.prefix}." if self.prefix else ""
        return next((start for start in (prefix + scope, scope) if name.startswith(start)), None)

    def activate(self, names: Iterable[str]) -> None:
        """Set ``active`` if the transform is a group of renamings. names: the names of all stored tensors."""
        if self.transform.name == "GroupWeightRename":
            self.active = any((match := self.rename(name)) is not None and match.source == 0 for name in names)


def _replacement(target: str) -> tuple[str, str | None]:
    """Convert the pattern ``target`` to a replacement for ``re.sub``, and return (text, capturing group or None)."""
    text = _ASSERTION.sub("", target.removeprefix("^"))
    group = _GROUP.search(text)
    if group:
        text = text.replace(group[0], r"\1", 1)
    return text.replace(r"\.", "."), group[0] if group else None


def rename(name: str, renamers: Sequence[Renamer]) -> tuple[str, tuple[Renamer, int] | None]:
    """Apply all renamings to ``name`` in order, and then the first matching converter, if any.

    Returns a pair (parameter name, matched converter). The matched converter is itself a pair (converter, number of the
    source pattern that matched), or None if no converter matched. If the converter has several targets, the name of the
    first target is returned.
    """
    for renamer in renamers:
        if not renamer.transform.operations and (match := renamer.rename(name)):
            name = match.name
    for renamer in renamers:
        if renamer.transform.operations and (match := renamer.rename(name)):
            return match.name, (renamer, match.source)
    return name, None
