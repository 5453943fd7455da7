"""Writing an adapter folder: staged beside its final name, renamed when complete."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from exporter.errors import OutputError, UsageError, writing

__all__ = ["check_output", "staged", "write_adapter"]


def check_output(out: Path, *, force: bool, inputs: tuple[Path, ...] = ()) -> None:
    """Refuse an output before any work is done for it; arguments and errors as for ``staged``."""
    out = Path(os.path.abspath(out))
    for path in inputs:
        if path.resolve().is_relative_to(out.resolve()):
            raise UsageError(f"-o {out}: would replace an input of the run ({path})")
    if os.path.lexists(out):
        if not force:
            raise OutputError(out, "exists already; choose another name, or replace it with --force")
        if not (out / "adapter_config.json").is_file():
            raise OutputError(out, "is not an adapter folder, so --force does not replace it")


@contextmanager
def staged(out: Path, *, force: bool, inputs: tuple[Path, ...] = ()) -> Iterator[Path]:
    """Yield an empty folder beside ``out`` that takes its place when the block ends well, and is removed otherwise.

    force: replace an existing adapter folder (and nothing else).  inputs: paths that ``out`` must not contain.
    Raises: OutputError when ``out`` exists or cannot be written, UsageError when it would replace an input.
    """
    check_output(out, force=force, inputs=inputs)
    out = Path(os.path.abspath(out))
    partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
    with writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        partial.mkdir()  # plain mkdir: the mode follows umask
    try:
        yield partial
        with writing(out):
            _promote(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _promote(partial: Path, out: Path) -> None:
    if not os.path.lexists(out):
        partial.rename(out)
        return
    old = out.with_name(f".{out.name}.{os.getpid()}.old")
    out.rename(old)
    try:
        partial.rename(out)
    except OSError:
        old.rename(out)
        raise
    shutil.rmtree(old, ignore_errors=True)


def write_adapter(folder: Path, model: Any, tokenizer: Any, record: Mapping[str, Any], state: Any = None) -> None:
    """Write the files of stock PEFT, the tokenizer's own, and ``record`` as train.json; modes follow umask.

    state: the trained parameters by name, where ``model`` does not hold them whole; None takes the model's.
    The embedding matrix is never saved, even if it grew: rows of tokens that are not trained belong to the base.
    """
    with writing(folder):
        model.save_pretrained(folder, state_dict=state, save_embedding_layers=False)
        (folder / "README.md").unlink(missing_ok=True)  # PEFT's template of a card, with nothing filled in
        tokenizer.save_pretrained(folder)
        (folder / "train.json").write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", "utf-8")
        umask = os.umask(0)
        os.umask(umask)
        for path in folder.rglob("*"):
            path.chmod((0o777 if path.is_dir() else 0o666) & ~umask)
