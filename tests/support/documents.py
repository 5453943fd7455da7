"""Read reports and validate them against the schema."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import Any

import jsonschema

SCHEMA: dict[str, Any] = json.loads(
    resources.files("exporter.verify.reports").joinpath("report.schema.json").read_text("utf-8")
)


def validate(document: object) -> None:
    jsonschema.Draft202012Validator(SCHEMA).validate(document)


def read_report(folder: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((folder / "report.json").read_text("utf-8"))
    validate(document)
    return document
