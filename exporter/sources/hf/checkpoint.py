"""A Hugging Face checkpoint folder: config, shards, tokenizer files, and which tensors are tied, by evidence."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import numpy as np

from exporter.errors import BadInput, UnreadableFile
from exporter.io.json_objects import read_object
from exporter.sources.hf.safetensors import FileTensor, read_tensors
from exporter.tensors import BLOCK_BYTES, blocks

#: Files that travel with the weights when they are there; everything else in the folder stays behind.
AUXILIARY_FILES: Final = (
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
#: Chat templates besides the default one lie in a folder of their own, a NAME.jinja each (transformers' layout).
ADDITIONAL_TEMPLATES: Final = "additional_chat_templates/*.jinja"

#: Module names that hold the input embedding and the output head in the checkpoints of the field.
EMBEDDINGS: Final = ("embed_tokens", "wte", "embed_in", "word_embeddings", "shared")
HEADS: Final = ("lm_head", "embed_out")

#: transformers ties these whatever the flag says; there, it tells how the head's input is scaled.
_ALWAYS_TIED: Final = ("t5", "mt5", "umt5")

#: Hashed at once: memory of this size is reused from block to block, where a larger one is fetched anew.
_HASHED_BYTES: Final = 1 << 20
#: An index has a line a tensor: a hundred bytes each, and models with many experts have 100,000 and more.
MAX_INDEX_BYTES: Final = 64 << 20
_PICKLES: Final = ("pytorch_model.bin", "pytorch_model.bin.index.json", "model.pt", "pytorch_model.pt")


@dataclass(frozen=True, slots=True)
class Tie:
    """How the head gets its weight.

    ``embedding`` and ``head`` are stored tensor names (``head`` None if none is stored); ``tied`` says that both
    uses must see the same values. ``copies``: further tensors that hold the embedding once more, as old
    encoder-decoder checkpoints store it for each side. ``tied_in_config``: the config ties them; PEFT then sets the
    embedding's rows in the head, too, even if a different head is stored.
    """

    embedding: str
    head: str | None
    tied: bool
    copies: tuple[str, ...] = ()
    tied_in_config: bool = False


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
        config = read_object(path / "config.json")
        return cls(path, config, _read_shards(path))

    @property
    def text_config(self) -> Mapping[str, Any]:
        """The config of the text model: multimodal wrappers nest it."""
        nested = self.config.get("text_config")
        return nested if isinstance(nested, dict) else self.config

    @property
    def is_encoder_decoder(self) -> bool:
        """Whether the input embedding serves an encoder and a decoder."""
        return self.config.get("is_encoder_decoder") is True

    @property
    def stored_embedding(self) -> str:
        """Name of the input embedding. Raises BadInput if there is none, or more than one that is no copy."""
        return self._embeddings[0]

    @property
    def stored_head(self) -> str | None:
        """Name of the output head's own tensor, or None if none is stored."""
        names = self._named(HEADS)
        if len(names) > 1:
            raise BadInput(f"{self.path}: expected one output head, found {', '.join(names)}")
        return names[0] if names else None

    @cached_property
    def tie(self) -> Tie:
        """Decided by evidence, as transformers does.

        A head that is stored and differs is not tied, whatever the config says; an equal one is, unless the config
        says otherwise.
        """
        (embedding, *copies), head = self._embeddings, self.stored_head
        flags = [table.get("tie_word_embeddings") for table in (self.config, self.text_config)]
        stated = {flag for flag in flags if isinstance(flag, bool)}
        # transformers before 5 left the flag out where it equalled the class default, and a wrapper may contradict
        # its text model: then the tensors alone decide.
        flag = stated.pop() if len(stated) == 1 else None
        if self.config.get("model_type") in _ALWAYS_TIED:
            flag = True
        if head is None:
            if flag is False:
                raise BadInput(f"{self.path}: config unties the head: expected {' or '.join(HEADS)}, found neither")
            return Tie(embedding, None, tied=True, copies=tuple(copies), tied_in_config=True)
        tied = flag is not False and self._same_bytes(embedding, head)
        return Tie(embedding, head, tied, tuple(copies), tied_in_config=tied if flag is None else flag)

    @cached_property
    def embedding_digest(self) -> str:
        """sha256 of the stored bytes of the input embedding: tells bases apart at the cost of one tensor."""
        return self.digest(self.tie.embedding)

    def digest(self, name: str) -> str:
        """sha256 of the stored bytes of the tensor ``name``, in hexadecimal. Memory: one block of rows."""
        digest = hashlib.sha256()
        for _, rows in blocks(self.tensors[name], _HASHED_BYTES):
            digest.update(rows.reshape(-1).view(np.uint8).data)
        return digest.hexdigest()

    @property
    def auxiliary_files(self) -> dict[str, Path]:
        """Tokenizer, chat template and generation config: name → path, for those that exist."""
        return auxiliary_files(self.path)

    @cached_property
    def _embeddings(self) -> list[str]:
        """The input embedding, then its copies: encoder-decoder checkpoints may store it for both sides as well."""
        names = self._named(EMBEDDINGS)
        if not names:
            raise BadInput(f"{self.path}: expected an input embedding ({', '.join(EMBEDDINGS)}), found none")
        first = next((name for name in names if name.endswith("shared.weight")), names[0])
        copies = [name for name in names if name != first]
        if copies and not self.is_encoder_decoder:
            raise BadInput(f"{self.path}: expected one input embedding, found {', '.join(sorted(names))}")
        for name in copies:
            if not self._same_bytes(first, name):
                raise BadInput(f"{self.path}: {name}: expected the same values as {first}, found others")
        return [first, *copies]

    def _named(self, modules: tuple[str, ...]) -> list[str]:
        wanted = [[module, "weight"] for module in modules]
        return sorted(name for name in self.tensors if name.split(".")[-2:] in wanted)

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


def auxiliary_files(folder: Path) -> dict[str, Path]:
    """What ``folder`` holds of ``AUXILIARY_FILES`` and ``ADDITIONAL_TEMPLATES``: name, with slashes → path.

    Broken ones count: reading them says so.
    """
    more = [path.relative_to(folder).as_posix() for path in sorted(folder.glob(ADDITIONAL_TEMPLATES))]
    return {name: folder / name for name in (*AUXILIARY_FILES, *more) if os.path.lexists(folder / name)}


def _read_shards(path: Path) -> dict[str, FileTensor]:
    index, single = path / "model.safetensors.index.json", path / "model.safetensors"
    if os.path.lexists(single):  # transformers, too, prefers it to an index: the reference must be the same weights
        return read_tensors(single)
    if os.path.lexists(index):
        return _read_indexed(path, index)
    for name in _PICKLES:
        if (path / name).exists():
            raise BadInput(
                f"{path / name}: expected model.safetensors, found pickled weights, which are not read; convert them "
                "with AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder)"
            )
    raise UnreadableFile(path, "expected model.safetensors or model.safetensors.index.json, found neither")


def _read_indexed(path: Path, index: Path) -> dict[str, FileTensor]:
    weight_map = read_object(index, max_nbytes=MAX_INDEX_BYTES).get("weight_map")
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
