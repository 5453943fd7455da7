"""docs/options.md, made from the option groups: ``python -m tests.support.options_page`` writes it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from exporter.cli.options import format_groups
from exporter.export.spec import MergeOptions
from exporter.options import Options, as_key
from exporter.verify.options import VerifyOptions

PAGE = Path(__file__).parents[2] / "docs" / "options.md"
_HEAD = """# Options

Options of `merge`, `export` and `release`. Each is a field of a Python class, a flag of the command line, and a key of
`release.toml`. A flag that several formats share goes to each of them. Sizes are written as `500M`, `2GB` or `1.5GiB`.
A release is verified at level `full` unless its file names another one.
"""


def render() -> str:
    """The page."""
    groups = [*format_groups(), VerifyOptions, MergeOptions]
    return _HEAD + "".join(line for group in groups for line in _section(group))


def _section(group: type[Options]) -> Iterator[str]:
    title = f"`[{group.section}]`" if group.section else "keys outside of tables"
    yield f"\n## {group.__name__}: {title}\n\n| argument | flag | key | values | |\n|---|---|---|---|---|\n"
    for name, entry in group.options().items():
        values = ", ".join(f"`{choice}`" for choice in entry.choices) or entry.type.value
        values = f"list: {values}" if entry.repeatable and entry.choices else values
        values = "list of strings" if entry.repeatable and not entry.choices else values
        yield f"| `{name}` | `{entry.flag}` | `{as_key(group, entry)}` | {values} | {entry.help} |\n"


if __name__ == "__main__":
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(render())
