"""Options as data. One field defines the flag, the key in release.toml, the Python argument, the help and the rule.

A group of options is a frozen dataclass with fields made by ``option``. The group validates itself. Error messages name
options as flags on the command line (``--imatrix``), and as keys in release.toml (``gguf.imatrix``).
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
    """The type of an option's value. The text of a member follows the word "expected" in messages."""

    TEXT = "a string"
    SIZE = "a size such as 500M, 2GB or 1.5GiB"
    COUNT = "a number of 1 or more"
    PATH = "a path"
    SWITCH = "true or false"


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """One option, as users see it.

    flag: name of the option on the command line. choices: the allowed values; an empty tuple allows any value.
    repeatable: whether the field is a tuple. A repeatable flag may be given several times, and its key contains a list.
    accepts: a function that returns whether this option takes a given value. Needed if several formats share one flag.
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
        """The name of the option in a table of release.toml."""
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
    """Make a field of an ``Options`` class. The option is repeatable if ``default`` is a tuple.

    flag: name of the flag; by default the field's name with dashes.
    """
    settings = {"help": help, "flag": flag, "type": type, "metavar": metavar, "choices": tuple(choices)}
    return field(default=default, metadata={_META: {**settings, "accepts": accepts}})


class OptionError(UsageError):
    """An option has an invalid value, or contradicts another option."""

    def __init__(self, group: type[Options], name: str, reason: str) -> None:
        """reason: the part of the message after the colon. In it, ``{name}`` stands for another option of the group."""
        self.group, self.name, self.reason = group, name, reason
        super().__init__(self.worded(lambda group, option: option.name))

    def worded(self, spell: Callable[[type[Options], Option], str]) -> str:
        """The message, with every option named by ``spell``."""
        known = self.group.options()
        reason = _REFERENCE.sub(lambda m: spell(self.group, known[m[1]]) if m[1] in known else m[0], self.reason)
        return f"{spell(self.group, known[self.name])}: {reason}"


def as_flag(group: type[Options], option: Option) -> str:
    """The name of an option on the command line."""
    return option.flag


def as_key(group: type[Options], option: Option) -> str:
    """The name of an option in release.toml, including the name of its table."""
    return f"{group.section}.{option.key}" if group.section else option.key


@dataclass(frozen=True, kw_only=True)
class Options:
    """A group of options.

    section: name of the group's table in release.toml, or "" for keys outside of tables. The constructor accepts sizes
    as text (``2G``) and paths as strings. Raises OptionError, a UsageError.
    """

    section: ClassVar[str] = ""

    @classmethod
    def options(cls) -> dict[str, Option]:
        """Field name → option, in the order of the fields."""
        return {field.name: _option(field) for field in fields(cls)}

    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> Self:
        """Make the group from ``values``: field name → value from TOML or a command line.

        None stands for the default.
        """
        return cls(**{name: value for name, value in values.items() if value is not None})

    def __post_init__(self) -> None:
        """Convert every value, then check the rules of the group."""
        for name, entry in self.options().items():
            value = getattr(self, name)
            if entry.repeatable:
                object.__setattr__(self, name, self._read_all(entry, value))
            elif value is not None:
                object.__setattr__(self, name, self._read(entry, value))
        self.check()

    def check(self) -> None:
        """Check the rules between options. Raises OptionError."""

    def fault(self, name: str, reason: str) -> OptionError:
        """The error for the option ``name``."""
        return OptionError(type(self), name, reason)

    def to_json(self) -> dict[str, Any]:
        """Key → value of every option, as in release.toml. Files are given by their names without folders."""
        return {entry.key: _json(getattr(self, name)) for name, entry in self.options().items()}

    def changed(self) -> dict[str, Any]:
        """Key → value, as in ``to_json``, of the options that differ from their defaults."""
        return {
            _option(field).key: _json(getattr(self, field.name))
            for field in fields(self)
            if getattr(self, field.name) != field.default
        }

    def files(self) -> dict[str, Path]:
        """Key → path of the options that name files or folders."""
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
    assert field.default is not MISSING, f"{field.name}: an option has a default"
    return Option(name=field.name, flag=flag, repeatable=isinstance(field.default, tuple), **settings)


def _json(value: Any) -> Any:
    match value:
        case Path():
            return value.name
        case tuple():
            return [_json(member) for member in value]
    return value
