"""Overlay checkpoints as llama.cpp's converter reads them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

# llama.cpp's script with a fixed pre-tokenizer, because it does not know the hash of a tiny tokenizer.
_SCRIPT = """
import sys
root = {root!r}
sys.path[:0] = [root, root + "/gguf-py"]
import conversion.base
conversion.base.TextModel.get_vocab_base_pre = lambda self, tokenizer: {pre_tokenizer!r}
import convert_hf_to_gguf
convert_hf_to_gguf.main()
"""


def script_for_tiny_tokenizers(root: Path, folder: Path, pre_tokenizer: str = "smollm") -> Path:
    """Write a folder that holds the converter of ``root`` with the name of the pre-tokenizer, and return the script."""
    folder.mkdir(parents=True)
    for name in ("conversion", "gguf-py"):
        (folder / name).symlink_to(root / name)
    script = folder / "convert_hf_to_gguf.py"
    script.write_text(_SCRIPT.format(root=str(root), pre_tokenizer=pre_tokenizer))
    return script


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
