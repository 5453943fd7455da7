"""Reads a Hugging Face checkpoint folder and determines whether its input embedding and output head are tied."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Any, Final

from exporter.errors import BadInput, UnreadableFile
from exporter.io.json_objects import read_object
from exporter.models.module_map import ModuleMap, module_map
from exporter.sources.hf.quantised import Quantisation, find_quantisation
from exporter.sources.hf.safetensors import FileTensor, read_tensors
from exporter.sources.hf.tie import Tie, find_stored, find_tie
from exporter.tensors import byte_blocks

CONFIG: Final = "config.json"
WEIGHTS: Final = "model.safetensors"
INDEX: Final = "model.safetensors.index.json"
GENERATION_CONFIG: Final = "generation_config.json"
#: File names of a tokenizer's vocabulary. A tokenizer has at least one file with such a name.
VOCABULARIES: Final = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tekken.json",
    "tiktoken.model",
)
TOKENIZER_CONFIG: Final = "tokenizer_config.json"
#: Chat templates: the template without a name, and the older file that only processors read.
TEMPLATE: Final = "chat_template.jinja"
LEGACY_TEMPLATE: Final = "chat_template.json"
PROCESSOR_CONFIG: Final = "processor_config.json"
#: Settings of the processors of images, sounds and videos. A model that reads only text has none of these files.
PROCESSOR_FILES: Final = frozenset(
    {PROCESSOR_CONFIG, "preprocessor_config.json", "video_preprocessor_config.json", "audio_tokenizer_config.json"}
)

#: Auxiliary files. An export copies these files with the weights if the files exist, and copies no other file.
AUXILIARY_FILES: Final = (
    GENERATION_CONFIG,
    *VOCABULARIES,
    TOKENIZER_CONFIG,
    "special_tokens_map.json",
    "added_tokens.json",
    "merges.txt",
    TEMPLATE,
    LEGACY_TEMPLATE,
    *sorted(PROCESSOR_FILES),
)
#: Chat templates besides the default template: a folder with a file NAME.jinja for each (transformers' layout).
ADDITIONAL_TEMPLATES: Final = "additional_chat_templates/*.jinja"
#: Patterns of auxiliary files in subfolders. A processor may have tokenizers besides the model's tokenizer, for example
#: in the folder qformer_tokenizer.
AUXILIARY_PATTERNS: Final = (
    ADDITIONAL_TEMPLATES,
    *("*_tokenizer/*.json", "*_tokenizer/*.txt", "*_tokenizer/*.model"),
)

#: Limit for an index. An index has about a hundred bytes per tensor, and a model with many experts may have more than
#: 100,000 tensors.
MAX_INDEX_BYTES: Final = 64 << 20
_PICKLES: Final = ("pytorch_model.bin", "pytorch_model.bin.index.json", "model.pt", "pytorch_model.pt")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder with ``config.json`` and safetensors shards.

    ``open`` reads the headers of the shards, but no tensor data.
    """

    path: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, FileTensor]

    @classmethod
    def open(cls, path: Path) -> Checkpoint:
        """Read the config and the headers of the safetensors shards, but no tensor data.

        Raises BadInput if ``path`` is not a valid checkpoint folder.
        """
        if not path.is_dir():
            actual = "a file" if path.exists() else "no such folder"
            raise UnreadableFile(path, f"expected a checkpoint folder, found {actual}")
        config = read_object(path / CONFIG)
        return cls(path, config, _read_shards(path))

    @property
    def text_config(self) -> Mapping[str, Any]:
        """Return the config of the text model, which is nested inside the main config if the model is multimodal."""
        nested = self.config.get("text_config")
        return nested if isinstance(nested, dict) else self.config

    @property
    def is_encoder_decoder(self) -> bool:
        """Whether the model is an encoder-decoder model whose encoder and decoder share the input embedding."""
        return self.config.get("is_encoder_decoder") is True

    @cached_property
    def modules(self) -> ModuleMap | None:
        """The map from the loaded model's parameters to the stored tensors, or None if the model class is unknown."""
        return module_map(self.config, self.tensors.keys())

    @cached_property
    def tie(self) -> Tie:
        """The names of the stored embedding and head, and the information whether embedding and head are tied.

        Raises BadInput if the checkpoint stores no embedding, or if the config contradicts the stored tensors.
        """
        return find_tie(self.path, self.config, self.tensors, self.modules)

    @property
    def stored_embedding(self) -> str:
        """Name of the tensor that stores the input embedding.

        Raises BadInput if the checkpoint stores no input embedding.
        """
        return self._stored[0]

    @property
    def stored_head(self) -> str | None:
        """Name of the tensor that stores the output head, or None if no head is stored.

        The name of a stored head is returned even if the config ties the head to the embedding.
        """
        return self._stored[1]

    @cached_property
    def _stored(self) -> tuple[str, str | None]:
        modules = self.modules
        if modules is None or modules.architecture.embedding is None:
            return self.tie.embedding, self.tie.head
        return find_stored(self.path, self.tensors, modules)[:2]

    @cached_property
    def quantisation(self) -> Quantisation | None:
        """The quantisation of the checkpoint, detected from the config or the tensors, or None if unquantised."""
        return find_quantisation(self.config, self.tensors)

    @cached_property
    def embedding_digest(self) -> str:
        """Return the SHA-256 digest of the stored bytes of the input embedding.

        The digest of the embedding identifies the base model, because hashing one tensor is faster than hashing the
        whole checkpoint.
        """
        return self.digest(self.tie.embedding)

    def digest(self, name: str) -> str:
        """Return the SHA-256 digest of the stored bytes of the tensor ``name``, in hexadecimal.

        Peak memory: one block of rows of the tensor.
        """
        digest = hashlib.sha256()
        for content in byte_blocks(self.tensors[name]):
            digest.update(content)
        return digest.hexdigest()

    @property
    def auxiliary_files(self) -> dict[str, Path]:
        """Map the names of the auxiliary files (tokenizer, chat templates, generation config) to their paths."""
        return auxiliary_files(self.path)


