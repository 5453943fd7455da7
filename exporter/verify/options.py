"""Options for the verification of an artifact."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Final

from exporter.options import Options, ValueType, option
from exporter.verify.runtimes.installed import NAMES

#: Verification levels, from the cheapest to the strongest. Each level includes the checks of all earlier levels.
LEVELS: Final = ("rows", "weights", "full")


@dataclass(frozen=True, kw_only=True)
class VerifyOptions(Options):
    """Options that select the verification level, the required runtimes and the report folder."""

    section: ClassVar[str] = "verify"

    level: str = option(
        "rows",
        "off: verify nothing. rows: check the trained rows, the tying of embedding and head, and the auxiliary files "
        "on disk. weights: also check every stored value. full: also run the artifact, and compare the outputs with "
        "the outputs of transformers with unmerged PEFT adapters.",
        flag="--verify",
        choices=("off", *LEVELS),
    )
    prompts: Path | None = option(
        None,
        "Text file with one prompt per line, used in addition to the built-in texts of a full verification.",
        type=ValueType.PATH,
        metavar="FILE",
    )
    require: tuple[str, ...] = option((), "Exit with status 6 unless the named runtime is installed.", choices=NAMES)
    report: Path | None = option(
        None, "Folder for report.json, report.xml (JUnit) and report.html.", type=ValueType.PATH, metavar="DIR"
    )

    def check(self) -> None:
        """Raise an error if prompts are given at a level other than full, or a report folder is given at level off."""
        if self.prompts and self.level != "full":
            raise self.fault("prompts", "needs {level} full, because no other verification level runs a model")
        if self.report and self.level == "off":
            raise self.fault(
                "report", "cannot be combined with {level} off, because only a verification writes a report"
            )
