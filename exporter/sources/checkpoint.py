"""A Hugging Face checkpoint folder: config, shards, tokenizer files, and which tensors are tied, by evidence."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final

from exporter.errors import BadInput, UnreadableFile, reading
from exporter.sources.safetensors import FileTensor, parse_object, read_tensors
from exporter.tensors import BLOCK_BYTES, blocks

#: Files that travel with the weights when they are there; everything else in the folder stays behind.
SIDE_FILES: Final = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)

#: Module names that hold the input embedding and the output head in the checkpoints of the field.
_EMBEDDINGS: Final = ("embed_tokens", "wte", "embed_in", "word_embeddings", "shared")
_HEADS: Final = ("lm_head", "embed_out")

_MAX_CONFIG_BYTES: Final = 16 << 20
_PICKLES: Final = ("pytorch_model.bin", "pytorch_model.bin.index.json", "model.pt", "pytorch_model.pt")


@dataclass(frozen=True, slots=True)
class Tie:
    """How the head gets its weight.

    ``embedding`` and ``head`` are stored tensor names (``head`` None if none is stored); ``tied`` says that both
    uses must see the same values.
    """

    embedding: str
    head: str | None
    tied: bool


@dataclass(frozen=True)
class Checkpoint:
    """A folder with ``config.json`` and safetensors shards. Opening reads headers, no tensor data."""

    path: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, FileTensor]

    @classmethod
    def open(cls, path: Path) -> Checkpoint:
        """Read config and headers. Raises BadInput for a folder that is no usable checkpoint."""
        if not path.is_dir():
            found = "a file" if path.exists() else "nothing"
            raise UnreadableFile(path, f"expected a checkpoint folder, found {found}")
        config = read_json(path / "config.json")
        return cls(path, config, _read_shards(path))

    @property
    def text_config(self) -> Mapping[str, Any]:
        """The config of the text model: multimodal wrappers nest it."""
        nested = self.config.get("text_config")
        return nested if isinstance(nested, dict) else self.config

    @property
    def stored_embedding(self) -> str:
        """Name of the input embedding. Raises BadInput if there is none, or more than one."""
        name = self._only_one(_EMBEDDINGS, what="input embedding")
        if name is None:
            raise BadInput(f"{self.path}: expected an input embedding ({', '.join(_EMBEDDINGS)}), found none")
        return name

    @property
    def stored_head(self) -> str | None:
        """Name of the output head's own tensor, or None if none is stored."""
        return self._only_one(_HEADS, what="output head")

    @cached_property
    def tie(self) -> Tie:
        """Decided by evidence: which tensors are stored, then the config, then equality of their bytes."""
        embedding, head = self.stored_embedding, self.stored_head
        flags = [table.get("tie_word_embeddings") for table in (self.config, self.text_config)]
        stated = {flag for flag in flags if isinstance(flag, bool)}
        # transformers before 5 left the flag out where it equalled the class default, and a wrapper may contradict
        # its text model: then the bytes decide.
        flag = stated.pop() if len(stated) == 1 else None
        if head is None:
            if flag is False:
                raise BadInput(f"{self.path}: config unties the head: expected {' or '.join(_HEADS)}, found neither")
            return Tie(embedding, None, tied=True)
        tied = self._same_bytes(embedding, head) if flag is None else flag
        if tied and flag and not self._same_bytes(embedding, head):
            raise BadInput(
                f"{self.path}: config ties {head} to {embedding}: expected equal tensors, found different ones"
            )
        return Tie(embedding, head, tied)

    @cached_property
    def embedding_digest(self) -> str:
        """sha256 of the stored bytes of the input embedding: tells bases apart at the cost of one tensor."""
        digest = hashlib.sha256()
        for _, rows in blocks(self.tensors[self.tie.embedding]):
            digest.update(rows.tobytes())
        return digest.hexdigest()

    @property
    def side_files(self) -> dict[str, Path]:
        """Tokenizer, chat template and generation config: name → path, for those that exist."""
        return side_files(self.path)

    def _only_one(self, modules: tuple[str, ...], *, what: str) -> str | None:
        names = [name for name in self.tensors if name.split(".")[-2:] in [[module, "weight"] for module in modules]]
        if len(names) > 1:
            raise BadInput(f"{self.path}: expected one {what}, found {', '.join(sorted(names))}")
        return names[0] if names else None

    def _same_bytes(self, one: str, other: str) -> bool:
        left, right = self.tensors[one], self.tensors[other]
        if (left.spec.dtype, left.spec.shape) != (right.spec.dtype, right.spec.shape):
            return False
        step = max(1, BLOCK_BYTES // max(1, left.spec.row_nbytes))
        for start in range(0, left.spec.n_rows, step):
            stop = min(start + step, left.spec.n_rows)
            if left.rows(start, stop).tobytes() != right.rows(start, stop).tobytes():
                return False
        return True


def side_files(folder: Path) -> dict[str, Path]:
    """The files of ``SIDE_FILES`` that ``folder`` holds: name → path."""
    return {name: folder / name for name in SIDE_FILES if (folder / name).is_file()}


def read_json(path: Path, *, max_nbytes: int = _MAX_CONFIG_BYTES) -> dict[str, Any]:
    """The JSON object in ``path``. Raises UnreadableFile for anything else, or for more than ``max_nbytes``."""
    with reading(path):
        size = path.stat().st_size
        if size > max_nbytes:
            raise UnreadableFile(path, f"expected at most {max_nbytes} bytes of JSON, found {size}")
        text = path.read_bytes()
    return parse_object(path, text, what=path.name)


def _read_shards(path: Path) -> dict[str, FileTensor]:
    index, single = path / "model.safetensors.index.json", path / "model.safetensors"
    if single.exists():  # transformers, too, prefers it to an index: the reference must be the same weights
        return read_tensors(single)
    if index.exists():
        return _read_indexed(path, index)
    for name in _PICKLES:
        if (path / name).exists():
            raise BadInput(
                f"{path / name}: expected model.safetensors, found pickled weights, which are not read; convert them "
                "with AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder)"
            )
    raise UnreadableFile(path, "expected model.safetensors or model.safetensors.index.json, found neither")


def _read_indexed(path: Path, index: Path) -> dict[str, FileTensor]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise UnreadableFile(index, "expected a weight_map of tensor name to shard file, found none")
    tensors: dict[str, FileTensor] = {}
    for shard in sorted(set(weight_map.values())):
        if Path(shard).name != shard or shard in ("", ".", "..") or "\0" in shard:
            raise UnreadableFile(index, f"expected shards inside the folder, found {shard!r}")
        held = read_tensors(path / shard)
        for name, tensor in held.items():
            if weight_map.get(name) != shard:
                raise UnreadableFile(index, f"{name}: expected in {weight_map.get(name)}, found in {shard}")
            tensors[name] = tensor
    if missing := weight_map.keys() - tensors.keys():
        name = min(missing)
        raise UnreadableFile(path / weight_map[name], f"{name}: expected by the index, found nothing")
    return tensors