def auxiliary_files(folder: Path) -> dict[str, Path]:
    """Map the names of the auxiliary files (tokenizer, templates, generation config) in ``folder`` to their paths.

    The file names contain forward slashes on every operating system. Broken links and unreadable files are included, so
    that reading such a file later raises an error.
    """
    paths = sorted(path for pattern in AUXILIARY_PATTERNS for path in folder.glob(pattern))
    names = [path.relative_to(folder).as_posix() for path in paths]
    return {name: folder / name for name in (*AUXILIARY_FILES, *names) if os.path.lexists(folder / name)}


def is_auxiliary(name: str) -> bool:
    """Whether ``name``, a path relative to the model's folder, is the name of an auxiliary file."""
    return name in AUXILIARY_FILES or any(fnmatchcase(name, pattern) for pattern in AUXILIARY_PATTERNS)


def is_of_processor(name: str) -> bool:
    """Whether the auxiliary file ``name`` belongs to a processor of images, sounds or videos."""
    return name in PROCESSOR_FILES or any(fnmatchcase(name, pattern) for pattern in AUXILIARY_PATTERNS[1:])


def _read_shards(path: Path) -> dict[str, FileTensor]:
    index, single = path / INDEX, path / WEIGHTS
    if os.path.lexists(
        single
    ):  # transformers also prefers a single file to an index, and both must read the same weights
        return read_tensors(single)
    if os.path.lexists(index):
        return _read_indexed(path, index)
    for name in _PICKLES:
        if (path / name).exists():
            raise BadInput(
                f"{path / name}: expected {WEIGHTS}, found pickled weights, which ttexport does not read; "
                "convert the weights with AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder)"
            )
    raise UnreadableFile(path, f"expected {WEIGHTS} or {INDEX}, found no such file")


def _read_indexed(path: Path, index: Path) -> dict[str, FileTensor]:
    weight_map = read_object(index, max_nbytes=MAX_INDEX_BYTES).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise UnreadableFile(index, "expected a weight_map from tensor names to shard files, found no valid weight_map")
    tensors: dict[str, FileTensor] = {}
    for shard in sorted(set(weight_map.values())):
        if Path(shard).name != shard or shard in ("", ".", "..") or "\0" in shard:
            raise UnreadableFile(index, f"expected shard files in the folder of the index, found {shard!r}")
        for name, tensor in read_tensors(path / shard).items():
            if weight_map.get(name) != shard:
                listed = weight_map.get(name, "no shard")
                raise UnreadableFile(index, f"{name}: expected the tensor in {listed}, found the tensor in {shard}")
            tensors[name] = tensor
    if missing := weight_map.keys() - tensors.keys():
        name = min(missing)
        raise UnreadableFile(
            path / weight_map[name], f"expected the tensor {name}, which the index lists, found no such tensor"
        )
    return tensors
