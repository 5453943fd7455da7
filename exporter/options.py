"""Options as data.

Define each option of ttexport once, as a dataclass field. The dataclass field of an option determines its command-line
flag, release.toml key, help text and allowed values. A group of options is a frozen dataclass whose fields are created
by the function ``option``. The group validates itself. An error message names an option by its flag (``--imatrix``) if
the option was given on the command line, and by its key (``gguf.imatrix``) if the option was given in release.toml.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields
from enum import Enum
from pathlib import Path
from typing import Any, ClassVar, Final, Self

from exporter.errors import UsageError
from exporter.sizes import parse_size

_META: Final = "option"
_REFERENCE: Final = re.compile(r"\{(\w+)\}")


class ValueType(Enum):
    """The value type of an option, such as text or a path.

    The value of each enum member is the text after "expected" in error messages.
    """

    TEXT = "a string"
    SIZE = "a size such as 500M, 2GB or 1.5GiB"
    COUNT = "a number of 1 or more"
    PATH = "a path"
    SWITCH = "true or false"


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """The definition of an option.

    flag: name of the option on the command line. choices: the allowed values; an empty tuple allows any value.
    repeatable: whether the field is a tuple. The flag of a repeatable option may be given several times, and the value
    in release.toml is a list. accepts: a function that returns whether the option accepts a given value. If several
    output formats share a flag, each value is passed to the formats whose ``accepts`` returns True.
    """

    name: str
    help: str
    flag: str
    type: ValueType
    metavar: str | None = None
    choices: tuple[str, ...] = ()
    repeatable: bool = False
    accepts: Callable[[str], bool] | None = None

    @property
    def key(self) -> str:
        """Name of the option within its table in release.toml."""
        return self.name.replace("_", "-")


def option(
    default: Any,
    help: str,
    *,
    flag: str | None = None,
    type: ValueType = ValueType.TEXT,
    metavar: str | None = None,
    choices: Sequence[str] = (),
    accepts: Callable[[str], bool] | None = None,
) -> Any:
    """Create a field of an ``Options`` class. The option is repeatable if ``default`` is a tuple.

    flag: name of the flag; by default, the name of the field with dashes in place of underscores.
    """
    settings = {"help": help, "flag": flag, "type": type, "metavar": metavar, "choices": tuple(choices)}
    return field(default=default, metadata={_META: {**settings, "accepts": accepts}})


class OptionError(UsageError):
    """Raised if an option has an invalid value or contradicts another option."""

    def __init__(self, group: type[Options], name: str, reason: str) -> None:
        """reason: the message after the colon.

        A placeholder ``{name}`` stands for the flag or key of the option ``name``.
        """
        self.group, self.name, self.reason = group, name, reason
        super().__init__(self.worded(lambda group, option: option.name))

    def worded(self, spell: Callable[[type[Options], Option], str]) -> str:
        """Return the error message. The function ``spell`` returns the flag or key of an option, as text."""
        known = self.group.options()
        reason = _REFERENCE.sub(lambda m: spell(self.group, known[m[1]]) if m[1] in known else m[0], self.reason)
        return f"{spell(self.group, known[self.name])}: {reason}"


def as_flag(group: type[Options], option: Option) -> str:
    """Return the command-line flag of an option, such as ``--imatrix``."""
    return option.flag


def as_key(group: type[Options], option: Option) -> str:
    """Return the key of an option in release.toml, preceded by the name of its table, such as ``gguf.imatrix``."""
    return f"{group.section}.{option.key}" if group.section else option.key


@dataclass(frozen=True, kw_only=True)
class Options:
    """Base class of a group of options.

    section: name of the group's table in release.toml, or "" for top-level keys. The constructor accepts sizes as text
    (``2G``) and paths as strings. The constructor raises OptionError, a subclass of UsageError, for an invalid value.
    """

    section: ClassVar[str] = ""

    @classmethod
    def options(cls) -> dict[str, Option]:
        """Map the name of each field to its option, in the order of the fields."""
        return {field.name: _option(field) for field in fields(cls)}

    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> Self:
        """Create the group of options from ``values``.

        values: maps field names to values from release.toml or the command line. A value of None selects the default of
        the field.
        """
        return cls(**{name: value for name, value in values.items() if value is not None})

    def __post_init__(self) -> None:
        """Convert every value to the type of its option, then check the rules that involve several options."""
        for name, entry in self.options().items():
            value = getattr(self, name)
            if entry.repeatable:
                object.__setattr__(self, name, self._read_all(entry, value))
            elif value is not None:
                object.__setattr__(self, name, self._read(entry, value))
        self.check()

    def check(self) -> None:
        """Check the rules that involve several options of the group. Raises OptionError."""

    def fault(self, name: str, reason: str) -> OptionError:
        """Return an OptionError for the option ``name``."""
        return OptionError(type(self), name, reason)

    def to_json(self) -> dict[str, Any]:
        """Map the release.toml key of every option to its value.

        If the value of an option is a path, only the file name is returned.
        """
        return {entry.key: _json(getattr(self, name)) for name, entry in self.options().items()}

    def changed(self) -> dict[str, Any]:
        """Map the release.toml keys of the options that differ from their defaults to the values, as in ``to_json``."""
        return {
            _option(field).key: _json(getattr(self, field.name))
            for field in fields(self)
            if getattr(self, field.name) != field.default
        }

    def files(self) -> dict[str, Path]:
        """Return the paths among the values of the options, as a dict with the release.toml keys of the options."""
        paths = [(name, entry) for name, entry in self.options().items() if entry.type is ValueType.PATH]
        return {entry.key: path for name, entry in paths if (path := getattr(self, name)) is not None}

    def _read_all(self, entry: Option, values: Any) -> tuple[Any, ...]:
        if isinstance(values, str) or not isinstance(values, Iterable):
            raise self.fault(entry.name, f"expected a list, found {values!r:.80}")
        converted = tuple(self._read(entry, value) for value in values)
        if len({str(value).lower() for value in converted}) != len(converted):
            raise self.fault(entry.name, f"expected each value once, found {', '.join(map(str, converted))}")
        return converted

    def _read(self, entry: Option, value: Any) -> Any:
        expected: str = entry.type.value
        match entry.type, value:
            case ValueType.SIZE, str():
                try:
                    return parse_size(value)
                except ValueError as exc:
                    raise self.fault(entry.name, str(exc)) from exc
            case ValueType.PATH, str() | Path():
                return Path(value)
            case ValueType.SWITCH, bool():
                return value
            case ((ValueType.SIZE | ValueType.COUNT), int()) if value >= 1 and not isinstance(value, bool):
                return value
            case ValueType.TEXT, str():
                if not entry.choices or value in entry.choices:
                    return value
                expected = ", ".join(entry.choices)
        raise self.fault(entry.name, f"expected {expected}, found {value!r:.80}")


def _option(field: Field[Any]) -> Option:
    settings = dict(field.metadata[_META])
    flag = settings.pop("flag") or f"--{field.name.replace('_', '-')}"
    assert field.default is not MISSING, f"{field.name}: every option must have a default"
    return Option(name=field.name, flag=flag, repeatable=isinstance(field.default, tuple), **settings)


def _json(value: Any) -> Any:
    match value:
        case Path():
            return value.name
        case tuple():
            return [_json(member) for member in value]
    return value
