"""Write the facts about one model type of the installed transformers to a file. The module is run as a helper process.

    python -m exporter.models.describe MODEL_TYPE FILE

The file has the layout of the generated data, and also contains the conversions of the installed transformers. If
transformers does not know the model type, the file contains no classes.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from exporter.models.generate import conversions
from exporter.models.generate_class import describe_class, text_classes


def main(arguments: Sequence[str]) -> int:
    """Describe the model type ``arguments[0]`` in the file ``arguments[1]``. Returns 0."""
    model_type, path = arguments
    entry = text_classes().get(model_type, {"tasks": {}, "classes": []})
    described = [describe_class(name, complete=True) for name in entry["classes"]]
    content: dict[str, Any] = {
        "tasks": entry["tasks"],
        "unbuilt": {name: error for name, _, error in described if error},
        "classes": {name: facts for name, facts, _ in described if facts},
        "conversions": conversions() if entry["classes"] else {},
    }
    Path(path).write_text(json.dumps(content, sort_keys=True))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
