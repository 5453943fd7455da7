"""Finds the folder that contains an adapter. PEFT saves an adapter to a subfolder if its name is not "default"."""

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
    contains an adapter. Raises BadInput if ``path`` contains several adapters. Raises BadInput if the tokenizer is
    stored in ``path`` although the adapter is stored in a subfolder, because the tokenizer may belong to another
    adapter.
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
            f"{path / name}: expected the tokenizer in the folder of the adapter ({folder}), found the tokenizer "
            f"in {path}; move the tokenizer's files, or give {folder} to merge the adapter without the tokenizer"
        )
    return folder


def named_adapters(path: Path) -> list[Path]:
    """Return the subfolders of ``path`` that contain an adapter, sorted by name."""
    with reading(path):
        return sorted(config.parent for config in path.glob(f"*/{CONFIG}"))
