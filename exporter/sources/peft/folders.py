"""Finds the folder of an adapter, which PEFT names after the adapter unless the adapter's name is "default"."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from exporter.errors import BadInput, UnreadableFile, reading
from exporter.sources.hf.checkpoint import auxiliary_files

CONFIG: Final = "adapter_config.json"


def adapter_folder(path: Path) -> Path:
    """Return the folder with the adapter's files: ``path``, or the only folder in ``path`` that contains an adapter.

    Source: ``PeftModel.save_pretrained``. Raises UnreadableFile if neither ``path`` nor a folder in ``path`` contains
    an adapter. Raises BadInput if ``path`` contains several adapters, or if the tokenizer is not in the adapter's
    folder, because a tokenizer belongs to a single adapter.
    """
    if os.path.lexists(path / CONFIG):
        return path
    folders = named_adapters(path)
    if not folders:
        raise UnreadableFile(path / CONFIG, "expected the config file of a PEFT adapter, found no such file")
    if len(folders) > 1:
        names = ", ".join(folder.name for folder in folders)
        raise BadInput(
            f"{path}: expected the folder of one adapter, found the adapters {names}; give the path of each adapter"
        )
    (folder,) = folders
    if (outside := auxiliary_files(path)) and not auxiliary_files(folder):
        name = next(iter(outside))
        raise BadInput(
            f"{path / name}: expected the tokenizer in the folder of the adapter, {folder}, found it outside; "
            f"move the tokenizer's files, or give {folder} to merge the adapter without the tokenizer"
        )
    return folder


def named_adapters(path: Path) -> list[Path]:
    """Return the folders in the folder ``path`` that contain an adapter, by name."""
    with reading(path):
        return sorted(config.parent for config in path.glob(f"*/{CONFIG}"))
