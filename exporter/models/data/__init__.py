"""Contains facts generated from transformers: one file per model type, and one file with all weight conversions."""

from __future__ import annotations

from pathlib import Path
from typing import Final

#: The folder of the generated files.
FOLDER: Final = Path(__file__).parent
#: Name of the file with the conversions of all model types and classes.
CONVERSIONS: Final = "conversions.json"
#: Name of the file that maps the name of every described class to its model type.
CLASSES: Final = "classes.json"
