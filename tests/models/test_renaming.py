"""Renamed names equal those of transformers' own transforms, for every entry of its conversion table."""

from __future__ import annotations

from functools import cache

import pytest
from transformers import conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    WeightTransform,
    dot_natural_key,
    rename_source_key,
)

from exporter.models.facts import conversions_of
from exporter.models.renaming import Renamer, rename
from tests.support.patterns import sample

TABLE = conversion_mapping._build_checkpoint_conversion_mapping()
#: Names of tensors as many checkpoints have them, so that transforms also see names that they must leave alone.
COMMON = (
    "model.embed_tokens.weight",
    "model.layers.3.self_attn.q_proj.weight",
    "model.layers.0.mlp.experts.12.gate_proj.weight",
    "model.layers.0.block_sparse_moe.experts.1.w1.weight",
    "language_model.model.layers.1.mlp.down_proj.weight",
    "model.language_model.layers.1.mlp.gate_up_proj.weight",
    "vision_tower.vision_model.encoder.layers.0.self_attn.out_proj.bias",
    "model.visual.blocks.0.attn.qkv.weight",
    "encoder.layer.0.attention.self.query.weight",
    "bert.embeddings.LayerNorm.gamma",
    "transformer.h.0.attn.c_attn.weight_g",
    "lm_head.weight",
    "lm_head.weight_scale_inv",
)
#: What stands around the text that a pattern matches.
AROUND = (("", ""), ("model.layers.0.", ".weight"), ("language_model.", ""), ("model.", ".bias"), ("a_", "_b"))


@cache
def names_for(key: str) -> list[str]:
    texts = [
        sample(source.replace("*.", r".*\."), seed)
        for transform in TABLE[key]
        for source in transform.source_patterns
        for seed in range(4)
    ]
    made = {f"{start}{text}{end}" for text in texts for start, end in AROUND} | set(COMMON)
    return sorted(made, key=dot_natural_key)


def transforms(key: str, scope: str | None, prefix: str) -> list[WeightTransform]:
    copies = conversion_mapping.get_checkpoint_conversion_mapping(key)
    assert copies is not None
    for transform in copies:
        transform.scope_prefix = scope
        transform.base_model_prefix = None if scope is None else prefix
    return list(copies)


def renamed_by_transformers(items: list[WeightTransform], name: str) -> tuple[str, str | None]:
    converters = [item for item in items if isinstance(item, WeightConverter)]
    renamings = [item for item in items if isinstance(item, WeightRenaming)]
    return rename_source_key(name, renamings, converters)


@pytest.mark.parametrize("key", sorted(TABLE))
def test_names_become_what_transformers_makes_of_them(key: str) -> None:
    for scope, prefix in ((None, ""), ("", "model"), ("language_model", "model")):
        theirs = transforms(key, scope, prefix)
        ours = [Renamer(transform, scope, prefix) for transform in conversions_of(key) or ()]
        start = "" if scope is None else f"{scope}.".lstrip(".")
        names = [*names_for(key), *(f"{start}{name}" for name in names_for(key) if start)]
        for renamer in ours:
            renamer.activate(names)
        for name in names:
            want, pattern = renamed_by_transformers(theirs, name)
            actual, converter = rename(name, ours)
            number = converter and converter[1]
            assert (actual, number is not None) == (want, pattern is not None), name
            if converter and pattern:
                assert converter[0].transform.sources[converter[1]] in (pattern, pattern.removeprefix("^")), name


def test_the_names_match_nearly_every_pattern_of_the_table() -> None:
    unmatched = {
        (key, transform.source_patterns[0])
        for key, listed in TABLE.items()
        for transform in listed
        if not any(transform.compiled_sources.search(name) for name in names_for(key))
    }
    assert unmatched == set()
