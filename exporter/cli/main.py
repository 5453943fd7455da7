"""Run a subcommand of ``ttexport``, and turn an error into a one-line message and an exit code."""

from __future__ import annotations

import gc
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

#: Verb → the module that defines the verb under the same name. Only the verb that runs is imported.
VERBS: Final = {
    "merge": "exporter.cli.verbs.merge",
    "export": "exporter.cli.verbs.export",
    "patch": "exporter.cli.verbs.patch",
    "verify": "exporter.cli.verbs.verify",
    "plan": "exporter.cli.verbs.plan",
    "inspect": "exporter.cli.verbs.inspect",
    "tune": "tuner.cli",
    "release": "exporter.cli.verbs.release",
    "converter": "exporter.cli.verbs.converter",
}
#: One summary line for each verb. The summaries are kept here so that ``--help`` does not import the verbs.
_SUMMARIES: Final = {
    "merge": "Merge adapters into a checkpoint and write the result as HF, GGUF or ONNX.",
    "export": "Write a checkpoint, or a base with an adapter, in another format.",
    "patch": "Write an adapter's token rows into an existing GGUF file or ONNX folder.",
    "verify": "Verify that an artifact equals base plus adapters, or that a release matches its manifest.",
    "plan": "Show what merge, export or patch would write, without writing anything.",
    "inspect": "Show the content of an adapter, a checkpoint, a .gguf file or an ONNX folder.",
    "tune": "Train the embedding rows of a few tokens of a model, and write an adapter folder.",
    "release": "Make, verify and document every artifact that a release.toml lists.",
    "converter": "Install llama.cpp's converter, which writes the GGUFs of models without a built-in family.",
}
#: Maximum length of a printed line, because a name in a hostile file may take megabytes.
#: Number of new container objects after which Python searches for cycles.
_GC_THRESHOLD: Final = 200_000
_MAX_MESSAGE_CHARS: Final = 2000


class Verbs(click.Group):
    """A click group that imports the module of a subcommand only when the subcommand runs.

    If the subcommand is missing, as in ``ttexport --to gguf``, the subcommand ``export`` runs.
    """

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names of the subcommands, in the order of typical use."""
        return list(VERBS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        """Import the module of the subcommand ``name``, and return the subcommand."""
        if name not in VERBS:
            return None
        command: click.Command = getattr(importlib.import_module(VERBS[name]), name)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the one-line summaries of all subcommands without importing the subcommands' modules."""
        with formatter.section("Verbs"):
            formatter.write_dl(list(_SUMMARIES.items()))

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Insert the subcommand ``export`` before the arguments if the first argument is an option of ``export``."""
        if args and args[0].split("=")[0] in ("--to", "--dtype", "--quant", "-o"):
            args = ["export", *args]
        return super().parse_args(ctx, args)


@click.group(cls=Verbs, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, package_name="ttexport", message="%(prog)s %(version)s")
def cli() -> None:
    """Merge adapters with taught tokens into models, export the models, and verify the exported files.

    \b
    In an adapter folder:
      ttexport merge --to onnx          merge into the adapter's base, write an ONNX folder
      ttexport --to gguf                short for `ttexport export --to gguf`
      ttexport merge A --base B --to hf --to gguf --to onnx -o OUT

    \b
    Exit codes: 0 success, 1 unexpected error, 2 wrong usage, 3 artifact not equivalent, 4 bad input,
    5 format cannot represent the model, 6 missing optional package, 7 output cannot be written.
    """


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the script ``ttexport``."""
    # A checkpoint may have 100,000 tensors. With the default threshold, the search for cycles among the objects that
    # describe them takes a third of the time of a plan.
    gc.set_threshold(_GC_THRESHOLD)
    sys.exit(run(sys.argv[1:] if arguments is None else arguments))


def run(arguments: Sequence[str]) -> int:
    """Run a command line and return the exit code.

    An error is printed as one line to stderr. With --json, an error is also printed to stdout as a JSON document.
    """
    try:
        # click returns the exit code if a verb called exit, otherwise the return value of the verb.
        result = cli.main(args=list(arguments), prog_name="ttexport", standalone_mode=False)
    except click.Abort:
        return _fail(arguments, "interrupted", 130)
    except click.ClickException as exc:
        # click's usage lines are left out, because --help prints the usage.
        return _fail(arguments, exc.format_message(), UsageError.exit_code)
    except NotEquivalent as exc:
        return _fail(arguments, str(exc), exc.exit_code, exc.document)
    except TTExportError as exc:
        return _fail(arguments, str(exc), exc.exit_code)
    except BrokenPipeError:
        return OutputError.exit_code  # the reader closed standard output, so a message would not arrive
    except OSError as exc:
        return _fail(arguments, str(exc), OutputError.exit_code)
    except Exception as exc:
        if {"-v", "--verbose"} & set(arguments):
            traceback.print_exc()
        return _fail(arguments, f"unexpected error {type(exc).__name__}: {exc} (-v prints the traceback)", 1)
    return result if isinstance(result, int) else 0


def _one_line(message: str) -> str:
    line = printable(" ".join(message.split()))
    return line if len(line) <= _MAX_MESSAGE_CHARS else f"{line[:_MAX_MESSAGE_CHARS]}…"


def _fail(arguments: Sequence[str], message: str, code: int, document: Mapping[str, object] | None = None) -> int:
    line = _one_line(message)
    print(f"ttexport: {line}", file=sys.stderr)
    if "--json" in arguments:
        print(json.dumps({"error": {"exit_code": code, "message": line}, **(document or {})}, indent=2))
    return code
