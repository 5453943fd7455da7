"""``ttexport``: find the verb, run it, turn what went wrong into one line and an exit code."""

from __future__ import annotations

import importlib
import json
import sys
import traceback
from collections.abc import Mapping, Sequence
from typing import Final

import click

from exporter.cli.text import printable
from exporter.errors import NotEquivalent, OutputError, TTExportError, UsageError
from exporter.version import __version__

#: verb → module that holds it under that name. Only the verb that runs is imported.
VERBS: Final = {
    "merge": "exporter.cli.verbs.merge",
    "export": "exporter.cli.verbs.export",
    "patch": "exporter.cli.verbs.patch",
    "verify": "exporter.cli.verbs.verify",
    "plan": "exporter.cli.verbs.plan",
    "inspect": "exporter.cli.verbs.inspect",
    "tune": "tuner.cli",
    "release": "exporter.cli.verbs.release",
}
#: One line a verb, here so that ``--help`` imports none of them.
_SUMMARIES: Final = {
    "merge": "Merge adapters into a checkpoint and write it as HF, GGUF or ONNX.",
    "export": "Write a checkpoint, or an adapter on its base, in another format.",
    "patch": "Put an adapter's token rows into an existing GGUF or ONNX folder.",
    "verify": "Prove that an artifact equals base and adapters, or a release what was released.",
    "plan": "Show what merge, export or patch would write; writes nothing.",
    "inspect": "Show what an adapter, a checkpoint, a .gguf or an ONNX folder holds.",
    "tune": "Teach a model a few tokens; writes an adapter folder.",
    "release": "Make, verify and describe every artifact that a release.toml asks for.",
}
#: A name in a hostile file may have megabytes.
_MAX_MESSAGE: Final = 2000


class Verbs(click.Group):
    """A group that imports a verb when it runs, and reads ``ttexport --to gguf`` as ``ttexport export --to gguf``."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """In the order in which they are used."""
        return list(VERBS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        """The verb ``name``, imported now."""
        if name not in VERBS:
            return None
        command: click.Command = getattr(importlib.import_module(VERBS[name]), name)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The summaries, without importing what they summarise."""
        with formatter.section("Verbs"):
            formatter.write_dl(list(_SUMMARIES.items()))

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Insert ``export`` where the first word is an option of that verb."""
        if args and args[0].split("=")[0] in ("--to", "--dtype", "--quant", "-o"):
            args = ["export", *args]
        return super().parse_args(ctx, args)


@click.group(cls=Verbs, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, package_name="ttexport", message="%(prog)s %(version)s")
def cli() -> None:
    """Ship models with taught tokens: merge, export, prove.

    \b
    In an adapter folder:
      ttexport merge --to onnx          merge into the adapter's base, write an ONNX folder
      ttexport --to gguf                the same as `ttexport export --to gguf`
      ttexport merge A --base B --to hf --to gguf --to onnx -o OUT

    \b
    Exit codes: 0 done, 1 unexpected, 2 usage, 3 not equivalent, 4 bad input,
    5 cannot be expressed in that target, 6 missing optional dependency, 7 no space or IO.
    """


def main(arguments: Sequence[str] | None = None) -> None:
    """The entry point of the script ``ttexport``."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    sys.exit(run(words))


def run(words: Sequence[str]) -> int:
    """Run the command line ``words``; its exit code. Errors are one line on stderr, and a JSON document with --json."""
    try:
        # click returns the code of a verb that called exit, and whatever else a verb returns
        result = cli.main(args=list(words), prog_name="ttexport", standalone_mode=False)
    except click.Abort:
        return _fail(words, "interrupted", 130)
    except click.ClickException as exc:
        # click writes over several lines; the usage hint is what --help is for
        return _fail(words, exc.format_message(), UsageError.exit_code)
    except NotEquivalent as exc:
        return _fail(words, str(exc), exc.exit_code, exc.document)
    except TTExportError as exc:
        return _fail(words, str(exc), exc.exit_code)
    except BrokenPipeError:
        return OutputError.exit_code  # whoever read standard output has gone: there is nobody to tell
    except OSError as exc:
        return _fail(words, str(exc), OutputError.exit_code)
    except Exception as exc:
        if {"-v", "--verbose"} & set(words):
            traceback.print_exc()
        return _fail(words, f"unexpected {type(exc).__name__}: {exc} (-v shows where)", 1)
    return result if isinstance(result, int) else 0


def _one_line(message: str) -> str:
    line = printable(" ".join(message.split()))
    return line if len(line) <= _MAX_MESSAGE else f"{line[:_MAX_MESSAGE]}…"


def _fail(words: Sequence[str], message: str, code: int, document: Mapping[str, object] | None = None) -> int:
    line = _one_line(message)
    print(f"ttexport: {line}", file=sys.stderr)
    if "--json" in words:
        print(json.dumps({"error": {"exit_code": code, "message": line}, **(document or {})}, indent=2))
    return code
