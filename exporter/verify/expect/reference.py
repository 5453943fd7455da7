"""Compute the reference values, which an artifact must equal, from the base checkpoint and the adapters on disk.

The expected weights are computed without the exporter's merge code. The verification has its own code, separate from
the exporter's, for replacing rows of embedding and head by token id and for rounding to a storage dtype.
"""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from exporter.sources.hf.checkpoint import Checkpoint
from exporter.sources.hf.tie import parameters_to_untie
from exporter.sources.hf.tokenizer import read_tokenizer
from exporter.sources.hf.vocabulary_files import read_vocabulary_files
from exporter.sources.peft.adapter import Adapter
from exporter.sources.places import HEAD, use_of
from exporter.verify.expect.dropped_tokens import drop_tokens
from exporter.verify.expect.expected import Expected
from exporter.verify.expect.files import settings, tuned_files
from exporter.verify.expect.kept_rows import keep_rows
from exporter.verify.expect.tables import grow_tables
from exporter.verify.expect.templates import tuned_templates
from exporter.verify.expect.tensors import expected, same_values


@dataclass(frozen=True)
class Reference:
    """The base checkpoint and the unmerged adapters from which the expected values of an artifact are computed.

    untie: True if an artifact made from a tied base must store a separate head, even if embedding and head are equal.
    drop_unused: True if the artifact's tokenizer must lack the tokens that have no embedding row. keeps_rows: True if
    the artifact keeps all rows of the base although the adapters' embedding is reduced, as a patched artifact does.
    """

    checkpoint: Checkpoint
    adapters: Sequence[Adapter]
    untie: bool = False
    drop_unused: bool = False
    keeps_rows: bool = False

    @classmethod
    def open(
        cls, checkpoint: Path, adapters: Sequence[Path], *, untie: bool = False, drop_unused: bool = False
    ) -> Reference:
        """Read the base and the adapters from disk. Raises BadInput if the base or an adapter cannot be used."""
        opened = [Adapter.open(path, via_peft=True) for path in adapters]
        return cls(Checkpoint.open(checkpoint), opened, untie, drop_unused)

    @cached_property
    def tensors(self) -> Mapping[str, Expected]:
        """A dict from the name of each tensor in the base checkpoint to the expected values of the tuned tensor."""
        wanted = expected(self.checkpoint, self.adapters)
        if self.keeps_rows:
            keep_rows(wanted)
        return wanted

    @cached_property
    def untied(self) -> Mapping[str, Expected]:
        """Expected values of the tensors that are added, or get a different role, because tuning unties the head.

        The dict ``untied`` is empty if embedding and head of the base are not tied, or remain tied after tuning.
        """
        base = self.checkpoint
        if self.tied or not base.tie.tied or not base.tie.has_head:
            return {}
        changed: dict[str, Expected] = {}
        for name, stored in parameters_to_untie(base.config, base.modules).items():
            changed[name] = want = self.tensors[stored]
            whole = want.full
            if whole is not None and not whole.in_place and use_of(base, whole.module) == HEAD:
                changed[stored] = Expected(want.base)
        if changed:
            grow_tables(base, self.adapters, {**self.tensors, **changed})
        return changed

    @property
    def embedding(self) -> Expected:
        """The expected values of the input embedding."""
        return self.tensors[self.checkpoint.tie.embedding]

    @property
    def head(self) -> Expected:
        """The expected values of the output head, even if no separate head tensor is stored in the checkpoint."""
        return self.tensors[self.checkpoint.tie.head or "lm_head"]

    @cached_property
    def tied(self) -> bool:
        """Whether the tuned model uses the same tensor as input embedding and as output head.

        A tuned model is tied only if the base is tied, ``untie`` is False, and the expected values of embedding and
        head are equal.
        """
        return self.checkpoint.tie.tied and not self.untie and same_values(self.embedding, self.head)

    @property
    def computes(self) -> bool:
        """Whether at least one expected tensor is the sum of a base tensor and adapter updates."""
        return any(tensor.computed for tensor in self.tensors.values())

    @property
    def trained_ids(self) -> list[int]:
        """The ids of all tokens with a trained row in the embedding or the head, in ascending order."""
        return sorted(self.embedding.rows.keys() | self.head.rows.keys())

    @property
    def base_vocab(self) -> int:
        """The number of rows of the base model's embedding."""
        return self.embedding.base.spec.n_rows

    @property
    def vocab(self) -> int:
        """The number of rows of the tuned model's embedding, including the rows of new tokens."""
        return max(self.embedding.n_rows, self.head.n_rows)

    @property
    def hidden(self) -> int:
        """The number of columns of the embedding, which usually equals the hidden size."""
        return self.embedding.base.spec.shape[1]

    @property
    def cache_shape(self) -> tuple[int, int]:
        """Number of key-value heads and head dimension, needed to run ONNX graphs that declare no KV cache shapes."""
        config = self.checkpoint.text_config
        heads = config.get("num_attention_heads") or config.get("n_head") or 1
        return config.get("num_key_value_heads") or heads, config.get("head_dim") or self.hidden // heads

    @property
    def max_positions(self) -> int | None:
        """The maximum number of positions given in the config, or None if the config gives no maximum.

        A table of position embeddings has at most ``max_positions`` rows.
        """
        config = self.checkpoint.text_config
        stated = [config.get(name) for name in ("max_position_embeddings", "n_positions")]
        return next((count for count in stated if isinstance(count, int) and count > 1), None)

    @property
    def routed(self) -> bool:
        """Whether the model is a mixture of experts."""
        config = self.checkpoint.text_config
        stated = [config.get(name) for name in ("num_local_experts", "num_experts", "n_routed_experts")]
        return any(isinstance(count, int) and count > 1 for count in stated)

    @property
    def start_token(self) -> int | None:
        """The id of the decoder's start token in an encoder-decoder, or None if the config defines no start token."""
        token = self.checkpoint.config.get("decoder_start_token_id")
        return token if isinstance(token, int) else None

    @cached_property
    def auxiliary_files(self) -> Mapping[str, Path]:
        """A dict from file name to path for the tuned model's tokenizer files, chat templates and generation config."""
        files = tuned_files(self.checkpoint.auxiliary_files, [adapter.auxiliary_files for adapter in self.adapters])
        return drop_tokens(files, self.vocab, self._folder) if self.drop_unused else files

    @cached_property
    def _folder(self) -> Path:
        """A folder for expected files that differ from the inputs. The folder is removed with the reference."""
        folder = Path(tempfile.mkdtemp(prefix="ttexport-"))
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        return folder

    @cached_property
    def templates(self) -> Mapping[str, str]:
        """A dict from name to text of each chat template of the tuned model."""
        return tuned_templates(self.checkpoint.auxiliary_files, [adapter.auxiliary_files for adapter in self.adapters])

    @cached_property
    def tokenizer(self) -> Mapping[str, Any]:
        """The parsed tokenizer.json of the tuned model, or vocab.json and merges.txt in the form of a tokenizer.json.

        The dict is empty if the tuned model has none of the files, or has a tokenizer.model instead.
        """
        path, files = self.tokenizer_file(), self.auxiliary_files
        if path or "tokenizer.model" in files:
            return read_tokenizer(path) if path else {}
        model_type = self.checkpoint.config.get("model_type")
        return read_vocabulary_files(files, settings(files), model_type) or {}

    def tokenizer_file(self) -> Path | None:
        """Return the path of the tuned model's tokenizer.json, or None if the tuned model has no tokenizer.json."""
        return self.auxiliary_files.get("tokenizer.json")
