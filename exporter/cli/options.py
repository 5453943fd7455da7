"""Define command-line options that several subcommands share, and make options from the fields of dataclasses."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

import click

from exporter.errors import UsageError
from exporter.formats.hf.options import HfOptions
from exporter.formats.table import FORMATS
from exporter.formats.target import DTYPES, FormatOptions
from exporter.options import Option, OptionError, Options, ValueType, as_flag
from exporter.sizes import parse_size
from exporter.verify.options import VerifyOptions

if TYPE_CHECKING:
    from exporter.export.spec import ExportSpec

_Command = TypeVar("_Command", bound=Callable[..., Any])
_Decorator = Callable[[_Command], _Command]

PATH: Final = click.Path(path_type=Path)
DEFAULT_FORMAT: Final = HfOptions.section

to_option = click.option(
    "--to",
    "formats",
    type=click.Choice(list(FORMATS)),
    multiple=True,
    help=f"Format to write; default: {DEFAULT_FORMAT}. Repeatable.",
)
base_option = click.option(
    "--base",
    metavar="CHECKPOINT",
    help="Folder or hub id (org/name, org/name@revision) of the base; default: the base named in the adapter's config.",
)
out_option = click.option(
    "-o",
    "--out",
    type=PATH,
    help="File or folder to write (a folder for two or more artifacts); default: a name in the current folder, derived "
    "from the first input.",
)
force_option = click.option("--force", is_flag=True, help="Replace an existing OUT.")
dtype_choice = click.Choice(list(DTYPES))
_TALK_OPTIONS = (
    click.option("--json", "as_json", is_flag=True, help="Print one JSON document on standard output."),
    click.option("-q", "--quiet", is_flag=True, help="Print no progress and no table."),
    click.option("-v", "--verbose", is_flag=True, help="Print a traceback for unexpected errors."),
)
in_place_option = click.option(
    "--in-place",
    is_flag=True,
    help="Write the token rows into BASE itself. If the patch is interrupted, the next patch of BASE restores the old "
    "bytes first. If other bytes must move, for example because the vocabulary grows, BASE is replaced by a new file "
    "or folder.",
)


def flags(groups: Iterable[type[Options]]) -> dict[str, list[tuple[type[Options], Option]]]:
    """Map each command-line flag to the dataclass fields that the flag sets.

    Several formats may define the same flag, and the flag then sets a field in the options of each of these formats.
    """
    by_flag: dict[str, list[tuple[type[Options], Option]]] = {}
    for group in groups:
        for entry in group.options().values():
            by_flag.setdefault(entry.flag, []).append((group, entry))
    return by_flag


def format_groups() -> list[type[FormatOptions]]:
    """Return the option dataclasses of all formats."""
    return [row.options for row in FORMATS.values()]


def group_options(*groups: type[Options], only: Collection[str] | None = None) -> _Decorator[Any]:
    """Return a decorator that adds a command-line flag for every option of ``groups``, or only the flags in ``only``.

    The command function receives each value as the keyword argument named after the flag. The function ``values_of``
    selects the values that belong to one option dataclass.
    """

    def add(command: _Command) -> _Command:
        chosen = [entries for flag, entries in flags(groups).items() if only is None or flag in only]
        return _add(command, [_click_option(entries) for entries in chosen])

    return add


def output_options(command: _Command) -> _Command:
    """Add the command-line options --json, -q and -v."""
    return _add(command, _TALK_OPTIONS)


def values_of(group: type[Options], given: Mapping[str, Any]) -> dict[str, Any]:
    """Map the fields of the option dataclass ``group`` to the values given on the command line.

    given: the parameters parsed by click.
    """
    return {
        name: value
        for name, entry in group.options().items()
        if (value := given.get(_parameter(entry.flag))) not in (None, False, ())
    }


@contextmanager
def spelled_as_flags() -> Iterator[None]:
    """Convert an OptionError raised in the ``with`` body into a UsageError that names command-line flags."""
    try:
        yield
    except OptionError as exc:
        raise UsageError(exc.worded(as_flag)) from exc


def read_formats(names: Sequence[str], given: Mapping[str, Any]) -> tuple[FormatOptions, ...]:
    """Return the options of each format that is requested with --to, as an instance of the format's option dataclass.

    Each value of a repeatable flag is passed to the requested formats that accept the value.

    Raises UsageError for a flag that none of the requested formats has, and OptionError for an invalid value.
    """
    if len(set(names)) != len(names):
        raise UsageError(f"--to: expected each format once, found {', '.join(names)}")
    chosen = [FORMATS[name].options for name in names or (DEFAULT_FORMAT,)]
    values = {group: values_of(group, given) for group in chosen}
    for flag, entries in flags(format_groups()).items():
        value = given.get(_parameter(flag))
        takers = [(group, entry) for group, entry in entries if group in values]
        if value not in (None, ()) and value is not False and not takers:
            raise UsageError(f"{flag}: needs {' or '.join(f'--to {group.section}' for group, _ in entries)}")
        if len(takers) > 1 and takers[0][1].repeatable:
            for (group, entry), share in zip(takers, _shares(takers, value or ()), strict=True):
                values[group][entry.name] = share
    return tuple(group.parse(values[group]) for group in chosen)


def export_spec(
    *, adapters: tuple[str, ...], base: str | None, formats: tuple[str, ...], out: Path | None, **given: Any
) -> ExportSpec:
    """Build an ExportSpec from the parsed command-line options. Raises UsageError."""
    # The module is imported here because the verb ``patch`` uses this file but does not need the merge.
    from exporter.export.spec import ExportSpec, MergeOptions

    with spelled_as_flags():
        return ExportSpec(
            adapters=adapters,
            base=base,
            formats=read_formats(formats, given),
            out=out,
            merge=MergeOptions.parse(values_of(MergeOptions, given)),
            verify=VerifyOptions.parse(values_of(VerifyOptions, given)),
            force=given.get("force", False),
            quiet=given["quiet"],
        )


def _shares(takers: Sequence[tuple[type[Options], Option]], values: Sequence[str]) -> list[list[str]]:
    """Assign each value of a repeatable flag to the formats in ``takers`` that accept the value.

    A value that no format accepts is assigned to the first format, which then raises an error about the value.
    """
    shares: list[list[str]] = [[] for _ in takers]
    for value in values:
        places = [n for n, (_, entry) in enumerate(takers) if entry.accepts and entry.accepts(value)]
        for place in places or [0]:
            shares[place].append(value)
    return shares


def _parameter(flag: str) -> str:
    return flag.lstrip("-").replace("-", "_")


def _click_option(entries: Sequence[tuple[type[Options], Option]]) -> _Decorator[Any]:
    """Return the click option for a command-line flag.

    If several formats have the flag, its help text is made of the help texts of these formats.
    """
    texts = dict.fromkeys(entry.help for _, entry in entries)
    if len(texts) > 1:
        texts = {f"{group.section}: {entry.help}": None for group, entry in entries}
    entry = replace(entries[0][1], help=" ".join(texts))
    default = getattr(entries[0][0](), entry.name)
    settings: dict[str, Any] = {"help": entry.help + (" Repeatable." if entry.repeatable else "")}
    if entry.type is ValueType.SWITCH:
        settings |= {"is_flag": True}
    else:
        settings |= {"multiple": entry.repeatable, "metavar": entry.metavar, "type": _click_type(entry)}
    if entry.choices and isinstance(default, str):
        settings["help"] += f"  [default: {default}]"
    return click.option(entry.flag, _parameter(entry.flag), **settings)


def _click_type(entry: Option) -> click.ParamType[Any] | None:
    match entry.type:
        case ValueType.PATH:
            return PATH
        case ValueType.COUNT:
            return click.IntRange(min=1)
        case ValueType.SIZE:
            return _Size()
    return click.Choice(entry.choices) if entry.choices else None


class _Size(click.ParamType[int]):
    """A click parameter type that parses a number of bytes, such as ``500M``, ``2GB`` or ``1.5GiB``."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Parse ``value`` as a number of bytes. Raises click.BadParameter if ``value`` is not a size."""
        if isinstance(value, int):
            return value
        try:
            return parse_size(value)
        except ValueError as exc:
            self.fail(str(exc), param, ctx)


def _add(command: _Command, options: Sequence[_Decorator[Any]]) -> _Command:
    for option in reversed(options):
        command = option(command)
    return command
