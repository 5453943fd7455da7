"""How an artifact is verified, as options."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Final

from exporter.options import Options, ValueType, option
from exporter.verify.runtimes.installed import NAMES

#: From the cheapest to the strongest; each holds those before it.
LEVELS: Final = ("rows", "weights", "full")


@dataclass(frozen=True, kw_only=True)
class VerifyOptions(Options):
    """Which proof is asked for, and where its report goes."""

    section: ClassVar[str] = "verify"

    level: str = option(
        "rows",
        "off: nothing. rows: read the trained rows, the tie and the files beside the weights again from disk. weights: "
        "every stored value as well. full: also run the artifact against transformers with PEFT, unmerged.",
        flag="--verify",
        choices=("off", *LEVELS),
    )
    prompts: Path | None = option(
        None,
        "Text file with a prompt a line, beside the built-in texts of a full verification.",
        type=ValueType.PATH,
        metavar="FILE",
    )
    require: tuple[str, ...] = option((), "Fail with exit 6 unless this runtime is installed.", choices=NAMES)
    report: Path | None = option(
        None, "Folder for report.json, report.xml (JUnit) and report.html.", type=ValueType.PATH, metavar="DIR"
    )

    def check(self) -> None:
        """Only a full verification runs a model; without any there is nothing to report."""
        if self.prompts and self.level != "full":
            raise self.fault("prompts", "needs {level} full: no other level runs a model")
        if self.report and self.level == "off":
            raise self.fault("report", "needs a verification, found {level} off")
