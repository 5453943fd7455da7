"""Finds the folder that contains an adapter: PEFT creates a subfolder for every adapter whose name is not "default"."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from exporter.errors import BadInput, UnreadableFile, reading
from exporter.sources.hf.checkpoint import auxiliary_files

CONFIG: Final = "adapter_config.json"


def adapter_folder(path: Path) -> Path:
    """Return the folder that contains the adapter's files: ``path``, or the only subfolder of ``path`` with an adapter.

    Source: ``PeftModel.save_pretrained``. Raises UnreadableFile if neither ``path`` nor a subfolder of ``path``
    contains an adapter. Raises BadInput if ``path`` contains several adapters, or if the tokenizer is not in the
    adapter's own folder, because it is then unclear to which adapter the tokenizer belongs.
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
    """Return the subfolders of ``path`` that contain an adapter, sorted by name."""
    with reading(path):
        return sorted(config.parent for config in path.glob(f"*/{CONFIG}"))
