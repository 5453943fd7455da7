"""Overlay checkpoints as llama.cpp's converter reads them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path


def flattened(overlay: Path, out: Path) -> Path:
    """Write a plain checkpoint with the tensors that the index of ``overlay`` names, and return its folder."""
    places = json.loads((overlay / "model.safetensors.index.json").read_text())["weight_map"]
    header: dict[str, object] = {}
    blobs, end = [], 0
    for name, shard in places.items():
        entry, data = stored(overlay / shard, name)
        header[name] = {**entry, "data_offsets": [end, end + len(data)]}
        blobs.append(data)
        end += len(data)
    out.mkdir()
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    (out / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + b"".join(blobs))
    for file in overlay.iterdir():
        if not file.name.startswith("model"):
            shutil.copyfile(file, out / file.name)
    return out


def stored(shard: Path, name: str) -> tuple[dict[str, object], bytes]:
    """The header entry and the bytes of a tensor in a safetensors file."""
    data = shard.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    entry = json.loads(data[8:start])[name]
    first, last = entry["data_offsets"]
    return entry, data[start + first : start + last]
