"""Write the adapter folder, and check whether an existing output may be replaced."""

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
    """Check, before any work is done, that the output folder can be written.

    The arguments and the errors are those of ``staged_adapter``.
    """
    out = Path(os.path.abspath(out))
    require_apart(out, inputs)
    if os.path.lexists(out):
        if not force:
            raise OutputError(
                out, "the output exists already; choose another name, or use --force to replace an adapter folder"
            )
        if not (out / "adapter_config.json").is_file():
            raise OutputError(
                out,
                "the output is not an adapter folder, and --force replaces only adapter folders; choose another name",
            )


@contextmanager
def staged_adapter(out: Path, *, force: bool, inputs: tuple[Path, ...] = ()) -> Iterator[Path]:
    """Yield an empty folder that is renamed to ``out`` if the block ends without an error.

    If the block raises an error, the folder is removed. The folder is synced to disk and renamed to ``out`` in one step
    (``exporter.io.staging.staged``). The files get the modes that the process's umask permits. force: replace ``out``
    if ``out`` is an adapter folder. inputs: paths that ``out`` must not replace. Raises: OutputError if ``out`` exists
    or cannot be written, UsageError if ``out`` would replace an input.
    """
    check_output(out, force=force, inputs=inputs)
    with staged(Path(os.path.abspath(out)), force=force) as draft:
        with writing(draft):
            draft.mkdir()
        yield draft
        with writing(draft):
            _finish(draft)


def _finish(folder: Path) -> None:
    """Set the modes of all files below ``folder`` according to the umask, and sync the files to disk.

    The modes are set because some libraries write files with mode 0600.
    """
    umask = os.umask(0)
    os.umask(umask)
    for path in folder.rglob("*"):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~umask)
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


def write_adapter(folder: Path, model: Any, tokenizer: Any, record: Mapping[str, Any], state: Any = None) -> None:
    """Write the adapter in PEFT's format, the files of the tokenizer, and the training record ``record`` as train.json.

    state: the trained parameters by name, needed if ``model`` contains only shards of the parameters; if None, the
    parameters are read from ``model``. The embedding matrix is never saved, even if new tokens made the matrix grow,
    because rows of untrained tokens belong to the base.
    """
    with writing(folder):
        model.save_pretrained(folder, state_dict=state, save_embedding_layers=False)
        (folder / "README.md").unlink(missing_ok=True)  # PEFT writes an empty template of a model card
        tokenizer.save_pretrained(folder)
        (folder / "train.json").write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", "utf-8")
