"""Generate facts about model types that are missing in the data files, from the installed version of transformers.

The installed version of transformers may be newer than the data files and define additional model types. For an
additional model type, a helper process constructs models without weights, collects the facts, and stores them in the
user's cache.
"""

from __future__ import annotations

import importlib.metadata
import os
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import Final

import msgspec

from exporter.io.processes import OFFLINE, failure
from exporter.models.facts import TypeFacts, transformers_version

_HELPER: Final = "exporter.models.describe"


@lru_cache(maxsize=16)
def unlisted_facts(model_type: str) -> TypeFacts | None:
    """Return the facts about a model type that is missing in the data files, or None if no facts can be generated.

    The result is None if transformers is not installed, if the data files were generated from the installed version of
    transformers, or if the installed version does not define the model type. The first call for a model type takes a
    few seconds, because a helper process imports transformers.
    """
    try:
        version = importlib.metadata.version("transformers")
    except importlib.metadata.PackageNotFoundError:
        return None
    if version == transformers_version() or not model_type.isidentifier():
        return None
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ttexport" / "models" / version
    facts = _read(folder / f"{model_type}.json") or _describe(model_type, folder)
    return facts if facts and facts.classes else None


def _describe(model_type: str, folder: Path) -> TypeFacts | None:
    """Run the helper process, and store the generated file in ``folder`` if ``folder`` is writable."""
    with tempfile.TemporaryDirectory(prefix="ttexport-") as scratch:
        path = Path(scratch) / f"{model_type}.json"
        if failure(_HELPER, model_type, str(path), environment={**os.environ, **OFFLINE}) is not None:
            return None
        facts = _read(path)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            kept = folder / f".{model_type}.{os.getpid()}"
            kept.write_bytes(path.read_bytes())
            kept.replace(folder / path.name)
        except OSError:
            pass  # without a cache, the next process describes the type again
        return facts


def _read(path: Path) -> TypeFacts | None:
    try:
        return msgspec.json.decode(path.read_bytes(), type=TypeFacts)
    except (OSError, msgspec.DecodeError):
        return None
