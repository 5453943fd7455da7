"""The adapter folder: what an output may replace, and the files in it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from exporter.errors import OutputError, writing
from exporter.io.apart import require_apart
from exporter.io.staging import staged

__all__ = ["check_output", "staged_adapter", "write_adapter"]


def check_output(out: Path, *, force: bool, inputs: tuple[Path, ...] = ()) -> None:
    """Refuse an output before any work is done for it; arguments and errors as for ``staged_adapter``."""
    out = Path(os.path.abspath(out))
    require_apart(out, inputs)
    if os.path.lexists(out):
        if not force:
            raise OutputError(out, "exists already; choose another name, or --force replaces it")
        if not (out / "adapter_config.json").is_file():
            raise OutputError(out, "is not an adapter folder, so --force does not replace it")


@contextmanager
def staged_adapter(out: Path, *, force: bool, inputs: tuple[Path, ...] = ()) -> Iterator[Path]:
    """Yield an empty folder that becomes ``out`` when the block ends without an error, and is removed otherwise.

    It is synced and gets its name in one rename (``exporter.io.staging.staged``); file modes follow the umask.
    force: replace an existing adapter folder (nothing else).  inputs: paths that ``out`` must not replace.
    Raises: OutputError when ``out`` exists or cannot be written, UsageError when it would replace an input.
    """
    check_output(out, force=force, inputs=inputs)
    with staged(Path(os.path.abspath(out)), force=force) as draft:
        with writing(draft):
            draft.mkdir()
        yield draft
        with writing(draft):
            _finish(draft)


def _finish(folder: Path) -> None:
    """Give all files below ``folder`` the umask's mode and sync them: some libraries write with mode 0600."""
    umask = os.umask(0)
    os.umask(umask)
    for path in folder.rglob("*"):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~umask)
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


def write_adapter(folder: Path, model: Any, tokenizer: Any, record: Mapping[str, Any], state: Any = None) -> None:
    """Write the files of stock PEFT, the tokenizer's own, and ``record`` as train.json.

    state: the trained parameters by name, where ``model`` does not hold them whole; None takes the model's.
    The embedding matrix is never saved, even if it grew: rows of tokens that are not trained belong to the base.
    """
    with writing(folder):
        model.save_pretrained(folder, state_dict=state, save_embedding_layers=False)
        (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty template of a model card
        tokenizer.save_pretrained(folder)
        (folder / "train.json").write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", "utf-8")
